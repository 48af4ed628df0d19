"""The audit: a line for every secret that is handed out, and for every change by an operator.

The lines are those of the log, whatever its level. A decision costs some 100 us and a line of
structlog half of that: so the line of a secret is built here, and written together with others.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from json.encoder import encode_basestring_ascii as quoted
from typing import Protocol

from keyturn_server.access import Caller
from keyturn_server.logs import scrub_event

SECRET_HANDED_OUT = "secret_handed_out"  # noqa: S105 - the name of an event
OPERATOR_CHANGE = "operator_change"

_LONGEST_WAIT = timedelta(milliseconds=5)


class Sink(Protocol):
    """Where lines go: a text stream, or what writes like one."""

    def write(self, text: str, /) -> int:
        """How much was written; 0 if nothing was, and nothing will be."""


class Audit:
    """Who was given which secret, and who changed what. Of one event loop; made by `open_audit`."""

    def __init__(self, sink: Sink, *, on_lost: Callable[[int], None]) -> None:
        self._sink = sink
        self._on_lost = on_lost
        self._handed_out: list[tuple[str, str, str, str, str, datetime]] = []

    def secret_handed_out(
        self, caller: Caller, *, user_id: str, key_id: str, decision_id: str, by: str
    ) -> None:
        """A secret leaves for `caller`, by the method `by`. Written within a few milliseconds.

        The ids are not scrubbed: it would cost more than all the rest, and might strike out what the line
        is there for; and a user who has a key has an id that is in the tables anyway.
        """
        if not self._handed_out:
            asyncio.get_running_loop().call_later(_LONGEST_WAIT.total_seconds(), self.flush)
        self._handed_out.append((caller.name, user_id, key_id, decision_id, by, datetime.now(UTC)))

    def changed(self, caller: Caller, action: str, **facts: str | int | bool) -> None:
        """`caller` has changed something by the method `action`. The facts are ids, never a secret."""
        self.flush()
        event = {"caller": caller.name, "action": action, **facts, "event": OPERATOR_CHANGE}
        line = scrub_event(None, "info", {**event, "level": "info", "timestamp": _stamp(datetime.now(UTC))})
        self._write(f"{json.dumps(line)}\n", 1)

    def flush(self) -> None:
        """Write what waits."""
        if self._handed_out:
            facts, self._handed_out = self._handed_out, []
            self._write("".join(_handed_out(*each) for each in facts), len(facts))

    def _write(self, text: str, lines: int) -> None:
        try:
            written = self._sink.write(text)
        except (OSError, ValueError):  # broken, or closed
            written = 0
        if not written:
            self._on_lost(lines)


@contextmanager
def open_audit(sink: Sink, *, on_lost: Callable[[int], None]) -> Iterator[Audit]:
    """An audit that has written everything at the end of the block.

    `on_lost` hears how many lines could not be written: then calls go on all the same.
    """
    audit = Audit(sink, on_lost=on_lost)
    try:
        yield audit
    finally:
        audit.flush()


def _handed_out(caller: str, user_id: str, key_id: str, decision_id: str, by: str, at: datetime) -> str:
    # Escaped to ASCII, since some readers end a line at U+2028.
    return (
        f'{{"caller": {quoted(caller)}, "user_id": {quoted(user_id)}, "key_id": "{key_id}", '
        f'"decision_id": "{decision_id}", "by": {quoted(by)}, "event": "{SECRET_HANDED_OUT}", '
        f'"level": "info", "timestamp": "{_stamp(at)}"}}\n'
    )


def _stamp(at: datetime) -> str:
    return f"{at.isoformat().removesuffix('+00:00')}Z"
