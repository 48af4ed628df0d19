"""Where a sidecar on this machine listens when nobody says otherwise; server and client agree on it."""

from __future__ import annotations

import os
from pathlib import Path


def default_socket() -> Path:
    """`/run/keyturn/keyturn.sock` for root; for another user the same in `$XDG_RUNTIME_DIR`, or in
    `~/.keyturn/run` where that is not set: in a directory that only this user can enter."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if os.geteuid() == 0:
        directory = Path("/run/keyturn")
    elif runtime:
        directory = Path(runtime) / "keyturn"
    else:
        directory = Path.home() / ".keyturn" / "run"
    return directory / "keyturn.sock"
