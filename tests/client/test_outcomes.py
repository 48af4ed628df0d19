"""`with client.request(...)`: what is recorded, however the block ends."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from keyturn import (
    AlreadyExists,
    AsyncClient,
    Client,
    Denied,
    InvalidArgument,
    Outcome,
    SealedTicket,
    Secret,
    Unavailable,
)
from keyturn.v1 import routing_service_pb2 as pb
from tests.client import scripted
from tests.client.conftest import Either
from tests.client.scripted import HANDLE, OTHER_HANDLE, SECRET, TICKET, Fault, Sidecar

ASK: dict[str, Any] = {"user_id": "u1", "provider": "openai"}
PLATFORM = {"Authorization": "Bearer platform"}
CONFLICT = Fault(grpc.StatusCode.ALREADY_EXISTS, "Recorded before with other contents.")


class Burst(Exception):  # noqa: N818
    """What the block raises."""


def nothing(call: Any) -> None:
    pass


def takes_headers(call: Any) -> None:
    call.headers(PLATFORM)


def takes_secret(call: Any) -> None:
    _ = call.secret


def says_sending(call: Any) -> None:
    call.sending()


def notes_usage(call: Any) -> None:
    call.used(input_tokens=10)
    call.used(output_tokens=5)
    call.used(input_tokens=12, cache_read_tokens=3, cache_write_tokens=4, total_tokens=24)


def notes_cost(call: Any) -> None:
    call.cost(0)


def notes_details(call: Any) -> None:
    call.note(
        model="gpt-4o-mini",
        endpoint="/v1/responses",
        response_time=timedelta(seconds=2),
        http_status=200,
    )


def is_rate_limited(call: Any) -> None:
    call.headers(PLATFORM)
    call.failed(
        Outcome.RATE_LIMITED,
        http_status=429,
        error_message="slow down",
        retry_after=timedelta(seconds=20),
    )


def says_succeeded(call: Any) -> None:
    call.succeeded()


def fails_after_succeeding(call: Any) -> None:
    call.succeeded()
    is_rate_limited(call)


def decides_not_to_send(call: Any) -> None:
    call.failed(Outcome.NEVER_SENT)


NOTED_USAGE = pb.Usage(
    input_tokens=12, output_tokens=5, cache_read_tokens=3, cache_write_tokens=4, total_tokens=24
)
RATE_LIMITED = pb.RecordRequest(
    outcome=pb.OUTCOME_RATE_LIMITED,
    http_status=429,
    error_message="slow down",
    retry_after=Duration(seconds=20),
)
SUCCESS, CANCELLED = pb.OUTCOME_SUCCESS, pb.OUTCOME_CLIENT_CANCELLED


@dataclass
class Case:
    """What a block does, and what is recorded when it then ends, or then raises."""

    block: Callable[[Any], None]
    ends: pb.RecordRequest
    raises: pb.RecordRequest = field(default_factory=pb.RecordRequest)


TABLE = [
    Case(
        nothing,
        pb.RecordRequest(outcome=SUCCESS),
        pb.RecordRequest(outcome=pb.OUTCOME_NEVER_SENT),
    ),
    Case(takes_headers, pb.RecordRequest(outcome=SUCCESS), pb.RecordRequest(outcome=CANCELLED)),
    Case(takes_secret, pb.RecordRequest(outcome=SUCCESS), pb.RecordRequest(outcome=CANCELLED)),
    Case(says_sending, pb.RecordRequest(outcome=SUCCESS), pb.RecordRequest(outcome=CANCELLED)),
    Case(
        notes_usage,
        pb.RecordRequest(outcome=SUCCESS, usage=NOTED_USAGE),
        pb.RecordRequest(outcome=CANCELLED, usage=NOTED_USAGE),
    ),
    Case(
        notes_cost,
        pb.RecordRequest(outcome=SUCCESS, cost_micros=0),
        pb.RecordRequest(outcome=CANCELLED, cost_micros=0),
    ),
    Case(
        notes_details,
        pb.RecordRequest(
            outcome=SUCCESS,
            model="gpt-4o-mini",
            endpoint="/v1/responses",
            response_time=Duration(seconds=2),
            http_status=200,
        ),
        pb.RecordRequest(
            outcome=pb.OUTCOME_NEVER_SENT,
            model="gpt-4o-mini",
            endpoint="/v1/responses",
            response_time=Duration(seconds=2),
            http_status=200,
        ),
    ),
    Case(says_succeeded, pb.RecordRequest(outcome=SUCCESS), pb.RecordRequest(outcome=SUCCESS)),
    Case(is_rate_limited, RATE_LIMITED, RATE_LIMITED),
    Case(fails_after_succeeding, RATE_LIMITED, RATE_LIMITED),
    Case(
        decides_not_to_send,
        pb.RecordRequest(outcome=pb.OUTCOME_NEVER_SENT),
        pb.RecordRequest(outcome=pb.OUTCOME_NEVER_SENT),
    ),
]


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.block.__name__)
@pytest.mark.parametrize("route", [scripted.own_key, scripted.credits_pay])
@pytest.mark.parametrize("raised", [None, Burst])
async def test_what_is_recorded_when_the_block_ends(
    either: Either,
    sidecar: Sidecar,
    case: Case,
    route: Callable[[], pb.DecideResponse],
    raised: type[Exception] | None,
) -> None:
    sidecar.answers("Decide", route())
    expected = pb.RecordRequest()
    if route is scripted.own_key:
        expected.key_handle = HANDLE
    else:
        expected.credit_ticket = TICKET

    def block(call: Any) -> None:
        case.block(call)
        if raised is not None:
            raise raised

    if raised is None:
        expected.MergeFrom(case.ends)
        call = await either.request(block, **ASK)
        assert call.recorded is not None
        assert call.recorded.charged_micros == 1_500
        assert call.unrecorded is None
    else:
        expected.MergeFrom(case.raises)
        with pytest.raises(Burst):
            await either.request(block, **ASK)
    assert sidecar.calls("Record") == [expected]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, GeneratorExit, SystemExit])
def test_an_interruption_is_recorded_like_any_exception(
    client: Client, sidecar: Sidecar, kind: type[BaseException]
) -> None:
    def interrupted() -> None:
        with client.request(**ASK) as call:
            call.sending()
            raise kind

    with pytest.raises(kind):
        interrupted()
    (sent,) = sidecar.calls("Record")
    assert sent.outcome == CANCELLED


def test_a_generator_that_is_closed_early_records_the_usage_so_far(client: Client, sidecar: Sidecar) -> None:
    def stream() -> Iterator[int]:
        with client.request(**ASK) as call:
            for tokens in range(1, 100):
                call.used(output_tokens=tokens)
                yield tokens

    chunks = stream()
    assert [next(chunks), next(chunks)] == [1, 2]
    chunks.close()  # type: ignore[attr-defined]
    (sent,) = sidecar.calls("Record")
    assert (sent.outcome, sent.usage.output_tokens) == (CANCELLED, 2)


async def test_an_async_generator_that_is_closed_early_records_the_usage_so_far(
    aclient: AsyncClient, sidecar: Sidecar
) -> None:
    async def stream() -> AsyncIterator[int]:
        async with aclient.request(**ASK) as call:
            for tokens in range(1, 100):
                call.used(output_tokens=tokens)
                yield tokens

    chunks = stream()
    assert [await anext(chunks), await anext(chunks)] == [1, 2]
    await chunks.aclose()  # type: ignore[attr-defined]
    (sent,) = sidecar.calls("Record")
    assert (sent.outcome, sent.usage.output_tokens) == (CANCELLED, 2)


async def test_a_denial_is_raised_on_entry_and_nothing_is_recorded(either: Either, sidecar: Sidecar) -> None:
    sidecar.answers("Decide", scripted.denied())
    entered: list[Any] = []
    with pytest.raises(Denied) as caught:
        await either.request(entered.append, **ASK)
    assert entered == []
    assert caught.value.decision.denial is not None
    assert str(caught.value) == "BYOK_REQUIRED: Only an own key may pay, and the user has none."
    assert sidecar.calls("Record") == []


async def test_a_decision_that_fails_on_entry_is_raised_and_nothing_is_recorded(
    either: Either, sidecar: Sidecar
) -> None:
    sidecar.answers("Decide", Fault(grpc.StatusCode.INVALID_ARGUMENT))
    with pytest.raises(InvalidArgument):
        await either.request(nothing, **ASK)
    assert sidecar.calls("Record") == []


async def test_the_own_key_signs_and_the_platform_signs_when_credits_pay(
    either: Either, sidecar: Sidecar
) -> None:
    signed: list[dict[str, str]] = []
    secrets: list[Secret | None] = []

    def block(call: Any) -> None:
        signed.append(call.headers(PLATFORM))
        secrets.append(call.secret)

    sidecar.answers("Decide", scripted.own_key(), scripted.credits_pay())
    await either.request(block, **ASK)
    await either.request(block, **ASK)
    assert signed == [{"Authorization": f"Bearer {SECRET}"}, PLATFORM]
    assert signed[1] is not PLATFORM
    assert secrets == [Secret(SECRET), None]


async def test_the_secret_is_always_asked_for_inline(either: Either, sidecar: Sidecar) -> None:
    await either.request(nothing, **ASK)
    (asked,) = sidecar.calls("Decide")
    assert asked.key_delivery == pb.KEY_DELIVERY_INLINE


async def test_a_record_that_fails_after_a_good_block_is_raised(either: Either, sidecar: Sidecar) -> None:
    sidecar.answers("Record", CONFLICT)
    calls: list[Any] = []
    with pytest.raises(AlreadyExists):
        await either.request(calls.append, **ASK)
    assert calls[0].recorded is None
    sidecar.answers(
        "BatchRecord", pb.BatchRecordResponse(results=[pb.BatchRecordResult(response=scripted.recorded())])
    )
    await either("record_many", [calls[0].unrecorded])
    (batch,) = sidecar.calls("BatchRecord")
    assert list(batch.requests) == sidecar.calls("Record")


async def test_a_record_that_fails_after_a_bad_block_is_a_note_on_its_exception(
    either: Either, sidecar: Sidecar
) -> None:
    sidecar.answers("Record", CONFLICT)

    def block(call: Any) -> None:
        call.sending()
        raise Burst

    with pytest.raises(Burst) as caught:
        await either.request(block, **ASK)
    (note,) = caught.value.__notes__
    assert note.startswith("keyturn: its outcome CLIENT_CANCELLED was not recorded: AlreadyExists:")


async def test_a_note_that_cannot_be_sent_never_hides_the_exception_of_the_block(
    either: Either, sidecar: Sidecar
) -> None:
    def block(call: Any) -> None:
        call.cost(2**63)
        raise Burst

    with pytest.raises(Burst) as caught:
        await either.request(block, **ASK)
    assert "was not recorded: ValueError" in caught.value.__notes__[0]
    assert sidecar.calls("Record") == []


async def test_a_call_takes_nothing_outside_its_block(either: Either) -> None:
    call = either.client.request(**ASK)
    for early in (nothing_decided, takes_headers, says_sending, notes_usage, is_rate_limited):
        with pytest.raises(RuntimeError):
            early(call)
    done = await either.request(nothing, **ASK)
    assert done.decision.ticket is not None
    for late in (takes_headers, takes_secret, says_sending, notes_usage, notes_details):
        with pytest.raises(RuntimeError, match="not open"):
            late(done)


def nothing_decided(call: Any) -> None:
    _ = call.decision


def test_a_call_is_used_once(client: Client, sidecar: Sidecar) -> None:
    call = client.request(**ASK)
    with call:
        pass
    with pytest.raises(RuntimeError, match="used once"), call:
        pass
    assert len(sidecar.calls("Record")) == 1


async def test_success_is_not_a_failure(either: Either) -> None:
    with pytest.raises(ValueError, match="SUCCESS"):
        await either.request(lambda call: call.failed(Outcome.SUCCESS), **ASK)


async def test_redeem_is_not_for_a_block(either: Either) -> None:
    with pytest.raises(TypeError, match="redeem"):
        await either.request(nothing, **ASK, redeem=True)


# --------------------------------------------------------------- a key that the provider refuses


def test_a_refused_key_is_recorded_and_the_next_route_taken(client: Client, sidecar: Sidecar) -> None:
    sidecar.answers(
        "Decide",
        scripted.own_key(),
        scripted.own_key(OTHER_HANDLE),
        scripted.credits_pay(),
    )
    with client.request(**ASK, model="gpt-4o") as call:
        call.headers(PLATFORM)
        call.used(input_tokens=1)
        call.key_refused(http_status=403, error_message="no such key")
        assert call.key is not None
        assert call.key.handle == OTHER_HANDLE
        call.key_refused(Outcome.RATE_LIMITED, http_status=429, retry_after=timedelta(seconds=9))
        assert call.headers(PLATFORM) == PLATFORM
        call.used(input_tokens=7)
    asked = sidecar.calls("Decide")
    assert [list(each.failed_key_handles) for each in asked] == [
        [],
        [HANDLE],
        [HANDLE, OTHER_HANDLE],
    ]
    assert len({each.request_id for each in asked}) == 1
    assert {each.model for each in asked} == {"gpt-4o"}
    assert sidecar.calls("Record") == [
        pb.RecordRequest(
            key_handle=HANDLE,
            outcome=pb.OUTCOME_AUTH_REJECTED,
            http_status=403,
            error_message="no such key",
            usage=pb.Usage(input_tokens=1),
        ),
        pb.RecordRequest(
            key_handle=OTHER_HANDLE,
            outcome=pb.OUTCOME_RATE_LIMITED,
            http_status=429,
            retry_after=Duration(seconds=9),
        ),
        pb.RecordRequest(credit_ticket=TICKET, outcome=SUCCESS, usage=pb.Usage(input_tokens=7)),
    ]


async def test_a_refused_key_is_recorded_and_the_next_route_taken_in_asyncio(
    aclient: AsyncClient, sidecar: Sidecar
) -> None:
    sidecar.answers("Decide", scripted.own_key(), scripted.credits_pay())
    async with aclient.request(**ASK) as call:
        call.headers(PLATFORM)
        await call.key_refused()
        assert call.key is None
        with pytest.raises(RuntimeError, match="no own key"):
            await call.key_refused()
    first, second = sidecar.calls("Decide")
    assert first.request_id == second.request_id
    assert list(second.failed_key_handles) == [HANDLE]
    assert sidecar.calls("Record") == [
        pb.RecordRequest(key_handle=HANDLE, outcome=pb.OUTCOME_AUTH_REJECTED, http_status=401),
        pb.RecordRequest(credit_ticket=TICKET, outcome=SUCCESS),
    ]


def test_a_refused_key_without_another_route_is_denied_and_recorded_once(
    client: Client, sidecar: Sidecar
) -> None:
    sidecar.answers("Decide", scripted.own_key(), scripted.denied())
    call = client.request(**ASK)
    with pytest.raises(Denied), call:
        call.key_refused()
    (sent,) = sidecar.calls("Record")
    assert sent.outcome == pb.OUTCOME_AUTH_REJECTED


async def test_a_refused_key_without_another_route_is_denied_in_asyncio(
    aclient: AsyncClient, sidecar: Sidecar
) -> None:
    sidecar.answers("Decide", scripted.own_key(), scripted.denied())
    with pytest.raises(Denied):
        async with aclient.request(**ASK) as call:
            await call.key_refused()
    (sent,) = sidecar.calls("Record")
    assert sent.outcome == pb.OUTCOME_AUTH_REJECTED


def test_a_refusal_that_did_not_get_through_is_recorded_at_the_end(client: Client, sidecar: Sidecar) -> None:
    sidecar.answers("Decide", scripted.own_key())
    sidecar.answers("Record", CONFLICT, scripted.recorded())
    with pytest.raises(AlreadyExists), client.request(**ASK) as call:
        call.key_refused(error_message="no such key")
    first, again = sidecar.calls("Record")
    assert first == again
    assert len(sidecar.calls("Decide")) == 1


def test_credits_have_no_key_to_refuse(client: Client, sidecar: Sidecar) -> None:
    with client.request(**ASK) as call, pytest.raises(RuntimeError, match="no own key"):
        call.key_refused()
    (sent,) = sidecar.calls("Record")
    assert sent.outcome == SUCCESS


# -------------------------------------------------------------------------------- cancellation


@dataclass
class Gate:
    """Holds a call back in the sidecar until it is opened."""

    answer: Any
    arrived: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def __call__(self, request: Any) -> Any:
        self.arrived.set()
        self.opened.wait(60)
        return self.answer

    async def reached(self) -> None:
        await asyncio.to_thread(self.arrived.wait, 60)


@pytest.mark.parametrize("ends", ["cancelled", "well", "with finish"])
async def test_a_record_whose_caller_is_cancelled_is_carried_on_in_the_background(
    aclient: AsyncClient, sidecar: Sidecar, ends: str
) -> None:
    gate = Gate(scripted.recorded())
    sidecar.answers("Record", gate)
    inside = asyncio.Event()

    async def caller() -> None:
        async with aclient.request(**ASK) as call:
            call.used(input_tokens=3)
            inside.set()
            if ends == "cancelled":
                await asyncio.Event().wait()
            if ends == "with finish":
                await call.finish()

    task = asyncio.create_task(caller())
    await inside.wait()
    if ends == "cancelled":
        task.cancel()
    await gate.reached()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):  # at once: the gate is still shut
        await task
    await aclient.flush()
    gate.opened.set()
    (batch,) = sidecar.calls("BatchRecord")
    assert list(batch.requests) == sidecar.calls("Record")
    (sent,) = batch.requests
    assert (sent.outcome, sent.usage.input_tokens) == (CANCELLED if ends == "cancelled" else SUCCESS, 3)


async def test_a_plain_record_whose_caller_is_cancelled_is_carried_on_too(
    aclient: AsyncClient, sidecar: Sidecar
) -> None:
    gate = Gate(scripted.recorded())
    sidecar.answers("Record", gate)
    task = asyncio.create_task(aclient.record(SealedTicket(TICKET), Outcome.SUCCESS, cost_micros=7))
    await gate.reached()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.opened.set()
    await aclient.close()
    (batch,) = sidecar.calls("BatchRecord")
    assert list(batch.requests) == sidecar.calls("Record")


async def test_a_refusal_whose_caller_is_cancelled_is_recorded(
    aclient: AsyncClient, sidecar: Sidecar
) -> None:
    gate = Gate(scripted.recorded())
    sidecar.answers("Decide", scripted.own_key())
    sidecar.answers("Record", gate, scripted.recorded())

    async def caller() -> None:
        async with aclient.request(**ASK) as call:
            await call.key_refused(error_message="no such key")

    task = asyncio.create_task(caller())
    await gate.reached()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.opened.set()
    await aclient.flush()
    (batch,) = sidecar.calls("BatchRecord")
    assert {each.SerializeToString() for each in (*batch.requests, *sidecar.calls("Record"))} == {
        pb.RecordRequest(
            key_handle=HANDLE,
            outcome=pb.OUTCOME_AUTH_REJECTED,
            http_status=401,
            error_message="no such key",
        ).SerializeToString()
    }
    assert len(sidecar.calls("Decide")) == 1


class Alarm(BaseException):
    """What a signal's handler raises."""


