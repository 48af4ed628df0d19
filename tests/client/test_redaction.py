"""Neither secrets nor whole tokens show up where things are printed."""

from __future__ import annotations

import copy
import logging
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import grpc
import pytest

from keyturn import (
    DecideRequest,
    Denied,
    KeyturnError,
    Outcome,
    RecordRequest,
    Retries,
    SealedHandle,
    SealedTicket,
    Unavailable,
    _wire,
)
from tests.client import scripted
from tests.client.conftest import PATIENCE, QUICK, Connect, Either
from tests.client.scripted import HANDLE, OTHER_HANDLE, SECRET, TICKET, UNAVAILABLE, Fault, Sidecar

ASK: dict[str, Any] = {"user_id": "u1", "provider": "openai"}
TOKEN = "the-bearer-token-of-a-gateway"
HIDDEN = (SECRET, TOKEN, HANDLE, OTHER_HANDLE, TICKET)


def assert_nothing_hidden(text: str) -> None:
    assert [hidden for hidden in HIDDEN if hidden in text] == []


@pytest.mark.parametrize(
    "answer", [scripted.own_key, scripted.credits_pay, scripted.denied], ids=lambda f: f.__name__
)
def test_a_decision_and_its_parts_print_no_secret_and_no_whole_token(
    answer: Callable[[], Any],
) -> None:
    decision = _wire.decision(answer())
    for thing in (decision, decision.key, decision.ticket, decision.denial, Denied(decision)):
        assert_nothing_hidden(repr(thing) + str(thing) + f"{thing}")
    assert_nothing_hidden(repr(asdict(decision)) + repr(copy.deepcopy(decision)))


def test_a_sealed_token_prints_a_short_beginning_and_sends_the_whole() -> None:
    assert repr(SealedHandle(HANDLE)) == "SealedHandle('kth1_AAA…')"
    assert repr(SealedTicket(TICKET)) == "SealedTicket('ktt1_aaa…')"
    assert repr(SealedTicket("short")) == "SealedTicket('…')"
    assert str(SealedHandle(HANDLE)) == HANDLE
    assert SealedHandle(HANDLE) == HANDLE


def test_requests_print_no_whole_token() -> None:
    asked = DecideRequest(**ASK, failed_keys=[HANDLE, SealedHandle(OTHER_HANDLE)])
    own, credit = _wire.decision(scripted.own_key()), _wire.decision(scripted.credits_pay())
    records = [RecordRequest(each, Outcome.SUCCESS) for each in (own, credit)]
    assert_nothing_hidden(repr(asked) + repr(records) + str(records))


async def test_a_client_prints_its_target_and_not_its_token(connect: Connect, sidecar: Sidecar) -> None:
    client = connect(token=TOKEN).client
    assert repr(client) == f"{type(client).__name__}('{sidecar.target}')"
    assert_nothing_hidden(repr(vars(client)))


async def test_a_call_prints_no_secret(either: Either, sidecar: Sidecar) -> None:
    texts: list[str] = []

    def block(call: Any) -> None:
        call.headers({})
        texts.append(repr(call))

    sidecar.answers("Decide", scripted.own_key())
    await either.request(block, **ASK)
    assert "key-1" in texts[0]
    assert_nothing_hidden(texts[0])


FAULTS = [
    UNAVAILABLE,
    Fault(grpc.StatusCode.INVALID_ARGUMENT, "No.", [scripted.error_info("INVALID_FIELD")]),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.code.name)
@pytest.mark.parametrize(
    ("rpc", "ask"),
    [
        ("Decide", lambda e: e("decide", **ASK, failed_keys=[SealedHandle(HANDLE)])),
        ("Record", lambda e: e("record", SealedTicket(TICKET), Outcome.SUCCESS)),
        ("Redeem", lambda e: e("redeem", SealedHandle(HANDLE))),
        (
            "BatchRecord",
            lambda e: e("record_many", [RecordRequest(SealedTicket(TICKET), Outcome.SUCCESS)]),
        ),
        (
            "BatchDecide",
            lambda e: e("decide_many", [DecideRequest(**ASK, failed_keys=[HANDLE])]),
        ),
        ("Explain", lambda e: e("explain", **ASK, failed_keys=[SealedHandle(HANDLE)])),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_traceback_with_every_local_variable_prints_nothing_hidden(
    connect: Connect,
    sidecar: Sidecar,
    caplog: pytest.LogCaptureFixture,
    fault: Fault,
    rpc: str,
    ask: Callable[[Either], Any],
) -> None:
    caplog.set_level(logging.DEBUG)
    sidecar.answers(rpc, fault)
    either = connect(token=TOKEN, timeout=PATIENCE, retries=QUICK)
    with pytest.raises(KeyturnError) as caught:
        await ask(either)
    report = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    assert_nothing_hidden("".join(report.format()) + caplog.text)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


async def test_a_block_that_fails_with_an_own_key_prints_nothing_hidden(
    connect: Connect, sidecar: Sidecar
) -> None:
    sidecar.answers("Decide", scripted.own_key())
    sidecar.answers("Record", UNAVAILABLE)
    either = connect(token=TOKEN, timeout=PATIENCE, retries=Retries(attempts=1))
    for raised in (ZeroDivisionError, None):

        def block(call: Any, raised: type[Exception] | None = raised) -> None:
            call.sending()
            if raised is not None:
                raise raised

        with pytest.raises(raised or Unavailable) as caught:
            await either.request(block, **ASK)
        report = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
        assert_nothing_hidden("".join(report.format()))


@pytest.mark.parametrize("token", ["", "  ", "two words", "schlüssel", "line\nbreak"])
async def test_a_token_that_cannot_be_sent_is_refused_without_printing_it(
    connect: Connect, token: str
) -> None:
    with pytest.raises(ValueError, match="printable ASCII") as caught:
        connect(token=token)
    assert token.strip() == "" or token not in str(caught.value)
