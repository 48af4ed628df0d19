"""Users with their keys, as decisions see them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keyturn_server.errors import UserNotFound
from keyturn_server.profiles import Profile
from keyturn_server.store.user_keys import stored_key

if TYPE_CHECKING:
    from keyturn_server.store.database import Database

_PROFILE = """
SELECT u.subscription_tier, k.id, k.provider, k.label, k.priority, k.encrypted_key, k.key_hint, k.revision,
       k.is_active, k.is_valid, k.verified_at, k.cooldown_until
  FROM users u
  LEFT JOIN user_api_keys k ON k.user_id = u.id
 WHERE u.id = $1
 ORDER BY k.priority, k.created_at, k.id
"""

_PUT_USER = """
INSERT INTO users (id, email, subscription_tier) VALUES ($1, $2, $3)
ON CONFLICT (id) DO UPDATE SET email = excluded.email, subscription_tier = excluded.subscription_tier
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


async def load_master_key_ids(database: Database) -> set[str]:
    """The ids of the master keys that stored keys rest under, `LEGACY` among them if any names none.

    Raises `StoreUnavailable`.
    """
    return {row["id"] for row in await database.fetch(_MASTER_KEY_IDS)}


async def put_user(database: Database, *, user_id: str, email: str | None, tier: str) -> None:
    """Make the user, or set email and tier of the one that is there. Raises `StoreUnavailable`."""
    await database.fetch(_PUT_USER, user_id, email, tier)


async def load_profile(database: Database, user_id: str) -> Profile:
    """The user's tier and keys, read in one statement. Raises `UserNotFound`, `StoreUnavailable`."""
    rows = await database.fetch(_PROFILE, user_id)
    if not rows:
        raise UserNotFound(user_id)
    return Profile(
        user_id=user_id,
        tier=rows[0]["subscription_tier"],
        keys=tuple(stored_key(row) for row in rows if row["id"] is not None),
    )
