"""`keyturn keygen`: a new master key."""

from __future__ import annotations

import os
import sys

from keyturn_server.cli.stdout import write
from keyturn_server.keys.keyring import parse_master_key


def keygen() -> None:
    """Print a new master key for ENCRYPTION_KEY. Its id, which is no secret, goes to stderr.

    Keep it as carefully as the keys it will seal: without it they cannot be opened again.
    """
    text = os.urandom(32).hex()
    key = parse_master_key(text, name="the new key")
    write(text)
    print(f"key id {key.id}", file=sys.stderr)
