"""A gateway for OpenAI's chat completions, where a user's own key pays, or the platform's credits do.

    pip install keyturn httpx2 starlette uvicorn
    OPENAI_API_KEY=sk-... OPENAI_BASE_URL=https://api.openai.com/v1 LISTEN=127.0.0.1:8080 python gateway.py

The bearer token of a caller is the user's id here: put your own authentication into `user_of`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import httpx2
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from keyturn import (
    AsyncCall,
    AsyncClient,
    Denied,
    KeyturnError,
    NotFound,
    Outcome,
    Unavailable,
    outcome_of,
)

TIMEOUT_SECONDS = 60
MAX_KEYS = 3
KEY_IS_REFUSED = (Outcome.AUTH_REJECTED, Outcome.RATE_LIMITED, Outcome.PROVIDER_BILLING)


class ChatCompletions:
    """`POST /v1/chat/completions`."""

    def __init__(self, keyturn: AsyncClient, http: httpx2.AsyncClient, base_url: str, api_key: str) -> None:
        self._keyturn = keyturn
        self._http = http
        self._base_url = base_url
        self._platform = {"Authorization": f"Bearer {api_key}"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, unless the caller hangs up before that: then all of it is cancelled."""
        request = Request(scope, receive)
        body = await request.body()
        async with asyncio.TaskGroup() as tasks:
            answering = tasks.create_task(self._answer(request, body, send))
            watching = tasks.create_task(_cancel_when_hung_up(receive, answering))
            answering.add_done_callback(lambda _: watching.cancel())

    async def _answer(self, request: Request, body: bytes, send: Send) -> None:
        refusal = await self._serve(request, body, send)
        if refusal is not None:
            await refusal(request.scope, request.receive, send)

    async def _serve(self, request: Request, body: bytes, send: Send) -> Response | None:
        """Sends the provider's answer on; or gives another one to send."""
        user_id = user_of(request)
        if not user_id:
            return error(401, "missing_token", "Give your token: Authorization: Bearer TOKEN.")
        try:
            asked = json.loads(body)
        except ValueError:
            asked = None
        if not isinstance(asked, dict):
            return error(400, "invalid_json", "The body is no JSON object.")
        estimate = estimate_of(asked, body)
        if asked.get("stream") is True:
            asked["stream_options"] = {**(asked.get("stream_options") or {}), "include_usage": True}
            body = json.dumps(asked).encode()
        try:
            async with self._keyturn.request(
                user_id=user_id,
                provider="openai",
                model=str(asked.get("model", "")),
                service_type="gateway",
                background=True,
                **estimate,
            ) as call:
                return await self._ask(call, body, send)
        except Denied as denied:
            return denial(denied)
        except Unavailable:
            wait = {"retry-after": "1"}
            return error(503, "sidecar_unavailable", "Nobody can say now who pays: try again.", wait)
        except NotFound as unknown:
            return error(401, "unknown_user", unknown.message)
        except KeyturnError as failure:
            return error(500, failure.reason.lower(), failure.message)

    async def _ask(self, call: AsyncCall, body: bytes, send: Send) -> Response | None:
        """Asks the provider: with one key after the other, as long as it is the keys that it refuses."""
        keys_tried = 0
        answer = Response(status_code=502)
        while call.key is None or keys_tried < MAX_KEYS:
            own = call.key
            keys_tried += own is not None
            url = f"{own.base_url if own is not None else self._base_url}/chat/completions"
            headers = {"Content-Type": "application/json", **call.headers(self._platform)}
            try:
                async with self._http.stream("POST", url, content=body, headers=headers) as response:
                    if response.is_success:
                        await _pass_on(call, response, send)
                        return None
                    content = await response.aread()
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                call.failed(Outcome.NEVER_SENT)
                return error(502, "provider_unreachable", "The provider cannot be reached.")
            except httpx2.TimeoutException:
                call.failed(Outcome.TIMEOUT)
                return error(504, "provider_timeout", "The provider did not answer in time.")
            except httpx2.RequestError:
                call.failed(Outcome.PROVIDER_ERROR)
                return error(502, "provider_broke_off", "The provider broke its answer off.")
            content_type = response.headers.get("content-type")
            answer = Response(content, response.status_code, media_type=content_type)
            code, message = error_in(content)
            outcome, wait = outcome_of(response.status_code, code), retry_after_of(response)
            status = response.status_code
            if own is None or outcome not in KEY_IS_REFUSED:
                call.failed(outcome, http_status=status, error_message=message, retry_after=wait)
                return answer
            try:
                await call.key_refused(outcome, http_status=status, error_message=message, retry_after=wait)
            except Denied:
                return answer
        call.failed(Outcome.NEVER_SENT)
        return answer


