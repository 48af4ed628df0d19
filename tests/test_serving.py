"""A running sidecar as orchestrators and on-call see it: health, reflection, drain, crashes."""

from __future__ import annotations

import asyncio
import io
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from keyturn.v1 import routing_service_pb2 as pb
from keyturn.v1 import routing_service_pb2_grpc
from keyturn_server.app import sidecar as sidecar_of
from keyturn_server.errors import StoreUnavailable
from keyturn_server.store.ledger import Ledger
from tests.cli.command import Served, embedded, inside, serving, started
from tests.factories import Connection, Factory
from tests.faults.wire import (
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PREFACE,
    SETTINGS,
    call_headers,
    frame,
    header_block,
)
from tests.gate import gate_before_holds, someone_waits
from tests.refusals import Refusal
from tests.support import (
    Sidecar,
    eventually,
    in_own_task,
    log_into,
    make_settings,
    temporary_directory,
)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
ROUTING = "keyturn.v1.RoutingService"
REFLECTION = ("grpc.reflection.v1alpha.ServerReflection", "grpc.reflection.v1.ServerReflection")


def health_of(channel: grpc.aio.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel)


def asked(service: str = "") -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


def routing(channel: grpc.aio.Channel) -> Any:
    return routing_service_pb2_grpc.RoutingServiceStub(channel)


def ask(user: str, **fields: Any) -> pb.DecideRequest:
    return pb.DecideRequest(user_id=user, provider="openai", **{"cost_micros": 1, **fields})


async def code_of(call: Any) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def converse(channel: grpc.aio.Channel, service: str) -> Any:
    """An open session of reflection."""
    call: Any = channel.stream_stream(
        f"/{service}/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    return call(timeout=60)


async def test_health_tells_of_the_process_each_service_the_push_and_the_database(sidecar: Sidecar) -> None:
    health = health_of(sidecar.channel)
    services = (
        "RoutingService",
        "KeyService",
        "FlagService",
        "UserService",
        "CreditService",
        "ReportService",
    )
    names = ("", "keyturn.push", "keyturn.database", *(f"keyturn.v1.{service}" for service in services))
    for name in names:
        assert (await health.Check(asked(name), timeout=30)).status == SERVING
        watch = health.Watch(asked(name), timeout=30)
        assert (await watch.read()).status == SERVING
        watch.cancel()
    listed = (await health.List(health_pb2.HealthListRequest(), timeout=30)).statuses
    assert {name: each.status for name, each in listed.items()} == dict.fromkeys(names, SERVING)
    assert await code_of(health.Check(asked("no.such.Service"), timeout=30)) is grpc.StatusCode.NOT_FOUND
    assert (await health.Watch(asked("no.such.Service"), timeout=30).read()).status == UNKNOWN


async def test_reflection_and_channelz_are_there_when_asked_for(start_sidecar: Callable[..., Any]) -> None:
    sidecar = await start_sidecar(reflection=True)
    for name in REFLECTION:
        session = converse(sidecar.channel, name)
        await session.write(reflection_pb2.ServerReflectionRequest(list_services="*"))
        listed = {each.name for each in (await session.read()).list_services_response.service}
        assert {ROUTING, "grpc.health.v1.Health", "grpc.channelz.v1.Channelz", REFLECTION[0]} <= listed
        await session.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=ROUTING))
        files = (await session.read()).file_descriptor_response.file_descriptor_proto
        assert any(b"DecideRequest" in file for file in files)
        await session.done_writing()
        assert await session.read() is grpc.aio.EOF
    servers = await channelz_pb2_grpc.ChannelzStub(sidecar.channel).GetServers(
        channelz_pb2.GetServersRequest(), timeout=30
    )
    assert servers.server


