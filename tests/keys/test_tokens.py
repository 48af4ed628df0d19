"""Key handles and credit tickets: what comes back, and every way of not opening."""

import hashlib
import string
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Final
from uuid import UUID

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keyturn_server.keys.envelope import decode_base64url, encode_base64url
from keyturn_server.keys.tokens import (
    MAX_TOKEN_CHARACTERS,
    HandleClaims,
    InvalidToken,
    InvalidTokenCause,
    TicketClaims,
    TokenRoot,
    TokenSealer,
)

ROOT: Final = TokenRoot(b"\x00\x00\x00\x01", hashlib.sha256(b"token root 1").digest())
NEXT_ROOT: Final = TokenRoot(b"\x00\x00\x00\x02", hashlib.sha256(b"token root 2").digest())
SEALER: Final = TokenSealer([ROOT])

NOW: Final = datetime(2026, 3, 1, 12, 30, 15, 123457, tzinfo=UTC)
HANDLE: Final = HandleClaims(
    decision_id=UUID("01890a5d-ac96-774b-bcce-b302099a8057"),
    user_id="user-canary",
    provider="openai",
    model="gpt-4o-mini",
    service_type="copilot",
    mode="BYOK_FIRST",
    reason="BYOK_FIRST_OWN_KEY",
    key_id=UUID("01890a5d-ac96-774b-bcce-b302099a8058"),
    key_revision=3,
    issued_at=NOW,
    expires_at=NOW + timedelta(minutes=10),
)
TICKET: Final = TicketClaims(
    decision_id=HANDLE.decision_id,
    user_id="user-canary",
    provider="anthropic",
    model="",
    service_type="",
    hold_micros=50_000,
    issued_at=NOW,
    expires_at=NOW + timedelta(hours=24),
)

CHARACTERS: Final = string.ascii_letters + string.digits + "+/-_=. \n\0é\U0001f511"
FOUR_BYTES: Final = "\U0001f511"

# Made by this package's first version. Rolling deployments open each other's tokens, and a Record
# is taken for days after: a layout that no longer opens these needs another prefix.
HANDLE_VECTOR: Final = (
    "kth1_AAAAAeIPv7yIuHWB-6lhAtzH8q9YzmCLur-Go5hjB6o4y7wtUvxdgcNuXcr1jiHWqX7CHz19zk0MMiScKf6JD"
    "6WSNVEL3nezq2qY8-"
    "4MUdPOOn7D7wmpeMw31uxq2UjJqFIji5q1DCj1dwQL8cmwFpB0lPOlCuYAwg5BDNjJQfiiGCPk8GFyU3UdDR3cKRHh"
    "EA_U4uJ8kXmkoUs_qNDFIUvhUw"
)
TICKET_VECTOR: Final = (
    "ktt1_AAAAAfJxWNstmL2xpPjD7_SlYF0qYz0_bOZT7_AFtXeXo76fyW6ObBXT6Xf0NfcsgCZmhHNHoIjnLmRMpmOpp"
    "jPapluDEg4Ne88_YKnXSISJttB-5dox4TEAK8HwN_Ay9-sX0w"
)

Opening = Callable[[str], object]
OPENINGS: Final[list[tuple[str, Opening, str, Opening]]] = [
    ("kth1_", SEALER.open_handle, SEALER.seal_handle(HANDLE), SEALER.open_ticket),
    ("ktt1_", SEALER.open_ticket, SEALER.seal_ticket(TICKET), SEALER.open_handle),
]
each_kind = pytest.mark.parametrize(
    ("prefix", "opening", "token", "wrong"), OPENINGS, ids=["handle", "ticket"]
)


def refusal(opening: Callable[[str], object], text: str) -> InvalidTokenCause:
    with pytest.raises(InvalidToken) as refused:
        opening(text)
    assert refused.value.__context__ is None
    return refused.value.cause


