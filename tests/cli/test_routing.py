"""`keyturn decide`, `record` and `explain`, against a running sidecar."""

from __future__ import annotations

import asyncio
import re

import pytest

from keyturn.v1 import routing_service_pb2 as pb
from tests.cli.command import answered, ask, check_fault, keyturn_on_terminal, told
from tests.factories import Connection, Factory
from tests.support import Sidecar

SECRET = "sk-canary-5f1d9c0e7a3b48c2"


async def test_a_decision_for_credits_shows_who_pays_and_the_ticket_on_a_line_of_its_own(
    sidecar: Sidecar, make: Factory
) -> None:
    user = await make.user(micros=2_500_000)
    said = await told(sidecar, "decide", user, "--provider", "openai", "--cost", "0.25")
    assert "Who pays  credits: $0.25 held, $2.25 still available" in said
    assert "Mode      BYOK_FIRST" in said
    assert "Reason    BYOK_FIRST_NO_KEY" in said
    assert re.search(r"^Expires   \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC$", said, re.MULTILINE)
    assert re.fullmatch(r"ktt1_[\w-]+", said.splitlines()[-1])


async def test_a_decision_for_an_own_key_shows_the_handle_and_never_the_secret(
    sidecar: Sidecar, make: Factory
) -> None:
    user = await make.user()
    key_id = await make.key(user, secret=SECRET)
    said = await told(sidecar, "decide", user, "--provider", "openai")
    answer = await answered(sidecar, "decide", user, "--provider", "openai")
    assert f"the user's own key {key_id} (ends in {SECRET[-4:]})" in said
    assert re.fullmatch(r"kth1_[\w-]+", said.splitlines()[-1])
    assert answer["key"]["keyId"] == str(key_id)
    assert answer["key"]["secret"] == ""
    assert SECRET not in said + str(answer)


