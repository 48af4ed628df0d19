"""Records that are sent in the background: none is charged twice, and none is lost without a word."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2

from keyturn import (
    AlreadyExists,
    AsyncClient,
    Client,
    Outcome,
    QueueFull,
    Recorded,
    RecordRequest,
    ResourceExhausted,
    Retries,
    SealedHandle,
    SealedTicket,
    Unavailable,
    Unsent,
    errors,
)
from keyturn._queue import RecordQueue
from keyturn.errors import KeyturnError
from keyturn.v1 import routing_service_pb2 as pb
from keyturn.v1 import status_pb2
from tests.client import scripted
from tests.client.conftest import PATIENCE, QUICK, Connect, Either
from tests.client.scripted import HANDLE, TICKET, UNAVAILABLE, Fault, Sidecar

ASK: dict[str, Any] = {"user_id": "u1", "provider": "openai"}
NEVER = timedelta()
CONFLICT = Fault(grpc.StatusCode.ALREADY_EXISTS, "Recorded before with other contents.")


def record(number: int) -> RecordRequest:
    return RecordRequest(SealedTicket(f"{TICKET}-{number}"), Outcome.SUCCESS, cost_micros=number)


def costs(sidecar: Sidecar) -> list[list[int]]:
    """The records of each batch that arrived, by what they cost."""
    return [[each.cost_micros for each in batch.requests] for batch in sidecar.calls("BatchRecord")]


def all_costs(sidecar: Sidecar) -> list[int]:
    """Those of all batches together."""
    return [cost for batch in costs(sidecar) for cost in batch]


def taken() -> pb.BatchRecordResult:
    return pb.BatchRecordResult(response=scripted.recorded())


def refused(code: grpc.StatusCode) -> pb.BatchRecordResult:
    return pb.BatchRecordResult(status=status_pb2.Status(code=code.value[0], message="a sentence"))


def answering(*results: pb.BatchRecordResult) -> pb.BatchRecordResponse:
    return pb.BatchRecordResponse(results=results)


async def later(either: Either, *records: RecordRequest) -> None:
    """Queues records as a gateway does: in the loop of an AsyncClient, in any thread of a Client."""
    for each in records:
        either.client.record_later(each)


class Gate:
    """Holds a batch back until it is opened."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.opened = threading.Event()

    def __call__(self, request: Any) -> pb.BatchRecordResponse:
        self.arrived.set()
        self.opened.wait(60)
        return answering(*(taken() for _ in request.requests))


# ------------------------------------------------------------------------------------- sending


async def test_a_record_is_sent_as_it_would_be_in_the_foreground(either: Either, sidecar: Sidecar) -> None:
    await later(
        either, record(1), RecordRequest(SealedHandle(HANDLE), Outcome.AUTH_REJECTED, http_status=401)
    )
    await either("flush")
    sent = [each for batch in sidecar.calls("BatchRecord") for each in batch.requests]
    assert sent == [
        pb.RecordRequest(credit_ticket=f"{TICKET}-1", outcome=pb.OUTCOME_SUCCESS, cost_micros=1),
        pb.RecordRequest(key_handle=HANDLE, outcome=pb.OUTCOME_AUTH_REJECTED, http_status=401),
    ]
    assert 2 < sidecar.received[0].seconds_left < 11  # 10, whatever that of calls is


async def test_what_waits_goes_out_together_a_hundred_at_most(either: Either, sidecar: Sidecar) -> None:
    gate = Gate()
    sidecar.answers("BatchRecord", gate)
    await later(either, record(0))
    await asyncio.to_thread(gate.arrived.wait, 60)
    await later(either, *map(record, range(1, 251)))
    gate.opened.set()
    await either("flush")
    assert [len(batch) for batch in costs(sidecar)] == [1, 100, 100, 50]
    assert all_costs(sidecar) == list(range(251))


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    ],
)
async def test_what_failed_for_now_is_sent_again_and_again(
    connect: Connect, sidecar: Sidecar, code: grpc.StatusCode
) -> None:
    unsent: list[Unsent] = []
    either = connect(retries=QUICK, on_unsent=unsent.append)
    sidecar.answers("BatchRecord", *[Fault(code)] * 12, answering(refused(code)), answering(taken()))
    await later(either, record(1))
    await either("flush", timeout=PATIENCE)
    assert costs(sidecar) == [[1]] * 14
    assert unsent == []


