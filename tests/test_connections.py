"""Connections and streams that are opened to cost something: nothing of it lasts, and others are served."""

from __future__ import annotations

import asyncio
import os
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
from h2.exceptions import ProtocolError

from keyturn.v1 import routing_service_pb2 as pb
from keyturn.v1 import routing_service_pb2_grpc
from tests.cli.command import Served, free_port, serving
from tests.factories import Connection, Factory
from tests.http2 import http2
from tests.refusals import Refusal
from tests.support import eventually, temporary_directory

DECIDE = "/keyturn.v1.RoutingService/Decide"
MIB = 1024 * 1024
# What the allocators may keep: streams that stayed would take several times as much.
_ROOM_BYTES = 96 * MIB


@asynccontextmanager
async def running(database: str, **variables: str) -> AsyncIterator[tuple[Served, str]]:
    """A sidecar of its own process on loopback, and where its metrics are."""
    metrics = f"127.0.0.1:{free_port()}"
    listen = ("--listen", "127.0.0.1:0", "--insecure-loopback", "--metrics", metrics)
    async with (
        temporary_directory() as directory,
        serving(directory, *listen, KEYTURN_DATABASE_URL=database, **variables) as served,
    ):
        yield served, f"http://{metrics}/metrics"


def resident(served: Served) -> int:
    """The memory of the process, in bytes."""
    pages = int(Path(f"/proc/{served.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def descriptors(served: Served) -> int:
    """How many files and sockets the process has open."""
    directory = Path(f"/proc/{served.process.pid}/fd")
    try:
        return len(list(directory.iterdir()))
    except PermissionError:  # of an ordinary user: the kernel tells the number all the same
        return directory.stat().st_size


async def calls_in_flight(metrics: str) -> float:
    """As the sidecar counts them."""
    page = await asyncio.to_thread(urllib.request.urlopen, metrics, timeout=30)
    with page:
        (line,) = [each for each in page.read().decode().splitlines() if each.startswith("keyturn_calls_in")]
    return float(line.split()[1])


@asynccontextmanager
async def another_client(served: Served, user: str) -> AsyncIterator[list[pb.DecideResponse]]:
    """Decides all the while, and is answered every time: with its answers."""
    answers: list[pb.DecideResponse] = []
    async with served.channel() as channel:
        stub: Any = routing_service_pb2_grpc.RoutingServiceStub(channel)

        async def decide() -> None:
            while True:
                request = pb.DecideRequest(user_id=user, provider="openai", cost_micros=1)
                answers.append(await stub.Decide(request, timeout=60))

        deciding = asyncio.create_task(decide())
        try:
            yield answers
            before = len(answers)
            async with asyncio.timeout(60):
                while len(answers) < before + 3:
                    assert not deciding.done()
                    await asyncio.sleep(0.02)
        finally:
            deciding.cancel()
            with suppress(asyncio.CancelledError):
                await deciding


async def reset_streams(address: str, user: str, *, streams: int) -> None:
    """Streams that are opened and reset at once, in three ways, over as many connections as it takes: the
    server may close one that does so."""
    request = pb.DecideRequest(user_id=user, provider="openai", cost_micros=1).SerializeToString()
    left = streams
    while left:
        with suppress(ConnectionError, ProtocolError):
            async with http2(address) as connection:
                while left and not connection.closed.is_set():
                    whole = request if left % 3 else None
                    stream = await connection.open(DECIDE, whole)
                    if left % 3 != 1:
                        await connection.reset(stream)
                    left -= 1
                    if left % 64 == 0:
                        await asyncio.sleep(0)


async def test_thousands_of_streams_that_are_reset_at_once_cost_nothing_lasting(
    database: str, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=10**9)
    await sql.execute("UPDATE subscription_tiers SET requests_per_minute = NULL")
    async with running(database) as (served, metrics):
        address = served.addresses[0]

        async def burst(streams: int) -> None:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(4):
                    tasks.create_task(reset_streams(address, user, streams=streams // 4))

        async def is_quiet() -> bool:
            return await calls_in_flight(metrics) == 0

        async with another_client(served, user) as answers:
            await burst(4_000)
        await eventually(is_quiet, seconds=60)
        memory, files = resident(served), descriptors(served)
        assert files > 5
        for _ in range(3):
            async with another_client(served, user) as answers:
                await burst(4_000)
            assert {answer.WhichOneof("route") for answer in answers} == {"ticket"}
            await eventually(is_quiet, seconds=60)

        async def is_as_before() -> bool:
            return descriptors(served) <= files

        await eventually(is_as_before, seconds=60)
        assert resident(served) < memory + _ROOM_BYTES
        assert not served.strays
        assert "internal_error" not in served.text


async def test_hundreds_of_idle_connections_are_closed_and_others_are_served_meanwhile(
    database: str, make: Factory
) -> None:
    user = await make.user(micros=10**9)
    patience = {"KEYTURN_RECEIVE_TIMEOUT": "1", "KEYTURN_IDLE_TIMEOUT": "2"}
    request = pb.DecideRequest(user_id=user, provider="openai", cost_micros=1).SerializeToString()
    async with running(database, **patience) as (served, _):
        address = served.addresses[0]
        host, _, port = address.rpartition(":")
        memory, files = resident(served), descriptors(served)
        async with AsyncExitStack() as stack, another_client(served, user) as answers:
            # Some say nothing at all, some that they speak HTTP/2, some have made a call, some begin one.
            silent = []
            for _ in range(100):
                reader, writer = await asyncio.open_connection(host, int(port))
                stack.callback(writer.close)
                silent.append(reader)
            polite = []
            for number in range(300):
                polite.append(connection := await stack.enter_async_context(http2(address)))
                if number % 3 == 1:
                    stream = await connection.open(DECIDE, request)
                    assert await connection.end_of(stream) == grpc.StatusCode.OK.value[0]
                elif number % 3 == 2:
                    await connection.open(DECIDE)
            async with asyncio.timeout(120):
                for reader in silent:
                    with suppress(ConnectionError):
                        while await reader.read(65536):
                            pass
                for connection in polite:
                    await connection.closed.wait()
            assert all(connection.told_to_go for connection in polite)
        assert {answer.WhichOneof("route") for answer in answers} == {"ticket"}

        async def is_as_before() -> bool:
            return descriptors(served) <= files + 1

        await eventually(is_as_before, seconds=60)
        assert resident(served) < memory + _ROOM_BYTES


async def test_thousands_of_calls_at_once_are_answered_or_turned_away_with_a_reason(
    database: str, make: Factory
) -> None:
    user = await make.user(micros=10**9)
    request = pb.DecideRequest(user_id=user, provider="openai", cost_micros=1)
    ends: Counter[str] = Counter()
    async with (
        running(database, KEYTURN_MAX_CONCURRENT_CALLS="200") as (served, _),
        served.channel() as channel,
    ):
        stub: Any = routing_service_pb2_grpc.RoutingServiceStub(channel)
        calls = [stub.Decide(request, timeout=120) for _ in range(4_000)]
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, BaseException):
                assert isinstance(result, grpc.aio.AioRpcError), result
                Refusal.of(result).check(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", "RetryInfo")
                ends["turned away"] += 1
            else:
                ends[result.WhichOneof("route")] += 1
    assert ends.total() == 4_000
    assert ends.keys() == {"ticket", "turned away"}


async def test_a_call_on_a_connection_that_was_idle_for_long_goes_through(
    database: str, make: Factory
) -> None:
    user = await make.user(micros=1_000)
    async with running(database, KEYTURN_IDLE_TIMEOUT="0.3") as (served, _), served.channel() as channel:
        stub: Any = routing_service_pb2_grpc.RoutingServiceStub(channel)
        for _ in range(4):
            request = pb.DecideRequest(user_id=user, provider="openai", cost_micros=1)
            assert (await stub.Decide(request, timeout=60)).HasField("ticket")
            await asyncio.sleep(0.6)
