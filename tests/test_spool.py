"""Records while PostgreSQL is away: durable on disk before they are acknowledged, and in the books once."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import stat
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import grpc
import pytest

from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import routing_service_pb2 as pb
from keyturn_server.errors import SpoolCause, SpoolUnavailable
from keyturn_server.store.spool import SPOOL_FILE, Spoolable, SpoolError, SpoolState, open_spool
from tests.factories import Connection, Factory
from tests.invariants import check_invariants
from tests.outages import (
    NOT_SERVING,
    SERVING,
    away,
    becomes,
    drained,
    events,
    health_of,
    remembered,
    rows,
)
from tests.proxy import Proxy
from tests.refusals import Refusal, refused
from tests.support import Fault, eventually, running_sidecar

SUCCESS, SPOOLED, IN_DATABASE = pb.OUTCOME_SUCCESS, pb.DURABILITY_SPOOLED, pb.DURABILITY_DATABASE
CREDITS_ONLY = policy.CONSTRAINT_CREDITS_ONLY
SECRET = "sk-live-canary-7f3a9b2c5d8e1f40"
RECORDED = """
SELECT (SELECT count(*) FROM api_key_usage)
     + (SELECT count(*) FROM credit_holds WHERE state = 'settled')
"""


async def test_a_ticket_is_settled_from_the_spool_once_the_database_is_back(
    spooling: Callable[..., Any], proxy: Proxy, directory: Path, make: Factory, sql: Connection
) -> None:
    sidecar = await spooling()
    user = await make.user(micros=1_000)
    ticket = await sidecar.decide(user, cost_micros=100)
    await away(sidecar, proxy)
    recorded = await sidecar.record(ticket, SUCCESS, cost_micros=40)
    assert (recorded.record_id, recorded.durability) == (ticket.decision_id, SPOOLED)
    assert (recorded.charged_micros, recorded.cost_source) == (40, pb.COST_SOURCE_REPORTED)
    assert (recorded.released_micros, recorded.HasField("balance_micros")) == (0, False)
    assert not recorded.replayed
    assert len(rows(directory)) == 1
    assert await sql.fetchval("SELECT balance_micros FROM credit_accounts") == 1_000

    proxy.come_back()
    await drained(directory)
    account = await sql.fetchrow("SELECT balance_micros, held_micros FROM credit_accounts")
    assert account is not None
    assert tuple(account) == (960, 0)
    again = await sidecar.record(ticket, SUCCESS, cost_micros=40)
    assert (again.replayed, again.durability) == (True, IN_DATABASE)
    assert (again.charged_micros, again.released_micros, again.balance_micros) == (40, 60, 960)


async def test_the_use_of_an_own_key_is_recorded_from_the_spool_as_it_was_reported(
    spooling: Callable[..., Any], proxy: Proxy, directory: Path, make: Factory, sql: Connection
) -> None:
    sidecar = await spooling()
    user = await make.user()
    key_id = await make.key(user)
    fields: dict[str, Any] = {
        "model": "gpt-4o-mini",
        "usage": pb.Usage(input_tokens=1_000, output_tokens=10, cache_read_tokens=5, total_tokens=1_011),
        "endpoint": "/v1/chat/completions",
        "http_status": 200,
        "error_message": "not quite — 日本",
    }
    fields["response_time"] = {"seconds": 1, "nanos": 250_000_000}
    first, second = [await sidecar.decide(user, service_type="copilot") for _ in range(2)]
    straight = await sidecar.record(first, SUCCESS, **fields)
    await away(sidecar, proxy)
    spooled = await sidecar.record(second, SUCCESS, **fields)
    assert (straight.durability, spooled.durability) == (IN_DATABASE, SPOOLED)
    assert (spooled.cost_source, spooled.charged_micros) == (pb.COST_SOURCE_PRICED, 0)
    assert (straight.key_state, spooled.key_state) == (policy.KEY_STATE_USABLE, policy.KEY_STATE_UNSPECIFIED)
    proxy.come_back()
    await drained(directory)
    one, other = [
        {name: value for name, value in row.items() if name not in ("id", "created_at", "submission_id")}
        for row in await sql.fetch("SELECT * FROM api_key_usage ORDER BY id")
    ]
    assert one == other
    assert one["cost_micros"] > 0
    assert await sql.fetchval("SELECT total_requests FROM user_api_keys WHERE id = $1", key_id) == 2


async def test_the_same_record_again_is_a_repeat_and_another_one_is_refused(
    spooling: Callable[..., Any], proxy: Proxy, directory: Path, make: Factory
) -> None:
    sidecar = await spooling()
    user = await make.user(micros=1_000)
    await make.key(user)
    tickets = await sidecar.decide(user, cost_micros=100, constraint=CREDITS_ONLY), await sidecar.decide(user)
    await away(sidecar, proxy)
    for decision in tickets:
        first = await sidecar.record(decision, SUCCESS, cost_micros=40)
        again = await sidecar.record(decision, SUCCESS, cost_micros=40)
        assert (first.replayed, again.replayed) == (False, True)
        assert (again.charged_micros, again.durability) == (first.charged_micros, SPOOLED)
        with pytest.raises(Fault) as caught:
            await sidecar.record(decision, SUCCESS, cost_micros=41)
        Refusal.of(caught.value).check(grpc.StatusCode.ALREADY_EXISTS, "RECORD_CONFLICT")
    assert len(rows(directory)) == 2
    proxy.come_back()
    await drained(directory)


async def test_a_batch_is_spooled_item_by_item(
    spooling: Callable[..., Any], proxy: Proxy, directory: Path, make: Factory, sql: Connection
) -> None:
    sidecar = await spooling()
    user = await make.user(micros=10**9)
    asks = [pb.DecideRequest(user_id=user, provider="openai", cost_micros=10)] * 300
    decided = await sidecar.call("BatchDecide", pb.BatchDecideRequest(requests=asks))
    tickets = [one.response.ticket.ticket for one in decided.results]
    await away(sidecar, proxy)
    records = [pb.RecordRequest(credit_ticket=one, outcome=SUCCESS, cost_micros=1) for one in tickets]
    bad = [pb.RecordRequest(credit_ticket="x", outcome=SUCCESS), pb.RecordRequest(credit_ticket=tickets[0])]
    batch = pb.BatchRecordRequest(requests=[*records, *bad, records[0]])
    results = (await sidecar.call("BatchRecord", batch)).results
    assert {one.response.durability for one in results[:300]} == {SPOOLED}
    assert [Refusal.of(one.status).info.reason for one in results[300:302]] == [
        "INVALID_TOKEN",
        "INVALID_FIELD",
    ]
    assert sorted((results[0].response.replayed, results[302].response.replayed)) == [False, True]
    assert len(rows(directory)) == 300
    proxy.come_back()
    await drained(directory)
    assert await sql.fetchval("SELECT balance_micros FROM credit_accounts") == 10**9 - 300


async def test_what_is_spooled_stays_over_a_restart(
    database: str, proxy: Proxy, directory: Path, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=10**6)
    async with running_sidecar(proxy.dsn(database), spool=directory) as sidecar:
        tickets = [await sidecar.decide(user, cost_micros=10) for _ in range(20)]
        await away(sidecar, proxy)
        for ticket in tickets:
            await sidecar.record(ticket, SUCCESS, cost_micros=1)
    assert len(rows(directory)) == 20
    proxy.come_back()
    async with running_sidecar(proxy.dsn(database), spool=directory) as restarted:
        assert events(restarted, "spool_on")[0]["waiting"] == 20
        await drained(directory)
        assert (await restarted.record(tickets[0], SUCCESS, cost_micros=1)).replayed
    await check_invariants(sql, sidecar.acknowledged)
    assert await sql.fetchval("SELECT balance_micros FROM credit_accounts") == 10**6 - 20


async def test_what_can_be_drained_is_drained_before_the_end(
    database: str, proxy: Proxy, directory: Path, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=10**6)
    async with running_sidecar(proxy.dsn(database), spool=directory) as sidecar:
        tickets = [await sidecar.decide(user, cost_micros=10) for _ in range(500)]
        await away(sidecar, proxy)
        await asyncio.gather(*(sidecar.record(ticket, SUCCESS, cost_micros=1) for ticket in tickets))
        proxy.come_back()
        await becomes(sidecar, "keyturn.database", SERVING)
    assert rows(directory) == []
    await check_invariants(sql, sidecar.acknowledged)


async def test_what_was_committed_and_not_yet_removed_is_not_counted_twice(
    database: str, proxy: Proxy, directory: Path, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=10**6)
    await make.key(user)
    async with running_sidecar(proxy.dsn(database), spool=directory) as sidecar:
        decisions = [await sidecar.decide(user, cost_micros=10, constraint=CREDITS_ONLY) for _ in range(9)]
        decisions += [await sidecar.decide(user) for _ in range(9)]
        await away(sidecar, proxy)
        for decision in decisions:
            await sidecar.record(decision, SUCCESS, cost_micros=1)
    before = directory.with_name("before")
    shutil.copytree(directory, before)
    proxy.come_back()
    async with running_sidecar(proxy.dsn(database), spool=directory):
        await drained(directory)
    recorded = await sql.fetchval(RECORDED)
    shutil.rmtree(directory)
    shutil.move(before, directory)
    async with running_sidecar(proxy.dsn(database), spool=directory) as again:
        await drained(directory)
        assert events(again, "record_set_aside") == []
    assert recorded == await sql.fetchval(RECORDED) == 18
    assert await sql.fetchval("SELECT balance_micros FROM credit_accounts") == 10**6 - 9
    assert await sql.fetchval("SELECT total_requests FROM user_api_keys") == 9
    await check_invariants(sql, sidecar.acknowledged)


async def test_a_record_whose_commit_was_never_answered_is_counted_once(
    spooling: Callable[..., Any], proxy: Proxy, directory: Path, make: Factory, sql: Connection
) -> None:
    sidecar = await spooling()
    user = await make.user(micros=10**6)
    for _ in range(5):
        tickets = [await sidecar.decide(user, cost_micros=10) for _ in range(20)]
        records = [asyncio.create_task(sidecar.record(ticket, SUCCESS, cost_micros=1)) for ticket in tickets]
        await asyncio.sleep(0)
        proxy.go_away()
        assert {one.record_id for one in await asyncio.gather(*records)} == {
            ticket.decision_id for ticket in tickets
        }
        proxy.come_back()
        await drained(directory)
        await becomes(sidecar, "keyturn.database", SERVING)
    assert await sql.fetchval("SELECT balance_micros FROM credit_accounts") == 10**6 - 100


async def test_records_that_the_books_refuse_are_set_aside_and_hold_up_nobody(
    spooling: Callable[..., Any],
    start_sidecar: Callable[..., Any],
    proxy: Proxy,
    directory: Path,
    make: Factory,
    sql: Connection,
) -> None:
    sidecar, elsewhere = await spooling(), await start_sidecar()
    users = [await make.user(micros=1_000) for _ in range(7)]
    tickets = [await sidecar.decide(user, cost_micros=100) for user in users]
    await away(sidecar, proxy)
    for ticket in tickets:
        await sidecar.record(ticket, SUCCESS, cost_micros=40)
    await elsewhere.record(tickets[1], SUCCESS, cost_micros=41)
    await sql.execute("DELETE FROM credit_holds WHERE user_id = $1", users[3])
    await sql.execute("UPDATE credit_accounts SET held_micros = 0 WHERE user_id = $1", users[3])
    with closing(sqlite3.connect(directory / SPOOL_FILE)) as connection:
        connection.execute(
            "UPDATE records SET body = CAST(replace(body, ':40', ':90') AS BLOB) WHERE user_id = ?",
            (users[5],),
        )
        connection.commit()
    sidecar.acknowledged.clear()
    sidecar.acknowledged.extend(tickets[index].decision_id for index in (0, 1, 2, 4, 6))

    proxy.come_back()

    async def are_set_aside() -> bool:
        return {row[3] for row in rows(directory)} == {"conflict", "hold_not_found", "foreign"}

    await eventually(are_set_aside)
    told = {event["user_id"]: event["cause"] for event in events(sidecar, "record_set_aside")}
    assert told == {users[1]: "conflict", users[3]: "hold_not_found", users[5]: "foreign"}
    spent = await sql.fetch("SELECT user_id, 1000 - balance_micros AS micros FROM credit_accounts")
    charged = {row["user_id"]: row["micros"] for row in spent}
    assert [charged[user] for user in users] == [40, 41, 40, 0, 40, 0, 40]


async def test_a_record_that_cannot_be_brought_yet_holds_up_nobody_and_still_comes_first(
    spooling: Callable[..., Any], proxy: Proxy, directory: Path, make: Factory, sql: Connection
) -> None:
    sidecar = await spooling()
    users = [await make.user(micros=1_000) for _ in range(3)]
    tickets = [await sidecar.decide(user, cost_micros=100) for user in users]
    await away(sidecar, proxy)
    for ticket in tickets:
        await sidecar.record(ticket, SUCCESS, cost_micros=40)
    async with sql.transaction():
        await sql.execute("SELECT FROM credit_accounts WHERE user_id = $1 FOR UPDATE", users[0])
        proxy.come_back()

        async def are_drained() -> bool:
            return [row[1] for row in rows(directory)] == users[:1]

        await eventually(are_drained)
        with pytest.raises(Fault) as caught:
            await sidecar.record(tickets[0], SUCCESS, cost_micros=41)
        Refusal.of(caught.value).check(grpc.StatusCode.ALREADY_EXISTS, "RECORD_CONFLICT")
        again = await sidecar.record(tickets[0], SUCCESS, cost_micros=40)
        assert (again.durability, again.replayed) == (SPOOLED, True)
    await drained(directory)
    assert await sql.fetchval("SELECT sum(balance_micros) FROM credit_accounts") == 3_000 - 120


def taken_before(directory: Path, user: str, span: timedelta) -> None:
    """The user's records have been in the spool for so long."""
    with closing(sqlite3.connect(directory / SPOOL_FILE)) as connection:
        micros = span // timedelta(microseconds=1)
        connection.execute("UPDATE records SET taken_at = taken_at - ? WHERE user_id = ?", (micros, user))
        connection.commit()


