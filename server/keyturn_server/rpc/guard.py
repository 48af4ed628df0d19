"""The outermost layer of every method: bytes in, bytes out, and no exception's text to the caller.

Methods take calls whose body nobody has read, so that one that is no protobuf gets an answer of ours, and
there are no interceptors, which cost more than a decision does.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import Any, Generic, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import status_pb2
from grpc_status import rpc_status

from keyturn_server.access import Caller, Role
from keyturn_server.errors import Overloaded, PermissionDenied, Unauthenticated
from keyturn_server.rpc.accepting import Call, UnaryMethod
from keyturn_server.rpc.access import Access, transport_of
from keyturn_server.rpc.status import (
    MalformedRequest,
    OutOfTime,
    RequestTooLarge,
    internal_status,
    known_status,
    status_of,
)

Request = TypeVar("Request", bound=Message)
Context = grpc.aio.ServicerContext[Any, Any]

MAX_REQUEST_BYTES = 64 * 1024
_AT_ONCE = 64  # calls of one method on the data plane
MAX_BATCH_BYTES = 1024 * 1024


class Log(Protocol):
    """The part of a structlog logger that is used here."""

    def error(self, event: str, **values: Any) -> Any: ...


DATA_PLANE = frozenset({Role.GATEWAY})
"""Who may spend, record and fetch secrets."""
READING = frozenset({Role.OPERATOR, Role.VIEWER})
"""Who may read the control plane."""
CHANGING = frozenset({Role.OPERATOR})
"""Who may change what it steers."""
ANYBODY = frozenset(Role)
"""Whoever has any role."""


class Urgency(Enum):
    """Who is turned away when there is more to do than can be done in time. Rules: docs/decisions/0015."""

    BEGINS = "begins"
    """First: nothing has been spent yet. Not carried out once its deadline has passed, either."""
    ENDS = "ends"
    """Later: a decision was made, and with a record money has been spent."""
    ALWAYS = "always"
    """Never, and it does not count: the few calls of operators."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method(Generic[Request]):
    """One unary method: what it takes, what answers it, and who may call it."""

    request_type: type[Request]
    answer: Callable[[Request, Caller], Coroutine[Any, Any, Message]]
    roles: frozenset[Role]
    urgency: Urgency = Urgency.ALWAYS
    weight: Callable[[Request], int] = lambda request: 1
    """As how many calls it counts."""
    max_bytes: int = MAX_REQUEST_BYTES


class Service(Protocol):
    """A gRPC service, as its methods."""

    @property
    def name(self) -> str:
        """Its full name."""

    def methods(self) -> Mapping[str, Method[Any]]:
        """Its methods by name, every one of them."""


