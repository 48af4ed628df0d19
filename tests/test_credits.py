"""CreditService: credits are granted once, balances are those of the database, books read as written."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import asyncpg
import grpc
import pytest

from keyturn.v1 import credit_service_pb2 as pb
from keyturn.v1 import routing_service_pb2 as routing
from keyturn_server.ids import new_id
from keyturn_server.store.database import Database
from tests.factories import Connection, Factory
from tests.refusals import Refusal, contents, refused
from tests.support import Fault, Sidecar, eventually, method_of
from tests.test_bad_input import Case, out_of_range, too_long
from tests.test_users import UNICODE_IDS

SUCCESS = routing.OUTCOME_SUCCESS
MOST = 2**63 - 1


async def grant(sidecar: Sidecar, user_id: str, micros: int = 100, **fields: Any) -> pb.GrantCreditsResponse:
    answer: pb.GrantCreditsResponse = await sidecar.call(
        "GrantCredits", pb.GrantCreditsRequest(user_id=user_id, amount_micros=micros, **fields)
    )
    return answer


async def balance(sidecar: Sidecar, user_id: str) -> tuple[int, int, int]:
    answer = await sidecar.call("GetBalance", pb.GetBalanceRequest(user_id=user_id))
    return answer.balance_micros, answer.held_micros, answer.available_micros


async def listed(sidecar: Sidecar, user_id: str, **fields: Any) -> Sequence[pb.Transaction]:
    """All pages together."""
    found: list[pb.Transaction] = []
    token = ""
    while True:
        request = pb.ListTransactionsRequest(user_id=user_id, page_token=token, **fields)
        answer = await sidecar.call("ListTransactions", request)
        found += answer.transactions
        if not (token := answer.next_page_token):
            return found


# -- grants -------------------------------------------------------------------------------------------


async def test_credits_are_granted_and_can_be_spent(sidecar: Sidecar, make: Factory, sql: Connection) -> None:
    user = await make.user("free")
    assert await balance(sidecar, user) == (0, 0, 0)
    granted = await grant(sidecar, user, 5_000_000, request_id="invoice-1", description="Five dollars")
    assert (granted.balance_micros, granted.replayed) == (5_000_000, False)
    assert await balance(sidecar, user) == (5_000_000, 0, 5_000_000)
    ticket = await sidecar.decide(user, cost_micros=2_000_000)
    assert await balance(sidecar, user) == (5_000_000, 2_000_000, 3_000_000)
    await sidecar.record(ticket, SUCCESS, cost_micros=7_000_000)
    assert await balance(sidecar, user) == (-2_000_000, 0, -2_000_000)
    row = await sql.fetchrow("SELECT * FROM credit_transactions WHERE transaction_type = 'grant'")
    assert row is not None
    assert (str(row["id"]), row["user_id"]) == (granted.transaction_id, user)
    assert (row["request_id"], row["description"]) == ("invoice-1", "Five dollars")
    assert (row["amount_micros"], row["balance_after_micros"], row["cost_cents"]) == (5_000_000, 5_000_000, 0)


async def test_a_request_id_grants_once_and_answers_as_the_first_time(
    sidecar: Sidecar, make: Factory
) -> None:
    user = await make.user()
    first = await grant(sidecar, user, 100, request_id="r")
    await grant(sidecar, user, 7)
    again = await grant(sidecar, user, 100, request_id="r", description="said otherwise")
    assert again.replayed
    assert (again.transaction_id, again.balance_micros) == (first.transaction_id, 100)
    assert await balance(sidecar, user) == (107, 0, 107)


async def test_a_request_id_with_another_amount_is_a_conflict(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user()
    await grant(sidecar, user, 100, request_id="r")
    before = await contents(sql)
    refusal = await refused(
        sidecar, "GrantCredits", pb.GrantCreditsRequest(user_id=user, amount_micros=101, request_id="r")
    )
    refusal.check(grpc.StatusCode.ALREADY_EXISTS, "GRANT_CONFLICT")
    assert "100 micros" in refusal.message
    assert await contents(sql) == before


async def test_request_ids_belong_to_their_user_and_none_grants_every_time(
    sidecar: Sidecar, make: Factory
) -> None:
    one, other = await make.user(), await make.user()
    for user in (one, other):
        assert not (await grant(sidecar, user, 100, request_id="r")).replayed
        await grant(sidecar, user, 100)
        await grant(sidecar, user, 100)
        assert await balance(sidecar, user) == (300, 0, 300)


async def test_the_request_ids_of_decisions_and_of_grants_do_not_meet(
    sidecar: Sidecar, make: Factory
) -> None:
    user = await make.user(micros=1_000)
    ticket = await sidecar.decide(user, cost_micros=10, request_id="r")
    assert not (await grant(sidecar, user, 10, request_id="r")).replayed
    await sidecar.record(ticket, SUCCESS, cost_micros=10)
    assert (await sidecar.decide(user, cost_micros=10, request_id="r")).replayed
    assert not (await grant(sidecar, user, 10, request_id="s")).replayed
    assert not (await sidecar.decide(user, cost_micros=10, request_id="s")).replayed


async def test_a_hundred_grants_at_once_with_one_request_id_grant_once(
    start_sidecar: Callable[..., Any], make: Factory
) -> None:
    sidecars = [await start_sidecar(), await start_sidecar()]
    user = await make.user()
    answers = await asyncio.gather(
        *(grant(sidecars[index % 2], user, 100, request_id="r") for index in range(100))
    )
    assert sum(not answer.replayed for answer in answers) == 1
    assert len({answer.transaction_id for answer in answers}) == 1
    assert {answer.balance_micros for answer in answers} == {100}
    assert await balance(sidecars[0], user) == (100, 0, 100)


async def test_grants_wait_for_each_other_and_see_what_came_of_it(
    make: Factory, sql: Connection, database: str
) -> None:
    user = await make.user()
    ask = "SELECT * FROM keyturn_grant_credits($1, $2, $3, $4, '')"
    waiting = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    connections = [await asyncpg.connect(database) for _ in range(3)]
    one, two, three = connections

    async def both_wait() -> bool:
        return bool(await sql.fetchval(waiting) == 2)

    try:
        async with one.transaction():
            first = await one.fetchrow(ask, new_id(), user, 100, "r")
            same = asyncio.ensure_future(two.fetchrow(ask, new_id(), user, 100, "r"))
            other = asyncio.ensure_future(three.fetchrow(ask, new_id(), user, 100, "s"))
            await eventually(both_wait)
        replayed, granted = await asyncio.gather(same, other)
    finally:
        for connection in connections:
            await connection.close()
    assert first is not None
    assert replayed is not None
    assert granted is not None
    assert (replayed["transaction_id"], replayed["replayed"]) == (first["transaction_id"], True)
    assert (granted["balance_micros"], granted["replayed"]) == (200, False)


async def test_grants_decisions_and_records_at_once_keep_the_books(
    start_sidecar: Callable[..., Any], make: Factory
) -> None:
    sidecars = [await start_sidecar(), await start_sidecar()]
    users = [await make.user() for _ in range(3)]

    async def spend(index: int) -> int:
        sidecar, user = sidecars[index % 2], users[index % 3]
        decision = await sidecar.decide(user, cost_micros=50)
        if decision.WhichOneof("route") != "ticket":
            return 0
        recorded: routing.RecordResponse = await sidecar.record(decision, SUCCESS, cost_micros=30)
        return recorded.charged_micros

    async def add(index: int) -> int:
        answer = await grant(sidecars[index % 2], users[index % 3], 20, request_id=str(index // 6))
        return 0 if answer.replayed else 20

    done = await asyncio.gather(*(work(index) for index in range(240) for work in (add, spend)))
    left = [(await balance(sidecars[0], user))[0] for user in users]
    assert sum(done[::2]) - sum(done[1::2]) == sum(left)
    # Six calls in a row share a request_id, and are of three users.
    assert sum(done[::2]) == 120 * 20
    assert all(micros >= 0 for micros in left)


async def test_nobody_is_granted_anything_who_is_not_there(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    gone = await make.user(micros=5)
    await sql.execute("DELETE FROM users WHERE id = $1", gone)
    before = await contents(sql)
    for user in ("nobody", gone):
        request = pb.GrantCreditsRequest(user_id=user, amount_micros=1)
        refusal = await refused(sidecar, "GrantCredits", request)
        refusal.check(grpc.StatusCode.NOT_FOUND, "USER_NOT_FOUND", "ResourceInfo")
        assert refusal.resource.resource_name == user
    assert await contents(sql) == before


async def test_a_grant_makes_the_account_that_is_missing(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user()
    await sql.execute("DELETE FROM credit_accounts")
    assert await balance(sidecar, user) == (0, 0, 0)
    assert list(await listed(sidecar, user)) == []
    assert (await grant(sidecar, user, 100)).balance_micros == 100
    assert await balance(sidecar, user) == (100, 0, 100)


async def test_a_balance_stops_at_its_limit_and_says_so(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user, other = await make.user(), await make.user()
    await make.grant(user, MOST - 2)
    before = await contents(sql)
    request = pb.GrantCreditsRequest(user_id=user, amount_micros=3)
    refusal, fine = await asyncio.gather(
        refused(sidecar, "GrantCredits", request), grant(sidecar, other, 3, request_id="r")
    )
    refusal.check_field("amount_micros", f"limit of {MOST} micros")
    assert fine.balance_micros == 3
    after = await contents(sql)
    assert [name for name in after if after[name] != before[name]] == [
        name for name in after if name in ("credit_accounts", "credit_transactions")
    ]
    assert (await grant(sidecar, user, 2)).balance_micros == MOST
    assert await balance(sidecar, user) == (MOST, 0, MOST)
    ticket = await sidecar.decide(user, cost_micros=10**12)
    assert (await sidecar.record(ticket, SUCCESS, cost_micros=10)).balance_micros == MOST - 10
    assert [one.balance_after_micros for one in await listed(sidecar, user)] == [MOST - 10, MOST, MOST - 2]
    with pytest.raises(asyncpg.NumericValueOutOfRangeError, match="over 9223372036854775807"):
        await make.grant(user, 11)


async def test_a_locked_account_fails_its_own_grant_alone(
    sidecar: Sidecar, make: Factory, database: str
) -> None:
    locked, *others = [await make.user() for _ in range(5)]
    psql = await asyncpg.connect(database)
    try:
        async with psql.transaction():
            await psql.execute("SELECT 1 FROM credit_accounts WHERE user_id = $1 FOR UPDATE", locked)
            results = await asyncio.gather(
                *(grant(sidecar, user, 10, request_id="r") for user in (locked, *others)),
                return_exceptions=True,
            )
    finally:
        await psql.close()
    fault, *answers = results
    assert isinstance(fault, Fault)
    refusal = Refusal.of(fault)
    refusal.check(grpc.StatusCode.UNAVAILABLE, "ROW_LOCKED", "RetryInfo")
    assert refusal.retry.retry_delay.seconds == 1
    for answer in answers:
        assert isinstance(answer, pb.GrantCreditsResponse)
        assert answer.balance_micros == 10
    assert not (await grant(sidecar, locked, 10, request_id="r")).replayed


async def test_a_grant_goes_through_though_its_caller_hung_up(
    sidecar: Sidecar, make: Factory, sql: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = await make.user()
    fetch, begun, may_go_on = Database.fetch, asyncio.Event(), asyncio.Event()

    async def slow(database: Database, statement: str, *arguments: Any) -> Any:
        if "add_grants" in statement:
            begun.set()
            await may_go_on.wait()
        return await fetch(database, statement, *arguments)

    monkeypatch.setattr(Database, "fetch", slow)
    request = pb.GrantCreditsRequest(user_id=user, amount_micros=100, request_id="r")
    call = method_of(sidecar.channel, "GrantCredits")(request, timeout=30)
    await begun.wait()
    assert call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    # Over the same connection, so the sidecar has heard of the cancellation before.
    assert await balance(sidecar, user) == (0, 0, 0)
    may_go_on.set()

    async def granted() -> bool:
        return await balance(sidecar, user) == (100, 0, 100)

    await eventually(granted)
    assert (await grant(sidecar, user, 100, request_id="r")).replayed


async def test_the_function_for_plain_sql_does_the_same(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user()
    ask = "SELECT * FROM keyturn_grant_credits($1, $2, $3, $4, $5)"
    first = await sql.fetchrow(ask, new_id(), user, 100, "r", "by hand")
    again = await sql.fetchrow(ask, new_id(), user, 999, "r", "")
    assert first is not None
    assert again is not None
    assert (first["amount_micros"], first["balance_micros"], first["replayed"]) == (100, 100, False)
    assert tuple(again) == (first["transaction_id"], 100, 100, True)
    assert await sql.fetchrow(ask, new_id(), "nobody", 100, None, "") is None
    replayed = await grant(sidecar, user, 100, request_id="r")
    assert (replayed.replayed, replayed.transaction_id) == (True, str(first["transaction_id"]))
    # A correction downwards is for SQL alone.
    corrected = await sql.fetchrow(ask, new_id(), user, -40, None, "Correction")
    assert corrected is not None
    assert corrected["balance_micros"] == 60
    assert await balance(sidecar, user) == (60, 0, 60)


BAD_GRANTS: list[Case] = [
    ({"user_id": ""}, "user_id", "Required."),
    *too_long("user_id", 128),
    *out_of_range("amount_micros", 1, 10**12),
    *too_long("request_id", 128),
    *too_long("description", 500),
]


async def test_a_grant_that_breaks_a_limit_is_refused_by_name_and_changes_nothing(
    sidecar: Sidecar, make: Factory, sql: Connection, subtests: pytest.Subtests
) -> None:
    user = await make.user()
    before = await contents(sql)
    good: dict[str, Any] = {"user_id": user, "amount_micros": 1}
    for fields, field, sentence in BAD_GRANTS:
        with subtests.test(repr(fields)):
            refusal = await refused(sidecar, "GrantCredits", pb.GrantCreditsRequest(**good | fields))
            refusal.check_field(field, sentence)
    wrong = pb.GrantCreditsRequest(request_id="a\0", description="d" * 501)
    assert set((await refused(sidecar, "GrantCredits", wrong)).fields) == {
        "user_id", "amount_micros", "request_id", "description",
    }  # fmt: skip
    assert await contents(sql) == before
    at_the_limit = await grant(sidecar, user, 10**12, request_id="r" * 128, description="d" * 500)
    assert at_the_limit.balance_micros == 10**12


async def test_ids_of_any_script_are_granted_and_listed(
    sidecar: Sidecar, make: Factory, subtests: pytest.Subtests
) -> None:
    for name in UNICODE_IDS:
        with subtests.test(name):
            user = await make.user(name=name)
            for amount in (1, 2, 3):
                await grant(sidecar, user, amount, request_id=f"{amount}{name}"[:128], description=name)
            found = await listed(sidecar, user, page_size=1)
            assert [one.amount_micros for one in found] == [3, 2, 1]
            assert {one.description for one in found} == {name}
            assert found[0].request_id == f"3{name}"[:128]


async def test_a_grant_says_who_made_it_also_when_it_is_a_replay(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user()
    granted = await grant(sidecar, user, 100, request_id="r", description="between us")
    await grant(sidecar, user, 100, request_id="r")
    lines = [json.loads(line) for line in sidecar.log.getvalue().splitlines()]
    changes = [line for line in lines if line["event"] == "operator_change"]
    assert [(line["action"], line["caller"], line["user_id"]) for line in changes] == [
        ("GrantCredits", "socket", user)
    ] * 2
    assert [(line["amount_micros"], line["replayed"]) for line in changes] == [(100, False), (100, True)]
    assert {line["transaction_id"] for line in changes} == {granted.transaction_id}


# -- the books ----------------------------------------------------------------------------------------


async def test_a_balance_is_never_cached(sidecar: Sidecar, make: Factory, sql: Connection) -> None:
    user = await make.user()
    await sql.execute("ALTER TABLE credit_accounts DISABLE TRIGGER ALL")
    for micros in range(1, 6):
        await make.grant(user, 1)
        assert await balance(sidecar, user) == (micros, 0, micros)


async def test_the_books_of_a_user_who_was_deleted_can_be_read(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=50)
    await sql.execute("DELETE FROM users WHERE id = $1", user)
    assert await balance(sidecar, user) == (50, 0, 50)
    assert [one.amount_micros for one in await listed(sidecar, user)] == [50]


async def test_whose_books_there_are_none_is_named(sidecar: Sidecar, subtests: pytest.Subtests) -> None:
    requests = {"GetBalance": pb.GetBalanceRequest, "ListTransactions": pb.ListTransactionsRequest}
    for method, request in requests.items():
        refusal = await refused(sidecar, method, request(user_id="nobody"))
        refusal.check(grpc.StatusCode.NOT_FOUND, "USER_NOT_FOUND", "ResourceInfo")
        assert (refusal.resource.resource_type, refusal.resource.resource_name) == ("user", "nobody")
        for fields, field, sentence in [({"user_id": ""}, "user_id", "Required."), *too_long("user_id", 128)]:
            with subtests.test(f"{method} {fields}"):
                (await refused(sidecar, method, request(**fields))).check_field(field, sentence)


async def test_a_deduction_tells_what_it_was_for(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user("free", micros=1_000_000)
    decision = await sidecar.decide(
        user, model="gpt-4o-mini", service_type="copilot", request_id="req", cost_micros=5_000
    )
    await sidecar.record(
        decision, SUCCESS, usage=routing.Usage(input_tokens=10, output_tokens=5), cost_micros=4_000
    )
    unknown_usage = await sidecar.decide(user, cost_micros=700)
    await sidecar.record(unknown_usage, SUCCESS)
    second, first, granted = await listed(sidecar, user)
    assert first == pb.Transaction(
        transaction_id=decision.decision_id,
        type=pb.TRANSACTION_TYPE_DEDUCTION,
        amount_micros=-4_000,
        balance_after_micros=996_000,
        service_type="copilot",
        provider="openai",
        model="gpt-4o-mini",
        outcome="SUCCESS",
        cost_source="REPORTED",
        mode="BYOK_FIRST",
        reason="TIER_NOT_ELIGIBLE",
        total_tokens=15,
        create_time=first.create_time,
    )
    assert (second.cost_source, second.amount_micros) == ("ESTIMATED", -700)
    assert not second.HasField("total_tokens"), "not known is not zero"
    assert (granted.type, granted.amount_micros) == (pb.TRANSACTION_TYPE_GRANT, 1_000_000)
    assert (granted.description, granted.outcome, granted.mode) == ("test", "", "")


async def test_the_newest_change_of_the_balance_comes_first_whenever_it_was_decided(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=1_000)
    early = await sidecar.decide(user, cost_micros=10)
    late = await sidecar.decide(user, cost_micros=10)
    await sidecar.record(late, SUCCESS, cost_micros=2)
    # As PostgreSQL before 18 makes ids: they do not sort by time.
    random_id = "ffffffff-ffff-4fff-bfff-ffffffffffff"
    await sql.execute("SELECT keyturn_grant_credits($1, $2, 3, NULL, '')", random_id, user)
    await sidecar.record(early, SUCCESS, cost_micros=1)
    found = await listed(sidecar, user)
    assert [one.amount_micros for one in found] == [-1, 3, -2, 1_000]
    balances = [one.balance_after_micros for one in found]
    assert balances == [1_000, 1_001, 998, 1_000]
    times = [one.create_time.ToNanoseconds() for one in found]
    assert times == sorted(times, reverse=True)


async def test_pages_of_any_size_come_to_the_whole_list(
    sidecar: Sidecar, make: Factory, sql: Connection, subtests: pytest.Subtests
) -> None:
    user = await make.user(micros=1_000)
    for index in range(12):
        if index % 3:
            await make.grant(user, index)
        else:
            await sidecar.record(await sidecar.decide(user, cost_micros=index), SUCCESS, cost_micros=index)
    # Several of one moment.
    await sql.execute(
        "UPDATE credit_transactions SET created_at = t.at FROM (SELECT min(created_at) AS at"
        " FROM credit_transactions WHERE amount_micros IN (4, 5, 7)) t WHERE amount_micros IN (4, 5, 7)"
    )
    await make.grant(await make.user(), 77)
    whole = list(await listed(sidecar, user))
    assert len(whole) == 13
    for size in (1, 2, 5, 12, 13, 14, 1000):
        with subtests.test(str(size)):
            assert list(await listed(sidecar, user, page_size=size)) == whole
    for kind in (pb.TRANSACTION_TYPE_GRANT, pb.TRANSACTION_TYPE_DEDUCTION):
        with subtests.test(str(kind)):
            of_kind = [one for one in whole if one.type == kind]
            assert len(of_kind) in (4, 9)
            for size in (2, 9):
                assert list(await listed(sidecar, user, type=kind, page_size=size)) == of_kind


async def test_what_is_new_does_not_shift_the_pages_behind(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user()
    for amount in (1, 2, 3, 4):
        await make.grant(user, amount)
    request = pb.ListTransactionsRequest(user_id=user, page_size=2)
    first = await sidecar.call("ListTransactions", request)
    await make.grant(user, 5)
    request.page_token = first.next_page_token
    second = await sidecar.call("ListTransactions", request)
    assert [one.amount_micros for one in (*first.transactions, *second.transactions)] == [4, 3, 2, 1]
    assert second.next_page_token == ""


async def test_a_list_holds_a_hundred_unless_asked(sidecar: Sidecar, make: Factory, sql: Connection) -> None:
    user = await make.user()
    await sql.execute(
        "SELECT keyturn_grant_credits(gen_random_uuid(), $1, 1, NULL, '') FROM generate_series(1, 1001)", user
    )
    for size, expected in ((0, 100), (1000, 1000)):
        request = pb.ListTransactionsRequest(user_id=user, page_size=size)
        answer = await sidecar.call("ListTransactions", request)
        assert len(answer.transactions) == expected
        assert answer.next_page_token


BAD_LISTS: list[Case] = [
    ({"type": 3}, "type", "Unknown value 3."),
    ({"type": -1}, "type", "Unknown value -1."),
    ({"page_size": -1}, "page_size", "From 1 to 1000; this is -1."),
    ({"page_size": 1001}, "page_size", "From 1 to 1000; this is 1001."),
    ({"page_size": 2**31 - 1}, "page_size", "From 1 to 1000"),
]


async def test_a_list_that_breaks_a_limit_is_refused_by_name(
    sidecar: Sidecar, make: Factory, subtests: pytest.Subtests
) -> None:
    user = await make.user()
    for fields, field, sentence in BAD_LISTS:
        with subtests.test(repr(fields)):
            given: dict[str, Any] = {"user_id": user} | fields
            request = pb.ListTransactionsRequest(**given)
            (await refused(sidecar, "ListTransactions", request)).check_field(field, sentence)
    wrong = pb.ListTransactionsRequest(type=9, page_size=-1)  # type: ignore[arg-type]
    assert set((await refused(sidecar, "ListTransactions", wrong)).fields) == {"user_id", "type", "page_size"}


async def test_a_page_token_leads_nowhere_but_on(sidecar: Sidecar, make: Factory) -> None:
    user, other = await make.user(micros=1), await make.user(micros=1)
    await make.grant(user, 1)
    first = await sidecar.call("ListTransactions", pb.ListTransactionsRequest(user_id=user, page_size=1))
    token = first.next_page_token
    grants = pb.TRANSACTION_TYPE_GRANT
    for cause, request in (
        ("other_query", pb.ListTransactionsRequest(user_id=other, page_token=token)),
        ("other_query", pb.ListTransactionsRequest(user_id=user, type=grants, page_token=token)),
        ("malformed", pb.ListTransactionsRequest(user_id=user, page_token=token[:-4])),
        ("malformed", pb.ListTransactionsRequest(user_id=user, page_token="1")),
    ):
        refusal = await refused(sidecar, "ListTransactions", request)
        refusal.check(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_TOKEN", "BadRequest")
        assert list(refusal.fields) == ["page_token"]
        assert refusal.info.metadata["cause"] in (cause, "tampered")
