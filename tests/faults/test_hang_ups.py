"""Clients that hang up and deadlines that pass, in thousands: no work is half done, and none is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from keyturn.v1 import routing_service_pb2 as pb
from tests.factories import Connection, Factory
from tests.faults.conftest import Form
from tests.outages import events
from tests.support import eventually, method_of

SUCCESS = pb.OUTCOME_SUCCESS
_AT_ONCE = 200


async def test_whoever_hangs_up_or_is_out_of_time_finds_the_work_done_once_or_not_at_all(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection, form: Form
) -> None:
    sidecar = await start_sidecar(statement_timeout=30)
    users = [await make.user(micros=10**12) for _ in range(8)]
    owner = await make.user()
    await make.key(owner)
    given_up = 0

    async def gives_up(method: str, request: Any) -> bool:
        """Whether the caller went before the answer came."""
        may_take = form.random.choice([0.01, 0.1, 0.5]) * form.random.random()
        hangs_up = form.random.random() < 0.5
        call = method_of(sidecar.channel, method)(request, timeout=60 if hangs_up else may_take)
        if hangs_up:
            await asyncio.sleep(may_take)
            call.cancel()
        try:
            answer = await call
        except asyncio.CancelledError:
            return True
        except grpc.aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
                raise
            return True
        if method == "Record":
            sidecar.acknowledged.append(answer.record_id)
        return False

    rounds = form.rounds(10, 100)
    for round_ in range(rounds):
        asks = [
            pb.DecideRequest(
                user_id=form.random.choice([*users, owner]),
                provider="openai",
                cost_micros=10,
                request_id=f"{round_}-{number}",
            )
            for number in range(_AT_ONCE)
        ]
        given_up += sum(await asyncio.gather(*(gives_up("Decide", ask) for ask in asks)))
        decisions = await asyncio.gather(*(sidecar.call("Decide", ask) for ask in asks))
        records = [
            pb.RecordRequest(key_handle=one.key.handle, outcome=SUCCESS)
            if one.HasField("key")
            else pb.RecordRequest(credit_ticket=one.ticket.ticket, outcome=SUCCESS, cost_micros=3)
            for one in decisions
        ]
        given_up += sum(await asyncio.gather(*(gives_up("Record", record) for record in records)))
        # Half of them never ask again: what they were about is done all the same, or not at all.
        await asyncio.gather(*(sidecar.call("Record", record) for record in records[::2]))
    assert given_up > rounds * _AT_ONCE / 10

    async def is_quiet() -> bool:
        return not await sql.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name = 'keyturn' AND state <> 'idle'"
        )

    await eventually(is_quiet)
    assert await sql.fetchval("SELECT count(*) FROM credit_holds WHERE charged_micros <> 3") == 0
    assert await sql.fetchval("SELECT count(*) - count(DISTINCT request_id) FROM credit_holds") == 0
    assert events(sidecar, "internal_error") == []
    form.figures |= {
        "calls": rounds * _AT_ONCE * 2,
        "given up": given_up,
        "acknowledged": len(set(sidecar.acknowledged)),
        "lost or counted twice": 0,
    }
