"""Faults to gRPC statuses: one table, with `google.rpc` details.

Every status has an `ErrorInfo` with the domain `keyturn`; docs/errors.md lists the reasons.
"""

from __future__ import annotations

from typing import NamedTuple

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from keyturn.v1 import status_pb2 as keyturn_status_pb2
from keyturn_server.errors import (
    ByokDisabled,
    EncryptionNotConfigured,
    GrantConflict,
    HandleExpired,
    HandleRedeemed,
    HoldNotFound,
    InvalidFields,
    KeyGone,
    KeyNotFound,
    KeyturnFault,
    LabelTaken,
    LockoutNotAcknowledged,
    Overloaded,
    PermissionDenied,
    ProviderDisabled,
    RecordConflict,
    RecordTooLate,
    RequestIdReused,
    RowLocked,
    SpoolUnavailable,
    StoreUnavailable,
    TierNotEligible,
    TooManyKeys,
    Unauthenticated,
    UserNotFound,
)
from keyturn_server.keys.tokens import InvalidToken

DOMAIN = "keyturn"
_RETRY_SECONDS = 1


class MalformedRequest(KeyturnFault):
    """The body is not the protobuf message that this method takes."""

    def __init__(self) -> None:
        super().__init__("The request is not a valid protobuf message of this method.")


class RequestTooLarge(KeyturnFault):
    """The body is over its limit. Sizes in bytes."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"The request has {size} bytes; the limit is {limit}.")


class OutOfTime(KeyturnFault):
    """The call's deadline passed while it waited, or its body did not come. Nothing was done."""

    def __init__(self) -> None:
        super().__init__("The time for this call is over. Nothing was done.")


class BadToken(KeyturnFault):
    """A sealed token that does not open, and the field it stood in."""

    def __init__(self, field: str, error: InvalidToken) -> None:
        self.field = field
        self.cause = error.cause.value
        self.description = str(error)
        super().__init__(f"{field}: {error}.")


class Entry(NamedTuple):
    """How a fault is answered."""

    code: grpc.StatusCode
    reason: str


TABLE: dict[type[Exception], Entry] = {
    MalformedRequest: Entry(grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST"),
    RequestTooLarge: Entry(grpc.StatusCode.RESOURCE_EXHAUSTED, "REQUEST_TOO_LARGE"),
    OutOfTime: Entry(grpc.StatusCode.DEADLINE_EXCEEDED, "OUT_OF_TIME"),
    InvalidFields: Entry(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
    BadToken: Entry(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_TOKEN"),
    UserNotFound: Entry(grpc.StatusCode.NOT_FOUND, "USER_NOT_FOUND"),
    HoldNotFound: Entry(grpc.StatusCode.NOT_FOUND, "HOLD_NOT_FOUND"),
    RequestIdReused: Entry(grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED"),
    RecordConflict: Entry(grpc.StatusCode.ALREADY_EXISTS, "RECORD_CONFLICT"),
    RecordTooLate: Entry(grpc.StatusCode.FAILED_PRECONDITION, "RECORD_TOO_LATE"),
    HandleExpired: Entry(grpc.StatusCode.FAILED_PRECONDITION, "HANDLE_EXPIRED"),
    HandleRedeemed: Entry(grpc.StatusCode.FAILED_PRECONDITION, "HANDLE_REDEEMED"),
    KeyGone: Entry(grpc.StatusCode.FAILED_PRECONDITION, "KEY_UNUSABLE"),
    Unauthenticated: Entry(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    PermissionDenied: Entry(grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED"),
    EncryptionNotConfigured: Entry(grpc.StatusCode.FAILED_PRECONDITION, "ENCRYPTION_NOT_CONFIGURED"),
    ByokDisabled: Entry(grpc.StatusCode.FAILED_PRECONDITION, "BYOK_DISABLED"),
    TierNotEligible: Entry(grpc.StatusCode.FAILED_PRECONDITION, "TIER_NOT_ELIGIBLE"),
    ProviderDisabled: Entry(grpc.StatusCode.FAILED_PRECONDITION, "PROVIDER_DISABLED"),
    TooManyKeys: Entry(grpc.StatusCode.FAILED_PRECONDITION, "TOO_MANY_KEYS"),
    KeyNotFound: Entry(grpc.StatusCode.NOT_FOUND, "KEY_NOT_FOUND"),
    LabelTaken: Entry(grpc.StatusCode.ALREADY_EXISTS, "LABEL_TAKEN"),
    GrantConflict: Entry(grpc.StatusCode.ALREADY_EXISTS, "GRANT_CONFLICT"),
    LockoutNotAcknowledged: Entry(grpc.StatusCode.FAILED_PRECONDITION, "LOCKOUT_NOT_ACKNOWLEDGED"),
    StoreUnavailable: Entry(grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE"),
    RowLocked: Entry(grpc.StatusCode.UNAVAILABLE, "ROW_LOCKED"),
    SpoolUnavailable: Entry(grpc.StatusCode.UNAVAILABLE, "SPOOL_UNAVAILABLE"),
    Overloaded: Entry(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
}


def status_of(error: Exception) -> status_pb2.Status | None:
    """The status for a fault with a meaning; None for anything else, which is a defect."""
    entry = TABLE.get(type(error))
    if entry is None:
        return None
    info = error_details_pb2.ErrorInfo(reason=entry.reason, domain=DOMAIN)
    details: list[
        error_details_pb2.BadRequest | error_details_pb2.ResourceInfo | error_details_pb2.RetryInfo
    ] = []
    match error:
        case InvalidFields():
            details.append(_bad_request(*error.violations))
        case BadToken():
            info.metadata["cause"] = error.cause
            details.append(_bad_request((error.field, error.description)))
        case UserNotFound():
            details.append(error_details_pb2.ResourceInfo(resource_type="user", resource_name=error.user_id))
        case HoldNotFound():
            details.append(error_details_pb2.ResourceInfo(resource_type="hold"))
        case KeyNotFound():
            details.append(error_details_pb2.ResourceInfo(resource_type="key", resource_name=error.key_id))
        case LockoutNotAcknowledged():
            info.metadata["locked_out_users"] = str(error.locked_out_users)
        case StoreUnavailable() | Overloaded():
            if isinstance(error, SpoolUnavailable):
                info.metadata["cause"] = error.cause.value
            details.append(
                error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=_RETRY_SECONDS))
            )
    return _status(entry.code, str(error), info, *details)


def known_status(fault: KeyturnFault) -> status_pb2.Status:
    """The status for a fault that is in the table."""
    status = status_of(fault)
    if status is None:
        raise KeyError(type(fault).__name__)
    return status


def internal_status(error_id: str) -> status_pb2.Status:
    """The status for a defect: a fixed sentence, and the id under which the log has the rest."""
    info = error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"error_id": error_id})
    return _status(
        grpc.StatusCode.INTERNAL, f"Something went wrong here. The log has it as error_id {error_id}.", info
    )


def item_status(status: status_pb2.Status) -> keyturn_status_pb2.Status:
    """The same status as one item of a batch; the two messages are alike on the wire."""
    return keyturn_status_pb2.Status(code=status.code, message=status.message, details=status.details)


def _bad_request(*violations: tuple[str, str]) -> error_details_pb2.BadRequest:
    return error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
            for field, description in violations
        ]
    )


def _status(
    code: grpc.StatusCode,
    message: str,
    *details: error_details_pb2.ErrorInfo
    | error_details_pb2.BadRequest
    | error_details_pb2.ResourceInfo
    | error_details_pb2.RetryInfo,
) -> status_pb2.Status:
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status
