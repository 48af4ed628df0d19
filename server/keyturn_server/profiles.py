"""Users: as an operator sees one, and what a decision needs to know: the tier, and the keys as ciphertext."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any
from uuid import UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """A user, without keys and credits."""

    id: str
    email: str
    """Empty where nobody said."""
    tier: str
    is_known_tier: bool
    """False for a name that `subscription_tiers` does not have."""
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredKey:
    """A user's key for a provider, as it rests: sealed."""

    id: UUID
    provider: str
    label: str
    priority: int
    ciphertext: str = field(repr=False)
    hint: str
    revision: int
    """Counts the secrets that this row has held."""
    is_active: bool
    is_valid: bool
    is_verified: bool
    cooldown_until: datetime | None
    last_error: str = field(default="", repr=False)
    """What was last said against it, as it was stored; kept only while it is invalid or cools down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A user as decisions see one. Holds no decrypted secret and no balance."""

    user_id: str
    tier: str
    keys: tuple[StoredKey, ...]
    """Best priority first, the oldest first among equals."""
    planned: dict[tuple[str, str], Any] = field(init=False, default_factory=dict, repr=False, compare=False)
    """What `Decider.plan` made of this very profile: it lives as long as that does."""

    def keys_for(self, provider: str) -> tuple[StoredKey, ...]:
        """The keys for one provider, in the order to try them."""
        return tuple(key for key in self.keys if key.provider == provider)

    def has_key(self, key_id: UUID, revision: int) -> bool:
        """Whether the key is there, with the secret of that revision."""
        return any((key.id, key.revision) == (key_id, revision) for key in self.keys)

    def with_key(self, key_id: UUID, revision: int, **changes: object) -> Profile:
        """The profile with one key changed, if it still holds the secret of that revision."""
        return replace(
            self,
            keys=tuple(
                replace(key, **changes) if (key.id, key.revision) == (key_id, revision) else key  # type: ignore[arg-type]
                for key in self.keys
            ),
        )
