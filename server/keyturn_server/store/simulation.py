"""Recorded requests and today's users, sorted by what decides, for SimulateFlags. Only reads."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from keyturn_server.configuration import Configuration
from keyturn_server.routing.model import DenialReason, Path
from keyturn_server.simulation import (
    DeniedUser,
    KeyCondition,
    Move,
    PresentFacts,
    Verdicts,
    Window,
)
from keyturn_server.store.flags import count_locked_out
from keyturn_server.store.people import LEGACY
from keyturn_server.store.settings import read_configuration

if TYPE_CHECKING:
    from keyturn_server.store.database import Database, PoolConnection

_LIMIT = timedelta(seconds=60)
# The server gives up first, and says so.
_OUR_LIMIT_SECONDS = _LIMIT.total_seconds() + 1

# Every row of the window is wanted, so hashing is right whatever the statistics say. Of the facts that
# are joined they say nothing, and the planner would sort a million rows on disk, or look each one up.
_SETTINGS = f"""
SET LOCAL statement_timeout = {round(_LIMIT.total_seconds() * 1000)};
SET LOCAL work_mem = '32MB';
SET LOCAL plan_cache_mode = force_custom_plan;
SET LOCAL enable_nestloop = off;
SET LOCAL enable_mergejoin = off;
SET LOCAL enable_sort = off
"""

# $1: what a user with credits has available at least. Tiers that nobody described decide alike: as one, or a
# product that writes what it likes there would make as many combinations of facts.
_PEOPLE = """
SELECT u.id, u.email, u.subscription_tier AS tier, coalesce(t.name, '') AS known_tier,
       coalesce(a.balance_micros - a.held_micros, 0) >= $1 AS has_credits
  FROM users u
  LEFT JOIN subscription_tiers t ON t.name = u.subscription_tier
  LEFT JOIN credit_accounts a ON a.user_id = u.id
"""
# The conditions that a user's keys for a provider are in, as a set: bit n is the condition n, whose own
# four bits are the fields of `KeyCondition`, the first one lowest. $2: the time; $3: the ids of the
# master keys that there are.
_KEYS = """
SELECT user_id, provider,
       bit_or(1 << (is_active::int + 2 * is_valid::int
                    + 4 * (keyturn_master_key_id(encrypted_key) = ANY ($3::text[]))::int
                    + 8 * coalesce(cooldown_until > $2, false)::int)) AS conditions
  FROM user_api_keys GROUP BY user_id, provider
"""
_FACTS = f"""
SELECT DISTINCT known_tier AS tier, has_credits, NULL::int AS conditions FROM ({_PEOPLE}) people
 UNION ALL
SELECT DISTINCT NULL, NULL::boolean, conditions FROM ({_KEYS}) keys
"""  # noqa: S608 - of constants
# $4 and $2: where the window begins and ends. Own-key requests that failed and cost nothing are left out.
_REQUESTS = """
SELECT user_id, provider, created_at, 'OWN_KEY' AS paid_by, total_tokens, cost_micros
  FROM api_key_usage
 WHERE created_at >= $4 AND created_at < $2 AND (outcome = 'SUCCESS' OR cost_micros > 0 OR total_tokens > 0)
 UNION ALL
SELECT user_id, provider, created_at, 'CREDITS', total_tokens, -amount_micros
  FROM credit_transactions
 WHERE created_at >= $4 AND created_at < $2 AND transaction_type = 'deduction'
"""
# $5: the providers that are switched on. From $6: the verdicts, by the facts that they are of.
_WORLD = f"""
people AS ({_PEOPLE}),
keys AS ({_KEYS}),
verdicts AS (
    SELECT * FROM unnest($6::text[], $7::boolean[], $8::int[], $9::boolean[], $10::text[], $11::text[])
        AS v (tier, has_credits, conditions, is_enabled, path, denial))
"""  # noqa: S608 - of constants
_DECIDED = """
  LEFT JOIN people p ON p.id = r.user_id
  LEFT JOIN keys k ON k.user_id = r.user_id AND k.provider = r.provider
  LEFT JOIN verdicts v ON v.tier = p.known_tier AND v.has_credits = p.has_credits
                      AND v.conditions = coalesce(k.conditions, 0)
                      AND v.is_enabled = (r.provider = ANY ($5::text[]))
"""
# Requests of users who no longer exist make one group, without a day and a tier. In no order: sorting
# before grouping costs more.
_MOVES = f"""
WITH requests AS ({_REQUESTS}), {_WORLD}
SELECT CASE WHEN p.id IS NOT NULL THEN (r.created_at AT TIME ZONE 'UTC')::date END AS day,
       CASE WHEN p.id IS NOT NULL THEN r.provider END AS provider, p.tier,
       CASE WHEN p.id IS NOT NULL THEN r.paid_by END AS paid_by, v.path,
       count(*) AS requests, coalesce(sum(r.total_tokens), 0)::bigint AS total_tokens,
       coalesce(sum(r.cost_micros), 0)::bigint AS cost_micros
  FROM requests r {_DECIDED}
 GROUP BY 1, 2, 3, 4, 5
 LIMIT $12
