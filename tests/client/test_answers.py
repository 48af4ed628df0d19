"""What is asked and answered: every field, both clients, over a real socket."""

from __future__ import annotations

import asyncio
import threading
from concurrent import futures
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

import keyturn
from keyturn import (
    AsyncClient,
    Client,
    Constraint,
    CostSource,
    DecideRequest,
    Decision,
    DenialReason,
    Durability,
    KeyState,
    KeyturnError,
    Mode,
    NotFound,
    Outcome,
    Reason,
    Recorded,
    RecordRequest,
    SealedHandle,
    SealedTicket,
    Secret,
    Usage,
    _wire,
    model,
)
from keyturn.v1 import policy_pb2, status_pb2
from keyturn.v1 import routing_service_pb2 as pb
from tests.client import scripted
from tests.client.conftest import PATIENCE, QUICK, Connect, Either
from tests.client.scripted import HANDLE, OTHER_HANDLE, SECRET, TICKET, Sidecar

ASK: dict[str, Any] = {"user_id": "u1", "provider": "openai"}


async def test_an_own_key_arrives_with_its_secret_and_how_to_sign(either: Either, sidecar: Sidecar) -> None:
    sidecar.answers("Decide", scripted.own_key())
    decision = await either("decide", **ASK)
    assert decision.allowed
    assert decision.mode is Mode.BYOK_FIRST
    assert decision.reason is Reason.BYOK_FIRST_OWN_KEY
    assert decision.message == "The user's own key pays."
    assert decision.ticket is None
    assert decision.denial is None
    key = decision.key
    assert (key.handle, key.key_id, key.provider, key.hint) == (HANDLE, "key-1", "openai", "6789")
    assert key.secret == Secret(SECRET)
    assert key.headers() == {"Authorization": f"Bearer {SECRET}"}
    assert key.base_url == "https://api.openai.com/v1"
    assert key.expires_at == datetime.fromtimestamp(1_900_000_000, UTC)


async def test_a_ticket_arrives_with_its_hold(either: Either, sidecar: Sidecar) -> None:
    sidecar.answers("Decide", scripted.credits_pay())
    decision = await either("decide", **ASK)
    assert decision.allowed
    assert decision.key is None
    ticket = decision.ticket
    assert (ticket.ticket, ticket.hold_micros, ticket.available_micros) == (TICKET, 20_000, 480_000)
    assert ticket.expires_at == datetime.fromtimestamp(1_900_000_000, UTC)


async def test_a_denial_is_an_answer_and_not_an_error(either: Either, sidecar: Sidecar) -> None:
    sidecar.answers("Decide", scripted.denied())
    decision = await either("decide", **ASK)
    assert not decision.allowed
    assert decision.reason is Reason.DENIED
    assert decision.denial.reason is DenialReason.BYOK_REQUIRED
    assert decision.denial.retryable
    assert decision.denial.retry_after == timedelta(seconds=30)
    assert decision.denial.suggestion == "Add a key."


async def test_every_field_of_a_decision_request_reaches_the_sidecar(
    either: Either, sidecar: Sidecar
) -> None:
    await either(
        "decide",
        user_id="u1",
        provider="openai",
        model="gpt-4o",
        service_type="copilot",
        request_id="r1",
        input_tokens=0,
        max_output_tokens=500,
        constraint=Constraint.CREDITS_ONLY,
        failed_keys=[OTHER_HANDLE],
        redeem=True,
        hold_ttl=timedelta(minutes=2),
    )
    await either("decide", **ASK, cost_micros=0)
    await either("decide", **ASK, request_id=None)
    full, priced, bare = sidecar.calls("Decide")
    assert full == pb.DecideRequest(
        user_id="u1",
        provider="openai",
        model="gpt-4o",
        service_type="copilot",
        request_id="r1",
        tokens=pb.TokenEstimate(max_output_tokens=500),
        constraint=policy_pb2.CONSTRAINT_CREDITS_ONLY,
        failed_key_handles=[OTHER_HANDLE],
        key_delivery=pb.KEY_DELIVERY_REDEEM,
        hold_ttl=Duration(seconds=120),
    )
    assert priced.WhichOneof("estimate") == "cost_micros"
    assert bare.WhichOneof("estimate") is None
    assert bare.key_delivery == pb.KEY_DELIVERY_INLINE
    assert not bare.HasField("hold_ttl")
    assert len(bare.request_id) == 32
    assert bare.request_id != priced.request_id


