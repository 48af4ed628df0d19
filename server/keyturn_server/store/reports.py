"""Reports over the tables of usage, users and keys.

Each runs in a read-only transaction of its own, which may take longer than other statements, and one at
a time: the connections of the pool are there for decisions.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Final

from keyturn_server.reports import (
    OTHER,
    Adoption,
    Grouping,
    TierAdoption,
    UsageRow,
    UsageSplit,
    UsageTotals,
    UsersWithoutKeys,
    UserWithoutKeys,
)
from keyturn_server.routing.policy import is_eligible
from keyturn_server.store.people import LEGACY, usable_keys_of
from keyturn_server.store.settings import load_configuration

if TYPE_CHECKING:
    from datetime import datetime

    import asyncpg

    from keyturn_server.configuration import Configuration
    from keyturn_server.store.database import Database, PoolConnection

MOST_GROUPS: Final = 100

_TIMEOUT = timedelta(seconds=60)
_SET_TIMEOUT = "SELECT set_config('statement_timeout', $1, true)"

# Every record of an own key, and every deduction: what the plain SQL of docs/operating.md counts.
_USAGE = """
WITH used AS (
    SELECT (created_at AT TIME ZONE 'UTC')::date AS day,
           CASE WHEN $3 THEN service_type ELSE provider END AS name, true AS by_own_key,
           count(*) AS requests, sum(total_tokens) AS tokens, sum(cost_micros) AS micros
      FROM api_key_usage
     WHERE created_at >= $1 AND created_at < $2
     GROUP BY 1, 2
     UNION ALL
    SELECT (created_at AT TIME ZONE 'UTC')::date,
           CASE WHEN $3 THEN service_type ELSE provider END, false,
           count(*), sum(total_tokens), -sum(amount_micros)
      FROM credit_transactions
     WHERE transaction_type = 'deduction' AND created_at >= $1 AND created_at < $2
     GROUP BY 1, 2
), largest AS (
    SELECT name FROM used GROUP BY name ORDER BY sum(requests) DESC, name LIMIT $4
)
SELECT used.day, CASE WHEN largest.name IS NULL THEN $5 ELSE used.name END AS name,
       sum(requests) FILTER (WHERE by_own_key) AS own_key_requests,
       sum(tokens) FILTER (WHERE by_own_key) AS own_key_tokens,
       sum(micros) FILTER (WHERE by_own_key) AS own_key_micros,
       sum(requests) FILTER (WHERE NOT by_own_key) AS credits_requests,
       sum(tokens) FILTER (WHERE NOT by_own_key) AS credits_tokens,
       sum(micros) FILTER (WHERE NOT by_own_key) AS credits_micros
  FROM used LEFT JOIN largest ON largest.name = used.name
 GROUP BY 1, 2
"""

# $1: the tiers that may bring keys; $2: the master keys that there are.
_WITHOUT_KEYS = f"""
SELECT u.id AS user_id, coalesce(u.email, '') AS email, u.subscription_tier AS tier,
       EXISTS (SELECT FROM user_api_keys k WHERE k.user_id = u.id AND k.is_active) AS has_active_key
  FROM users u
 WHERE u.subscription_tier = ANY ($1) AND ($3::text IS NULL OR u.id > $3)
   AND NOT EXISTS ({usable_keys_of("u.id", master_key_ids="$2")})
 ORDER BY u.id
 LIMIT $4
"""  # noqa: S608 - of constants
_COUNT_WITHOUT_KEYS = f"""
SELECT count(*) AS total,
       count(*) FILTER (WHERE NOT EXISTS (
           SELECT FROM user_api_keys k WHERE k.user_id = u.id AND k.is_active)) AS without_active_key
  FROM users u
 WHERE u.subscription_tier = ANY ($1) AND NOT EXISTS ({usable_keys_of("u.id", master_key_ids="$2")})
"""  # noqa: S608 - of constants
_ADOPTION = """
SELECT u.subscription_tier AS tier, count(*) AS users, count(k.user_id) AS users_with_keys
  FROM users u
  LEFT JOIN (SELECT DISTINCT user_id FROM user_api_keys WHERE is_active) k ON k.user_id = u.id
 GROUP BY u.subscription_tier