async def test_only_what_failed_is_sent_again_oldest_first(connect: Connect, sidecar: Sidecar) -> None:
    either = connect(retries=QUICK)
    gate = Gate()
    busy = refused(grpc.StatusCode.UNAVAILABLE)
    sidecar.answers(
        "BatchRecord",
        gate,
        answering(busy, taken(), busy),
        lambda request: answering(*(taken() for _ in request.requests)),
    )
    await later(either, record(0))
    await asyncio.to_thread(gate.arrived.wait, 60)
    await later(either, record(1), record(2), record(3))
    gate.opened.set()
    await either("flush")
    assert costs(sidecar) == [[0], [1, 2, 3], [1, 3]]


@pytest.mark.parametrize("alone", [True, False], ids=["by itself", "with its batch"])
async def test_what_is_refused_for_good_is_unsent_and_the_rest_goes_on(
    connect: Connect, sidecar: Sidecar, alone: bool
) -> None:
    unsent: list[Unsent] = []
    either = connect(retries=QUICK, on_unsent=unsent.append)
    conflict = grpc.StatusCode.ALREADY_EXISTS
    sidecar.answers(
        "BatchRecord",
        answering(refused(conflict)) if alone else CONFLICT,
        lambda request: answering(*(taken() for _ in request.requests)),
    )
    await later(either, record(1))
    await either("flush")
    await later(either, record(2))
    await either("flush")
    (told,) = unsent
    assert told.record == record(1)
    assert isinstance(told.error, AlreadyExists)
    assert costs(sidecar) == [[1], [2]]


async def test_flush_waits_for_what_was_queued_before_it(either: Either, sidecar: Sidecar) -> None:
    gate = Gate()
    sidecar.answers("BatchRecord", gate)
    await either("flush")  # nothing is
    await later(either, record(1))
    with pytest.raises(TimeoutError):
        await either("flush", timeout=timedelta(milliseconds=50))
    gate.opened.set()
    await either("flush", timeout=PATIENCE)
    assert costs(sidecar) == [[1]]


async def test_what_cannot_be_sent_is_refused_at_once(either: Either, sidecar: Sidecar) -> None:
    with pytest.raises(ValueError, match="out of range"):
        either.client.record_later(RecordRequest(SealedTicket(TICKET), Outcome.SUCCESS, http_status=2**40))
    with pytest.raises(ValueError, match="65536 bytes"):
        either.client.record_later(
            RecordRequest(SealedTicket(TICKET), Outcome.SUCCESS, endpoint="x" * 70_000)
        )
    assert sidecar.received == []


async def test_the_sender_ends_with_its_queue(either: Either, sidecar: Sidecar) -> None:
    for number in range(3):
        await later(either, record(number))
        await either("flush")
    await asyncio.sleep(0)
    assert either.client._sender is None


# ------------------------------------------------------------------------------ full and closed


async def test_a_full_queue_leaves_the_record_with_its_caller(connect: Connect, sidecar: Sidecar) -> None:
    gate = Gate()
    sidecar.answers("BatchRecord", gate)
    unsent: list[Unsent] = []
    either = connect(retries=QUICK, queue_size=2, on_unsent=unsent.append)
    await later(either, record(1), record(2))
    with pytest.raises(QueueFull) as caught:
        either.client.record_later(record(3))
    assert caught.value.record == record(3)
    assert unsent == []
    call = await either.request(lambda call: call.used(input_tokens=3), **ASK, background=True)
    (told,) = unsent
    assert isinstance(told.error, QueueFull)
    assert told.record.usage is not None
    assert told.record.usage.input_tokens == 3
    assert call.recorded is None
    gate.opened.set()
    await either("flush")
    await later(either, record(4))
    await either("flush")
    assert all_costs(sidecar) == [1, 2, 4]


async def test_closing_sends_what_is_queued_and_takes_no_more(connect: Connect, sidecar: Sidecar) -> None:
    either = connect(retries=QUICK)
    sidecar.answers(
        "BatchRecord", UNAVAILABLE, lambda request: answering(*(taken() for _ in request.requests))
    )
    await later(either, *map(record, range(5)))
    assert await either("close") == []
    assert sorted(set(all_costs(sidecar))) == list(range(5))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="closed"):
            either.client.record_later(record(9))
        assert await either("close") == []