micros = st.integers(-(2**63), 2**63 - 1)
times = st.datetimes(timezones=st.just(UTC))
ids = {"user_id": 128, "provider": 64, "model": 256, "service_type": 64}
texts = {name: st.text(max_size=size) for name, size in ids.items()}
handles = st.builds(
    HandleClaims,
    decision_id=st.uuids(),
    key_id=st.uuids(),
    key_revision=micros,
    issued_at=times,
    expires_at=times,
    **texts,
)
tickets = st.builds(
    TicketClaims,
    decision_id=st.uuids(),
    hold_micros=micros,
    issued_at=times,
    expires_at=times,
    **texts,
)


@settings(deadline=None)
@given(handles)
@example(HANDLE)
def test_a_handle_comes_back_as_it_was(claims: HandleClaims) -> None:
    token = SEALER.seal_handle(claims)
    assert token.startswith("kth1_")
    assert SEALER.open_handle(token) == claims


@settings(deadline=None)
@given(tickets)
@example(TICKET)
def test_a_ticket_comes_back_as_it_was(claims: TicketClaims) -> None:
    token = SEALER.seal_ticket(claims)
    assert token.startswith("ktt1_")
    assert SEALER.open_ticket(token) == claims


def test_tokens_of_the_first_version_still_open() -> None:
    assert SEALER.open_handle(HANDLE_VECTOR) == HANDLE
    assert SEALER.open_ticket(TICKET_VECTOR) == TICKET


def test_times_keep_their_microseconds_and_come_back_in_utc() -> None:
    east = timezone(timedelta(hours=5, minutes=30))
    opened = SEALER.open_handle(SEALER.seal_handle(replace(HANDLE, issued_at=NOW.astimezone(east))))
    assert opened.issued_at == NOW
    assert opened.issued_at.tzinfo is UTC
    assert opened.issued_at.microsecond == 123457


@pytest.mark.parametrize("moment", [datetime.min, datetime.max, datetime(1969, 12, 31)])  # noqa: DTZ001, DTZ901
def test_any_moment_of_the_calendar_is_kept(moment: datetime) -> None:
    claims = replace(TICKET, issued_at=moment.replace(tzinfo=UTC))
    assert SEALER.open_ticket(SEALER.seal_ticket(claims)) == claims


def test_a_naive_time_is_not_sealed() -> None:
    with pytest.raises(TypeError):
        SEALER.seal_ticket(replace(TICKET, issued_at=NOW.replace(tzinfo=None)))


def test_an_expired_token_opens_because_callers_check_expiry() -> None:
    claims = replace(HANDLE, expires_at=datetime(1999, 1, 1, tzinfo=UTC))
    assert SEALER.open_handle(SEALER.seal_handle(claims)) == claims


def test_the_largest_ids_fit() -> None:
    largest = {name: FOUR_BYTES * size for name, size in ids.items()}
    handle = HandleClaims(
        decision_id=HANDLE.decision_id,
        key_id=HANDLE.key_id,
        key_revision=2**63 - 1,
        issued_at=NOW,
        expires_at=NOW,
        mode="INTERNAL_ONLY",
        reason="CREDIT_FIRST_EXHAUSTED",
        **largest,
    )
    token = SEALER.seal_handle(handle)
    assert len(token) < 3000
    assert SEALER.open_handle(token) == handle


def test_a_token_that_would_be_refused_is_not_sealed() -> None:
    longest = replace(HANDLE, user_id="u" * (2900 - 30), provider="p" * 30, model="")
    longest = replace(longest, service_type="", mode="", reason="")
    assert len(SEALER.seal_handle(longest)) <= MAX_TOKEN_CHARACTERS
    assert SEALER.open_handle(SEALER.seal_handle(longest)) == longest
    with pytest.raises(ValueError, match="at most 2900 bytes together"):
        SEALER.seal_handle(replace(longest, model="m"))
    with pytest.raises(ValueError, match="at most 2900 bytes together"):
        SEALER.seal_ticket(replace(TICKET, user_id="u" * 70_000))


def test_texts_next_to_each_other_do_not_run_together() -> None:
    claims = replace(HANDLE, user_id="ab", provider="", model="c\0d", service_type="\0")
    assert SEALER.open_handle(SEALER.seal_handle(claims)) == claims


