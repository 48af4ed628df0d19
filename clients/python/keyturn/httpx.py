"""The official SDKs of OpenAI and Anthropic decide, sign and record by themselves::

    client = Client()
    transport = KeyturnTransport(client, provider="openai", user_id="u1")
    openai = OpenAI(api_key=PLATFORM_KEY, http_client=httpx2.Client(transport=transport))

Each attempt of the SDK is a decision of its own: it goes out with the user's own key, to where that key
belongs, or as the SDK made it when credits pay. What it used is recorded in the background when its answer
has gone by.

It works with `httpx2`, which today's SDKs use; with `httpx`, where only that is installed. Nothing else of
this package needs either.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, TypeAlias, TypedDict

from keyturn import _llm
from keyturn._calls import CallState
from keyturn.aio import AsyncClient
from keyturn.client import Client
from keyturn.errors import Denied, KeyturnError
from keyturn.model import Outcome, RequestFields
from keyturn.outcomes import outcome_of

if TYPE_CHECKING:
    import httpx2 as httpx
else:
    try:
        import httpx2 as httpx
    except ImportError:
        import httpx

USER_HEADER = "x-keyturn-user"
"""A request's own user; it never reaches the provider."""

User: TypeAlias = "str | Callable[[], str | None] | None"

_MAX_KEYS = 3
"""How many own keys are tried for one request."""
_KEY_IS_REFUSED = (Outcome.AUTH_REJECTED, Outcome.RATE_LIMITED, Outcome.PROVIDER_BILLING)
# What tells the provider who the platform is: none of it goes along with a user's own key.
_PLATFORMS = (
    "authorization",
    "x-api-key",
    "api-key",
    "x-goog-api-key",
    "openai-organization",
    "openai-project",
    "cookie",
)
# No byte of the request can have reached the provider.
_NEVER_SENT = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
    httpx.LocalProtocolError,
)
_LIMITS = httpx.Limits(max_connections=1000, max_keepalive_connections=100)  # those of the SDKs


class _Terms:
    """Each request is decided, signed and recorded.

    Args:
        client: whom to ask. It is not closed with the transport; closing it sends what is to be recorded.
        provider: an id in `api_providers`, e.g. `openai`.
        user_id: whose requests these are: an id, or what gives one when a request goes out, e.g. the
            `get` of a `ContextVar`. The header `x-keyturn-user` of a request says it for that one.
        base_url: the SDK's base URL, where that ends in no version as `/v1` is: for a user's own key its
            provider's base URL takes its place.
        service_type: a label for reports.
        transport: what sends; by default one with the connection limits of the SDKs.

    What nobody pays for is answered here, in the form of an error of the provider: 402 for a denial (429
    when it may pass, with `retry-after`), 503 when Keyturn cannot be reached, 401 for an unknown user, 500
    for other faults. `response.extensions["keyturn"]` is the `Denied` or the `KeyturnError`.
    """

    def __init__(self, provider: str, user_id: User, base_url: str | None, service_type: str) -> None:
        self._provider = provider
        self._user_id = user_id
        self._base = None if base_url is None else httpx.URL(base_url).raw_path.decode()
        self._service_type = service_type

    def _read(self, request: httpx.Request, body: bytes) -> tuple[_llm.Asked, str]:
        """What the request says of money, and its endpoint."""
        endpoint = _llm.endpoint_of(request.url.raw_path.partition(b"?")[0].decode(), self._base)
        return _llm.read_request(request.method, endpoint, self._provider, body), endpoint

    def _fields(self, request: httpx.Request, asked: _llm.Asked) -> RequestFields | None:
        """What to decide; None when nobody said for whom."""
        user = request.headers.get(USER_HEADER)
        if user is None:
            user = self._user_id() if callable(self._user_id) else self._user_id
        if not user:
            return None
        return {
            "user_id": user,
            "provider": self._provider,
            "model": asked.model,
            "service_type": self._service_type,
            "cost_micros": 0 if asked.free else None,
            "input_tokens": asked.input_tokens,
            "max_output_tokens": asked.max_output_tokens,
        }