@contextmanager
def alarm_when(reached: threading.Event) -> Iterator[None]:
    """An exception in this, the main, thread a while after `reached` is set: when it waits for the answer.

    Before that it may hold a lock of gRPC's, as it may with any exception that a signal raises anywhere.
    """

    def ring(number: int, frame: object) -> None:
        raise Alarm

    def wait_and_ring() -> None:
        reached.wait(60)
        time.sleep(0.5)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, ring)
    thread = threading.Thread(target=wait_and_ring)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, before)


def test_a_decision_that_a_signal_interrupts_leaves_no_hold_behind(client: Client, sidecar: Sidecar) -> None:
    gate = Gate(scripted.credits_pay())
    sidecar.answers("Decide", gate, scripted.credits_pay())
    with alarm_when(gate.arrived), pytest.raises(Alarm):
        client.decide(**ASK)
    client.close()
    gate.opened.set()
    first, again = sidecar.calls("Decide")
    assert first.request_id == again.request_id
    assert sidecar.calls("Record") == [pb.RecordRequest(credit_ticket=TICKET, outcome=pb.OUTCOME_NEVER_SENT)]


def test_a_decision_with_the_callers_own_id_that_a_signal_interrupts_is_not_undone(
    client: Client, sidecar: Sidecar
) -> None:
    gate = Gate(scripted.credits_pay())
    sidecar.answers("Decide", gate, scripted.credits_pay())
    with alarm_when(gate.arrived), pytest.raises(Alarm):
        client.decide(**ASK, request_id="r1")
    client.close()
    gate.opened.set()
    assert len(sidecar.calls("Decide")) == 1
    assert sidecar.calls("Record") == []


