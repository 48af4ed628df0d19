"""`keyturn flags`, against a running sidecar."""

from __future__ import annotations

import asyncio
import getpass

import pytest

from keyturn.v1 import routing_service_pb2 as pb
from tests.cli.command import answered, ask, check_fault, rows_of, told
from tests.factories import Connection, Factory
from tests.support import Sidecar

FLAGS = ("byok_enabled", "byok_only_mode", "byok_uses_internal_credits")


async def enabled(sql: Connection) -> dict[str, bool]:
    """The flags as plain SQL sees them."""
    rows = await sql.fetch("SELECT key, is_enabled FROM feature_flags WHERE key = any($1)", list(FLAGS))
    return {row["key"]: row["is_enabled"] for row in rows}


async def test_the_flags_are_listed_with_the_mode_that_they_make(sidecar: Sidecar, sql: Connection) -> None:
    await sql.execute("DELETE FROM feature_flags WHERE key = 'byok_only_mode'")
    said = await told(sidecar, "flags", "list")
    head, rows = said.split("\n\n")
    assert head == "Mode  BYOK_FIRST"
    shown = {row[0]: row[1:] for row in rows_of(rows)}
    assert shown["byok_enabled"][:2] == ["on", "premium"]
    assert shown["byok_uses_internal_credits"][0] == "off"
    assert shown["byok_only_mode"][:2] == ["off", "default"]
    answer = await answered(sidecar, "flags", "list")
    assert answer["mode"] == "MODE_BYOK_FIRST"
    assert {flag["key"]: flag["isEnabled"] for flag in answer["flags"]} == dict(
        zip(FLAGS, (True, False, False), strict=True)
    )


async def test_flags_are_set_together_and_the_history_says_who_when_and_why(
    sidecar: Sidecar, sql: Connection
) -> None:
    settings = ("byok_enabled=off", "byok_uses_internal_credits=on")
    said = await told(sidecar, "flags", "set", *settings, "--reason", "launch  [red]day[/red]")
    assert said.startswith("Mode  INTERNAL_ONLY\n")
    assert await enabled(sql) == dict(zip(FLAGS, (False, False, True), strict=True))
    history, one = await asyncio.gather(
        told(sidecar, "flags", "history"),
        told(sidecar, "flags", "history", "--flag", "byok_enabled", "--limit", "5"),
    )
    assert rows_of(history)[0] == ["WHEN", "FLAG", "CHANGE", "BY", "REASON"]
    when, flag, change, by, *reason = rows_of(one)[1]
    assert when.endswith(" UTC")
    assert (flag, change) == ("byok_enabled", "on -> off")
    assert getpass.getuser() in by
    assert reason == ["launch", "[red]day[/red]"]
    assert {row[1] for row in rows_of(one)[1:]} == {"byok_enabled"}


async def test_a_change_by_plain_sql_is_in_the_history_too(sidecar: Sidecar, sql: Connection) -> None:
    await sql.execute("UPDATE feature_flags SET is_enabled = true WHERE key = 'byok_uses_internal_credits'")
    first = (await answered(sidecar, "flags", "history"))["changes"][0]
    assert (first["key"], first["oldEnabled"], first["newEnabled"]) == (FLAGS[2], False, True)
    assert first["changedBy"].startswith("sql:")


@pytest.mark.parametrize(
    ("mode", "flags"),
    [
        ("byok-first", {"byok_enabled": True, "byok_only_mode": False, "byok_uses_internal_credits": False}),
        ("CREDIT_FIRST", {"byok_enabled": True, "byok_only_mode": False, "byok_uses_internal_credits": True}),
        ("byok-only", {"byok_enabled": True, "byok_only_mode": True}),
        ("internal-only", {"byok_enabled": False}),
    ],
)
async def test_a_mode_is_set_by_its_name(
    sidecar: Sidecar, sql: Connection, mode: str, flags: dict[str, bool]
) -> None:
    said = await told(sidecar, "flags", "mode", mode, "--reason", "trying")
    assert said.startswith(f"Mode  {mode.upper().replace('-', '_')}\n")
    assert flags.items() <= (await enabled(sql)).items()


