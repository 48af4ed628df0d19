"""Several sidecars, each a process, on one database: one balance, no deadlock, and bad rows alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import asyncpg
import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from keyturn.v1 import credit_service_pb2
from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import routing_service_pb2 as pb
from tests.factories import Connection, Factory
from tests.faults.conftest import Form
from tests.faults.processes import Place, Process
from tests.gate import gate_before, someone_waits
from tests.refusals import Refusal
from tests.support import Fault, Sidecar, eventually

SUCCESS = pb.OUTCOME_SUCCESS


@asynccontextmanager
async def sidecars(place: Place, count: int, **variables: str) -> AsyncIterator[list[Process]]:
    """That many, side by side; told to end at the end of the block."""
    async with AsyncExitStack() as stack:
        entering = (
            stack.enter_async_context(replace(place, name=f"s{number}").sidecar(**variables))
            for number in range(count)
        )
        running = [await one for one in entering]
        yield running
        for process in running:
            await process.stop()


# -- one balance ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
async def test_sidecars_that_race_for_one_balance_give_what_it_covers_and_charge_each_ticket_once(
    place: Place, make: Factory, sql: Connection, form: Form, count: int
) -> None:
    tickets, asked = 100, 400
    rounds = form.rounds(3, 100)
    async with sidecars(place, count) as running:
        for _ in range(rounds):
            user = await make.user(micros=tickets * 1_000)
            answers = await asyncio.gather(
                *(running[index % count].decide(user, cost_micros=1_000) for index in range(asked))
            )
            given = [answer for answer in answers if answer.HasField("ticket")]
            assert len({answer.decision_id for answer in given}) == len(given) == tickets
            denied = {answer.denial.reason for answer in answers if answer.HasField("denial")}
            assert denied == {policy.DENIAL_REASON_HOLDS_IN_FLIGHT}
            # Every one of them records every ticket.
            recorded = await asyncio.gather(
                *(one.record(ticket, SUCCESS, cost_micros=1_000) for ticket in given for one in running)
            )
            assert sum(not answer.replayed for answer in recorded) == tickets
            account = await sql.fetchrow(
                "SELECT balance_micros, held_micros FROM credit_accounts WHERE user_id = $1", user
            )
            assert account is not None
            assert tuple(account) == (0, 0)
    form.figures |= {"asked": rounds * asked, "given": rounds * tickets, "overspent": 0}


# -- deadlocks -----------------------------------------------------------------------------------------

DEADLOCKS = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"


class Traffic:
    """Calls of every kind that takes locks, over the same few users, in whatever order."""

    def __init__(self, users: Sequence[str], chance: random.Random) -> None:
        self.done = 0
        self.busy = 0
        """How often somebody else had the row for too long."""
        self._users = users
        self._chance = chance
        self._decided: list[pb.DecideResponse] = []

    async def call(self, process: Process) -> None:
        """One call."""
        kind = self._chance.choice(["decide", "decide", "record", "record", "grant", "again"])
        method, request = getattr(self, f"_{kind}")()
        try:
            answer = await process.call(method, request)
        except Fault as fault:
            if Refusal.of(fault).info.reason != "ROW_LOCKED":
                raise
            self.busy += 1
            return
        self.done += 1
        if method == "BatchDecide":
            self._decided += [one.response for one in answer.results if one.HasField("response")]

    def _decide(self) -> tuple[str, Any]:
        """Of several users, in an order of their own; some run out at once, and are swept."""
        chosen = self._chance.choices(self._users, k=self._chance.randint(1, 12))
        return "BatchDecide", pb.BatchDecideRequest(
            requests=[
                pb.DecideRequest(
                    user_id=user,
                    provider="openai",
                    cost_micros=10,
                    hold_ttl=Duration(seconds=self._chance.choice([1, 60])),
                    constraint=self._chance.choice([policy.CONSTRAINT_ANY, policy.CONSTRAINT_CREDITS_ONLY]),
                )
                for user in chosen
            ]
        )

    def _record(self, *, forget: bool = True) -> tuple[str, Any]:
        """Of what was decided by any sidecar, of any user."""
        chosen = self._chance.sample(self._decided, min(len(self._decided), self._chance.randint(1, 12)))
        if forget:
            self._decided = [one for one in self._decided if one not in chosen]
        reports = [
            pb.RecordRequest(
                key_handle=one.key.handle,
                outcome=self._chance.choice([SUCCESS, pb.OUTCOME_RATE_LIMITED]),
            )
            if one.HasField("key")
            else pb.RecordRequest(credit_ticket=one.ticket.ticket, outcome=SUCCESS, cost_micros=3)
            for one in chosen
            if not one.HasField("denial")
        ]
        return ("BatchRecord", pb.BatchRecordRequest(requests=reports)) if reports else self._decide()

    def _again(self) -> tuple[str, Any]:
        """The same records once more, perhaps while they are made."""
        return self._record(forget=False)

    def _grant(self) -> tuple[str, Any]:
        user = self._chance.choice(self._users)
        return "GrantCredits", credit_service_pb2.GrantCreditsRequest(
            user_id=user, amount_micros=100, request_id=f"g{self._chance.randrange(1000)}"
        )


async def test_holds_records_grants_and_sweeps_over_the_same_users_never_deadlock(
    place: Place, make: Factory, sql: Connection, form: Form, database: str
) -> None:
    # PostgreSQL looks for one as soon as anybody waits, and so sooner than anybody gives up waiting.
    name = await sql.fetchval("SELECT current_database()")
    await sql.execute(f"ALTER DATABASE {name} SET deadlock_timeout = '5ms'")
    users = [await make.user(micros=10**9) for _ in range(6)]
    for user in users[:3]:
        await make.key(user)
        await make.key(user)
    traffic = Traffic(users, form.random)
    calls = form.rounds(600, 20_000)
    async with sidecars(place, 3, KEYTURN_SWEEP_INTERVAL="0.05") as running:
        is_swept = asyncio.Event()

        async def some_are_swept() -> bool:
            return bool(
                await sql.fetchval("SELECT EXISTS (SELECT FROM credit_holds WHERE state = 'expired')")
            )

        async def watch() -> None:
            await eventually(some_are_swept, seconds=60)
            is_swept.set()

        async def serve(process: Process) -> None:
            while traffic.done < calls or not is_swept.is_set():
                await traffic.call(process)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(watch())
            for process in running * 6:
                tasks.create_task(serve(process))
        away = [event for one in running for event in one.served.events if "40P01" in str(event)]
        assert away == []
    swept = await sql.fetchval("SELECT count(*) FROM credit_holds WHERE state = 'expired'")
    assert swept > 0
    assert await sql.fetchval(DEADLOCKS) == 0
    form.figures |= {"batches": traffic.done, "row locked": traffic.busy, "swept": swept, "deadlocks": 0}
    await deadlock(database, users)

    async def is_counted() -> bool:
        return bool(await sql.fetchval(DEADLOCKS) == 1)

    await eventually(is_counted)


async def deadlock(database: str, users: Sequence[str]) -> None:
    """One on purpose: it would have been counted."""
    lock = "SELECT FROM credit_accounts WHERE user_id = $1 FOR UPDATE"
    connections: list[Connection] = [await asyncpg.connect(database) for _ in range(2)]
    try:
        for connection, user in zip(connections, users[:2], strict=True):
            await connection.execute("BEGIN")
            await connection.fetch(lock, user)
        results = await asyncio.gather(
            *(
                connection.fetch(lock, user)
                for connection, user in zip(connections, users[1::-1], strict=True)
            ),
            return_exceptions=True,
        )
        assert any(isinstance(one, asyncpg.DeadlockDetectedError) for one in results)
    finally:
        for connection in connections:
            await connection.close()


# -- poison --------------------------------------------------------------------------------------------

IN_A_GROUP = 6


def holds(user: str, poisoned: set[int]) -> Any:
    """Asks for holds, of which the operator's own constraint refuses some."""
    return pb.BatchDecideRequest(
        requests=[
            pb.DecideRequest(
                user_id=user,
                provider="openai",
                cost_micros=10,
                constraint=policy.CONSTRAINT_CREDITS_ONLY,
                service_type="poison" if index in poisoned else "fine",
            )
            for index in range(IN_A_GROUP)
        ]
    )