"""


class Reports:
    """Makes reports. Methods raise `StoreUnavailable`, also when a report takes longer than a minute.

    Eligibility is that of the policy, under the flags and tiers in the database at that moment.
    """

    def __init__(self, database: Database, *, master_key_ids: Sequence[str]) -> None:
        self._database = database
        self._master_key_ids = [LEGACY, *master_key_ids]
        self._one_at_a_time = asyncio.Lock()

    async def usage_split(self, start: datetime, end: datetime, grouping: Grouping) -> UsageSplit:
        """Who paid for how much from `start` up to `end`, which is no part of it."""
        async with self._report() as connection:
            rows = await connection.fetch(
                _USAGE,
                start,
                end,
                grouping is Grouping.SERVICE_TYPE,
                MOST_GROUPS,
                OTHER,
                timeout=_TIMEOUT.total_seconds(),
            )
        split = [
            UsageRow(
                day=row["day"],
                group=row["name"],
                own_key=_totals(row, "own_key"),
                credits=_totals(row, "credits"),
            )
            for row in rows
        ]
        split.sort(key=lambda one: (one.day, one.group))
        return UsageSplit(
            rows=split,
            own_key=_sum(row.own_key for row in split),
            credits=_sum(row.credits for row in split),
        )

    async def users_without_keys(self, *, size: int, after: str | None) -> UsersWithoutKeys:
        """Up to `size` of the users whom BYOK_ONLY would lock out, from the one after the user `after`."""
        tiers = _eligible_tiers(await load_configuration(self._database))
        async with self._report() as connection:
            timeout = _TIMEOUT.total_seconds()
            about = (tiers, self._master_key_ids)
            rows = await connection.fetch(_WITHOUT_KEYS, *about, after, size + 1, timeout=timeout)
            count = await connection.fetchrow(_COUNT_WITHOUT_KEYS, *about, timeout=timeout)
        return UsersWithoutKeys(
            users=[UserWithoutKeys(**row) for row in rows[:size]],
            has_more=len(rows) > size,
            total=count["total"] if count else 0,
            without_active_key=count["without_active_key"] if count else 0,
        )

    async def adoption(self) -> Adoption:
        """How many users of each tier have an active key."""
        configuration = await load_configuration(self._database)
        eligible = set(_eligible_tiers(configuration))
        async with self._report() as connection:
            rows = await connection.fetch(_ADOPTION, timeout=_TIMEOUT.total_seconds())
        ranks = configuration.tier_ranks
        tiers = [TierAdoption(**row, is_eligible=row["tier"] in eligible) for row in rows]
        tiers.sort(key=lambda one: (one.tier not in ranks, -ranks.get(one.tier, 0), one.tier))
        return Adoption(tiers=tiers)

    @asynccontextmanager
    async def _report(self) -> AsyncIterator[PoolConnection]:
        """A connection in a transaction that sees one moment, changes nothing, and may take a minute."""
        async with (
            self._one_at_a_time,
            self._database.connection() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            await connection.execute(_SET_TIMEOUT, str(round(_TIMEOUT.total_seconds() * 1000)))
            yield connection


def _eligible_tiers(configuration: Configuration) -> list[str]:
    """The tiers that may bring keys, by the policy's own rule."""
    flags, ranks = configuration.flags, configuration.tier_ranks
    return [tier for tier in ranks if is_eligible(flags, tier, ranks)]


def _totals(row: asyncpg.Record, path: str) -> UsageTotals:
    return UsageTotals(
        requests=_int64(row[f"{path}_requests"]),
        total_tokens=_int64(row[f"{path}_tokens"]),
        cost_micros=_int64(row[f"{path}_micros"]),
    )


def _sum(totals: Iterable[UsageTotals]) -> UsageTotals:
    each = list(totals)
    return UsageTotals(
        requests=_int64(sum(one.requests for one in each)),
        total_tokens=_int64(sum(one.total_tokens for one in each)),
        cost_micros=_int64(sum(one.cost_micros for one in each)),
    )


def _int64(value: Decimal | int | None) -> int:
    """A sum as an answer can hold it: rows written by hand may come to more."""
    return max(-(2**63), min(int(value or 0), 2**63 - 1))
