"""ReportService: what it answers is what the plain SQL that operators have answers on the same tables."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import report_service_pb2 as pb
from keyturn.v1 import routing_service_pb2 as routing
from keyturn.v1 import user_service_pb2 as users_pb
from tests.factories import Connection, Factory
from tests.keys.test_envelope import legacy
from tests.refusals import contents, refused
from tests.routing.oracle import MAY_BRING_KEYS, MODES
from tests.support import MASTER_KEY, Sidecar, method_of
from tests.test_bad_input import Case
from tests.test_docs import OPERATING, blocks, section
from tests.test_users import UNICODE_IDS

SUCCESS = routing.OUTCOME_SUCCESS
PROVIDER, SERVICE_TYPE = pb.USAGE_GROUPING_PROVIDER, pb.USAGE_GROUPING_SERVICE_TYPE
NOTHING = pb.UsageTotals()

# As operators have them, for these tables as other products make them. Not a letter is ours.
CONFIGURATION = """
SELECT key, is_enabled, name, description
  FROM feature_flags
 WHERE category = 'byok'
 ORDER BY sort_order;
"""
OWN_KEY_USAGE = """
SELECT provider,
       COUNT(*) AS requests,
       SUM(total_tokens) AS tokens,
       SUM(estimated_cost_cents) / 100.0 AS cost_usd
  FROM api_key_usage
 WHERE created_at > NOW() - INTERVAL '30 days'
 GROUP BY provider
 ORDER BY requests DESC;
"""
CREDIT_USAGE = """
SELECT service_type,
       COUNT(*) AS requests,
       SUM(cost_cents) / 100.0 AS cost_usd
  FROM credit_transactions
 WHERE transaction_type = 'deduction'
   AND created_at > NOW() - INTERVAL '30 days'
 GROUP BY service_type
 ORDER BY cost_usd DESC;
"""
OWN_KEY_PERCENT = """
WITH own_key AS (
    SELECT COUNT(*) AS requests FROM api_key_usage
     WHERE created_at > NOW() - INTERVAL '30 days'
), internal AS (
    SELECT COUNT(*) AS requests FROM credit_transactions
     WHERE transaction_type = 'deduction' AND created_at > NOW() - INTERVAL '30 days'
)
SELECT own_key.requests AS own_key_requests,
       internal.requests AS internal_requests,
       ROUND(100.0 * own_key.requests / NULLIF(own_key.requests + internal.requests, 0), 2) AS own_key_percent
  FROM own_key, internal;
"""
WITHOUT_ACTIVE_KEY = """
SELECT u.id, u.email, u.subscription_tier
  FROM users u
  LEFT JOIN user_api_keys k ON k.user_id = u.id AND k.is_active = true
 WHERE u.subscription_tier IN ('premium', 'lifetime')
   AND k.user_id IS NULL;
"""
ADOPTION = """
SELECT COUNT(DISTINCT u.id) AS eligible_users,
       COUNT(DISTINCT k.user_id) AS users_with_keys,
       ROUND(100.0 * COUNT(DISTINCT k.user_id) / NULLIF(COUNT(DISTINCT u.id), 0), 2) AS adoption_percent
  FROM users u
  LEFT JOIN user_api_keys k ON k.user_id = u.id AND k.is_active = true
 WHERE u.subscription_tier IN ('premium', 'lifetime');
