"""What goes wrong, as one tree::

    KeyturnError                 a fault: the sidecar did not answer, or refused the call
    ├── InvalidArgument          a field is wrong (`field_violations`), or a token is garbled
    ├── Unauthenticated          no token or certificate, or one that the sidecar does not know
    ├── PermissionDenied         the caller's role may not do this
    ├── NotFound                 no such user, or a hold settled and forgotten (`resource`)
    ├── AlreadyExists            the same request or record was seen with other contents
    ├── FailedPrecondition       too late, redeemed already, no longer usable
    ├── ResourceExhausted        the sidecar is overloaded, or the message too large
    ├── Unavailable              the sidecar or its store is out of reach
    │   └── DeadlineExceeded     no answer in time; the call may have been carried out
    └── InternalError            a defect of the sidecar; `metadata` may hold its error id

    Denied                       the policy said no. An answer, not a fault, so it stands outside:
                                 an `except KeyturnError` that lets requests pass while the sidecar
                                 is down must not let a denial pass

    QueueFull                    `record_later` has no room; the record is still the caller's

A status that has no class here (UNIMPLEMENTED, …) is a plain `KeyturnError`. CANCELLED by the other side is
`Unavailable`: a sidecar that ends drops so what it has not looked at yet.
"""

# ruff: noqa: N818  the names of the gRPC statuses, as every other client has them

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import grpc
from google.protobuf import any_pb2

from keyturn import _details
from keyturn.model import Decision, RecordRequest
from keyturn.v1 import status_pb2


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field that the server refused, e.g. `user_id`, and why."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class Resource:
    """What a `NotFound` did not find, e.g. `user` and its id."""

    type: str
    name: str
    description: str


class KeyturnError(Exception):
    """A call that got no answer. `str()` is fit for logs: it never holds a secret."""

    code: grpc.StatusCode
    reason: str
    """The stable name for programs (`ErrorInfo.reason`), e.g. `STORE_UNAVAILABLE`; may be empty."""
    message: str
    """One plain sentence."""
    field_violations: tuple[FieldViolation, ...]
    retry_after: timedelta | None
    """How long the server asks to wait (`RetryInfo`)."""
    resource: Resource | None
    metadata: dict[str, str]
    """What `ErrorInfo` says besides, e.g. an error id to quote to the operators."""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        reason: str = "",
        field_violations: tuple[FieldViolation, ...] = (),
        retry_after: timedelta | None = None,
        resource: Resource | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.field_violations = field_violations
        self.retry_after = retry_after
        self.resource = resource
        self.metadata = metadata or {}

    def __str__(self) -> str:
        said = f"{self.code.name} ({self.reason})" if self.reason else self.code.name
        fields = "; ".join(f"{each.field}: {each.description}" for each in self.field_violations)
        return f"{said}: {self.message}" + (f" [{fields}]" if fields else "")


class InvalidArgument(KeyturnError):
    """A field is wrong, or a handle or ticket is garbled, truncated or foreign."""


class Unauthenticated(KeyturnError):
    """No token or certificate, or one that the sidecar does not know."""


class PermissionDenied(KeyturnError):
    """The caller's role may not do this."""


class NotFound(KeyturnError):
    """No such user, or a hold that was settled and forgotten long ago."""


class AlreadyExists(KeyturnError):
    """The same request id or record was seen before, with other contents."""


class FailedPrecondition(KeyturnError):
    """Too late, redeemed already, or no longer usable."""


class ResourceExhausted(KeyturnError):
    """The sidecar is overloaded, or the message is too large. Never retried by the client."""


class Unavailable(KeyturnError):
    """The sidecar or its store is out of reach, after all retries that the deadline allowed."""


class DeadlineExceeded(Unavailable):
    """No answer in time. The call may have been carried out."""


class InternalError(KeyturnError):
    """A defect of the sidecar."""


class Denied(Exception):
    """The policy said no; `decision.denial` says why. Raised by `request` only."""

    decision: Decision

    def __init__(self, decision: Decision) -> None:
        super().__init__(decision)
        self.decision = decision

    def __str__(self) -> str:
        denial = self.decision.denial
        if denial is None:
            return self.decision.message
        return f"{denial.reason}: {self.decision.message}"


class QueueFull(Exception):
    """`record_later` has no room for `record`: it is still the caller's, for `record` or for later."""

    record: RecordRequest

    def __init__(self, record: RecordRequest) -> None:
        super().__init__("the queue of records is full")
        self.record = record


_CLASSES: dict[grpc.StatusCode, type[KeyturnError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.INTERNAL: InternalError,
    grpc.StatusCode.UNKNOWN: InternalError,
    grpc.StatusCode.DATA_LOSS: InternalError,
}
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def came_from_the_sidecar(error: KeyturnError) -> bool:
    """Whether the sidecar, or its guard, said so; else it is gRPC's own word that nobody answered."""
    silent = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
    return bool(error.reason) or error.code not in silent


def from_rpc(error: grpc.RpcError) -> KeyturnError:
    """The typed error of a failed call, with the details of its trailing metadata."""
    code, message = error.code(), error.details() or ""
    trailing: Iterable[Any] = error.trailing_metadata() or ()
    details: Iterable[any_pb2.Any] = ()
    # Details are an extra: garbled ones must never mask the status itself.
    with contextlib.suppress(Exception):
        packed = next((value for key, value in trailing if key == "grpc-status-details-bin"), b"")
        details = status_pb2.Status.FromString(packed).details
    if code is grpc.StatusCode.CANCELLED and not details:
        # Not by us: who cancels a call of ours gets no error of gRPC's. It is what gRPC's core makes of calls
        # that a server which ends has not looked at yet (github.com/grpc/grpc/issues/41785).
        code = grpc.StatusCode.UNAVAILABLE
    return _build(code, message, details)


def from_status(status: status_pb2.Status) -> KeyturnError:
    """The typed error of one item of a batch."""
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    return _build(code, status.message, status.details)


def _build(code: grpc.StatusCode, message: str, details: Iterable[any_pb2.Any]) -> KeyturnError:
    error = _CLASSES.get(code, KeyturnError)(message, code=code)
    for packed in details:
        with contextlib.suppress(Exception):  # see from_rpc
            _add_detail(error, packed.type_url.rpartition("/")[2], packed.value)
    return error


def _add_detail(error: KeyturnError, name: str, data: bytes) -> None:
    match name:
        case "google.rpc.ErrorInfo":
            info = _details.ErrorInfo.FromString(data)
            error.reason = info.reason
            error.metadata = {entry.key: entry.value for entry in info.metadata}
        case "google.rpc.BadRequest":
            bad = _details.BadRequest.FromString(data)
            error.field_violations = tuple(
                FieldViolation(each.field, each.description) for each in bad.field_violations
            )
        case "google.rpc.RetryInfo":
            delay = _details.RetryInfo.FromString(data).retry_delay
            asked = timedelta(seconds=delay.seconds, microseconds=delay.nanos // 1000)
            error.retry_after = max(asked, timedelta())
        case "google.rpc.ResourceInfo":
            found = _details.ResourceInfo.FromString(data)
            error.resource = Resource(found.resource_type, found.resource_name, found.description)