def test_a_record_that_a_signal_interrupts_is_carried_on_in_the_background(
    client: Client, sidecar: Sidecar
) -> None:
    gate = Gate(scripted.recorded())
    sidecar.answers("Record", gate)
    with alarm_when(gate.arrived), pytest.raises(Alarm), client.request(**ASK) as call:
        call.used(input_tokens=3)
    client.close()
    gate.opened.set()
    (batch,) = sidecar.calls("BatchRecord")
    assert list(batch.requests) == sidecar.calls("Record")


async def test_a_timeout_around_the_block_is_a_timeout_and_recorded(
    aclient: AsyncClient, sidecar: Sidecar
) -> None:
    async def too_slow() -> None:
        async with asyncio.timeout(None) as limit, aclient.request(**ASK) as call:
            call.sending()
            limit.reschedule(asyncio.get_running_loop().time())
            await asyncio.sleep(3600)

    with pytest.raises(TimeoutError):
        await too_slow()
    (sent,) = sidecar.calls("Record")
    assert sent.outcome == CANCELLED


@pytest.mark.parametrize("block", [True, False], ids=["request", "decide"])
async def test_a_cancelled_decision_leaves_no_hold_behind(
    aclient: AsyncClient, sidecar: Sidecar, block: bool
) -> None:
    gate = Gate(scripted.credits_pay())
    sidecar.answers("Decide", gate)

    async def caller() -> None:
        if not block:
            await aclient.decide(**ASK)
            return
        async with aclient.request(**ASK):
            raise AssertionError("entered")

    task = asyncio.create_task(caller())
    await gate.reached()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):  # at once: the gate is still shut
        await task
    gate.opened.set()
    await aclient.close()
    assert sidecar.calls("Record") == [pb.RecordRequest(credit_ticket=TICKET, outcome=pb.OUTCOME_NEVER_SENT)]