@pytest.mark.parametrize("change", [("mode", "byok-only"), ("set", "byok_only_mode=on")])
async def test_a_lockout_is_refused_with_how_many_and_what_to_do_next(
    sidecar: Sidecar, make: Factory, sql: Connection, change: tuple[str, str]
) -> None:
    for _ in range(3):
        await make.user()
    before = await enabled(sql)
    command = ("flags", *change, "--reason", "brave")
    check_fault(
        await ask(sidecar, *command),
        3,
        "Nothing was changed: BYOK_ONLY would lock out 3 eligible users without",
        "keyturn reports at-risk",
        "--acknowledge-lockout",
        "[LOCKOUT_NOT_ACKNOWLEDGED]",
    )
    assert await enabled(sql) == before
    finished = await ask(sidecar, *command, "--acknowledge-lockout")
    assert finished.code == 0
    assert finished.out.startswith("Mode  BYOK_ONLY\n")
    assert "3 eligible users" in finished.err


async def test_what_flags_would_do_is_simulated_and_nothing_is_changed(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    credited = await make.user(name="credited", micros=1_000_000)
    keyed = await make.user(name="keyed", micros=1_000_000)
    key_id = await make.key(keyed)
    for user, times in ((credited, 2), (keyed, 1)):
        for _ in range(times):
            decision = await sidecar.decide(user, cost_micros=100_000)
            await sidecar.record(decision, pb.OUTCOME_SUCCESS, cost_micros=100_000)
    before = await enabled(sql)
    by_mode, by_flag, same, daily = await asyncio.gather(
        told(sidecar, "flags", "simulate", "--mode", "byok-only", "--window", "1d"),
        answered(sidecar, "flags", "simulate", "byok_only_mode=on"),
        told(sidecar, "flags", "simulate"),
        told(sidecar, "flags", "simulate", "--mode", "byok-only", "--daily"),
    )
    head, totals, moves, locked_out, denied, who = by_mode.split("\n\n")
    assert head.startswith("Now BYOK_FIRST, proposed BYOK_ONLY; requests from 2")
    assert ["credits", "denied", "2", "0", "$0.20"] in rows_of(totals)
    assert ["own key", "own key", "1", "0", "$0.10"] in rows_of(totals)
    assert rows_of(moves) == [
        ["PROVIDER", "TIER", "NOW", "PROPOSED", "REQUESTS", "TOKENS", "COST"],
        ["openai", "premium", "credits", "denied", "2", "0", "$0.20"],
    ]
    assert locked_out.startswith("Locked out, with requests or without: 1 eligible")
    assert denied == "Would be denied: 1 (users by provider)"
    assert rows_of(who)[1][0] == credited
    assert rows_of(who)[1][-2:] == ["BYOK_REQUIRED", "2"]
    assert by_flag["proposedMode"] == "MODE_BYOK_ONLY"
    assert {move["toPath"] for move in by_flag["moves"]} == {"PAYMENT_PATH_DENIED", "PAYMENT_PATH_OWN_KEY"}
    assert "Nothing moves." in same
    assert daily.split("\n\n")[2].startswith("DAY")
    assert await enabled(sql) == before
    assert key_id


async def test_the_denied_are_counted_in_full_and_listed_up_to_the_number_asked_for(
    sidecar: Sidecar, make: Factory
) -> None:
    for number in range(3):
        user = await make.user(name=f"u{number}", micros=1_000_000)
        decision = await sidecar.decide(user, cost_micros=1)
        await sidecar.record(decision, pb.OUTCOME_SUCCESS, cost_micros=1)
    simulate = ("flags", "simulate", "--mode", "byok-only", "--denied", "2")
    finished = await ask(sidecar, *simulate)
    assert "Would be denied: 3" in finished.out
    assert "u1" in finished.out
    assert "u2" not in finished.out
    assert "2 of 3 denials are shown" in finished.err
    answer = await answered(sidecar, *simulate)
    assert (answer["deniedCount"], len(answer["denials"])) == ("3", 2)
    assert answer["moves"]


async def test_refresh_shows_what_the_sidecar_has_read(sidecar: Sidecar) -> None:
    assert (await told(sidecar, "flags", "refresh")).startswith("Mode  BYOK_FIRST\n")


async def test_changes_that_cannot_be_are_refused(sidecar: Sidecar, sql: Connection) -> None:
    before = await enabled(sql)
    for finished in await asyncio.gather(
        ask(sidecar, "flags", "set", "no_such_flag=on", "--reason", "x"),
        ask(sidecar, "flags", "set", "byok_enabled=off", "--reason", ""),
        ask(sidecar, "flags", "mode", "internal-only", "--reason", "x" * 501),
        ask(sidecar, "flags", "simulate", "--window", "1s"),
        ask(sidecar, "flags", "simulate", "no_such_flag=on"),
    ):
        check_fault(finished, 2, "[INVALID_FIELD]")
    assert await enabled(sql) == before
