"""PostgreSQL away, silent, read-only, and back: what goes on meanwhile, and that nothing is lost."""

from __future__ import annotations

import asyncio
import resource
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import pytest

from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import routing_service_pb2 as pb
from keyturn.v1 import routing_service_pb2_grpc
from keyturn_server.store.embedded import EmbeddedPostgres
from keyturn_server.store.migrate import migrate
from tests.cli.command import Served, keyturn, serving
from tests.factories import Connection, Factory
from tests.invariants import check_invariants
from tests.outages import (
    NOT_SERVING,
    SERVING,
    away,
    becomes,
    drained,
    events,
    health_of,
    remembered,
    rows,
    unavailable,
    watched,
)
from tests.proxy import Proxy
from tests.refusals import Refusal
from tests.support import MASTER_KEY, Fault, Sidecar, eventually, running_sidecar, temporary_directory

SUCCESS, SPOOLED = pb.OUTCOME_SUCCESS, pb.DURABILITY_SPOOLED
CREDITS_ONLY = policy.CONSTRAINT_CREDITS_ONLY
INLINE = pb.KEY_DELIVERY_INLINE


# -- decisions without the database -------------------------------------------------------------------


async def test_an_own_key_is_decided_on_from_what_was_last_known(
    spooling: Callable[..., Any], proxy: Proxy, make: Factory
) -> None:
    sidecar = await spooling(profile_ttl=0.01)
    user, stranger = await make.user(micros=1_000), await make.user(micros=1_000)
    for each in (user, stranger):
        await make.key(each, secret=f"sk-test-{each}")
    await remembered(sidecar, make)
    before = await sidecar.decide(user, key_delivery=INLINE)
    assert not before.degraded
    await asyncio.sleep(0.05)  # past its time to live
    await away(sidecar, proxy)
    decision = await sidecar.decide(user, key_delivery=INLINE)
    assert (decision.degraded, decision.key.secret) == (True, f"sk-test-{user}")
    assert (decision.reason, decision.mode) == (before.reason, before.mode)
    assert decision.message == (
        f"{before.message} The database cannot be reached: this is from what was last known."
    )
    await unavailable(sidecar, stranger)
    await unavailable(sidecar, "nobody")
    await unavailable(sidecar, user, failed_key_handles=[decision.key.handle])
    await unavailable(sidecar, user, constraint=CREDITS_ONLY)
    proxy.come_back()
    await becomes(sidecar, "keyturn.push", SERVING)
    assert not (await sidecar.decide(user)).degraded


async def test_what_credits_would_pay_first_waits_for_the_database(
    spooling: Callable[..., Any], proxy: Proxy, make: Factory
) -> None:
    await make.flags(byok_uses_internal_credits=True)
    sidecar = await spooling()
    user = await make.user(micros=1_000)
    await make.key(user)
    await remembered(sidecar, make, user)
    await away(sidecar, proxy)
    await unavailable(sidecar, user)
    own = await sidecar.decide(user, constraint=policy.CONSTRAINT_OWN_KEY_ONLY)
    assert (own.degraded, own.HasField("key")) == (True, True)
    proxy.come_back()


async def test_nobody_is_denied_from_what_was_last_known(
    spooling: Callable[..., Any], proxy: Proxy, make: Factory
) -> None:
    await make.flags(byok_only_mode=True)
    sidecar = await spooling()
    user, free = await make.user(), await make.user("free")
    await remembered(sidecar, make, user, free)
    await away(sidecar, proxy)
    for each in (user, free):
        await unavailable(sidecar, each)
    proxy.come_back()


async def test_what_was_last_known_is_trusted_for_a_time_only(
    spooling: Callable[..., Any], proxy: Proxy, make: Factory
) -> None:
    user = await make.user()
    await make.key(user)
    for degraded_for, expected in ((0, False), (3600, True)):
        sidecar = await spooling(degraded_for=degraded_for, spool=None)
        await remembered(sidecar, make, user)
        await away(sidecar, proxy)
        await becomes(sidecar, "keyturn.push", NOT_SERVING)
        if expected:
            assert (await sidecar.decide(user)).degraded
        else:
            await unavailable(sidecar, user)
        proxy.come_back()


