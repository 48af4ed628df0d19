"""Users' keys at rest and sealed tokens in the caller's hands.

The secret's own type is :class:`keyturn.secret.Secret`, shared with the client.
"""