async def test_a_charge_is_of_the_time_at_which_it_was_acknowledged(
    spooling: Callable[..., Any], proxy: Proxy, directory: Path, make: Factory, sql: Connection
) -> None:
    sidecar = await spooling()
    # How long ago the record was taken, and whether that was after the hold ran out. The last one's clock
    # was behind: nothing is recorded from before there was a hold.
    cases = {
        timedelta(days=10, hours=1): False,
        timedelta(days=9): True,
        timedelta(0): True,
        timedelta(days=90): False,
    }
    users = [await make.user(micros=1_000) for _ in cases]
    tickets = [await sidecar.decide(user, cost_micros=100) for user in users]
    await away(sidecar, proxy)
    for user, ticket, waited in zip(users, tickets, cases, strict=True):
        assert (await sidecar.record(ticket, SUCCESS, cost_micros=40)).durability == SPOOLED
        taken_before(directory, user, waited)
    await sql.execute(
        "UPDATE credit_holds"
        "   SET created_at = now() - interval '11 days', expires_at = now() - interval '10 days'"
    )
    proxy.come_back()
    await drained(directory)
    for user, (waited, is_late) in zip(users, cases.items(), strict=True):
        row = await sql.fetchrow(
            "SELECT t.is_late, h.is_late AS hold_is_late, now() - t.created_at AS since"
            "  FROM credit_transactions t JOIN credit_holds h USING (user_id, id) WHERE user_id = $1",
            user,
        )
        assert row is not None
        assert (row["is_late"], row["hold_is_late"]) == (is_late, is_late)
        since = min(waited, timedelta(days=11))
        assert since <= row["since"] < since + timedelta(minutes=10)
    assert not events(sidecar, "record_set_aside")


