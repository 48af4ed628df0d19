"""Would the model notice? Each of the ledger's safeguards is taken out of the database in turn, and the same
random work must then fail. With all of them in place, and the same pauses, it does not.

Three safeguards in `make test`, all of them with `make test-faults ARGS=--faults-long`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import asyncpg
import pytest

from tests.factories import Connection
from tests.faults.ledger_machine import World, open_world, run_machine
from tests.support import temporary_directory

_MOST_SEEDS = 60


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """A safeguard that is missing."""

    function: str
    changes: Sequence[tuple[str, str]]
    """Parts of the function, and what takes their place."""
    drops: str = ""
    """An index that would hold all the same."""
    is_long: bool = False


MUTATIONS = {
    "nobody locks the account": Mutation(
        function="keyturn_lock_accounts",
        changes=[("FOR NO KEY UPDATE SKIP LOCKED", ""), ("FOR NO KEY UPDATE", "")],
    ),
    "a ticket settles as often as it is recorded": Mutation(
        function="keyturn_settle_tickets",
        changes=[
            ("ELSIF r.state = 'settled' THEN", "ELSIF false THEN"),
            ("done.hold_id, 'deduction'", "gen_random_uuid(), 'deduction'"),
        ],
    ),
    "a ticket settles as often as it is recorded, but for the key of its deduction": Mutation(
        function="keyturn_settle_tickets",
        changes=[("ELSIF r.state = 'settled' THEN", "ELSIF false THEN")],
        is_long=True,
    ),
    "a settled hold stays held": Mutation(
        function="keyturn_settle_tickets", changes=[(", held_micros = a.held_micros - d.unheld", "")]
    ),
    "a hold that was released is released once more": Mutation(
        function="keyturn_settle_tickets",
        changes=[("CASE WHEN r.state = 'open' THEN r.amount ELSE 0 END", "r.amount")],
        is_long=True,
    ),
    "other contents pass for a repeat": Mutation(
        function="keyturn_settle_tickets",
        changes=[("ELSE 'conflict' END", "ELSE 'replayed' END")],
        is_long=True,
    ),
    "the same request is held for again": Mutation(
        function="keyturn_place_holds",
        changes=[("h.request_id = q.request_id", "false"), ("r.request_id = ANY (v_taken)", "false")],
        drops="credit_holds_by_request",
        is_long=True,
    ),
    "what has run out stands in the way": Mutation(
        function="keyturn_place_holds", changes=[("AND NOT v_swept THEN", "AND false THEN")], is_long=True
    ),
    "one micro more is held than there is": Mutation(
        function="keyturn_place_holds",
        changes=[("v_balance - v_held >= r.amount_micros", "v_balance - v_held + 1 >= r.amount_micros")],
        is_long=True,
    ),
    "a key's use counts as often as it is recorded": Mutation(
        function="keyturn_record_key_usage",
        changes=[
            ("IF r.old_fingerprint IS NOT NULL THEN", "IF false THEN"),
            ("r.user_id, r.id, r.key_id, r.provider", "r.user_id, gen_random_uuid(), r.key_id, r.provider"),
        ],
        is_long=True,
    ),
    "the outcome of an earlier secret marks the present one": Mutation(
        function="keyturn_record_key_usage", changes=[("k.revision = r.key_revision AND ", "")], is_long=True
    ),
    "the same grant is granted again": Mutation(
        function="keyturn_add_grants",
        changes=[("t.request_id = r.request_id", "false")],
        drops="credit_transactions_by_request",
        is_long=True,
    ),
    "nobody hears of a change of a user": Mutation(
        function="keyturn_push_user",
        # But for the user by whom the test sees that a change has arrived.
        changes=[
            ("IF TG_OP <> 'INSERT' THEN", "IF TG_ARGV[0] = 'id' THEN"),
            ("IF TG_OP <> 'DELETE' THEN", "IF false THEN"),
        ],
        is_long=True,
    ),
}
PAUSE = ("v_now := clock_timestamp();", "v_now := clock_timestamp(); PERFORM pg_sleep(0.005);")
"""So that two sidecars that do not wait for each other do meet."""


async def definition_of(sql: Connection, function: str) -> str:
    """The statement that makes the function."""
    text: str = await sql.fetchval("SELECT pg_get_functiondef($1::regproc)", function)
    return text


def changed(text: str, changes: Sequence[tuple[str, str]]) -> str:
    """`text` with each part replaced, which has to be there."""
    for old, new in changes:
        assert old in text, f"{old!r} is no longer there: write the mutation anew"
        text = text.replace(old, new)
    return text


async def catch(world: World, first: int) -> str:
    """What the random work comes upon, and from which seed; nothing if it comes upon nothing."""
    for number in range(first, first + _MOST_SEEDS):
        try:
            await run_machine(world, number=number, runs=20, steps=25, shrink=False)
        except Exception:
            if not world.first_failure:
                raise
            told, world.first_failure = world.first_failure, ""
            return f"seed {number}: {told.rpartition(chr(10) * 2)[2]}"
    return ""


async def test_every_safeguard_that_is_taken_out_is_missed(
    database: str, pytestconfig: pytest.Config, subtests: pytest.Subtests
) -> None:
    is_long: bool = pytestconfig.getoption("--faults-long")
    number: int = pytestconfig.getoption("--faults-seed")
    async with AsyncExitStack() as stack:
        directory = await stack.enter_async_context(temporary_directory())
        # Not the fixture: after this the books of the database are wrong.
        sql: Connection = await asyncpg.connect(database)
        stack.push_async_callback(sql.close)
        world = await open_world(stack, database, sql, directory, crash_every=10**9)
        world.checks_logs = False
        for function in ("keyturn_place_holds", "keyturn_settle_tickets"):
            await sql.execute(changed(await definition_of(sql, function), [PAUSE]))
        await run_machine(world, number=number, runs=20, steps=25)
        for name, mutation in MUTATIONS.items():
            if mutation.is_long and not is_long:
                continue
            with subtests.test(name):
                original = await definition_of(sql, mutation.function)
                index = await sql.fetchval(
                    "SELECT indexdef FROM pg_indexes WHERE indexname = $1", mutation.drops
                )
                await sql.execute(changed(original, mutation.changes))
                if mutation.drops:
                    await sql.execute(f"DROP INDEX {mutation.drops}")
                try:
                    told = await catch(world, number)
                finally:
                    await world.quiet()
                    await sql.execute(
                        "TRUNCATE credit_accounts, credit_holds, credit_transactions, api_key_usage"
                    )
                    await sql.execute(original)
                    if mutation.drops:
                        await sql.execute(index)
                assert told, "nothing was noticed"
                print(f"{name}: {told[:600]}")
