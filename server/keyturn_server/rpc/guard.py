"""The outermost layer of every method: bytes in, bytes out, and no exception's text to the caller.

Methods are registered without deserializers, so that a body that is no protobuf gets an answer of
ours, and without interceptors, which cost more than a decision does.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import status_pb2
from grpc_status import rpc_status

from keyturn_server.access import Caller, Role
from keyturn_server.errors import PermissionDenied, Unauthenticated
from keyturn_server.rpc.access import Access, transport_of
from keyturn_server.rpc.status import MalformedRequest, RequestTooLarge, internal_status, status_of

Request = TypeVar("Request", bound=Message)
Context = grpc.aio.ServicerContext[Any, Any]

MAX_REQUEST_BYTES = 64 * 1024
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Method(Generic[Request]):
    """One unary method: what it takes, what answers it, and who may call it."""

    request_type: type[Request]
    answer: Callable[[Request, Caller], Coroutine[Any, Any, Message]]
    roles: frozenset[Role]
    max_bytes: int = MAX_REQUEST_BYTES


class Service(Protocol):
    """A gRPC service, as its methods."""

    @property
    def name(self) -> str:
        """Its full name."""

    def methods(self) -> Mapping[str, Method[Any]]:
        """Its methods by name, every one of them."""


class Guard:
    """Makes gRPC handlers of plain functions from request and caller to response message.

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
    ) -> None:
        """`on_call` hears of each call of ours and the code it ended with; `on_denied` of the code,
        the method, and who was turned away."""
        self._access = access
        self._log = log
        self._on_call = on_call
        self._on_denied = on_denied
        self._changes: set[asyncio.Task[Message]] = set()
        self.in_flight = 0
        """Calls being answered right now."""

    def handler(self, service: Service) -> grpc.GenericRpcHandler:
        """The handler of all methods of a service."""
        methods = {name: self._unary(name, method) for name, method in service.methods().items()}
        return grpc.method_handlers_generic_handler(service.name, methods)

    def _unary(self, name: str, method: Method[Any]) -> grpc.RpcMethodHandler[Any, Any]:
        request_type, answer, roles, max_bytes = (
            method.request_type,
            method.answer,
            method.roles,
            method.max_bytes,
        )

        async def handle(_: object, context: Context) -> bytes:
            self.in_flight += 1
            try:
                caller = self._admit(context, name, roles)
                body = await _read(context)
                if len(body) > max_bytes:
                    raise RequestTooLarge(len(body), max_bytes)
                try:
                    request = request_type.FromString(body)
                except DecodeError:
                    raise MalformedRequest from None
                work = answer(request, caller)
                response = await (self._to_its_end(work) if roles == CHANGING else work)
                self._on_call(name, "OK")
                return response.SerializeToString()
            except Exception as error:
                status = self.status(name, error)
            finally:
                self.in_flight -= 1
            self._on_call(name, _CODES[status.code])
            await context.abort_with_status(rpc_status.to_status(status))
            raise AssertionError("abort returned")

        # As a stream of one request: that of a unary method would be read before we are asked.
        return grpc.stream_unary_rpc_method_handler(handle)

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
        self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> grpc.GenericRpcHandler:
        """The handler of a service that is not ours, for whoever has any role."""
        methods = {name: self._foreign(name, handler) for name, handler in handlers.items()}
        return grpc.method_handlers_generic_handler(service, methods)

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
                    request = decode(await _read(context))
                except (DecodeError, MalformedRequest):
                    status = self.status(name, MalformedRequest())
                    await context.abort_with_status(rpc_status.to_status(status))
            response = await inner(request, context)
            if not handler.response_streaming:
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

    def status(self, method: str, error: Exception) -> status_pb2.Status:
        """The status for `error`. A defect is logged with its trace and answered with its id only."""
        status = status_of(error)
        if status is None:
            error_id = uuid.uuid4().hex[:12]
            self._log.error("internal_error", method=method, error_id=error_id, exc_info=error)
            status = internal_status(error_id)
        return status


async def _read(context: Context) -> bytes:
    """The body. Raises `MalformedRequest` where none comes, or one that gRPC cuts off for its size."""
    body = await context.read()
    if not isinstance(body, bytes):
        raise MalformedRequest
    return body


class _Rest(grpc.GenericRpcHandler):
    def __init__(self, handler: grpc.RpcMethodHandler[Any, Any]) -> None:
        self._handler = handler

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        return self._handler


_CODES = {code.value[0]: code.name for code in grpc.StatusCode}
