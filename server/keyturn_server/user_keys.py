"""The keys that users bring: saved, listed, changed, deleted and tested.

A key is checked by its provider before it is saved, and kept whatever comes of that: refused it is
invalid, unchecked it is used all the same. Rules: DESIGN, "Control plane".
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol
from uuid import UUID

from keyturn.secret import Secret
from keyturn_server.configuration import Configuration, Provider
from keyturn_server.decide import Configurations, open_key, opens, provider_of, state_of
from keyturn_server.errors import (
    ByokDisabled,
    EncryptionNotConfigured,
    InvalidFields,
    ProviderDisabled,
    TierNotEligible,
    TooManyKeys,
)
from keyturn_server.keys.envelope import Unreadable
from keyturn_server.keys.keyring import Keyring
from keyturn_server.keys.provider_checks import CANNOT_BE_CHECKED, Checked, CheckedProvider, KeyCheck
from keyturn_server.ledger import KeyState
from keyturn_server.profiles import StoredKey
from keyturn_server.routing.policy import is_eligible

MOST_FOR_PROVIDER: Final = 10
MOST_KEYS: Final = 100

_REPLACED = "The secret was replaced while it was tested: test the new one."


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKey:
    """A key to save. Limits checked."""

    user_id: str
    provider: str
    secret: Secret
    label: str = ""
    """The same of the same provider again replaces the secret."""
    priority: int | None = None
    """None: 0, or what the replaced key has."""

    @property
    def hint(self) -> str:
        """The last four characters of the secret; fewer where that would be more than a quarter."""
        secret = self.secret.reveal()
        return secret[len(secret) - min(4, len(secret) // 4) :]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyChange:
    """What to change of a key; None stays as it is."""

    is_active: bool | None = None
    priority: int | None = None
    label: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UserKey:
    """A stored key with what its owner may know of it."""

    stored: StoredKey
    last_error: str
    total_requests: int
    total_tokens: int
    last_used_at: datetime | None
    verified_at: datetime | None
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyOwner:
    """A user with all keys: by provider, in the order in which they are tried."""

    tier: str
    keys: tuple[UserKey, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyNow:
    """A key, and whether it can be used at this moment."""

    key: UserKey
    state: KeyState
    cooldown_until: datetime | None
    """Only while it cools down."""


class KeyRows(Protocol):
    """Where keys rest. Every method raises `UserNotFound` and `StoreUnavailable`."""

    async def load(self, user_id: str) -> KeyOwner: ...

    async def find(self, user_id: str, key_id: UUID) -> UserKey:
        """Raises `KeyNotFound`."""

    async def save(self, new: NewKey, keyring: Keyring, checked: Checked) -> tuple[UserKey, bool]:
        """The row, and whether it had another secret before. Raises `TooManyKeys`, `InvalidFields`."""

    async def change(self, user_id: str, key_id: UUID, change: KeyChange) -> UserKey:
        """Raises `KeyNotFound`, `LabelTaken`."""

    async def delete(self, user_id: str, key_id: UUID) -> UserKey:
        """The row as it was. Raises `KeyNotFound`."""

    async def keep_check(self, user_id: str, key_id: UUID, *, revision: int, checked: Checked) -> UserKey:
        """The row, with what came of a check of its secret number `revision`, if it still holds that
        one. Raises `KeyNotFound`."""


class Checks(Protocol):
    """Who asks providers."""

    async def check(self, provider: CheckedProvider, secret: Secret) -> Checked: ...


class UserKeys:
    """Keeps users' keys. Safe for any number of callers at once.

    `on_change` hears of every user whose keys have changed, before the caller gets its answer: so the next
    decision here knows. `on_bad_pattern` hears of a provider whose `key_pattern` is no regular expression.
    """

    def __init__(
        self,
        *,
        configurations: Configurations,
        rows: KeyRows,
        checks: Checks,
        keyring: Keyring | None,
        clock: Callable[[], datetime],
        on_change: Callable[[str], Awaitable[None]],
        on_bad_pattern: Callable[[str], None],
    ) -> None:
        self._configurations = configurations
        self._rows = rows
        self._checks = checks
        self._keyring = keyring
        self._clock = clock
        self._on_change = on_change
        self._on_bad_pattern = on_bad_pattern

    async def save(self, new: NewKey) -> tuple[KeyNow, bool]:
        """The key as it was saved, and whether it replaced a secret.

        Raises `UserNotFound`, `InvalidFields` (unknown provider, a secret that is not like a key of it),
        `ProviderDisabled`, `EncryptionNotConfigured`, `ByokDisabled`, `TierNotEligible`, `TooManyKeys` and
        `StoreUnavailable`; nothing is saved then.
        """
        owner = await self._rows.load(new.user_id)
        configuration = await self._configurations.get()
        provider = provider_of(configuration, new.provider)
        if not provider.is_enabled:
            raise ProviderDisabled(provider.id)
        if self._keyring is None:
            raise EncryptionNotConfigured
        _check_policy(configuration, owner.tier)
        self._check_form(provider, new.secret)
        check_room(new, [key.stored for key in owner.keys])
        checked = await self._checks.check(provider, new.secret)
        saved, replaced = await self._rows.save(new, self._keyring, checked)
        await self._on_change(new.user_id)
        return self._now(new.user_id, saved), replaced

    async def keys_of(self, user_id: str, provider_id: str | None = None) -> list[KeyNow]:
        """The keys, by provider, in the order in which they are tried.

        Raises `UserNotFound`, `InvalidFields` (unknown provider), `StoreUnavailable`.
        """
        owner = await self._rows.load(user_id)
        if provider_id is not None:
            provider_of(await self._configurations.get(), provider_id)
        return [
            self._now(user_id, key)
            for key in owner.keys
            if provider_id is None or key.stored.provider == provider_id
        ]

    async def change(self, user_id: str, key_id: UUID, change: KeyChange) -> KeyNow:
        """The key as it is now. Raises `UserNotFound`, `KeyNotFound`, `LabelTaken`, `StoreUnavailable`."""
        key = await self._rows.change(user_id, key_id, change)
        await self._on_change(user_id)
        return self._now(user_id, key)

    async def delete(self, user_id: str, key_id: UUID) -> KeyNow:
        """The key as it was last. Raises `UserNotFound`, `KeyNotFound`, `StoreUnavailable`."""
        key = await self._rows.delete(user_id, key_id)
        await self._on_change(user_id)
        return self._now(user_id, key)

    async def test(self, user_id: str, key_id: UUID) -> tuple[KeyNow, Checked]:
        """The key as it is now, and what its provider says of it.

        Raises `UserNotFound`, `KeyNotFound`, `ProviderDisabled`, `EncryptionNotConfigured` and
        `StoreUnavailable`.
        """
        key = await self._rows.find(user_id, key_id)
        configuration = await self._configurations.get()
        # The row's provider exists; only a configuration from before it was made does not have it.
        provider = configuration.providers.get(key.stored.provider)
        if provider is not None and not provider.is_enabled:
            raise ProviderDisabled(provider.id)
        if self._keyring is None:
            raise EncryptionNotConfigured
        try:
            secret = open_key(self._keyring, user_id, key.stored)
        except Unreadable as error:
            message = str(error)
            checked = Checked(
                result=KeyCheck.UNREADABLE, message=f"{message[0].upper()}{message[1:].rstrip('.')}."
            )
            return self._now(user_id, key), checked
        checked = CANNOT_BE_CHECKED if provider is None else await self._checks.check(provider, secret)
        revision = key.stored.revision
        if checked.result is KeyCheck.UNVERIFIED:
            key = await self._rows.find(user_id, key_id)
        else:
            key = await self._rows.keep_check(user_id, key_id, revision=revision, checked=checked)
            await self._on_change(user_id)
        if key.stored.revision != revision:
            checked = Checked(result=KeyCheck.UNVERIFIED, message=_REPLACED)
        return self._now(user_id, key), checked

    async def providers(self) -> list[Provider]:
        """All providers, in the order in which people are shown them. Raises `StoreUnavailable`."""
        return list((await self._configurations.get()).providers.values())

    def _now(self, user_id: str, key: UserKey) -> KeyNow:
        now = self._clock()
        cooldown_until = key.stored.cooldown_until
        return KeyNow(
            key=key,
            # Without a master key none opens: then no key can be used, and a list must not say otherwise.
            state=state_of(key.stored, now, is_readable=opens(self._keyring, user_id, key.stored)),
            cooldown_until=cooldown_until if cooldown_until is not None and cooldown_until > now else None,
        )

    def _check_form(self, provider: Provider, secret: Secret) -> None:
        try:
            pattern = re.compile(provider.key_pattern)
        except (re.error, OverflowError, RecursionError):
            # An operator's slip must not stop users: the provider is asked anyway.
            self._on_bad_pattern(provider.id)
            return
        if pattern.fullmatch(secret.reveal()) is None:
            raise InvalidFields(
                ("secret", f"Not like a key of {provider.name}: those match {provider.key_pattern}")
            )


def check_room(new: NewKey, keys: list[StoredKey]) -> None:
    """Raises `TooManyKeys` when `keys`, all that the user has, leave no room and none is replaced."""
    of_provider = [key for key in keys if key.provider == new.provider]
    if any(key.label == new.label for key in of_provider):
        return
    if len(of_provider) >= MOST_FOR_PROVIDER:
        raise TooManyKeys(MOST_FOR_PROVIDER, new.provider)
    if len(keys) >= MOST_KEYS:
        raise TooManyKeys(MOST_KEYS)


def _check_policy(configuration: Configuration, tier: str) -> None:
    flags = configuration.flags
    if not flags.byok_enabled:
        raise ByokDisabled
    if not is_eligible(flags, tier, configuration.tier_ranks):
        raise TierNotEligible(tier, flags.min_tier)