"""
QUERIES = (CONFIGURATION, OWN_KEY_USAGE, CREDIT_USAGE, OWN_KEY_PERCENT, WITHOUT_ACTIVE_KEY, ADOPTION)


def test_the_page_for_operators_has_these_very_queries() -> None:
    shown = blocks(section(OPERATING, "Reports in plain SQL"), "sql")
    assert shown == [query.lstrip("\n") for query in QUERIES]


async def split(sidecar: Sidecar, **fields: Any) -> pb.GetUsageSplitResponse:
    answer: pb.GetUsageSplitResponse = await sidecar.call("GetUsageSplit", pb.GetUsageSplitRequest(**fields))
    return answer


async def adoption(sidecar: Sidecar) -> pb.GetAdoptionResponse:
    answer: pb.GetAdoptionResponse = await sidecar.call("GetAdoption", pb.GetAdoptionRequest())
    return answer


async def without_keys(sidecar: Sidecar, size: int = 0) -> Sequence[pb.UserWithoutKeys]:
    """All pages together; what they say of the whole list must hold on each."""
    found: list[pb.UserWithoutKeys] = []
    told: set[tuple[int, int]] = set()
    token = ""
    while True:
        request = pb.ListUsersWithoutKeysRequest(page_size=size, page_token=token)
        answer = await sidecar.call("ListUsersWithoutKeys", request)
        found += answer.users
        told.add((answer.total_count, answer.without_active_key_count))
        if not (token := answer.next_page_token):
            break
    assert told == {(len(found), sum(one.reason == policy.DENIAL_REASON_BYOK_REQUIRED for one in found))}
    return found


async def traffic(sidecar: Sidecar, make: Factory, sql: Connection) -> None:
    """Requests of every sort, over the days: by own keys and by credits, some of them long ago."""
    owner, other = await make.user(), await make.user("lifetime")
    payer = await make.user("free", micros=10**8)
    for provider in ("openai", "anthropic", "mistral"):
        await make.key(owner, provider)
    await make.key(other, "openai")
    usage = routing.Usage(input_tokens=1_000, output_tokens=234)
    asked = [
        *((owner, provider, "copilot") for provider in ("openai", "anthropic", "mistral") for _ in range(4)),
        *((other, "openai", "") for _ in range(5)),
        *((payer, "openai", service) for service in ("copilot", "agents", "agents", "", "embeddings") * 3),
        *((payer, "anthropic", "agents") for _ in range(4)),
    ]
    for index, (user, provider, service_type) in enumerate(asked):
        decision = await sidecar.decide(user, provider, service_type=service_type, cost_micros=50)
        outcome = (SUCCESS, SUCCESS, routing.OUTCOME_PROVIDER_ERROR, routing.OUTCOME_TIMEOUT)[index % 4]
        said: tuple[dict[str, Any], ...] = (
            {"usage": usage, "cost_micros": 3 * index + 1},
            {"cost_micros": index},
            {},
            {"usage": usage},
        )
        await sidecar.record(decision, outcome, **said[index % 4])
    for table in ("api_key_usage", "credit_transactions"):
        # The longest ago is out of the 30 days.
        await sql.execute(
            f"UPDATE {table} t SET created_at = now() - n.n % 8 * interval '5 days 7 hours'"
            f" FROM (SELECT id, row_number() OVER (ORDER BY id) AS n FROM {table}) n WHERE n.id = t.id"
        )


def by_group(rows: Sequence[pb.UsageRow], payer: str) -> dict[str, tuple[int, int, int]]:
    """Requests, tokens and cost of the groups that `payer` paid for anything in."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for row in rows:
        totals = getattr(row, payer)
        for place, value in enumerate((totals.requests, totals.total_tokens, totals.cost_micros)):
            sums[row.group][place] += value
    return {group: (one[0], one[1], one[2]) for group, one in sums.items() if one[0]}


def micros(usd: Any) -> int:
    """Dollars as a query has them, NULL for none that are known."""
    return round((usd or 0) * 1_000_000)


# -- the plain SQL, and the same by RPC ---------------------------------------------------------------


