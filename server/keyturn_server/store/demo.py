"""What `keyturn demo` writes and reads in SQL: made-up users, the flags, and the rows that landed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from keyturn.secret import Secret
from keyturn_server.ids import new_id
from keyturn_server.keys.keyring import Keyring
from keyturn_server.keys.provider_checks import CANNOT_BE_CHECKED
from keyturn_server.store.people import Users
from keyturn_server.store.user_keys import UserKeyRows
from keyturn_server.user_keys import NewKey

if TYPE_CHECKING:
    from keyturn_server.store.database import Database

# Plain statements, as an operator types them in psql.
SET_FLAG = "UPDATE feature_flags SET is_enabled = $2 WHERE key = $1 AND is_enabled <> $2"
GRANT = "SELECT FROM keyturn_grant_credits($1, $2, $3, 'demo', 'demo')"
KEY_USAGE = """
SELECT user_id, provider, model, outcome, total_tokens, estimated_cost_cents, key_state
  FROM api_key_usage ORDER BY created_at, user_id
"""
TRANSACTIONS = """
SELECT user_id, transaction_type, service_type, model, outcome, cost_source, cost_cents, balance_after
  FROM credit_transactions ORDER BY created_at, user_id
"""


async def make_user(
    database: Database, keyring: Keyring, *, user_id: str, tier: str, secret: Secret | None, micros: int
) -> None:
    """A user, with an OpenAI key if `secret` is given, and `micros` of credits if there are any."""
    await Users(database).put(user_id=user_id, email=f"{user_id}@example.com", tier=tier)
    if secret is not None:
        key = NewKey(user_id=user_id, provider="openai", label="demo", secret=secret)
        await UserKeyRows(database).save(key, keyring, CANNOT_BE_CHECKED)
    if micros:
        await database.fetch(GRANT, new_id(), user_id, micros)


async def set_flags(database: Database, flags: dict[str, bool]) -> None:
    """Sets flags with plain UPDATEs: the push has them on every sidecar within a second."""
    for key, enabled in flags.items():
        await database.fetch(SET_FLAG, key, enabled)


async def landed(database: Database) -> dict[str, list[dict[str, Any]]]:
    """The rows of both tables of usage, by table."""
    return {
        "api_key_usage": [dict(row) for row in await database.fetch(KEY_USAGE)],
        "credit_transactions": [dict(row) for row in await database.fetch(TRANSACTIONS)],
    }