@pytest.mark.parametrize("close_timeout", [NEVER, timedelta(milliseconds=100)])
async def test_closing_gives_up_in_time_and_gives_back_what_is_left(
    connect: Connect, sidecar: Sidecar, close_timeout: timedelta
) -> None:
    unsent: list[Unsent] = []
    either = connect(retries=QUICK, close_timeout=close_timeout, on_unsent=unsent.append)
    sidecar.answers("BatchRecord", UNAVAILABLE)
    await later(either, record(1), record(2))
    left = await either("close")
    assert [each.record for each in left] == [record(1), record(2)]
    assert left == unsent
    assert all(isinstance(each.error, Unavailable | RuntimeError) for each in left)


async def test_closing_does_not_wait_for_a_sidecar_that_hangs(connect: Connect, sidecar: Sidecar) -> None:
    gate = Gate()
    sidecar.answers("BatchRecord", gate)
    either = connect(close_timeout=timedelta(milliseconds=100), timeout=timedelta(milliseconds=100))
    await later(either, record(1))
    await asyncio.to_thread(gate.arrived.wait, 60)
    await later(either, record(2))
    left = await either("close")
    gate.opened.set()
    assert [each.record for each in left] == [record(1), record(2)]
    assert [str(each.error) for each in left] == ["the client was closed before this record was sent"] * 2


async def test_unsent_records_are_logged_without_their_tokens(
    connect: Connect, sidecar: Sidecar, caplog: pytest.LogCaptureFixture
) -> None:
    sidecar.answers("BatchRecord", CONFLICT)
    either = connect(retries=QUICK)
    await later(either, record(1))
    await either("flush")
    (line,) = [each for each in caplog.records if each.name == "keyturn"]
    assert line.levelno == logging.ERROR
    assert line.getMessage() == (
        "a record was not sent: outcome SUCCESS: AlreadyExists: ALREADY_EXISTS: "
        "Recorded before with other contents."
    )
    assert TICKET not in caplog.text
    assert TICKET not in repr(Unsent(record(1), RuntimeError()))


async def test_a_callback_that_raises_does_not_stop_the_sender(
    connect: Connect, sidecar: Sidecar, caplog: pytest.LogCaptureFixture
) -> None:
    def raises(unsent: Unsent) -> None:
        raise ZeroDivisionError(str(unsent.record.settles))

    either = connect(retries=QUICK, on_unsent=raises)
    sidecar.answers("BatchRecord", CONFLICT, answering(taken()))
    await later(either, record(1))
    await either("flush")
    await later(either, record(2))
    await either("flush")
    assert costs(sidecar) == [[1], [2]]
    assert "on_unsent raised ZeroDivisionError" in caplog.text
    assert "outcome SUCCESS" in caplog.text
    assert TICKET not in caplog.text


async def test_a_callback_may_queue_the_record_again(connect: Connect, sidecar: Sidecar) -> None:
    either: Either
    either = connect(retries=QUICK, on_unsent=lambda unsent: either.client.record_later(unsent.record))
    sidecar.answers("BatchRecord", CONFLICT, answering(taken()))
    await later(either, record(1))
    await either("flush")
    await either("flush")
    assert costs(sidecar) == [[1], [1]]


# -------------------------------------------------------------------------- at the end of calls


@pytest.mark.parametrize("raised", [None, ZeroDivisionError])
async def test_a_call_in_the_background_does_not_wait_for_its_record(
    either: Either, sidecar: Sidecar, raised: type[Exception] | None
) -> None:
    gate = Gate()
    sidecar.answers("BatchRecord", gate)

    def block(call: Any) -> None:
        call.used(output_tokens=8)
        if raised is not None:
            raise raised

    if raised is None:
        call = await either.request(block, **ASK, background=True)
        assert (call.recorded, call.unrecorded) == (None, None)
    else:
        with pytest.raises(raised):
            await either.request(block, **ASK, background=True)
    gate.opened.set()
    await either("flush")
    assert sidecar.calls("Record") == []
    (batch,) = sidecar.calls("BatchRecord")
    (sent,) = batch.requests
    ended = pb.OUTCOME_CLIENT_CANCELLED if raised else pb.OUTCOME_SUCCESS
    assert (sent.outcome, sent.usage.output_tokens) == (ended, 8)