async def test_a_key_that_changed_just_before_the_outage_is_not_handed_out(
    spooling: Callable[..., Any], proxy: Proxy, make: Factory, sql: Connection
) -> None:
    sidecar = await spooling()
    user = await make.user()
    await make.key(user)
    await remembered(sidecar, make, user)
    await sql.execute("UPDATE user_api_keys SET is_active = false WHERE user_id = $1", user)
    await remembered(sidecar, make)
    await away(sidecar, proxy)
    await unavailable(sidecar, user)
    proxy.come_back()


async def test_explain_says_from_what_it_is_decided(
    spooling: Callable[..., Any], proxy: Proxy, make: Factory
) -> None:
    sidecar = await spooling()
    user, payer = await make.user(), await make.user(micros=1_000)
    await make.key(user)
    await remembered(sidecar, make, user, payer)

    async def explain(each: str) -> pb.ExplainResponse:
        ask = pb.DecideRequest(user_id=each, provider="openai")
        answer: pb.ExplainResponse = await sidecar.call("Explain", pb.ExplainRequest(decide=ask))
        return answer

    assert "database" not in {step.check for step in (await explain(user)).steps}
    await away(sidecar, proxy)
    await becomes(sidecar, "keyturn.push", NOT_SERVING)
    answer = await explain(user)
    assert (answer.decision.degraded, answer.decision.HasField("key")) == (True, True)
    steps = {step.check: (step.result, step.detail) for step in answer.steps}
    assert steps["database"][0] == "away"
    assert "as they were last known" in steps["database"][1]
    assert steps["credits"][0] == "unknown"
    with pytest.raises(Fault) as caught:
        await explain(payer)
    Refusal.of(caught.value).check(grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE", "RetryInfo")
    proxy.come_back()


# -- silence, and a server that takes no writes -------------------------------------------------------


async def test_a_database_that_says_nothing_is_noticed_and_nobody_waits_for_it(
    spooling: Callable[..., Any], proxy: Proxy, directory: Path, make: Factory, sql: Connection
) -> None:
    # With a limit so short, and statements that may take so long, nothing but the watch explains the answers.
    sidecar = await spooling(silence_timeout=1, statement_timeout=600, connect_timeout=600)
    user = await make.user(micros=10**6)
    tickets = [await sidecar.decide(user, cost_micros=1) for _ in range(20)]
    proxy.relay.freeze()
    waiting = [
        asyncio.create_task(sidecar.decide(user, cost_micros=1, request_id="in flight")),
        *(asyncio.create_task(sidecar.record(one, SUCCESS, cost_micros=1)) for one in tickets[:10]),
    ]
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(results[0], Fault)
    assert results[0].code is grpc.StatusCode.UNAVAILABLE
    assert {one.durability for one in results[1:]} == {SPOOLED}  # type: ignore[union-attr]
    assert await health_of(sidecar, "keyturn.database") == NOT_SERVING
    await asyncio.gather(*(unavailable(sidecar, user, cost_micros=1) for _ in range(50)))
    for one in tickets[10:]:
        assert (await sidecar.record(one, SUCCESS, cost_micros=1)).durability == SPOOLED
    proxy.relay.thaw()
    await becomes(sidecar, "keyturn.database", SERVING)
    assert (await sidecar.decide(user, cost_micros=1, request_id="in flight")).HasField("ticket")
    await drained(directory)
    assert await sql.fetchval("SELECT balance_micros FROM credit_accounts") == 10**6 - 20


@asynccontextmanager
async def read_only(database: str) -> AsyncIterator[None]:
    """The database takes no writes, for sessions that begin from now on."""
    elsewhere: Connection = await asyncpg.connect(database, database="postgres")
    name = database.partition("?")[0].rpartition("/")[2]
    try:
        await elsewhere.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        yield
        await elsewhere.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    finally:
        await elsewhere.close()


@pytest.mark.parametrize("sessions", ["that are there end", "that are there stay"])
async def test_a_failover_to_a_server_that_takes_no_writes_is_noticed_and_over_with_it(
    spooling: Callable[..., Any],
    proxy: Proxy,
    directory: Path,
    database: str,
    make: Factory,
    sql: Connection,
    sessions: str,
) -> None:
    sidecar = await spooling()
    user, owner = await make.user(micros=10**6), await make.user()
    await make.key(owner)
    key = await sidecar.decide(owner)
    tickets = [await sidecar.decide(user, cost_micros=1) for _ in range(2)]
    await watched(sql)  # a connection that is cut while it is made would be the verdict
    async with read_only(database):
        if sessions == "that are there end":
            proxy.cut(push_only=False)
        else:
            await sql.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND application_name = 'keyturn'"
            )
        assert (await sidecar.record(tickets[0], SUCCESS, cost_micros=1)).durability == SPOOLED
        await becomes(sidecar, "keyturn.database", NOT_SERVING)
        assert events(sidecar, "database_away")[-1]["sqlstate"] == "25006"
        assert (await sidecar.record(tickets[1], SUCCESS, cost_micros=1)).durability == SPOOLED
        await unavailable(sidecar, user, cost_micros=1)
        assert (await sidecar.record(key, SUCCESS)).durability == SPOOLED
    await becomes(sidecar, "keyturn.database", SERVING)
    assert (await sidecar.decide(user, cost_micros=1)).HasField("ticket")
    await drained(directory)