async def test_every_field_of_a_record_reaches_the_sidecar(either: Either, sidecar: Sidecar) -> None:
    sidecar.answers("Decide", scripted.credits_pay())
    decision = await either("decide", **ASK)
    recorded = await either(
        "record",
        decision,
        Outcome.SUCCESS,
        usage=Usage(
            input_tokens=1,
            output_tokens=2,
            cache_read_tokens=3,
            cache_write_tokens=4,
            total_tokens=0,
        ),
        cost_micros=0,
        model="gpt-4o-mini",
        endpoint="/v1/chat/completions",
        response_time=timedelta(milliseconds=1500),
        http_status=200,
        error_message="x" * 100_000,
        retry_after=timedelta(seconds=3),
    )
    (sent,) = sidecar.calls("Record")
    assert sent == pb.RecordRequest(
        credit_ticket=TICKET,
        outcome=pb.OUTCOME_SUCCESS,
        usage=pb.Usage(
            input_tokens=1,
            output_tokens=2,
            cache_read_tokens=3,
            cache_write_tokens=4,
            total_tokens=0,
        ),
        cost_micros=0,
        model="gpt-4o-mini",
        endpoint="/v1/chat/completions",
        response_time=Duration(seconds=1, nanos=500_000_000),
        http_status=200,
        error_message="x" * 500,
        retry_after=Duration(seconds=3),
    )
    assert recorded == Recorded(
        record_id="decision-2",
        charged_micros=1_500,
        released_micros=18_500,
        balance_micros=498_500,
        cost_source=CostSource.PRICED,
        replayed=False,
        durability=Durability.DATABASE,
        key_state=KeyState.UNSPECIFIED,
    )


async def test_usage_that_is_not_known_is_absent_and_not_zero(either: Either, sidecar: Sidecar) -> None:
    sidecar.answers("Record", pb.RecordResponse(key_state=policy_pb2.KEY_STATE_INVALID))
    recorded = await either("record", SealedHandle(HANDLE), Outcome.AUTH_REJECTED)
    (sent,) = sidecar.calls("Record")
    assert sent == pb.RecordRequest(key_handle=HANDLE, outcome=pb.OUTCOME_AUTH_REJECTED)
    assert recorded.balance_micros is None
    assert recorded.key_state is KeyState.INVALID


def test_a_record_settles_a_decision_its_key_its_ticket_or_a_stored_text() -> None:
    own, credit = _wire.decision(scripted.own_key()), _wire.decision(scripted.credits_pay())
    assert own.key is not None
    assert credit.ticket is not None
    for settles in (own, own.key, SealedHandle(HANDLE)):
        assert _wire.record_request(RecordRequest(settles, Outcome.SUCCESS)).key_handle == HANDLE
    for paid in (credit, credit.ticket, SealedTicket(TICKET)):
        assert _wire.record_request(RecordRequest(paid, Outcome.SUCCESS)).credit_ticket == TICKET


def test_a_record_of_nothing_is_refused_here() -> None:
    with pytest.raises(ValueError, match="nothing to record"):
        RecordRequest(_wire.decision(scripted.denied()), Outcome.SUCCESS)
    with pytest.raises(TypeError, match="SealedTicket made from a stored string"):
        RecordRequest(TICKET, Outcome.SUCCESS)  # type: ignore[arg-type]


def test_an_estimate_is_a_cost_or_tokens() -> None:
    with pytest.raises(ValueError, match="not with both"):
        DecideRequest(**ASK, cost_micros=1, max_output_tokens=1)


def test_failed_keys_are_a_sequence_and_not_one_string() -> None:
    with pytest.raises(TypeError, match="sequence"):
        DecideRequest(**ASK, failed_keys=HANDLE)


async def test_a_handle_without_its_secret_is_redeemed(either: Either, sidecar: Sidecar) -> None:
    sidecar.answers("Decide", scripted.own_key(secret=""))
    decision = await either("decide", **ASK, redeem=True)
    assert decision.key.secret is None
    with pytest.raises(ValueError, match="redeem"):
        decision.key.headers()
    assert await either("redeem", decision.key) == Secret(SECRET)
    assert await either("redeem", str(decision.key.handle)) == Secret(SECRET)
    assert [each.key_handle for each in sidecar.calls("Redeem")] == [HANDLE, HANDLE]


async def test_an_explanation_has_the_decision_and_its_steps(either: Either, sidecar: Sidecar) -> None:
    answer = pb.ExplainResponse(
        decision=pb.DecideResponse(key=pb.KeyHandle(provider="openai", hint="6789")),
        steps=[pb.ExplainStep(check="tier", result="eligible", detail="premium")],
    )
    sidecar.answers("Explain", answer)
    explanation = await either("explain", **ASK, model="gpt-4o")
    assert explanation.decision.allowed
    assert explanation.decision.key.secret is None
    assert explanation.decision.key.expires_at is None
    assert [(s.check, s.result, s.detail) for s in explanation.steps] == [("tier", "eligible", "premium")]
    (sent,) = sidecar.calls("Explain")
    assert (sent.decide.user_id, sent.decide.model) == ("u1", "gpt-4o")