async def test_the_use_of_a_key_is_of_the_time_at_which_it_was_acknowledged(
    spooling: Callable[..., Any], proxy: Proxy, directory: Path, make: Factory, sql: Connection
) -> None:
    sidecar = await spooling()
    user = await make.user()
    await make.key(user)
    before, after = await sidecar.decide(user), await sidecar.decide(user)
    await away(sidecar, proxy)
    assert (await sidecar.record(before, SUCCESS)).durability == SPOOLED
    taken_before(directory, user, timedelta(days=10))
    # What another sidecar recorded of the key meanwhile.
    await sql.execute(
        "UPDATE user_api_keys SET last_used_at = now(), last_error_at = now(),"
        " cooldown_until = now() + interval '1 hour'"
    )
    proxy.come_back()
    await drained(directory)
    row = await sql.fetchrow("SELECT is_late, now() - created_at AS since FROM api_key_usage")
    assert row is not None
    assert not row["is_late"]
    assert timedelta(days=10) <= row["since"] < timedelta(days=10, minutes=10)
    key = await sql.fetchrow(
        "SELECT total_requests, now() - last_used_at AS since, cooldown_until IS NOT NULL AS rests"
        "  FROM user_api_keys"
    )
    assert key is not None
    assert (key["total_requests"], key["rests"]) == (1, True)
    assert key["since"] < timedelta(minutes=10)
    # A success of now ends the rest.
    assert (await sidecar.record(after, SUCCESS)).key_state == policy.KEY_STATE_USABLE
    assert await sql.fetchval("SELECT cooldown_until FROM user_api_keys") is None


