"""`keyturn serve --workers N`: processes that share the addresses, below one supervisor."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import socket
import sqlite3
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from keyturn import AsyncClient, Outcome
from keyturn.v1 import flag_service_pb2, flag_service_pb2_grpc, policy_pb2, routing_service_pb2_grpc
from keyturn.v1 import routing_service_pb2 as pb
from keyturn_server.app import worker
from tests.cli.command import Finished, Served, free_port, inside, keyturn, serving, started
from tests.factories import Connection, Factory
from tests.proxy import Proxy
from tests.support import MASTER_KEY, eventually, in_own_task, log_into, make_settings, temporary_directory
from tests.test_access import files, token_of, write

LOOPBACK = "--insecure-loopback"
OTHER_KEY = "b7e151628aed2a6abf7158809cf4f3c762e7160f38b4da56a784d9045190cfef"


def routing(channel: grpc.aio.Channel) -> Any:
    return routing_service_pb2_grpc.RoutingServiceStub(channel)


def ask(user: str, **fields: Any) -> pb.DecideRequest:
    return pb.DecideRequest(user_id=user, provider="openai", **fields)


def children(pid: int) -> list[int]:
    """The processes that it has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def runs(pid: int) -> bool:
    """Whether a process is there that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def gone(pids: Sequence[int]) -> None:
    async def all_gone() -> bool:
        return not any(runs(pid) for pid in pids)

    await eventually(all_gone)


@asynccontextmanager
async def workers(
    directory: Path, *arguments: str, database: str, number: int = 2, **variables: str
) -> AsyncIterator[tuple[Served, list[int]]]:
    """Workers that serve, and their processes. At the end none is left, however they ended."""
    options = ("--workers", str(number), LOOPBACK, *arguments)
    environment = {"KEYTURN_DATABASE_URL": database, "ENCRYPTION_KEY": MASTER_KEY, **variables}
    async with serving(directory, *options, **environment) as served:
        pids = children(served.process.pid)
        yield served, pids
        pids += children(served.process.pid) if served.process.returncode is None else []
        if served.process.returncode is None:
            served.signal(signal.SIGTERM)
            assert await served.end() == 0, served.text
        await gone(pids)
    assert not served.strays


@asynccontextmanager
async def channels(served: Served, number: int, index: int = 0) -> AsyncIterator[list[grpc.aio.Channel]]:
    """So many connections of their own to one address."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(served.channel(index)) for _ in range(number)]


def calls_by_worker(port: int) -> Counter[str]:
    """How many Decides each worker has answered, as the metrics have it."""
    counted: Counter[str] = Counter()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as page:
        for line in page.read().decode().splitlines():
            if line.startswith('keyturn_calls_total{code="OK",method="Decide"'):
                counted[line.partition('worker="')[2].partition('"')[0]] += int(float(line.split()[-1]))
    return counted


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_connections_to_one_address_are_spread_and_nothing_is_overspent(
    kind: str, database: str, make: Factory, sql: Connection
) -> None:
    user, metrics = await make.user(micros=1_000), free_port()
    async with temporary_directory() as directory:
        address = "127.0.0.1:0" if kind == "tcp" else f"unix:{directory}/run/s"
        async with workers(
            *(directory, "--listen", address, "--metrics", f"127.0.0.1:{metrics}"), database=database
        ) as (served, pids):
            assert len(pids) == 2
            async with channels(served, 24) as opened:
                answers = await asyncio.gather(
                    *(
                        routing(channel).Decide(ask(user, cost_micros=10), timeout=60)
                        for channel in opened * 10
                    )
                )
            kinds = Counter(answer.WhichOneof("route") for answer in answers)
            assert kinds == {"ticket": 100, "denial": 140}, "of 1,000 micros"
            counted = await asyncio.to_thread(calls_by_worker, metrics)
            assert counted.total() == 240

            async def each_takes_connections() -> bool:
                # Whoever is there first takes the next one: on a busy machine one may take many in a row.
                async with channels(served, 8) as opened:
                    for channel in opened:
                        await routing(channel).Decide(ask(user, cost_micros=10), timeout=60)
                return set(await asyncio.to_thread(calls_by_worker, metrics)) == {"0", "1"}

            await eventually(each_takes_connections)
            tickets = [answer.ticket.ticket for answer in answers if answer.HasField("ticket")]
            async with channels(served, 8) as opened:
                # Each is recorded twice at once, on whichever worker.
                records = await asyncio.gather(
                    *(
                        routing(opened[index % 8]).Record(
                            pb.RecordRequest(
                                credit_ticket=ticket, outcome=pb.OUTCOME_SUCCESS, cost_micros=10
                            ),
                            timeout=60,
                        )
                        for index, ticket in enumerate([*tickets, *tickets])
                    )
                )
            assert Counter(record.replayed for record in records) == {False: 100, True: 100}
    assert await sql.fetchval("SELECT balance_micros FROM credit_accounts WHERE user_id = $1", user) == 0