async def _pass_on(call: AsyncCall, response: httpx2.Response, send: Send) -> None:
    """The provider's good answer, as it comes, with its usage noted. What breaks off stays incomplete."""
    content_type = response.headers.get("content-type", "application/json")
    headers = [(b"content-type", content_type.encode())]
    call.note(http_status=response.status_code)
    await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
    reader = Reader(call, is_stream=content_type.startswith("text/event-stream"))
    try:
        async for chunk in response.aiter_bytes():
            reader.read(chunk)
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
    except httpx2.TimeoutException:
        call.failed(Outcome.TIMEOUT, http_status=response.status_code)
    except httpx2.RequestError:
        call.failed(Outcome.PROVIDER_ERROR, http_status=response.status_code)
    else:
        reader.end()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Reader:
    """Notes what an answer says of its usage while it goes by."""

    def __init__(self, call: AsyncCall, *, is_stream: bool) -> None:
        self._call = call
        self._is_stream = is_stream
        self._rest = b""
        self._done = False

    def read(self, chunk: bytes) -> None:
        self._rest += chunk
        if not self._is_stream:
            return
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                self._done = True
                self._call.succeeded()
            elif line.startswith(b"data:"):
                self._note(data)

    def end(self) -> None:
        """There is no more. A stream that did not say so itself broke off."""
        if not self._is_stream:
            self._note(self._rest)
            self._call.succeeded()
        elif not self._done:
            self._call.failed(Outcome.PROVIDER_ERROR, error_message="The stream ended early.")

    def _note(self, data: bytes) -> None:
        said = json_object(data)
        if isinstance(said.get("model"), str):
            self._call.note(model=said["model"])
        usage = said.get("usage")
        if isinstance(usage, dict):
            self._call.used(
                input_tokens=usage.get("prompt_tokens"),
                output_tokens=usage.get("completion_tokens"),
                total_tokens=usage.get("total_tokens"),
                cache_read_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
            )


async def _cancel_when_hung_up(receive: Receive, answering: asyncio.Task[None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    answering.cancel()


def user_of(request: Request) -> str:
    """Who calls."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def estimate_of(asked: dict[str, Any], body: bytes) -> dict[str, Any]:
    """What the request may use at most, where it says so."""
    limit = asked.get("max_completion_tokens", asked.get("max_tokens"))
    return {"input_tokens": len(body) // 4, "max_output_tokens": limit} if isinstance(limit, int) else {}


def error_in(content: bytes) -> tuple[str | None, str]:
    """The code and the message of a provider's error."""
    said = json_object(content).get("error")
    if not isinstance(said, dict):
        return None, ""
    code, message = said.get("code") or said.get("type"), said.get("message")
    return code if isinstance(code, str) else None, message if isinstance(message, str) else ""


def retry_after_of(response: httpx2.Response) -> timedelta | None:
    wait = response.headers.get("retry-after", "")
    return timedelta(seconds=min(int(wait), 86_400)) if wait.isdecimal() else None


def json_object(content: bytes) -> dict[str, Any]:
    """What it says; nothing, where it is no object in JSON."""
    try:
        said = json.loads(content)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def denial(denied: Denied) -> Response:
    """402; 429 when the same may be paid for later."""
    why = denied.decision.denial
    if why is None:
        return error(402, "denied", denied.decision.message)
    if not why.retryable:
        return error(402, why.reason.lower(), why.suggestion)
    wait = max(1, round((why.retry_after or timedelta()).total_seconds()))
    return error(429, why.reason.lower(), why.suggestion, {"retry-after": str(wait)})


def error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Response:
    """An error of ours, in OpenAI's form."""
    said = {"message": message, "type": "keyturn", "code": code}
    return JSONResponse({"error": said}, status, headers)


def well(request: Request) -> Response:
    return PlainTextResponse("ok\n")


async def main() -> None:
    host, _, port = os.environ.get("LISTEN", "127.0.0.1:0").rpartition(":")
    keyturn = AsyncClient()
    http = httpx2.AsyncClient(timeout=TIMEOUT_SECONDS, limits=httpx2.Limits(max_connections=None))
    base_url = os.environ["OPENAI_BASE_URL"].rstrip("/")
    completions = ChatCompletions(keyturn, http, base_url, os.environ["OPENAI_API_KEY"])

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with keyturn, http:  # the records that are queued are sent when this ends
            yield

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", completions, methods=["POST"]),
            Route("/healthz", well),
        ],
        lifespan=lifespan,
    )
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host.strip("[]"), int(port)), family=family) as listening:
        print(f"listening on http://{host}:{listening.getsockname()[1]}", flush=True)
        # uvicorn ends in order, and then raises the signal again for whoever was there before it.
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        await uvicorn.Server(config).serve(sockets=[listening])


if __name__ == "__main__":
    asyncio.run(main())
