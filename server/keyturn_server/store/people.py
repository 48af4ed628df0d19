"""Users with their keys, as decisions see them."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from keyturn.secret import Secret
from keyturn_server.errors import UserNotFound
from keyturn_server.ids import new_id
from keyturn_server.keys.envelope import seal
from keyturn_server.keys.keyring import Keyring
from keyturn_server.profiles import Profile, StoredKey

if TYPE_CHECKING:
    from keyturn_server.store.database import Database

_PROFILE = """
SELECT u.subscription_tier, k.id, k.provider, k.label, k.priority, k.encrypted_key, k.key_hint, k.revision,
       k.is_active, k.is_valid, k.verified_at IS NOT NULL AS is_verified, k.cooldown_until
  FROM users u
  LEFT JOIN user_api_keys k ON k.user_id = u.id
 WHERE u.id = $1
 ORDER BY k.priority, k.created_at, k.id
"""

_PUT_USER = """
INSERT INTO users (id, email, subscription_tier) VALUES ($1, $2, $3)
ON CONFLICT (id) DO UPDATE SET email = excluded.email, subscription_tier = excluded.subscription_tier
"""
_SAVE_KEY = """
INSERT INTO user_api_keys (user_id, id, provider, label, priority, encrypted_key, key_hint)
VALUES ($1, $2, $3, $4, $5, $6, $7)
"""


LEGACY = "legacy"
"""What stands for the master key of ciphertexts that do not name one."""

# Hops over the index from one id to the next: as many steps as there are ids, not as there are keys.
_MASTER_KEY_IDS = """
WITH RECURSIVE ids AS (
    (SELECT keyturn_master_key_id(encrypted_key) AS id FROM user_api_keys ORDER BY 1 LIMIT 1)
    UNION ALL
    SELECT (SELECT keyturn_master_key_id(encrypted_key) FROM user_api_keys
             WHERE keyturn_master_key_id(encrypted_key) > ids.id ORDER BY 1 LIMIT 1)
      FROM ids WHERE ids.id IS NOT NULL)
SELECT id FROM ids WHERE id IS NOT NULL
"""
_KEYS_UNDER = "SELECT count(*) FROM user_api_keys WHERE keyturn_master_key_id(encrypted_key) = $1"


async def load_master_key_ids(database: Database) -> set[str]:
    """The ids of the master keys that stored keys rest under, `LEGACY` among them if any names none.

    Raises `StoreUnavailable`.
    """
    return {row["id"] for row in await database.fetch(_MASTER_KEY_IDS)}


async def load_master_key_counts(database: Database, *, beside: str = "") -> dict[str, int]:
    """How many stored keys rest under each master key but `beside`, `LEGACY` among them. Reads those keys
    alone. Raises `StoreUnavailable`."""
    ids = await load_master_key_ids(database) - {beside}
    counts = {id_: await database.fetchval(_KEYS_UNDER, id_) for id_ in sorted(ids)}
    return {id_: count for id_, count in counts.items() if count}


async def put_user(database: Database, *, user_id: str, email: str | None, tier: str) -> None:
    """Make the user, or set email and tier of the one that is there. Raises `StoreUnavailable`."""
    await database.fetch(_PUT_USER, user_id, email, tier)


async def add_key(
    database: Database,
    keyring: Keyring,
    secret: Secret,
    *,
    user_id: str,
    provider: str,
    label: str = "",
    priority: int = 0,
) -> UUID:
    """Store a new key, sealed for its row; its id. Raises `StoreUnavailable`, asyncpg's data errors."""
    key_id = new_id()
    ciphertext = seal(keyring, secret, user_id=user_id, provider=provider, row_id=key_id)
    hint = secret.reveal()[-4:]
    await database.fetch(_SAVE_KEY, user_id, key_id, provider, label, priority, ciphertext, hint)
    return key_id


async def load_profile(database: Database, user_id: str) -> Profile:
    """The user's tier and keys, read in one statement. Raises `UserNotFound`, `StoreUnavailable`."""
    rows = await database.fetch(_PROFILE, user_id)
    if not rows:
        raise UserNotFound(user_id)
    return Profile(
        user_id=user_id,
        tier=rows[0]["subscription_tier"],
        keys=tuple(
            StoredKey(
                id=row["id"],
                provider=row["provider"],
                label=row["label"],
                priority=row["priority"],
                ciphertext=row["encrypted_key"],
                hint=row["key_hint"],
                revision=row["revision"],
                is_active=row["is_active"],
                is_valid=row["is_valid"],
                is_verified=row["is_verified"],
                cooldown_until=row["cooldown_until"],
            )
            for row in rows
            if row["id"] is not None
        ),
    )