async def test_the_configuration_in_sql_is_the_mode_in_force(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    user = await make.user()
    for (enabled, only, credits_first), mode in MODES.items():
        for key, value in (
            ("byok_enabled", enabled),
            ("byok_only_mode", only),
            ("byok_uses_internal_credits", credits_first),
        ):
            changed = "true" if value else "false"
            await sql.execute(f"UPDATE feature_flags SET is_enabled = {changed} WHERE key = '{key}'")
        rows = await sql.fetch(CONFIGURATION)
        assert [row["key"] for row in rows] == [
            "byok_enabled", "byok_uses_internal_credits", "byok_only_mode",
        ]  # fmt: skip
        assert [row["is_enabled"] for row in rows] == [enabled, credits_first, only]
        assert all(row["name"] and row["description"] for row in rows)
        page = await (await start_sidecar()).call(
            "GetUserSettings", users_pb.GetUserSettingsRequest(user_id=user)
        )
        assert policy.Mode.Name(page.mode) == f"MODE_{mode.name}"


async def test_own_key_usage_in_sql_is_that_of_the_split(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    await traffic(sidecar, make, sql)
    rows = await sql.fetch(OWN_KEY_USAGE)
    expected = {
        row["provider"]: (row["requests"], row["tokens"] or 0, micros(row["cost_usd"])) for row in rows
    }
    assert expected.keys() == {"openai", "anthropic", "mistral"}
    assert all(cost for _, _, cost in expected.values())
    assert await sql.fetchval("SELECT count(*) FROM api_key_usage") > sum(one[0] for one in expected.values())
    for fields in ({}, {"grouping": PROVIDER}):
        answer = await split(sidecar, **fields)
        assert by_group(answer.rows, "own_key") == expected
        assert [answer.own_key.requests, answer.own_key.total_tokens, answer.own_key.cost_micros] == [
            sum(column) for column in zip(*expected.values(), strict=True)
        ]


async def test_credit_usage_in_sql_is_that_of_the_split(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    await traffic(sidecar, make, sql)
    rows = await sql.fetch(CREDIT_USAGE)
    expected = {row["service_type"]: (row["requests"], micros(row["cost_usd"])) for row in rows}
    assert expected.keys() == {"copilot", "agents", "embeddings", ""}
    answer = await split(sidecar, grouping=SERVICE_TYPE)
    credits_paid = by_group(answer.rows, "credits")
    assert {group: (one[0], one[2]) for group, one in credits_paid.items()} == expected
    assert (answer.credits.requests, answer.credits.cost_micros) == (
        sum(requests for requests, _ in expected.values()),
        sum(cost for _, cost in expected.values()),
    )


async def test_the_percentage_in_sql_is_that_of_the_split(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    await traffic(sidecar, make, sql)
    row = await sql.fetchrow(OWN_KEY_PERCENT)
    assert row is not None
    for grouping in (PROVIDER, SERVICE_TYPE):
        answer = await split(sidecar, grouping=grouping)
        assert (answer.own_key.requests, answer.credits.requests) == (
            row["own_key_requests"],
            row["internal_requests"],
        )
        assert round(answer.own_key_percent, 2) == float(row["own_key_percent"])
    assert 0 < answer.own_key_percent < 100


KEYS: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "inactive": [{"is_active": False}],
    "inactive and invalid": [{"is_active": False, "is_valid": False}],
    "invalid": [{"is_valid": False}],
    "invalid twice": [{"is_valid": False}, {"is_valid": False}],
    "inactive, and an invalid one": [{"is_active": False}, {"is_valid": False}],
    "active": [{}],
    "active, and an invalid one": [{"is_valid": False}, {}],
    "active, and an inactive one": [{"is_active": False}, {}],
}
REFUSED = {"invalid", "invalid twice", "inactive, and an invalid one"}
NO_ACTIVE = {"none", "inactive", "inactive and invalid"}


async def people(make: Factory) -> dict[str, tuple[str, str]]:
    """Users of every tier with every sort of keys; by id, their tier and what keys they have."""
    made = {}
    for tier in ("community", "free", "subscriber", "premium", "lifetime", "platinum"):
        for keys, columns in KEYS.items():
            user = await make.user(tier)
            made[user] = (tier, keys)
            for each in columns:
                await make.key(user, **each)
    return made


async def test_users_without_an_active_key_in_sql_are_those_of_the_list(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    made = await people(make)
    rows = {tuple(row) for row in await sql.fetch(WITHOUT_ACTIVE_KEY)}
    assert {row[0] for row in rows} == {
        user for user, (tier, keys) in made.items() if tier in ("premium", "lifetime") and keys in NO_ACTIVE
    }
    found = await without_keys(sidecar)
    told = {
        (one.user_id, one.email, one.tier)
        for one in found
        if one.reason == policy.DENIAL_REASON_BYOK_REQUIRED
    }
    assert told == rows
    assert all("@example.com" in one.email for one in found)
    assert {one.user_id for one in found if one.reason == policy.DENIAL_REASON_KEY_UNUSABLE} == {
        user for user, (tier, keys) in made.items() if tier in ("premium", "lifetime") and keys in REFUSED
    }


async def test_adoption_in_sql_is_that_of_the_report(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    await people(make)
    row = await sql.fetchrow(ADOPTION)
    assert row is not None
    answer = await adoption(sidecar)
    assert (answer.eligible_users, answer.users_with_keys) == (row["eligible_users"], row["users_with_keys"])
    assert round(answer.adoption_percent, 2) == float(row["adoption_percent"])
    assert (answer.eligible_users, answer.users_with_keys) == (18, 12)
    assert [(tier.tier, tier.is_eligible, tier.users, tier.users_with_keys) for tier in answer.tiers] == [
        ("lifetime", True, 9, 6),
        ("premium", True, 9, 6),
        ("subscriber", False, 9, 6),
        ("free", False, 9, 6),
        ("community", False, 9, 6),
        ("platinum", False, 9, 6),
    ]


async def test_rows_that_products_insert_with_these_columns_alone_are_taken(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    await sql.execute(
        "INSERT INTO users (id, email, subscription_tier) VALUES ('u1', 'u1@example.com', 'premium')"
    )
    await sql.execute(
        "INSERT INTO feature_flags (key, is_enabled, name, description, category, sort_order)"
        " VALUES ('dark_mode', true, 'Dark mode', 'Of the product', 'appearance', 5)"
    )
    for _ in range(2):
        await sql.execute(
            "INSERT INTO user_api_keys (user_id, provider, encrypted_key, is_active)"
            " VALUES ('u1', 'openai', $1, true) ON CONFLICT DO NOTHING",
            legacy(b"sk-of-the-node-gateway", raw_key=bytes.fromhex(MASTER_KEY)),
        )
    sidecar: Sidecar = await start_sidecar()
    decision = await sidecar.decide("u1", key_delivery=routing.KEY_DELIVERY_INLINE)
    assert decision.key.secret == "sk-of-the-node-gateway"
    assert (await adoption(sidecar)).users_with_keys == 1
    assert list(await without_keys(sidecar)) == []


# -- the usage split ----------------------------------------------------------------------------------


async def test_without_usage_the_split_is_empty(sidecar: Sidecar, make: Factory) -> None:
    await make.user(micros=1_000)
    before = datetime.now(UTC)
    answer = await split(sidecar)
    assert not answer.rows
    assert (answer.own_key, answer.credits, answer.own_key_percent) == (NOTHING, NOTHING, 0)
    end = answer.end_time.ToDatetime(UTC)
    assert before <= end <= datetime.now(UTC)
    assert end - answer.start_time.ToDatetime(UTC) == timedelta(days=30)


async def test_days_are_those_of_utc_and_the_end_is_outside(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    await sql.execute("SET timezone = 'Asia/Tokyo'")
    owner, payer = await make.user(), await make.user("free", micros=1_000)
    await make.key(owner)
    moments = (
        "2026-01-30 23:59:59.999999+00",
        "2026-01-31 00:00:00+00",
        "2026-01-31 23:59:59.999999+00",
        "2026-02-01 00:00:00+00",
    )
    for user, table in ((owner, "api_key_usage"), (payer, "credit_transactions")):
        for at in moments:
            recorded = await sidecar.record(await sidecar.decide(user, cost_micros=5), SUCCESS, cost_micros=5)
            await sql.execute(f"UPDATE {table} SET created_at = '{at}' WHERE id = '{recorded.record_id}'")

    async def days(start: str, end: str) -> list[tuple[str, int, int]]:
        window = {"start_time": at_time(start), "end_time": at_time(end)}
        answer = await split(sidecar, **window)
        assert (answer.start_time, answer.end_time) == tuple(window.values())
        return [(row.day, row.own_key.requests, row.credits.requests) for row in answer.rows]

    assert await days("2026-01-01", "2026-03-01") == [
        ("2026-01-30", 1, 1), ("2026-01-31", 2, 2), ("2026-02-01", 1, 1),
    ]  # fmt: skip
    assert await days("2026-01-31", "2026-02-01") == [("2026-01-31", 2, 2)]
    assert await days("2026-01-31T00:00:00.000001", "2026-02-01T00:00:00.000001") == [
        ("2026-01-31", 1, 1), ("2026-02-01", 1, 1),
    ]  # fmt: skip


def at_time(text: str) -> Timestamp:
    moment = Timestamp()
    moment.FromDatetime(datetime.fromisoformat(text))
    return moment


def ago(**span: float) -> Timestamp:
    moment = Timestamp()
    moment.FromDatetime(datetime.now(UTC) - timedelta(**span))
    return moment


async def test_a_window_may_have_one_end_alone(sidecar: Sidecar, make: Factory, sql: Connection) -> None:
    owner = await make.user()
    await make.key(owner)
    for days in (1, 29, 31, 50, 100):
        recorded = await sidecar.record(await sidecar.decide(owner), SUCCESS)
        await sql.execute(
            f"UPDATE api_key_usage SET created_at = now() - interval '{days} days'"
            f" WHERE id = '{recorded.record_id}'"
        )
    assert (await split(sidecar)).own_key.requests == 2
    assert (await split(sidecar, start_time=ago(days=60))).own_key.requests == 4
    assert (await split(sidecar, end_time=ago(days=20))).own_key.requests == 2
    year = await split(sidecar, start_time=ago(days=365, hours=23, minutes=30))
    assert year.own_key.requests == 5
    at_most = {"start_time": at_time("2024-01-01"), "end_time": at_time("2025-01-01")}
    assert (await split(sidecar, **at_most)).own_key == NOTHING


async def test_rows_come_by_day_and_group_with_both_payers_side_by_side(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    await traffic(sidecar, make, sql)
    for grouping, column in ((PROVIDER, "provider"), (SERVICE_TYPE, "service_type")):
        answer = await split(sidecar, grouping=grouping)
        places = [(row.day, row.group) for row in answer.rows]
        assert places == sorted(set(places))
        expected = await sql.fetch(
            f"SELECT (created_at AT TIME ZONE 'UTC')::date::text AS day, {column} AS name, sum(own) AS own,"
            " sum(1 - own) AS credits, coalesce(sum(total_tokens * own), 0) AS own_tokens,"
            " coalesce(sum(total_tokens * (1 - own)), 0) AS tokens, coalesce(sum(micros), 0) AS micros FROM ("
            f" SELECT created_at, {column}, 1 AS own, total_tokens, cost_micros AS micros FROM api_key_usage"
            f" UNION ALL SELECT created_at, {column}, 0, total_tokens, -amount_micros"
            " FROM credit_transactions WHERE transaction_type = 'deduction') r"
            " WHERE created_at > now() - interval '30 days' GROUP BY 1, 2"
        )
        assert [
            (
                row.day, row.group, row.own_key.requests, row.credits.requests, row.own_key.total_tokens,
                row.credits.total_tokens, row.own_key.cost_micros + row.credits.cost_micros,
            )
            for row in answer.rows
        ] == sorted(tuple(row) for row in expected)  # fmt: skip
        assert any(row.own_key.requests and row.credits.requests for row in answer.rows)


async def test_beyond_the_hundred_largest_groups_the_rest_is_one(sidecar: Sidecar, make: Factory) -> None:
    payer, owner = await make.user("free", micros=10**6), await make.user()
    await make.key(owner)

    async def use(user: str, names: Sequence[str]) -> None:
        asked = [
            routing.DecideRequest(user_id=user, provider="openai", service_type=name, cost_micros=1)
            for name in names
        ]
        decided = await sidecar.call("BatchDecide", routing.BatchDecideRequest(requests=asked))
        settles = [
            {"key_handle": one.response.key.handle}
            if one.response.HasField("key")
            else {"credit_ticket": one.response.ticket.ticket}
            for one in decided.results
        ]
        reports = [routing.RecordRequest(outcome=SUCCESS, cost_micros=1, **one) for one in settles]
        await sidecar.call("BatchRecord", routing.BatchRecordRequest(requests=reports))

    large = [f"large-{index:03}" for index in range(99)]
    await use(payer, [*large, "shared"])
    await use(owner, [*large, "shared"])
    await use(payer, [f"small-{index:03}" for index in range(60)])
    await use(owner, [f"small-{index:03}" for index in range(30, 90)] + ["small-040"])
    answer = await split(sidecar, grouping=SERVICE_TYPE)
    own_key, paid = by_group(answer.rows, "own_key"), by_group(answer.rows, "credits")
    # Of the small ones one has three requests; among those with two the names decide.
    kept = {*large, "small-040"}
    assert own_key.keys() == paid.keys() == {*kept, "(other)"}
    assert (paid["(other)"][0], own_key["(other)"][0]) == (60, 60)
    assert (answer.credits.requests, answer.own_key.requests) == (160, 161)
    assert len((await split(sidecar)).rows) == 1


async def test_sums_beyond_64_bits_stop_at_the_limit(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    owner = await make.user()
    await make.key(owner)
    for _ in range(3):
        await sidecar.record(await sidecar.decide(owner), SUCCESS)
    await sql.execute(f"UPDATE api_key_usage SET cost_micros = {2**63 - 1}, total_tokens = {2**62}")
    answer = await split(sidecar)
    assert answer.own_key == answer.rows[0].own_key
    assert (answer.own_key.cost_micros, answer.own_key.total_tokens) == (2**63 - 1, 2**63 - 1)


def wrong_time(field: str) -> list[Case]:
    """Times that are none, and times out of range."""
    moments = (
        Timestamp(seconds=-1),
        Timestamp(seconds=253_402_300_800),
        Timestamp(seconds=2**63 - 1),
        Timestamp(seconds=-(2**63)),
        Timestamp(seconds=1, nanos=-1),
        Timestamp(seconds=1, nanos=10**9),
    )
    return [({field: moment}, field, "A time from 1970-01-01 to 9999-12-31.") for moment in moments]


BAD_SPLITS: list[Case] = [
    *wrong_time("start_time"),
    *wrong_time("end_time"),
    ({"start_time": at_time("2999-01-01")}, "end_time", "After start_time."),
    (
        {"start_time": at_time("2026-01-01"), "end_time": at_time("2026-01-01")},
        "end_time",
        "After start_time.",
    ),
    (
        {"start_time": at_time("2026-01-02"), "end_time": at_time("2026-01-01")},
        "end_time",
        "After start_time.",
    ),
    ({"start_time": ago(days=366, minutes=1)}, "end_time", "At most 366 days after start_time."),
    (
        {"start_time": at_time("2024-01-01"), "end_time": at_time("2025-01-01T00:00:00.000001")},
        "end_time",
        "At most 366 days after start_time.",
    ),
    ({"grouping": 3}, "grouping", "Unknown value 3."),
    ({"grouping": -1}, "grouping", "Unknown value -1."),
]


async def test_a_split_that_breaks_a_limit_is_refused_by_name(
    sidecar: Sidecar, subtests: pytest.Subtests
) -> None:
    for fields, field, sentence in BAD_SPLITS:
        with subtests.test(repr(fields)):
            refusal = await refused(sidecar, "GetUsageSplit", pb.GetUsageSplitRequest(**fields))
            refusal.check_field(field, sentence)
    wrong: dict[str, Any] = {
        "start_time": Timestamp(seconds=-1),
        "end_time": Timestamp(nanos=-1),
        "grouping": 9,
    }
    refusal = await refused(sidecar, "GetUsageSplit", pb.GetUsageSplitRequest(**wrong))
    assert set(refusal.fields) == {"start_time", "end_time", "grouping"}
    # The oldest window there is.
    assert (await split(sidecar, end_time=Timestamp(nanos=1_000))).end_time.nanos == 1_000


# -- users without keys, and adoption -----------------------------------------------------------------


async def test_the_users_listed_are_those_whom_byok_only_denies(
    start_sidecar: Callable[..., Any], make: Factory
) -> None:
    made = await people(make)
    await make.flags(byok_only_mode=True)
    sidecar: Sidecar = await start_sidecar()
    listed = {one.user_id: one.reason for one in await without_keys(sidecar)}
    for user, (tier, keys) in made.items():
        decided = await sidecar.decide(user)
        if tier not in ("premium", "lifetime"):
            assert decided.denial.reason == policy.DENIAL_REASON_TIER_NOT_ELIGIBLE
            assert user not in listed
        else:
            assert decided.denial.reason == listed.get(user, 0), keys


async def test_eligibility_is_that_of_the_policy(
    sidecar: Sidecar, make: Factory, sql: Connection, subtests: pytest.Subtests
) -> None:
    tiers = ("community", "free", "subscriber", "premium", "lifetime", "platinum")
    users = {tier: await make.user(tier) for tier in tiers}
    minima = [
        ("UPDATE feature_flags SET min_tier = $1 WHERE key = 'byok_enabled'", name, expected)
        for name, expected in MAY_BRING_KEYS.items()
    ]
    no_row = ("DELETE FROM feature_flags WHERE key = $1", "byok_enabled", MAY_BRING_KEYS["premium"])
    no_minimum = (
        "UPDATE feature_flags SET min_tier = NULL WHERE key = $1", "byok_enabled", MAY_BRING_KEYS["premium"],
    )  # fmt: skip
    for change, value, expected in (*minima, no_minimum, no_row):
        with subtests.test(f"{change} {value}"):
            await sql.execute(change, value)
            # Read from the database, not from the cache: there is nothing to wait for.
            listed = await without_keys(sidecar)
            assert {one.user_id for one in listed} == {users[tier] for tier in expected}
            report = await adoption(sidecar)
            assert {tier.tier for tier in report.tiers if tier.is_eligible} == expected
            assert [tier.tier for tier in report.tiers] == [
                "lifetime", "premium", "subscriber", "free", "community", "platinum",
            ]  # fmt: skip
            assert report.eligible_users == len(expected)


async def test_without_users_there_is_nothing_to_report(sidecar: Sidecar) -> None:
    assert list(await without_keys(sidecar)) == []
    answer = await adoption(sidecar)
    assert (answer.eligible_users, answer.users_with_keys, answer.adoption_percent) == (0, 0, 0)
    assert not answer.tiers


async def test_pages_of_users_come_to_the_whole_list(
    sidecar: Sidecar, make: Factory, sql: Connection, subtests: pytest.Subtests
) -> None:
    for name in UNICODE_IDS:
        await make.user(name=name)
    await sql.execute("INSERT INTO users (id, subscription_tier) VALUES ('nobody told', 'lifetime')")
    whole = list(await without_keys(sidecar))
    assert {one.user_id for one in whole} == {*UNICODE_IDS, "nobody told"}
    assert [one.email for one in whole if one.user_id == "nobody told"] == [""]
    ordered = await sql.fetch("SELECT id FROM users ORDER BY id")
    assert [one.user_id for one in whole] == [row["id"] for row in ordered]
    for size in (1, 2, 3, len(whole), 1000):
        with subtests.test(str(size)):
            assert list(await without_keys(sidecar, size)) == whole


async def test_a_list_of_users_that_breaks_a_limit_is_refused_by_name(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    await make.user()
    await make.user()
    before = await contents(sql)
    for size in (-1, 1001):
        request = pb.ListUsersWithoutKeysRequest(page_size=size)
        refusal = await refused(sidecar, "ListUsersWithoutKeys", request)
        refusal.check_field("page_size", f"From 1 to 1000; this is {size}.")
    first = await sidecar.call("ListUsersWithoutKeys", pb.ListUsersWithoutKeysRequest(page_size=1))
    for token in (first.next_page_token[:-4], "x", "ktt1_x"):
        request = pb.ListUsersWithoutKeysRequest(page_token=token)
        refusal = await refused(sidecar, "ListUsersWithoutKeys", request)
        refusal.check(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_TOKEN", "BadRequest")
        assert list(refusal.fields) == ["page_token"]
    assert await contents(sql) == before


# -- long reports -------------------------------------------------------------------------------------


@asynccontextmanager
async def usage_behind(sql: Connection, waiting: str) -> AsyncIterator[None]:
    """To read any use of an own key takes as long as `waiting`, which is plpgsql."""
    await sql.execute(
        "CREATE SEQUENCE opened; ALTER TABLE api_key_usage RENAME TO uses;"
        "CREATE FUNCTION waited() RETURNS boolean LANGUAGE plpgsql"
        f" AS $$ BEGIN {waiting} RETURN true; END $$;"
        "CREATE VIEW api_key_usage AS SELECT u.* FROM (SELECT waited() AS w OFFSET 0) w, uses u WHERE w.w"
    )
    try:
        yield
    finally:
        await sql.execute(
            "DROP VIEW api_key_usage; ALTER TABLE uses RENAME TO api_key_usage;"
            "DROP FUNCTION waited(); DROP SEQUENCE opened"
        )


async def one_use(sidecar: Sidecar, make: Factory) -> None:
    owner = await make.user()
    await make.key(owner)
    await sidecar.record(await sidecar.decide(owner), SUCCESS)


async def test_a_report_may_take_longer_than_other_statements(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    sidecar: Sidecar = await start_sidecar(statement_timeout=1)
    await one_use(sidecar, make)
    # Longer than the server's patience, and than the connection's own of a second more.
    async with usage_behind(sql, "PERFORM pg_sleep(2.5);"):
        assert (await split(sidecar)).own_key.requests == 1


async def test_reports_leave_the_connections_to_decisions(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    sidecar: Sidecar = await start_sidecar(database_connections=2, connect_timeout=1)
    await one_use(sidecar, make)
    payer = await make.user("free", micros=1_000)
    # A sequence is seen as it is, also by a transaction that sees everything else as it was.
    waiting = "WHILE NOT (SELECT is_called FROM opened) LOOP PERFORM pg_sleep(0.01); END LOOP;"
    async with usage_behind(sql, waiting):
        reports = [asyncio.ensure_future(split(sidecar)) for _ in range(6)]
        for _ in range(3):
            assert (await sidecar.decide(payer, cost_micros=1)).WhichOneof("route") == "ticket"
            await asyncio.sleep(0.5)
        await sql.execute("SELECT nextval('opened')")
        assert {answer.own_key.requests for answer in await asyncio.gather(*reports)} == {1}


async def test_a_report_that_nobody_waits_for_ends(sidecar: Sidecar, make: Factory, sql: Connection) -> None:
    await one_use(sidecar, make)
    async with usage_behind(sql, "PERFORM pg_sleep(50);"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await method_of(sidecar.channel, "GetUsageSplit")(pb.GetUsageSplitRequest(), timeout=0.5)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        async with asyncio.timeout(20):
            assert (await adoption(sidecar)).users_with_keys == 1


async def test_a_report_changes_nothing(sidecar: Sidecar, make: Factory, sql: Connection) -> None:
    await traffic(sidecar, make, sql)
    await people(make)
    before = await contents(sql)
    await split(sidecar)
    await without_keys(sidecar)
    await adoption(sidecar)
    assert await contents(sql) == before