class KeyturnTransport(_Terms, httpx.BaseTransport):
    __doc__ = _Terms.__doc__

    def __init__(
        self,
        client: Client,
        *,
        provider: str,
        user_id: User = None,
        base_url: str | None = None,
        service_type: str = "",
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(provider, user_id, base_url, service_type)
        self._client = client
        self._transport = transport or httpx.HTTPTransport(limits=_LIMITS)

    def close(self) -> None:
        self._transport.close()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        asked, endpoint = self._read(request, request.read())
        fields = self._fields(request, asked)
        if fields is None:
            return _no_user()
        call = self._client.request(**fields, background=True)
        try:
            call.__enter__()
        except (Denied, KeyturnError) as error:
            return _not_paid(error)
        exchange = _Exchange(self._client, call, request, asked, endpoint)
        try:
            while True:
                response = self._transport.handle_request(exchange.signed())
                if response.status_code < 400:
                    return exchange.passes(response, _Passing(response, exchange))
                if not exchange.refused(response, _body_of(response)):
                    return exchange.provider_answer()
                try:
                    call.key_refused(**exchange.refusal)
                except (Denied, KeyturnError):
                    return exchange.provider_answer()
                if exchange.has_tried_enough():
                    return exchange.provider_answer()
        except httpx.RequestError as error:
            failure = error
        except BaseException:
            exchange.end()
            raise
        raise exchange.broken(failure)


class AsyncKeyturnTransport(_Terms, httpx.AsyncBaseTransport):
    __doc__ = _Terms.__doc__

    def __init__(
        self,
        client: AsyncClient,
        *,
        provider: str,
        user_id: User = None,
        base_url: str | None = None,
        service_type: str = "",
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(provider, user_id, base_url, service_type)
        self._client = client
        self._transport = transport or httpx.AsyncHTTPTransport(limits=_LIMITS)

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        asked, endpoint = self._read(request, await request.aread())
        fields = self._fields(request, asked)
        if fields is None:
            return _no_user()
        call = self._client.request(**fields, background=True)
        try:
            await call.__aenter__()
        except (Denied, KeyturnError) as error:
            return _not_paid(error)
        exchange = _Exchange(self._client, call, request, asked, endpoint)
        try:
            while True:
                response = await self._transport.handle_async_request(exchange.signed())
                if response.status_code < 400:
                    return exchange.passes(response, _AsyncPassing(response, exchange))
                if not exchange.refused(response, await _async_body_of(response)):
                    return exchange.provider_answer()
                try:
                    await call.key_refused(**exchange.refusal)
                except (Denied, KeyturnError):
                    return exchange.provider_answer()
                if exchange.has_tried_enough():
                    return exchange.provider_answer()
        except httpx.RequestError as error:
            failure = error
        except BaseException:
            exchange.end()
            raise
        raise exchange.broken(failure)


class _Exchange:
    """One request of an SDK, from its decision to its record: what both transports share."""

    refusal: _Refused
    """How the provider refused the own key, for `key_refused`."""

    def __init__(
        self,
        client: Client | AsyncClient,
        call: CallState,
        request: httpx.Request,
        asked: _llm.Asked,
        endpoint: str,
    ) -> None:
        self._client = client
        self._call = call
        self._request = request
        self._asked = asked
        self._endpoint = endpoint
        self._keys_tried = 0
        self._began = 0.0
        self._status: int | None = None
        self._answer: httpx.Response | None = None
        self.reader: _llm.AnswerReader | None = None

    def signed(self) -> httpx.Request:
        """The request as it goes out. It may hold a secret, and so stays below: nobody prints it."""
        self._began = time.monotonic()
        self._call.note(endpoint=self._request.url.path[:256])
        self._call.sending()
        key, url = self._call.key, self._request.url
        headers = httpx.Headers(
            [
                (name, value)
                for name, value in self._request.headers.multi_items()
                if name not in ("host", "content-length", "transfer-encoding", USER_HEADER)
            ]
        )
        if key is not None:
            self._keys_tried += 1
            query = url.raw_path.partition(b"?")[1:]
            url = httpx.URL(key.base_url.rstrip("/") + self._endpoint + b"".join(query).decode())
            for name in _PLATFORMS:
                headers.pop(name, None)
            headers.update(key.headers())
        return httpx.Request(
            self._request.method,
            url,
            headers=headers,
            content=self._asked.body or None,
            extensions=self._request.extensions,
        )

    def passes(
        self, response: httpx.Response, stream: httpx.SyncByteStream | httpx.AsyncByteStream
    ) -> httpx.Response:
        """The provider's answer, which is recorded when it has gone by."""
        self._status = response.status_code
        content_type = response.headers.get("content-type", "")
        self.reader = _llm.AnswerReader(content_type, hides_usage=self._asked.hides_usage)
        return httpx.Response(
            response.status_code,
            headers=_decoded(response.headers),
            stream=stream,
            extensions=response.extensions,
        )

    def refused(self, response: httpx.Response, body: bytes) -> bool:
        """The provider's error, noted. True when an own key is to blame, and another way may be open."""
        key = self._call.key
        if key is not None and key.secret is not None:
            # Some providers quote the key that they refuse, and SDKs print their words.
            body = body.replace(key.secret.reveal().encode(), b"***")
        self._answer = httpx.Response(
            response.status_code,
            headers=_decoded(response.headers),
            content=body,
            extensions=response.extensions,
        )
        code, message = _llm.read_error(body)
        outcome = outcome_of(response.status_code, code)
        self.refusal = {
            "outcome": outcome,
            "http_status": response.status_code,
            "error_message": message,
            "retry_after": _llm.retry_after_of(response.headers, datetime.now(UTC)),
        }
        self._call.note(response_time=self._elapsed())
        if key is not None and outcome in _KEY_IS_REFUSED:
            return True
        self._call.failed(**self.refusal)
        return False

    def has_tried_enough(self) -> bool:
        """The way that is open now is one own key too many."""
        return self._keys_tried >= _MAX_KEYS and self._call.key is not None

    def provider_answer(self) -> httpx.Response:
        """The provider's own error, for the SDK."""
        self.end()
        assert self._answer is not None  # noqa: S101 - set by `refused`
        return self._answer

    def broken(self, error: httpx.RequestError) -> httpx.RequestError:
        """The error to raise for a connection that failed, which is recorded.

        Without its trace and what is behind it: the frames in there hold the signed request.
        """
        if isinstance(error, _NEVER_SENT):
            outcome = Outcome.NEVER_SENT
        elif isinstance(error, httpx.TimeoutException):
            outcome = Outcome.TIMEOUT
        else:
            outcome = Outcome.PROVIDER_ERROR
        self.end(outcome)
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)

    def end(self, outcome: Outcome | None = None, *, whole: bool = False) -> None:
        """Hands over the record, once. Without an `outcome`, and without a `whole` answer, whoever asked
        has gone away."""
        if not self._call.is_open:
            return
        reader = self.reader
        if reader is not None:
            self._note(reader)
            if reader.error is not None:
                self._fail(Outcome.PROVIDER_ERROR, reader.error)
            elif reader.done:
                self._succeed()
            elif whole:  # a stream that ended before it was complete
                self._fail(Outcome.PROVIDER_ERROR)
            elif outcome is not None:
                self._fail(outcome)
        elif outcome is not None:
            self._fail(outcome)
        self._call._leave_to(self._client)

    def _note(self, reader: _llm.AnswerReader) -> None:
        self._call.note(
            model=reader.model[:256] or None, response_time=self._elapsed(), http_status=self._status
        )
        if self._asked.free:
            self._call.cost(0)
        elif usage := reader.usage:
            self._call.used(**usage)

    def _succeed(self) -> None:
        outcome = outcome_of(self._status or 200)
        if outcome is Outcome.SUCCESS:
            self._call.succeeded()
        else:  # a redirection: it costs nothing, and is followed, or not, by another request
            self._fail(outcome)

    def _fail(self, outcome: Outcome, message: str = "") -> None:
        self._call.failed(outcome, http_status=self._status, error_message=message)

    def _elapsed(self) -> timedelta:
        return timedelta(seconds=time.monotonic() - self._began)


class _Refused(TypedDict):
    """The arguments of `failed` and `key_refused`."""

    outcome: Outcome
    http_status: int
    error_message: str
    retry_after: timedelta | None


class _Passing(httpx.SyncByteStream):
    """A good answer on its way to the SDK, chunk by chunk as it comes."""

    def __init__(self, response: httpx.Response, exchange: _Exchange) -> None:
        self._response = response
        self._exchange = exchange

    def __iter__(self) -> Iterator[bytes]:
        exchange = self._exchange
        reader = exchange.reader
        assert reader is not None  # noqa: S101 - set by `passes`
        try:
            for chunk in self._response.iter_bytes():
                if shown := reader.feed(chunk):
                    yield shown
            rest = reader.end()
            exchange.end(whole=True)
            if rest:
                yield rest
            return
        except httpx.RequestError as error:
            failure = error
        except BaseException:
            exchange.end()
            raise
        raise exchange.broken(failure)

    def close(self) -> None:
        self._exchange.end()
        self._response.close()


class _AsyncPassing(httpx.AsyncByteStream):
    """The same, awaited."""

    def __init__(self, response: httpx.Response, exchange: _Exchange) -> None:
        self._response = response
        self._exchange = exchange

    async def __aiter__(self) -> AsyncIterator[bytes]:
        exchange = self._exchange
        reader = exchange.reader
        assert reader is not None  # noqa: S101 - set by `passes`
        try:
            async for chunk in self._response.aiter_bytes():
                if shown := reader.feed(chunk):
                    yield shown
            rest = reader.end()
            exchange.end(whole=True)
            if rest:
                yield rest
            return
        except httpx.RequestError as error:
            failure = error
        except BaseException:
            exchange.end()
            raise
        raise exchange.broken(failure)

    async def aclose(self) -> None:
        self._exchange.end()
        await self._response.aclose()


def _decoded(headers: httpx.Headers) -> httpx.Headers:
    """The headers of an answer whose body is decoded on its way."""
    shown = headers.copy()
    for name in ("content-encoding", "content-length", "transfer-encoding"):
        shown.pop(name, None)
    return shown


def _body_of(response: httpx.Response) -> bytes:
    """The body of an error, as far as it comes."""
    try:
        return response.read()
    except httpx.RequestError:
        return b""
    finally:
        response.close()


async def _async_body_of(response: httpx.Response) -> bytes:
    try:
        return await response.aread()
    except httpx.RequestError:
        return b""
    finally:
        await response.aclose()


def _no_user() -> httpx.Response:
    said = f"Nobody said for whom this request is: give user_id, or the header {USER_HEADER}."
    return _own_answer(_llm.refusal(401, "missing_user", said), None)


def _not_paid(error: Denied | KeyturnError) -> httpx.Response:
    return _own_answer(_llm.refusal_of(error), error)


def _own_answer(refusal: _llm.Refusal, error: Exception | None) -> httpx.Response:
    return httpx.Response(
        refusal.status, headers=refusal.headers, json=refusal.body, extensions={"keyturn": error}
    )
