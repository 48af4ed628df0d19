"""What requests to LLM providers, and their answers, say of money: read from bytes, without I/O.

OpenAI's chat completions, responses and embeddings, what is compatible with them, and Anthropic's messages.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

from keyturn.errors import Denied, KeyturnError, NotFound, Unavailable

# What providers do not charge for. Whatever else is posted and tells no usage is charged its hold.
_FREE = re.compile(r"/(moderations|files|uploads|messages/count_tokens|responses/input_tokens)(/|$)")
# These tell the usage of a stream unasked, and refuse a field that they do not know.
_TELL_UNASKED = {"mistral", "perplexity"}
_VERSION = re.compile(r"(?P<base>.*?/v\d+[a-z0-9]*)(?P<endpoint>/.*)")
_MAX_OUTPUT = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_MAX_WAIT = timedelta(days=1)
"""What a record takes as `retry_after`."""


def endpoint_of(path: str, base: str | None = None) -> str:
    """The part of a path that stays when another base URL takes its place, e.g. `/chat/completions`.

    It stands behind the path of the base URL, `base`, where that is known; else behind the first version
    in it, e.g. `/v1`; else it is all of it.
    """
    if base is not None and path.startswith(base.rstrip("/") + "/"):
        return path[len(base.rstrip("/")) :]
    versioned = _VERSION.fullmatch(path)
    return versioned["endpoint"] if versioned else path


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request to a provider, as far as money goes."""

    body: bytes
    """What to send; with the usage of a stream asked for where nobody had."""
    model: str = ""
    input_tokens: int | None = None
    max_output_tokens: int | None = None
    """The estimate, where the request says how much it wants."""
    free: bool = False
    """The provider charges nothing for it."""
    hides_usage: bool = False
    """The caller did not ask for the event that tells the usage of a stream, and must not see it."""


def read_request(method: str, endpoint: str, provider: str, body: bytes) -> Asked:
    """Reads a request; what is not JSON is sent as it is, with nothing known of it."""
    said = _json(body)
    model = _text(said, "model")
    if method != "POST" or _FREE.match(endpoint):
        return Asked(body=body, model=model, free=True)
    output = next((said[name] for name in _MAX_OUTPUT if _is_count(said.get(name))), None)
    if output is None and endpoint == "/embeddings":
        output = 0
    size = len(body)
    options = said.get("stream_options") or {}
    hides = (
        endpoint == "/chat/completions"
        and said.get("stream") is True
        and provider not in _TELL_UNASKED
        and isinstance(options, dict)
        and not options.get("include_usage")
    )
    if hides:
        said["stream_options"] = {**options, "include_usage": True}
        body = json.dumps(said, separators=(",", ":")).encode()
    return Asked(
        body=body,
        model=model,
        input_tokens=None if output is None else size // 4,
        max_output_tokens=output,
        hides_usage=hides,
    )