async def test_channelz_says_of_what_is_not_there_that_it_is_not(start_sidecar: Callable[..., Any]) -> None:
    sidecar = await start_sidecar(reflection=True)
    stub = channelz_pb2_grpc.ChannelzStub(sidecar.channel)
    asked_for = stub.GetSubchannel(channelz_pb2.GetSubchannelRequest(subchannel_id=-1), timeout=30)
    assert await code_of(asked_for) is grpc.StatusCode.NOT_FOUND


async def test_a_question_to_reflection_that_is_no_protobuf_is_malformed(
    start_sidecar: Callable[..., Any],
) -> None:
    sidecar = await start_sidecar(reflection=True)
    for name in REFLECTION:
        ask: Any = sidecar.channel.unary_unary(f"/{name}/ServerReflectionInfo")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(b"\xff", timeout=30)
        Refusal.of(caught.value).check(grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")
    assert "internal_error" not in sidecar.log.getvalue()


async def test_neither_is_there_when_not(sidecar: Sidecar) -> None:
    for name in REFLECTION:
        assert await converse(sidecar.channel, name).code() is grpc.StatusCode.UNIMPLEMENTED
    servers = channelz_pb2_grpc.ChannelzStub(sidecar.channel).GetServers
    assert await code_of(servers(channelz_pb2.GetServersRequest())) is grpc.StatusCode.UNIMPLEMENTED


async def test_a_drain_finishes_what_is_in_flight_and_refuses_what_is_new(
    database: str, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=1_000)
    async with temporary_directory() as directory:
        listen = f"unix:{directory}/run/s"
        patience = {"KEYTURN_STATEMENT_TIMEOUT": "PT5M", "KEYTURN_DRAIN_TIMEOUT": "PT5M"}
        async with (
            serving(
                directory, "--listen", listen, "--reflection", KEYTURN_DATABASE_URL=database, **patience
            ) as served,
            served.channel() as channel,
            served.channel() as other,
        ):
            # Neither ends by itself, and neither may hold the process up.
            watch = health_of(other).Watch(asked(), timeout=60)
            assert (await watch.read()).status == SERVING
            session = converse(other, REFLECTION[1])
            await session.write(reflection_pb2.ServerReflectionRequest(list_services="*"))
            assert await session.read()
            async with gate_before_holds(sql):
                slow = routing(channel).Decide(ask(user), timeout=60)
                await someone_waits(sql)
                served.signal(signal.SIGTERM)
                assert (await watch.read()).status == NOT_SERVING
                draining = await eventually(lambda: event(served, "draining"))
                assert draining["in_flight"] == 1
                assert await code_of(watch.read()) is grpc.StatusCode.UNAVAILABLE
                for late in (channel, other):
                    call = routing(late).Decide(ask(user), timeout=30)
                    assert await code_of(call) is grpc.StatusCode.UNAVAILABLE
                async with served.channel() as new:
                    assert await code_of(routing(new).Decide(ask(user))) is grpc.StatusCode.UNAVAILABLE
            answer = await slow
            assert await served.end() == 0
        assert served.events[-1]["event"] == "stopped"
        assert not Path(listen.removeprefix("unix:")).exists()
    held = await sql.fetch("SELECT id::text FROM credit_holds")
    assert [row["id"] for row in held] == [answer.decision_id]


async def event(served: Served, name: str) -> dict[str, Any] | None:
    return served.event(name)


async def test_a_second_signal_ends_the_process_at_once(
    database: str, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=1_000)
    async with (
        temporary_directory() as directory,
        serving(*(directory, "--listen", f"unix:{directory}/run/s"), KEYTURN_DATABASE_URL=database) as served,
        served.channel() as channel,
        gate_before_holds(sql),
    ):
        slow = routing(channel).Decide(ask(user), timeout=60)
        await someone_waits(sql)
        served.signal(signal.SIGTERM)
        await eventually(lambda: event(served, "draining"))
        served.signal(signal.SIGTERM)
        assert await served.end() == 128 + signal.SIGTERM
        assert await code_of(slow) is grpc.StatusCode.UNAVAILABLE


async def test_a_signal_while_it_starts_ends_it(database: str, sql: Connection) -> None:
    async with temporary_directory() as directory:
        await sql.execute("SELECT pg_advisory_lock($1)", 0x6B657974_75726E00)
        variables = {"KEYTURN_DATABASE_URL": database}
        async with started(directory, "--listen", f"unix:{directory}/run/s", **variables) as served:

            async def waits() -> bool:
                return bool(await sql.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

            await eventually(waits, seconds=60)
            served.signal(signal.SIGTERM)
            assert await served.end() == 0
            assert served.event("serving") is None


async def test_a_sidecar_that_is_stopped_soon_after_its_start_ends(database: str) -> None:
    async with temporary_directory() as directory:
        settings = make_settings(database, f"unix:{directory}/run/s")
        for moment in range(100):
            async with (
                asyncio.timeout(30),
                in_own_task(sidecar_of(settings, log=log_into(io.StringIO()))),
            ):
                await asyncio.sleep(moment * 0.0002)


async def test_upkeep_that_fails_as_it_is_stopped_ends(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = asyncio.Event()

    async def forget(ledger: Ledger, *, at_most: int) -> int:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise StoreUnavailable from None
        return 0

    monkeypatch.setattr(Ledger, "forget", forget)
    async with temporary_directory() as directory:
        settings = make_settings(database, f"unix:{directory}/run/s")
        async with asyncio.timeout(30), in_own_task(sidecar_of(settings, log=log_into(io.StringIO()))):
            await begun.wait()


async def test_whatever_a_drain_lets_in_is_answered(database: str, make: Factory, sql: Connection) -> None:
    user = await make.user(micros=100_000)
    answered: set[str] = set()
    async with temporary_directory() as directory:
        for attempt in range(5):
            address = f"unix:{directory}/run/{attempt}"
            settings = make_settings(database, address)
            async with grpc.aio.insecure_channel(address) as channel:
                async with in_own_task(sidecar_of(settings, log=log_into(io.StringIO()))):
                    calls = [routing(channel).Decide(ask(user), timeout=60) for _ in range(200)]
                    await calls[0]
                results = await asyncio.gather(*calls, return_exceptions=True)
            answered |= {each.decision_id for each in results if isinstance(each, pb.DecideResponse)}
    held = await sql.fetch("SELECT id::text FROM credit_holds")
    assert {row["id"] for row in held} == answered


async def test_a_socket_left_by_a_killed_server_is_no_obstacle(database: str, make: Factory) -> None:
    user = await make.user(micros=1_000)
    async with temporary_directory() as directory:
        path = directory / "run" / "s"
        arguments = (directory, "--listen", f"unix:{path}")
        async with serving(*arguments, KEYTURN_DATABASE_URL=database) as first:
            first.signal(signal.SIGKILL)
            assert await first.end() == -signal.SIGKILL
        assert path.is_socket()
        async with serving(*arguments, KEYTURN_DATABASE_URL=database) as second, second.channel() as channel:
            assert (await routing(channel).Decide(ask(user), timeout=30)).HasField("ticket")


async def test_a_killed_sidecar_with_an_embedded_database_goes_on_where_it_was() -> None:
    async with temporary_directory() as directory:
        async with embedded(directory) as (served, channel):
            stub = routing(channel)
            async with inside(directory) as connection:
                make = Factory(connection)
                user = await make.user(micros=1_000)
                owner = await make.user()
                await make.key(owner, secret="sk-test-embedded-0000")
            ticket = await stub.Decide(ask(user, request_id="r", cost_micros=100), timeout=30)
            handle = (await stub.Decide(ask(owner), timeout=30)).key.handle
            served.signal(signal.SIGKILL)
            assert await served.end() == -signal.SIGKILL
        async with embedded(directory) as (served, channel):
            stub = routing(channel)
            again = await stub.Decide(ask(user, request_id="r", cost_micros=100), timeout=30)
            assert again.replayed
            assert again.ticket.ticket == ticket.ticket.ticket
            record = pb.RecordRequest(
                credit_ticket=ticket.ticket.ticket, outcome=pb.OUTCOME_SUCCESS, cost_micros=40
            )
            assert (await stub.Record(record, timeout=30)).balance_micros == 960
            redeemed = await stub.Redeem(pb.RedeemRequest(key_handle=handle), timeout=30)
            assert redeemed.secret == "sk-test-embedded-0000"


async def test_a_killed_postgres_is_unavailable_for_a_moment_and_back_by_itself() -> None:
    async with temporary_directory() as directory, embedded(directory) as (served, channel):
        stub = routing(channel)
        async with inside(directory) as connection:
            user = await Factory(connection).user(micros=1_000)
        assert (await stub.Decide(ask(user), timeout=30)).HasField("ticket")
        os.kill(int((directory / "pg/data/postmaster.pid").read_text().split()[0]), signal.SIGKILL)
        faults: list[grpc.aio.AioRpcError] = []

        async def is_back() -> bool:
            try:
                await stub.Decide(ask(user), timeout=30)
            except grpc.aio.AioRpcError as error:
                faults.append(error)
                return False
            return served.event("embedded postgres is back") is not None

        await eventually(is_back, seconds=60)
        assert faults
        for fault in faults:
            refusal = Refusal.of(fault)
            refusal.check(grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE", "RetryInfo")
            assert refusal.retry.retry_delay.seconds > 0

        async def hears_of_changes() -> bool:
            check = await health_of(channel).Check(asked("keyturn.push"), timeout=30)
            return bool(check.status == SERVING)

        await eventually(hears_of_changes)


async def said(path: Path, *frames: bytes) -> bytes:
    """What comes of a connection on which that is said; it is left after a moment."""
    reader, writer = await asyncio.open_unix_connection(path)
    answer = b""
    try:
        writer.write(PREFACE + frame(SETTINGS) + b"".join(frames))
        with suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                while part := await reader.read(65536):
                    answer += part
    finally:
        writer.transport.abort()
    return answer


def call_of(path: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A call without a body."""
    headers = call_headers(b"", (b":path", path), *more, without=b":path")
    return frame(HEADERS, END_HEADERS | END_STREAM, 1, header_block(headers))


async def test_a_call_whose_path_is_no_text_ends_nothing_and_is_as_unknown_as_any(
    sidecar: Sidecar, make: Factory
) -> None:
    """gRPC's own server would listen no more."""
    user = await make.user(micros=1_000)
    path = Path(sidecar.address.removeprefix("unix:"))
    for odd in (b"/\xff\xfe", b"/keyturn.v1.RoutingService/\xf6Decide", b"\xed\xa0\x80", b"/", b""):
        answer = await said(path, call_of(odd))
        assert b"There is no such method here." in answer, odd
        assert (await sidecar.decide(user, cost_micros=1)).HasField("ticket"), "an open connection goes on"
        async with grpc.aio.insecure_channel(
            sidecar.address, options=[("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            assert (await health_of(channel).Check(asked(), timeout=30)).status == SERVING


async def test_what_a_caller_can_have_grpc_complain_of_is_not_in_the_log(database: str) -> None:
    """Neither that it has gone, nor metadata that is no text: a token would stand there."""
    async with temporary_directory() as directory:
        path = directory / "run" / "s"
        async with serving(directory, "--listen", f"unix:{path}", KEYTURN_DATABASE_URL=database) as served:
            token = (b"authorization", b"Bearer not-for-the-log \xff")
            for _ in range(20):
                await said(path, call_of(b"/keyturn.v1.RoutingService/Decide", token))
            served.signal(signal.SIGTERM)
            assert await served.end() == 0
        assert "not-for-the-log" not in served.text
        assert not [event for event in served.events if event["level"] == "error"]
        assert not served.strays