async def test_a_key_rests_from_when_its_record_was_taken(
    spooling: Callable[..., Any], proxy: Proxy, directory: Path, make: Factory, sql: Connection
) -> None:
    sidecar = await spooling()
    users = [await make.user() for _ in range(2)]
    for user in users:
        await make.key(user)
    decisions = [await sidecar.decide(user) for user in users]
    await away(sidecar, proxy)
    for decision in decisions:
        await sidecar.record(decision, pb.OUTCOME_RATE_LIMITED, retry_after={"seconds": 600})
    for user, seconds in zip(users, (400, 900), strict=True):
        taken_before(directory, user, timedelta(seconds=seconds))
    proxy.come_back()
    await drained(directory)
    left = [
        await sql.fetchval("SELECT cooldown_until - now() FROM user_api_keys WHERE user_id = $1", user)
        for user in users
    ]
    assert timedelta(0) < left[0] <= timedelta(seconds=200)
    assert left[1] is None


async def test_nobody_waits_for_a_disk_that_hangs(directory: Path) -> None:
    told: list[SpoolState] = []
    record = Spoolable(
        id=UUID(int=1),
        user_id="u",
        taken_at=datetime.now(UTC),
        fingerprint=b"f",
        body=b"b",
        signature=b"s",
    )
    answers_again = threading.Event()
    async with open_spool(directory, max_records=10, max_bytes=2**20, on_state=told.append) as spool:
        await spool.put(record)
        hanging = asyncio.create_task(spool._run(lambda connection: answers_again.wait(60)))
        try:
            results = await asyncio.gather(
                spool.find(record.id), spool.put(replace(record, id=UUID(int=2))), return_exceptions=True
            )
            assert [type(one) for one in results] == [SpoolUnavailable, SpoolUnavailable]
            assert (told[-1].cause, told[-1].error) == (SpoolCause.DISK, "TIMEOUT")
        finally:
            answers_again.set()
        await hanging
        assert (await spool.put(replace(record, id=UUID(int=3)))).is_new
        assert await spool.find(record.id) is not None
        await spool.look()
        assert told[-1].cause is None


