"""`kill -9` of a sidecar at each step of its work, and what a client that asks again finds.

A step is held by what is real: the proxy keeps back what PostgreSQL answers, or a statement waits for a gate.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import pytest

from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import routing_service_pb2 as pb
from tests.factories import Connection, Factory
from tests.faults.conftest import Form
from tests.faults.processes import Place, Process
from tests.gate import gate_before, someone_waits
from tests.invariants import check_invariants
from tests.outages import drained, rows
from tests.proxy import Proxy
from tests.support import Caller, Fault, eventually

SUCCESS, SPOOLED = pb.OUTCOME_SUCCESS, pb.DURABILITY_SPOOLED
CREDITS_ONLY = policy.CONSTRAINT_CREDITS_ONLY
GROUP = 20
END_WHAT_WAITS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
 WHERE datname = current_database() AND wait_event = 'PgSleep'
"""


def asks(user: str, count: int = GROUP, **fields: Any) -> pb.BatchDecideRequest:
    """For holds, each with an id of its own: the same again is the same request."""
    return pb.BatchDecideRequest(
        requests=[
            pb.DecideRequest(
                user_id=user, provider="openai", cost_micros=10, request_id=f"r{number}", **fields
            )
            for number in range(count)
        ]
    )


def records(decided: pb.BatchDecideResponse, outcome: int = SUCCESS) -> pb.BatchRecordRequest:
    """Of all that was decided."""
    return pb.BatchRecordRequest(
        requests=[
            pb.RecordRequest(key_handle=one.response.key.handle, outcome=outcome)  # type: ignore[arg-type]
            if one.response.HasField("key")
            else pb.RecordRequest(
                credit_ticket=one.response.ticket.ticket,
                outcome=outcome,  # type: ignore[arg-type]
                cost_micros=1,
            )
            for one in decided.results
        ]
    )


async def tickets_and_handles(caller: Caller, make: Factory) -> pb.BatchDecideResponse:
    """Decisions of one user on credits, and of another with a key of their own."""
    payer, owner = await make.user(micros=10**6), await make.user()
    await make.key(owner)
    both = pb.BatchDecideRequest(requests=[*asks(payer).requests, *asks(owner).requests])
    decided: pb.BatchDecideResponse = await caller.call("BatchDecide", both)
    return decided


def replayed(answer: Any) -> list[bool]:
    """Which items of a batch were answered before."""
    assert all(one.HasField("response") for one in answer.results), answer
    return [one.response.replayed for one in answer.results]


async def dies(process: Process, *calls: asyncio.Task[Any]) -> None:
    """It is killed, and none of these was answered."""
    await process.kill()
    for one in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(one, Fault), one
        assert one.code is grpc.StatusCode.UNAVAILABLE


async def test_a_hold_that_was_committed_and_never_answered_is_found_by_whoever_asks_again(
    place: Place, proxy: Proxy, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=10**6)
    async with place.sidecar() as process:
        await process.decide(user, cost_micros=10)  # it has read by now what it has to read
        proxy.relay.hold_answers()
        call = asyncio.create_task(process.call("BatchDecide", asks(user)))

        async def committed() -> Sequence[Any]:
            return await sql.fetch("SELECT id, request_id FROM credit_holds WHERE request_id IS NOT NULL")

        found = {row["request_id"]: str(row["id"]) for row in await eventually(committed)}
        await dies(process, call)
    proxy.relay.lose_answers()
    async with place.sidecar() as process:
        again = await process.call("BatchDecide", asks(user))
        answered = {f"r{number}": one.response for number, one in enumerate(again.results)}
        assert {key: one.decision_id for key, one in answered.items() if one.replayed} == found
        assert all(replayed(await process.call("BatchDecide", asks(user))))
        assert not any(replayed(await process.call("BatchRecord", records(again))))
    assert await sql.fetchval("SELECT count(*) FROM credit_holds") == GROUP + 1
    assert await sql.fetchval("SELECT balance_micros FROM credit_accounts") == 10**6 - GROUP


