"""More calls than can be carried out: who is turned away, who is not, and what becomes of late ones."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from keyturn.v1 import credit_service_pb2
from keyturn.v1 import routing_service_pb2 as pb
from keyturn_server.access import ALL_ROLES, Caller
from keyturn_server.rpc.guard import DATA_PLANE, Guard, Method, Urgency
from tests.factories import Connection, Factory
from tests.gate import gate_before_holds, someone_waits
from tests.http2 import http2
from tests.refusals import Refusal, refused
from tests.support import Fault, Sidecar, running_sidecar

SUCCESS = pb.OUTCOME_SUCCESS
OVERLOADED = (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", "RetryInfo")
DECIDE = "/keyturn.v1.RoutingService/Decide"


def ask(user: str, **fields: Any) -> pb.DecideRequest:
    return pb.DecideRequest(user_id=user, provider="openai", **{"cost_micros": 1, **fields})


async def busy(sidecar: Sidecar, calls: list[Any]) -> list[asyncio.Task[Any]]:
    """Calls that are begun. Whatever is called after them on the same connection comes in after them."""
    tasks = [asyncio.create_task(sidecar.call(method, request)) for method, request in calls]
    await asyncio.sleep(0.1)
    return tasks


async def is_shed(sidecar: Sidecar, method: str, request: Any) -> bool:
    """Whether a call is turned away; it must be answered at once otherwise."""
    try:
        async with asyncio.timeout(30):
            await sidecar.call(method, request)
    except Fault as fault:
        refusal = Refusal.of(fault).check(*OVERLOADED)
        assert refusal.retry.retry_delay.seconds > 0
        return True
    return False


async def test_what_begins_something_is_turned_away_before_what_ends_it_and_operators_never_are(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    sidecar = await start_sidecar(max_concurrent_calls=3, statement_timeout=300)
    user, owner = await make.user(micros=1_000), await make.user()
    await make.key(owner, secret="sk-test-0123456789abcdef0123")
    # Of somebody else: on an account that a decision keeps locked a record gives up soon.
    payer = await make.user(micros=1_000)
    tickets = [(await sidecar.decide(payer, cost_micros=10)).ticket.ticket for _ in range(8)]
    handle = (await sidecar.decide(owner, key_delivery=pb.KEY_DELIVERY_REDEEM)).key.handle
    records = [pb.RecordRequest(credit_ticket=each, outcome=SUCCESS, cost_micros=1) for each in tickets]

    async with gate_before_holds(sql):
        waiting = await busy(sidecar, [("Decide", ask(user))] * 3)
        await someone_waits(sql)
        begins: list[tuple[str, Any]] = [
            ("Decide", ask(user)),
            ("Decide", ask(owner)),
            ("Explain", pb.ExplainRequest(decide=ask(user))),
            ("BatchDecide", pb.BatchDecideRequest(requests=[ask(user)])),
        ]
        for method, request in begins:
            assert await is_shed(sidecar, method, request)

        redeemed = await sidecar.call("Redeem", pb.RedeemRequest(key_handle=handle))
        assert redeemed.secret == "sk-test-0123456789abcdef0123"
        waiting += await busy(sidecar, [("Record", record) for record in records[:3]])
        ends: list[tuple[str, Any]] = [
            ("Record", records[7]),
            ("BatchRecord", pb.BatchRecordRequest(requests=[records[7]])),
            ("Redeem", pb.RedeemRequest(key_handle=handle)),
            ("Decide", ask(user)),
        ]
        for method, request in ends:
            assert await is_shed(sidecar, method, request)

        balance = await sidecar.call("GetBalance", credit_service_pb2.GetBalanceRequest(user_id=user))
        assert balance.balance_micros == 1_000
        health = health_pb2_grpc.HealthStub(sidecar.channel)
        check = await health.Check(health_pb2.HealthCheckRequest(), timeout=30)
        assert check.status == health_pb2.HealthCheckResponse.SERVING

    answers = await asyncio.gather(*waiting)
    assert [answer.WhichOneof("route") for answer in answers[:3]] == ["ticket"] * 3
    assert [answer.charged_micros for answer in answers[3:]] == [1, 1, 1]
    # All is over, so there is room again, and what was turned away was not done.
    assert not await is_shed(sidecar, "Record", records[7])
    assert not await is_shed(sidecar, "Decide", ask(user))
    assert await sql.fetchval("SELECT count(*) FROM credit_holds") == 8 + 3 + 1
    assert '"event": "overloaded"' in sidecar.log.getvalue()


async def test_a_batch_counts_for_its_size_and_a_large_one_goes_alone(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    sidecar = await start_sidecar(max_concurrent_calls=10, statement_timeout=300)
    user = await make.user(micros=1_000)
    large = pb.BatchDecideRequest(requests=[ask(user)] * 200)
    small = pb.BatchDecideRequest(requests=[ask(user)] * 16)
    assert not await is_shed(sidecar, "BatchDecide", large)
    async with gate_before_holds(sql):
        waiting = await busy(sidecar, [("BatchDecide", small)])
        await someone_waits(sql)
        # 5 of 10 are taken.
        assert await is_shed(sidecar, "BatchDecide", large)
        waiting += await busy(sidecar, [("BatchDecide", small)])
        assert await is_shed(sidecar, "Decide", ask(user))
    for answer in await asyncio.gather(*waiting):
        assert [one.response.WhichOneof("route") for one in answer.results] == ["ticket"] * 16


async def test_under_a_flood_every_call_is_answered_or_turned_away_and_records_get_through(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    sidecar = await start_sidecar(max_concurrent_calls=16)
    user = await make.user(micros=1_000_000)
    # Of another user: for one and the same, decisions and records wait for each other's locks.
    payer = await make.user(micros=1_000)
    tickets = [(await sidecar.decide(payer, cost_micros=1)).ticket.ticket for _ in range(12)]
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(sidecar.address, options=options) for _ in range(8)]
    outcomes: list[str] = []

    async def flood(channel: grpc.aio.Channel) -> None:
        gateway = Sidecar(
            address=sidecar.address, channel=channel, log=sidecar.log, settings=sidecar.settings
        )
        for _ in range(5):
            calls = [gateway.call("Decide", ask(user)) for _ in range(60)]
            for result in await asyncio.gather(*calls, return_exceptions=True):
                if isinstance(result, BaseException):
                    assert isinstance(result, Fault), result
                    Refusal.of(result).check(*OVERLOADED)
                    outcomes.append("shed")
                else:
                    outcomes.append(result.WhichOneof("route"))

    async def settle() -> None:
        for ticket in tickets:
            assert (await sidecar.record(ticket, SUCCESS, cost_micros=1)).charged_micros == 1

    try:
        await asyncio.gather(settle(), *(flood(channel) for channel in channels))
    finally:
        for channel in channels:
            await channel.close()
    assert len(outcomes) == 8 * 5 * 60
    assert set(outcomes) == {"shed", "ticket"}
    assert await sql.fetchval("SELECT count(*) FROM credit_holds") == 12 + outcomes.count("ticket")


async def test_callers_who_never_send_their_request_take_nobodys_place(
    start_sidecar: Callable[..., Any], make: Factory
) -> None:
    sidecar = await start_sidecar(max_concurrent_calls=2, receive_timeout=0.5)
    user = await make.user(micros=1_000)
    async with http2(sidecar.address) as connection:
        streams = [await connection.open(DECIDE) for _ in range(50)]
        for _ in range(10):
            assert (await sidecar.decide(user, cost_micros=1)).HasField("ticket")
        # And they are not waited for for ever.
        async with asyncio.timeout(60):
            codes = {await connection.end_of(stream) for stream in streams}
        assert codes == {grpc.StatusCode.DEADLINE_EXCEEDED.value[0]}
    health = await start_of_health(sidecar)
    assert health == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]


async def start_of_health(sidecar: Sidecar) -> int | None:
    """How a question about health ends that is never asked."""
    async with http2(sidecar.address) as connection, asyncio.timeout(60):
        return await connection.end_of(await connection.open("/grpc.health.v1.Health/Check"))


async def test_a_call_that_waited_past_its_deadline_is_not_carried_out(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=1_000)
    await sidecar.decide(user, cost_micros=1)

    blocked = threading.Event()

    def call() -> grpc.StatusCode:
        blocked.wait()
        with grpc.insecure_channel(sidecar.address) as channel:
            method: Any = channel.unary_unary(DECIDE, request_serializer=pb.DecideRequest.SerializeToString)
            try:
                method(ask(user), timeout=0.2)
            except grpc.RpcError as error:
                code: grpc.StatusCode = error.code()
                return code
        return grpc.StatusCode.OK

    loop = asyncio.get_running_loop()
    calling = [loop.run_in_executor(None, call) for _ in range(4)]
    blocked.set()
    time.sleep(1.5)  # noqa: ASYNC251 - the sidecar's loop is held up
    assert set(await asyncio.gather(*calling)) == {grpc.StatusCode.DEADLINE_EXCEEDED}
    assert (await sidecar.decide(user, cost_micros=1)).HasField("ticket")
    assert await sql.fetchval("SELECT count(*) FROM credit_holds") == 2


class _Call:
    """A call as the server hands it to a method, with its context, and its answer."""

    def __init__(self, remaining: float | None) -> None:
        self.context = self
        self.task = asyncio.current_task()
        self.remaining = remaining
        self.answered: Any = None

    async def read(self) -> bytes:
        return b""

    def time_remaining(self) -> float | None:
        return self.remaining

    async def carried_out(self, work: Any) -> Any:
        return await work

    async def answer(self, answer: Any) -> None:
        self.answered = answer


class _Everybody:
    def caller_of(self, context: Any) -> Caller:
        return Caller("somebody", ALL_ROLES)


@pytest.mark.parametrize(
    ("urgency", "remaining", "done"),
    [
        (Urgency.BEGINS, 0, False),
        (Urgency.BEGINS, 0.001, True),
        (Urgency.BEGINS, None, True),
        (Urgency.ENDS, 0, True),
        (Urgency.ALWAYS, 0, True),
    ],
)
async def test_what_is_late_in_the_last_moment_is_done_only_where_money_has_been_spent(
    urgency: Urgency, remaining: float | None, done: bool
) -> None:
    """The moment between gRPC's own look at the deadline and ours cannot be met from outside."""
    carried_out = []

    async def answer(request: pb.RecordRequest, caller: Caller) -> pb.RecordResponse:
        carried_out.append(request)
        return pb.RecordResponse()

    class Service:
        name = "S"

        def methods(self) -> dict[str, Method[Any]]:
            return {
                "M": Method(request_type=pb.RecordRequest, answer=answer, roles=DATA_PLANE, urgency=urgency)
            }

    guard = Guard(
        access=_Everybody(),  # type: ignore[arg-type]
        log=None,  # type: ignore[arg-type]
        on_call=lambda method, code: None,
        on_denied=lambda code, method, caller: None,
        on_shed=lambda method: None,
        max_concurrent_calls=1,
    )
    call = _Call(remaining)
    await guard.methods(Service())["M"].answer(call)  # type: ignore[arg-type]
    if done:
        assert call.answered == b""
    else:
        assert call.answered.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(carried_out) == done
    assert (guard.in_flight, guard.carried) == (0, 0)


