"""What the client takes and gives: plain values, frozen, with no protobuf in them.

Money is in micros (1 USD = 1,000,000), spans are `timedelta`, times are aware `datetime` in UTC.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import NotRequired, Required, Self, TypedDict
from uuid import uuid4

from keyturn.secret import Secret

# ------------------------------------------------------------------------------------- words


class _Word(StrEnum):
    """An enum of the contract; each value is its name there, without the type's prefix.

    A number that only a newer server knows becomes `UNRECOGNIZED_<number>`: a member that equals
    itself, prints, copies and pickles like the others, and that no `match` on today's names meets.
    """

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, str) or not value.startswith("UNRECOGNIZED_"):
            return None
        member = str.__new__(cls, value)
        member._name_ = value
        member._value_ = value
        return member


class Mode(_Word):
    """Which of the four configurations of the feature flags is in force."""

    UNSPECIFIED = "UNSPECIFIED"
    INTERNAL_ONLY = "INTERNAL_ONLY"
    BYOK_ONLY = "BYOK_ONLY"
    CREDIT_FIRST = "CREDIT_FIRST"
    BYOK_FIRST = "BYOK_FIRST"


class Reason(_Word):
    """Why the route of a decision was chosen."""

    UNSPECIFIED = "UNSPECIFIED"
    BYOK_FIRST_OWN_KEY = "BYOK_FIRST_OWN_KEY"
    BYOK_FIRST_NO_KEY = "BYOK_FIRST_NO_KEY"
    BYOK_FIRST_KEY_FAILED = "BYOK_FIRST_KEY_FAILED"
    CREDIT_FIRST_CREDITS = "CREDIT_FIRST_CREDITS"
    CREDIT_FIRST_EXHAUSTED = "CREDIT_FIRST_EXHAUSTED"
    BYOK_ONLY_OWN_KEY = "BYOK_ONLY_OWN_KEY"
    BYOK_DISABLED = "BYOK_DISABLED"
    TIER_NOT_ELIGIBLE = "TIER_NOT_ELIGIBLE"
    CALLER_CONSTRAINT = "CALLER_CONSTRAINT"
    DENIED = "DENIED"


class DenialReason(_Word):
    """Why nobody's credential may pay."""

    UNSPECIFIED = "UNSPECIFIED"
    NO_KEY_AND_NO_CREDITS = "NO_KEY_AND_NO_CREDITS"
    BYOK_REQUIRED = "BYOK_REQUIRED"
    TIER_NOT_ELIGIBLE = "TIER_NOT_ELIGIBLE"
    KEY_UNUSABLE = "KEY_UNUSABLE"
    INSUFFICIENT_CREDITS = "INSUFFICIENT_CREDITS"
    HOLDS_IN_FLIGHT = "HOLDS_IN_FLIGHT"
    RATE_LIMITED = "RATE_LIMITED"
    PROVIDER_DISABLED = "PROVIDER_DISABLED"
    ENCRYPTION_NOT_CONFIGURED = "ENCRYPTION_NOT_CONFIGURED"


class Constraint(_Word):
    """How a caller tightens the policy for one request; it can never relax it."""

    UNSPECIFIED = "UNSPECIFIED"
    ANY = "ANY"
    OWN_KEY_ONLY = "OWN_KEY_ONLY"
    CREDITS_ONLY = "CREDITS_ONLY"


class Outcome(_Word):
    """How the request to the provider ended. The contract says what each one charges."""

    UNSPECIFIED = "UNSPECIFIED"
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


class CostSource(_Word):
    """Where a charge comes from."""

    UNSPECIFIED = "UNSPECIFIED"
    REPORTED = "REPORTED"
    PRICED = "PRICED"
    ESTIMATED = "ESTIMATED"
    NONE = "NONE"


class Durability(_Word):
    """Where an acknowledged record is durable."""

    UNSPECIFIED = "UNSPECIFIED"
    DATABASE = "DATABASE"
    SPOOLED = "SPOOLED"


class KeyState(_Word):
    """Whether a stored key can be used, and if not, why."""

    UNSPECIFIED = "UNSPECIFIED"
    USABLE = "USABLE"
    UNVERIFIED = "UNVERIFIED"
    INACTIVE = "INACTIVE"
    INVALID = "INVALID"
    COOLING_DOWN = "COOLING_DOWN"
    UNREADABLE = "UNREADABLE"
    DELETED = "DELETED"


# ----------------------------------------------------------------------------- sealed tokens


class _Sealed(str):
    """An opaque token of the server. A `str` to send and to store, but its repr is cut short."""

    __slots__ = ()

    def __repr__(self) -> str:
        shown = self[:8] if len(self) >= 32 else ""
        return f"{type(self).__name__}('{shown}…')"


