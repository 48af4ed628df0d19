"""The client for asyncio: `keyturn.client`, awaited."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterable
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

import grpc

from keyturn import _channel, _wire, errors
from keyturn._calls import CallState, not_recorded
from keyturn.client import DEFAULT_RETRIES, DEFAULT_TIMEOUT
from keyturn.model import (
    DecideFields,
    DecideRequest,
    Decision,
    Explanation,
    KeyHandle,
    Outcome,
    Recorded,
    RecordFields,
    RecordRequest,
    RequestFields,
    Settles,
)
from keyturn.retries import Attempts, Retries
from keyturn.secret import Secret
from keyturn.v1.routing_service_pb2_grpc import RoutingServiceStub

if TYPE_CHECKING:
    from keyturn.v1.routing_service_pb2_grpc import RoutingServiceAsyncStub

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_Result = TypeVar("_Result")


class AsyncClient:
    """A connection to the sidecar for one event loop, to be kept and shared by its tasks.

    It may be made anywhere, and belongs to the loop of its first call. Arguments and errors are
    those of `keyturn.Client`.

    A cancelled `decide` whose request id was made here leaves no hold behind: the decision goes on
    in a task of the client, and what it placed is released. With an id of the caller's, the same
    request is expected again, and finds its hold. `close` waits for such tasks.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        token: str | Secret | None = None,
        root_certificates: bytes | None = None,
        private_key: bytes | None = None,
        certificate_chain: bytes | None = None,
        tls: bool = False,
        timeout: timedelta = DEFAULT_TIMEOUT,
        retries: Retries = DEFAULT_RETRIES,
    ) -> None:
        self._connection = _channel.connection(
            target,
            token=token,
            root_certificates=root_certificates,
            private_key=private_key,
            certificate_chain=certificate_chain,
            tls=tls,
        )
        self._timeout = timeout
        self._retries = retries
        Attempts(retries, timeout)  # refuses a bad timeout now, not at the first call
        self._loop: asyncio.AbstractEventLoop | None = None
        self._channel: grpc.aio.Channel | None = None
        self._stub: RoutingServiceAsyncStub | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._connection.target!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        raised: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Let the client's own tasks end, then close the connection.

        Calls of other tasks may go on for the default timeout; then they end with `RuntimeError`.
        """
        while self._tasks:
            await asyncio.wait(self._tasks)
        self._closed = True
        if self._channel is not None:
            await self._channel.close(self._timeout.total_seconds())

    def request(self, *, timeout: timedelta | None = None, **fields: Unpack[RequestFields]) -> AsyncCall:
        """An `async with` block around one request: decides on entry, records on exit.

        The record survives the cancellation of the caller. Else as `Client.request`.
        """
        return AsyncCall(self, fields, timeout)

    async def decide(self, *, timeout: timedelta | None = None, **fields: Unpack[DecideFields]) -> Decision:
        """Whose credential pays for a request? As `Client.decide`."""
        return await self._decide(DecideRequest(**fields), timeout, owned=not fields.get("request_id"))

    async def record(
        self,
        settles: Settles,
        outcome: Outcome,
        *,
        timeout: timedelta | None = None,
        **fields: Unpack[RecordFields],
    ) -> Recorded:
        """What became of a request, once. As `Client.record`."""
        return await self._record(RecordRequest(settles, outcome, **fields), timeout)

    async def redeem(self, handle: KeyHandle | str, *, timeout: timedelta | None = None) -> Secret:
        """The secret behind a key handle, once per handle and never retried. As `Client.redeem`."""
        return _wire.secret(
            await self._call(self._routing.Redeem, _wire.redeem_request(handle), timeout, retry=False)
        )

    async def explain(
        self, *, timeout: timedelta | None = None, **fields: Unpack[RequestFields]
    ) -> Explanation:
        """What would `decide` answer now, and why? Places no hold, tells no secret."""
        asked = DecideRequest(**fields)
        return _wire.explanation(
            await self._call(self._routing.Explain, _wire.explain_request(asked), timeout)
        )

    async def decide_many(
        self, requests: Iterable[DecideRequest], *, timeout: timedelta | None = None
    ) -> list[Decision | errors.KeyturnError]:
        """Up to 500 decisions in one call: an answer or an error for each, in order."""
        items = list(requests)
        if not items:
            return []
        return _wire.decisions(
            await self._call(self._routing.BatchDecide, _wire.batch_decide_request(items), timeout)
        )

    async def record_many(
        self, records: Iterable[RecordRequest], *, timeout: timedelta | None = None
    ) -> list[Recorded | errors.KeyturnError]:
        """Up to 500 records in one call: an answer or an error for each, in order."""
        items = list(records)
        if not items:
            return []
        return _wire.records(
            await self._call(self._routing.BatchRecord, _wire.batch_record_request(items), timeout)
        )

    # --------------------------------------------------------------------------- the calls

    @property
    def _routing(self) -> RoutingServiceAsyncStub:
        """The stub, on a channel that opens in the loop of the first call."""
        loop = asyncio.get_running_loop()
        if self._stub is None:
            where, credentials = self._connection.target, self._connection.credentials
            options = self._connection.options
            self._channel = (
                grpc.aio.insecure_channel(where, options)
                if credentials is None
                else grpc.aio.secure_channel(where, credentials, options)
            )
            self._loop = loop
            self._stub = RoutingServiceStub(self._channel)
        if self._loop is not loop:
            raise RuntimeError("an AsyncClient belongs to one event loop: make one for each")
        return self._stub

    async def _decide(self, asked: DecideRequest, timeout: timedelta | None, *, owned: bool) -> Decision:
        """`owned`: nobody but us knows the request id, so a cancelled decision is undone."""
        if not owned:
            return await self._ask(asked, timeout)
        deciding = self._own(self._ask(asked, timeout))
        try:
            await asyncio.wait((deciding,))
        except asyncio.CancelledError:
            if not deciding.cancelling():  # as it is when the loop itself is going down
                self._own(self._undo(deciding, timeout))
            raise
        return deciding.result()

    async def _undo(self, deciding: asyncio.Task[Decision], timeout: timedelta | None) -> None:
        # What does not get through is no worse than before: the hold expires.
        with contextlib.suppress(Exception):
            ticket = (await deciding).ticket
            if ticket is not None:
                await self._record(RecordRequest(ticket, Outcome.NEVER_SENT), timeout)

    async def _ask(self, asked: DecideRequest, timeout: timedelta | None) -> Decision:
        return _wire.decision(await self._call(self._routing.Decide, _wire.decide_request(asked), timeout))

    async def _record(self, record: RecordRequest, timeout: timedelta | None) -> Recorded:
        return _wire.recorded(await self._call(self._routing.Record, _wire.record_request(record), timeout))

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("the client is closed")

    async def _call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout: timedelta | None,
        *,
        retry: bool = True,
    ) -> _Response:
        attempts = Attempts(self._retries, self._timeout if timeout is None else timeout)
        while True:
            self._require_open()
            try:
                return await method(
                    request,
                    timeout=attempts.seconds_left(),
                    metadata=self._connection.metadata,
                )
            except grpc.aio.AioRpcError as failure:
                error = errors.from_rpc(failure)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not self._closed or task is None or task.cancelling():
                    raise
                continue  # closing the channel is what cancelled the call
            # Raised out here, without grpc's error behind it: its frames hold the token. Nor may
            # a report that prints our locals find handles and tickets in the message.
            wait = attempts.wait_after(error) if retry else None
            if wait is None:
                del request
                raise error
            await asyncio.sleep(wait)

    def _own(self, work: Coroutine[Any, Any, _Result]) -> asyncio.Task[_Result]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` to its end in a task of its own, then pass on a cancellation that came
        meanwhile. Work that failed as well leaves a note on it."""
        task = self._own(work)
        cancelled: asyncio.CancelledError | None = None
        while not task.done():
            try:
                await asyncio.wait((task,))
            except asyncio.CancelledError as cancellation:
                cancelled = cancellation
        if cancelled is None:
            return task.result()
        if not task.cancelled() and (failure := task.exception()) is not None:
            cancelled.add_note(f"keyturn: {type(failure).__name__}: {failure}")
        raise cancelled


