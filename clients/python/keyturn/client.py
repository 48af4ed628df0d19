"""The client for threads. `keyturn.aio` is the same for asyncio."""

from __future__ import annotations

import atexit
import contextlib
import threading
import weakref
from collections.abc import Iterable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Self, TypeVar, Unpack

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

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

# What a call raises by itself; anything else came from outside, e.g. from a signal.
_FAILURES = (errors.KeyturnError, RuntimeError, TypeError, ValueError)

_OPEN: weakref.WeakSet[Client] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A process that ends without closing its clients still sends what they have queued, or tells of it."""
    for client in list(_OPEN):
        client._drain()


class Client(ClientState):
    """A connection to the sidecar, to be kept and shared: it is safe to use from many threads.

    Nothing connects before the first call. Make it after a fork, not before.

    Args:
        target: `unix:PATH`, `unix:///PATH` or `HOST:PORT`. None: the environment variable
            `KEYTURN_ADDRESS`, else the sidecar's own default
            (`keyturn.address.default_socket`).
        token: a bearer token.
        root_certificates: the PEM authorities to trust; turns TLS on.
        private_key, certificate_chain: the PEM client certificate of mutual TLS; turn TLS on.
        tls: TLS with grpc's default authorities. A host that is not this one needs TLS.
        timeout: the deadline of every call that is given none of its own, retries included.
        retries: see `Retries`. While the sidecar is down a call makes one attempt.
        when_down: asked when a decision ends with `Unavailable` (`DeadlineExceeded` included), with the
            request and the error: True lets the request go ahead all the same, `unmetered`, on the
            platform's own credential. None: the error is raised.
        queue_size: how many records `record_later` holds.
        close_timeout: how long `close` goes on sending them.
        on_unsent: told of each record that did not get through, in the thread or task that found out.
            By default a line in the log `keyturn`.

    Every call raises a `KeyturnError` (`keyturn.errors` draws the tree), `RuntimeError` once the
    client is closed, and `TypeError` or `ValueError` for an argument that cannot be sent.
    Raises `ValueError` itself for a target, a token or certificates that cannot work.

    An exception that a signal raises while a call waits (`KeyboardInterrupt`, an alarm's timeout) leaves
    nothing half done: a decision whose request id was made here is undone, a record is sent in the
    background.
    """

    def _open(self) -> None:
        where, credentials = self._connection.target, self._connection.credentials
        self._channel = (
            grpc.insecure_channel(where, self._connection.options)
            if credentials is None
            else grpc.secure_channel(where, credentials, self._connection.options)
        )
        self._stub = RoutingServiceStub(self._channel)
        self._changed = threading.Condition()  # guards the queue and what follows
        self._sender: threading.Thread | None = None
        self._undoing: set[threading.Thread] = set()
        self._closed = threading.Event()
        _OPEN.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        raised: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> list[Unsent]:
        """Send what is queued, for up to `close_timeout`, then close the connection.

        Gives the records that were left in the queue, which `on_unsent` was told of too. From now on
        calls raise `RuntimeError`; those still running in other threads are cancelled at the end.
        """
        left = self._drain()
        self._channel.close()
        return left

    def _drain(self) -> list[Unsent]:
        with self._changed:
            self._closing = True
            undoing = list(self._undoing)
        for thread in undoing:
            thread.join()
        with self._changed:
            self._changed.wait_for(lambda: self._sender is None, self._close_timeout.total_seconds())
        self._closed.set()
        with self._changed:
            left = self._queue.give_up()
        report(self._on_unsent, left)
        _OPEN.discard(self)
        return left

    def request(
        self,
        *,
        timeout: timedelta | None = None,
        background: bool = False,
        **fields: Unpack[RequestFields],
    ) -> Call:
        """A `with` block around one request: decides on entry, records on exit.

        Entry raises `Denied` when the policy says no. What the exit records: see `Call`. When
        recording fails, the exit raises that error; unless the block raised, whose exception then
        goes on with a note of the failure. With `background` the exit does not wait for the record:
        it goes the way of `record_later`. `fields`: those of `DecideRequest`, less `redeem`;
        `timeout` holds for each call.
        """
        return Call(self, fields, timeout, background=background)

    def decide(self, *, timeout: timedelta | None = None, **fields: Unpack[DecideFields]) -> Decision:
        """Whose credential pays for a request? A denial is an answer too: see `Decision.allowed`.

        `fields`: those of `DecideRequest`. Retried when unavailable, with the same request id, so
        that no second hold is placed.
        """
        return self._decide(DecideRequest(**fields), timeout, owned=not fields.get("request_id"))

    def record(
        self,
        settles: Settles,
        outcome: Outcome,
        *,
        timeout: timedelta | None = None,
        **fields: Unpack[RecordFields],
    ) -> Recorded:
        """What became of a request: charges the ticket or counts the own key's usage, once.

        `settles` is the decision, its key or ticket, or a `SealedHandle` or `SealedTicket` made
        from a stored string. `fields`: those of `RecordRequest`. Durable when it returns; retried
        when unavailable, because the same record again gets the first answer.
        """
        return self._record(RecordRequest(settles, outcome, **fields), timeout)

    def record_later(self, record: RecordRequest) -> None:
        """Queue a record and return at once: it is sent in the background, and again until it gets through.

        Raises `QueueFull` when there is no room, with the record still yours. A record that the
        sidecar refuses, or that is left when the client closes, goes to `on_unsent`.
        """
        with self._changed:
            self._require_open()
            self._queue.put(record)
            if self._sender is None:
                self._sender = threading.Thread(target=self._send_queued, name="keyturn-records", daemon=True)
                self._sender.start()

    def flush(self, *, timeout: timedelta | None = None) -> None:
        """Wait until what was queued so far is sent, or unsent. Raises `TimeoutError` after `timeout`."""
        with self._changed:
            last = self._queue.last
            limit = None if timeout is None else timeout.total_seconds()
            if not self._changed.wait_for(lambda: self._queue.done(last), limit):
                raise TimeoutError("there are records that are not sent yet")

    def redeem(self, handle: KeyHandle | str, *, timeout: timedelta | None = None) -> Secret:
        """The secret behind a key handle that was decided with `redeem=True`; once per handle.

        Never retried: a redemption that seemed to fail may have been carried out, and the next one
        would be refused. Decide again with the same request id for a fresh handle.
        """
        handle = sealed_handle(handle)
        return _wire.secret(self._call(self._stub.Redeem, _wire.redeem_request(handle), timeout, retry=False))

    def explain(self, *, timeout: timedelta | None = None, **fields: Unpack[RequestFields]) -> Explanation:
        """What would `decide` answer now, and why? Places no hold, tells no secret."""
        asked = DecideRequest(**fields)
        return _wire.explanation(self._call(self._stub.Explain, _wire.explain_request(asked), timeout))

    def decide_many(
        self, requests: Iterable[DecideRequest], *, timeout: timedelta | None = None
    ) -> list[Decision | errors.KeyturnError]:
        """Up to 500 decisions in one call: an answer or an error for each, in order."""
        items = list(requests)
        if not items:
            return []
        return _wire.decisions(self._call(self._stub.BatchDecide, _wire.batch_decide_request(items), timeout))

    def record_many(
        self, records: Iterable[RecordRequest], *, timeout: timedelta | None = None
    ) -> list[Recorded | errors.KeyturnError]:
        """Up to 500 records in one call: an answer or an error for each, in order."""
        items = list(records)
        if not items:
            return []
        return _wire.records(self._call(self._stub.BatchRecord, _wire.batch_record_request(items), timeout))

    # --------------------------------------------------------------------------- the calls

    def _decide(self, asked: DecideRequest, timeout: timedelta | None, *, owned: bool) -> Decision:
        """`owned`: nobody but us knows the request id, so an interrupted decision is undone."""
        try:
            return self._ask(asked, timeout)
        except errors.Unavailable as failure:
            error = failure
        except _FAILURES:
            raise
        except BaseException:  # what a signal raised
            if owned:
                self._undo(asked, timeout)
            raise
        return self._passes(asked, error)

    def _ask(self, asked: DecideRequest, timeout: timedelta | None, *, inner: bool = False) -> Decision:
        return _wire.decision(
            self._call(self._stub.Decide, _wire.decide_request(asked), timeout, inner=inner)
        )

    def _undo(self, asked: DecideRequest, timeout: timedelta | None) -> None:
        """Ask again, in the background, for what may have been decided, and give the hold back."""

        def undo() -> None:
            # What does not get through is no worse than before: the hold expires.
            with contextlib.suppress(Exception):
                ticket = self._ask(asked, timeout, inner=True).ticket
                if ticket is not None:
                    self._record(RecordRequest(ticket, Outcome.NEVER_SENT), timeout, inner=True)
            with self._changed:
                self._undoing.discard(threading.current_thread())

        thread = threading.Thread(target=undo, name="keyturn-undo", daemon=True)
        with self._changed:
            self._undoing.add(thread)
        thread.start()

    def _record(self, record: RecordRequest, timeout: timedelta | None, *, inner: bool = False) -> Recorded:
        try:
            return _wire.recorded(
                self._call(self._stub.Record, _wire.record_request(record), timeout, inner=inner)
            )
        except _FAILURES:
            raise
        except BaseException:  # what a signal raised; the same record again gets the first answer
            self._hand_over(record)
            raise

    def _call(
        self,
        method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
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
                response = method(
                    request,
                    timeout=attempts.seconds_left(),
                    metadata=self._connection.metadata,
                )
            except grpc.RpcError as failure:
                error = errors.from_rpc(failure)
            else:
                attempts.answered()
                return response
            # Raised out here, without grpc's error behind it: its frames hold the token. Nor may
            # a report that prints our locals find handles and tickets in the message.
            wait = attempts.wait_after(error)
            if wait is None:
                del request
                raise error
            self._closed.wait(wait)

    # -------------------------------------------------------------- records in the background

    def _send_queued(self) -> None:
        """The sender: lives while something is queued."""
        while True:
            with self._changed:
                self._queue.told()
                if not self._queue:
                    self._sender = None
                self._changed.notify_all()
                if self._sender is None:
                    return
                batch = self._queue.batch()
            answered = self._send(batch)
            with self._changed:
                unsent, wait = self._queue.answered(answered)
            report(self._on_unsent, unsent)
            if wait:
                self._closed.wait(wait)

    def _send(
        self, batch: pb.BatchRecordRequest
    ) -> Sequence[Recorded | errors.KeyturnError] | errors.KeyturnError:
        timeout = BATCH_TIMEOUT.total_seconds()
        try:
            response = self._stub.BatchRecord(batch, timeout=timeout, metadata=self._connection.metadata)
        except grpc.RpcError as failure:
            error = errors.from_rpc(failure)
            self._reach.answered(error)
            return error
        except ValueError:  # closing took the channel away, and the queue with it
            return errors.KeyturnError("the client is closed")
        self._reach.answered()
        return _wire.records(response)


class Call(CallState):
    __doc__ = CallState.__doc__

    def __init__(
        self, client: Client, fields: RequestFields, timeout: timedelta | None, *, background: bool
    ) -> None:
        super().__init__(fields)
        self._client = client
        self._timeout = timeout
        self._background = background

    def __enter__(self) -> Self:
        self._take(self._client._decide(self._enter(), self._timeout, owned=self._owned))
        return self

    def __exit__(
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
            self._closed(self._client._record(record, self._timeout))
        except Exception as failure:
            if raised is None:
                raise
            raised.add_note(not_recorded(record, failure))

    def finish(self) -> Recorded | None:
        """End the call here, and record it: SUCCESS, unless `failed` said otherwise.

        Gives the answer to the record; None for an unmetered call, which has nothing to record. Raises
        what `Client.record` does, with the record in `unrecorded`.
        """
        self._require_open()
        self.unrecorded = self._close(None)
        if self.unrecorded is not None:
            self._closed(self._client._record(self.unrecorded, self._timeout))
        return self.recorded

    def key_refused(
        self,
        outcome: Outcome = Outcome.AUTH_REJECTED,
        *,
        http_status: int | None = None,
        error_message: str = "",
        retry_after: timedelta | None = None,
    ) -> None:
        """The provider refused the own key: record that, and decide again without it.

        Returns when there is another route: take `headers` again, and send again. Raises `Denied`
        when there is none, and `RuntimeError` when credits pay for this call.
        """
        refusal = self._refuse(outcome, http_status, error_message, retry_after)
        self._client._record(refusal, self._timeout)
        self._refused()
        self._take(self._client._decide(self._request, self._timeout, owned=self._owned))