def test_the_same_claims_make_the_same_token_on_every_replica() -> None:
    assert SEALER.seal_handle(HANDLE) == TokenSealer([ROOT]).seal_handle(HANDLE)


def test_claims_that_differ_share_no_nonce() -> None:
    tokens = [
        SEALER.seal_handle(replace(HANDLE, key_revision=revision)).removeprefix("kth1_")
        for revision in range(1000)
    ]
    nonces = {decode_base64url(token)[4:16] for token in tokens}  # type: ignore[index]
    assert len(nonces) == 1000


def test_claims_do_not_show_in_the_token() -> None:
    raw = decode_base64url(SEALER.seal_handle(HANDLE)[5:])
    assert raw is not None
    for value in (b"user-canary", b"openai", HANDLE.key_id.bytes, HANDLE.decision_id.bytes):
        assert value not in raw


# Roots


def test_tokens_of_an_older_root_open_and_the_first_root_seals() -> None:
    rotated = TokenSealer([NEXT_ROOT, ROOT])
    assert rotated.open_handle(SEALER.seal_handle(HANDLE)) == HANDLE
    assert rotated.open_ticket(SEALER.seal_ticket(TICKET)) == TICKET
    assert refusal(SEALER.open_handle, rotated.seal_handle(HANDLE)) is InvalidTokenCause.FOREIGN
    # A replica that learned of the new root, and does not seal with it yet.
    prepared = TokenSealer([ROOT, NEXT_ROOT])
    assert prepared.open_ticket(rotated.seal_ticket(TICKET)) == TICKET


@each_kind
def test_a_token_of_another_system_is_foreign(
    prefix: str, opening: Opening, token: str, wrong: Opening
) -> None:
    other = TokenSealer([NEXT_ROOT])
    theirs = other.open_handle if prefix == "kth1_" else other.open_ticket
    assert refusal(theirs, token) is InvalidTokenCause.FOREIGN


def test_a_root_with_the_same_id_and_another_secret_opens_nothing() -> None:
    other = TokenSealer([TokenRoot(ROOT.id, NEXT_ROOT.secret)])
    assert refusal(other.open_handle, SEALER.seal_handle(HANDLE)) is InvalidTokenCause.TAMPERED


def test_a_sealer_needs_roots_with_ids_of_their_own() -> None:
    with pytest.raises(ValueError, match="needs a root"):
        TokenSealer([])
    with pytest.raises(ValueError, match="same id"):
        TokenSealer([ROOT, TokenRoot(ROOT.id, NEXT_ROOT.secret)])


@pytest.mark.parametrize(("id_bytes", "secret_bytes"), [(3, 32), (5, 32), (4, 31), (4, 64), (4, 0)])
def test_a_root_of_another_size_is_refused(id_bytes: int, secret_bytes: int) -> None:
    with pytest.raises(ValueError, match="a token root is"):
        TokenRoot(bytes(id_bytes), bytes(secret_bytes))


# Every way of not opening


@each_kind
def test_a_ticket_is_no_handle_and_a_handle_no_ticket(
    prefix: str, opening: Opening, token: str, wrong: Opening
) -> None:
    assert refusal(wrong, token) is InvalidTokenCause.WRONG_KIND


@each_kind
def test_a_prefix_put_before_the_other_kind_does_not_make_it_one(
    prefix: str, opening: Opening, token: str, wrong: Opening
) -> None:
    relabelled = {"kth1_": "ktt1_", "ktt1_": "kth1_"}[prefix] + token[5:]
    assert refusal(wrong, relabelled) is InvalidTokenCause.TAMPERED


@each_kind
@pytest.mark.parametrize("text", ["", "k", "{}", "{}AAAA", "KTH1_AAAA", "kth2_AAAA", "\ud800", "{}é"])
def test_what_is_no_token_is_malformed(
    prefix: str, opening: Opening, token: str, wrong: Opening, text: str
) -> None:
    assert refusal(opening, text.format(prefix)) is InvalidTokenCause.MALFORMED


