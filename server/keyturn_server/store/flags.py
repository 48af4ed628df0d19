"""The rows of the three flags, and their history."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from keyturn_server.flags import Flag, PastChange
from keyturn_server.routing.model import FLAG_KEYS, Flags
from keyturn_server.store.people import LEGACY, usable_keys_of

if TYPE_CHECKING:
    import asyncpg

    from keyturn_server.store.database import Database, PoolConnection

_READ = """
SELECT key, is_enabled, name, description, min_tier, updated_at FROM feature_flags WHERE key = ANY ($1)
"""
# An operator may wait for another one's change; for a transaction that somebody left open, not for long.
_WAIT = "SET LOCAL lock_timeout = '2s'"
# The order of locks: this one, which stands for rows that do not exist; then the rows, by key.
_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('keyturn.flags', 0))"
_LOCK_ROWS = f"{_READ} ORDER BY key FOR UPDATE"
# The trigger that keeps the history reads these.
_SIGN = "SELECT set_config('keyturn.actor', $1, true), set_config('keyturn.reason', $2, true)"
_WRITE = """
INSERT INTO feature_flags (key, is_enabled, name, description, is_premium, min_tier, sort_order)
VALUES ($1, $2, $3, $4, $5, $6, $7)
ON CONFLICT (key) DO UPDATE SET is_enabled = excluded.is_enabled
"""
# Eligible as the policy has it: of a tier that is known and not below the lowest one. Where that one is not
# known nobody may bring keys, and everybody is locked out. $2: the master keys that there are.
_COUNT_LOCKED_OUT = f"""
SELECT count(*)
  FROM users u
  LEFT JOIN subscription_tiers t ON t.name = u.subscription_tier
  LEFT JOIN subscription_tiers m ON m.name = $1
 WHERE m.name IS NULL
    OR t.rank >= m.rank AND NOT EXISTS ({usable_keys_of("u.id", master_key_ids="$2")})
"""  # noqa: S608 - of constants
_ANNOUNCE = "SELECT pg_notify('keyturn', 'configuration')"
_CHANGES = """
SELECT id, key, (old_value ->> 'is_enabled')::boolean AS old_enabled,
       (new_value ->> 'is_enabled')::boolean AS new_enabled,
       coalesce(old_value ->> 'min_tier', '') AS old_min_tier,
       coalesce(new_value ->> 'min_tier', '') AS new_min_tier, changed_by, reason, changed_at
  FROM feature_flag_changes
 WHERE key = ANY ($1) AND ($2::bigint IS NULL OR id < $2)
 ORDER BY id DESC LIMIT $3
"""

# What 0001_schema.sql makes: name, description, is_premium, min_tier, sort_order.
_ROWS = {
    "byok_enabled": (
        "Own keys",
        "Users at or above min_tier may use their own provider keys.",
        True,
        Flags().min_tier,
        10,
    ),
    "byok_uses_internal_credits": (
        "Credits first",
        "Credits pay first, own keys when they run out.",
        False,
        None,
        20,
    ),
    "byok_only_mode": ("Own keys only", "Internal credits are never used.", False, None, 30),
}


class FlagTable:
    """The table `feature_flags`. Every method raises `StoreUnavailable`."""

    def __init__(self, database: Database, *, master_key_ids: Sequence[str]) -> None:
        self._database = database
        self._master_key_ids = master_key_ids

    async def read(self) -> list[Flag]:
        """The three flags, those without a row by their defaults."""
        return _flags(await self._database.fetch(_READ, FLAG_KEYS))

    @asynccontextmanager
    async def locked(self, *, actor: str, reason: str) -> AsyncIterator[LockedFlagTable]:
        """The flags, locked until the end of the block, which commits what was written: as done by
        `actor` for this `reason`. An exception undoes it. Raises `RowLocked`."""
        async with self._database.connection() as connection, connection.transaction():
            await connection.execute(_WAIT)
            await connection.execute(_LOCK)
            await connection.fetch(_SIGN, actor, reason)
            yield LockedFlagTable(connection, self._master_key_ids)

    async def announce(self) -> None:
        """Tells every sidecar that listens to read the configuration again."""
        await self._database.fetch(_ANNOUNCE)

    async def changes(self, key: str | None, *, before: int | None, limit: int) -> list[PastChange]:
        """The latest changes, of one flag or of all three, the newest first; those before an id."""
        keys = FLAG_KEYS if key is None else (key,)
        return [PastChange(**row) for row in await self._database.fetch(_CHANGES, keys, before, limit)]


class LockedFlagTable:
    """The flags within a transaction that has them locked."""

    def __init__(self, connection: PoolConnection, master_key_ids: Sequence[str]) -> None:
        self._connection = connection
        self._master_key_ids = master_key_ids

    async def read(self) -> list[Flag]:
        """The three flags as they are now, and stay until the end but for `write`."""
        return _flags(await self._connection.fetch(_LOCK_ROWS, FLAG_KEYS))

    async def write(self, changes: Mapping[str, bool]) -> None:
        """Sets flags by key; a row that is missing is made."""
        for key, is_enabled in changes.items():
            await self._connection.execute(_WRITE, key, is_enabled, *_ROWS[key])

    async def count_locked_out(self, min_tier: str) -> int:
        """How many users whose tier may bring keys have none to use; all, if no tier may."""
        return await count_locked_out(self._connection, min_tier, self._master_key_ids)


async def count_locked_out(connection: PoolConnection, min_tier: str, master_key_ids: Sequence[str]) -> int:
    """How many users BYOK_ONLY would lock out although their tier may bring keys; all, if no tier may."""
    count: int = await connection.fetchval(_COUNT_LOCKED_OUT, min_tier, [LEGACY, *master_key_ids])
    return count


def _flags(rows: list[asyncpg.Record]) -> list[Flag]:
    found = {row["key"]: row for row in rows}
    return [_flag(key, found.get(key)) for key in FLAG_KEYS]


def _flag(key: str, row: asyncpg.Record | None) -> Flag:
    name, description, _, min_tier, _ = _ROWS[key]
    if row is None:
        return Flag(
            key=key,
            is_enabled=Flags().values[key],
            name=name,
            description=description,
            min_tier=min_tier or "",
            updated_at=None,
        )
    return Flag(
        key=key,
        is_enabled=row["is_enabled"],
        name=row["name"],
        description=row["description"],
        # Where the row says nothing the default is in force; the other two flags have no tier.
        min_tier=(row["min_tier"] or min_tier) if min_tier is not None else "",
        updated_at=row["updated_at"],
    )