async def test_a_call_in_the_background_of_a_closed_client_is_told_of(
    connect: Connect, sidecar: Sidecar
) -> None:
    unsent: list[Unsent] = []
    either = connect(on_unsent=unsent.append)

    if isinstance(either.client, AsyncClient):
        async with either.client.request(**ASK, background=True) as call:
            call.sending()
            await either.close()
    else:
        with either.client.request(**ASK, background=True) as call_:
            call_.sending()
            await either.close()
    (told,) = unsent
    assert isinstance(told.error, RuntimeError)
    assert told.record.outcome is Outcome.SUCCESS


def test_finish_records_in_the_foreground_once(client: Client, sidecar: Sidecar) -> None:
    with client.request(**ASK, background=True) as call:
        call.used(input_tokens=3)
        recorded = call.finish()
        assert recorded is not None
        assert recorded.charged_micros == 1_500
        assert call.recorded is recorded
        for late in (call.finish, call.sending, call.succeeded, call.key_refused):
            with pytest.raises(RuntimeError, match="not open"):
                late()
    (sent,) = sidecar.calls("Record")
    assert (sent.outcome, sent.usage.input_tokens) == (pb.OUTCOME_SUCCESS, 3)
    assert sidecar.calls("BatchRecord") == []


async def test_finish_records_what_failed_said_and_raises_in_place(
    aclient: AsyncClient, sidecar: Sidecar
) -> None:
    async with aclient.request(**ASK) as call:
        call.failed(Outcome.TIMEOUT, http_status=504)
        assert await call.finish() is not None
    sidecar.answers("Record", CONFLICT)
    with pytest.raises(AlreadyExists):
        async with aclient.request(**ASK) as call:
            await call.finish()
    assert call.unrecorded is not None
    assert [each.outcome for each in sidecar.calls("Record")] == [pb.OUTCOME_TIMEOUT, pb.OUTCOME_SUCCESS]


# ---------------------------------------------------------------- processes and loops that end


def run(program: str, target: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, target], capture_output=True, text=True, timeout=60, check=False
    )


QUEUES_AND_ENDS = """
import sys
from datetime import timedelta
from keyturn import Client, Outcome, RecordRequest, SealedTicket
client = Client(sys.argv[1], close_timeout=timedelta(seconds={seconds}))
for number in range(200):
    client.record_later(RecordRequest(SealedTicket(f"ktt1_{{number}}"), Outcome.SUCCESS))
"""


def test_a_process_that_ends_without_closing_still_sends(sidecar: Sidecar) -> None:
    ended = run(QUEUES_AND_ENDS.format(seconds=60), sidecar.target)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert sum(len(batch.requests) for batch in sidecar.calls("BatchRecord")) == 200


def test_a_process_that_ends_without_closing_tells_of_what_it_could_not_send(tmp_path: Path) -> None:
    ended = run(QUEUES_AND_ENDS.format(seconds=0.1), f"unix:{tmp_path}/nobody.sock")
    assert ended.returncode == 0
    assert ended.stderr.count("a record was not sent: outcome SUCCESS: ") == 200
    assert "ktt1_" not in ended.stderr


def test_a_loop_that_ends_without_closing_tells_of_what_it_could_not_send(
    sidecar: Sidecar,
) -> None:
    sidecar.answers("BatchRecord", UNAVAILABLE)
    unsent: list[Unsent] = []

    async def main() -> None:
        client = AsyncClient(sidecar.target, on_unsent=unsent.append)
        client.record_later(record(1))
        await asyncio.sleep(0)

    asyncio.run(main())
    assert [each.record for each in unsent] == [record(1)]


# -------------------------------------------------------------- the queue, without a clock


def queue(size: int = 1000, **retries: Any) -> RecordQueue:
    return RecordQueue(size, Retries(**retries), jitter=lambda low, high: high)


def busy(asked: float | None = None) -> Unavailable:
    retry_after = None if asked is None else timedelta(seconds=asked)
    return Unavailable("x", code=grpc.StatusCode.UNAVAILABLE, retry_after=retry_after)


def put(queue: RecordQueue, *numbers: int) -> None:
    for number in numbers:
        queue.put(record(number))


