"""What operators set for everyone: flags, tiers, providers, prices. Read whole, cached as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from keyturn_server.prices import PriceOverride
from keyturn_server.routing.model import Flags


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """A subscription tier. Limits are on the credits path; None is no limit."""

    name: str
    rank: int
    requests_per_minute: int | None
    requests_per_day: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """A provider of models, how it wants its key, and how a key is checked."""

    id: str
    name: str
    is_enabled: bool
    base_url: str
    auth_header: str
    auth_prefix: str
    key_pattern: str
    """A regular expression that its keys match."""
    check_path: str | None
    """What to GET with a key to check it, relative to `base_url`; None: keys cannot be checked."""
    check_headers: Mapping[str, str]
    check_refusal: str | None
    """What a 4xx answer says where it refuses the key with another status than 401 or 403."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlagChange:
    """Who last changed a flag, when, and why."""

    key: str
    changed_by: str
    reason: str
    changed_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """One consistent reading of everything that is set for everyone."""

    flags: Flags
    flags_missing: frozenset[str]
    """Keys of flag rows that do not exist, so that their defaults are in force."""
    flag_changes: Mapping[str, FlagChange]
    """The last change of each flag; nothing for one that is as it was shipped."""
    tiers: Mapping[str, Tier]
    tier_ranks: Mapping[str, int]
    providers: Mapping[str, Provider]
    """By id, in the order in which people are shown them."""
    prices: Mapping[tuple[str, str], PriceOverride]

    def tier_of(self, name: str) -> Tier | None:
        """The tier by that name; for an unknown name the lowest one, so that its limits apply."""
        found = self.tiers.get(name)
        return found if found is not None else min(self.tiers.values(), key=lambda t: t.rank, default=None)
