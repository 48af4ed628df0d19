"""Holds, settlements and the use of own keys: the values that pass between use cases and store."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from uuid import UUID

from keyturn_server.prices import Usage
from keyturn_server.values import value


class Outcome(Enum):
    """How a request to a provider ended. Meanings: protos/keyturn/v1/routing_service.proto."""

    SUCCESS = "SUCCESS"
    CLIENT_CANCELLED = "CLIENT_CANCELLED"
    NEVER_SENT = "NEVER_SENT"
    AUTH_REJECTED = "AUTH_REJECTED"
    RATE_LIMITED = "RATE_LIMITED"
    PROVIDER_BILLING = "PROVIDER_BILLING"
    PROVIDER_ERROR = "PROVIDER_ERROR"
    TIMEOUT = "TIMEOUT"
    REFUSED = "REFUSED"
    UNKNOWN = "UNKNOWN"


class CostSource(Enum):
    """Where a cost comes from."""

    REPORTED = "REPORTED"
    PRICED = "PRICED"
    ESTIMATED = "ESTIMATED"
    NONE = "NONE"


class KeyState(Enum):
    """Whether a stored key can be used, and if not, why."""

    USABLE = "USABLE"
    UNVERIFIED = "UNVERIFIED"
    INACTIVE = "INACTIVE"
    INVALID = "INVALID"
    COOLING_DOWN = "COOLING_DOWN"
    UNREADABLE = "UNREADABLE"
    DELETED = "DELETED"


class HoldStatus(Enum):
    """What came of asking for a hold."""

    PLACED = "placed"
    REPLAYED = "replayed"
    INSUFFICIENT = "insufficient"
    IN_FLIGHT = "in_flight"


@value
class HoldRequest:
    """Credits to set aside for one request. Amounts in micro-USD."""

    id: UUID
    """That of the decision."""
    user_id: str
    request_id: str | None
    provider: str
    model: str
    service_type: str
    mode: str
    reason: str
    """Why credits pay, for whoever asks later."""
    amount_micros: int
    ttl: timedelta


@value
class HoldAnswer:
    """The hold, new or as it was first placed; the amounts in micro-USD."""

    status: HoldStatus
    id: UUID
    amount_micros: int
    available_micros: int
    """Balance less all holds, this one included."""
    created_at: datetime
    expires_at: datetime
    provider: str
    model: str
    service_type: str
    state: str
    """open, settled or expired."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """A user's credits, in micro-USD. What is held may include holds about to be released."""

    balance_micros: int
    held_micros: int

    @property
    def available_micros(self) -> int:
        """What a new hold may take."""
        return self.balance_micros - self.held_micros


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Credits to add to a balance. The amount in micro-USD."""

    id: UUID
    """Of this very call: seen again, it is our own retry and no replay."""
    user_id: str
    amount_micros: int
    request_id: str | None
    """Grants once for each of a user's; None: every time."""
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """What a grant came to; of a replay, the first one. The balance after it in micro-USD."""

    transaction_id: UUID
    balance_micros: int
    replayed: bool


class TransactionType(Enum):
    """What a transaction does to a balance."""

    GRANT = "grant"
    DEDUCTION = "deduction"


@dataclass(frozen=True, slots=True, kw_only=True)
class Transaction:
    """One change of a balance, as it stands in the books. Amounts in micro-USD."""

    id: UUID
    """That of the decision, for a deduction."""
    type: TransactionType
    amount_micros: int
    """What it adds: below zero for a deduction."""
    balance_after_micros: int
    request_id: str | None
    description: str
    service_type: str
    provider: str
    model: str
    outcome: str | None
    cost_source: str | None
    mode: str | None
    reason: str | None
    """These four are known of deductions alone."""
    total_tokens: int | None
    is_late: bool
    created_at: datetime


@value
class Report:
    """What a caller says of one request, besides which one it was."""

    outcome: Outcome
    usage: Usage | None
    """None: not known, which is not zero."""
    cost_micros: int | None
    model: str
    endpoint: str
    response_time: timedelta | None
    http_status: int | None
    error_message: str
    retry_after: timedelta | None


@value
class Settlement:
    """One ticket to settle. Amounts in micro-USD."""

    hold_id: UUID
    user_id: str
    charge_micros: int
    cost_source: CostSource
    report: Report
    fingerprint: bytes
    """Of the report: the same again is a replay, another is a conflict."""
    submission_id: UUID
    """Of this very call: seen again, it is our own retry and no replay."""
    is_too_late: bool
    """Whether only a replay is answered."""
    waited: timedelta = timedelta(0)
    """How long ago it was acknowledged: that is when it counts from."""


@value
class Settled:
    """What a settlement came to. Amounts in micro-USD."""

    charged_micros: int
    released_micros: int
    balance_micros: int
    cost_source: CostSource
    replayed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Spooled:
    """A record that is durable on the sidecar's own disk, on its way to the books. Amounts in micro-USD."""

    charge_micros: int
    """What will be charged; 0 for an own key."""
    cost_source: CostSource
    replayed: bool


@value
class KeyUse:
    """One use of an own key to record."""

    id: UUID
    """That of the decision."""
    user_id: str
    key_id: UUID
    key_revision: int
    provider: str
    model: str
    service_type: str
    mode: str
    reason: str
    cost_micros: int | None
    cost_source: CostSource
    cooldown: timedelta | None
    """How long the key shall rest; None: not at all."""
    is_late: bool
    report: Report
    fingerprint: bytes
    submission_id: UUID
    is_too_late: bool
    waited: timedelta = timedelta(0)


@value
class KeyUsed:
    """A use of an own key, as recorded."""

    cost_source: CostSource
    key_state: KeyState
    replayed: bool
