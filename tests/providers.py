"""The providers, played by a small real HTTP server. It can be told how to answer for each key."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TypeAlias

from tests.factories import Connection
from tests.support import eventually

NOBODY = "http://127.0.0.1:1"
"""Where nobody listens."""

_HEADERS = {"anthropic": "x-api-key", "google": "x-goog-api-key"}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A request as a provider saw it."""

    provider: str
    method: str
    target: str
    """The path below the provider's, with the query."""
    headers: Mapping[str, str]
    """Names in lower case; every header once."""

    @property
    def key(self) -> str:
        """The key in the provider's own header, without what stands before it."""
        header = _HEADERS.get(self.provider)
        if header is not None:
            return self.headers.get(header, "")
        return self.headers.get("authorization", "").removeprefix("Bearer ")


Behaviour: TypeAlias = Callable[[Seen, asyncio.StreamWriter], Awaitable[None]]


# -- how to answer ------------------------------------------------------------------------------------


def answer(status: int, body: object = None, **headers: str) -> Behaviour:
    """An answer with a body: bytes as they are, anything else as JSON."""

    async def behave(seen: Seen, writer: asyncio.StreamWriter) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [
            f"HTTP/1.1 {status} So",
            f"content-length: {len(content)}",
            *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
        ]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + content)
        await writer.drain()

    return behave