async def test_strangers_hear_nothing_of_an_overload(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    sidecar = await start_sidecar(max_concurrent_calls=1, statement_timeout=300)
    user = await make.user(micros=1_000)
    async with gate_before_holds(sql):
        waiting = await busy(sidecar, [("Decide", ask(user))])
        await someone_waits(sql)
        assert await is_shed(sidecar, "Decide", ask(user))
        with pytest.raises(Fault) as caught:
            await sidecar.call("Decide", ask(user), metadata=(("authorization", "Bearer kta_nobody"),))
        assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED
    await asyncio.gather(*waiting)
    assert (await refused(sidecar, "Decide", ask("nobody"))).code is grpc.StatusCode.NOT_FOUND


async def test_a_drain_ends_though_callers_went_away_and_no_garbage_is_collected(
    database: str, make: Factory, sql: Connection
) -> None:
    """A call that something still refers to holds up the end of gRPC's server for ever."""
    user = await make.user(micros=1_000)
    gc.disable()
    try:
        async with asyncio.timeout(60), running_sidecar(database) as sidecar:
            async with gate_before_holds(sql):
                calls = [asyncio.create_task(sidecar.decide(user, cost_micros=10)) for _ in range(3)]
                await someone_waits(sql)
                for call in calls:
                    call.cancel()
                await asyncio.wait(calls)
            # Its cancellation reaches the sidecar before the next call.
            assert (await sidecar.decide(user, cost_micros=10)).HasField("ticket")
    finally:
        gc.enable()
