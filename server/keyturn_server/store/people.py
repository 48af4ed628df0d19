"""Users, and their keys as decisions see them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keyturn_server.errors import UserNotFound
from keyturn_server.profiles import Profile, User
from keyturn_server.store.user_keys import stored_key

if TYPE_CHECKING:
    from keyturn_server.store.database import Database

_PROFILE = """
SELECT u.subscription_tier, k.id, k.provider, k.label, k.priority, k.encrypted_key, k.key_hint, k.revision,
       k.is_active, k.is_valid, k.verified_at, k.cooldown_until, k.last_error
  FROM users u
  LEFT JOIN user_api_keys k ON k.user_id = u.id
 WHERE u.id = $1
 ORDER BY k.priority, k.created_at, k.id
"""

_MAKE_USER = """
INSERT INTO users (id, email, subscription_tier) VALUES ($1, nullif($2, ''), $3)
ON CONFLICT (id) DO NOTHING RETURNING id
"""
# The same again touches nothing, `updated_at` included.
_CHANGE_USER = """
UPDATE users SET email = nullif($2, ''), subscription_tier = $3
 WHERE id = $1 AND (email, subscription_tier) IS DISTINCT FROM (nullif($2, ''), $3)
"""
_USER = """
SELECT u.id, coalesce(u.email, '') AS email, u.subscription_tier AS tier, t.name IS NOT NULL AS is_known_tier,
       u.created_at, u.updated_at
  FROM users u LEFT JOIN subscription_tiers t ON t.name = u.subscription_tier
 WHERE u.id = $1
"""


LEGACY = "legacy"
"""What stands for the master key of ciphertexts that do not name one."""


def usable_keys_of(user_id: str, *, master_key_ids: str) -> str:
    """A query for the keys of a user that can be used, cooling down ones among them: for EXISTS.

    Both arguments are SQL. Keys are not opened: one under a master key that there is counts as usable,
    and so does one that names none, which `LEGACY` stands for.
    """
    return f"""
SELECT FROM user_api_keys k JOIN api_providers o ON o.id = k.provider AND o.is_enabled
 WHERE k.user_id = {user_id} AND k.is_active AND k.is_valid
   AND keyturn_master_key_id(k.encrypted_key) = ANY ({master_key_ids}::text[])"""


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


class Users:
    """Users without their keys. Methods raise `StoreUnavailable`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def put(self, *, user_id: str, email: str, tier: str) -> tuple[User, bool]:
        """Make the user, or set email and tier of the one that is there; and whether it was made now."""
        while True:
            created = await self._database.fetchval(_MAKE_USER, user_id, email, tier) is not None
            if not created:
                await self._database.fetch(_CHANGE_USER, user_id, email, tier)
            # Not there any more: deleted in between, and made again.
            if (row := await self._database.fetchrow(_USER, user_id)) is not None:
                return User(**row), created

    async def get(self, user_id: str) -> User:
        """The user. Raises `UserNotFound`."""
        row = await self._database.fetchrow(_USER, user_id)
        if row is None:
            raise UserNotFound(user_id)
        return User(**row)


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
