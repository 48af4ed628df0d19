"""Structured logs: JSON, one line an event, on stderr. A scrubber comes last, so that a secret that
found its way into an event, ours or a library's, leaves as `***`."""

from __future__ import annotations

import fcntl
import logging
import os
import queue
import select
import sys
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TextIO

import structlog

from keyturn.secret import Secret
from keyturn_server.scrub import STRUCK, scrub

# Fields that hold a secret or a token by their name, whatever they look like.
_SECRET_FIELDS = frozenset(
    {"secret", "token", "ticket", "handle", "key_handle", "credit_ticket", "password", "authorization", "dsn"}
)

_MOST_WAITING = 16 * 1024 * 1024
_LAST_WRITE = timedelta(seconds=5)


def scrub_event(logger: Any, name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor: every value of the event without secrets, at any depth."""
    return {key: STRUCK if key in _SECRET_FIELDS else _clean(value) for key, value in event.items()}


def _clean(value: Any) -> Any:
    match value:
        case str():
            return scrub(value)
        case Secret():
            return STRUCK
        case dict():
            return {
                _clean(key): STRUCK if key in _SECRET_FIELDS else _clean(inner)
                for key, inner in value.items()
            }
        case list() | tuple() | set() | frozenset():
            return [_clean(inner) for inner in value]
        case None | bool() | int() | float():
            return value
        case _:
            return scrub(repr(value))


class LineWriter:
    """Writes lines to a file descriptor in a thread of its own, in order.

    So whoever logs never waits for whoever reads: what cannot be written for long is lost, and a
    line says how much was. Processes that write to the same place share `turns`, a file that they lock
    in turn, so that lines stay whole.
    """

    def __init__(self, descriptor: int, *, turns: int | None = None) -> None:
        self._descriptor = descriptor
        self._turns = turns
        self._texts: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._taken = 0
        self._done = 0
        self._lost = 0
        self._broken = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, text: str) -> int:
        """Have whole lines written; how many characters will be, and 0 if none."""
        if self._taken - self._done > _MOST_WAITING:
            self._lost += text.count("\n")
            return 0
        self._taken += len(text)
        self._texts.put(text)
        return 0 if self._broken else len(text)

    def flush(self) -> None:
        """Nothing: a stream has it, and lines are on their way as they are."""

    def close(self) -> None:
        """Wait until everything is written, but not for a reader that does not read."""
        self._texts.put(None)
        self._thread.join(_LAST_WRITE.total_seconds())

    def _run(self) -> None:
        told = 0
        while (text := self._texts.get()) is not None:
            lost = self._lost
            notice = f'{{"event": "log_lost", "lines": {lost - told}, "level": "error"}}\n'
            try:
                self._write(text if lost == told else notice + text)
                told = lost
                self._broken = False
            except OSError:
                self._broken = True
            self._done += len(text)

    def _write(self, text: str) -> None:
        rest = memoryview(text.encode(errors="backslashreplace"))
        with _turn(self._turns):
            while rest:
                try:
                    rest = rest[os.write(self._descriptor, rest) :]
                except BlockingIOError:  # somebody who shares the descriptor wants it so
                    select.select((), (self._descriptor,), ())


@contextmanager
def _turn(turns: int | None) -> Iterator[None]:
    """For the length of the block no other process has its turn."""
    if turns is None:
        yield
        return
    fcntl.lockf(turns, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.lockf(turns, fcntl.LOCK_UN)


class SpareWriter:
    """Writes lines to stderr where that does not wait, and loses them elsewhere: for a process that has to
    mind others, and may have no thread."""

    def write(self, text: str) -> int:
        """Have a line written at once, or not at all."""
        if sys.stderr is None or not select.select((), (sys.stderr,), (), 0)[1]:
            return 0
        return os.write(sys.stderr.fileno(), text.encode(errors="backslashreplace"))

    def flush(self) -> None:
        """Nothing: a stream has it."""


def _is_news(record: logging.LogRecord) -> bool:
    """Not what any caller can have gRPC tell as an error, with a trace, as often as it likes: that it has
    gone before its answer; and that its metadata is no UTF-8, which would be shown, a token among it."""
    kind = record.exc_info[0] if record.exc_info else None
    return not (
        (kind is not None and kind.__name__ == "ExecuteBatchError")
        or record.getMessage().startswith("Invalid encoding on ")
    )


@contextmanager
def logging_apart(level: str, *, turns: int | None = None) -> Iterator[LineWriter]:
    """The same as `configure_logs`, with a thread that writes, for the length of the block."""
    # Where stderr was closed its number may be anything by now.
    descriptor = os.open(os.devnull, os.O_WRONLY) if sys.stderr is None else sys.stderr.fileno()
    writer = LineWriter(descriptor, turns=turns)
    configure_logs(level, stream=writer)
    try:
        yield writer
    finally:
        writer.close()
        configure_logs(level)


def configure_logs(level: str, *, stream: TextIO | LineWriter | SpareWriter | None = None) -> None:
    """Send structlog's and the standard library's events to `stream` (stderr), from `level` up."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name, structlog.stdlib.ExtraAdder()],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.ExceptionRenderer(
                    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
                ),
                scrub_event,
                structlog.processors.JSONRenderer(ensure_ascii=False),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_news)
    # asyncpg traces every attempt to connect; the same is told in a line of ours, and counted.
    logging.getLogger("asyncpg").setLevel(logging.CRITICAL)
    # They tell of every request to a provider, down to the headers of its answer.
    for library in ("httpx", "httpcore"):
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("keyturn").setLevel(level.upper())
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def get_log() -> Any:
    """Keyturn's logger."""
    return structlog.stdlib.get_logger("keyturn")
