"""The outermost layer of every method: bytes in, bytes out, and no exception's text to the caller.

Methods are registered without deserializers, so that a body that is no protobuf gets an answer of
ours, and without interceptors, which cost more than a decision does.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import status_pb2
from grpc_status import rpc_status

from keyturn_server.rpc.status import MalformedRequest, RequestTooLarge, internal_status, status_of

Request = TypeVar("Request", bound=Message)
Context = grpc.aio.ServicerContext[Any, Any]

MAX_REQUEST_BYTES = 64 * 1024
MAX_BATCH_BYTES = 1024 * 1024


class Log(Protocol):
    """The part of a structlog logger that is used here."""

    def error(self, event: str, **values: Any) -> Any: ...


class Guard:
    """Makes gRPC handlers of plain functions from request to response message."""

    def __init__(self, *, log: Log, on_call: Callable[[str, str], None]) -> None:
        self._log = log
        self._on_call = on_call
        self.in_flight = 0
        """Calls being answered right now."""

    def unary(
        self,
        method: str,
        request_type: type[Request],
        answer: Callable[[Request], Awaitable[Message]],
        *,
        max_bytes: int = MAX_REQUEST_BYTES,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """A handler of a unary method. `on_call` hears of each call and the code it ended with."""

        async def handle(body: bytes, context: Context) -> bytes:
            self.in_flight += 1
            try:
                if len(body) > max_bytes:
                    raise RequestTooLarge(len(body), max_bytes)
                try:
                    request = request_type.FromString(body)
                except DecodeError:
                    raise MalformedRequest from None
                response = await answer(request)
                self._on_call(method, "OK")
                return response.SerializeToString()
            except Exception as error:
                status = self.status(method, error)
            finally:
                self.in_flight -= 1
            self._on_call(method, _CODES[status.code])
            await context.abort_with_status(rpc_status.to_status(status))
            raise AssertionError("abort returned")

        return grpc.unary_unary_rpc_method_handler(handle)

    def status(self, method: str, error: Exception) -> status_pb2.Status:
        """The status for `error`. A defect is logged with its trace and answered with its id only."""
        status = status_of(error)
        if status is None:
            error_id = uuid.uuid4().hex[:12]
            self._log.error("internal_error", method=method, error_id=error_id, exc_info=error)
            status = internal_status(error_id)
        return status


_CODES = {code.value[0]: code.name for code in grpc.StatusCode}