async def accept(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """200, and a cookie, as those behind a content network set one."""
    await answer(200, {"object": "list", "data": []}, set_cookie="seen=before; Path=/")(seen, writer)


async def refuse(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """As the provider refuses a key that it does not know: its status, and its words, which quote the key."""
    status, body = refusal_of(seen.provider, seen.key)
    await answer(status, body, content_type="application/json")(seen, writer)


forbid = answer(
    403,
    {
        "error": {
            "message": "You have insufficient permissions for this operation. Missing scopes: model.read.",
            "type": "invalid_request_error",
            "param": None,
            "code": "missing_scope",
        }
    },
)
"""As OpenAI answers for a restricted key."""
limit = answer(429, {"error": {"message": "Rate limit reached."}}, retry_after="20")
fail = answer(500, {"error": {"message": "The server had an error."}})


async def hang(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """Says nothing, and stays."""
    await asyncio.Event().wait()


async def trickle(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """Begins an error, and goes on with it for ever, a little at a time."""
    writer.write(b"HTTP/1.1 401 So\r\ntransfer-encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"1\r\n{\r\n")
        await writer.drain()
        await asyncio.sleep(0.02)


async def babble(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """Bytes that are no HTTP, the key among them."""
    writer.write(b"\x00\xff" * 100 + seen.key.encode() + b"\r\n\r\n")
    await writer.drain()


async def flood(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """The first 64 MiB of a refusal of a gigabyte, for as long as somebody reads; and then nothing more."""
    writer.write(b"HTTP/1.1 401 So\r\ncontent-length: 1073741824\r\n\r\n")
    for _ in range(1024):
        writer.write(b"x" * 65536)
        await writer.drain()
    await hang(seen, writer)


async def redirect(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """To a place on the same server that would take any key."""
    await answer(302, location="/elsewhere/models")(seen, writer)


async def reset(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """Cuts the connection as a crashed server does."""
    raw: socket.socket = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def close(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """Ends the connection without an answer."""


def when(gate: asyncio.Event, behaviour: Behaviour) -> Behaviour:
    """Behaves so when `gate` is set."""

    async def behave(seen: Seen, writer: asyncio.StreamWriter) -> None:
        await gate.wait()
        await behaviour(seen, writer)

    return behave


def refusal_of(provider: str, key: str) -> tuple[int, object]:
    """The status and the JSON with which a provider refuses a key."""
    masked = f"{key[:8]}{'*' * 20}{key[-4:]}"
    match provider:
        case "openai":
            message = (
                f"Incorrect API key provided: {masked}. "
                "You can find your API key at https://platform.openai.com/account/api-keys."
            )
            code = {"type": "invalid_request_error", "param": None, "code": "invalid_api_key"}
            return 401, {"error": {"message": message, **code}}
        case "anthropic":
            error = {"type": "authentication_error", "message": f"invalid x-api-key: {key}"}
            return 401, {"type": "error", "error": error, "request_id": "req_011CSHoEeqs5C35K2UUqR7Fy"}
        case "google":
            message = "API key not valid. Please pass a valid API key."
            info = {
                "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                "reason": "API_KEY_INVALID",
                "domain": "googleapis.com",
                "metadata": {"service": "generativelanguage.googleapis.com"},
            }
            error = {"code": 400, "message": message, "status": "INVALID_ARGUMENT", "details": [info]}  # type: ignore[dict-item]
            return 400, {"error": error}
        case "xai":
            message = (
                f"Incorrect API key provided: {key[:2]}***{key[-2:]}. "
                "You can obtain an API key from https://console.x.ai."
            )
            return 400, {"code": "Client specified an invalid argument", "error": message}
        case "deepseek":
            message = f"Authentication Fails, Your api key: ****{key[-4:]} is invalid"
            return 401, {"error": {"message": message, "type": "authentication_error"}}
        case "cohere":
            return 401, {"id": "5b5f", "message": "invalid api token"}
        case "mistral":
            return 401, {"detail": "Unauthorized"}
        case "perplexity":
            return 401, b"<html><head><title>401 Authorization Required</title></head></html>"  # not JSON
        case _:
            return 401, {"error": {"message": "Invalid API Key", "code": "invalid_api_key"}}


# -- the server ---------------------------------------------------------------------------------------


class Providers:
    """The running server. It takes every key that it was not told to treat otherwise."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        """Every request, in the order of arrival."""
        self.url = ""
        self._behaviours: dict[str, Behaviour] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def will(self, behaviour: Behaviour, key: str) -> None:
        """From now on `behaviour` is the answer to `key`."""
        self._behaviours[key] = behaviour

    async def play(self, connection: Connection, *, at: str | None = None) -> None:
        """Points every provider of a database at this server (or `at` another), below a path of its own."""
        await connection.execute(
            "UPDATE api_providers SET base_url = "
            "$1::text || '/' || id || regexp_replace(base_url, '^https?://[^/]+(/' || id || '(?=/|$))?', '')",
            self.url if at is None else at,
        )

    async def asked(self, times: int = 1) -> Seen:
        """The last request, once there have been so many. Raises AssertionError when they do not come."""

        async def enough() -> bool:
            return len(self.seen) >= times

        await eventually(enough)
        return self.seen[times - 1]

    async def accept_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one request."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            try:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                seen = _seen(head)
                self.seen.append(seen)
                await self._behaviours.get(seen.key, accept)(seen, writer)
            finally:
                writer.close()
                await writer.wait_closed()

    async def close(self) -> None:
        """Ends what still hangs."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _seen(head: str) -> Seen:
    first, *lines = head.rstrip("\r\n").split("\r\n")
    method, path, _ = first.split(" ")
    _, provider, target = path.split("/", 2)
    pairs = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    headers = dict(pairs)
    assert len(headers) == len(pairs), f"a header twice: {[name for name, _ in pairs]}"
    return Seen(provider=provider, method=method, target=f"/{target}", headers=headers)


@asynccontextmanager
async def playing_providers(*, tls: ssl.SSLContext | None = None) -> AsyncIterator[Providers]:
    """The server, on a port of 127.0.0.1."""
    providers = Providers()
    server = await asyncio.start_server(providers.accept_connection, "127.0.0.1", 0, ssl=tls)
    host, port = server.sockets[0].getsockname()
    providers.url = f"{'https' if tls else 'http'}://{host}:{port}"
    try:
        yield providers
    finally:
        server.close()
        await providers.close()
        await server.wait_closed()
