"""Secrets that tests send through sidecars: remembered, and looked for wherever something is written.

Whatever makes a secret tells `remember`; whatever has an end (a sidecar, a command, the cluster) has what it
has written looked through there. So the whole suite is one search for a leak.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import Message
from prometheus_client import generate_latest

from keyturn_server.metrics import Metrics

_PIECE = 20  # longer than what two ids of one moment share
_STRIDE = 4
_SECRET_FIELDS = {"secret", "handle", "ticket", "key_handle", "credit_ticket", "failed_key_handles"}

_pieces: dict[str, str] = {}
"""Of the secrets of this test."""
_ever: dict[str, str] = {}
"""Of those of all tests of this process."""
_pages: list[Metrics] = []


def parts(value: str) -> Iterator[str]:
    """Pieces of a secret that tell a good deal of it: none may be found. (A hint of four may.)"""
    # The id of a master key, in a ciphertext, and the beginnings of keys and tokens are no secret.
    body = re.sub(r"^(v1\.[0-9a-f]{16}\.|sk-(proj|ant-api03|test)-|sk-|kt[ht]1_|kta_|Bearer )", "", value)
    return (body[start : start + _PIECE] for start in range(0, len(body) - _PIECE + 1, _STRIDE))


def remember(name: str, secret: str) -> None:
    """From now on nothing that is looked through may hold it. What is too short to be told apart does not
    count, nor do words."""
    if not any(character.isdigit() for character in secret):
        return
    for part in parts(secret):
        if len(set(part)) > _PIECE // 2:
            _pieces[part] = _ever[part] = name


def forget(*, but: str) -> None:
    """A new test: the secrets of others, but those of that name, are none of its own."""
    for part in [part for part, name in _pieces.items() if name != but]:
        del _pieces[part]
    _pages.clear()


def remember_fields(message: Message) -> None:
    """The secrets that stand in a request or an answer, at any depth."""
    for field, value in message.ListFields():
        values: Any = value if field.is_repeated else [value]
        if field.name in _SECRET_FIELDS and field.type == field.TYPE_STRING:
            for each in values:
                remember(f"{message.DESCRIPTOR.name}.{field.name}", each)
        elif (kind := field.message_type) is not None and not kind.GetOptions().map_entry:
            for each in values:
                remember_fields(each)


def found_in(text: str, *, ever: bool = False) -> set[str]:
    """The names of remembered secrets of which a piece stands in `text`."""
    pieces = _ever if ever else _pieces
    return {
        pieces[piece]
        for start in range(len(text) - _PIECE + 1)
        if (piece := text[start : start + _PIECE]) in pieces
    }


def check_text(place: str, text: str, *, ever: bool = False) -> None:
    """Raises AssertionError where a secret of this test (`ever`: of any) stands in `text`, unquoted."""
    found = found_in(text, ever=ever)
    assert not found, f"secrets in {place}: {sorted(found)}"


def check_files(directory: Path) -> None:
    """The same for every file in `directory`, at any depth, whatever its kind: a log, a database, a spool."""
    for path in sorted(directory.rglob("*")):
        if path.is_file() and not path.is_symlink():
            check_text(str(path), path.read_bytes().decode("latin-1"))


class WatchedMetrics(Metrics):
    """Takes the place of a sidecar's metrics, so that their page is looked through at its end."""

    def __init__(self) -> None:
        super().__init__()
        _pages.append(self)


def check_metrics() -> None:
    """The same for the pages of metrics of all sidecars of this process since the last time."""
    while _pages:
        check_text("metrics", generate_latest(_pages.pop().registry).decode())
