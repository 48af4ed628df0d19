"""Keyturn: whose credential pays for this LLM request? The light client.

`Client` for threads, `AsyncClient` for asyncio; `keyturn.errors` draws the tree of errors.
"""

from keyturn import _channel
from keyturn.aio import AsyncCall, AsyncClient
from keyturn.client import Call, Client
from keyturn.errors import (
    AlreadyExists,
    DeadlineExceeded,
    Denied,
    FailedPrecondition,
    FieldViolation,
    InternalError,
    InvalidArgument,
    KeyturnError,
    NotFound,
    PermissionDenied,
    QueueFull,
    Resource,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from keyturn.model import (
    Constraint,
    CostSource,
    CreditTicket,
    DecideRequest,
    Decision,
    Denial,
    DenialReason,
    Durability,
    ExplainStep,
    Explanation,
    KeyHandle,
    KeyState,
    Mode,
    Outcome,
    Reason,
    Recorded,
    RecordRequest,
    SealedHandle,
    SealedTicket,
    Unsent,
    Usage,
)
from keyturn.outcomes import outcome_of
from keyturn.retries import Retries
from keyturn.secret import Secret

__version__ = _channel.VERSION

__all__ = [
    "AlreadyExists",
    "AsyncCall",
    "AsyncClient",
    "Call",
    "Client",
    "Constraint",
    "CostSource",
    "CreditTicket",
    "DeadlineExceeded",
    "DecideRequest",
    "Decision",
    "Denial",
    "DenialReason",
    "Denied",
    "Durability",
    "ExplainStep",
    "Explanation",
    "FailedPrecondition",
    "FieldViolation",
    "InternalError",
    "InvalidArgument",
    "KeyHandle",
    "KeyState",
    "KeyturnError",
    "Mode",
    "NotFound",
    "Outcome",
    "PermissionDenied",
    "QueueFull",
    "Reason",
    "RecordRequest",
    "Recorded",
    "Resource",
    "ResourceExhausted",
    "Retries",
    "SealedHandle",
    "SealedTicket",
    "Secret",
    "Unauthenticated",
    "Unavailable",
    "Unsent",
    "Usage",
    "__version__",
    "outcome_of",
]
