"""Users' keys as rows. Every change locks the owner's row first, so that counts and labels hold."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg

from keyturn_server.errors import InvalidFields, KeyNotFound, LabelTaken, RowLocked, UserNotFound
from keyturn_server.ids import new_id
from keyturn_server.keys.envelope import seal
from keyturn_server.keys.keyring import Keyring
from keyturn_server.keys.provider_checks import Checked, KeyCheck
from keyturn_server.profiles import StoredKey
from keyturn_server.scrub import scrub
from keyturn_server.user_keys import KeyChange, KeyOwner, NewKey, UserKey, check_room

if TYPE_CHECKING:
    from keyturn_server.store.database import Database, PoolConnection

_LOAD = """
SELECT u.subscription_tier, k.*
  FROM users u LEFT JOIN user_api_keys k ON k.user_id = u.id
 WHERE u.id = $1
 ORDER BY k.provider, k.priority, k.created_at, k.id
"""
# Many may change one user's keys at once, and each waits for those before it: longer than the ledger
# waits, so in few connections, that the ledger has the rest.
_MOST_AT_ONCE = 2
_WAIT_FOR_OWNER = "SET LOCAL lock_timeout = '2s'"
# Before the keys' own rows, which records lock; nothing locks it while it holds those.
_LOCK_OWNER = "SELECT id FROM users WHERE id = $1 FOR NO KEY UPDATE"
_KEYS = "SELECT * FROM user_api_keys WHERE user_id = $1"
_INSERT = """
INSERT INTO user_api_keys (user_id, id, provider, label, priority, encrypted_key, key_hint, is_valid,
                           verified_at, last_error, last_error_at)
VALUES ($1, $2, $3, $4, coalesce($5, 0), $6, $7, $8 <> 'INVALID',
        CASE $8 WHEN 'VALID' THEN now() END, CASE $8 WHEN 'INVALID' THEN $9 END,
        CASE $8 WHEN 'INVALID' THEN now() END)
RETURNING *
"""
_REPLACE = """
UPDATE user_api_keys
   SET priority = coalesce($3, priority), encrypted_key = $4, key_hint = $5, revision = revision + 1,
       is_active = true, is_valid = $6 <> 'INVALID', cooldown_until = NULL,
       verified_at = CASE $6 WHEN 'VALID' THEN now() END,
       last_error = CASE $6 WHEN 'INVALID' THEN $7 END,
       last_error_at = CASE $6 WHEN 'INVALID' THEN now() END
 WHERE user_id = $1 AND id = $2
RETURNING *
"""
_CHANGE = """
UPDATE user_api_keys
   SET is_active = coalesce($3, is_active), priority = coalesce($4, priority), label = coalesce($5, label)
 WHERE user_id = $1 AND id = $2
RETURNING *
"""
_DELETE = "DELETE FROM user_api_keys WHERE user_id = $1 AND id = $2 RETURNING *"
_TAKEN = """
UPDATE user_api_keys
   SET is_valid = true, verified_at = now(), cooldown_until = NULL, last_error = NULL, last_error_at = NULL
 WHERE user_id = $1 AND id = $2 AND revision = $3
"""
_REFUSED = """
UPDATE user_api_keys SET is_valid = false, last_error = $4, last_error_at = now()
 WHERE user_id = $1 AND id = $2 AND revision = $3