@each_kind
def test_an_overlong_text_is_refused(prefix: str, opening: Opening, token: str, wrong: Opening) -> None:
    for text in (prefix + "A" * 4092, prefix + "A" * 10_000_000, "x" * 4097):
        assert refusal(opening, text) is InvalidTokenCause.MALFORMED
    # At the limit the text is looked into: its root is not known.
    assert refusal(opening, prefix + "_" * 4088) is InvalidTokenCause.FOREIGN


@each_kind
def test_every_change_of_one_character_is_refused(
    prefix: str, opening: Opening, token: str, wrong: Opening
) -> None:
    for index, character in enumerate(token):
        refusal(opening, token[:index] + token[index + 1 :])
        for other in CHARACTERS:
            refusal(opening, token[:index] + other + token[index:])
            if other != character:
                refusal(opening, token[:index] + other + token[index + 1 :])
    for other in CHARACTERS:
        refusal(opening, token + other)


@each_kind
def test_every_change_of_one_byte_is_refused_with_its_cause(
    prefix: str, opening: Opening, token: str, wrong: Opening
) -> None:
    raw = decode_base64url(token[5:])
    assert raw is not None
    for index in range(len(raw)):
        cause = InvalidTokenCause.FOREIGN if index < 4 else InvalidTokenCause.TAMPERED
        for change in (1, 0x80, 0xFF):
            changed = raw[:index] + bytes([raw[index] ^ change]) + raw[index + 1 :]
            assert refusal(opening, prefix + encode_base64url(changed)) is cause


@each_kind
def test_every_truncation_is_refused(prefix: str, opening: Opening, token: str, wrong: Opening) -> None:
    for end in range(len(token)):
        refusal(opening, token[:end])
        refusal(opening, token[end + 1 :])


@settings(deadline=None)
@given(st.text() | st.text(CHARACTERS) | st.text(CHARACTERS).map(lambda text: "kth1_" + text))
def test_any_text_at_all_is_refused_as_invalid(text: str) -> None:
    refusal(SEALER.open_handle, text)
    refusal(SEALER.open_ticket, text)


@settings(deadline=None)
@given(st.binary(max_size=120))
def test_any_bytes_under_a_known_root_are_refused_as_invalid(body: bytes) -> None:
    cause = refusal(SEALER.open_handle, "kth1_" + encode_base64url(ROOT.id + body))
    too_short = len(body) < 28
    assert cause is (InvalidTokenCause.MALFORMED if too_short else InvalidTokenCause.TAMPERED)


# Nothing shows


@each_kind
def test_a_refusal_says_plainly_what_is_wrong_and_shows_no_token(
    prefix: str, opening: Opening, token: str, wrong: Opening
) -> None:
    name, other = ("key handle", "credit ticket")[:: 1 if prefix == "kth1_" else -1]
    foreign = prefix + encode_base64url(b"none" + bytes(40))
    for tried, text, says in [
        (opening, token[:20], f"this is no {name}, or not a whole one"),
        (
            opening,
            token[:40] + ("B" if token[40] == "A" else "A") + token[41:],
            f"this {name} was changed after it was sealed",
        ),
        (opening, foreign, f"this {name} was sealed by another Keyturn"),
        (wrong, token, f"a {name} was given where a {other} is due"),
    ]:
        with pytest.raises(InvalidToken, match=says) as refused:
            tried(text)
        shown = f"{refused.value!r}" + "".join(traceback.format_exception(refused.value))
        for part in (token[5:25], token[-16:], foreign[5:25], "user-canary"):
            assert part not in shown


def test_no_secret_shows_in_a_repr() -> None:
    shown = f"{ROOT} {ROOT!r} {SEALER} {SEALER!r} {[ROOT]}"
    assert "TokenRoot(id=b'\\x00\\x00\\x00\\x01')" in shown
    for part in (repr(ROOT.secret)[2:14], ROOT.secret.hex()[:16]):
        assert part not in shown
    with pytest.raises(ValueError, match="a token root") as refused:
        TokenRoot(b"abc", ROOT.secret)
    shown = "".join(traceback.format_exception(refused.value))
    assert repr(ROOT.secret)[2:14] not in shown
