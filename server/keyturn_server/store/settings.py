"""What is set for everyone: the rows that `Configuration` is made of, and the roots of tokens."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from keyturn_server.configuration import Configuration, FlagChange, Provider, Tier
from keyturn_server.keys.tokens import TokenRoot
from keyturn_server.prices import PriceOverride
from keyturn_server.routing.model import FLAG_KEYS, Flags

if TYPE_CHECKING:
    import asyncpg

    from keyturn_server.store.database import Database, PoolConnection

_FLAGS = "SELECT key, is_enabled, min_tier FROM feature_flags WHERE key = ANY ($1)"
_LAST_CHANGES = """
SELECT DISTINCT ON (key) key, changed_by, reason, changed_at FROM feature_flag_changes
 WHERE key = ANY ($1) ORDER BY key, id DESC
"""
_TIERS = "SELECT name, rank, requests_per_minute, requests_per_day FROM subscription_tiers"
_PROVIDERS = """
SELECT id, name, is_enabled, base_url, auth_header, auth_prefix, key_pattern, check_path, check_headers,
       check_refusal
  FROM api_providers ORDER BY sort_order, id
"""
_PRICES = """
SELECT provider, model, input_micros_per_mtok, output_micros_per_mtok, cache_read_micros_per_mtok,
       cache_write_micros_per_mtok
  FROM model_prices
"""
_ROOTS = "SELECT id, secret FROM token_roots ORDER BY created_at DESC, id"
# Made by the database, out of 366 random bits: a parameter would stand in a log of its statements.
_FIRST_ROOT = """
INSERT INTO token_roots (id, secret)
SELECT $1, sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())
                  || uuid_send(gen_random_uuid()))
 WHERE NOT EXISTS (SELECT FROM token_roots)
"""
# Two sidecars starting at once: the second sees the first one's root.
_LOCK_ROOTS = "LOCK TABLE token_roots IN SHARE ROW EXCLUSIVE MODE"


async def load_configuration(database: Database) -> Configuration:
    """Everything that is set for everyone, as of one moment. Raises `StoreUnavailable`."""
    async with (
        database.connection() as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        return await read_configuration(connection)


async def read_configuration(connection: PoolConnection) -> Configuration:
    """The same within a transaction of the caller's, which is what makes it of one moment."""
    flags = {row["key"]: row for row in await connection.fetch(_FLAGS, FLAG_KEYS)}
    changes = [FlagChange(**row) for row in await connection.fetch(_LAST_CHANGES, FLAG_KEYS)]
    tiers = [Tier(**row) for row in await connection.fetch(_TIERS)]
    providers = [_provider(row) for row in await connection.fetch(_PROVIDERS)]
    prices = [PriceOverride(**row) for row in await connection.fetch(_PRICES)]
    return Configuration(
        flags=_flags(flags),
        flags_missing=frozenset(FLAG_KEYS) - flags.keys(),
        flag_changes={change.key: change for change in changes},
        tiers={tier.name: tier for tier in tiers},
        tier_ranks={tier.name: tier.rank for tier in tiers},
        providers={provider.id: provider for provider in providers},
        prices={(price.provider, price.model): price for price in prices},
    )


def _provider(row: asyncpg.Record) -> Provider:
    return Provider(**{**row, "check_headers": json.loads(row["check_headers"])})


def _flags(rows: dict[str, asyncpg.Record]) -> Flags:
    default = Flags()
    byok = rows.get("byok_enabled")
    credits_first = rows.get("byok_uses_internal_credits")
    only = rows.get("byok_only_mode")
    return Flags(
        byok_enabled=byok["is_enabled"] if byok else default.byok_enabled,
        min_tier=(byok["min_tier"] if byok else None) or default.min_tier,
        byok_uses_internal_credits=(
            credits_first["is_enabled"] if credits_first else default.byok_uses_internal_credits
        ),
        byok_only_mode=only["is_enabled"] if only else default.byok_only_mode,
    )


async def load_token_roots(database: Database) -> list[TokenRoot]:
    """The roots that handles and tickets are sealed under, the newest first; the first sidecar on a
    database makes one. Raises `StoreUnavailable`."""
    async with database.connection() as connection:
        if not (rows := await connection.fetch(_ROOTS)):
            async with connection.transaction():
                await connection.execute(_LOCK_ROOTS)
                await connection.execute(_FIRST_ROOT, os.urandom(4))
            rows = await connection.fetch(_ROOTS)
    return [TokenRoot(id=row["id"], secret=row["secret"]) for row in rows]