async def test_another_file_in_the_place_of_the_spool_stops_nothing_but_the_spool(directory: Path) -> None:
    told: list[SpoolState] = []
    async with open_spool(directory, max_records=10, max_bytes=2**20, on_state=told.append) as spool:
        (directory / SPOOL_FILE).rename(directory / "ours")
        with closing(sqlite3.connect(directory / SPOOL_FILE)) as connection:
            connection.execute("PRAGMA user_version = 99")
        await spool.look()  # finds that ours is gone
        await spool.look()
        assert (told[-1].cause, told[-1].error) == (SpoolCause.DISK, "SpoolError")
        (directory / "ours").rename(directory / SPOOL_FILE)
        await spool.look()
        assert told[-1].cause is None


async def test_a_commit_waits_for_the_disk(directory: Path) -> None:
    told: list[SpoolState] = []
    async with open_spool(directory, max_records=10, max_bytes=2**20, on_state=told.append) as spool:
        modes = await spool._run(
            lambda connection: [
                connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")
            ]
        )
    assert modes == ["wal", 2]
    assert {state.cause for state in told} == {None}


async def test_a_file_that_is_taken_away_is_not_written_to_any_more(
    spooling: Callable[..., Any], proxy: Proxy, directory: Path, make: Factory
) -> None:
    sidecar = await spooling()
    user = await make.user(micros=1_000)
    tickets = [await sidecar.decide(user, cost_micros=10) for _ in range(2)]
    await away(sidecar, proxy)
    for path in directory.glob(f"{SPOOL_FILE}*"):
        path.unlink()
    for ticket in tickets:
        assert (await sidecar.record(ticket, SUCCESS, cost_micros=1)).durability == SPOOLED
    assert len(rows(directory)) == 2
    proxy.come_back()
    await drained(directory)


