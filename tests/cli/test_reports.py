"""`keyturn reports`, against a running sidecar."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

from keyturn.v1 import routing_service_pb2 as pb
from tests.cli.command import answered, ask, check_fault, rows_of, told
from tests.factories import Connection, Factory
from tests.support import Sidecar


async def traffic(sidecar: Sidecar, make: Factory) -> None:
    """Two requests that credits pay, $0.30 in all, and one that an own key pays, of 13 tokens."""
    credited, keyed = await make.user(micros=1_000_000), await make.user()
    await make.key(keyed, "anthropic")
    for micros in (100_000, 200_000):
        decision = await sidecar.decide(credited, service_type="copilot", cost_micros=micros)
        await sidecar.record(decision, pb.OUTCOME_SUCCESS, cost_micros=micros)
    decision = await sidecar.decide(keyed, "anthropic", service_type="agents")
    usage = pb.Usage(input_tokens=8, output_tokens=5)
    await sidecar.record(decision, pb.OUTCOME_SUCCESS, usage=usage, cost_micros=50)


async def test_a_split_shows_own_keys_against_credits_by_day_and_in_all(
    sidecar: Sidecar, make: Factory
) -> None:
    await traffic(sidecar, make)
    by_provider, by_service = await asyncio.gather(
        told(sidecar, "reports", "split", "--days", "7"),
        told(sidecar, "reports", "split", "--by", "service-type"),
    )
    head, rows, share = by_provider.split("\n\n")
    assert head.startswith("From 2")
    assert head.endswith(" UTC")
    headings, anthropic, openai, total = rows_of(rows)
    assert headings[:3] == ["DAY", "PROVIDER", "OWN REQUESTS"]
    assert anthropic[1:] == ["anthropic", "1", "13", "$0.00005", "0", "0", "$0.00"]
    assert openai[1:] == ["openai", "0", "0", "$0.00", "2", "0", "$0.30"]
    assert total == ["total", "1", "13", "$0.00005", "2", "0", "$0.30"]
    assert share == "Own keys paid for 33.3% of the requests.\n"
    assert [row[1] for row in rows_of(by_service.split("\n\n")[1])][:3] == [
        "SERVICE TYPE",
        "agents",
        "copilot",
    ]


async def test_a_split_takes_whole_days_in_utc(sidecar: Sidecar, make: Factory, sql: Connection) -> None:
    await traffic(sidecar, make)
    today = datetime.now(UTC).date()
    yesterday = str(today - timedelta(days=1))
    now, before = await asyncio.gather(
        answered(sidecar, "reports", "split", "--from", str(today)),
        answered(sidecar, "reports", "split", "--from", "2020-02-01", "--to", "2020-02-29"),
    )
    assert now["credits"]["requests"] in {"2", "0"}, "0 just after midnight"
    assert before["startTime"] == "2020-02-01T00:00:00Z"
    assert before["endTime"] == "2020-03-01T00:00:00Z"
    assert before["rows"] == []
    said = await told(sidecar, "reports", "split", "--from", "2020-02-01", "--to", "2020-02-29")
    assert "No recorded requests." in said
    assert yesterday not in said


async def test_a_split_may_be_larger_than_grpc_takes_by_default(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    await traffic(sidecar, make)
    columns = await sql.fetch(
        "SELECT column_name FROM information_schema.columns "
        "WHERE table_name = 'api_key_usage' AND is_generated = 'NEVER'"
    )
    changed = {
        "id": "gen_random_uuid()",
        "submission_id": "gen_random_uuid()",
        "service_type": "repeat('漢', 62) || kind",
        "created_at": "created_at - make_interval(days => day)",
    }
    names = [row["column_name"] for row in columns]
    await sql.execute(
        f"INSERT INTO api_key_usage ({', '.join(names)}) "
        f"SELECT {', '.join(changed.get(name, name) for name in names)} "
        "FROM api_key_usage, generate_series(1, 250) AS day, generate_series(1, 90) AS kind"
    )
    answer = await answered(sidecar, "reports", "split", "--by", "service-type", "--days", "300")
    assert len(answer["rows"]) >= 250 * 90
    assert sum(len(row["group"].encode()) for row in answer["rows"]) > 4 * 1024 * 1024


async def test_a_split_over_too_long_a_window_is_refused(sidecar: Sidecar) -> None:
    finished = await ask(sidecar, "reports", "split", "--from", "2020-01-01", "--to", "2022-01-01")
    check_fault(finished, 2, "[INVALID_FIELD]")


async def test_users_at_risk_are_counted_and_listed_with_their_email(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    keyless, refused, safe = [await make.user(name=name) for name in ("a-keyless", "b-refused", "c-safe")]
    await make.user("free")
    await make.key(refused, is_valid=False)
    await make.key(safe)
    email = await sql.fetchval("SELECT email FROM users WHERE id = $1", keyless)
    said = await told(sidecar, "reports", "at-risk")
    head, rows = said.split("\n\n")
    assert head.startswith(
        "BYOK_ONLY would lock out 2 eligible users: 1 without an active key, 1 whose keys cannot"
    )
    assert rows_of(rows)[1] == [keyless, email, "premium", "BYOK_REQUIRED"]
    assert rows_of(rows)[2][0] == refused
    assert rows_of(rows)[2][-1] == "KEY_UNUSABLE"
    one = await ask(sidecar, "reports", "at-risk", "--limit", "1")
    assert len(rows_of(one.out.split("\n\n")[1])) == 2
    assert "there are more" in one.err


async def test_json_has_all_users_at_risk_however_many_pages_they_are(
    sidecar: Sidecar, sql: Connection
) -> None:
    await sql.execute(
        "INSERT INTO users (id, email, subscription_tier) "
        "SELECT 'u' || n, '', 'premium' FROM generate_series(1, 1100) AS n"
    )
    answer = await answered(sidecar, "reports", "at-risk")
    assert {user["userId"] for user in answer["users"]} == {f"u{n}" for n in range(1, 1101)}
    assert len(answer["users"]) == 1_100
    assert (answer["totalCount"], answer["nextPageToken"]) == ("1100", "")


async def test_adoption_is_shown_in_all_and_by_tier(sidecar: Sidecar, make: Factory) -> None:
    for tier, has_key in (("premium", True), ("premium", False), ("lifetime", True), ("free", False)):
        user = await make.user(tier)
        if has_key:
            await make.key(user)
    head, rows = (await told(sidecar, "reports", "adoption")).split("\n\n")
    assert rows_of(head) == [["Eligible users", "3"], ["With a key", "2 (66.7%)"]]
    assert ["premium", "yes", "2", "1"] in rows_of(rows)
    assert ["free", "no", "1", "0"] in rows_of(rows)
    answer = await answered(sidecar, "reports", "adoption")
    assert (answer["eligibleUsers"], answer["usersWithKeys"]) == ("3", "2")


async def test_nobody_at_all_is_a_sentence(sidecar: Sidecar) -> None:
    at_risk, adoption = await asyncio.gather(
        told(sidecar, "reports", "at-risk"), told(sidecar, "reports", "adoption")
    )
    assert at_risk.startswith("BYOK_ONLY would lock out 0 eligible users")
    assert "No users." in adoption
