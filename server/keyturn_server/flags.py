"""The three flags: changing them, and whom a change would lock out. Rules: DESIGN, "The policy"."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from keyturn_server.access import Caller
from keyturn_server.errors import LockoutNotAcknowledged
from keyturn_server.routing.model import Flags, Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One of the three flags, as its row says or as the default of a missing row."""

    key: str
    is_enabled: bool
    name: str
    description: str
    min_tier: str
    """Of `byok_enabled`: the lowest tier that may bring keys; empty elsewhere."""
    updated_at: datetime | None
    """None: there is no such row, so that the default is in force."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PastChange:
    """One change of one flag, by whatever means it was made."""

    id: int
    """Grows with time."""
    key: str
    old_enabled: bool | None
    """None: the row was made."""
    new_enabled: bool | None
    """None: the row was deleted."""
    old_min_tier: str
    new_min_tier: str
    changed_by: str
    reason: str
    changed_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class FlagsNow:
    """The flags after a change."""

    flags: Sequence[Flag]
    mode: Mode
    locked_out_users: int
    """Whom BYOK_ONLY locks out; 0 in another mode."""


class LockedFlags(Protocol):
    """The flags within a transaction, which nobody else changes until its end."""

    async def read(self) -> list[Flag]: ...
    async def write(self, changes: Mapping[str, bool]) -> None: ...
    async def count_locked_out(self, min_tier: str) -> int: ...


class FlagStore(Protocol):
    """Where the flags are kept."""

    async def read(self) -> list[Flag]: ...
    def locked(self, *, actor: str, reason: str) -> AbstractAsyncContextManager[LockedFlags]: ...
    async def announce(self) -> None: ...


def in_force(flags: Sequence[Flag]) -> Flags:
    """The three flags as the policy takes them."""
    min_tier = next(flag.min_tier for flag in flags if flag.min_tier)
    return Flags(min_tier=min_tier).with_values({flag.key: flag.is_enabled for flag in flags})


class FlagSetter:
    """Changes the flags. `on_change` hears of it before the caller does."""

    def __init__(self, store: FlagStore, *, on_change: Callable[[], Awaitable[None]]) -> None:
        self._store = store
        self._on_change = on_change

    async def change(
        self, changes: Mapping[str, bool], *, caller: Caller, reason: str, acknowledge_lockout: bool
    ) -> FlagsNow:
        """Sets the flags that are named, all or none; what is so already stays, without history.

        Raises `LockoutNotAcknowledged`, with nothing changed, when that makes the mode BYOK_ONLY, somebody
        would be locked out and it is not acknowledged; `RowLocked` and `StoreUnavailable`.
        """
        async with self._store.locked(actor=caller.name, reason=reason) as locked:
            flags = await locked.read()
            before = in_force(flags)
            after = before.with_values(changes)
            locked_out_users = 0
            if after.mode is Mode.BYOK_ONLY:
                locked_out_users = await locked.count_locked_out(after.min_tier)
                if locked_out_users and before.mode is not Mode.BYOK_ONLY and not acknowledge_lockout:
                    raise LockoutNotAcknowledged(locked_out_users)
            is_set = {flag.key: flag.is_enabled for flag in flags if flag.updated_at is not None}
            due = {key: value for key, value in changes.items() if is_set.get(key) is not value}
            if due:
                await locked.write(due)
                flags = await locked.read()
        if due:
            await self._on_change()
        return FlagsNow(flags=flags, mode=after.mode, locked_out_users=locked_out_users)

    async def refresh(self) -> list[Flag]:
        """Has every sidecar, this one first, read the configuration again; the flags as just read."""
        await self._on_change()
        await self._store.announce()
        return await self._store.read()