@pytest.mark.parametrize("paid_by", ["credits", "an own key"])
async def test_a_record_that_was_committed_and_never_answered_is_known_again(
    place: Place, proxy: Proxy, make: Factory, sql: Connection, paid_by: str
) -> None:
    user = await make.user(micros=10**6)
    if paid_by == "an own key":
        await make.key(user)
    async with place.sidecar() as process:
        report = records(await process.call("BatchDecide", asks(user)))
        first = await process.call("BatchRecord", pb.BatchRecordRequest(requests=report.requests[:1]))
        assert not any(replayed(first))
        proxy.relay.hold_answers()
        call = asyncio.create_task(process.call("BatchRecord", report))

        async def committed() -> int:
            # With the one that its connection was prepared with.
            return (await recorded(sql) - 1) and await recorded(sql)

        before = await eventually(committed)
        await dies(process, call)
    proxy.relay.lose_answers()
    async with place.sidecar() as process:
        assert sum(replayed(await process.call("BatchRecord", report))) == before
        assert all(replayed(await process.call("BatchRecord", report)))
    assert await recorded(sql) == GROUP


async def recorded(sql: Connection) -> int:
    """How many records are in the books."""
    return int(
        await sql.fetchval(
            "SELECT (SELECT count(*) FROM api_key_usage)"
            " + (SELECT count(*) FROM credit_holds WHERE state = 'settled')"
        )
    )


@pytest.mark.parametrize("statement", ["is carried out without it", "is ended"])
async def test_in_the_middle_of_a_group_all_of_it_is_there_or_nothing(
    place: Place, proxy: Proxy, make: Factory, sql: Connection, statement: str
) -> None:
    async with place.sidecar() as process:
        user = await make.user(micros=10**6)
        decided = await process.call("BatchDecide", asks(user))
        # Another user, for a group of their own.
        other = await make.user(micros=10**6)
        await process.decide(other, cost_micros=10)
        async with gate_before(sql, "credit_holds"):
            calls = [
                asyncio.create_task(process.call("BatchRecord", records(decided))),
                asyncio.create_task(process.call("BatchDecide", asks(other))),
            ]

            async def both_wait() -> bool:
                waiting = await sql.fetchval(
                    "SELECT count(*) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND wait_event = 'PgSleep'"
                )
                return bool(waiting == 2)

            await eventually(both_wait)
            await dies(process, *calls)
            if statement == "is ended":
                await sql.execute(END_WHAT_WAITS)
    async with place.sidecar() as process:

        async def is_over() -> bool:
            return not await sql.fetchval(
                "SELECT count(*) FROM pg_locks WHERE relation = 'credit_holds'::regclass"
            )

        await eventually(is_over)
        known = statement == "is carried out without it"
        again = await process.call("BatchDecide", asks(other))
        for answer in (await process.call("BatchRecord", records(decided)), again):
            # The first of a batch may have been a group of its own.
            assert sum(replayed(answer)) >= 1 if known else not any(replayed(answer))
            assert len(answer.results) == GROUP
        assert all(replayed(await process.call("BatchRecord", records(decided))))
        assert all(replayed(await process.call("BatchDecide", asks(other))))
    assert await sql.fetchval("SELECT count(*) FROM credit_holds WHERE request_id IS NOT NULL") == 2 * GROUP
    assert await sql.fetchval("SELECT sum(balance_micros) FROM credit_accounts") == 2 * 10**6 - GROUP


async def test_a_statement_of_a_dead_sidecar_that_still_runs_keeps_others_from_its_rows_and_no_longer(
    place: Place, proxy: Proxy, make: Factory, sql: Connection
) -> None:
    user, other = await make.user(micros=10**6), await make.user(micros=10**6)
    async with place.sidecar() as process:
        ticket = await process.decide(user, cost_micros=10)
        async with gate_before(sql, "credit_holds"):
            call = asyncio.create_task(process.record(ticket, SUCCESS, cost_micros=1))
            await someone_waits(sql)
            await dies(process, call)
            async with place.sidecar() as second:
                with pytest.raises(Fault) as caught:
                    await second.record(ticket, SUCCESS, cost_micros=1)
                assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    async with place.sidecar() as third:
        assert (await third.record(ticket, SUCCESS, cost_micros=1)).replayed
        assert (await third.decide(other, cost_micros=10)).HasField("ticket")


