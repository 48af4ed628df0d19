"""OpenAI and Anthropic, played by a real HTTP server: chat completions, responses, embeddings and messages.

    async with playing_llm_providers() as llm:
        OpenAI(base_url=llm.openai_url, api_key="sk-good")
        Anthropic(base_url=llm.anthropic_url, api_key="sk-good")
        await llm.play(sql)                       # own keys lead here too
        llm.will("sk-bad", refuse)                # from now on the answer to this key
        llm.will("sk-slow", rate_limit, accept)   # each once, the last for ever
        gate = asyncio.Semaphore(0)
        llm.will("sk-held", held(gate))           # a stream: one event for each gate.release()
        llm.seen[0]                               # path, headers, json, key, hung_up, answered

Every key is taken that it was not told to treat otherwise. What is answered, and its usage, is always the
same: the constants below. Keys are told by `authorization: Bearer KEY` or `x-api-key: KEY`.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tests.factories import Connection
from tests.providers import Providers, refusal_of
from tests.support import eventually

MODEL = "gpt-4o-2024-08-06"
"""The model that OpenAI says has answered, whatever was asked for."""
CLAUDE = "claude-sonnet-4-20250514"
"""The same for Anthropic."""
WORDS = ("Hel", "lo ", "there")
TEXT = "".join(WORDS)

INPUT_TOKENS, OUTPUT_TOKENS, CACHED_TOKENS = 120, 30, 40
"""What OpenAI counts: the cached ones are part of the input."""
UNCACHED_TOKENS, CACHE_READ_TOKENS, CACHE_WRITE_TOKENS = 50, 40, 30
"""What Anthropic counts: its input tokens are those besides the cached ones. In all `INPUT_TOKENS`."""


@dataclass(kw_only=True)
class Seen:
    """A request as the provider saw it."""

    method: str
    path: str
    """With the query, e.g. `/openai/v1/chat/completions`."""
    headers: Mapping[str, str]
    """Names in lower case; every header once."""
    body: bytes
    answered: bool = False
    """The whole answer was written."""
    hung_up: bool = False
    """The client went away before that."""

    @property
    def provider(self) -> str:
        return self.path.split("/")[1]

    @property
    def key(self) -> str:
        """The key that signs it."""
        return self.headers.get("x-api-key") or self.headers.get("authorization", "").removeprefix("Bearer ")

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Behaviour: TypeAlias = Callable[[Seen, asyncio.StreamWriter], Awaitable[None]]

# -- what is answered ---------------------------------------------------------------------------------


def _chat(asked: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": TEXT, "refusal": None}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_760_000_000,
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": _chat_usage(),
    }


def _chat_usage() -> dict[str, Any]:
    return {
        "prompt_tokens": INPUT_TOKENS,
        "completion_tokens": OUTPUT_TOKENS,
        "total_tokens": INPUT_TOKENS + OUTPUT_TOKENS,
        "prompt_tokens_details": {"cached_tokens": CACHED_TOKENS},
    }


def _chat_events(asked: Any) -> Iterator[bytes]:
    head = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1_760_000_000,
        "model": MODEL,
    }
    counted = bool((asked.get("stream_options") or {}).get("include_usage"))
    usage = {"usage": None} if counted else {}
    for word in WORDS:
        delta = {"role": "assistant", "content": word}
        yield _event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}], **usage})
    yield _event({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], **usage})
    if counted:
        yield _event({**head, "choices": [], "usage": _chat_usage()})
    yield b"data: [DONE]\n\n"


def _response(asked: Any, status: str = "completed") -> dict[str, Any]:
    done = status == "completed"
    text = {"type": "output_text", "text": TEXT, "annotations": []}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "status": status, "content": [text]}
    usage = {
        "input_tokens": INPUT_TOKENS,
        "input_tokens_details": {"cached_tokens": CACHED_TOKENS},
        "output_tokens": OUTPUT_TOKENS,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": INPUT_TOKENS + OUTPUT_TOKENS,
    }
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1_760_000_000,
        "status": status,
        "model": MODEL,
        "output": [message] if done else [],
        "usage": usage if done else None,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
    }


def _response_events(asked: Any) -> Iterator[bytes]:
    kinds: list[dict[str, Any]] = [
        {"type": "response.created", "response": _response(asked, "in_progress")},
        *(
            {
                "type": "response.output_text.delta",
                "item_id": "msg_1",
                "output_index": 0,
                "content_index": 0,
                "delta": word,
                "logprobs": [],
            }
            for word in WORDS
        ),
        {"type": "response.completed", "response": _response(asked)},
    ]
    for number, event in enumerate(kinds):
        yield _event({**event, "sequence_number": number}, event["type"])


def _embeddings(asked: Any) -> dict[str, Any]:
    return {
        "object": "list",
        "model": asked.get("model"),
        "data": [{"object": "embedding", "index": 0, "embedding": [0.5, -0.25]}],
        "usage": {"prompt_tokens": INPUT_TOKENS, "total_tokens": INPUT_TOKENS},
    }


def _message(asked: Any) -> dict[str, Any]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": CLAUDE,
        "content": [{"type": "text", "text": TEXT}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": _message_usage(OUTPUT_TOKENS),
    }


def _message_usage(output_tokens: int) -> dict[str, int]:
    return {
        "input_tokens": UNCACHED_TOKENS,
        "cache_read_input_tokens": CACHE_READ_TOKENS,
        "cache_creation_input_tokens": CACHE_WRITE_TOKENS,
        "output_tokens": output_tokens,
    }


def _message_events(asked: Any) -> Iterator[bytes]:
    begun = {**_message(asked), "content": [], "stop_reason": None, "usage": _message_usage(1)}
    kinds: list[dict[str, Any]] = [
        {"type": "message_start", "message": begun},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "ping"},
        *(
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}
            for word in WORDS
        ),
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {"output_tokens": OUTPUT_TOKENS},
        },
        {"type": "message_stop"},
    ]
    for event in kinds:
        yield _event(event, event["type"])


def _event(data: Any, name: str | None = None) -> bytes:
    """One event of a stream."""
    return (f"event: {name}\n" if name else "").encode() + f"data: {json.dumps(data)}\n\n".encode()


_ENDPOINTS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Iterator[bytes]]]] = {
    "/openai/v1/chat/completions": (_chat, _chat_events),
    "/openai/v1/responses": (_response, _response_events),
    "/openai/v1/embeddings": (_embeddings, lambda asked: iter(())),
    "/anthropic/v1/messages": (_message, _message_events),
}
_LISTS = ("/openai/v1/models", "/anthropic/v1/models")


def events_of(seen: Seen) -> list[bytes]:
    """The events with which a request for a stream is answered."""
    return list(_ENDPOINTS[seen.path.partition("?")[0]][1](seen.json))


# -- how to answer ------------------------------------------------------------------------------------


def answer(
    status: int, body: object, *, zipped: bool = False, headers: Mapping[str, str] | None = None
) -> Behaviour:
    """An answer with a body: bytes as they are, anything else as JSON."""

    async def behave(seen: Seen, writer: asyncio.StreamWriter) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        kinds = {} if isinstance(body, bytes) else {"content-type": "application/json"}
        if zipped:
            content, kinds["content-encoding"] = gzip.compress(content), "gzip"
        _head(writer, status, {**kinds, **(headers or {}), "content-length": str(len(content))})
        writer.write(content)
        await writer.drain()

    return behave


async def accept(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """What the endpoint gives, as a stream if that was asked for."""
    await _accept(seen, writer)


async def zipped(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """The same, compressed with gzip."""
    await _accept(seen, writer, zipped=True)


def held(gate: asyncio.Semaphore) -> Behaviour:
    """A stream whose every event waits for a `gate.release()`; an answer that is no stream waits for one."""

    async def behave(seen: Seen, writer: asyncio.StreamWriter) -> None:
        await _accept(seen, writer, gate=gate)

    return behave


def breaks_off(after: int, *, rudely: bool = True) -> Behaviour:
    """A stream that ends after so many events: the connection cut in the middle of the body, or, not
    `rudely`, the body ended as if it were whole."""

    async def behave(seen: Seen, writer: asyncio.StreamWriter) -> None:
        await _stream(writer, events_of(seen)[:after], whole=not rudely)
        if rudely:
            writer.close()

    return behave


async def breaks_down(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """A stream that tells of an error after its first events, and ends."""
    error = {"message": "The server had an error while processing your request.", "type": "server_error"}
    told = _event({"error": error})
    if seen.provider == "anthropic":
        told = _event(
            {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, "error"
        )
    await _stream(writer, [*events_of(seen)[:2], told])


async def refuse(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """401, as the provider refuses a key that it does not know, in words that quote the key."""
    status, body = refusal_of(seen.provider, seen.key)
    await answer(status, body)(seen, writer)


def error(
    status: int,
    message: str,
    kind: str,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Behaviour:
    """An error in the form of the provider that is asked."""

    async def behave(seen: Seen, writer: asyncio.StreamWriter) -> None:
        body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": None, "code": code}}
        if seen.provider == "anthropic":
            body = {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}
        await answer(status, body, headers=headers)(seen, writer)

    return behave


forbid = error(403, "Your key may not use this model.", "permission_error", "missing_scope")
rate_limit = error(
    429, "Rate limit reached.", "rate_limit_error", "rate_limit_exceeded", {"retry-after": "20"}
)
no_quota = error(429, "You exceeded your current quota.", "insufficient_quota", "insufficient_quota")
unpaid = error(400, "Your credit balance is too low.", "billing_error")
"""As Anthropic says it."""
object_to = error(400, "'messages' is too short.", "invalid_request_error", "invalid_value")
fail = error(500, "The server had an error.", "server_error")


async def hang(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """Says nothing, and stays."""
    await asyncio.Event().wait()


async def close(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """Ends the connection without an answer."""
    writer.close()


def _head(writer: asyncio.StreamWriter, status: int, headers: Mapping[str, str]) -> None:
    lines = [
        f"HTTP/1.1 {status} So",
        "x-request-id: req_1",
        *(f"{name}: {is_}" for name, is_ in headers.items()),
    ]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n")


async def _accept(
    seen: Seen, writer: asyncio.StreamWriter, *, zipped: bool = False, gate: asyncio.Semaphore | None = None
) -> None:
    path = seen.path.partition("?")[0]
    if seen.method == "GET" and path in _LISTS:
        await answer(200, {"object": "list", "data": []}, zipped=zipped)(seen, writer)
    elif seen.method != "POST" or path not in _ENDPOINTS:
        await answer(404, {"error": {"message": "Unknown request URL.", "type": "invalid_request_error"}})(
            seen, writer
        )
    elif seen.json.get("stream"):
        await _stream(writer, events_of(seen), zipped=zipped, gate=gate)
    else:
        if gate is not None:
            await gate.acquire()
        await answer(200, _ENDPOINTS[path][0](seen.json), zipped=zipped)(seen, writer)


async def _stream(
    writer: asyncio.StreamWriter,
    events: Iterable[bytes],
    *,
    zipped: bool = False,
    gate: asyncio.Semaphore | None = None,
    whole: bool = True,
) -> None:
    headers = {"content-type": "text/event-stream; charset=utf-8", "transfer-encoding": "chunked"}
    compressor = zlib.compressobj(wbits=31) if zipped else None
    if zipped:
        headers["content-encoding"] = "gzip"
    _head(writer, 200, headers)

    async def send(chunk: bytes) -> None:
        writer.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        await writer.drain()

    for event in events:
        if gate is not None:
            await gate.acquire()
        await send(
            event if compressor is None else compressor.compress(event) + compressor.flush(zlib.Z_SYNC_FLUSH)
        )
    if not whole:
        return
    if compressor is not None:
        await send(compressor.flush())
    writer.write(b"0\r\n\r\n")
    await writer.drain()


# -- the server ---------------------------------------------------------------------------------------


@dataclass
class LlmProviders:
    """The running server."""

    url: str = ""
    seen: list[Seen] = field(default_factory=list)
    """Every request, in the order of arrival."""
    _behaviours: dict[str, deque[Behaviour]] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def openai_url(self) -> str:
        """What the SDK, and Keyturn, take as OpenAI's base URL."""
        return f"{self.url}/openai/v1"

    @property
    def anthropic_url(self) -> str:
        """What the SDK takes as Anthropic's base URL. Keyturn's has `/v1` besides."""
        return f"{self.url}/anthropic"

    def will(self, key: str, *behaviours: Behaviour) -> None:
        """From now on these are the answers to `key`, in order, the last one for ever."""
        self._behaviours[key] = deque(behaviours)

    async def play(self, connection: Connection) -> None:
        """Points every provider of a database here."""
        await Providers().play(connection, at=self.url)

    async def asked(self, times: int = 1) -> Seen:
        """The request of that number, from 1. Raises AssertionError when it does not come."""

        async def enough() -> bool:
            return len(self.seen) >= times

        await eventually(enough)
        return self.seen[times - 1]

    async def left_alone(self, seen: Seen) -> None:
        """Returns once the client of a request has hung up. Raises AssertionError when it does not."""

        async def gone() -> bool:
            return seen.hung_up

        await eventually(gone)

    async def accept_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, for as many requests as the client sends one after another."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            try:
                while not writer.is_closing():
                    seen = await _read(reader)
                    self.seen.append(seen)
                    await self._answer(seen, reader, writer)
            finally:
                writer.close()
                await writer.wait_closed()

    async def _answer(self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behaviours = self._behaviours.get(seen.key, deque([accept]))
        behaviour = behaviours.popleft() if len(behaviours) > 1 else behaviours[0]
        answering = asyncio.ensure_future(behaviour(seen, writer))
        try:
            while not answering.done():
                # Looked at, not read: what comes may be the next request.
                if reader.at_eof() or reader.exception() is not None:
                    seen.hung_up = True
                    raise ConnectionResetError
                await asyncio.wait((answering,), timeout=0.01)
            try:
                answering.result()
            except OSError:
                seen.hung_up = True
                raise
            seen.answered = True
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)

    async def close(self) -> None:
        """Ends what still hangs."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _read(reader: asyncio.StreamReader) -> Seen:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").rstrip("\r\n").split("\r\n")
    method, path, _ = first.split(" ")
    pairs = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    headers = dict(pairs)
    assert len(headers) == len(pairs), f"a header twice: {[name for name, _ in pairs]}"
    body = b""
    if headers.get("transfer-encoding") == "chunked":
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
    elif length := int(headers.get("content-length", 0)):
        body = await reader.readexactly(length)
    return Seen(method=method, path=path, headers=headers, body=body)


@asynccontextmanager
async def playing_llm_providers() -> AsyncIterator[LlmProviders]:
    """The server, on a port of 127.0.0.1."""
    providers = LlmProviders()
    server = await asyncio.start_server(providers.accept_connection, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    providers.url = f"http://{host}:{port}"
    try:
        yield providers
    finally:
        server.close()
        await providers.close()
        await server.wait_closed()