class SealedHandle(_Sealed):
    """The text of a key handle. `SealedHandle(text)` makes one again from a stored string."""

    __slots__ = ()


class SealedTicket(_Sealed):
    """The text of a credit ticket. `SealedTicket(text)` makes one again from a stored string."""

    __slots__ = ()


# ----------------------------------------------------------------------------------- answers


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyHandle:
    """The user's own key for one request."""

    handle: SealedHandle
    key_id: str
    provider: str
    hint: str
    """The last four characters of the secret, to show to its owner."""
    secret: Secret | None
    """None when it was asked for with `redeem=True`: fetch it with `Client.redeem`."""
    auth_header: str
    auth_prefix: str
    base_url: str
    """Where the provider's API is, e.g. `https://api.openai.com/v1`."""
    expires_at: datetime | None
    """Until when it may be redeemed; a record is taken 7 days longer. None in an explanation."""

    def headers(self) -> dict[str, str]:
        """The one header that signs a request with this key. It holds the secret: never log it.

        Raises `ValueError` when the secret was not delivered with the decision.
        """
        if self.secret is None:
            raise ValueError("the secret is not here: fetch it once with redeem()")
        return {self.auth_header: self.auth_prefix + self.secret.reveal()}


def sealed_handle(key: KeyHandle | str) -> SealedHandle:
    """The handle of a key, or one that was kept as text: from here on it prints cut short."""
    return key.handle if isinstance(key, KeyHandle) else SealedHandle(key)


@dataclass(frozen=True, slots=True, kw_only=True)
class CreditTicket:
    """A hold on the user's prepaid balance for one request."""

    ticket: SealedTicket
    hold_micros: int
    available_micros: int
    """What the user can still spend after this hold."""
    expires_at: datetime | None
    """When the hold is released by itself. None in an explanation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Denial:
    """Why nobody's credential may pay."""

    reason: DenialReason
    retryable: bool
    retry_after: timedelta | None
    suggestion: str
    """What the user or an operator can do about it: one sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Whose credential pays: one of `key`, `ticket` and `denial` is set.

    None of them is set when a newer server answers with a route that this client does not know;
    then `allowed` is False too. Nor is one when the sidecar is down and the client's `when_down` let
    the request pass all the same: then `unmetered` is True.
    """

    decision_id: str
    mode: Mode
    reason: Reason
    message: str
    """One plain sentence for logs and support."""
    degraded: bool
    """Made from cached data, because the database could not be asked."""
    replayed: bool
    """`request_id` was seen before, and this is its first ticket again."""
    key: KeyHandle | None = None
    ticket: CreditTicket | None = None
    denial: Denial | None = None
    unmetered: bool = False
    """Nobody was asked: the platform pays, and nothing is recorded."""

    @property
    def allowed(self) -> bool:
        """Whether someone's credential pays."""
        return self.key is not None or self.ticket is not None or self.unmetered