async def test_a_spool_of_another_database_charges_nobody_there(
    database: str, proxy: Proxy, directory: Path, make: Factory, sql: Connection
) -> None:
    user = await make.user()
    await make.key(user)
    async with running_sidecar(proxy.dsn(database), spool=directory) as sidecar:
        decision = await sidecar.decide(user)
        await away(sidecar, proxy)
        await sidecar.record(decision, SUCCESS, cost_micros=1)
    root = await sql.fetchrow("DELETE FROM token_roots RETURNING id, secret, created_at")
    assert root is not None
    proxy.come_back()
    async with running_sidecar(proxy.dsn(database), spool=directory) as other:

        async def is_set_aside() -> bool:
            return bool(events(other, "record_set_aside"))

        await eventually(is_set_aside)
    assert await sql.fetchval(RECORDED) == 0
    await sql.execute("DELETE FROM token_roots")
    await sql.execute("INSERT INTO token_roots (id, secret, created_at) VALUES ($1, $2, $3)", *root)
    async with running_sidecar(proxy.dsn(database), spool=directory):
        await drained(directory)
    assert await sql.fetchval(RECORDED) == 1


async def test_a_full_spool_acknowledges_nothing_and_says_so(
    spooling: Callable[..., Any], proxy: Proxy, directory: Path, make: Factory
) -> None:
    sidecar = await spooling(spool_max_records=3)
    user = await make.user(micros=10**6)
    tickets = [await sidecar.decide(user, cost_micros=10) for _ in range(5)]
    await away(sidecar, proxy)
    for ticket in tickets[:3]:
        assert (await sidecar.record(ticket, SUCCESS)).durability == SPOOLED
    for ticket in tickets[3:]:
        request = pb.RecordRequest(credit_ticket=ticket.ticket.ticket, outcome=SUCCESS)
        refusal = await refused(sidecar, "Record", request)
        refusal.check(grpc.StatusCode.UNAVAILABLE, "SPOOL_UNAVAILABLE", "RetryInfo")
        assert refusal.info.metadata["cause"] == "full"
    assert (await sidecar.record(tickets[0], SUCCESS)).replayed, "what is in it is still known"
    assert await health_of(sidecar, "keyturn.spool") == NOT_SERVING
    assert await health_of(sidecar, "") == SERVING
    proxy.come_back()
    await drained(directory)
    await becomes(sidecar, "keyturn.spool", SERVING)
    for ticket in tickets[3:]:
        assert (await sidecar.record(ticket, SUCCESS)).durability == IN_DATABASE