async def test_a_denial_is_the_answer_and_ends_with_3(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user()
    finished = await ask(sidecar, "decide", user, "--provider", "openai")
    assert (finished.code, finished.err) == (3, "")
    assert "Who pays    nobody: DENIED" in finished.out
    assert "Reason      NO_KEY_AND_NO_CREDITS" in finished.out
    assert re.search(r"^Suggestion  \w.+\.$", finished.out, re.MULTILINE)
    answer = await answered(sidecar, "decide", user, "--provider", "openai", code=3)
    assert answer["denial"]["reason"] == "DENIAL_REASON_NO_KEY_AND_NO_CREDITS"


async def test_every_option_of_decide_reaches_the_sidecar(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user(micros=1_000_000)
    await make.key(user)
    options = (
        *("--provider", "openai", "--model", "gpt-4o-mini", "--service-type", "copilot"),
        *("--request-id", "r1", "--constraint", "credits-only", "--hold-ttl", "5s"),
        *("--input-tokens", "1000", "--max-output-tokens", "100"),
    )
    first = await answered(sidecar, "decide", user, *options)
    again = await answered(sidecar, "decide", user, *options)
    assert first["reason"] == "REASON_CALLER_CONSTRAINT"
    assert first["ticket"]["ticket"] == again["ticket"]["ticket"]
    assert (first["replayed"], again["replayed"]) == (False, True)
    # 1,000 input tokens at $0.15 a million, 100 output tokens at $0.60: $0.00021.
    assert first["ticket"]["holdMicros"] == "210"


async def test_a_ticket_is_recorded_from_an_argument_and_again_from_stdin(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=1_000_000)
    decision = await sidecar.decide(user, cost_micros=500_000)
    options = ("--outcome", "success", "--cost", "0.123456")
    said = await told(sidecar, "record", decision.ticket.ticket, *options)
    assert f"Record      {decision.decision_id}" in said
    for line in ("Charged     $0.123456", "Released    $0.376544", "Balance     $0.876544"):
        assert line in said
    assert "Cost is     reported" in said
    assert "Replayed    no" in said
    stdin = f"{decision.ticket.ticket}\n".encode()
    again = await answered(sidecar, "record", "-", *options, stdin=stdin)
    assert again["replayed"] is True
    assert again["chargedMicros"] == "123456"
    assert (
        await sql.fetchval("SELECT balance_micros FROM credit_accounts WHERE user_id = $1", user) == 876_544
    )


async def test_a_handle_is_recorded_with_all_that_is_known_of_the_request(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user()
    await make.key(user)
    decision = await sidecar.decide(user, model="gpt-4o-mini")
    answer = await answered(
        sidecar,
        *("record", decision.key.handle, "--outcome", "RATE_LIMITED", "--model", "gpt-4o"),
        *("--input-tokens", "7", "--output-tokens", "5", "--cache-read-tokens", "3"),
        *("--cache-write-tokens", "2", "--total-tokens", "13", "--endpoint", "/v1/chat/completions"),
        *("--response-time", "1.5s", "--http-status", "429", "--error-message", "slow down"),
        *("--retry-after", "2m"),
    )
    assert answer["keyState"] == "KEY_STATE_COOLING_DOWN"
    row = await sql.fetchrow("SELECT * FROM api_key_usage WHERE user_id = $1", user)
    assert row is not None
    assert row["total_tokens"] == 13
    assert (row["model"], row["endpoint"]) == ("gpt-4o", "/v1/chat/completions")
    cooldown = "SELECT extract(epoch FROM cooldown_until - now()) FROM user_api_keys WHERE user_id = $1"
    assert 60 < await sql.fetchval(cooldown, user) <= 120


async def test_a_record_with_other_contents_is_refused(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user(micros=1_000_000)
    decision = await sidecar.decide(user, cost_micros=500_000)
    await sidecar.record(decision, pb.OUTCOME_SUCCESS, cost_micros=1)
    finished = await ask(sidecar, "record", decision.ticket.ticket, "--outcome", "success", "--cost", "0.5")
    check_fault(finished, 3, "[RECORD_CONFLICT]")
    assert decision.ticket.ticket not in finished.err


async def test_what_is_no_handle_and_no_ticket_is_wrong_usage_and_not_quoted(sidecar: Sidecar) -> None:
    ends = await asyncio.gather(
        ask(sidecar, "record", SECRET, "--outcome", "success"),
        ask(sidecar, "record", "-", "--outcome", "success", stdin=SECRET.encode()),
        ask(sidecar, "record", "-", "--outcome", "success", stdin=b"\xff\xfe"),
        ask(sidecar, "record", f"ktt1_{'A' * 80}", "--outcome", "success"),
    )
    for finished, sentence in zip(ends, ("TOKEN is", "TOKEN is", "TOKEN is", "[INVALID_TOKEN]"), strict=True):
        check_fault(finished, 2, sentence)
        assert SECRET not in finished.err
        assert "AAAA" not in finished.err


async def test_an_explanation_can_be_pasted_into_a_ticket(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user(name="ada@example.com", micros=1_000_000)
    key_id = await make.key(user, secret=SECRET, is_valid=False, label="[red]main[/red]")
    said = await told(
        sidecar, "explain", user, "--provider", "openai", "--model", "gpt-4o", "--service-type", "copilot"
    )
    head, asked, steps = said.split("\n\n")
    assert head == "BYOK_FIRST: credits: $0.05 would be held, $0.95 still available"
    for line in (
        "User          ada@example.com",
        "Provider      openai",
        "Model         gpt-4o",
        "Service type  copilot",
        "Mode          BYOK_FIRST",
        "Reason        BYOK_FIRST_KEY_FAILED",
    ):
        assert line in asked.splitlines()
    assert re.search(r"^Asked at      \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC$", asked, re.MULTILINE)
    numbered = re.findall(r"^ ?(\d+)  (\S.*?)  +(\S.*?)  +(\S.*)$", steps, re.MULTILINE)
    assert [number for number, *_ in numbered] == [str(n + 1) for n in range(len(numbered))]
    checks = {check: (result, detail) for _, check, result, detail in numbered}
    assert checks["flag byok_enabled"][0] == "true"
    assert checks["mode"][0] == "BYOK_FIRST"
    assert checks[f"key {key_id}"][0] == "invalid"
    assert "[red]main[/red]" in checks[f"key {key_id}"][1]
    assert checks["route"][0] == "CREDITS"
    assert "\x1b" not in said
    assert not re.search(r"kt[ht]1_", said)
    assert SECRET not in said


async def test_an_explained_denial_is_an_answer_and_ends_with_0(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user("free")
    said = await told(
        sidecar, "explain", user, "--provider", "openai", "--constraint", "own-key-only", "--cost", "1.5"
    )
    assert said.startswith("BYOK_FIRST: nobody: DENIED\n")
    for line in ("Constraint  OWN_KEY_ONLY", "Cost        $1.50", "Reason      TIER_NOT_ELIGIBLE"):
        assert line in said
    answer = await answered(sidecar, "explain", user, "--provider", "openai")
    assert answer["decision"]["denial"]["reason"] == "DENIAL_REASON_INSUFFICIENT_CREDITS"
    assert answer["steps"][0] == {"check": "flag byok_enabled", **_rest(answer["steps"][0])}


def _rest(step: dict[str, str]) -> dict[str, str]:
    return {"result": step["result"], "detail": step["detail"]}


async def test_a_user_that_is_not_there_ends_with_4(sidecar: Sidecar) -> None:
    ends = await asyncio.gather(
        *(ask(sidecar, command, "nobody", "--provider", "openai") for command in ("decide", "explain"))
    )
    for finished in ends:
        check_fault(finished, 4, "[USER_NOT_FOUND]")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--provider", "nonesuch"), "[INVALID_FIELD]"),
        (("--provider", "openai", "--cost", "0.1", "--input-tokens", "1"), "either --cost or tokens"),
        (("--provider", "openai", "--cost", "1e3"), "--cost: write dollars"),
        (("--provider", "openai", "--hold-ttl", "90000s"), "[INVALID_FIELD]"),
        (("--model", "gpt-4o"), "--provider"),
    ],
)
async def test_wrong_usage_of_decide_ends_with_2(
    sidecar: Sidecar, make: Factory, options: tuple[str, ...], sentence: str
) -> None:
    user = await make.user(micros=1_000_000)
    check_fault(await ask(sidecar, "decide", user, *options), 2, sentence)


async def test_on_a_terminal_headings_stand_out_and_prose_wraps_but_ids_do_not(
    sidecar: Sidecar, make: Factory
) -> None:
    user = await make.user(micros=1_000_000)
    key_id = await make.key(user)
    command = ("explain", user, "--provider", "openai")
    (_, plain), (code, coloured) = await asyncio.gather(
        keyturn_on_terminal(*command, columns=90, KEYTURN_ADDRESS=sidecar.address, NO_COLOR="1"),
        keyturn_on_terminal(*command, columns=90, KEYTURN_ADDRESS=sidecar.address),
    )
    assert code == 0
    steps = plain.split("\n\n")[2].splitlines()
    assert all(len(line.rstrip()) <= 90 for line in steps)
    assert len(steps) > 1 + len(re.findall(r"^ *\d+  ", "\n".join(steps), re.MULTILINE)), "nothing wrapped"
    assert f"key {key_id}" in plain
    assert "\x1b[1m" in coloured
    assert "\x1b" not in plain


async def test_what_steers_a_terminal_is_written_out(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user(micros=1_000_000)
    await make.key(user, label="\x1b[2J\u202eevil")
    said = await told(sidecar, "explain", user, "--provider", "openai")
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert "evil" in said
