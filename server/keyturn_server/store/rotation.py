"""The stored keys by the master key they rest under, for rotation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from uuid import UUID

from keyturn_server.rotation import RunningSidecar, SealedKey
from keyturn_server.store.people import load_master_key_counts
from keyturn_server.store.push import PUSH_NAME

if TYPE_CHECKING:
    from keyturn_server.store.database import Database

_PAGE = """
SELECT user_id, id, provider, encrypted_key AS ciphertext FROM user_api_keys
 WHERE keyturn_master_key_id(encrypted_key) = $1 AND (user_id, id) > ($2, $3)
 ORDER BY keyturn_master_key_id(encrypted_key), user_id, id LIMIT $4
"""

# Locks in the order that everybody locks keys in, and leaves out the rows that somebody else works on:
# it waits for nobody. Only a row that still holds what was read is written.
_REWRITE = """
WITH locked AS MATERIALIZED (
    SELECT k.user_id, k.id, n.read, n.sealed
      FROM unnest($1::text[], $2::uuid[], $3::text[], $4::text[]) AS n (user_id, id, read, sealed)
      JOIN user_api_keys k ON k.user_id = n.user_id AND k.id = n.id AND k.encrypted_key = n.read
     ORDER BY k.user_id, k.id
       FOR NO KEY UPDATE OF k SKIP LOCKED)
UPDATE user_api_keys k SET encrypted_key = locked.sealed
  FROM locked
 WHERE k.user_id = locked.user_id AND k.id = locked.id AND k.encrypted_key = locked.read
RETURNING k.id
"""

_SIDECARS = """
SELECT pid, coalesce(host(client_addr), 'local') AS address,
       split_part(application_name, ' ', 3) AS master_key_id
  FROM pg_stat_activity
 WHERE datname = current_database() AND starts_with(application_name, $1) AND pid <> pg_backend_pid()
 ORDER BY address, pid
"""

_BEFORE_ALL = ("", UUID(int=0))


class SealedKeyRows:
    """The table `user_api_keys`, as rotation sees it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def counts(self, *, beside: str) -> dict[str, int]:
        """How many keys rest under each master key but `beside`. Raises `StoreUnavailable`."""
        return await load_master_key_counts(self._database, beside=beside)

    async def page(self, master_key_id: str, *, after: SealedKey | None, at_most: int) -> list[SealedKey]:
        """The next keys under one master key, by user and id. Raises `StoreUnavailable`."""
        place = _BEFORE_ALL if after is None else (after.user_id, after.id)
        rows = await self._database.fetch(_PAGE, master_key_id, *place, at_most)
        return [SealedKey(**row) for row in rows]

    async def rewrite(self, changes: Sequence[tuple[SealedKey, str]]) -> int:
        """Put new ciphertexts in the place of those that were read, in one transaction. How many: rows
        that have changed since, or that somebody else has locked, are left out. Raises `StoreUnavailable`.
        """
        rows = await self._database.fetch(
            _REWRITE,
            [key.user_id for key, _ in changes],
            [key.id for key, _ in changes],
            [key.ciphertext for key, _ in changes],
            [sealed for _, sealed in changes],
        )
        return len(rows)

    async def sidecars(self) -> list[RunningSidecar]:
        """The sidecars that listen for changes right now. Raises `StoreUnavailable`."""
        return [
            RunningSidecar(
                address=row["address"],
                backend=row["pid"],
                master_key_id=None if row["master_key_id"] == "none" else row["master_key_id"],
            )
            for row in await self._database.fetch(_SIDECARS, f"{PUSH_NAME} ")
        ]