async def test_what_was_spooled_is_known_to_the_next_one_and_drained_by_it(
    place: Place, proxy: Proxy, make: Factory, sql: Connection
) -> None:
    async with place.sidecar() as process:
        report = records(await tickets_and_handles(process, make))
        proxy.go_away()
        first = await process.call("BatchRecord", report)
        assert {one.response.durability for one in first.results} == {SPOOLED}
        await process.kill()
    assert len(rows(place.spool)) == 2 * GROUP
    proxy.come_back()
    async with gate_before(sql, "credit_holds"), place.sidecar() as process:
        # It has not drained the tickets yet, and knows them.
        again = await process.call("BatchRecord", pb.BatchRecordRequest(requests=report.requests[:GROUP]))
        assert {(one.response.durability, one.response.replayed) for one in again.results} == {
            (SPOOLED, True)
        }
        await process.kill()
    assert len(rows(place.spool)) >= GROUP
    async with place.sidecar() as process:
        await drained(place.spool)
        assert all(replayed(await process.call("BatchRecord", report)))
        await process.stop()
    assert await recorded(sql) == 2 * GROUP


async def test_what_was_committed_and_not_yet_removed_from_the_spool_is_not_counted_twice(
    place: Place, proxy: Proxy, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=10**6)
    async with place.sidecar() as process:
        decided = await process.call("BatchDecide", asks(user))
        proxy.go_away()
        await process.call("BatchRecord", records(decided))
        assert len(rows(place.spool)) == GROUP
        async with gate_before(sql, "credit_holds"):
            proxy.come_back()
            await someone_waits(sql)
            proxy.relay.hold_answers()

        async def committed() -> int:
            return await recorded(sql)

        await eventually(committed)
        await process.kill()
    assert len(rows(place.spool)) == GROUP
    proxy.relay.lose_answers()
    async with place.sidecar() as process:
        await drained(place.spool)
        assert all(replayed(await process.call("BatchRecord", records(decided))))
        await process.stop()
    assert await sql.fetchval("SELECT balance_micros FROM credit_accounts") == 10**6 - GROUP


async def test_a_sidecar_that_is_killed_at_any_moment_loses_nothing_that_it_acknowledged(
    place: Place, proxy: Proxy, make: Factory, sql: Connection, form: Form
) -> None:
    user = await make.user(micros=10**9)
    await make.key(user)
    rounds = form.rounds(3, 50)
    for _ in range(rounds):
        async with place.sidecar() as process:
            asked = pb.BatchDecideRequest(
                requests=[
                    pb.DecideRequest(
                        user_id=user,
                        provider="openai",
                        cost_micros=10,
                        constraint=CREDITS_ONLY if number % 2 else policy.CONSTRAINT_ANY,
                    )
                    for number in range(400)
                ]
            )
            requests = records(await process.call("BatchDecide", asked)).requests
            proxy.go_away()
            calls = [asyncio.create_task(process.call("Record", request)) for request in requests]
            # Killed in the middle of it: with some acknowledged, some on disk, some on the way.
            enough = form.random.randint(1, 300)
            done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            while len(done) < enough:
                done, _ = await asyncio.wait(calls, timeout=0.001)
            await process.kill()
            for one in await asyncio.gather(*calls, return_exceptions=True):
                assert not isinstance(one, BaseException) or isinstance(one, Fault), one
        proxy.come_back()
        # And the one that drains is killed while it does.
        spooled = len(rows(place.spool))
        assert spooled
        async with place.sidecar() as process:

            async def drains(spooled: int = spooled) -> bool:
                return len(rows(place.spool)) < spooled

            await eventually(drains)
            await process.kill()
    async with place.sidecar() as process:
        await drained(place.spool)
        await process.stop()
    await check_invariants(sql, place.acknowledged)
    form.figures |= {"kills": 2 * rounds, "acknowledged": len(place.acknowledged), "lost": 0}
    # What was not acknowledged may be there as well, once.
    assert await sql.fetchval("SELECT count(*) - count(DISTINCT id) FROM api_key_usage") == 0
