"""Requests that break the contract: each is refused with its code, reason and fields, and leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from keyturn.v1 import routing_service_pb2 as pb
from keyturn_server.keys.tokens import TokenRoot, TokenSealer
from tests.factories import Connection, Factory
from tests.refusals import Refusal, contents, refused
from tests.sealing import sealer_of
from tests.support import Fault, Sidecar

SUCCESS = pb.OUTCOME_SUCCESS
MOST_MICROS, MOST_TOKENS = 10**12, 10**9
CONTROLS = ("a\0b", "\x1b[31m", "line\nbreak", "tab\t", "\x7f", "\x85")

Case: TypeAlias = tuple[dict[str, Any], str, str]
"""Fields on top of a good request, the field that is named, and a part of the sentence about it."""


def too_long(field: str, most: int) -> list[Case]:
    """Over-long by one, in characters of one byte and of four; and every kind of control character."""
    limit = f"At most {most} characters; this has {most + 1}."
    return [
        ({field: "x" * (most + 1)}, field, limit),
        ({field: "\N{GRINNING FACE}" * (most + 1)}, field, limit),
        *(({field: text}, field, "Control characters") for text in CONTROLS),
    ]


def out_of_range(path: str, least: int, most: int, *, key: str | None = None) -> list[Case]:
    """Just outside, and as far outside as 64 bits go. `path` is a field, or one of a submessage."""
    outer, _, inner = path.partition(".")
    return [
        (
            {outer: {inner: value}} if inner else {outer: value},
            path,
            f"From {least} to {most}; this is {value}.",
        )
        for value in ({least - 1, most + 1, -(2**63), 2**63 - 1} if key is None else {least - 1, most + 1})
    ]


def bad_spans(field: str, least: str) -> list[Case]:
    """Spans outside of `least` to 24 hours, and Durations that are none."""
    spans = (
        Duration(seconds=25 * 3600),
        Duration(seconds=-1),
        Duration(nanos=-1),
        Duration(seconds=60, nanos=2 * 10**9),
        Duration(seconds=2**63 - 1),
        Duration(seconds=-(2**63), nanos=-(2**31)),
    )
    return [({field: span}, field, f"From {least} to 86400 seconds.") for span in spans]


DECIDE: list[Case] = [
    ({"user_id": ""}, "user_id", "Required."),
    *too_long("user_id", 128),
    ({"provider": ""}, "provider", "Required."),
    *too_long("provider", 64),
    ({"provider": "no-such-provider"}, "provider", "no such provider"),
    *too_long("request_id", 128),
    *too_long("model", 256),
    *too_long("service_type", 64),
    *out_of_range("cost_micros", 0, MOST_MICROS),
    *out_of_range("tokens.input_tokens", 0, MOST_TOKENS),
    *out_of_range("tokens.max_output_tokens", 0, MOST_TOKENS),
    ({"constraint": 99}, "constraint", "Unknown value 99."),
    ({"constraint": -1}, "constraint", "Unknown value -1."),
    ({"key_delivery": 99}, "key_delivery", "Unknown value 99."),
    ({"hold_ttl": Duration(nanos=500_000_000)}, "hold_ttl", "From 1 to 86400 seconds."),
    ({"hold_ttl": Duration()}, "hold_ttl", "From 1 to 86400 seconds."),
    *bad_spans("hold_ttl", "1"),
    ({"failed_key_handles": ["kth1_x"] * 17}, "failed_key_handles", "At most 16 handles; this has 17."),
]
RECORD: list[Case] = [
    ({"credit_ticket": None}, "settles", "Required: key_handle or credit_ticket."),
    ({"outcome": pb.OUTCOME_UNSPECIFIED}, "outcome", "Required"),
    *(
        case
        for count in ("input", "output", "cache_read", "cache_write", "total")
        for case in out_of_range(f"usage.{count}_tokens", 0, MOST_TOKENS)
    ),
    *out_of_range("cost_micros", 0, MOST_MICROS),
    *too_long("model", 256),
    *too_long("endpoint", 256),
    *bad_spans("response_time", "0"),
    *bad_spans("retry_after", "0"),
    *out_of_range("http_status", 100, 599, key="int32"),
]


async def test_a_decision_that_breaks_a_limit_is_refused_by_name_and_changes_nothing(
    sidecar: Sidecar, make: Factory, sql: Connection, subtests: pytest.Subtests
) -> None:
    user = await make.user(micros=1_000_000)
    await sidecar.decide(user, cost_micros=1)
    before = await contents(sql)
    good: dict[str, Any] = {"user_id": user, "provider": "openai"}
    requests = [pb.DecideRequest(**good | case[0]) for case in DECIDE]
    batch = (await sidecar.call("BatchDecide", pb.BatchDecideRequest(requests=requests))).results
    for request, item, (fields, field, sentence) in zip(requests, batch, DECIDE, strict=True):
        with subtests.test(repr(fields)):
            (await refused(sidecar, "Decide", request)).check_field(field, sentence)
            explain = pb.ExplainRequest(decide=request)
            (await refused(sidecar, "Explain", explain)).check_field(f"decide.{field}", sentence)
            Refusal.of(item.status).check_field(field, sentence)
    assert await contents(sql) == before


async def test_a_record_that_breaks_a_limit_is_refused_by_name_and_changes_nothing(
    sidecar: Sidecar, make: Factory, sql: Connection, subtests: pytest.Subtests
) -> None:
    ticket = (await sidecar.decide(await make.user(micros=1_000_000), cost_micros=1)).ticket.ticket
    before = await contents(sql)
    good: dict[str, Any] = {"credit_ticket": ticket, "outcome": SUCCESS}
    requests = [pb.RecordRequest(**good | case[0]) for case in RECORD]
    batch = (await sidecar.call("BatchRecord", pb.BatchRecordRequest(requests=requests))).results
    for request, item, (fields, field, sentence) in zip(requests, batch, RECORD, strict=True):
        with subtests.test(repr(fields)):
            (await refused(sidecar, "Record", request)).check_field(field, sentence)
            Refusal.of(item.status).check_field(field, sentence)
    assert await contents(sql) == before


async def test_all_that_is_wrong_is_said_at_once(sidecar: Sidecar) -> None:
    wrong: dict[str, Any] = {"provider": "a\0", "request_id": "r" * 200, "cost_micros": -1, "constraint": 7}
    refusal = await refused(sidecar, "Decide", pb.DecideRequest(**wrong))
    assert set(refusal.fields) == {"user_id", "provider", "request_id", "cost_micros", "constraint"}
    refusal = await refused(sidecar, "Record", pb.RecordRequest(http_status=1))
    assert set(refusal.fields) == {"settles", "outcome", "http_status"}


async def test_the_limits_themselves_are_taken(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user(micros=MOST_MICROS)
    for ttl in (Duration(seconds=1), Duration(seconds=86_400)):
        assert (await sidecar.decide(user, cost_micros=0, hold_ttl=ttl)).WhichOneof("route") == "ticket"
    ticket = await sidecar.decide(user, cost_micros=MOST_MICROS)
    assert ticket.ticket.hold_micros == MOST_MICROS
    most = dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), MOST_TOKENS)
    span = Duration(seconds=86_400)
    answer = await sidecar.record(
        ticket, SUCCESS, usage=pb.Usage(**most), cost_micros=MOST_MICROS, endpoint="e" * 256,
        model="m" * 256, response_time=span, retry_after=span, http_status=599,
    )  # fmt: skip
    assert answer.charged_micros == MOST_MICROS


async def test_an_outcome_of_a_newer_client_is_taken_as_unknown(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=1_000)
    for outcome in (99, -1, 2**31 - 1):
        await sidecar.record(await sidecar.decide(user, cost_micros=10), outcome, cost_micros=5)
    outcomes = await sql.fetch("SELECT DISTINCT outcome FROM credit_transactions WHERE outcome IS NOT NULL")
    assert [row["outcome"] for row in outcomes] == ["UNKNOWN"]


def changed_in_the_middle(token: str) -> str:
    place = len(token) // 2
    return token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1 :]


async def test_a_token_that_does_not_open_is_refused_with_the_cause(
    sidecar: Sidecar, make: Factory, sql: Connection, subtests: pytest.Subtests
) -> None:
    owner, payer = await make.user(), await make.user(micros=1_000)
    await make.key(owner)
    handle = (await sidecar.decide(owner)).key.handle
    ticket = (await sidecar.decide(payer, cost_micros=1)).ticket.ticket
    foreign, sealer = TokenSealer([TokenRoot(b"\0\0\0\1", b"x" * 32)]), await sealer_of(sql)
    before = await contents(sql)

    def broken(token: str, other_kind: str, from_elsewhere: str) -> dict[str, set[str]]:
        # What a letter more or less breaks, the base64, the length or the seal, depends on the letter.
        damaged = (token[:-1], token[:20], token + "A", changed_in_the_middle(token), token.upper())
        no_tokens = (f" {token}", token[:5], "x", "a\0b", "\u00e9", "x" * 50_000)
        return {
            other_kind: {"wrong_kind"},
            from_elsewhere: {"foreign"},
            **{bad: {"malformed", "tampered"} for bad in damaged},
            **{bad: {"malformed"} for bad in no_tokens},
        }

    handles = broken(handle, ticket, foreign.seal_handle(sealer.open_handle(handle)))
    tickets = broken(ticket, handle, foreign.seal_ticket(sealer.open_ticket(ticket)))
    empty = {"": {"malformed"}}
    cases = [
        *(("Redeem", pb.RedeemRequest(key_handle=bad), "key_handle", handles[bad]) for bad in handles),
        *(
            ("Record", pb.RecordRequest(key_handle=bad, outcome=SUCCESS), "key_handle", causes)
            for bad, causes in (handles | empty).items()
        ),
        *(
            ("Record", pb.RecordRequest(credit_ticket=bad, outcome=SUCCESS), "credit_ticket", causes)
            for bad, causes in (tickets | empty).items()
        ),
        *(
            ("Decide", _failed(owner, handle, bad), "failed_key_handles", causes)
            for bad, causes in (handles | empty).items()
        ),
    ]
    for method, request, field, causes in cases:
        with subtests.test(f"{method} {field} {causes}"):
            refusal = await refused(sidecar, method, request)
            refusal.check(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_TOKEN", "BadRequest")
            assert refusal.info.metadata["cause"] in causes
            assert list(refusal.fields) == [field]
            assert len(refusal.message) < 200, "a token is not repeated to the caller"
    assert await contents(sql) == before
    (await refused(sidecar, "Redeem", pb.RedeemRequest())).check_field("key_handle", "Required.")


def _failed(user: str, *handles: str) -> pb.DecideRequest:
    return pb.DecideRequest(user_id=user, provider="openai", failed_key_handles=handles)


async def test_a_failed_handle_of_another_user_is_refused(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    mine, theirs = await make.user(micros=1_000), await make.user()
    await make.key(mine)
    await make.key(theirs)
    own, other = [(await sidecar.decide(user)).key.handle for user in (mine, theirs)]
    before = await contents(sql)
    refusal = await refused(sidecar, "Decide", _failed(mine, own, other))
    refusal.check_field("failed_key_handles[1]", "another user's")
    assert await contents(sql) == before


async def test_tokens_are_taken_for_seven_days_after_they_expire_and_no_longer(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    owner, payer = await make.user(), await make.user(micros=1_000)
    await make.key(owner)
    sealer, now = await sealer_of(sql), datetime.now(UTC)
    handle = sealer.open_handle((await sidecar.decide(owner)).key.handle)
    ticket = sealer.open_ticket((await sidecar.decide(payer, cost_micros=10)).ticket.ticket)

    def aged(age: timedelta) -> list[str]:
        return [
            sealer.seal_handle(replace(handle, expires_at=now - age)),
            sealer.seal_ticket(replace(ticket, expires_at=now - age)),
        ]

    before = await contents(sql)
    for token in aged(timedelta(days=7, seconds=1)):
        with pytest.raises(Fault) as caught:
            await sidecar.record(token, SUCCESS, cost_micros=1)
        refusal = Refusal.of(caught.value)
        refusal.check(grpc.StatusCode.FAILED_PRECONDITION, "RECORD_TOO_LATE")
        assert "7 days" in refusal.message
    expired = aged(timedelta(seconds=1))[0]
    refusal = await refused(sidecar, "Redeem", pb.RedeemRequest(key_handle=expired))
    refusal.check(grpc.StatusCode.FAILED_PRECONDITION, "HANDLE_EXPIRED")
    assert await contents(sql) == before
    for token in aged(timedelta(days=6, hours=23)):
        assert not (await sidecar.record(token, SUCCESS, cost_micros=1)).replayed
    for token in aged(timedelta(days=8)):
        assert (await sidecar.record(token, SUCCESS, cost_micros=1)).replayed, (
            "what was taken is answered again"
        )


async def test_who_or_what_is_not_there_is_named(sidecar: Sidecar, make: Factory, sql: Connection) -> None:
    nobody = pb.DecideRequest(user_id="nobody-\N{GRINNING FACE}", provider="openai")
    for method, request in (("Decide", nobody), ("Explain", pb.ExplainRequest(decide=nobody))):
        refusal = await refused(sidecar, method, request)
        refusal.check(grpc.StatusCode.NOT_FOUND, "USER_NOT_FOUND", "ResourceInfo")
        assert (refusal.resource.resource_type, refusal.resource.resource_name) == ("user", nobody.user_id)
    user = await make.user(micros=10)
    sealer = await sealer_of(sql)
    genuine = sealer.open_ticket((await sidecar.decide(user, cost_micros=1)).ticket.ticket)
    unknown = sealer.seal_ticket(replace(genuine, user_id="somebody-else"))
    refusal = await refused(sidecar, "Record", pb.RecordRequest(credit_ticket=unknown, outcome=SUCCESS))
    refusal.check(grpc.StatusCode.NOT_FOUND, "HOLD_NOT_FOUND", "ResourceInfo")


async def raw(sidecar: Sidecar, method: str, body: bytes) -> grpc.aio.AioRpcError:
    """The error that a body as it is comes to."""
    call: Any = sidecar.channel.unary_unary(f"/keyturn.v1.RoutingService/{method}")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(body, timeout=30)
    return caught.value


NOT_PROTOBUF = {
    "noise": b"\xff\xfe\xfd no protobuf",
    "json": b'{"user_id": "u"}',
    "cut short": pb.DecideRequest(user_id="somebody", provider="openai").SerializeToString()[:5],
    "invalid UTF-8 in user_id": b"\x12\x02\xff\xfe\x1a\x06openai",
    "a lone surrogate in user_id": b"\x12\x03\xed\xa0\x80\x1a\x06openai",
}


async def test_a_body_that_is_no_protobuf_is_refused(sidecar: Sidecar, subtests: pytest.Subtests) -> None:
    for name, body in NOT_PROTOBUF.items():
        with subtests.test(name):
            refusal = Refusal.of(await raw(sidecar, "Decide", body))
            refusal.check(grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")
    assert (await raw(sidecar, "Obliterate", b"")).code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_request_over_its_size_is_refused_with_the_limit(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=10**9)
    before = await contents(sql)
    padding = b"\x7a\xff\xff\x03" + b"p" * 0xFFFF  # a field of 64 KiB that this release does not know
    good = pb.DecideRequest(user_id=user, provider="openai", cost_micros=1).SerializeToString()
    for method, limit in (("Decide", 64 * 1024), ("BatchDecide", 1024 * 1024)):
        refusal = Refusal.of(await raw(sidecar, method, good + padding * (limit // 65536)))
        refusal.check(grpc.StatusCode.RESOURCE_EXHAUSTED, "REQUEST_TOO_LARGE")
        assert f"the limit is {limit}" in refusal.message
    # So large that gRPC itself does not read it.
    assert (await raw(sidecar, "BatchDecide", b"x" * 2**22)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await contents(sql) == before
