"""The ledger when something stands in its way: locks, lost replies, twins, broken books, late records."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import asyncpg
import grpc
import pytest

from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import routing_service_pb2 as pb
from tests.factories import Connection, Factory
from tests.support import Fault, Sidecar, eventually

SUCCESS = pb.OUTCOME_SUCCESS


async def test_a_locked_account_fails_alone_and_others_are_served(
    sidecar: Sidecar, make: Factory, sql: Connection, database: str
) -> None:
    locked, *others = [await make.user(micros=1_000_000) for _ in range(6)]
    psql = await asyncpg.connect(database)
    try:
        async with psql.transaction():
            await psql.execute(
                "UPDATE credit_accounts SET balance_micros = balance_micros WHERE user_id = $1", locked
            )
            results = await asyncio.gather(
                *(sidecar.decide(user, cost_micros=10) for user in (locked, *others)), return_exceptions=True
            )
    finally:
        await psql.close()
    fault, *answers = results
    assert isinstance(fault, Fault)
    assert fault.code is grpc.StatusCode.UNAVAILABLE
    assert [one.WhichOneof("route") for one in answers if isinstance(one, pb.DecideResponse)] == [
        "ticket"
    ] * 5
    assert (await sidecar.decide(locked, cost_micros=10)).WhichOneof("route") == "ticket"


async def test_a_locked_key_fails_its_own_record_alone(
    sidecar: Sidecar, make: Factory, sql: Connection, database: str
) -> None:
    users = [await make.user() for _ in range(4)]
    for user in users:
        await make.key(user)
    answers = [await sidecar.decide(user) for user in users]
    psql = await asyncpg.connect(database)
    try:
        async with psql.transaction():
            await psql.execute("SELECT 1 FROM user_api_keys WHERE user_id = $1 FOR UPDATE", users[0])
            results = await asyncio.gather(
                *(sidecar.record(answer, SUCCESS) for answer in answers), return_exceptions=True
            )
    finally:
        await psql.close()
    assert isinstance(results[0], Fault)
    assert not any(isinstance(result, BaseException) for result in results[1:])
    assert not (await sidecar.record(answers[0], SUCCESS)).replayed


async def test_twins_of_a_denied_request_share_its_denial(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user(micros=10)
    requests = [
        pb.DecideRequest(user_id=user, provider="openai", cost_micros=1_000, request_id="r")
        for _ in range(500)
    ]
    answers = await asyncio.gather(
        *(sidecar.call("BatchDecide", pb.BatchDecideRequest(requests=requests)) for _ in range(3))
    )
    reasons = {result.response.denial.reason for answer in answers for result in answer.results}
    assert reasons == {policy.DENIAL_REASON_NO_KEY_AND_NO_CREDITS}


async def test_a_repeat_gets_its_ticket_also_when_the_rate_limit_is_reached(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    await sql.execute(
        "INSERT INTO subscription_tiers (name, rank, requests_per_minute) VALUES ('slow', 30, 1)"
    )
    sidecar = await start_sidecar()
    user = await make.user("slow", micros=1_000)
    first = await sidecar.decide(user, cost_micros=10, request_id="r")
    again = await sidecar.decide(user, cost_micros=10, request_id="r")
    assert again.ticket.ticket == first.ticket.ticket
    assert again.replayed
    other = await sidecar.decide(user, cost_micros=10, request_id="another")
    assert other.denial.reason == policy.DENIAL_REASON_RATE_LIMITED


async def test_a_replayed_ticket_says_what_became_of_it(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user(micros=1_000)
    ticket = await sidecar.decide(user, cost_micros=10, request_id="r")
    assert "which is open" in (await sidecar.decide(user, cost_micros=10, request_id="r")).message
    await sidecar.record(ticket, SUCCESS, cost_micros=10)
    assert "which is settled" in (await sidecar.decide(user, cost_micros=10, request_id="r")).message


async def test_a_hold_is_found_by_its_indexes_however_many_the_user_has(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=1_000_000)
    await sql.execute(
        "INSERT INTO credit_holds (user_id, id, request_id, provider, model, service_type, mode, reason,"
        " amount_micros, state, created_at, expires_at, closed_at)"
        " SELECT $1, gen_random_uuid(), 'old-' || n, 'openai', '', '', '', '', 1, 'expired', now(), now(),"
        " now() FROM generate_series(1, 20000) n",
        user,
    )
    await sql.execute("ANALYZE credit_holds")
    before = await read_rows(sql)
    for number in range(10):
        await sidecar.decide(user, cost_micros=1, request_id=f"new-{number}")
        await sidecar.decide(user, cost_micros=1)

    async def counted() -> bool:
        placed = await sql.fetchval("SELECT count(*) FROM credit_holds WHERE state = 'open'")
        return bool(placed == 20)

    await eventually(counted)
    # The statistics arrive late, and only ever too small: what a scan would read is far above.
    assert await read_rows(sql) - before < 20_000


async def read_rows(sql: Connection) -> int:
    await sql.execute("SELECT pg_stat_force_next_flush()")
    read = await sql.fetchval(
        "SELECT seq_tup_read + coalesce(idx_tup_fetch, 0) FROM pg_stat_user_tables"
        " WHERE relname = 'credit_holds'"
    )
    return int(read)


async def test_an_account_that_disagrees_with_its_holds_stops_nobody_else(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    sidecar = await start_sidecar(sweep_interval=0.1)
    broken, fine = await make.user(micros=1_000), await make.user(micros=1_000)
    for user in (broken, fine):
        await sidecar.decide(user, cost_micros=100)
    # An operator's repair by hand that went wrong.
    await sql.execute("UPDATE credit_accounts SET held_micros = 0 WHERE user_id = $1", broken)
    await sql.execute("UPDATE credit_holds SET expires_at = now() - interval '1 second'")

    async def released() -> bool:
        held = await sql.fetchval("SELECT held_micros FROM credit_accounts WHERE user_id = $1", fine)
        return bool(held == 0) and "account_broken" in sidecar.log.getvalue()

    await eventually(released)
    assert (await sidecar.decide(fine, cost_micros=100)).WhichOneof("route") == "ticket"
    await sql.execute("UPDATE credit_accounts SET held_micros = 100 WHERE user_id = $1", broken)


async def test_a_record_sent_again_after_a_week_still_gets_its_first_answer(
    sidecar: Sidecar, make: Factory, sql: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    user, owner = await make.user(micros=1_000), await make.user()
    await make.key(owner)
    recorded, late, key = [
        await sidecar.decide(user, cost_micros=10),
        await sidecar.decide(user, cost_micros=10),
        await sidecar.decide(owner),
    ]
    await sidecar.record(recorded, SUCCESS, cost_micros=7)
    # As if the tickets had expired long ago.
    monkeypatch.setattr("keyturn_server.record._TAKEN_FOR", timedelta(hours=-1))
    assert (await sidecar.record(recorded, SUCCESS, cost_micros=7)).replayed
    for answer in (late, key):
        with pytest.raises(Fault) as caught:
            await sidecar.record(answer, SUCCESS)
        assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_handle_of_a_replaced_secret_gives_up_neither(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user()
    await make.key(user)
    answer = await sidecar.decide(user)
    await sql.execute("UPDATE user_api_keys SET revision = revision + 1")

    async def renewed() -> bool:
        refused = await sidecar.decide(user, failed_key_handles=[answer.key.handle])
        return refused.WhichOneof("route") == "key"

    await eventually(renewed)
    with pytest.raises(Fault) as caught:
        await sidecar.call("Redeem", pb.RedeemRequest(key_handle=answer.key.handle))
    assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_user_can_be_deleted_and_the_books_stay(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=1_000)
    ticket = await sidecar.decide(user, cost_micros=10)
    await sql.execute("DELETE FROM users WHERE id = $1", user)
    recorded = await sidecar.record(ticket, SUCCESS, cost_micros=10)
    assert recorded.balance_micros == 990


async def test_the_reason_of_each_charge_stands_beside_it(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user, owner = await make.user(micros=1_000), await make.user()
    await make.key(owner)
    for who in (user, owner):
        await sidecar.record(await sidecar.decide(who, cost_micros=10), SUCCESS, cost_micros=10)
    charged = await sql.fetchrow("SELECT mode, reason FROM credit_transactions WHERE amount_micros < 0")
    used = await sql.fetchrow("SELECT mode, reason FROM api_key_usage")
    assert charged is not None
    assert used is not None
    assert tuple(charged) == ("BYOK_FIRST", "BYOK_FIRST_NO_KEY")
    assert tuple(used) == ("BYOK_FIRST", "BYOK_FIRST_OWN_KEY")
