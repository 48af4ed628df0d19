"""UNAVAILABLE is tried again within the deadline, and nothing else is."""

from __future__ import annotations

import socket
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2

from keyturn import (
    Client,
    DeadlineExceeded,
    DecideRequest,
    KeyturnError,
    Outcome,
    RecordRequest,
    Retries,
    SealedHandle,
    SealedTicket,
    Unavailable,
    errors,
)
from keyturn.retries import Attempts, Reach
from keyturn.v1 import routing_service_pb2 as pb
from tests.client import scripted
from tests.client.conftest import PATIENCE, Connect, Either
from tests.client.scripted import HANDLE, TICKET, UNAVAILABLE, Fault, Sidecar, serving

ASK: dict[str, Any] = {"user_id": "u1", "provider": "openai"}
CALLS: dict[str, tuple[Any, ...]] = {
    "Decide": ("decide",),
    "Record": ("record", SealedTicket(TICKET), Outcome.SUCCESS),
    "Explain": ("explain",),
    "BatchDecide": ("decide_many", [DecideRequest(**ASK)]),
    "BatchRecord": ("record_many", [RecordRequest(SealedTicket(TICKET), Outcome.SUCCESS)]),
}


def asking_for(seconds: float) -> Fault:
    delay = duration_pb2.Duration()
    delay.FromTimedelta(timedelta(seconds=seconds))
    info = error_details_pb2.RetryInfo(retry_delay=delay)
    return Fault(grpc.StatusCode.UNAVAILABLE, "The store cannot be reached.", [info])


async def call(either: Either, rpc: str) -> Any:
    fields = ASK if rpc in ("Decide", "Explain") else {}
    return await either(*CALLS[rpc], **fields)


@pytest.mark.parametrize("rpc", CALLS)
async def test_unavailable_is_tried_again_with_the_same_request(
    either: Either, sidecar: Sidecar, rpc: str
) -> None:
    default = {
        "Decide": scripted.own_key(),
        "Record": scripted.recorded(),
        "Explain": pb.ExplainResponse(),
        "BatchDecide": pb.BatchDecideResponse(),
        "BatchRecord": pb.BatchRecordResponse(),
    }[rpc]
    sidecar.answers(rpc, UNAVAILABLE, UNAVAILABLE, default)
    await call(either, rpc)
    first, second, third = sidecar.calls(rpc)
    assert first == second == third


async def test_a_made_up_request_id_stays_the_same_over_retries(either: Either, sidecar: Sidecar) -> None:
    sidecar.answers("Decide", UNAVAILABLE, UNAVAILABLE, scripted.credits_pay())
    await either("decide", **ASK)
    ids = [each.request_id for each in sidecar.calls("Decide")]
    assert len(ids) == 3
    assert len(set(ids)) == 1
    assert ids[0] != ""


async def test_the_attempts_are_bounded(connect: Connect, sidecar: Sidecar) -> None:
    sidecar.answers("Decide", UNAVAILABLE)
    retries = Retries(attempts=3, first_delay=timedelta(), max_delay=timedelta())
    with pytest.raises(Unavailable):
        await connect(timeout=PATIENCE, retries=retries)("decide", **ASK)
    assert len(sidecar.received) == 3


async def test_a_call_that_the_sidecar_dropped_as_it_ended_is_tried_again(
    either: Either, sidecar: Sidecar
) -> None:
    sidecar.answers("Decide", Fault(grpc.StatusCode.CANCELLED), scripted.credits_pay())
    await either("decide", **ASK)
    assert len(sidecar.received) == 2


@pytest.mark.parametrize(
    "code", [code for code in grpc.StatusCode if code.name not in ("OK", "UNAVAILABLE", "CANCELLED")]
)
async def test_no_other_status_is_tried_again(
    either: Either, sidecar: Sidecar, code: grpc.StatusCode
) -> None:
    sidecar.answers("Decide", Fault(code))
    with pytest.raises(KeyturnError):
        await either("decide", **ASK)
    assert len(sidecar.received) == 1


async def test_a_deadline_that_passed_is_not_tried_again(either: Either, sidecar: Sidecar) -> None:
    sidecar.answers("Decide", sidecar.hang)
    with pytest.raises(DeadlineExceeded) as caught:
        await either("decide", **ASK, timeout=timedelta(milliseconds=300))
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(sidecar.received) <= 1


