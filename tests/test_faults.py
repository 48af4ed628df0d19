"""Batches with bad items, ids of any script, and what a caller and the log get of an unexpected error."""

from __future__ import annotations

import asyncio
import json
import unicodedata
from collections.abc import Callable
from typing import Any

import asyncpg
import grpc
import pytest

from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import routing_service_pb2 as pb
from tests.factories import Connection, Factory
from tests.gate import gate_before_holds
from tests.refusals import Refusal, contents, refused
from tests.support import Fault, Sidecar, eventually

SUCCESS, UNSPECIFIED = pb.OUTCOME_SUCCESS, pb.OUTCOME_UNSPECIFIED
FOUR_BYTES = "\N{MATHEMATICAL FRAKTUR CAPITAL U}"


@pytest.mark.parametrize(("size", "batch"), [(0, "empty"), (501, "over the limit")])
async def test_a_batch_of_a_wrong_size_is_refused_whole(
    sidecar: Sidecar, make: Factory, sql: Connection, size: int, batch: str
) -> None:
    user = await make.user(micros=1_000)
    ticket = await sidecar.decide(user, cost_micros=1)
    before = await contents(sql)
    asks = [pb.DecideRequest(user_id=user, provider="openai", cost_micros=1)] * size
    records = [pb.RecordRequest(credit_ticket=ticket.ticket.ticket, outcome=SUCCESS)] * size
    for method, request in (
        ("BatchDecide", pb.BatchDecideRequest(requests=asks)),
        ("BatchRecord", pb.BatchRecordRequest(requests=records)),
    ):
        refusal = await refused(sidecar, method, request)
        refusal.check_field("requests", f"From 1 to 500 items; this has {size}.")
    assert await contents(sql) == before, batch


