"""A sidecar that is down costs one attempt a call, and `when_down` says whether requests go ahead."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from keyturn import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    DecideRequest,
    Denied,
    KeyturnError,
    NotFound,
    Outcome,
    RecordRequest,
    Retries,
    SealedTicket,
    Unavailable,
)
from keyturn.v1 import routing_service_pb2 as pb
from tests.client import scripted
from tests.client.conftest import PATIENCE, QUICK, Connect, Either
from tests.client.scripted import TICKET, Fault, Sidecar, serving
from tests.support import eventually

ASK: dict[str, Any] = {"user_id": "u1", "provider": "openai"}
PLATFORM = {"Authorization": "Bearer platform"}
# As gRPC itself says it: without an ErrorInfo.
SILENT = Fault(grpc.StatusCode.UNAVAILABLE, "failed to connect", raw=b"")
SAID = Fault(grpc.StatusCode.UNAVAILABLE, "No store.", [scripted.error_info("STORE_UNAVAILABLE")])


class Asked:
    """A `when_down` that remembers what it was asked."""

    def __init__(self, says: bool | Exception) -> None:
        self.says = says
        self.times: list[tuple[DecideRequest, Unavailable]] = []

    def __call__(self, request: DecideRequest, error: Unavailable) -> bool:
        self.times.append((request, error))
        if isinstance(self.says, Exception):
            raise self.says
        return self.says


# ------------------------------------------------------------------------------- the down state


async def decide(either: Either) -> None:
    await either("decide", **ASK)


async def redeem(either: Either) -> None:
    await either("redeem", "kth1_x")


async def attempts(either: Either, sidecar: Sidecar) -> int:
    """How many attempts a decision makes that nobody answers."""
    before = len(sidecar.received)
    with pytest.raises(Unavailable):
        await decide(either)
    return len(sidecar.received) - before


async def test_a_sidecar_that_is_down_costs_one_attempt_a_call(either: Either, sidecar: Sidecar) -> None:
    sidecar.answers("Decide", SILENT)
    sidecar.answers("Record", SILENT)
    assert [await attempts(either, sidecar) for _ in range(3)] == [5, 1, 1]
    with pytest.raises(Unavailable):
        await either("record", SealedTicket(TICKET), Outcome.SUCCESS)
    assert len(sidecar.calls("Record")) == 1


@pytest.mark.parametrize(
    "answer",
    [scripted.credits_pay(), scripted.denied(), SAID, Fault(grpc.StatusCode.INTERNAL, raw=b"")],
    ids=["credits", "denied", "unavailable", "internal"],
)
async def test_an_answer_of_whatever_status_ends_it(either: Either, sidecar: Sidecar, answer: Any) -> None:
    sidecar.answers("Decide", *[SILENT] * 5, answer, SILENT)
    assert await attempts(either, sidecar) == 5
    try:
        await decide(either)
    except KeyturnError:
        assert isinstance(answer, Fault)
    assert len(sidecar.received) == 6
    assert await attempts(either, sidecar) == 5


async def test_a_sidecar_that_says_that_it_is_unavailable_is_not_down(
    either: Either, sidecar: Sidecar
) -> None:
    sidecar.answers("Decide", SAID)
    assert [await attempts(either, sidecar) for _ in range(2)] == [5, 5]
    sidecar.answers("Decide", *[SILENT] * 4, SAID, SILENT)
    assert [await attempts(either, sidecar) for _ in range(3)] == [5, 5, 1]


async def test_a_deadline_that_passes_says_neither_up_nor_down(either: Either, sidecar: Sidecar) -> None:
    sidecar.answers("Decide", sidecar.hang)
    with pytest.raises(DeadlineExceeded):
        await either("decide", **ASK, timeout=timedelta(milliseconds=100))
    sidecar.answers("Decide", SILENT)
    assert [await attempts(either, sidecar) for _ in range(2)] == [5, 1]
    sidecar.answers("Decide", sidecar.hang)
    with pytest.raises(DeadlineExceeded):
        await either("decide", **ASK, timeout=timedelta(milliseconds=100))
    sidecar.answers("Decide", SILENT)
    assert await attempts(either, sidecar) == 1


async def test_a_batch_of_the_background_that_is_answered_ends_it_too(
    connect: Connect, sidecar: Sidecar
) -> None:
    either = connect(timeout=PATIENCE, retries=QUICK)
    sidecar.answers("Decide", SILENT)
    assert [await attempts(either, sidecar) for _ in range(2)] == [5, 1]
    either.client.record_later(RecordRequest(SealedTicket(TICKET), Outcome.SUCCESS))
    await either("flush")
    assert await attempts(either, sidecar) == 5


async def test_a_batch_of_the_background_that_fails_does_not_make_it_down(
    connect: Connect, sidecar: Sidecar
) -> None:
    either = connect(timeout=PATIENCE, retries=QUICK, on_unsent=lambda unsent: None)
    sidecar.answers("BatchRecord", SILENT, Fault(grpc.StatusCode.DATA_LOSS))
    either.client.record_later(RecordRequest(SealedTicket(TICKET), Outcome.SUCCESS))
    await either("flush")
    sidecar.answers("Decide", SILENT)
    assert await attempts(either, sidecar) == 5


async def test_a_sidecar_that_comes_back_is_found(connect: Connect, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/back.sock"
    either = connect(address, timeout=timedelta(milliseconds=300), retries=Retries(attempts=2))
    with pytest.raises(Unavailable):
        await decide(either)
    with serving(address):

        async def found() -> bool:
            try:  # each time one attempt, and a connection is tried once in a second
                return bool((await either("decide", **ASK, timeout=PATIENCE)).allowed)
            except Unavailable:
                return False

        await eventually(found)


# ---------------------------------------------------------------------------------- when_down


async def test_the_gateway_fails_closed_unless_it_says_otherwise(connect: Connect, sidecar: Sidecar) -> None:
    sidecar.answers("Decide", SILENT)
    asked = Asked(says=False)
    for either in (connect(retries=QUICK), connect(retries=QUICK, when_down=asked)):
        with pytest.raises(Unavailable):
            await decide(either)
        with pytest.raises(Unavailable):
            await either.request(lambda call: pytest.fail("entered"), **ASK)
    assert len(asked.times) == 2


async def test_a_request_that_goes_ahead_is_unmetered_and_leaves_no_record(
    connect: Connect, sidecar: Sidecar
) -> None:
    sidecar.answers("Decide", SILENT)
    asked = Asked(says=True)
    either = connect(timeout=PATIENCE, retries=QUICK, when_down=asked)
    decision = await either("decide", **ASK, model="gpt-4o")
    assert (decision.unmetered, decision.allowed) == (True, True)
    assert (decision.key, decision.ticket, decision.denial) == (None, None, None)
    ((request, error),) = asked.times
    assert (request.user_id, request.model) == ("u1", "gpt-4o")
    assert error.code is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(ValueError, match="unmetered"):
        await either("record", decision, Outcome.SUCCESS)

    def block(call: Any) -> None:
        assert call.headers(PLATFORM) == PLATFORM
        assert call.secret is None
        call.used(input_tokens=5)

    for background in (True, False):
        call = await either.request(block, **ASK, background=background)
        assert call.decision.unmetered
        assert (call.recorded, call.unrecorded) == (None, None)
    with pytest.raises(ZeroDivisionError):
        await either.request(lambda call: call.failed(Outcome.TIMEOUT) or 1 / 0, **ASK)
    await either("flush")
    assert sidecar.calls("Record") == sidecar.calls("BatchRecord") == []


async def test_finish_of_an_unmetered_call_has_nothing_to_give(connect: Connect, sidecar: Sidecar) -> None:
    sidecar.answers("Decide", SILENT)
    client = connect(retries=QUICK, when_down=Asked(says=True)).client
    if isinstance(client, AsyncClient):
        async with client.request(**ASK) as call:
            assert await call.finish() is None
    else:
        with client.request(**ASK) as call:
            assert call.finish() is None


async def test_a_deadline_that_passes_is_asked_about_too(connect: Connect, sidecar: Sidecar) -> None:
    sidecar.answers("Decide", sidecar.hang)
    asked = Asked(says=True)
    either = connect(when_down=asked)
    decision = await either("decide", **ASK, timeout=timedelta(milliseconds=100))
    assert decision.unmetered
    assert isinstance(asked.times[0][1], DeadlineExceeded)


@pytest.mark.parametrize(
    "code",
    [
        code
        for code in grpc.StatusCode
        if code.name not in ("OK", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")
    ],
)
async def test_it_is_asked_for_no_other_error(
    connect: Connect, sidecar: Sidecar, code: grpc.StatusCode
) -> None:
    sidecar.answers("Decide", Fault(code))
    asked = Asked(says=True)
    with pytest.raises(KeyturnError):
        await decide(connect(when_down=asked))
    assert asked.times == []


async def test_it_is_never_asked_for_a_denial(connect: Connect, sidecar: Sidecar) -> None:
    sidecar.answers("Decide", scripted.denied())
    asked = Asked(says=True)
    either = connect(when_down=asked)
    assert not (await either("decide", **ASK)).allowed
    with pytest.raises(Denied):
        await either.request(lambda call: None, **ASK)
    assert asked.times == []


async def test_what_it_raises_is_raised(connect: Connect, sidecar: Sidecar) -> None:
    sidecar.answers("Decide", SILENT)
    either = connect(retries=QUICK, when_down=Asked(says=ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        await decide(either)


async def test_other_calls_and_items_of_a_batch_do_not_ask(connect: Connect, sidecar: Sidecar) -> None:
    for rpc in ("Record", "Explain", "BatchDecide"):
        sidecar.answers(rpc, SILENT)
    asked = Asked(says=True)
    either = connect(retries=QUICK, when_down=asked)
    calls: list[Callable[[], Any]] = [
        lambda: either("record", SealedTicket(TICKET), Outcome.SUCCESS),
        lambda: either("explain", **ASK),
        lambda: either("decide_many", [DecideRequest(**ASK)]),
    ]
    for call in calls:
        with pytest.raises(Unavailable):
            await call()
    assert asked.times == []


def test_a_refused_key_may_go_on_unmetered(sidecar: Sidecar) -> None:
    sidecar.answers("Decide", scripted.own_key(), SILENT)
    opened = Client(sidecar.target, retries=QUICK, when_down=Asked(says=True))
    with opened as client, client.request(**ASK) as call:
        assert call.headers(PLATFORM) != PLATFORM
        call.key_refused()
        assert call.headers(PLATFORM) == PLATFORM
        assert call.decision.unmetered
    (sent,) = sidecar.calls("Record")
    assert sent.outcome == pb.OUTCOME_AUTH_REJECTED


async def test_a_user_that_is_not_there_is_no_outage(connect: Connect, sidecar: Sidecar) -> None:
    sidecar.answers("Decide", Fault(grpc.StatusCode.NOT_FOUND))
    with pytest.raises(NotFound):
        await connect(when_down=Asked(says=True)).request(lambda call: None, **ASK)
