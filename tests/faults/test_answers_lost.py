"""Connections to PostgreSQL that break around a COMMIT: what was asked is done once, and known as done.

The proxy keeps back what the server answers, until the statement is seen to be committed; or the statement
waits for a gate when its connection breaks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from keyturn.v1 import credit_service_pb2
from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import routing_service_pb2 as pb
from tests.factories import Connection, Factory
from tests.faults.test_killed import END_WHAT_WAITS
from tests.gate import gate_before, someone_waits
from tests.proxy import Proxy
from tests.refusals import Refusal
from tests.support import Fault, Sidecar, eventually

SUCCESS = pb.OUTCOME_SUCCESS


@dataclass(frozen=True, kw_only=True)
class Work:
    """One kind of statement that changes the books."""

    table: str
    """Where it writes first."""
    done: str
    """How often it has been for a user, in SQL."""
    prepare: Callable[[Sidecar, str], Awaitable[Any]]
    ask: Callable[[Sidecar, str, Any], Awaitable[Any]]


async def _nothing(sidecar: Sidecar, user: str) -> None:
    await sidecar.decide(user, cost_micros=1)  # it has read by now what it has to read


async def _grant(sidecar: Sidecar, user: str, prepared: None) -> Any:
    return await sidecar.call(
        "GrantCredits",
        credit_service_pb2.GrantCreditsRequest(user_id=user, amount_micros=100, request_id="r"),
    )


def _credits(sidecar: Sidecar, user: str) -> Awaitable[pb.DecideResponse]:
    return sidecar.decide(user, cost_micros=10, constraint=policy.CONSTRAINT_CREDITS_ONLY)


def _record(sidecar: Sidecar, user: str, decision: pb.DecideResponse) -> Awaitable[pb.RecordResponse]:
    return sidecar.record(decision, SUCCESS, cost_micros=4)


WORK = {
    "a hold": Work(
        table="credit_holds",
        done="SELECT count(*) FROM credit_holds WHERE user_id = $1 AND request_id = 'r'",
        prepare=_nothing,
        ask=lambda sidecar, user, _: sidecar.decide(
            user, cost_micros=10, request_id="r", constraint=policy.CONSTRAINT_CREDITS_ONLY
        ),
    ),
    "a settlement": Work(
        table="credit_holds",
        done="SELECT count(*) FROM credit_transactions WHERE user_id = $1 AND amount_micros < 0",
        prepare=_credits,
        ask=_record,
    ),
    "the use of an own key": Work(
        table="api_key_usage",
        done="SELECT count(*) FROM api_key_usage WHERE user_id = $1",
        prepare=lambda sidecar, user: sidecar.decide(user),
        ask=_record,
    ),
    "a grant": Work(
        table="credit_transactions",
        done="SELECT count(*) FROM credit_transactions WHERE user_id = $1 AND request_id = 'r'",
        prepare=_nothing,
        ask=_grant,
    ),
}


async def prepared_for(work: Work, sidecar: Sidecar, make: Factory) -> tuple[str, Any]:
    """A user, and what the work begins with; the connection has carried out the same for another before,
    so that one message is all that it takes."""
    before, user = await make.user(micros=1_000), await make.user(micros=1_000)
    for each in (before, user):
        await make.key(each)
    await work.ask(sidecar, before, await work.prepare(sidecar, before))
    return user, await work.prepare(sidecar, user)


@pytest.fixture
async def behind(start_sidecar: Callable[..., Any], database: str, proxy: Proxy) -> Sidecar:
    """A sidecar by way of the proxy, without a spool."""
    started: Sidecar = await start_sidecar(database_url=proxy.dsn(database), push_timeout=30)
    return started


@pytest.mark.parametrize("name", WORK)
async def test_what_was_committed_and_never_answered_is_answered_after_all_and_is_no_replay(
    behind: Sidecar, proxy: Proxy, make: Factory, sql: Connection, name: str
) -> None:
    work = WORK[name]
    user, prepared = await prepared_for(work, behind, make)
    proxy.relay.hold_answers()
    call = asyncio.ensure_future(work.ask(behind, user, prepared))

    async def committed() -> bool:
        return bool(await sql.fetchval(work.done, user))

    await eventually(committed)
    assert not call.done()
    proxy.relay.lose_answers()
    assert not (await call).replayed
    assert (await work.ask(behind, user, prepared)).replayed
    assert await sql.fetchval(work.done, user) == 1


@pytest.mark.parametrize("name", WORK)
async def test_what_was_not_committed_when_its_connection_was_ended_is_done_on_another(
    behind: Sidecar, make: Factory, sql: Connection, name: str
) -> None:
    work = WORK[name]
    user, prepared = await prepared_for(work, behind, make)
    async with gate_before(sql, work.table):
        call = asyncio.ensure_future(work.ask(behind, user, prepared))
        await someone_waits(sql)
        await sql.execute(END_WHAT_WAITS)
    assert not (await call).replayed
    assert (await work.ask(behind, user, prepared)).replayed
    assert await sql.fetchval(work.done, user) == 1


@pytest.mark.parametrize("name", WORK)
async def test_what_goes_on_behind_a_broken_connection_is_waited_for_and_then_known_again(
    behind: Sidecar, proxy: Proxy, make: Factory, sql: Connection, name: str
) -> None:
    work = WORK[name]
    user, prepared = await prepared_for(work, behind, make)
    async with gate_before(sql, work.table):
        call = asyncio.ensure_future(work.ask(behind, user, prepared))
        await someone_waits(sql)
        proxy.cut(push_only=False)
        with pytest.raises(Fault) as caught:
            await call
        assert Refusal.of(caught.value).info.reason == "ROW_LOCKED"

    async def committed() -> bool:
        return bool(await sql.fetchval(work.done, user))

    await eventually(committed)
    assert (await work.ask(behind, user, prepared)).replayed
    assert await sql.fetchval(work.done, user) == 1


async def test_a_refused_key_is_not_handed_out_again_though_the_answer_to_its_record_was_lost(
    behind: Sidecar, proxy: Proxy, make: Factory, sql: Connection
) -> None:
    # Without the push, so that only the record itself can tell.
    await sql.execute("ALTER TABLE user_api_keys DISABLE TRIGGER push_update")
    work = WORK["the use of an own key"]
    user, decision = await prepared_for(work, behind, make)
    proxy.relay.hold_answers()
    call = asyncio.create_task(behind.record(decision, pb.OUTCOME_AUTH_REJECTED))

    async def committed() -> bool:
        return bool(await sql.fetchval(work.done, user))

    await eventually(committed)
    proxy.relay.lose_answers()
    recorded = await call
    assert (recorded.replayed, recorded.key_state) == (False, policy.KEY_STATE_INVALID)
    assert (await behind.decide(user, cost_micros=1)).reason == policy.REASON_BYOK_FIRST_KEY_FAILED