async def test_good_and_bad_items_of_a_batch_are_answered_each_in_its_place(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    users = [await make.user(micros=1_000) for _ in range(3)]
    good = [pb.DecideRequest(user_id=user, provider="openai", cost_micros=10) for user in users]
    bad = [
        pb.DecideRequest(user_id="nobody", provider="openai"),
        pb.DecideRequest(user_id=users[0], provider="openai", cost_micros=-1),
        pb.DecideRequest(user_id=users[0], provider="openai", failed_key_handles=["x"]),
    ]
    asks = [message for pair in zip(good, bad, strict=True) for message in pair] * 83
    answers = (await sidecar.call("BatchDecide", pb.BatchDecideRequest(requests=asks))).results
    reasons = ["USER_NOT_FOUND", "INVALID_FIELD", "INVALID_TOKEN"]
    assert [one.WhichOneof("result") for one in answers] == ["response", "status"] * 249
    assert [Refusal.of(one.status).info.reason for one in answers[1::2]] == reasons * 83
    held = await sql.fetch("SELECT user_id, id::text FROM credit_holds")
    assert {(row["user_id"], row["id"]) for row in held} == {
        (user, one.response.decision_id) for user, one in zip(users * 83, answers[::2], strict=True)
    }

    tickets = [one.response.ticket.ticket for one in answers[::2]]
    records = [
        pb.RecordRequest(
            credit_ticket=ticket, outcome=SUCCESS if index % 2 else UNSPECIFIED, cost_micros=index
        )
        for index, ticket in enumerate(tickets)
    ]
    results = (await sidecar.call("BatchRecord", pb.BatchRecordRequest(requests=records))).results
    for index, result in enumerate(results):
        if index % 2:
            assert result.response.charged_micros == index
        else:
            Refusal.of(result.status).check_field("outcome", "Required")


async def test_the_same_ticket_twice_in_a_batch_settles_once(sidecar: Sidecar, make: Factory) -> None:
    ticket = await sidecar.decide(await make.user(micros=1_000), cost_micros=10)
    record = pb.RecordRequest(credit_ticket=ticket.ticket.ticket, outcome=SUCCESS, cost_micros=3)
    other = pb.RecordRequest(credit_ticket=ticket.ticket.ticket, outcome=SUCCESS, cost_micros=4)
    batch = pb.BatchRecordRequest(requests=[record, record, other])
    first, again, conflict = (await sidecar.call("BatchRecord", batch)).results
    assert sorted([first.response.replayed, again.response.replayed]) == [False, True]
    Refusal.of(conflict.status).check(grpc.StatusCode.ALREADY_EXISTS, "RECORD_CONFLICT")


UNICODE = {
    "four bytes a character": FOUR_BYTES * 128,
    "right to left": "\u202eמשתמש-يوسف",
    "emoji": "\N{WOMAN}\u200d\N{PERSONAL COMPUTER}\ufe0f \N{REGIONAL INDICATOR SYMBOL LETTER D}",
    "separators and a byte order mark": "\ufeffa\u2028b\u2029c\u00a0d",
    "signs that SQL and JSON know": "o'hara\\\"; -- {1,2} $1 %s \\u0000",
    "spaces around": " user ",
}


async def test_ids_of_any_script_work_from_the_decision_to_the_record(
    sidecar: Sidecar, make: Factory, sql: Connection, subtests: pytest.Subtests
) -> None:
    for name, text in UNICODE.items():
        with subtests.test(name):
            user = await make.user(name=text, micros=1_000)
            await make.key(user, secret="sk-test-unicode-0000", label=text)
            fields: dict[str, Any] = {"request_id": text, "service_type": text[:64], "model": text * 2}
            on_credits = {**fields, "constraint": policy.CONSTRAINT_CREDITS_ONLY}
            ticket = await sidecar.decide(user, cost_micros=10, **on_credits)
            assert (await sidecar.decide(user, **on_credits)).ticket.ticket == ticket.ticket.ticket
            assert (await sidecar.record(ticket, SUCCESS, cost_micros=1, endpoint=text)).charged_micros == 1
            row = await sql.fetchrow(
                "SELECT h.request_id, t.user_id, t.service_type, t.model, t.endpoint FROM credit_holds h "
                "JOIN credit_transactions t USING (user_id, id) WHERE id = $1::uuid",
                ticket.decision_id,
            )
            assert row is not None
            assert tuple(row) == (text, text, text[:64], text * 2, text)

            key = await sidecar.decide(user, **fields)
            redeemed = await sidecar.call("Redeem", pb.RedeemRequest(key_handle=key.key.handle))
            assert redeemed.secret == "sk-test-unicode-0000"
            retried = await sidecar.decide(user, failed_key_handles=[key.key.handle], cost_micros=1)
            assert retried.reason == policy.REASON_BYOK_FIRST_KEY_FAILED
            assert (await sidecar.record(key, SUCCESS)).record_id == key.decision_id


async def test_two_spellings_of_one_name_are_two_users(sidecar: Sidecar, make: Factory) -> None:
    composed, decomposed = (unicodedata.normalize(form, "rené") for form in ("NFC", "NFD"))
    rich, poor = await make.user(name=composed, micros=100), await make.user(name=decomposed)
    assert (await sidecar.decide(rich, cost_micros=1)).WhichOneof("route") == "ticket"
    assert (await sidecar.decide(poor, cost_micros=1)).WhichOneof("route") == "denial"


async def test_an_unexpected_error_is_a_fixed_sentence_and_an_id_that_the_log_explains(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=1_000)
    ask = pb.DecideRequest(user_id=user, provider="openai", cost_micros=1)
    before = await contents(sql)
    await sql.execute("ALTER TABLE credit_holds RENAME COLUMN service_type TO misnamed")
    refusal = (await refused(sidecar, "Decide", ask)).check(grpc.StatusCode.INTERNAL, "INTERNAL")
    batch = await sidecar.call("BatchDecide", pb.BatchDecideRequest(requests=[ask]))
    item = Refusal.of(batch.results[0].status).check(grpc.StatusCode.INTERNAL, "INTERNAL")

    events = {event["error_id"]: event for event in _events(sidecar) if event["event"] == "internal_error"}
    for each, method in ((refusal, "Decide"), (item, "BatchDecide")):
        error_id = each.info.metadata["error_id"]
        assert each.message == f"Something went wrong here. The log has it as error_id {error_id}."
        for told in (each.message, *(str(detail) for detail in each.details)):
            assert not any(word in told for word in ("service_type", "column", "Postgres", "Error("))
        assert events[error_id]["method"] == method
        [*_, root] = events[error_id]["exception"]
        assert (root["exc_type"], "service_type" in root["exc_value"]) == ("UndefinedColumnError", True)
        assert any(frame["name"] in {"handle", "later"} for frame in root["frames"])

    await sql.execute("ALTER TABLE credit_holds RENAME COLUMN misnamed TO service_type")
    assert await contents(sql) == before
    assert (await sidecar.decide(user, cost_micros=1)).WhichOneof("route") == "ticket"


async def test_a_database_that_does_not_answer_is_unavailable_and_says_when_to_retry(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    sidecar = await start_sidecar(statement_timeout=0.2)
    user = await make.user(micros=1_000)
    ticket = await sidecar.decide(user, cost_micros=10)
    before = await contents(sql)
    async with gate_before_holds(sql):
        for method, request in (
            ("Decide", pb.DecideRequest(user_id=user, provider="openai", cost_micros=1)),
            ("Record", pb.RecordRequest(credit_ticket=ticket.ticket.ticket, outcome=SUCCESS)),
        ):
            refusal = await refused(sidecar, method, request)
            refusal.check(grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE", "RetryInfo")
            assert refusal.retry.retry_delay.seconds > 0
    assert await contents(sql) == before
    assert (await sidecar.record(ticket, SUCCESS, cost_micros=1)).charged_micros == 1


async def test_a_database_that_is_gone_is_unavailable_until_it_is_back(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    sidecar = await start_sidecar()
    user = await make.user(micros=1_000)
    name = await sql.fetchval("SELECT current_database()")
    elsewhere: Connection = await asyncpg.connect(
        sidecar.settings.database_url.get_secret_value(), database="postgres"
    )
    try:
        await elsewhere.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        await sql.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name LIKE 'keyturn%'"
        )
        ask = pb.DecideRequest(user_id=user, provider="openai", cost_micros=1)
        for _ in range(3):
            refusal = await refused(sidecar, "Decide", ask)
            refusal.check(grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE", "RetryInfo")
        await elsewhere.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    finally:
        await elsewhere.close()

    async def is_back() -> bool:
        try:
            return bool((await sidecar.decide(user, cost_micros=1)).HasField("ticket"))
        except Fault as fault:
            if fault.code is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False

    await eventually(is_back)


async def test_a_thousand_bad_requests_leave_the_good_ones_unharmed(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user(micros=1_000)
    noise: Any = sidecar.channel.unary_unary("/keyturn.v1.RoutingService/Decide")
    calls = [
        noise(b"\xff" * 100, timeout=30) if index % 10 else sidecar.decide(user, cost_micros=1)
        for index in range(1000)
    ]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(result, grpc.aio.AioRpcError) for result in results) == 900
    tickets = [result for result in results[::10] if isinstance(result, pb.DecideResponse)]
    assert len(tickets) == 100


def _events(sidecar: Sidecar) -> list[dict[str, Any]]:
    return [json.loads(line) for line in sidecar.log.getvalue().splitlines()]