async def test_a_spool_is_bounded_in_bytes(
    spooling: Callable[..., Any], proxy: Proxy, directory: Path, make: Factory
) -> None:
    limit = 1024 * 1024
    sidecar = await spooling(spool_max_bytes=limit)
    user = await make.user(micros=10**6)
    asks = [pb.DecideRequest(user_id=user, provider="openai", cost_micros=1)] * 500
    tickets = [
        one.response.ticket.ticket
        for _ in range(4)
        for one in (await sidecar.call("BatchDecide", pb.BatchDecideRequest(requests=asks))).results
    ]
    await away(sidecar, proxy)
    text = " ".join(["The provider said this"] * 21)
    results = []
    for start in range(0, 2000, 500):
        items = [
            pb.RecordRequest(credit_ticket=one, outcome=SUCCESS, cost_micros=1, error_message=text)
            for one in tickets[start : start + 500]
        ]
        results += (await sidecar.call("BatchRecord", pb.BatchRecordRequest(requests=items))).results
    taken = [one.response.record_id for one in results if one.HasField("response")]
    assert 0 < len(taken) < 2000
    refusals = [Refusal.of(one.status).info for one in results if one.HasField("status")]
    assert {(one.reason, one.metadata["cause"]) for one in refusals} == {("SPOOL_UNAVAILABLE", "full")}
    assert len(rows(directory)) == len(taken)
    assert (directory / SPOOL_FILE).stat().st_size <= limit * 1.1
    proxy.come_back()
    await drained(directory)


async def test_a_record_that_is_bad_is_refused_and_not_spooled(
    spooling: Callable[..., Any], proxy: Proxy, directory: Path, make: Factory
) -> None:
    sidecar = await spooling()
    ticket = await sidecar.decide(await make.user(micros=1_000), cost_micros=10)
    await away(sidecar, proxy)
    for request, reason in (
        (pb.RecordRequest(credit_ticket="ktt1_x", outcome=SUCCESS), "INVALID_TOKEN"),
        (pb.RecordRequest(credit_ticket=ticket.ticket.ticket), "INVALID_FIELD"),
        (
            pb.RecordRequest(credit_ticket=ticket.ticket.ticket, outcome=SUCCESS, cost_micros=-1),
            "INVALID_FIELD",
        ),
    ):
        refusal = await refused(sidecar, "Record", request)
        assert (refusal.code, refusal.info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    assert rows(directory) == []
    proxy.come_back()


async def test_the_spool_holds_no_secret_and_nothing_that_could_be_redeemed(
    spooling: Callable[..., Any], proxy: Proxy, directory: Path, make: Factory
) -> None:
    sidecar = await spooling()
    users = [await make.user(micros=1_000) for _ in range(2)]
    for user in users:
        await make.key(user, secret=SECRET)
    keys = [await sidecar.decide(user, key_delivery=pb.KEY_DELIVERY_INLINE) for user in users]
    ticket = await sidecar.decide(users[0], cost_micros=10, constraint=CREDITS_ONLY)
    assert keys[0].key.secret == SECRET
    await away(sidecar, proxy)
    said = f"the credential {SECRET[:8]}.{SECRET} and {SECRET} is bad; Bearer {SECRET}"
    for decision in (*keys, ticket):
        await sidecar.record(decision, pb.OUTCOME_PROVIDER_ERROR, error_message=said)
    held = b"".join(path.read_bytes() for path in directory.iterdir())
    assert len(rows(directory)) == 3
    for canary in (SECRET, keys[0].key.handle, ticket.ticket.ticket, "kth1_", "ktt1_"):
        assert canary.encode() not in held
    assert users[0].encode() in held, "the canaries would have been seen"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}
    proxy.come_back()
    await drained(directory)


