"""PostgreSQL that stops, and a network between that does what it likes, under load: nothing is lost."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import asyncpg
import grpc

from keyturn.v1 import routing_service_pb2 as pb
from keyturn_server.store.embedded import EmbeddedPostgres
from keyturn_server.store.migrate import migrate
from tests.factories import Connection, Factory
from tests.faults.conftest import Form
from tests.faults.gateway import CHARGE_MICROS, Gateway
from tests.faults.processes import Place, Process
from tests.invariants import check_invariants
from tests.outages import NOT_SERVING, SERVING, becomes, drained, events, rows
from tests.proxy import Proxy
from tests.support import eventually, running_sidecar, temporary_directory

SPOOLED = pb.DURABILITY_SPOOLED


async def check_books(sql: Connection, acknowledged: Sequence[str], decided: Sequence[str] = ()) -> None:
    """The invariants; each ticket was charged what was reported; `decided` may have been or not."""
    await check_invariants(sql, acknowledged)
    odd = await sql.fetch(
        "SELECT id FROM credit_holds WHERE state = 'settled' AND charged_micros <> $1", CHARGE_MICROS
    )
    assert not odd
    recorded = await sql.fetch(
        "SELECT id FROM credit_holds WHERE state = 'settled' UNION ALL SELECT id FROM api_key_usage"
    )
    strange = {str(row["id"]) for row in recorded} - {*acknowledged, *decided}
    assert not strange, "nothing is recorded that nobody reported"


# -- stopped and started -------------------------------------------------------------------------------


class Server:
    """A PostgreSQL that is stopped and started in one place."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._postgres: EmbeddedPostgres | None = None

    async def start(self) -> str:
        """Start it; its DSN."""
        self._postgres = EmbeddedPostgres(self._directory, settings={"fsync": "off"})
        await self._postgres.__aenter__()
        return self._postgres.dsn

    async def stop(self) -> None:
        """Stop it, as an administrator does."""
        postgres, self._postgres = self._postgres, None
        if postgres is not None:
            await postgres.__aexit__(None, None, None)


@asynccontextmanager
async def running_server(directory: Path) -> AsyncIterator[tuple[Server, str]]:
    """A PostgreSQL of the test's own, migrated, and its DSN."""
    server = Server(directory)
    dsn = await server.start()
    try:
        await migrate(dsn)
        yield server, dsn
    finally:
        await server.stop()


@asynccontextmanager
async def plain(dsn: str) -> AsyncIterator[Connection]:
    connection: Connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


async def users_of(make: Factory) -> list[str]:
    """Some with keys, and some who have credits alone."""
    users = [await make.user(micros=10**9) for _ in range(6)]
    for user in users[:2]:
        await make.key(user)
    return users


async def test_a_database_that_is_stopped_and_started_under_load_loses_nothing(form: Form) -> None:
    clock = asyncio.get_running_loop().time
    noticed: list[float] = []
    resumed: list[float] = []
    async with temporary_directory() as home, running_server(home / "pg") as (server, dsn):
        async with plain(dsn) as sql:
            users = await users_of(Factory(sql))
        async with running_sidecar(dsn, spool=home / "spool") as sidecar:
            gateway = Gateway(lambda: [sidecar], users)
            load = asyncio.create_task(gateway.run())
            for _ in range(form.rounds(3, 40)):
                gateway.known.clear()

                async def knows_everybody() -> bool:
                    return gateway.known == set(users)

                await eventually(knows_everybody)
                await asyncio.sleep(form.random.uniform(0, 0.4))
                began = clock()
                await server.stop()
                await becomes(sidecar, "keyturn.database", NOT_SERVING)
                noticed.append(clock() - began)
                before = len(sidecar.acknowledged)

                async def goes_on(before: int = before) -> bool:
                    return len(sidecar.acknowledged) >= before + 20

                await eventually(goes_on)
                await server.start()
                began = clock()
                await becomes(sidecar, "keyturn.database", SERVING)
                resumed.append(clock() - began)
                await becomes(sidecar, "keyturn.push", SERVING)
            await nearly_drained(home / "spool")
            gateway.stop()
            await load
            assert set(gateway.codes) <= {grpc.StatusCode.UNAVAILABLE}
            assert set(gateway.durabilities) == {pb.DURABILITY_DATABASE, SPOOLED}
            assert gateway.tickets > 0
            assert events(sidecar, "record_set_aside") == events(sidecar, "internal_error") == []
            await drained(home / "spool")
            async with plain(dsn) as sql:
                await check_books(sql, sidecar.acknowledged, gateway.unanswered)
    form.figures |= {
        "acknowledged": len(sidecar.acknowledged),
        "spooled": gateway.durabilities[SPOOLED],
        "lost": 0,
        "seconds to notice, at most": round(max(noticed), 1),
        "seconds to resume, at most": round(max(resumed), 1),
    }