async def test_a_killed_worker_comes_back_and_clients_that_retry_lose_nothing(
    database: str, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=1_000_000)
    done = 0
    async with (
        temporary_directory() as directory,
        workers(directory, "--listen", "127.0.0.1:0", database=database) as (served, pids),
    ):
        enough = asyncio.Event()

        async def gateway() -> None:
            nonlocal done
            async with AsyncClient(served.addresses[0]) as client:
                while not enough.is_set():
                    decision = await client.decide(user_id=user, provider="openai", cost_micros=1)
                    await client.record(decision, Outcome.SUCCESS, cost_micros=1)
                    done += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(gateway())
            for number, pid in enumerate(pids):

                async def goes_on(at_least: int = done + 20) -> bool:
                    return done >= at_least

                await eventually(goes_on)
                os.kill(pid, signal.SIGKILL)

                async def is_back(number: int = number) -> bool:
                    lines = [one for one in served.events if one["event"] == "serving"]
                    return len([one for one in lines if one.get("worker") == number]) == 2

                await eventually(is_back, seconds=60)
            enough.set()
        ended = [event for event in served.events if event["event"] == "process_ended"]
        assert [(one["worker"], one["status"]) for one in ended] == [(0, -9), (1, -9)]
    assert done > 0
    assert await sql.fetchval("SELECT count(*) FROM credit_transactions WHERE amount_micros = -1") == done


async def test_sigterm_drains_all_workers(database: str, make: Factory, sql: Connection) -> None:
    user = await make.user(micros=1_000)
    async with temporary_directory() as directory:
        unix = f"unix:{directory}/run/s"
        async with workers(
            *(directory, "--listen", "127.0.0.1:0", "--listen", unix),
            database=database,
            KEYTURN_STATEMENT_TIMEOUT="PT5M",
            KEYTURN_DRAIN_TIMEOUT="PT5M",
        ) as (served, pids):
            async with channels(served, 8) as over_tcp, channels(served, 8, index=1) as over_unix:
                opened = [*over_tcp, *over_unix]
                assert [os.getsid(pid) for pid in pids] == pids, "Ctrl-C is for the supervisor alone"
                for channel in opened:
                    await asyncio.wait_for(channel.channel_ready(), 30)
                async with sql.transaction():
                    await sql.execute("SELECT FROM credit_accounts FOR UPDATE")
                    slow = [
                        routing(channel).Decide(ask(user, cost_micros=1), timeout=60) for channel in opened
                    ]

                    async def two_wait() -> bool:
                        locks = await sql.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted")
                        return int(locks) >= 2

                    await eventually(two_wait)
                    served.signal(signal.SIGTERM)

                    async def both_drain() -> bool:
                        return len([one for one in served.events if one["event"] == "draining"]) == 2

                    await eventually(both_drain)
                    for index in range(2):
                        async with served.channel(index) as late:
                            with pytest.raises(grpc.aio.AioRpcError) as caught:
                                await routing(late).Decide(ask(user), timeout=60)
                            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                answers = await asyncio.gather(*slow)
            assert all(answer.HasField("ticket") for answer in answers)
            assert await served.end() == 0
        assert not list((directory / "run").glob("s*[!k]")), "no socket is left, the lock alone"


