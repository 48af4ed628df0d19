"""Keyturn, the sidecar: whose credential pays for a request? See DESIGN and docs/."""