@pytest.mark.parametrize("answer", [scripted.own_key(), scripted.denied(), CONFLICT])
async def test_a_cancelled_decision_without_a_hold_has_nothing_to_undo(
    aclient: AsyncClient, sidecar: Sidecar, answer: Any
) -> None:
    gate = Gate(answer)
    sidecar.answers("Decide", gate)
    task = asyncio.create_task(aclient.decide(**ASK))
    await gate.reached()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.opened.set()
    await aclient.close()
    assert sidecar.calls("Record") == []


async def test_a_cancelled_decision_with_the_callers_own_id_keeps_its_hold_for_the_next_try(
    aclient: AsyncClient, sidecar: Sidecar
) -> None:
    gate = Gate(scripted.credits_pay())
    sidecar.answers("Decide", gate)
    task = asyncio.create_task(aclient.decide(**ASK, request_id="r1"))
    await gate.reached()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.opened.set()
    await aclient.close()
    assert sidecar.calls("Record") == []


def test_a_loop_that_is_stopped_in_a_decision_ends_cleanly(sidecar: Sidecar) -> None:
    gate = Gate(scripted.credits_pay())
    sidecar.answers("Decide", gate)

    async def leaves_a_task_behind() -> None:
        async with AsyncClient(sidecar.target, timeout=timedelta(milliseconds=1)) as client:
            task = asyncio.create_task(client.decide(**ASK, timeout=timedelta(seconds=60)))
            await gate.reached()
            client._tasks.clear()  # so that closing does not wait for it
        assert not task.done()

    asyncio.run(leaves_a_task_behind())
    gate.opened.set()


async def test_many_calls_at_once_are_each_recorded_once(aclient: AsyncClient, sidecar: Sidecar) -> None:
    async def one(number: int) -> None:
        async with aclient.request(user_id=f"u{number}", provider="openai") as call:
            call.used(input_tokens=number)

    async with asyncio.TaskGroup() as group:
        for number in range(50):
            group.create_task(one(number))
    used = sorted(each.usage.input_tokens for each in sidecar.calls("Record"))
    assert used == list(range(50))


async def test_unavailable_at_the_end_is_tried_again_before_it_is_raised(
    either: Either, sidecar: Sidecar
) -> None:
    sidecar.answers("Record", scripted.UNAVAILABLE, scripted.recorded())
    await either.request(nothing, **ASK)
    assert len(sidecar.calls("Record")) == 2
    sidecar.answers("Record", scripted.UNAVAILABLE)
    with pytest.raises(Unavailable):
        await either.request(nothing, **ASK)
