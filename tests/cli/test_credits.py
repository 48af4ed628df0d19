"""`keyturn credits`, against a running sidecar."""

from __future__ import annotations

import asyncio
import re

from keyturn.v1 import routing_service_pb2 as pb
from tests.cli.command import answered, ask, check_fault, keyturn, rows_of, told
from tests.factories import Connection, Factory
from tests.support import Sidecar


async def test_a_grant_shows_the_balance_and_happens_once_for_its_request_id(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=1_000_000)
    grant = ("credits", "grant", user, "0.250001", "--request-id", "invoice 7", "--description", "sorry")
    first = await told(sidecar, *grant)
    again = await told(sidecar, *grant)
    assert first.startswith("Granted $0.250001.\n")
    assert "Balance      $1.250001" in first
    assert "Request id   invoice 7" in first
    assert again.startswith("$0.250001 had been granted before; nothing changed.\n")
    assert "Balance then  $1.250001" in again
    assert (await answered(sidecar, *grant))["replayed"] is True
    assert (
        await sql.fetchval("SELECT balance_micros FROM credit_accounts WHERE user_id = $1", user) == 1_250_001
    )


async def test_a_request_id_that_is_made_up_is_told_before_the_call_so_that_a_retry_can_give_it(
    sidecar: Sidecar, make: Factory
) -> None:
    user = await make.user()
    unreachable = await keyturn("credits", "grant", user, "5", KEYTURN_ADDRESS="unix:/nonexistent/s")
    assert (unreachable.code, unreachable.out) == (6, "")
    request_id = re.findall(r"--request-id ([0-9a-f-]{36}) ", unreachable.err)[0]
    said = await told(sidecar, "credits", "grant", user, "5", "--request-id", request_id)
    assert said.startswith("Granted $5.00.\n")
    finished = await ask(sidecar, "credits", "grant", user, "5")
    assert finished.code == 0
    other = re.findall(r"request id ([0-9a-f-]{36}):", finished.err)[0]
    assert other != request_id
    assert f"Request id   {other}" in finished.out


async def test_the_same_request_id_with_another_amount_is_refused(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user()
    await told(sidecar, "credits", "grant", user, "5", "--request-id", "r")
    check_fault(await ask(sidecar, "credits", "grant", user, "6", "--request-id", "r"), 3, "[GRANT_CONFLICT]")


async def test_amounts_that_cannot_be_granted_are_refused_and_nothing_is(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user()
    for finished in await asyncio.gather(
        *(
            ask(sidecar, "credits", "grant", user, amount, "--request-id", "r")
            for amount in ("0", "1000001", "NaN", "0.0000001")
        )
    ):
        check_fault(finished, 2)
    assert await sql.fetchval("SELECT count(*) FROM credit_transactions") == 0


async def test_a_balance_shows_what_is_there_held_and_free(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user(micros=1_000_000)
    await sidecar.decide(user, cost_micros=250_000)
    said = await told(sidecar, "credits", "balance", user)
    assert rows_of(said) == [["Balance", "$1.00"], ["Held", "$0.25"], ["Available", "$0.75"]]
    assert await answered(sidecar, "credits", "balance", user) == {
        "balanceMicros": "1000000",
        "heldMicros": "250000",
        "availableMicros": "750000",
    }


async def test_transactions_are_listed_newest_first_by_type_and_bounded(
    sidecar: Sidecar, make: Factory
) -> None:
    user = await make.user(micros=1_000_000)
    decision = await sidecar.decide(user, model="gpt-4o-mini", service_type="copilot", cost_micros=500_000)
    await sidecar.record(decision, pb.OUTCOME_SUCCESS, cost_micros=123_456)
    both, grants, last = await asyncio.gather(
        told(sidecar, "credits", "transactions", user),
        told(sidecar, "credits", "transactions", user, "--type", "grant"),
        ask(sidecar, "credits", "transactions", user, "--limit", "1"),
    )
    headings, deduction, grant = rows_of(both)
    assert headings == ["WHEN", "TYPE", "AMOUNT", "BALANCE", "TOKENS", "WHAT", "TRANSACTION"]
    assert deduction[1:4] == ["deduction", "-$0.123456", "$0.876544"]
    assert "openai gpt-4o-mini, copilot, SUCCESS, REPORTED" in deduction[4]
    assert deduction[-1] == decision.decision_id
    assert grant[1:4] == ["grant", "$1.00", "$1.00"]
    assert rows_of(grants) == [rows_of(grants)[0], grant]
    assert [row[1] for row in rows_of(last.out)] == ["TYPE", "deduction"]
    assert "there are more" in last.err


async def test_json_has_all_transactions_however_many_pages_they_are(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user()
    async with sql.transaction():
        for number in range(1_203):
            await make.grant(user, 1, f"r{number}")
    everything, some, shown = await asyncio.gather(
        answered(sidecar, "credits", "transactions", user),
        answered(sidecar, "credits", "transactions", user, "--limit", "701"),
        ask(sidecar, "credits", "transactions", user),
    )
    ids = [one["requestId"] for one in everything["transactions"]]
    assert sorted(ids) == sorted(f"r{number}" for number in range(1_203))
    assert everything["nextPageToken"] == ""
    assert [one["requestId"] for one in some["transactions"]] == ids[:701]
    assert some["nextPageToken"]
    assert len(shown.out.splitlines()) == 1 + 100
    assert "these are the first 100; there are more" in shown.err


async def test_no_transactions_are_a_sentence_and_an_empty_list(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user()
    assert await told(sidecar, "credits", "transactions", user) == "No transactions.\n"
    assert (await answered(sidecar, "credits", "transactions", user))["transactions"] == []


async def test_a_user_that_is_not_there_ends_with_4(sidecar: Sidecar) -> None:
    for finished in await asyncio.gather(
        ask(sidecar, "credits", "grant", "nobody", "5", "--request-id", "r"),
        ask(sidecar, "credits", "balance", "nobody"),
        ask(sidecar, "credits", "transactions", "nobody"),
    ):
        check_fault(finished, 4, "[USER_NOT_FOUND]")