async def test_a_second_signal_ends_all_at_once(database: str, make: Factory, sql: Connection) -> None:
    user = await make.user(micros=1_000)
    async with (
        temporary_directory() as directory,
        workers(directory, "--listen", "127.0.0.1:0", database=database) as (served, _),
        channels(served, 1) as (channel,),
        sql.transaction(),
    ):
        await sql.execute("SELECT FROM credit_accounts FOR UPDATE")
        slow = routing(channel).Decide(ask(user, cost_micros=1), timeout=60)

        async def waits() -> bool:
            return bool(await sql.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

        await eventually(waits)
        served.signal(signal.SIGTERM)
        await eventually(lambda: event(served, "draining"))
        served.signal(signal.SIGTERM)
        assert await served.end() == 128 + signal.SIGTERM
        with pytest.raises(grpc.aio.AioRpcError):
            await slow


async def event(served: Served, name: str, **facts: Any) -> dict[str, Any] | None:
    return served.event(name, **facts)


async def test_a_signal_that_a_shell_has_it_ignore_is_ignored(database: str) -> None:
    async with temporary_directory() as directory:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which those that are started inherit
        try:
            async with workers(directory, "--listen", f"unix:{directory}/run/s", database=database) as (
                served,
                pids,
            ):
                served.signal(signal.SIGINT)
                os.kill(pids[0], signal.SIGKILL)
                # It goes on with its work.
                await eventually(lambda: event(served, "process_restarted"))
                assert served.event("signalled") is None
        finally:
            signal.signal(signal.SIGINT, before)


async def test_without_their_supervisor_no_worker_and_no_database_is_left() -> None:
    async with temporary_directory() as directory:
        places = ("--embedded", str(directory / "pg"), "--listen", f"unix:{directory}/run/s")
        variables = {"ENCRYPTION_KEY": MASTER_KEY, "KEYTURN_WORKERS": "2"}
        variables |= {"KEYTURN_DATABASE_CONNECTIONS": "25"}
        users: list[str] = []
        for _ in range(2):  # and the next one goes on where it was
            async with serving(directory, *places, **variables) as served, served.channel() as channel:
                async with inside(directory) as connection:
                    users.append(await Factory(connection).user(micros=1_000))
                    # Two pools, two connections beside each, and some for others.
                    assert await connection.fetchval("SHOW max_connections") == "64"
                for user in users:
                    assert (await routing(channel).Decide(ask(user, cost_micros=1), timeout=30)).HasField(
                        "ticket"
                    )
                pids = children(served.process.pid)
                assert len(pids) == 3
                pids += [child for pid in pids for child in children(pid)]
                served.signal(signal.SIGKILL)
                assert await served.end() == -signal.SIGKILL
                await gone(pids)


async def test_without_the_process_of_the_embedded_database_the_others_are_drained_and_it_ends() -> None:
    async with temporary_directory() as directory:
        places = ("--embedded", str(directory / "pg"), "--listen", f"unix:{directory}/run/s")
        variables = {"ENCRYPTION_KEY": MASTER_KEY, "KEYTURN_WORKERS": "2"}
        async with serving(directory, *places, **variables) as served:
            pids = children(served.process.pid)
            (postgres,) = (pid for pid in pids if children(pid))
            pids += children(postgres)
            os.kill(postgres, signal.SIGKILL)
            assert await served.end() == 1
            await gone(pids)
        assert served.event("process_ended", process="postgres", status=-9) is not None
        assert len([one for one in served.events if one["event"] == "stopped"]) == 2


async def refuse(database: str, *arguments: str, **variables: str) -> Finished:
    finished = await keyturn("serve", *arguments, KEYTURN_DATABASE_URL=database, **variables)
    assert "Traceback" not in finished.err
    return finished


async def test_a_second_sidecar_on_the_same_addresses_is_turned_away(database: str, make: Factory) -> None:
    user = await make.user(micros=1_000)
    async with temporary_directory() as directory:
        unix = f"unix:{directory}/run/s"
        async with workers(directory, "--listen", "127.0.0.1:0", "--listen", unix, database=database) as (
            served,
            _,
        ):
            tcp = served.addresses[0]
            one, several, wide, on_socket, alone_on_socket, metrics = await asyncio.gather(
                refuse(database, "--listen", tcp, LOOPBACK),
                refuse(database, "--listen", tcp, LOOPBACK, "--workers", "2"),
                refuse(
                    database, "--listen", f"localhost:{tcp.rpartition(':')[2]}", LOOPBACK, "--workers", "2"
                ),
                refuse(database, "--listen", unix, "--workers", "2"),
                refuse(database, "--listen", unix),
                refuse(database, "--listen", f"unix:{directory}/run/t", "--workers", "2", "--metrics", tcp),
            )
            for finished in (one, several, wide):
                assert finished.code == 1
                assert "cannot be listened on; is another server there?" in finished.err
            for finished in (on_socket, alone_on_socket):
                assert finished.code == 1
                assert f"{unix}: another server listens there." in finished.err
            assert metrics.code == 1
            assert "cannot be listened on for metrics" in metrics.err
            for index in range(2):
                async with served.channel(index) as channel:
                    assert (await routing(channel).Decide(ask(user, cost_micros=1), timeout=30)).HasField(
                        "ticket"
                    )
        with socket.socket() as other:  # what others listen on is refused as well
            other.bind(("127.0.0.1", 0))
            other.listen()
            taken = f"127.0.0.1:{other.getsockname()[1]}"
            finished = await refuse(database, "--listen", taken, LOOPBACK, "--workers", "2")
            assert (finished.code, "is another server there?" in finished.err) == (1, True)


async def test_what_keeps_workers_from_their_start_is_said_once_and_ends_all(
    database: str, make: Factory
) -> None:
    await make.key(await make.user())
    async with temporary_directory() as directory:
        listen = ("--listen", f"unix:{directory}/run/s")
        nowhere = f"postgresql://keyturn@127.0.0.1:{free_port()}/keyturn?sslmode=disable"

        async def both(code: int, reason: str, *arguments: str, **variables: str) -> None:
            for number in ("1", "2"):
                finished = await keyturn(
                    *("serve", *listen, *arguments, "--workers", number),
                    **{"KEYTURN_DATABASE_URL": database, **variables},
                )
                said = [line for line in finished.err.splitlines() if line.startswith("keyturn: ")]
                assert (finished.code, finished.out, len(said)) == (code, "", 1), finished.err
                assert reason in said[0]
                assert "Traceback" not in finished.err

        await both(1, "ENCRYPTION_KEY", ENCRYPTION_KEY=OTHER_KEY)
        await both(1, "ENCRYPTION_KEY", ENCRYPTION_KEY="short")
        await both(6, "cannot be reached", KEYTURN_DATABASE_URL=nowhere)
        await both(1, "only once", "--embedded", str(directory / "pg"))
        await both(1, "cannot be read", "--access-file", str(directory / "none"))
        await both(1, "no address for metrics", "--metrics", "x")
        finished = await keyturn("serve", *listen, "--workers", "0", KEYTURN_DATABASE_URL=database)
        assert finished.code == 1
        assert "KEYTURN_WORKERS" in finished.err


async def test_they_answer_on_tcp_with_tls(database: str) -> None:
    async with files() as directory:
        tls = ("--tls-cert", f"{directory}/cert.pem", "--tls-key", f"{directory}/key.pem")
        options = (*tls, "--access-file", f"{directory}/access.toml", "--workers", "2")
        token = write(directory / "token", token_of("viewer") + "\n")
        async with serving(
            directory, "--listen", "0.0.0.0:0", *options, KEYTURN_DATABASE_URL=database
        ) as served:
            address = f"127.0.0.1:{served.addresses[0].rpartition(':')[2]}"
            caller = ("--ca", f"{directory}/ca.pem", "--token-file", str(token), "--address", address)
            for finished in await asyncio.gather(*(keyturn("health", *caller) for _ in range(4))):
                assert (finished.code, finished.out) == (0, "SERVING\n"), finished.err
            served.signal(signal.SIGTERM)
            assert await served.end() == 0


async def test_connections_that_have_become_old_are_made_anew_and_no_call_fails(
    database: str, make: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    user, port = await make.user(micros=1_000_000), free_port()
    age = ("grpc.max_connection_age_ms", 100)
    monkeypatch.setattr("keyturn_server.serving._SHARED", (("grpc.so_reuseport", 1), age))
    settings = make_settings(database, f"127.0.0.1:{port}", insecure_loopback=True)
    log = io.StringIO()
    async with (
        in_own_task(worker(settings, page=None, log=log_into(log), audit=log)) as (address,),
        grpc.aio.insecure_channel(address) as channel,
    ):
        states: list[grpc.ChannelConnectivity] = []

        async def watch() -> None:
            state = channel.get_state()
            while True:
                states.append(state)
                await channel.wait_for_state_change(state)
                state = channel.get_state()

        watching = asyncio.create_task(watch())
        # Until it has been connected anew several times; each call is made once, by us at least.
        while states.count(grpc.ChannelConnectivity.READY) < 5:
            calls = [routing(channel).Decide(ask(user, cost_micros=1), timeout=30) for _ in range(10)]
            await asyncio.gather(*calls)
        watching.cancel()


async def test_a_signal_while_they_start_ends_them(database: str, sql: Connection) -> None:
    async with temporary_directory() as directory:
        await sql.execute("SELECT pg_advisory_lock($1)", 0x6B657974_75726E00)
        listen = ("--listen", f"unix:{directory}/run/s", "--workers", "2")
        async with started(directory, *listen, KEYTURN_DATABASE_URL=database) as served:

            async def waits() -> bool:
                return bool(await sql.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

            await eventually(waits, seconds=60)
            pids = children(served.process.pid)
            served.signal(signal.SIGINT)
            assert await served.end() == 0
            assert served.event("serving") is None
            await gone(pids)


async def test_a_change_of_flags_by_one_worker_is_in_force_on_all(database: str, make: Factory) -> None:
    user = await make.user(micros=1_000)
    async with (
        temporary_directory() as directory,
        workers(directory, "--listen", f"unix:{directory}/run/s", database=database, number=3) as (served, _),
    ):
        # To the server of each worker, behind the shared socket.
        addresses = [f"unix:{directory}/run/s.{index}" for index in range(3)]
        async with AsyncExitStack() as stack:
            each = [
                await stack.enter_async_context(grpc.aio.insecure_channel(address)) for address in addresses
            ]

            async def modes() -> set[int]:
                requests = [
                    routing(one).Explain(pb.ExplainRequest(decide=ask(user)), timeout=30) for one in each
                ]
                return {answer.decision.mode for answer in await asyncio.gather(*requests)}

            assert await modes() == {policy_pb2.MODE_BYOK_FIRST}
            for index, on in enumerate((True, False, True)):
                stub: Any = flag_service_pb2_grpc.FlagServiceStub(each[index])
                change = flag_service_pb2.SetFlagsRequest(
                    flags={"byok_uses_internal_credits": on}, reason="a test"
                )
                await stub.SetFlags(change, timeout=30)
                mode = policy_pb2.MODE_CREDIT_FIRST if on else policy_pb2.MODE_BYOK_FIRST

                async def in_force(mode: int = mode) -> bool:
                    return await modes() == {mode}

                await eventually(in_force)
            for index in range(3):
                assert served.event("push_up", worker=index) is not None


async def test_no_secret_is_in_the_environment_or_the_arguments_of_any_process(database: str) -> None:
    async with (
        temporary_directory() as directory,
        workers(directory, "--listen", f"unix:{directory}/run/s", database=database) as (served, pids),
    ):
        os.kill(pids[0], signal.SIGKILL)

        await eventually(lambda: event(served, "process_restarted"))
        for pid in (served.process.pid, *children(served.process.pid)):
            seen = b"".join(Path(f"/proc/{pid}/{name}").read_bytes() for name in ("environ", "cmdline"))
            assert b"--workers" in seen
            assert MASTER_KEY.encode() not in seen
            assert database.encode() not in seen
            # Nobody else may look.
            assert Path(f"/proc/{pid}/limits").stat().st_uid == 0
            assert "Max core file size 0 0" in " ".join(Path(f"/proc/{pid}/limits").read_text().split())
        assert served.event("dumps_allowed") is None


async def test_each_worker_has_a_spool_and_what_one_left_is_drained_by_those_that_are_there(
    database: str, make: Factory, sql: Connection, proxy: Proxy
) -> None:
    users = [await make.user(micros=1_000) for _ in range(12)]
    variables = {"KEYTURN_PUSH_BEAT": "0.2", "KEYTURN_SILENCE_TIMEOUT": "0.5"}
    async with temporary_directory() as directory:
        spool = directory / "spool"
        places = ("--listen", f"unix:{directory}/run/s", "--spool", str(spool))
        async with workers(directory, *places, database=proxy.dsn(database), number=3, **variables) as (
            served,
            pids,
        ):
            async with AsyncExitStack() as stack:
                each = [
                    await stack.enter_async_context(
                        grpc.aio.insecure_channel(f"unix:{directory}/run/s.{index}")
                    )
                    for index in range(3)
                ]
                tickets = [
                    (await routing(each[0]).Decide(ask(user, cost_micros=10), timeout=30)).ticket.ticket
                    for user in users
                ]
                for one in each:  # so that each knows the user
                    for user in users:
                        await routing(one).Explain(pb.ExplainRequest(decide=ask(user)), timeout=30)
                proxy.go_away()
                for index, ticket in enumerate(tickets):
                    record = pb.RecordRequest(
                        credit_ticket=ticket, outcome=pb.OUTCOME_SUCCESS, cost_micros=10
                    )
                    answer = await routing(each[index % 3]).Record(record, timeout=30)
                    assert answer.durability == pb.DURABILITY_SPOOLED
            served.signal(signal.SIGKILL)
            assert await served.end() == -signal.SIGKILL
            await gone(pids)
        waiting = [waiting_in(spool / part) for part in ("", "worker-1", "worker-2")]
        assert waiting == [4, 4, 4]
        shown = await keyturn("spool", "show", "--spool", str(spool))
        assert "12 records" in shown.out
        proxy.come_back()
        async with serving(
            directory, *places, KEYTURN_DATABASE_URL=database, ENCRYPTION_KEY=MASTER_KEY
        ) as served:
            taken = [event for event in served.events if event["event"] == "spool_taken_over"]
            assert [one["records"] for one in taken] == [4, 4]

            async def all_charged() -> bool:
                charged = "SELECT count(*) FROM credit_transactions WHERE amount_micros = -10"
                return bool(await sql.fetchval(charged) == 12)

            await eventually(all_charged)
            assert [waiting_in(spool / part) for part in ("worker-1", "worker-2")] == [0, 0]


def waiting_in(directory: Path) -> int:
    connection = sqlite3.connect(directory / "records.sqlite3")
    try:
        (count,) = connection.execute("SELECT count(*) FROM records").fetchone()
        return int(count)
    finally:
        connection.close()