async def nearly_drained(directory: Path) -> None:
    """Back when the spool was seen empty, or nearly, while records still come."""

    async def is_nearly_empty() -> bool:
        return len(rows(directory)) < 5

    await eventually(is_nearly_empty)


# -- whatever a network does ---------------------------------------------------------------------------


@dataclass(kw_only=True)
class Running:
    """The sidecar that is at a place now, until somebody ends it."""

    place: Place
    stack: AsyncExitStack
    process: Process

    @classmethod
    async def at(cls, place: Place) -> Running:
        stack = AsyncExitStack()
        # So that silence is noticed while the test lasts.
        process = await stack.enter_async_context(
            place.sidecar(KEYTURN_SILENCE_TIMEOUT="1", KEYTURN_PUSH_TIMEOUT="1")
        )
        return cls(place=place, stack=stack, process=process)


FAULTS = ("cut", "go_silent", "go_away", "lose_answers", "delay", "end_sessions", "kill", "stop")


class Weather:
    """Does to the network, and to the sidecars, whatever is drawn."""

    def __init__(self, proxy: Proxy, sql: Connection, running: list[Running], chance: random.Random) -> None:
        self.done: Counter[str] = Counter()
        self.past: list[Running] = []
        """What has ended. Not closed yet: a call that is made again may just be on it."""
        self._proxy = proxy
        self._sql = sql
        self._running = running
        self._chance = chance
        self._next: list[str] = []

    async def strike(self) -> None:
        """One fault, and its end: each once before any comes again."""
        if not self._next:
            self._next = self._chance.sample(FAULTS, len(FAULTS))
        fault = self._next.pop()
        self.done[fault] += 1
        await getattr(self, fault)()

    async def _wait(self, most_seconds: float) -> None:
        await asyncio.sleep(self._chance.uniform(0, most_seconds))

    async def cut(self) -> None:
        links = sorted(self._proxy.relay.links, key=id)
        self._proxy.relay.cut(self._chance.sample(links, self._chance.randint(0, len(links))))

    async def go_silent(self) -> None:
        self._proxy.relay.freeze()
        await self._wait(2)
        self._proxy.relay.thaw()

    async def go_away(self) -> None:
        self._proxy.go_away()
        await self._wait(1)
        self._proxy.come_back()

    async def lose_answers(self) -> None:
        self._proxy.relay.hold_answers()
        await self._wait(0.5)
        self._proxy.relay.lose_answers()

    async def delay(self) -> None:
        self._proxy.relay.delay = lambda: self._chance.uniform(0, 0.05)
        await self._wait(1)
        self._proxy.relay.delay = lambda: 0

    async def end_sessions(self) -> None:
        await self._sql.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name LIKE 'keyturn%' AND random() < 0.7"
        )

    async def kill(self) -> None:
        await self._replace(self._chance.randrange(len(self._running)), by_force=True)

    async def stop(self) -> None:
        await self._replace(self._chance.randrange(len(self._running)), by_force=False)

    async def _replace(self, index: int, *, by_force: bool) -> None:
        old = self._running.pop(index)
        self.past.append(old)
        await (old.process.kill() if by_force else old.process.stop())
        self._running.append(await Running.at(old.place))


async def test_whatever_a_network_does_in_whatever_order_nothing_is_lost_or_counted_twice(
    place: Place, proxy: Proxy, make: Factory, sql: Connection, form: Form
) -> None:
    users = await users_of(make)
    running = [await Running.at(place), await Running.at(replace(place, name="t"))]
    weather = Weather(proxy, sql, running, form.random)
    gateway = Gateway(lambda: [one.process for one in running], users)
    load = asyncio.create_task(gateway.run())
    try:
        for _ in range(form.rounds(16, 150)):
            await asyncio.sleep(form.random.uniform(0, 0.3))
            await weather.strike()
            assert not load.done(), load.exception()
        before = gateway.answered

        async def all_is_well() -> bool:
            return gateway.answered > before + 100

        await eventually(all_is_well)
        gateway.stop()
        await load
        for one in running:
            await drained(one.place.spool)
            await one.process.stop()
    finally:
        load.cancel()
        for one in (*running, *weather.past):
            await one.stack.aclose()
    assert set(gateway.codes) <= {grpc.StatusCode.UNAVAILABLE}
    await check_books(sql, place.acknowledged, gateway.unanswered)
    form.figures |= {
        "faults": dict(weather.done),
        "acknowledged": len(place.acknowledged),
        "spooled": gateway.durabilities[SPOOLED],
        "asked again": gateway.codes.total(),
        "lost": 0,
    }
