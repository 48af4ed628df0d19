"""The ledger over real gRPC: nothing overspent, nothing lost, nothing twice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import grpc
import pytest

from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import routing_service_pb2 as pb
from keyturn_server.ids import new_id
from tests.factories import Connection, Factory
from tests.support import Fault, Sidecar, eventually

SUCCESS = pb.OUTCOME_SUCCESS


async def balance(sql: Connection, user_id: str) -> tuple[int, int]:
    row = await sql.fetchrow(
        "SELECT balance_micros, held_micros FROM credit_accounts WHERE user_id = $1", user_id
    )
    assert row is not None
    return row["balance_micros"], row["held_micros"]


async def test_a_thousand_concurrent_decides_get_exactly_the_tickets_that_the_balance_covers(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=100 * 10_000)
    answers = await asyncio.gather(*(sidecar.decide(user, cost_micros=10_000) for _ in range(1000)))
    tickets = [answer for answer in answers if answer.WhichOneof("route") == "ticket"]
    reasons = {answer.denial.reason for answer in answers if answer.WhichOneof("route") == "denial"}
    assert len(tickets) == 100
    assert reasons == {policy.DENIAL_REASON_HOLDS_IN_FLIGHT}
    assert await balance(sql, user) == (1_000_000, 1_000_000)

    records = [sidecar.record(ticket, SUCCESS, cost_micros=10_000) for ticket in tickets for _ in range(10)]
    recorded = await asyncio.gather(*records)
    assert sum(not answer.replayed for answer in recorded) == 100
    assert {answer.charged_micros for answer in recorded} == {10_000}
    assert await balance(sql, user) == (0, 0)
    assert (
        await sql.fetchval("SELECT count(*) FROM credit_transactions WHERE transaction_type = 'deduction'")
        == 100
    )
    denied = await sidecar.decide(user, cost_micros=1)
    assert denied.denial.reason == policy.DENIAL_REASON_NO_KEY_AND_NO_CREDITS


async def test_many_users_share_statements_and_stay_apart(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    users = [await make.user(micros=5_000 * (index % 4)) for index in range(20)]
    answers = await asyncio.gather(
        *(sidecar.decide(user, cost_micros=5_000) for user in users for _ in range(5))
    )
    for index, user in enumerate(users):
        mine = answers[index * 5 : index * 5 + 5]
        assert sum(answer.WhichOneof("route") == "ticket" for answer in mine) == index % 4
        assert await balance(sql, user) == (5_000 * (index % 4), 5_000 * (index % 4))


async def test_the_same_request_id_gets_the_same_ticket_and_one_hold(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    one, two = await start_sidecar(), await start_sidecar()
    user = await make.user(micros=100_000)
    answers = await asyncio.gather(
        *((one, two)[index % 2].decide(user, cost_micros=7_000, request_id="r-1") for index in range(40))
    )
    assert len({answer.ticket.ticket for answer in answers}) == 1
    assert len({answer.decision_id for answer in answers}) == 1
    assert sum(not answer.replayed for answer in answers) == 1
    assert await balance(sql, user) == (100_000, 7_000)

    await one.record(answers[0], SUCCESS, cost_micros=7_000)
    again = await two.decide(user, cost_micros=9_000, request_id="r-1")
    assert again.replayed
    assert again.ticket.ticket == answers[0].ticket.ticket
    assert await balance(sql, user) == (93_000, 0)


async def test_another_user_may_use_the_same_request_id(sidecar: Sidecar, make: Factory) -> None:
    first, second = await make.user(micros=10_000), await make.user(micros=10_000)
    answers = [await sidecar.decide(user, cost_micros=1, request_id="same") for user in (first, second)]
    assert not any(answer.replayed for answer in answers)
    assert answers[0].decision_id != answers[1].decision_id


async def test_a_request_id_for_another_provider_is_refused(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user(micros=10_000)
    await sidecar.decide(user, "openai", cost_micros=1, request_id="r")
    with pytest.raises(Fault) as caught:
        await sidecar.decide(user, "anthropic", cost_micros=1, request_id="r")
    assert caught.value.code is grpc.StatusCode.ALREADY_EXISTS


async def test_a_cost_above_the_hold_is_charged_in_full_and_the_next_decide_denies(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=10_000)
    ticket = await sidecar.decide(user, cost_micros=10_000)
    answer = await sidecar.record(ticket, SUCCESS, cost_micros=25_000)
    assert (answer.charged_micros, answer.released_micros, answer.balance_micros) == (25_000, 0, -15_000)
    assert (await sidecar.decide(user, cost_micros=0)).WhichOneof("route") == "denial"
    assert await balance(sql, user) == (-15_000, 0)


async def test_what_was_held_and_not_charged_is_released(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user(micros=10_000)
    ticket = await sidecar.decide(user, cost_micros=10_000)
    assert ticket.ticket.available_micros == 0
    answer = await sidecar.record(ticket, SUCCESS, cost_micros=1)
    assert (answer.charged_micros, answer.released_micros, answer.balance_micros) == (1, 9_999, 9_999)


# outcome, what is reported, charged of a hold of 10,000, source. gpt-4o: $2.50 in, $10 out a million.
USAGE = {"usage": pb.Usage(input_tokens=1_000, output_tokens=100)}
PRICED = 2_500 + 1_000
SETTLEMENTS: list[tuple[int, dict[str, Any], int, int]] = [
    (SUCCESS, {"cost_micros": 123}, 123, pb.COST_SOURCE_REPORTED),
    (SUCCESS, {"cost_micros": 0}, 0, pb.COST_SOURCE_REPORTED),
    (SUCCESS, USAGE, PRICED, pb.COST_SOURCE_PRICED),
    (SUCCESS, {**USAGE, "cost_micros": 5}, 5, pb.COST_SOURCE_REPORTED),
    (SUCCESS, {"usage": pb.Usage()}, 0, pb.COST_SOURCE_PRICED),
    (SUCCESS, {}, 10_000, pb.COST_SOURCE_ESTIMATED),
    (SUCCESS, {**USAGE, "model": "nobody-knows-this-model"}, 10_000, pb.COST_SOURCE_ESTIMATED),
    (pb.OUTCOME_CLIENT_CANCELLED, USAGE, PRICED, pb.COST_SOURCE_PRICED),
    (pb.OUTCOME_CLIENT_CANCELLED, {"cost_micros": 7}, 7, pb.COST_SOURCE_REPORTED),
    (pb.OUTCOME_CLIENT_CANCELLED, {}, 0, pb.COST_SOURCE_NONE),
    (pb.OUTCOME_NEVER_SENT, {}, 0, pb.COST_SOURCE_NONE),
    (pb.OUTCOME_NEVER_SENT, USAGE, 0, pb.COST_SOURCE_NONE),
    (pb.OUTCOME_AUTH_REJECTED, {}, 0, pb.COST_SOURCE_NONE),
    (pb.OUTCOME_RATE_LIMITED, {}, 0, pb.COST_SOURCE_NONE),
    (pb.OUTCOME_PROVIDER_BILLING, {}, 0, pb.COST_SOURCE_NONE),
    (pb.OUTCOME_REFUSED, {}, 0, pb.COST_SOURCE_NONE),
    (pb.OUTCOME_PROVIDER_ERROR, {}, 0, pb.COST_SOURCE_NONE),
    (pb.OUTCOME_PROVIDER_ERROR, USAGE, PRICED, pb.COST_SOURCE_PRICED),
    (pb.OUTCOME_TIMEOUT, {}, 0, pb.COST_SOURCE_NONE),
    (pb.OUTCOME_UNKNOWN, USAGE, PRICED, pb.COST_SOURCE_PRICED),
    (99, USAGE, PRICED, pb.COST_SOURCE_PRICED),
    (99, {}, 0, pb.COST_SOURCE_NONE),
]


@pytest.mark.parametrize(("outcome", "report", "charged", "source"), SETTLEMENTS)
async def test_every_outcome_settles_as_the_contract_says(
    sidecar: Sidecar,
    make: Factory,
    sql: Connection,
    outcome: int,
    report: dict[str, Any],
    charged: int,
    source: int,
) -> None:
    user = await make.user(micros=50_000)
    ticket = await sidecar.decide(user, model="gpt-4o", cost_micros=10_000)
    answer = await sidecar.record(ticket, outcome, **report)
    assert (answer.charged_micros, answer.released_micros) == (charged, 10_000 - charged)
    assert answer.balance_micros == 50_000 - charged
    assert answer.cost_source == source
    assert answer.record_id == ticket.decision_id
    assert answer.durability == pb.DURABILITY_DATABASE
    assert await balance(sql, user) == (50_000 - charged, 0)


async def test_a_record_with_other_contents_is_refused_and_changes_nothing(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=50_000)
    ticket = await sidecar.decide(user, cost_micros=10_000)
    first = await sidecar.record(ticket, SUCCESS, cost_micros=5)
    with pytest.raises(Fault) as caught:
        await sidecar.record(ticket, SUCCESS, cost_micros=6)
    assert caught.value.code is grpc.StatusCode.ALREADY_EXISTS
    again = await sidecar.record(ticket, SUCCESS, cost_micros=5)
    assert again.replayed
    assert (again.charged_micros, again.balance_micros) == (first.charged_micros, first.balance_micros)
    assert await balance(sql, user) == (49_995, 0)


async def test_an_expired_hold_is_released_and_its_late_record_still_charged(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    sidecar = await start_sidecar(sweep_interval=0.1)
    user = await make.user(micros=10_000)
    ticket = await sidecar.decide(user, cost_micros=10_000, hold_ttl={"seconds": 1})

    async def released() -> bool:
        return await balance(sql, user) == (10_000, 0)

    await eventually(released)
    answer = await sidecar.record(ticket, SUCCESS, cost_micros=4_000)
    assert (answer.charged_micros, answer.released_micros, answer.balance_micros) == (4_000, 0, 6_000)
    assert await sql.fetchval(
        "SELECT is_late FROM credit_transactions WHERE id = $1::uuid", ticket.decision_id
    )
    assert (await sidecar.record(ticket, SUCCESS, cost_micros=4_000)).replayed


async def test_an_expired_hold_stands_in_nobodys_way_before_it_is_swept(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    sidecar = await start_sidecar(sweep_interval=3600)
    user = await make.user(micros=10_000)
    await sidecar.decide(user, cost_micros=10_000)
    await sql.execute("UPDATE credit_holds SET expires_at = now() - interval '1 second'")
    answer = await sidecar.decide(user, cost_micros=10_000)
    assert answer.WhichOneof("route") == "ticket"
    assert await balance(sql, user) == (10_000, 10_000)


async def test_an_unswept_expired_hold_settles_late_and_releases(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    sidecar = await start_sidecar(sweep_interval=3600)
    user = await make.user(micros=10_000)
    ticket = await sidecar.decide(user, cost_micros=8_000)
    await sql.execute("UPDATE credit_holds SET expires_at = now() - interval '1 second'")
    answer = await sidecar.record(ticket, SUCCESS, cost_micros=3_000)
    assert (answer.charged_micros, answer.released_micros) == (3_000, 5_000)
    assert await balance(sql, user) == (7_000, 0)


async def test_a_ticket_whose_hold_is_unknown_here_is_not_found(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=1_000)
    ticket = await sidecar.decide(user, cost_micros=10)
    await sql.execute("DELETE FROM credit_holds")
    await sql.execute("UPDATE credit_accounts SET held_micros = 0")
    with pytest.raises(Fault) as caught:
        await sidecar.record(ticket, SUCCESS, cost_micros=1)
    assert caught.value.code is grpc.StatusCode.NOT_FOUND


async def test_a_grant_lands_once_for_each_request_id(make: Factory, sql: Connection) -> None:
    user = await make.user()
    grants = [await make.grant(user, 500, "g-1") for _ in range(3)]
    assert [grant["replayed"] for grant in grants] == [False, True, True]
    assert await balance(sql, user) == (500, 0)


async def test_a_deduction_shows_in_the_columns_that_operators_query(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=1_000_000)
    ticket = await sidecar.decide(user, cost_micros=10, service_type="copilot")
    await sidecar.record(ticket, SUCCESS, cost_micros=12_345)
    row = await sql.fetchrow(
        "SELECT service_type, sum(cost_cents) AS cents FROM credit_transactions "
        "WHERE transaction_type = 'deduction' GROUP BY service_type"
    )
    assert row is not None
    assert (row["service_type"], row["cents"]) == ("copilot", Decimal("1.2345"))


async def test_new_ids_sort_by_time() -> None:
    ids = []
    for _ in range(5):
        ids.append(new_id())
        await asyncio.sleep(0.002)
    assert ids == sorted(ids)
    assert {each.version for each in ids} == {7}
