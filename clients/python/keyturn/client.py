"""The client for threads. `keyturn.aio` is the same for asyncio."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import timedelta
from types import TracebackType
from typing import Self, TypeVar, Unpack

import grpc

from keyturn import _channel, _wire, errors
from keyturn._calls import CallState, not_recorded
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

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

DEFAULT_TIMEOUT = timedelta(seconds=2)
DEFAULT_RETRIES = Retries()


class Client:
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
        retries: see `Retries`.

    Every call raises a `KeyturnError` (`keyturn.errors` draws the tree), `RuntimeError` once the
    client is closed, and `TypeError` or `ValueError` for an argument that cannot be sent.
    Raises `ValueError` itself for a target, a token or certificates that cannot work.
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
        where, credentials = self._connection.target, self._connection.credentials
        options = self._connection.options
        self._channel = (
            grpc.insecure_channel(where, options)
            if credentials is None
            else grpc.secure_channel(where, credentials, options)
        )
        self._stub = RoutingServiceStub(self._channel)
        self._closed = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._connection.target!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        raised: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Calls still running in other threads are cancelled."""
        self._closed = True
        self._channel.close()

    def request(self, *, timeout: timedelta | None = None, **fields: Unpack[RequestFields]) -> Call:
        """A `with` block around one request: decides on entry, records on exit.

        Entry raises `Denied` when the policy says no. What the exit records: see `Call`. When
        recording fails, the exit raises that error; unless the block raised, whose exception then
        goes on with a note of the failure. `fields`: those of `DecideRequest`, less `redeem`;
        `timeout` holds for each call.
        """
        return Call(self, fields, timeout)

    def decide(self, *, timeout: timedelta | None = None, **fields: Unpack[DecideFields]) -> Decision:
        """Whose credential pays for a request? A denial is an answer too: see `Decision.allowed`.

        `fields`: those of `DecideRequest`. Retried when unavailable, with the same request id, so
        that no second hold is placed.
        """
        return self._decide(DecideRequest(**fields), timeout)

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

    def redeem(self, handle: KeyHandle | str, *, timeout: timedelta | None = None) -> Secret:
        """The secret behind a key handle that was decided with `redeem=True`; once per handle.

        Never retried: a redemption that seemed to fail may have been carried out, and the next one
        would be refused. Decide again with the same request id for a fresh handle.
        """
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

    def _decide(self, asked: DecideRequest, timeout: timedelta | None) -> Decision:
        return _wire.decision(self._call(self._stub.Decide, _wire.decide_request(asked), timeout))

    def _record(self, record: RecordRequest, timeout: timedelta | None) -> Recorded:
        return _wire.recorded(self._call(self._stub.Record, _wire.record_request(record), timeout))

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("the client is closed")

    def _call(
        self,
        method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout: timedelta | None,
        *,
        retry: bool = True,
    ) -> _Response:
        attempts = Attempts(self._retries, self._timeout if timeout is None else timeout)
        while True:
            self._require_open()
            try:
                return method(
                    request,
                    timeout=attempts.seconds_left(),
                    metadata=self._connection.metadata,
                )
            except grpc.RpcError as failure:
                error = errors.from_rpc(failure)
            # Raised out here, without grpc's error behind it: its frames hold the token. Nor may
            # a report that prints our locals find handles and tickets in the message.
            wait = attempts.wait_after(error) if retry else None
            if wait is None:
                del request
                raise error
            time.sleep(wait)


class Call(CallState):
    __doc__ = CallState.__doc__

    def __init__(self, client: Client, fields: RequestFields, timeout: timedelta | None) -> None:
        super().__init__(fields)
        self._client = client
        self._timeout = timeout

    def __enter__(self) -> Self:
        self._take(self._client._decide(self._enter(), self._timeout))
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
        try:
            self._closed(self._client._record(record, self._timeout))
        except Exception as failure:
            if raised is None:
                raise
            raised.add_note(not_recorded(record, failure))

    def key_refused(
        self,
        outcome: Outcome = Outcome.AUTH_REJECTED,
        *,
        http_status: int | None = 401,
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
        self._take(self._client._decide(self._request, self._timeout))
