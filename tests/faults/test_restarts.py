"""Sidecars that are restarted one after another under load: a client that asks again sees no failed call."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from datetime import timedelta

from keyturn import AsyncClient, Outcome, Retries
from tests.factories import Connection, Factory
from tests.faults.conftest import Form
from tests.faults.processes import Place
from tests.support import eventually

SIDECARS = 3
# What a restart takes must fit into the deadline, and into the attempts.
TIMEOUT = timedelta(seconds=60)
RETRIES = Retries(attempts=1_000, max_delay=timedelta(milliseconds=200))


@dataclass(kw_only=True)
class Load:
    """Gateways beside one sidecar, each with a request at a time. Every error ends it."""

    place: Place
    users: list[str]
    requests: int = 0
    is_over: bool = field(default=False)

    async def run(self) -> None:
        async with (
            AsyncClient(self.place.address, timeout=TIMEOUT, retries=RETRIES) as client,
            asyncio.TaskGroup() as tasks,
        ):
            for user in self.users:
                tasks.create_task(self._serve(client, user))

    async def _serve(self, client: AsyncClient, user: str) -> None:
        while not self.is_over:
            decision = await client.decide(user_id=user, provider="openai", cost_micros=10)
            await asyncio.sleep(0.05)  # the request itself
            recorded = await client.record(decision, Outcome.SUCCESS, cost_micros=3)
            self.place.acknowledged.append(recorded.record_id)
            self.requests += 1


async def test_rolling_restarts_under_load_fail_no_call_of_a_client_that_asks_again(
    place: Place, make: Factory, sql: Connection, form: Form
) -> None:
    places = [replace(place, name=f"s{number}") for number in range(SIDECARS)]
    restarts = form.rounds(2, 15) * SIDECARS
    async with AsyncExitStack() as over:
        running = [await over.enter_async_context(each.sidecar()) for each in places]
        loads = []
        for each in places:
            users = [await make.user(micros=10**9) for _ in range(4)]
            await make.key(users[0])
            loads.append(Load(place=each, users=users))
        serving = [asyncio.create_task(load.run()) for load in loads]
        over.callback(lambda: [task.cancel() for task in serving])
        for number in range(restarts):
            index = number % SIDECARS
            before = loads[index].requests
            await running[index].stop()
            running[index] = await over.enter_async_context(places[index].sidecar())

            async def goes_on(index: int = index, before: int = before) -> bool:
                assert not serving[index].done(), serving[index].exception()
                return loads[index].requests >= before + 20

            await eventually(goes_on)
        for load in loads:
            load.is_over = True
        await asyncio.gather(*serving)
        for process in running:
            await process.stop()
    requests = sum(load.requests for load in loads)
    form.figures |= {"restarts": restarts, "calls": 2 * requests, "failed": 0}
    # No hold was placed twice, and none was left.
    assert len(set(place.acknowledged)) == requests
    assert await sql.fetchval("SELECT count(*) FROM credit_holds WHERE state = 'open'") == 0
    assert await sql.fetchval("SELECT count(*) FROM credit_holds") + await sql.fetchval(
        "SELECT count(*) FROM api_key_usage"
    ) == len(place.acknowledged)