async def test_a_redemption_is_never_tried_again(either: Either, sidecar: Sidecar) -> None:
    sidecar.answers("Redeem", UNAVAILABLE)
    with pytest.raises(Unavailable):
        await either("redeem", SealedHandle(HANDLE))
    assert len(sidecar.received) == 1


async def test_the_wait_that_the_server_asks_for_is_kept(either: Either, sidecar: Sidecar) -> None:
    sidecar.answers("Decide", asking_for(0.2), scripted.own_key())
    await either("decide", **ASK)
    first, second = sidecar.received
    assert second.at - first.at >= 0.2


async def test_a_wait_that_does_not_fit_in_the_deadline_is_not_begun(
    either: Either, sidecar: Sidecar
) -> None:
    sidecar.answers("Decide", asking_for(3600))
    with pytest.raises(Unavailable) as caught:
        await either("decide", **ASK)
    assert caught.value.retry_after == timedelta(hours=1)
    assert len(sidecar.received) == 1


async def test_an_absent_sidecar_is_unavailable(connect: Connect, tmp_path: Path) -> None:
    retries = Retries(attempts=1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for target in (f"unix:{tmp_path}/nobody.sock", f"127.0.0.1:{port}"):
        with pytest.raises(Unavailable):
            await connect(target, timeout=PATIENCE, retries=retries)("decide", **ASK)


def test_a_sidecar_that_starts_late_is_found_by_the_retries(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/late.sock"
    retries = Retries(attempts=1000, first_delay=timedelta(milliseconds=100))
    failed = threading.Event()
    answers = []

    def ask() -> None:
        with Client(address, retries=Retries(attempts=1)) as client, pytest.raises(Unavailable):
            client.decide(**ASK, timeout=PATIENCE)
        failed.set()
        with Client(address, timeout=PATIENCE, retries=retries) as client:
            answers.append(client.decide(**ASK))

    asking = threading.Thread(target=ask)
    asking.start()
    failed.wait(60)
    with serving(address):
        asking.join()
    assert answers[0].allowed


# ------------------------------------------------------- the arithmetic, without a clock


def unavailable(asked: float | None = None) -> Unavailable:
    retry_after = None if asked is None else timedelta(seconds=asked)
    return Unavailable("x", code=grpc.StatusCode.UNAVAILABLE, retry_after=retry_after)


def attempts(retries: Retries, *, seconds: float = 1000, share: float = 1.0) -> tuple[Attempts, list[float]]:
    """Attempts under a clock that stands still; jitter takes `share` of its range."""
    now = [0.0]
    made = Attempts(
        retries,
        timedelta(seconds=seconds),
        Reach(),
        clock=lambda: now[0],
        jitter=lambda low, high: low + (high - low) * share,
    )
    return made, now


def test_the_backoff_doubles_up_to_its_limit() -> None:
    retries = Retries(attempts=6)
    made, _ = attempts(retries)
    waits = [made.wait_after(unavailable()) for _ in range(6)]
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.0, None]


def test_the_jitter_is_full() -> None:
    made, _ = attempts(Retries(), share=0.0)
    assert made.wait_after(unavailable()) == 0.0


def test_jitter_comes_on_top_of_what_the_server_asks() -> None:
    made, _ = attempts(Retries())
    assert made.wait_after(unavailable(asked=2)) == pytest.approx(2.1)


def test_jitter_gives_way_to_the_deadline_but_what_the_server_asks_does_not() -> None:
    made, _ = attempts(Retries(), seconds=2.05)
    assert made.wait_after(unavailable(asked=2)) == 2.0
    made, _ = attempts(Retries(), seconds=2)
    assert made.wait_after(unavailable(asked=2)) is None
    made, _ = attempts(Retries(), seconds=0.1)
    assert made.wait_after(unavailable()) is None


def test_every_attempt_gets_what_is_left_of_the_deadline() -> None:
    made, now = attempts(Retries(), seconds=2)
    now[0] = 1.5
    assert made.seconds_left() == 0.5


def test_a_deadline_exceeded_is_unavailable_but_final() -> None:
    made, _ = attempts(Retries())
    assert made.wait_after(errors.DeadlineExceeded("x")) is None


def test_very_many_attempts_do_not_overflow() -> None:
    made, _ = attempts(Retries(attempts=10_000), share=0.0)
    assert all(made.wait_after(unavailable()) == 0.0 for _ in range(9_999))


def test_retries_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Retries(attempts=0)
    with pytest.raises(ValueError, match="negative"):
        Retries(first_delay=timedelta(seconds=-1))