class AsyncCall(CallState):
    __doc__ = CallState.__doc__

    def __init__(self, client: AsyncClient, fields: RequestFields, timeout: timedelta | None) -> None:
        super().__init__(fields)
        self._owned = not fields.get("request_id")
        self._client = client
        self._timeout = timeout

    async def __aenter__(self) -> Self:
        asked = self._enter()
        self._take(await self._client._decide(asked, self._timeout, owned=self._owned))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        raised: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        record = self._close(raised)
        if record is None:
            return
        try:
            await self._client._finish(self._settle(record, raised))
        except asyncio.CancelledError:
            if not isinstance(raised, asyncio.CancelledError):
                raise

    async def _settle(self, record: RecordRequest, raised: BaseException | None) -> None:
        try:
            self._closed(await self._client._record(record, self._timeout))
        except Exception as failure:
            if raised is None:
                raise
            raised.add_note(not_recorded(record, failure))

    async def _settle_refusal(self, refusal: RecordRequest) -> None:
        await self._client._record(refusal, self._timeout)
        self._refused()

    async def key_refused(
        self,
        outcome: Outcome = Outcome.AUTH_REJECTED,
        *,
        http_status: int | None = 401,
        error_message: str = "",
        retry_after: timedelta | None = None,
    ) -> None:
        """The provider refused the own key: record that, and decide again without it.

        As `Call.key_refused`. The record survives the cancellation of the caller.
        """
        refusal = self._refuse(outcome, http_status, error_message, retry_after)
        await self._client._finish(self._settle_refusal(refusal))
        self._take(await self._client._decide(self._request, self._timeout, owned=self._owned))
