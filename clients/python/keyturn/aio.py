"""The client for asyncio: `keyturn.client`, awaited."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

import grpc

from keyturn import _wire, errors
from keyturn._calls import CallState, not_recorded
from keyturn._client import ClientState
from keyturn._queue import BATCH_TIMEOUT, report
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
    Unsent,
    sealed_handle,
)
from keyturn.secret import Secret
from keyturn.v1 import routing_service_pb2 as pb
from keyturn.v1.routing_service_pb2_grpc import RoutingServiceStub

if TYPE_CHECKING:
    from keyturn.v1.routing_service_pb2_grpc import RoutingServiceAsyncStub

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_Result = TypeVar("_Result")


class AsyncClient(ClientState):
    """A connection to the sidecar for one event loop, to be kept and shared by its tasks.

    It may be made anywhere, and belongs to the loop of its first call. Arguments and errors are
    those of `keyturn.Client`.

    A cancelled `decide` whose request id was made here leaves no hold behind: the decision goes on
    in a task of the client, and what it placed is released. With an id of the caller's, the same
    request is expected again, and finds its hold. A cancelled record is sent in the background.
    `close` waits for all of it.
    """

    def _open(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._channel: grpc.aio.Channel | None = None
        self._stub: RoutingServiceAsyncStub | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._sender: asyncio.Task[None] | None = None
        self._progress = asyncio.Event()
        self._closed = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        raised: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> list[Unsent]:
        """Send what is queued, for up to `close_timeout`, then close the connection.

        Gives the records that were left in the queue, which `on_unsent` was told of too. From now on
        calls raise `RuntimeError`; those of other tasks may go on for the default timeout.
        """
        self._closing = True
        try:
            while self._tasks:
                await asyncio.wait(self._tasks)
            if self._sender is not None:
                await asyncio.wait((self._sender,), timeout=self._close_timeout.total_seconds())
        finally:
            self._closed.set()
            left = self._give_up()
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.wait((self._sender,))
        if self._channel is not None:
            await self._channel.close(self._timeout.total_seconds())
        return left

    def request(
        self,
        *,
        timeout: timedelta | None = None,
        background: bool = False,
        **fields: Unpack[RequestFields],
    ) -> AsyncCall:
        """An `async with` block around one request: decides on entry, records on exit.

        The record survives the cancellation of the caller. Else as `Client.request`.
        """
        return AsyncCall(self, fields, timeout, background=background)

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

    def record_later(self, record: RecordRequest) -> None:
        """Queue a record and return at once. As `Client.record_later`."""
        self._require_open()
        self._require_loop()
        self._queue.put(record)
        if self._sender is None:
            self._sender = asyncio.create_task(self._send_queued(), name="keyturn-records")

    async def flush(self, *, timeout: timedelta | None = None) -> None:
        """Wait until what was queued so far is sent, or unsent. As `Client.flush`."""
        last = self._queue.last
        async with asyncio.timeout(None if timeout is None else timeout.total_seconds()):
            while not self._queue.done(last):
                await self._progress.wait()

    async def redeem(self, handle: KeyHandle | str, *, timeout: timedelta | None = None) -> Secret:
        """The secret behind a key handle, once per handle and never retried. As `Client.redeem`."""
        handle = sealed_handle(handle)
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
        self._require_loop()
        if self._stub is None:
            where, credentials = self._connection.target, self._connection.credentials
            options = self._connection.options
            self._channel = (
                grpc.aio.insecure_channel(where, options)
                if credentials is None
                else grpc.aio.secure_channel(where, credentials, options)
            )
            self._stub = RoutingServiceStub(self._channel)
        return self._stub

    def _require_loop(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise RuntimeError("an AsyncClient belongs to one event loop: make one for each")

    async def _decide(self, asked: DecideRequest, timeout: timedelta | None, *, owned: bool) -> Decision:
        """`owned`: nobody but us knows the request id, so a cancelled decision is undone."""
        self._require_open()
        try:
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
        except errors.Unavailable as failure:
            error = failure
        return self._passes(asked, error)

    async def _undo(self, deciding: asyncio.Task[Decision], timeout: timedelta | None) -> None:
        # What does not get through is no worse than before: the hold expires.
        with contextlib.suppress(Exception):
            ticket = (await deciding).ticket
            if ticket is not None:
                await self._record(RecordRequest(ticket, Outcome.NEVER_SENT), timeout, inner=True)

    async def _ask(self, asked: DecideRequest, timeout: timedelta | None) -> Decision:
        return _wire.decision(
            await self._call(self._routing.Decide, _wire.decide_request(asked), timeout, inner=True)
        )

    async def _record(
        self, record: RecordRequest, timeout: timedelta | None, *, inner: bool = False
    ) -> Recorded:
        try:
            return _wire.recorded(
                await self._call(self._routing.Record, _wire.record_request(record), timeout, inner=inner)
            )
        except asyncio.CancelledError:
            self._hand_over(record)  # the same record again gets the first answer
            raise

    async def _call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout: timedelta | None,
        *,
        retry: bool = True,
        inner: bool = False,
    ) -> _Response:
        """`inner`: our own call, which a client that is closing still waits for."""
        attempts = self._attempts(timeout, retry=retry)
        if not inner:
            self._require_open()
        while True:
            if self._closed.is_set():
                raise RuntimeError("the client is closed")
            try:
                response = await method(
                    request,
                    timeout=attempts.seconds_left(),
                    metadata=self._connection.metadata,
                )
            except grpc.aio.AioRpcError as failure:
                error = errors.from_rpc(failure)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not self._closed.is_set() or task is None or task.cancelling():
                    raise
                continue  # closing the channel is what cancelled the call
            else:
                attempts.answered()
                return response
            # Raised out here, without grpc's error behind it: its frames hold the token. Nor may
            # a report that prints our locals find handles and tickets in the message.
            wait = attempts.wait_after(error)
            if wait is None:
                del request
                raise error
            await asyncio.sleep(wait)

    def _own(self, work: Coroutine[Any, Any, _Result]) -> asyncio.Task[_Result]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -------------------------------------------------------------- records in the background

    async def _send_queued(self) -> None:
        """The sender: lives while something is queued."""
        try:
            while self._queue:
                unsent, wait = self._queue.answered(await self._send(self._queue.batch()))
                report(self._on_unsent, unsent)
                self._queue.told()
                self._tell()
                if wait:
                    await asyncio.sleep(wait)
        except asyncio.CancelledError:
            if not self._closing:  # the loop itself is going down
                self._give_up()
            raise
        finally:
            self._sender = None
            self._tell()

    def _tell(self) -> None:
        self._progress.set()
        self._progress = asyncio.Event()

    async def _send(
        self, batch: pb.BatchRecordRequest
    ) -> Sequence[Recorded | errors.KeyturnError] | errors.KeyturnError:
        timeout = BATCH_TIMEOUT.total_seconds()
        try:
            response = await self._routing.BatchRecord(
                batch, timeout=timeout, metadata=self._connection.metadata
            )
        except grpc.aio.AioRpcError as failure:
            error = errors.from_rpc(failure)
            self._reach.answered(error)
            return error
        self._reach.answered()
        return _wire.records(response)


class AsyncCall(CallState):
    __doc__ = CallState.__doc__

    def __init__(
        self, client: AsyncClient, fields: RequestFields, timeout: timedelta | None, *, background: bool
    ) -> None:
        super().__init__(fields)
        self._client = client
        self._timeout = timeout
        self._background = background

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
        if self._background:
            self._client._hand_over(record)
            return
        self.unrecorded = record
        try:
            self._closed(await self._client._record(record, self._timeout))
        except Exception as failure:
            if raised is None:
                raise
            raised.add_note(not_recorded(record, failure))
        except asyncio.CancelledError:
            self.unrecorded = None  # it goes on in the background
            if not isinstance(raised, asyncio.CancelledError):
                raise

    async def finish(self) -> Recorded | None:
        """End the call here, and record it. As `Call.finish`."""
        self._require_open()
        self.unrecorded = self._close(None)
        if self.unrecorded is not None:
            self._closed(await self._client._record(self.unrecorded, self._timeout))
        return self.recorded

    async def key_refused(
        self,
        outcome: Outcome = Outcome.AUTH_REJECTED,
        *,
        http_status: int | None = None,
        error_message: str = "",
        retry_after: timedelta | None = None,
    ) -> None:
        """The provider refused the own key: record that, and decide again without it.

        As `Call.key_refused`. The record survives the cancellation of the caller.
        """
        refusal = self._refuse(outcome, http_status, error_message, retry_after)
        await self._client._record(refusal, self._timeout)
        self._refused()
        self._take(await self._client._decide(self._request, self._timeout, owned=self._owned))
