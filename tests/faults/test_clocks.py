"""A sidecar's clock that jumps, ahead and back: holds run out by the database's alone."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import routing_service_pb2 as pb
from tests.factories import Connection, Factory
from tests.faults.conftest import Form
from tests.outages import away, drained
from tests.proxy import Proxy
from tests.refusals import refused
from tests.support import Sidecar, eventually

SUCCESS = pb.OUTCOME_SUCCESS
CREDITS_ONLY = policy.CONSTRAINT_CREDITS_ONLY
# Less than the 7 days for which a record is taken.
JUMPS = [
    timedelta(days=-3650),
    timedelta(days=-1),
    timedelta(hours=-1),
    timedelta(hours=1),
    timedelta(days=6),
]


class Clock:
    """A sidecar's clock, that jumps."""

    def __init__(self) -> None:
        self.jump = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.jump


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the sidecars that are started from now on."""
    clock = Clock()
    monkeypatch.setattr("keyturn_server.app._now", clock)
    return clock


async def held(sql: Connection, user: str) -> int:
    return int(await sql.fetchval("SELECT held_micros FROM credit_accounts WHERE user_id = $1", user))


async def test_holds_run_out_by_the_databases_clock_whatever_the_sidecars_says(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection, clock: Clock
) -> None:
    sidecar: Sidecar = await start_sidecar(sweep_interval=0.05)
    for jump in JUMPS:
        clock.jump = jump
        user = await make.user(micros=1_000)
        short = await sidecar.decide(user, cost_micros=10, hold_ttl=Duration(seconds=1))
        long = await sidecar.decide(user, cost_micros=10, hold_ttl=Duration(seconds=600))
        now = await sql.fetchval("SELECT now()")
        left = long.ticket.expire_time.ToDatetime(tzinfo=UTC) - now
        assert timedelta(seconds=500) < left <= timedelta(seconds=600)

        async def is_swept(user: str = user) -> bool:
            return await held(sql, user) == 10

        await eventually(is_swept)
        for ticket in (short, long):
            assert (await sidecar.record(ticket, SUCCESS, cost_micros=3)).charged_micros == 3
        late = {
            str(row["id"]): row["is_late"]
            for row in await sql.fetch(
                "SELECT id, is_late FROM credit_transactions WHERE user_id = $1 AND amount_micros < 0", user
            )
        }
        assert late == {short.decision_id: True, long.decision_id: False}


async def test_a_clock_that_jumps_while_a_ticket_is_out_charges_it_once_and_in_full(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection, clock: Clock, form: Form
) -> None:
    sidecar: Sidecar = await start_sidecar()
    user, owner = await make.user(micros=10**6), await make.user()
    await make.key(owner)
    rounds = form.rounds(40, 2_000)
    for _ in range(rounds):
        clock.jump = form.random.choice(JUMPS[1:])
        ticket, key = await sidecar.decide(user, cost_micros=10), await sidecar.decide(owner)
        assert (ticket.HasField("ticket"), key.HasField("key")) == (True, True)
        clock.jump = form.random.choice(JUMPS[1:])
        for decision in (ticket, key):
            assert not (await sidecar.record(decision, SUCCESS, cost_micros=3)).replayed
        clock.jump = form.random.choice(JUMPS[1:])
        for decision in (ticket, key):
            assert (await sidecar.record(decision, SUCCESS, cost_micros=3)).replayed
    assert await sql.fetchval("SELECT balance_micros FROM credit_accounts WHERE user_id = $1", user) == (
        10**6 - 3 * rounds
    )
    assert await sql.fetchval("SELECT count(*) FROM api_key_usage") == rounds
    form.figures |= {"jumps": 3 * rounds, "records": 2 * rounds, "lost or counted twice": 0}


async def test_what_is_spooled_under_one_clock_is_drained_under_another(
    spooling: Callable[..., Any], proxy: Proxy, make: Factory, sql: Connection, clock: Clock, directory: Any
) -> None:
    sidecar: Sidecar = await spooling()
    user = await make.user(micros=1_000)
    tickets = [await sidecar.decide(user, cost_micros=10) for _ in JUMPS]
    await away(sidecar, proxy)
    for jump, ticket in zip(JUMPS[1:], tickets, strict=False):
        clock.jump = jump
        await sidecar.record(ticket, SUCCESS, cost_micros=3)
    clock.jump = timedelta(days=30)
    proxy.come_back()
    await drained(directory)
    spent = 1_000 - await sql.fetchval("SELECT balance_micros FROM credit_accounts")
    assert spent == 3 * (len(JUMPS) - 1)


async def test_a_clock_that_is_more_than_a_week_ahead_refuses_records_and_acknowledges_none(
    start_sidecar: Callable[..., Any], make: Factory, clock: Clock
) -> None:
    sidecar: Sidecar = await start_sidecar()
    ticket = await sidecar.decide(await make.user(micros=1_000), cost_micros=10)
    clock.jump = timedelta(days=8)
    request = pb.RecordRequest(credit_ticket=ticket.ticket.ticket, outcome=SUCCESS, cost_micros=3)
    refusal = await refused(sidecar, "Record", request)
    assert refusal.code is grpc.StatusCode.FAILED_PRECONDITION
    clock.jump = timedelta()
    assert not (await sidecar.record(ticket, SUCCESS, cost_micros=3)).replayed
