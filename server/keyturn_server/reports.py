"""Who paid for how much, and who has brought a key: the values that pass between rpc and store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from enum import Enum
from typing import Final

OTHER: Final = "(other)"
"""The group of what is in none of the largest groups."""


class Grouping(Enum):
    """What a usage split is by, besides the day."""

    PROVIDER = "provider"
    SERVICE_TYPE = "service_type"


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageTotals:
    """Recorded requests, their tokens and their cost in micro-USD, where these are known."""

    requests: int
    total_tokens: int
    cost_micros: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRow:
    """The usage of one day (UTC) in one group."""

    day: date
    group: str
    own_key: UsageTotals
    credits: UsageTotals


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageSplit:
    """Who paid for how much."""

    rows: Sequence[UsageRow]
    """By day, then by group."""
    own_key: UsageTotals
    credits: UsageTotals

    @property
    def own_key_percent(self) -> float:
        """Own-key requests among all requests."""
        return percent(self.own_key.requests, self.own_key.requests + self.credits.requests)


@dataclass(frozen=True, slots=True, kw_only=True)
class UserWithoutKeys:
    """An eligible user without a key that can be used."""

    user_id: str
    email: str
    """Empty where nobody said."""
    tier: str
    has_active_key: bool
    """True where there are active keys, of which none can be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsersWithoutKeys:
    """A page of them, by id, and how many there are on all pages."""

    users: Sequence[UserWithoutKeys]
    has_more: bool
    total: int
    without_active_key: int
    """How many of them have no active key at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierAdoption:
    """How many users of one tier have an active key."""

    tier: str
    is_eligible: bool
    users: int
    users_with_keys: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Adoption:
    """How many of the eligible users have an active key."""

    tiers: Sequence[TierAdoption]
    """The highest rank first, unknown tiers last."""

    @property
    def eligible_users(self) -> int:
        """Users whose tier may bring keys."""
        return sum(tier.users for tier in self.tiers if tier.is_eligible)

    @property
    def users_with_keys(self) -> int:
        """Those of them with an active key."""
        return sum(tier.users_with_keys for tier in self.tiers if tier.is_eligible)

    @property
    def percent(self) -> float:
        """Those with a key among the eligible."""
        return percent(self.users_with_keys, self.eligible_users)


def percent(part: int, whole: int) -> float:
    """0 to 100; 0 of nothing."""
    return 100 * part / whole if whole else 0.0
