"""The words of the policy. Mode table and meanings: DESIGN, "The policy"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from uuid import UUID


class Word(Enum):
    """A word of a closed vocabulary. It hashes as what it is, one object: `Enum` would hash its name, in
    Python, at each look-up."""

    __hash__ = object.__hash__


class Mode(Word):
    """Which of the four named configurations of the flags is in force."""

    INTERNAL_ONLY = "INTERNAL_ONLY"
    BYOK_ONLY = "BYOK_ONLY"
    CREDIT_FIRST = "CREDIT_FIRST"
    BYOK_FIRST = "BYOK_FIRST"


class Path(Word):
    """A way to pay."""

    OWN_KEY = "OWN_KEY"
    CREDITS = "CREDITS"


class Constraint(Word):
    """How a caller tightens the policy for one request; it never relaxes it."""

    ANY = "ANY"
    OWN_KEY_ONLY = "OWN_KEY_ONLY"
    CREDITS_ONLY = "CREDITS_ONLY"


class Reason(Word):
    """Why a route was chosen."""

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


class DenialReason(Word):
    """Why nobody's credential may pay."""

    NO_KEY_AND_NO_CREDITS = "NO_KEY_AND_NO_CREDITS"
    BYOK_REQUIRED = "BYOK_REQUIRED"
    TIER_NOT_ELIGIBLE = "TIER_NOT_ELIGIBLE"
    KEY_UNUSABLE = "KEY_UNUSABLE"
    INSUFFICIENT_CREDITS = "INSUFFICIENT_CREDITS"
    HOLDS_IN_FLIGHT = "HOLDS_IN_FLIGHT"
    RATE_LIMITED = "RATE_LIMITED"
    PROVIDER_DISABLED = "PROVIDER_DISABLED"
    ENCRYPTION_NOT_CONFIGURED = "ENCRYPTION_NOT_CONFIGURED"


class Out(Word):
    """Why a path is not among those to try."""

    PROVIDER_DISABLED = "the provider is switched off"
    BYOK_DISABLED = "own keys are switched off (byok_enabled is false)"
    TIER = "the user's tier may not bring keys"
    CONSTRAINT = "the caller ruled it out for this request"
    BYOK_ONLY = "internal credits are never used (byok_only_mode is true)"
    ENCRYPTION = "this sidecar has no ENCRYPTION_KEY"
    NO_KEY = "the user has no key for the provider"
    KEYS_UNUSABLE = "none of the user's keys for the provider is usable"


class Credits(Word):
    """What came of asking the balance for a hold."""

    HELD = "HELD"
    """The balance covered it; the hold is placed."""
    INSUFFICIENT = "INSUFFICIENT"
    """The balance is below the hold."""
    IN_FLIGHT = "IN_FLIGHT"
    """The balance would do, but open holds take it up."""
    RATE_LIMITED = "RATE_LIMITED"
    """The tier's rate limit on credits is reached."""


FLAG_KEYS = ("byok_enabled", "byok_uses_internal_credits", "byok_only_mode")
"""The keys of the three feature flags, which are their names in `Flags` too."""

_FLAGS_OF: dict[Mode, Mapping[str, bool]] = {
    Mode.INTERNAL_ONLY: {"byok_enabled": False},
    Mode.BYOK_ONLY: {"byok_enabled": True, "byok_only_mode": True},
    Mode.CREDIT_FIRST: {"byok_enabled": True, "byok_only_mode": False, "byok_uses_internal_credits": True},
    Mode.BYOK_FIRST: {"byok_enabled": True, "byok_only_mode": False, "byok_uses_internal_credits": False},
}


def flags_of(mode: Mode) -> Mapping[str, bool]:
    """What the flags must be to make the mode, by key. Those that do not matter to it are not named."""
    return _FLAGS_OF[mode]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """The three feature flags. The defaults are those of a missing row."""

    byok_enabled: bool = True
    byok_uses_internal_credits: bool = False
    byok_only_mode: bool = False
    min_tier: str = "premium"

    @property
    def values(self) -> dict[str, bool]:
        """Whether each is on, by key."""
        return {
            "byok_enabled": self.byok_enabled,
            "byok_uses_internal_credits": self.byok_uses_internal_credits,
            "byok_only_mode": self.byok_only_mode,
        }

    def with_values(self, values: Mapping[str, bool]) -> Flags:
        """These flags, but for the values of those that are named by key."""
        new = {**self.values, **values}
        return Flags(
            byok_enabled=new["byok_enabled"],
            byok_uses_internal_credits=new["byok_uses_internal_credits"],
            byok_only_mode=new["byok_only_mode"],
            min_tier=self.min_tier,
        )

    @property
    def mode(self) -> Mode:
        """The mode these flags make."""
        if not self.byok_enabled:
            return Mode.INTERNAL_ONLY
        if self.byok_only_mode:
            return Mode.BYOK_ONLY
        return Mode.CREDIT_FIRST if self.byok_uses_internal_credits else Mode.BYOK_FIRST


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFacts:
    """What the policy needs to know of one stored key of the user for the provider."""

    id: UUID
    is_active: bool = True
    is_valid: bool = True
    cooldown_until: datetime | None = None
    is_readable: bool = True
    """False once its ciphertext did not open."""
    was_refused: bool = False
    """True when the caller says that the provider refused it for this very request."""

    def is_usable(self, now: datetime) -> bool:
        """Active, not invalid, not refused just now, readable and not cooling down."""
        return (
            self.is_active
            and self.is_valid
            and self.is_readable
            and not self.was_refused
            and (self.cooldown_until is None or self.cooldown_until <= now)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """All that a decision depends on besides the balance."""

    flags: Flags
    tier: str
    tier_ranks: Mapping[str, int]
    keys: tuple[KeyFacts, ...]
    """The user's keys for the provider, best priority first."""
    constraint: Constraint = Constraint.ANY
    provider_enabled: bool = True
    encryption_configured: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The paths to try in order, and why the others are out."""

    mode: Mode
    paths: tuple[Path, ...]
    out: Mapping[Path, Out]
    key_id: UUID | None
    """The key to use on the own-key path; set exactly when that path is among `paths`."""
    has_keys: bool
    """True when the user has an active key for the provider, usable or not."""
    keys_usable_at: datetime | None
    """When the first cooling key is usable again; says something only where the keys are what is out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The end of a decision: a path, or a denial."""

    reason: Reason
    path: Path | None = None
    denial: DenialReason | None = None