async def test_a_rejected_key_is_not_handed_out_again_while_its_record_waits(
    spooling: Callable[..., Any], proxy: Proxy, directory: Path, make: Factory, sql: Connection
) -> None:
    sidecar = await spooling()
    user = await make.user()
    good, bad, tired = [await make.key(user, priority=priority) for priority in (3, 1, 2)]
    await remembered(sidecar, make, user)
    decision = await sidecar.decide(user)
    assert decision.key.key_id == str(bad)
    await away(sidecar, proxy)
    await sidecar.record(decision, pb.OUTCOME_AUTH_REJECTED)
    decision = await sidecar.decide(user)
    assert decision.key.key_id == str(tired)
    await sidecar.record(decision, pb.OUTCOME_RATE_LIMITED)
    decision = await sidecar.decide(user)
    assert (decision.key.key_id, decision.degraded) == (str(good), True)
    await sidecar.record(decision, pb.OUTCOME_TIMEOUT)
    assert (await sidecar.decide(user)).key.key_id == str(good)
    proxy.come_back()
    await drained(directory)
    states = await sql.fetch(
        "SELECT id, is_valid, cooldown_until IS NOT NULL AS rests FROM user_api_keys WHERE user_id = $1", user
    )
    assert {row["id"]: (row["is_valid"], row["rests"]) for row in states} == {
        good: (True, False),
        bad: (False, False),
        tired: (True, True),
    }


async def test_a_second_sidecar_on_the_same_spool_is_refused(
    spooling: Callable[..., Any], database: str, directory: Path
) -> None:
    await spooling()
    with pytest.raises(SpoolError, match="another sidecar has its spool there"):
        async with running_sidecar(database, spool=directory):
            pass


async def test_a_spool_that_others_can_enter_or_that_is_none_is_refused(
    database: str, directory: Path
) -> None:
    directory.mkdir(mode=0o700)
    directory.chmod(0o755)
    with pytest.raises(SpoolError, match=f"chmod 700 {directory}"):
        async with running_sidecar(database, spool=directory):
            pass
    directory.chmod(0o700)
    (directory / SPOOL_FILE).write_bytes(b"no database at all" * 100)
    with pytest.raises(SpoolError, match="is no spool, or damaged"):
        async with running_sidecar(database, spool=directory):
            pass


async def test_without_a_spool_a_record_waits_for_the_database(
    start_sidecar: Callable[..., Any], proxy: Proxy, database: str, make: Factory
) -> None:
    sidecar = await start_sidecar(database_url=proxy.dsn(database))
    assert events(sidecar, "spool_off")
    ticket = await sidecar.decide(await make.user(micros=1_000), cost_micros=10)
    await away(sidecar, proxy)
    request = pb.RecordRequest(credit_ticket=ticket.ticket.ticket, outcome=SUCCESS)
    refusal = await refused(sidecar, "Record", request)
    refusal.check(grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE", "RetryInfo")
    proxy.come_back()