def reports(decided: pb.BatchDecideResponse, poisoned: set[int]) -> Any:
    """The same of records."""
    return pb.BatchRecordRequest(
        requests=[
            pb.RecordRequest(
                **(
                    {"key_handle": one.response.key.handle}
                    if one.response.HasField("key")
                    else {"credit_ticket": one.response.ticket.ticket, "cost_micros": 1}
                ),
                outcome=SUCCESS,
                endpoint="poison" if index in poisoned else "fine",
            )
            for index, one in enumerate(decided.results)
        ]
    )


PLACES = [*({index} for index in range(IN_A_GROUP)), {0, IN_A_GROUP - 1}, {2, 3}, set(range(IN_A_GROUP))]


@pytest.mark.parametrize("kind", ["holds", "settlements", "uses of own keys"])
async def test_a_poison_row_fails_alone_at_whichever_place_of_its_group(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection, kind: str, subtests: pytest.Subtests
) -> None:
    sidecar: Sidecar = await start_sidecar(statement_timeout=30)
    for table, column in (
        ("credit_holds", "service_type"),
        ("credit_transactions", "endpoint"),
        ("api_key_usage", "endpoint"),
    ):
        await sql.execute(f"ALTER TABLE {table} ADD CHECK ({column} <> 'poison')")
    for poisoned in PLACES:
        with subtests.test(str(sorted(poisoned))):
            user, first = await make.user(micros=1_000), await make.user(micros=1_000)
            if kind == "uses of own keys":
                await make.key(user)
                await make.key(first)
            method, request, ahead = "BatchDecide", holds(user, poisoned), pb.RecordRequest()
            if kind != "holds":
                only = policy.CONSTRAINT_ANY if kind == "uses of own keys" else policy.CONSTRAINT_CREDITS_ONLY
                asked = [
                    pb.DecideRequest(user_id=each, provider="openai", cost_micros=10, constraint=only)
                    for each in [user] * IN_A_GROUP + [first]
                ]
                decided = await sidecar.call("BatchDecide", pb.BatchDecideRequest(requests=asked))
                *_, ahead = reports(decided, set()).requests
                del decided.results[-1]
                method, request = "BatchRecord", reports(decided, poisoned)
            table = "api_key_usage" if kind == "uses of own keys" else "credit_holds"
            async with gate_before(sql, table):
                # While the first one stands at the gate, the others queue: they are one group.
                held = asyncio.ensure_future(
                    sidecar.decide(first, cost_micros=10)
                    if kind == "holds"
                    else sidecar.call("Record", ahead)
                )
                await someone_waits(sql)
                call = asyncio.create_task(sidecar.call(method, request))
                await sidecar.decide(await owner(make), constraint=policy.CONSTRAINT_OWN_KEY_ONLY)
            await held
            results = (await call).results
            failed = {index for index, one in enumerate(results) if one.HasField("status")}
            assert failed == poisoned
            for index in poisoned:
                refusal = Refusal.of(results[index].status)
                refusal.check(grpc.StatusCode.INTERNAL, "INTERNAL")
                assert "poison" not in refusal.message


async def owner(make: Factory) -> str:
    """Somebody with a key, whose decision is answered without a statement that writes."""
    user = await make.user()
    await make.key(user)
    return user
