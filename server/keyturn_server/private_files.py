"""Directories that only their owner can enter, and locks in them that one process holds."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from keyturn_server.errors import KeyturnFault


def make_private(directory: Path, *, what: str, fault: type[KeyturnFault]) -> None:
    """Makes the directory of `what` if it is missing. Raises `fault` where it is not ours alone."""
    try:
        if not directory.exists():
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        facts = directory.stat()
    except OSError as error:
        raise fault(f"{directory}: cannot be made for the {what}: {error.strerror}.") from None
    if not stat.S_ISDIR(facts.st_mode):
        raise fault(f"{directory}: is no directory.")
    if facts.st_uid != os.geteuid():
        raise fault(f"{directory}: the {what}'s directory belongs to somebody else.")
    if facts.st_mode & 0o077:
        raise fault(f"{directory}: others can enter the {what}'s directory. Run: chmod 700 {directory}")


@contextmanager
def locked(path: Path, *, taken: str, fault: type[KeyturnFault]) -> Iterator[None]:
    """Holds the lock for this process. Raises `fault`: with the sentence `taken` where another one does."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise fault(f"{path}: cannot be opened: {error.strerror}.") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise fault(taken) from None
        except OSError as error:
            raise fault(f"{path}: cannot be locked: {error.strerror}.") from None
        yield
    finally:
        # The file stays: removing it would let two processes lock two different files.
        os.close(lock)