class AnswerReader:
    """Reads a good answer while it goes by: the usage and the model, and how it ended."""

    def __init__(self, content_type: str, *, hides_usage: bool = False) -> None:
        self._stream = content_type.startswith("text/event-stream")
        self._keeps = self._stream or "json" in content_type  # not of sound, or an image
        self._hides_usage = hides_usage
        self._rest = bytearray()  # of a stream, what is no whole event yet; else all of it
        self._looked_at = 0
        self._counts: dict[str, Any] = {}
        self.model = ""
        self.done = False
        """A stream said that it is complete. An answer that is none is complete at its end."""
        self.error: str | None = None
        """What a stream said of an error, which ends it."""

    def feed(self, chunk: bytes) -> bytes:
        """Takes the next bytes, and gives those that the caller is to get now."""
        if self._keeps:
            self._rest += chunk
        if not self._stream:
            return chunk
        shown = bytearray()
        while (event := self._next_event()) is not None:
            if not self._read_event(event):
                shown += event
        return bytes(shown) if self._hides_usage else chunk

    def end(self) -> bytes:
        """There is no more. Gives what was held back."""
        rest, self._rest = bytes(self._rest), bytearray()
        if not self._stream:
            self._read(_json(rest))
            self.done = True
            return b""
        return rest if rest and not self._read_event(rest) and self._hides_usage else b""

    @property
    def usage(self) -> dict[str, int] | None:
        """The tokens, in the words of `Call.used`; None when nothing was said of them."""
        counts = self._counts
        taken = {
            "input_tokens": _count(counts, "prompt_tokens", "input_tokens"),
            "output_tokens": _count(counts, "completion_tokens", "output_tokens"),
            "total_tokens": _count(counts, "total_tokens"),
        }
        details = counts.get("prompt_tokens_details") or counts.get("input_tokens_details")
        if isinstance(details, dict):
            taken["cache_read_tokens"] = _count(details, "cached_tokens")
        if "cache_read_input_tokens" in counts or "cache_creation_input_tokens" in counts:
            # Anthropic counts what it read from and wrote to the cache besides its input.
            read = _count(counts, "cache_read_input_tokens") or 0
            written = _count(counts, "cache_creation_input_tokens") or 0
            taken["cache_read_tokens"], taken["cache_write_tokens"] = read, written
            taken["input_tokens"] = (taken["input_tokens"] or 0) + read + written
        return {name: count for name, count in taken.items() if count is not None} or None

    def _next_event(self) -> bytes | None:
        """The next whole event of a stream, with the blank line that ends it."""
        end = _END_OF_EVENT.search(self._rest, self._looked_at)
        if end is None:
            self._looked_at = max(0, len(self._rest) - 3)
            return None
        event = bytes(self._rest[: end.end()])
        del self._rest[: end.end()]
        self._looked_at = 0
        return event

    def _read_event(self, event: bytes) -> bool:
        """Reads one event. True when it tells of the usage, and of nothing else."""
        lines = [line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")]
        data = b"\n".join(lines)
        if data == b"[DONE]":
            self.done = True
            return False
        said = _json(data)
        self._read(said)
        return said.get("choices") == [] and isinstance(said.get("usage"), dict)

    def _read(self, said: dict[str, Any]) -> None:
        """Reads an answer, or the data of an event."""
        kind = said.get("type")
        for part in (said, said.get("response"), said.get("message")):
            if isinstance(part, dict):
                self.model = _text(part, "model") or self.model
                usage = part.get("usage")
                if isinstance(usage, dict):
                    self._counts |= {name: value for name, value in usage.items() if value is not None}
        if not self._stream:
            return
        if kind in ("message_stop", "response.completed", "response.incomplete"):
            self.done = True
        elif kind == "response.failed":
            response = said.get("response")
            self.error = error_of(response if isinstance(response, dict) else {})[1]
        elif kind == "error" or said.get("error"):
            self.error = error_of(said)[1] or _text(said, "message")


_END_OF_EVENT = re.compile(rb"\r\n\r\n|\n\n|\r\r")


def read_error(body: bytes) -> tuple[str | None, str]:
    """The code and the message of a provider's error."""
    try:
        said = json.loads(body)
    except ValueError:
        said = None
    if isinstance(said, list) and said:
        said = said[0]
    if not isinstance(said, dict):
        return None, body[:2000].decode(errors="replace")
    return error_of(said)


def error_of(said: dict[str, Any]) -> tuple[str | None, str]:
    """The same, of a part of an answer that has an `error`."""
    error = said.get("error")
    if isinstance(error, dict):
        return _text(error, "code") or _text(error, "type") or None, _text(error, "message")
    return _text(said, "code") or None, error if isinstance(error, str) else _text(said, "message")


def retry_after_of(headers: Any, now: datetime) -> timedelta | None:
    """How long a provider asks to wait: milliseconds, seconds, or a date."""
    wait: timedelta | None = None
    try:
        if milliseconds := headers.get("retry-after-ms"):
            wait = timedelta(milliseconds=float(milliseconds))
        elif seconds := headers.get("retry-after"):
            wait = (
                timedelta(seconds=float(seconds))
                if re.fullmatch(r"[\d.]+", seconds)
                else parsedate_to_datetime(seconds).astimezone(UTC) - now
            )
    except (ValueError, OverflowError):
        return None
    return None if wait is None else min(max(wait, timedelta()), _MAX_WAIT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An answer of our own, in a form that the SDKs of OpenAI and Anthropic both read."""

    status: int
    headers: dict[str, str]
    body: dict[str, Any]


def refusal_of(error: Denied | KeyturnError) -> Refusal:
    """What a caller gets for a request that nobody pays for: not an outage, which SDKs try again."""
    headers: dict[str, str] = {}
    match error:
        case Denied(decision=decision):
            denial = decision.denial
            code = denial.reason.lower() if denial is not None else "denied"
            message = " ".join(filter(None, (decision.message, denial.suggestion if denial else "")))
            if denial is not None and denial.retryable:
                status, wait = 429, denial.retry_after or timedelta(seconds=1)
                headers["retry-after"] = str(max(1, round(wait.total_seconds())))
            else:
                status = 402
        case Unavailable():
            status, code, message = 503, "sidecar_unavailable", "Keyturn cannot be reached."
            headers["retry-after"] = "1"
        case NotFound():
            status, code, message = 401, "unknown_user", error.message
        case _:
            status, code, message = 500, error.reason.lower() or error.code.name.lower(), error.message
    return refusal(status, code, message, headers)


def refusal(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Refusal:
    """One that is not to be tried again, unless it says when."""
    headers = headers or {"x-should-retry": "false"}
    error = {"type": "keyturn", "code": code, "message": message, "param": None}
    return Refusal(status=status, headers=headers, body={"type": "error", "error": error})


def _json(data: bytes) -> dict[str, Any]:
    """An object; an empty one for whatever else it is."""
    try:
        said = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _text(said: dict[str, Any], name: str) -> str:
    value = said.get(name)
    return value if isinstance(value, str) else ""


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 1_000_000_000


def _count(counts: dict[str, Any], *names: str) -> int | None:
    return next((counts[name] for name in names if _is_count(counts.get(name))), None)