async def test_a_batch_gives_an_answer_or_an_error_for_each_item(either: Either, sidecar: Sidecar) -> None:
    status = status_pb2.Status(
        code=grpc.StatusCode.NOT_FOUND.value[0],
        message="No such user.",
        details=scripted.packed(scripted.error_info("USER_NOT_FOUND")),
    )
    sidecar.answers(
        "BatchDecide",
        pb.BatchDecideResponse(
            results=[
                pb.BatchDecideResult(response=scripted.own_key()),
                pb.BatchDecideResult(status=status),
            ]
        ),
    )
    sidecar.answers(
        "BatchRecord",
        pb.BatchRecordResponse(
            results=[
                pb.BatchRecordResult(status=status),
                pb.BatchRecordResult(response=scripted.recorded()),
            ]
        ),
    )
    asked = [DecideRequest(user_id=each, provider="openai") for each in ("u1", "u2")]
    decision, missing = await either("decide_many", asked)
    assert isinstance(decision, Decision)
    assert isinstance(missing, NotFound)
    assert missing.reason == "USER_NOT_FOUND"
    refused, recorded = await either(
        "record_many",
        [RecordRequest(SealedTicket(each), Outcome.SUCCESS) for each in (TICKET, TICKET[::-1])],
    )
    assert isinstance(refused, NotFound)
    assert isinstance(recorded, Recorded)
    (batch,) = sidecar.calls("BatchDecide")
    assert [each.user_id for each in batch.requests] == ["u1", "u2"]
    (batch,) = sidecar.calls("BatchRecord")
    assert [each.credit_ticket for each in batch.requests] == [TICKET, TICKET[::-1]]


async def test_an_empty_batch_asks_nobody(either: Either, sidecar: Sidecar) -> None:
    assert await either("decide_many", []) == []
    assert await either("record_many", iter(())) == []
    assert sidecar.received == []


async def test_numbers_that_only_a_newer_server_knows_do_not_break_an_answer(
    either: Either, sidecar: Sidecar
) -> None:
    newer = pb.DecideResponse(denial=pb.Denial())
    newer.MergeFromString(b"\x10\x63\x18\x62")  # mode = 99, reason = 98
    newer.denial.MergeFromString(b"\x08\x61")  # reason = 97
    sidecar.answers("Decide", newer)
    decision = await either("decide", **ASK)
    assert decision.mode == Mode("UNRECOGNIZED_99")
    assert f"{decision.reason}" == "UNRECOGNIZED_98"
    assert decision.denial.reason not in set(DenialReason)
    assert repr(decision.denial.reason) == "<DenialReason.UNRECOGNIZED_97: 'UNRECOGNIZED_97'>"


async def test_a_route_that_only_a_newer_server_knows_is_not_allowed(
    either: Either, sidecar: Sidecar
) -> None:
    newer = pb.DecideResponse(message="Someone else pays.")
    newer.MergeFromString(b"\xa2\x06\x00")  # an empty message in field 100
    sidecar.answers("Decide", newer)
    assert not (await either("decide", **ASK)).allowed
    with pytest.raises(keyturn.Denied, match=r"Someone else pays\."):
        await either.request(lambda call: None, **ASK)


def test_a_word_of_a_newer_contract_is_sent_by_its_number() -> None:
    sent = _wire.record_request(RecordRequest(SealedTicket(TICKET), Outcome("UNRECOGNIZED_99")))
    assert sent.outcome == 99


@pytest.mark.parametrize(
    ("kind", "wire", "prefix"),
    [
        (model.Mode, policy_pb2.Mode, "MODE_"),
        (model.Reason, policy_pb2.Reason, "REASON_"),
        (model.DenialReason, policy_pb2.DenialReason, "DENIAL_REASON_"),
        (model.Constraint, policy_pb2.Constraint, "CONSTRAINT_"),
        (model.KeyState, policy_pb2.KeyState, "KEY_STATE_"),
        (model.Outcome, pb.Outcome, "OUTCOME_"),
        (model.CostSource, pb.CostSource, "COST_SOURCE_"),
        (model.Durability, pb.Durability, "DURABILITY_"),
    ],
)
def test_the_words_are_those_of_the_contract(kind: Any, wire: Any, prefix: str) -> None:
    assert [prefix + word for word in kind] == wire.keys()
    assert [prefix + word.name for word in kind] == wire.keys()


