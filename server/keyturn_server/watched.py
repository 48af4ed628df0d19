"""Files that stay in force: read at the start, and again whenever they have changed."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from keyturn_server.errors import KeyturnFault

_MAX_BYTES = 1024 * 1024

T = TypeVar("T")


class UnreadableFile(KeyturnFault):
    """A file cannot be read; the message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file as it was at one moment."""

    path: Path
    mode: int
    """Its permissions."""
    owner: int
    """The id of its user."""
    contents: bytes = field(repr=False)


def read_file(path: Path) -> File:
    """The file, links followed. Raises `UnreadableFile`."""
    try:
        # A FIFO would keep us waiting.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise UnreadableFile(f"{path}: is no file.")
            contents = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UnreadableFile(f"{path}: cannot be read: {error.strerror}.") from None
    if len(contents) > _MAX_BYTES:
        raise UnreadableFile(f"{path}: is over {_MAX_BYTES} bytes.")
    return File(path=path, mode=stat.S_IMODE(facts.st_mode), owner=facts.st_uid, contents=contents)


class Watched(Generic[T]):
    """A value made of files. What is in force is whole at any moment: the old one, or the new one.

    Files are compared by what is in them and not by their times, so that no way of putting a new one
    there is missed: written over, renamed into place, or behind a link that was turned.
    """

    def __init__(self, paths: Sequence[Path], parse: Callable[[Sequence[File]], T]) -> None:
        """Raises `UnreadableFile`, and what `parse` raises."""
        self._paths = paths
        self._parse = parse
        files = self._read()
        self._seen: Sequence[File] | None = files
        self._fault: str | None = None
        self.value = parse(files)

    def refresh(self) -> bool:
        """Take what the files have become; whether that is news.

        Raises `UnreadableFile` and what `parse` raises, once for the same cause; the value that is in
        force stays. Files that were refused are tried again, since time alone may make them good: a
        certificate that is not valid yet.
        """
        seen: Sequence[File] | None = None
        try:
            seen = self._read()
            if seen == self._seen and self._fault is None:
                return False
            value = self._parse(seen)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
            if (seen, fault) == (self._seen, self._fault):
                return False
            self._seen, self._fault = seen, fault
            raise
        self._seen, self._fault, self.value = seen, None, value
        return True

    def _read(self) -> Sequence[File]:
        return tuple(read_file(path) for path in self._paths)