"""
_FIND = "SELECT * FROM user_api_keys WHERE user_id = $1 AND id = $2"


class UserKeyRows:
    """The rows of `user_api_keys`. Its methods raise `UserNotFound` and `StoreUnavailable`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._turns = asyncio.Semaphore(_MOST_AT_ONCE)

    async def load(self, user_id: str) -> KeyOwner:
        """The user's tier and keys, read in one statement."""
        rows = await self._database.fetch(_LOAD, user_id)
        if not rows:
            raise UserNotFound(user_id)
        return KeyOwner(
            tier=rows[0]["subscription_tier"],
            keys=tuple(_user_key(row) for row in rows if row["id"] is not None),
        )

    async def find(self, user_id: str, key_id: UUID) -> UserKey:
        """One key. Raises `KeyNotFound`."""
        owner = await self.load(user_id)
        found = next((key for key in owner.keys if key.stored.id == key_id), None)
        if found is None:
            raise KeyNotFound(str(key_id))
        return found

    async def save(self, new: NewKey, keyring: Keyring, checked: Checked) -> tuple[UserKey, bool]:
        """The new row, or the one with the same label with its secret replaced, and True for that.

        Sealed here, for its row. Raises `TooManyKeys`, and `InvalidFields` for a provider that is gone.
        """
        result, message = checked.result.value, checked.message
        try:
            async with self._owner_locked(new.user_id) as connection:
                keys = [stored_key(row) for row in await connection.fetch(_KEYS, new.user_id)]
                check_room(new, keys)
                old = next((k for k in keys if (k.provider, k.label) == (new.provider, new.label)), None)
                key_id = new_id() if old is None else old.id
                ciphertext = seal(
                    keyring, new.secret, user_id=new.user_id, provider=new.provider, row_id=key_id
                )
                sealed = (new.priority, ciphertext, new.hint, result, message)
                if old is None:
                    place = (new.user_id, key_id, new.provider, new.label)
                    row = await connection.fetchrow(_INSERT, *place, *sealed)
                else:
                    row = await connection.fetchrow(_REPLACE, new.user_id, key_id, *sealed)
        except asyncpg.ForeignKeyViolationError:
            raise InvalidFields(("provider", "There is no such provider in api_providers.")) from None
        except asyncpg.UniqueViolationError:
            # Plain SQL came between, without the lock.
            raise RowLocked from None
        if row is None:
            raise RowLocked
        return _user_key(row), old is not None

    async def change(self, user_id: str, key_id: UUID, change: KeyChange) -> UserKey:
        """The row as it is now. Raises `KeyNotFound`, `LabelTaken`."""
        try:
            async with self._owner_locked(user_id) as connection:
                row = await connection.fetchrow(
                    _CHANGE, user_id, key_id, change.is_active, change.priority, change.label
                )
        except asyncpg.UniqueViolationError:
            raise LabelTaken from None
        return _found(row, key_id)

    async def delete(self, user_id: str, key_id: UUID) -> UserKey:
        """The row as it was. Raises `KeyNotFound`."""
        async with self._owner_locked(user_id) as connection:
            return _found(await connection.fetchrow(_DELETE, user_id, key_id), key_id)

    async def keep_check(self, user_id: str, key_id: UUID, *, revision: int, checked: Checked) -> UserKey:
        """The row as it is now, with what came of the check unless its secret is another by now.

        Raises `KeyNotFound`.
        """
        async with self._owner_locked(user_id) as connection:
            if checked.result is KeyCheck.VALID:
                await connection.execute(_TAKEN, user_id, key_id, revision)
            elif checked.result is KeyCheck.INVALID:
                await connection.execute(_REFUSED, user_id, key_id, revision, checked.message)
            return _found(await connection.fetchrow(_FIND, user_id, key_id), key_id)

    @asynccontextmanager
    async def _owner_locked(self, user_id: str) -> AsyncIterator[PoolConnection]:
        """A transaction in which nobody else here changes keys of this user. Raises `UserNotFound`."""
        async with (
            self._turns,
            self._database.connection() as connection,
            connection.transaction(),
        ):
            await connection.execute(_WAIT_FOR_OWNER)
            if await connection.fetchval(_LOCK_OWNER, user_id) is None:
                raise UserNotFound(user_id)
            yield connection


def stored_key(row: Any) -> StoredKey:
    """The key of a row of `user_api_keys`."""
    return StoredKey(
        id=row["id"],
        provider=row["provider"],
        label=row["label"],
        priority=row["priority"],
        ciphertext=row["encrypted_key"],
        hint=row["key_hint"],
        revision=row["revision"],
        is_active=row["is_active"],
        is_valid=row["is_valid"],
        is_verified=row["verified_at"] is not None,
        cooldown_until=row["cooldown_until"],
        last_error=(row["last_error"] or "") if row["cooldown_until"] or not row["is_valid"] else "",
    )


def _user_key(row: Any) -> UserKey:
    return UserKey(
        stored=stored_key(row),
        # Rows of other gateways hold what those thought fit.
        last_error=scrub(row["last_error"] or ""),
        total_requests=row["total_requests"],
        total_tokens=row["total_tokens"],
        last_used_at=row["last_used_at"],
        verified_at=row["verified_at"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
    )


def _found(row: asyncpg.Record | None, key_id: UUID) -> UserKey:
    if row is None:
        raise KeyNotFound(str(key_id))
    return _user_key(row)