class Guard:
    """Makes gRPC methods of plain functions from request and caller to response message.

    Every handler, also those of services that are not ours, looks at the caller before it reads the
    body: so somebody unknown gets one and the same answer, whatever is asked and however.
    """

    def __init__(
        self,
        *,
        access: Access,
        log: Log,
        on_call: Callable[[str, str], None],
        on_denied: Callable[[str, str, str], None],
        on_shed: Callable[[str], None],
        max_concurrent_calls: int,
    ) -> None:
        """`on_call` hears of each call of ours and the code it ended with; `on_denied` of the code, the
        method, and who was turned away; `on_shed` of the method of a call that was one too many.

        At most `max_concurrent_calls` are carried out at once before those that begin something are
        turned away, and twice as many before those that end it are."""
        self._access = access
        self._log = log
        self._on_call = on_call
        self._on_denied = on_denied
        self._on_shed = on_shed
        self._limits = {Urgency.BEGINS: max_concurrent_calls, Urgency.ENDS: 2 * max_concurrent_calls}
        self._changes: set[asyncio.Task[Message]] = set()
        self._reading: dict[asyncio.Task[Any] | None, bool] = {}
        """Whose body has not come yet, and whether it is given up."""
        self.in_flight = 0
        """Calls being answered right now."""
        self.carried = 0
        """What is being carried out of the data plane, in calls: a batch counts as several."""

    def methods(self, service: Service) -> dict[str, UnaryMethod]:
        """All methods of a service, by name."""
        return {name: self._unary(name, method) for name, method in service.methods().items()}

    def _unary(self, name: str, method: Method[Any]) -> UnaryMethod:
        request_type, answer, roles, max_bytes, weight = (
            method.request_type,
            method.answer,
            method.roles,
            method.max_bytes,
            method.weight,
        )
        begins = method.urgency is Urgency.BEGINS
        limit = self._limits.get(method.urgency)

        async def handle(call: Call) -> None:
            context = call.context
            answered: bytes | grpc.Status
            self.in_flight += 1
            carries = 0
            try:
                caller = self._admit(context, name, roles)
                # Before anything is spent on it. A call counts once its body is here: a caller who never
                # sends one would take the place of others.
                if limit is not None and self.carried >= limit:
                    raise Overloaded
                body = await self._read(context, call.task)
                if len(body) > max_bytes:
                    raise RequestTooLarge(len(body), max_bytes)
                if limit is not None:
                    # Many may have come in while it was read.
                    if self.carried >= limit:
                        raise Overloaded
                    if begins and (left := context.time_remaining()) is not None and left <= 0:
                        raise OutOfTime
                try:
                    request = request_type.FromString(body)
                except DecodeError:
                    raise MalformedRequest from None
                if limit is not None:
                    carries = weight(request)
                    # One that is over the limit by itself goes when nothing else does.
                    if self.carried and self.carried + carries > limit:
                        carries = 0
                        raise Overloaded
                    self.carried += carries
                work = answer(request, caller)
                response = await call.carried_out(self._to_its_end(work) if roles == CHANGING else work)
                answered = response.SerializeToString()
                self._on_call(name, "OK")
            except Overloaded:
                self._on_shed(name)
                answered = self._refused(name, _OVERLOADED)
            except Exception as error:
                answered = self._refused(name, rpc_status.to_status(self.status(name, error)))
            finally:
                self.in_flight -= 1
                self.carried -= carries
            await call.answer(answered)

        return UnaryMethod(answer=handle, at_once=1 if limit is None else _AT_ONCE)

    def _refused(self, name: str, status: grpc.Status) -> grpc.Status:
        self._on_call(name, status.code.name)
        return status

    async def _to_its_end(self, work: Coroutine[Any, Any, Message]) -> Message:
        """The answer of an operator's change. It is made and audited whole, also for a caller that hangs up
        meanwhile."""
        change = asyncio.create_task(work)
        self._changes.add(change)
        change.add_done_callback(self._changed)
        return await asyncio.shield(change)

    def _changed(self, change: asyncio.Task[Message]) -> None:
        self._changes.discard(change)
        if not change.cancelled():
            change.exception()  # nobody else may be left to look at it

    async def settled(self) -> None:
        """Back when no change is under way whose caller has hung up."""
        while self._changes:
            await asyncio.wait(self._changes)

    def foreign(
        self, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """The handlers of a service that is not ours, for whoever has any role."""
        return {name: self._foreign(name, handler) for name, handler in handlers.items()}

    def _foreign(
        self, name: str, handler: grpc.RpcMethodHandler[Any, Any]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        inner: Any = handler.unary_unary or handler.unary_stream or handler.stream_stream
        decode: Any = handler.request_deserializer

        async def handle(requests: AsyncIterator[Any], context: Context) -> None:
            await self._admit_or_abort(context, name)
            request: Any = requests
            if not handler.request_streaming:
                try:
                    request = decode(await self._read(context, asyncio.current_task()))
                except (DecodeError, MalformedRequest, OutOfTime) as error:
                    fault = error if isinstance(error, OutOfTime) else MalformedRequest()
                    await context.abort_with_status(rpc_status.to_status(self.status(name, fault)))
            try:
                response = await inner(request, context)
            except grpc.aio.BaseError:  # gRPC's own: an abort, or a caller that went away
                raise
            except Exception as error:
                # A stream's messages are decoded as they are read.
                status = self.status(name, MalformedRequest() if isinstance(error, DecodeError) else error)
                await context.abort_with_status(rpc_status.to_status(status))
            # A library's method may set a status and return nothing.
            if not handler.response_streaming and response is not None:
                await context.write(response)

        return grpc.stream_stream_rpc_method_handler(
            handle,
            request_deserializer=handler.request_deserializer if handler.request_streaming else None,
            response_serializer=handler.response_serializer,
        )

    def rest(self) -> grpc.GenericRpcHandler:
        """The handler of what no other one knows; to be registered last. gRPC would tell anybody."""

        async def handle(_: object, context: Context) -> None:
            await self._admit_or_abort(context, "unknown")
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "There is no such method here.")

        return _Rest(grpc.stream_stream_rpc_method_handler(handle))

    def _admit(self, context: Context, method: str, roles: frozenset[Role]) -> Caller:
        """The caller. Raises `Unauthenticated`, `PermissionDenied` and `InvalidFields`."""
        try:
            caller = self._access.caller_of(context)
        except Unauthenticated:
            self._on_denied("UNAUTHENTICATED", method, transport_of(context))
            raise
        if not roles & caller.roles:
            self._on_denied("PERMISSION_DENIED", method, caller.name)
            raise PermissionDenied(roles)
        return caller

    async def _admit_or_abort(self, context: Context, method: str) -> None:
        try:
            self._admit(context, method, ANYBODY)
            return
        except Exception as error:
            status = self.status(method, error)
        await context.abort_with_status(rpc_status.to_status(status))

    async def _read(self, context: Context, task: asyncio.Task[Any] | None) -> bytes:
        """The body, read by `task`, the current one.

        Raises `MalformedRequest` where none comes, or one that gRPC cuts off for its size, and `OutOfTime`
        where it takes too long.
        """
        self._reading[task] = False
        try:
            body = await context.read()
        except asyncio.CancelledError:
            if self._reading[task] and task is not None and not task.uncancel():
                raise OutOfTime from None
            raise
        finally:
            del self._reading[task]
        if not isinstance(body, bytes):
            raise MalformedRequest
        return body

    async def give_up_bodies(self, timeout: timedelta) -> None:
        """End calls whose body has not come within `timeout` (at most twice that), until cancelled.

        A timer for each call would cost more than all else that is done before it is carried out.
        """
        while True:
            waiting = list(self._reading)
            await asyncio.sleep(timeout.total_seconds())
            for task in waiting:
                if task is not None and self._reading.get(task) is False:
                    self._reading[task] = True
                    task.cancel()

    def status(self, method: str, error: Exception) -> status_pb2.Status:
        """The status for `error`. A defect is logged with its trace and answered with its id only."""
        status = status_of(error)
        if status is None:
            error_id = uuid.uuid4().hex[:12]
            self._log.error("internal_error", method=method, error_id=error_id, exc_info=error)
            status = internal_status(error_id)
        return status


class _Rest(grpc.GenericRpcHandler):
    def __init__(self, handler: grpc.RpcMethodHandler[Any, Any]) -> None:
        self._handler = handler

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        return self._handler


# Made once: turning a call away has to be cheaper than carrying it out.
_OVERLOADED = rpc_status.to_status(known_status(Overloaded()))