"""  # noqa: S608 - of constants
_DENIED = f"""
WITH requests AS (SELECT user_id, provider, count(*) AS requests FROM ({_REQUESTS}) each GROUP BY 1, 2),
{_WORLD}
SELECT r.user_id, coalesce(p.email, '') AS email, r.provider, v.denial, r.requests
  FROM requests r {_DECIDED}
 WHERE v.denial IS NOT NULL
 ORDER BY r.user_id COLLATE "C", r.provider COLLATE "C"
"""  # noqa: S608 - of constants


class RequestLog:
    """The tables of recorded requests, and what is known of users today."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[RequestReading]:
        """Everything as of one moment, for the length of the block. Raises `StoreUnavailable`."""
        async with (
            self._database.connection() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            await connection.execute(_SETTINGS)
            yield RequestReading(connection, now=await connection.fetchval("SELECT now()"))


class RequestReading:
    """One transaction's view. A statement that takes longer than a minute is given up."""

    def __init__(self, connection: PoolConnection, *, now: datetime) -> None:
        self._connection = connection
        self.now = now
        """The database's clock."""

    async def configuration(self) -> Configuration:
        """What is set for everyone."""
        return await read_configuration(self._connection)

    async def facts(self, window: Window) -> PresentFacts:
        """What there is among the users and their keys, each once."""
        rows = await self._connection.fetch(
            _FACTS, window.hold_micros, window.end, _readable(window), timeout=_OUR_LIMIT_SECONDS
        )
        return PresentFacts(
            people=[(row["tier"], row["has_credits"]) for row in rows if row["conditions"] is None],
            keys=[
                frozenset(),
                *(_conditions(row["conditions"]) for row in rows if row["conditions"] is not None),
            ],
        )

    async def locked_out_users(self, window: Window, min_tier: str) -> int:
        """Whom BYOK_ONLY would lock out, whether they made requests or not."""
        return await count_locked_out(self._connection, min_tier, window.master_key_ids)

    async def moves(self, window: Window, verdicts: Verdicts, limit: int) -> tuple[list[Move], int]:
        """Up to `limit` moves, in no order, and how many requests are of users who no longer exist."""
        rows = await self._connection.fetch(
            _MOVES, *_arguments(window, verdicts), limit + 1, timeout=_OUR_LIMIT_SECONDS
        )
        moves = [
            Move(
                day=row["day"],
                provider=row["provider"],
                tier=row["tier"],
                paid_by=Path(row["paid_by"]),
                would_pay=Path(row["path"]) if row["path"] else None,
                requests=row["requests"],
                total_tokens=row["total_tokens"],
                cost_micros=row["cost_micros"],
            )
            for row in rows
            if row["day"] is not None
        ]
        return moves[:limit], sum(row["requests"] for row in rows if row["day"] is None)

    async def denied(self, window: Window, verdicts: Verdicts, size: int) -> AsyncIterator[list[DeniedUser]]:
        """Who would be denied, by user and provider (in the order of code points), `size` at a time."""
        cursor = await self._connection.cursor(
            _DENIED, *_arguments(window, verdicts), timeout=_OUR_LIMIT_SECONDS
        )
        while rows := await cursor.fetch(size, timeout=_OUR_LIMIT_SECONDS):
            yield [
                DeniedUser(
                    row["user_id"],
                    row["email"],
                    row["provider"],
                    DenialReason(row["denial"]),
                    row["requests"],
                )
                for row in rows
            ]


def _arguments(window: Window, verdicts: Verdicts) -> list[Any]:
    return [
        window.hold_micros,
        window.end,
        _readable(window),
        window.start,
        list(window.providers),
        [facts.tier for facts in verdicts],
        [facts.has_credits for facts in verdicts],
        [_bits(facts.keys) for facts in verdicts],
        [facts.is_provider_enabled for facts in verdicts],
        [verdict.path and verdict.path.value for verdict in verdicts.values()],
        [verdict.denial and verdict.denial.value for verdict in verdicts.values()],
    ]


def _readable(window: Window) -> list[str]:
    # Ciphertexts that name no master key can only be tried.
    return [LEGACY, *window.master_key_ids]


def _conditions(bits: int) -> frozenset[KeyCondition]:
    """The set of conditions that `_KEYS` writes as bits."""
    return frozenset(
        KeyCondition(*(bool(number >> field & 1) for field in range(4)))
        for number in range(16)
        if bits >> number & 1
    )


def _bits(conditions: frozenset[KeyCondition]) -> int:
    """What `_conditions` reads."""
    return sum(1 << sum(value << field for field, value in enumerate(one)) for one in conditions)
