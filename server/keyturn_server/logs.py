"""Structured logs: JSON, one line an event, on stderr. A scrubber comes last, so that a secret that
found its way into an event, ours or a library's, leaves as `***`."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO

import structlog

from keyturn.secret import Secret
from keyturn_server.scrub import STRUCK, scrub

# Fields that hold a secret or a token by their name, whatever they look like.
_SECRET_FIELDS = frozenset(
    {"secret", "token", "ticket", "handle", "key_handle", "credit_ticket", "password", "authorization", "dsn"}
)


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


def configure_logs(level: str, *, stream: TextIO | None = None) -> None:
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
