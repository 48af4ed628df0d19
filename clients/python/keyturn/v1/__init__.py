"""Generated messages and stubs of the wire contract `keyturn.v1` (protos/keyturn/v1)."""