def sent(queue: RecordQueue) -> list[int]:
    return [each.cost_micros for each in queue.batch().requests]


GOOD = Recorded(
    record_id="",
    charged_micros=0,
    released_micros=0,
    balance_micros=None,
    cost_source=None,  # type: ignore[arg-type]
    replayed=False,
    durability=None,  # type: ignore[arg-type]
    key_state=None,  # type: ignore[arg-type]
)


def test_the_backoff_of_the_sender_grows_without_end_and_begins_again() -> None:
    waiting = queue()
    put(waiting, 1, 2)
    waits = []
    for _ in range(40):
        waiting.batch()
        waits.append(waiting.answered(busy())[1])
    assert waits[:6] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert waits[-1] == 1.0
    assert sent(waiting) == [1, 2]
    assert waiting.answered([GOOD, busy()]) == ([], 1.0)
    assert sent(waiting) == [2]
    assert waiting.answered([GOOD]) == ([], 0.0)
    put(waiting, 3)
    assert sent(waiting) == [3]
    assert waiting.answered(busy())[1] == 0.1


def test_the_sender_waits_as_long_as_the_sidecar_asks() -> None:
    waiting = queue()
    put(waiting, 1, 2)
    waiting.batch()
    assert waiting.answered([busy(3), busy(2)]) == ([], 3.1)


def test_a_batch_stays_below_what_the_sidecar_takes() -> None:
    waiting = queue()
    for _ in range(40):
        waiting.put(RecordRequest(SealedTicket(TICKET), Outcome.SUCCESS, endpoint="x" * 60_000))
    batch = waiting.batch()
    assert batch.ByteSize() <= 1024 * 1024
    assert len(batch.requests) == 17


@pytest.mark.parametrize("order", [lambda each: each, reversed])
def test_a_record_is_done_when_it_and_all_before_it_are(order: Callable[[Any], Any]) -> None:
    waiting = queue()
    put(waiting, 1, 2, 3)
    waiting.batch()
    put(waiting, 4)
    assert not waiting.done(1)
    waiting.answered([busy(), AlreadyExists("x"), GOOD])
    assert [waiting.done(number) for number in range(1, 5)] == [False] * 4
    waiting.told()
    assert not waiting.done(2)
    waiting.batch()
    waiting.answered([AlreadyExists("x"), busy()])
    assert not waiting.done(1)  # nobody has been told of it yet
    waiting.told()
    assert [waiting.done(number) for number in range(1, 5)] == [True, True, True, False]


def test_records_on_their_way_take_up_room() -> None:
    waiting = queue(2)
    put(waiting, 1, 2)
    waiting.batch()
    with pytest.raises(QueueFull):
        put(waiting, 3)
    waiting.answered([GOOD, ResourceExhausted("x")])
    put(waiting, 3)
    with pytest.raises(QueueFull):
        put(waiting, 4)


def test_an_answer_that_comes_after_giving_up_changes_nothing() -> None:
    waiting = queue()
    put(waiting, 1, 2)
    waiting.batch()
    assert [each.record for each in waiting.give_up()] == [record(1), record(2)]
    assert waiting.answered([GOOD, AlreadyExists("x")]) == ([], 0.0)
    assert waiting.answered(KeyturnError("x")) == ([], 0.0)
    assert waiting.give_up() == []


def test_too_few_answers_are_an_error_for_all() -> None:
    waiting = queue()
    put(waiting, 1, 2)
    waiting.batch()
    unsent, _ = waiting.answered([GOOD])
    assert [each.record for each in unsent] == [record(1), record(2)]


def test_a_queue_has_room_and_closing_takes_no_negative_time() -> None:
    with pytest.raises(ValueError, match="queue_size"):
        Client("unix:/nobody", queue_size=0)
    with pytest.raises(ValueError, match="close_timeout"):
        Client("unix:/nobody", close_timeout=timedelta(seconds=-1))


def test_retry_info_reaches_the_queue() -> None:
    delay = duration_pb2.Duration(seconds=2)
    info = scripted.packed(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=grpc.StatusCode.UNAVAILABLE.value[0], message="x", details=info)
    error = errors.from_status(status)
    waiting = queue()
    put(waiting, 1)
    waiting.batch()
    assert waiting.answered([error])[1] == 2.1