def test_the_keyword_arguments_are_the_fields_of_the_requests() -> None:
    decide = set(DecideRequest.__dataclass_fields__)
    assert set(model.DecideFields.__annotations__) == decide
    assert set(model.RequestFields.__annotations__) == decide - {"redeem"}
    record = {name for name in RecordRequest.__dataclass_fields__ if name != "_"}
    assert set(model.RecordFields.__annotations__) == record - {"settles", "outcome"}


def test_everything_exported_exists_and_both_clients_have_the_same_methods() -> None:
    assert all(hasattr(keyturn, name) for name in keyturn.__all__)
    for one, other in ((Client, AsyncClient), (keyturn.Call, keyturn.AsyncCall)):
        mine = {name for name in dir(one) if not name.startswith("_")}
        assert mine == {name for name in dir(other) if not name.startswith("_")}


async def test_every_call_has_a_deadline_of_two_seconds_unless_told_otherwise(
    connect: Connect, sidecar: Sidecar
) -> None:
    either = connect()
    await either("decide", **ASK)
    await either("decide", **ASK, timeout=PATIENCE)
    default, told = sidecar.received
    assert 0 < default.seconds_left < 3  # grpc rounds up
    assert 3 < told.seconds_left < 70


async def test_a_timeout_of_nothing_is_refused_here(connect: Connect) -> None:
    with pytest.raises(ValueError, match="more than zero"):
        connect(timeout=timedelta())
    with pytest.raises(ValueError, match="more than zero"):
        await connect()("decide", **ASK, timeout=timedelta(seconds=-1))


async def test_the_sidecar_sees_who_calls(connect: Connect, sidecar: Sidecar) -> None:
    await connect(token=Secret("t0ken\n"))("decide", **ASK)
    await connect()("decide", **ASK)
    with_token, without = sidecar.received
    assert with_token.metadata["authorization"] == "Bearer t0ken"
    assert "authorization" not in without.metadata
    assert str(without.metadata["user-agent"]).startswith(f"keyturn-python/{keyturn.__version__} ")


async def test_a_closed_client_says_so(either: Either) -> None:
    await either("decide", **ASK)
    await either.close()
    with pytest.raises(RuntimeError, match="the client is closed"):
        await either("decide", **ASK)
    await either.close()


async def test_a_call_cut_off_by_closing_is_not_taken_for_a_cancellation(
    sidecar: Sidecar,
) -> None:
    arrived = threading.Event()

    def hang(request: Any) -> Any:
        arrived.set()
        return sidecar.hang(request)

    sidecar.answers("Record", hang)
    client = AsyncClient(sidecar.target, timeout=timedelta(milliseconds=50), retries=QUICK)
    recording = asyncio.ensure_future(client.record(SealedTicket(TICKET), Outcome.SUCCESS, timeout=PATIENCE))
    await asyncio.to_thread(arrived.wait, 60)
    await client.close()
    with pytest.raises(RuntimeError, match="the client is closed"):
        await recording


def test_an_async_client_belongs_to_one_loop(sidecar: Sidecar) -> None:
    client = AsyncClient(sidecar.target, timeout=PATIENCE)  # made outside any loop

    async def first_loop() -> None:
        await client.decide(**ASK)

    async def other_loop() -> None:
        with pytest.raises(RuntimeError, match="one event loop"):
            await client.decide(**ASK)

    async def close() -> None:
        await client.close()

    with asyncio.Runner() as mine, asyncio.Runner() as other:
        mine.run(first_loop())
        other.run(other_loop())
        mine.run(close())


def test_one_client_serves_many_threads(client: Client, sidecar: Sidecar) -> None:
    def ask(number: int) -> bool:
        return client.decide(user_id=f"u{number}", provider="openai").allowed

    with futures.ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, range(64)))
    assert {each.user_id for each in sidecar.calls("Decide")} == {f"u{n}" for n in range(64)}


async def test_an_argument_that_cannot_be_sent_is_refused_here(either: Either, sidecar: Sidecar) -> None:
    with pytest.raises(TypeError):
        await either("decide", user_id=7, provider="openai")
    with pytest.raises(ValueError, match="range"):
        await either("decide", **ASK, cost_micros=2**63)
    with pytest.raises(TypeError):
        await either("decide", **ASK, nonsense=1)
    assert sidecar.received == []


def test_the_base_of_the_errors_is_exported() -> None:
    assert issubclass(keyturn.DeadlineExceeded, keyturn.Unavailable)
    assert issubclass(keyturn.Unavailable, KeyturnError)
    assert not issubclass(keyturn.Denied, KeyturnError)