async def test_a_database_that_lets_nobody_in_is_away_once_those_inside_have_left(
    spooling: Callable[..., Any],
    directory: Path,
    database: str,
    make: Factory,
    sql: Connection,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sidecar = await spooling()
    user = await make.user(micros=10**6)
    ticket = await sidecar.decide(user, cost_micros=1)
    name = database.partition("?")[0].rpartition("/")[2]
    elsewhere: Connection = await asyncpg.connect(database, database="postgres")
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND "
    try:
        await elsewhere.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        await sql.execute(f"{end} application_name = 'keyturn watch'")
        for _ in range(20):
            assert (await sidecar.decide(user, cost_micros=1)).HasField("ticket")
            await asyncio.sleep(0.02)
        assert await health_of(sidecar, "keyturn.database") == SERVING
        await sql.execute(f"{end} application_name LIKE 'keyturn%'")
        await becomes(sidecar, "keyturn.database", NOT_SERVING)
        assert (await sidecar.record(ticket, SUCCESS, cost_micros=1)).durability == SPOOLED
        await unavailable(sidecar, user, cost_micros=1)
        await elsewhere.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    finally:
        await elsewhere.close()
    await drained(directory)
    # Nobody tries besides the watch and the push: what a library says for itself is no line of ours.
    assert [record.getMessage() for record in caplog.records if record.name.startswith("asyncpg")] == []


# -- a real server, stopped and started, under load ----------------------------------------------------


@asynccontextmanager
async def migrated(directory: Path) -> AsyncIterator[EmbeddedPostgres]:
    """A PostgreSQL of the test's own."""
    async with EmbeddedPostgres(directory, settings={"fsync": "off"}) as postgres:
        await migrate(postgres.dsn)
        yield postgres


@asynccontextmanager
async def plain(dsn: str) -> AsyncIterator[Connection]:
    connection: Connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


class Gateway:
    """A gateway that decides and records without end, and repeats what was not answered."""

    def __init__(self, sidecar: Sidecar, users: list[str]) -> None:
        self.sidecar = sidecar
        self.users = users
        self.codes: set[grpc.StatusCode] = set()
        self.durabilities: set[int] = set()
        self.tickets = 0
        self.known: set[str] = set()
        """Users that were decided on from the database."""
        self._is_over = False

    async def run(self) -> None:
        """Serve until told to stop."""
        async with asyncio.TaskGroup() as tasks:
            for number in range(8):
                tasks.create_task(self._serve(number))

    def stop(self) -> None:
        """Take no new request; those under way are recorded."""
        self._is_over = True

    async def _serve(self, number: int) -> None:
        count = 0
        while not self._is_over:
            user = self.users[number % len(self.users)]
            request_id = f"{number}-{count}"
            count += 1
            decision = await self._insist(
                lambda user=user, request_id=request_id: self.sidecar.decide(  # type: ignore[misc]
                    user, request_id=request_id, cost_micros=10
                )
            )
            if decision is None:
                continue
            if not decision.degraded:
                self.known.add(user)
            recorded = await self._insist(
                lambda decision=decision: self.sidecar.record(decision, SUCCESS, cost_micros=3)  # type: ignore[misc]
            )
            if recorded is not None:
                self.durabilities.add(recorded.durability)
                self.tickets += decision.HasField("ticket")

    async def _insist(self, call: Callable[[], Any]) -> Any:
        """The answer of a call, which may have to be repeated; None where the end comes first."""
        while True:
            try:
                return await call()
            except Fault as fault:
                self.codes.add(fault.code)
                if fault.code is not grpc.StatusCode.UNAVAILABLE:
                    raise
                if self._is_over:
                    return None
                await asyncio.sleep(0.05)


async def test_a_database_that_is_stopped_and_started_under_load_loses_nothing() -> None:
    async with temporary_directory() as home:
        async with migrated(home / "pg") as postgres:
            dsn = postgres.dsn
            async with plain(dsn) as sql:
                make = Factory(sql)
                users = [await make.user(micros=10**9) for _ in range(4)]
                for user in users[:2]:
                    await make.key(user)
        async with (
            running_server(home / "pg") as server,
            running_sidecar(dsn, spool=home / "spool") as sidecar,
        ):
            gateway = Gateway(sidecar, users)
            serving_ = asyncio.create_task(gateway.run())
            for _ in range(3):
                gateway.known.clear()

                async def knows_everybody() -> bool:
                    return gateway.known == set(users)

                await eventually(knows_everybody)
                await server.stop()
                await becomes(sidecar, "keyturn.database", NOT_SERVING)
                before = len(sidecar.acknowledged)

                async def goes_on(before: int = before) -> bool:
                    return len(sidecar.acknowledged) >= before + 20

                await eventually(goes_on)
                await server.start()
                await becomes(sidecar, "keyturn.database", SERVING)
                await becomes(sidecar, "keyturn.push", SERVING)
            await drained_soon(home / "spool")
            gateway.stop()
            await serving_
            assert gateway.codes <= {grpc.StatusCode.UNAVAILABLE}
            assert gateway.durabilities == {pb.DURABILITY_DATABASE, SPOOLED}
            assert gateway.tickets > 0
            assert events(sidecar, "record_set_aside") == events(sidecar, "internal_error") == []
            await drained(home / "spool")
            async with plain(dsn) as sql:
                await check_invariants(sql, sidecar.acknowledged)
                charged = await sql.fetchval(
                    "SELECT -sum(amount_micros) FROM credit_transactions WHERE amount_micros < 0"
                )
                assert charged == 3 * await sql.fetchval(
                    "SELECT count(*) FROM credit_holds WHERE state = 'settled'"
                )


async def drained_soon(directory: Path) -> None:
    """Back when the spool was seen empty, or nearly, while records still come."""

    async def is_nearly_empty() -> bool:
        return len(rows(directory)) < 5

    await eventually(is_nearly_empty)


class Server:
    """A PostgreSQL that is stopped and started in one place."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._postgres: EmbeddedPostgres | None = None

    async def start(self) -> None:
        """Start it."""
        self._postgres = EmbeddedPostgres(self._directory, settings={"fsync": "off"})
        await self._postgres.__aenter__()

    async def stop(self) -> None:
        """Stop it, as an administrator does."""
        postgres, self._postgres = self._postgres, None
        if postgres is not None:
            await postgres.__aexit__(None, None, None)


@asynccontextmanager
async def running_server(directory: Path) -> AsyncIterator[Server]:
    server = Server(directory)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


# -- a real sidecar, killed -----------------------------------------------------------------------------


@asynccontextmanager
async def called(served: Served) -> AsyncIterator[Callable[[str, Any], Any]]:
    """Calls methods of the data plane of a running `keyturn serve`."""
    async with served.channel() as channel:
        stub: Any = routing_service_pb2_grpc.RoutingServiceStub(channel)
        yield lambda method, request: getattr(stub, method)(request, timeout=30)


def places(proxy: Proxy, database: str, home: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """Where a `keyturn serve` of these tests has its things."""
    variables = {
        "KEYTURN_DATABASE_URL": proxy.dsn(database),
        "KEYTURN_SPOOL": str(home / "spool"),
        "ENCRYPTION_KEY": MASTER_KEY,
    }
    return ("--listen", f"unix:{home}/run/s"), variables


async def test_a_sidecar_that_is_killed_loses_nothing_that_it_acknowledged(
    database: str, proxy: Proxy, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=10**9)
    await make.key(user)
    acknowledged: list[str] = []
    async with temporary_directory() as home:
        options, variables = places(proxy, database, home)
        for round_ in range(3):
            async with serving(home, *options, **variables) as served, called(served) as call:
                asks = [
                    pb.DecideRequest(
                        user_id=user,
                        provider="openai",
                        cost_micros=10,
                        constraint=CREDITS_ONLY if number % 2 else policy.CONSTRAINT_ANY,
                    )
                    for number in range(400)
                ]
                answer = await call("BatchDecide", pb.BatchDecideRequest(requests=asks))
                records = [
                    pb.RecordRequest(credit_ticket=one.response.ticket.ticket, outcome=SUCCESS, cost_micros=1)
                    if one.response.HasField("ticket")
                    else pb.RecordRequest(key_handle=one.response.key.handle, outcome=SUCCESS)
                    for one in answer.results
                ]
                proxy.go_away()
                calls = [asyncio.ensure_future(call("Record", record)) for record in records]
                # Killed in the middle of it: with some acknowledged, some on disk, some on the way.
                done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
                while len(done) < 50 * (round_ + 1):
                    done, _ = await asyncio.wait(calls, timeout=0.001)
                served.signal(signal.SIGKILL)
                await served.end()
                results = await asyncio.gather(*calls, return_exceptions=True)
                acknowledged += [one.record_id for one in results if isinstance(one, pb.RecordResponse)]
            proxy.come_back()
            # And the one that drains is killed while it does.
            spooled = len(rows(home / "spool"))
            assert spooled
            async with serving(home, *options, **variables) as served:

                async def drains(spooled: int = spooled) -> bool:
                    return len(rows(home / "spool")) < spooled

                await eventually(drains)
                served.signal(signal.SIGKILL)
                await served.end()
        async with serving(home, *options, **variables) as served:
            await drained(home / "spool")
            assert served.event("record_set_aside") is None
            served.signal(signal.SIGTERM)
            assert await served.end() == 0
    assert len(acknowledged) >= 300
    await check_invariants(sql, acknowledged)
    # What was not acknowledged may be there as well, once.
    assert await sql.fetchval("SELECT count(*) - count(DISTINCT id) FROM api_key_usage") == 0


async def test_a_disk_that_takes_nothing_more_is_said_so_and_nothing_is_acknowledged(
    database: str, proxy: Proxy, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=10**9)
    async with temporary_directory() as home:
        options, variables = places(proxy, database, home)
        async with serving(home, *options, **variables) as served, called(served) as call:
            asks = [pb.DecideRequest(user_id=user, provider="openai", cost_micros=10)] * 40
            answer = await call("BatchDecide", pb.BatchDecideRequest(requests=asks))
            records = [
                pb.RecordRequest(credit_ticket=one.response.ticket.ticket, outcome=SUCCESS, cost_micros=1)
                for one in answer.results
            ]
            proxy.go_away()
            acknowledged = [(await call("Record", record)).record_id for record in records[:10]]
            # Whatever it writes past these bytes of a file fails, its log excepted: that is shorter.
            before = resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, (16 * 1024, before[1]))
            for record in records[10:20]:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call("Record", record)
                Refusal.of(caught.value).check(grpc.StatusCode.UNAVAILABLE, "SPOOL_UNAVAILABLE", "RetryInfo")
            told = await keyturn("health", "keyturn.spool", KEYTURN_ADDRESS=f"unix:{home}/run/s")
            assert (told.code, told.out) == (1, "NOT_SERVING\n")
            resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, before)

            async def is_back() -> bool:
                return served.event("spool_back") is not None

            await eventually(is_back)
            acknowledged += [(await call("Record", record)).record_id for record in records[10:]]
            failed = served.event("spool_unavailable")
            assert failed is not None
            assert failed["cause"] == "disk"
            proxy.come_back()
            await drained(home / "spool")
            served.signal(signal.SIGTERM)
            assert await served.end() == 0
    assert len(acknowledged) == 40
    await check_invariants(sql, acknowledged)


async def test_a_second_process_on_the_same_spool_ends_and_says_why(database: str, proxy: Proxy) -> None:
    async with temporary_directory() as home:
        options, variables = places(proxy, database, home)
        async with serving(home, *options, **variables):
            other = await keyturn("serve", "--listen", f"unix:{home}/run/t", **variables)
            assert other.code == 1
            assert f"{home}/spool: another sidecar has its spool there." in other.err
            assert "Traceback" not in other.err


async def test_a_sidecar_that_cannot_reach_its_database_when_it_starts_ends_and_says_so(
    database: str, proxy: Proxy
) -> None:
    async with temporary_directory() as home:
        options, variables = places(proxy, database, home)
        variables["KEYTURN_CONNECT_TIMEOUT"] = "1"
        for fault in (proxy.relay.freeze, proxy.go_away):
            fault()
            finished = await keyturn("serve", *options, **variables)
            assert finished.code == 6
            assert finished.err.splitlines()[-1] == "keyturn: The database cannot be reached."
            assert "Traceback" not in finished.err
        proxy.relay.thaw()
        proxy.come_back()
        async with serving(home, *options, **variables):
            pass