def unmetered_decision() -> Decision:
    """The decision of `when_down`: the platform pays, and nothing is recorded."""
    return Decision(
        decision_id="",
        mode=Mode.UNSPECIFIED,
        reason=Reason.UNSPECIFIED,
        message="The sidecar is down; the request goes ahead unmetered, on the platform's own credential.",
        degraded=False,
        replayed=False,
        unmetered=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A record as it was taken. Amounts in micros."""

    record_id: str
    charged_micros: int
    """What the user's balance was charged; always 0 for an own key."""
    released_micros: int
    """What was held and not charged."""
    balance_micros: int | None
    """The balance after the charge, which may be below zero; None for an own key."""
    cost_source: CostSource
    replayed: bool
    """It was taken before, and this is its first answer again."""
    durability: Durability
    key_state: KeyState
    """An own key's state after this record; UNSPECIFIED for a ticket."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainStep:
    """One step on the way to a decision."""

    check: str
    result: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What `decide` would answer now (with no id, handle, ticket or secret), and the way to it."""

    decision: Decision
    steps: tuple[ExplainStep, ...]


# ---------------------------------------------------------------------------------- requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens used. `input_tokens` counts cached ones in; `total_tokens` is the provider's count."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    total_tokens: int | None = None


class RequestFields(TypedDict):
    """The keyword arguments of `request` and `explain`: those of `DecideRequest`, less `redeem`."""

    user_id: Required[str]
    provider: Required[str]
    model: NotRequired[str]
    service_type: NotRequired[str]
    request_id: NotRequired[str | None]
    cost_micros: NotRequired[int | None]
    input_tokens: NotRequired[int | None]
    max_output_tokens: NotRequired[int | None]
    constraint: NotRequired[Constraint]
    failed_keys: NotRequired[Sequence[KeyHandle | str]]
    hold_ttl: NotRequired[timedelta | None]


class DecideFields(RequestFields):
    """The keyword arguments of `decide`: those of `DecideRequest`."""

    redeem: NotRequired[bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecideRequest:
    """One request that a gateway is about to make for a user.

    Raises `ValueError` when both a cost and token counts are given, `TypeError` when `failed_keys`
    is a single string.
    """

    user_id: str
    provider: str
    """An id in `api_providers`, e.g. `openai`."""
    model: str = ""
    """The provider's name of the model; prices the estimate."""
    service_type: str = ""
    """A label for reports, e.g. `copilot`."""
    request_id: str | None = None
    """The same id by the same user never places a second hold. None: a new one is made here."""
    cost_micros: int | None = None
    """The estimate as a cost. With neither a cost nor tokens: the server's default hold."""
    input_tokens: int | None = None
    max_output_tokens: int | None = None
    """The estimate as tokens, priced by `model`."""
    constraint: Constraint = Constraint.ANY
    failed_keys: Sequence[KeyHandle | str] = ()
    """Keys of earlier decisions of this request that the provider refused: they are left out."""
    redeem: bool = False
    """True: the answer has no secret; fetch it once with `redeem`."""
    hold_ttl: timedelta | None = None
    """How long the hold or the handle lives, 1 s to 24 h. None: the server's 10 minutes."""

    def __post_init__(self) -> None:
        tokens_given = self.input_tokens is not None or self.max_output_tokens is not None
        if tokens_given and self.cost_micros is not None:
            raise ValueError("estimate with cost_micros or with tokens, not with both")
        if isinstance(self.failed_keys, str):
            raise TypeError("failed_keys is a sequence of keys or handles, not one string")
        if not self.request_id:
            object.__setattr__(self, "request_id", uuid4().hex)
        object.__setattr__(self, "failed_keys", tuple(map(sealed_handle, self.failed_keys)))


Settles = Decision | KeyHandle | CreditTicket | SealedHandle | SealedTicket
"""What a record may settle: a decision, what it gave, or that one's sealed text."""


class RecordFields(TypedDict, total=False):
    """The keyword arguments of `record`: those of `RecordRequest`."""

    usage: Usage | None
    cost_micros: int | None
    model: str
    endpoint: str
    response_time: timedelta | None
    http_status: int | None
    error_message: str
    retry_after: timedelta | None


@dataclass(frozen=True, slots=True)
class RecordRequest:
    """What became of one request.

    Raises `ValueError` when `settles` is a denied or unmetered decision, `TypeError` when it is a bare
    string: wrap a stored one in `SealedHandle` or `SealedTicket`.
    """

    settles: Settles
    outcome: Outcome
    _: KW_ONLY
    usage: Usage | None = None
    """None is not zero: it means that the caller does not know."""
    cost_micros: int | None = None
    """What the request cost, when the caller knows; wins over `usage`."""
    model: str = ""
    """The model that answered, when it is not the one of the decision."""
    endpoint: str = ""
    """The provider's endpoint, e.g. `/v1/chat/completions`."""
    response_time: timedelta | None = None
    http_status: int | None = None
    error_message: str = ""
    """The provider's error text; the server keeps 500 characters and strikes out keys."""
    retry_after: timedelta | None = None
    """How long the provider asked to wait."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "settles", _sealed(self.settles))


@dataclass(frozen=True, slots=True)
class Unsent:
    """A record that did not get through, and why."""

    record: RecordRequest
    error: Exception
    """A `KeyturnError`; `QueueFull`; or `RuntimeError` when the client was closed before it was sent."""


def _sealed(settles: Settles) -> SealedHandle | SealedTicket:
    """The sealed text to settle. Raises as `RecordRequest` does."""
    match settles:
        case SealedHandle() | SealedTicket():
            return settles
        case KeyHandle(handle=handle) | Decision(key=KeyHandle(handle=handle)):
            return handle
        case CreditTicket(ticket=ticket) | Decision(ticket=CreditTicket(ticket=ticket)):
            return ticket
        case Decision(unmetered=unmetered):
            raise ValueError(f"{'an unmetered' if unmetered else 'a denied'} decision has nothing to record")
    raise TypeError(
        f"cannot settle a {type(settles).__name__}: give the decision, its key or ticket,"
        " or a SealedHandle or SealedTicket made from a stored string"
    )
