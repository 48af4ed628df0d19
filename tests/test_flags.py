"""FlagService over real gRPC: reading, changing, the lockout, the history, and changes at the same time."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest

from keyturn.v1 import flag_service_pb2 as pb
from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import report_service_pb2 as report_pb
from keyturn_server.routing.model import Flags, Mode, flags_of
from tests.factories import Connection, Factory
from tests.refusals import Refusal, contents, refused
from tests.support import Fault, Sidecar, eventually

ENABLED, CREDITS, ONLY = "byok_enabled", "byok_uses_internal_credits", "byok_only_mode"
KEYS = [ENABLED, CREDITS, ONLY]


def on_off(answer: Any) -> dict[str, bool]:
    return {flag.key: flag.is_enabled for flag in answer.flags}


async def listed(sidecar: Sidecar) -> Any:
    return await sidecar.call("ListFlags", pb.ListFlagsRequest())


async def history(sidecar: Sidecar, **fields: Any) -> list[pb.FlagChange]:
    return list((await sidecar.call("ListFlagChanges", pb.ListFlagChangesRequest(**fields))).changes)


def set_flags(
    flags: dict[str, bool], reason: str = "a test", *, acknowledge: bool = False
) -> pb.SetFlagsRequest:
    return pb.SetFlagsRequest(flags=flags, reason=reason, acknowledge_lockout=acknowledge)


def changed(entries: list[pb.FlagChange]) -> list[tuple[str, bool | None, bool | None]]:
    """The changes in short, the oldest first."""
    return [
        (
            one.key,
            one.old_enabled if one.HasField("old_enabled") else None,
            one.new_enabled if one.HasField("new_enabled") else None,
        )
        for one in reversed(entries)
    ]


# -- reading ------------------------------------------------------------------------------------------


async def test_the_flags_are_listed_as_they_are_in_the_database(sidecar: Sidecar, sql: Connection) -> None:
    rows = {row["key"]: row for row in await sql.fetch("SELECT * FROM feature_flags")}
    answer = await listed(sidecar)
    assert [flag.key for flag in answer.flags] == KEYS
    assert answer.mode == policy.MODE_BYOK_FIRST
    for flag in answer.flags:
        row = rows[flag.key]
        assert (flag.is_enabled, flag.name, flag.description, flag.min_tier, flag.is_default) == (
            row["is_enabled"],
            row["name"],
            row["description"],
            row["min_tier"] or "",
            False,
        )
        assert flag.update_time.ToDatetime(UTC) == row["updated_at"]


async def test_a_flag_without_a_row_is_its_default_and_says_so(sidecar: Sidecar, sql: Connection) -> None:
    before = await listed(sidecar)
    await sql.execute("DELETE FROM feature_flags")
    answer = await listed(sidecar)
    assert answer.mode == policy.MODE_BYOK_FIRST
    for flag, old in zip(answer.flags, before.flags, strict=True):
        assert flag.is_default
        assert not flag.HasField("update_time")
        old.ClearField("update_time")
        old.is_default = True
        assert flag == old


async def test_what_another_hand_wrote_is_listed_at_once(sidecar: Sidecar, sql: Connection) -> None:
    await sql.execute(
        "UPDATE feature_flags SET min_tier = NULL, is_enabled = false, name = 'Schlüssel' WHERE key = $1",
        ENABLED,
    )
    answer = await listed(sidecar)
    assert (answer.flags[0].name, answer.flags[0].min_tier) == ("Schlüssel", Flags().min_tier)
    assert answer.mode == policy.MODE_INTERNAL_ONLY


# -- SetFlags -----------------------------------------------------------------------------------------


async def test_a_change_is_in_force_in_the_answer_and_in_the_next_decision(
    sidecar: Sidecar, make: Factory
) -> None:
    user = await make.user(micros=1_000_000)
    await make.key(user)
    assert (await sidecar.decide(user)).WhichOneof("route") == "key"
    answer = await sidecar.call("SetFlags", set_flags({CREDITS: True}))
    assert on_off(answer) == {ENABLED: True, CREDITS: True, ONLY: False}
    assert (answer.mode, answer.locked_out_users) == (policy.MODE_CREDIT_FIRST, 0)
    # No waiting: whoever changed a flag sees it.
    assert (await sidecar.decide(user)).mode == policy.MODE_CREDIT_FIRST
    assert on_off(await listed(sidecar)) == on_off(answer)


async def test_a_change_reaches_another_sidecar(start_sidecar: Callable[..., Any], make: Factory) -> None:
    user = await make.user(micros=1_000_000)
    one, other = await start_sidecar(), await start_sidecar()
    await other.decide(user)
    await one.call("SetFlags", set_flags({ENABLED: False}))

    async def knows() -> bool:
        return bool((await other.decide(user)).mode == policy.MODE_INTERNAL_ONLY)

    await eventually(knows)


async def test_a_change_is_in_the_history_with_who_and_why_and_in_the_log(
    sidecar: Sidecar, sql: Connection
) -> None:
    began = datetime.now(UTC)
    reason = "Gutschriften zuerst – „Pilot“ 💳"
    await sidecar.call("SetFlags", set_flags({CREDITS: True, ENABLED: True}, f"  {reason} "))
    (entry,) = await history(sidecar)
    assert changed([entry]) == [(CREDITS, False, True)]
    assert (entry.changed_by, entry.reason) == ("socket", reason)
    assert began <= entry.change_time.ToDatetime(UTC) <= datetime.now(UTC)
    (line,) = [json.loads(line) for line in sidecar.log.getvalue().splitlines() if "operator_change" in line]
    assert line.pop("timestamp")
    assert line == {
        "event": "operator_change",
        "level": "info",
        "action": "SetFlags",
        "caller": "socket",
        ENABLED: True,
        CREDITS: True,
        "mode": "CREDIT_FIRST",
        "locked_out_users": 0,
    }
    # Whose connection it was before is nobody the next time.
    await sql.execute("UPDATE feature_flags SET is_enabled = false WHERE key = $1", CREDITS)
    assert (await history(sidecar))[0].changed_by.startswith("sql:")


async def test_min_tier_and_the_texts_of_a_row_stay_as_they_are(sidecar: Sidecar, sql: Connection) -> None:
    await sql.execute("UPDATE feature_flags SET min_tier = 'lifetime', name = 'x' WHERE key = $1", ENABLED)
    row = "SELECT to_jsonb(f) - 'updated_at' - 'is_enabled' FROM feature_flags f WHERE key = $1"
    before = await sql.fetchval(row, ENABLED)
    answer = await sidecar.call("SetFlags", set_flags({ENABLED: False}))
    assert await sql.fetchval(row, ENABLED) == before
    assert answer.flags[0].min_tier == "lifetime"
    entry = (await history(sidecar))[0]
    assert (entry.old_min_tier, entry.new_min_tier) == ("lifetime", "lifetime")


async def test_a_missing_row_is_made_as_the_first_migration_makes_it(
    sidecar: Sidecar, sql: Connection
) -> None:
    rows = (
        "SELECT key, to_jsonb(f) - 'updated_at' - 'created_at' - 'is_enabled' FROM feature_flags f ORDER BY 1"
    )
    before = await sql.fetch(rows)
    await sql.execute("DELETE FROM feature_flags")
    answer = await sidecar.call("SetFlags", set_flags({ENABLED: False, CREDITS: True, ONLY: False}))
    assert await sql.fetch(rows) == before
    assert not any(flag.is_default for flag in answer.flags)
    # Also one that is set to its default: from then on it is set.
    entries = await history(sidecar)
    assert sorted(changed(entries[:3])) == [
        (ENABLED, None, False),
        (ONLY, None, False),
        (CREDITS, None, True),
    ]
    assert sorted(changed(entries[3:])) == [
        (ENABLED, True, None),
        (ONLY, False, None),
        (CREDITS, False, None),
    ]


async def test_changing_nothing_succeeds_and_leaves_no_trace(sidecar: Sidecar, sql: Connection) -> None:
    before = await contents(sql)
    answer = await sidecar.call("SetFlags", set_flags({ENABLED: True, ONLY: False}))
    assert answer.mode == policy.MODE_BYOK_FIRST
    assert await contents(sql) == before
    assert await history(sidecar) == []


# -- the lockout --------------------------------------------------------------------------------------

# Tier, the columns of the user's keys, and whether BYOK_ONLY locks the user out.
AT_RISK: list[tuple[str, list[dict[str, Any]], bool]] = [
    ("premium", [], True),
    ("lifetime", [], True),
    ("premium", [{}], False),
    ("premium", [{"provider": "mistral"}], False),
    ("premium", [{"is_active": False}], True),
    ("premium", [{"is_valid": False}], True),
    ("premium", [{"is_valid": False}, {"provider": "groq"}], False),
    ("premium", [{"is_valid": False}, {"is_active": False}], True),
    # Under a master key that this sidecar does not have.
    ("premium", [{"encrypted_key": "v1.0123456789abcdef.AAAA"}], True),
    # It will be usable again by itself.
    ("premium", [{"cooldown_until": datetime(2099, 1, 1, tzinfo=UTC)}], False),
    # Not eligible: BYOK_ONLY denies them, but a key would not help.
    ("free", [], False),
    ("subscriber", [{}], False),
    ("a tier that nobody described", [], False),
]
LOCKED_OUT = sum(is_out for _, _, is_out in AT_RISK)


async def make_people(make: Factory) -> None:
    for tier, keys, _ in AT_RISK:
        user = await make.user(tier)
        for columns in keys:
            await make.key(user, **columns)


@pytest.mark.parametrize("method", ["SetFlags", "SetMode"])
async def test_a_lockout_has_to_be_acknowledged(
    sidecar: Sidecar, make: Factory, sql: Connection, method: str
) -> None:
    await make_people(make)
    requests: dict[str, Any] = {
        "SetFlags": set_flags({ONLY: True, CREDITS: True}),
        "SetMode": pb.SetModeRequest(mode=policy.MODE_BYOK_ONLY, reason="a test"),
    }
    request = requests[method]
    before = await contents(sql)
    refusal = (await refused(sidecar, method, request)).check(
        grpc.StatusCode.FAILED_PRECONDITION, "LOCKOUT_NOT_ACKNOWLEDGED"
    )
    assert refusal.info.metadata["locked_out_users"] == str(LOCKED_OUT)
    assert str(LOCKED_OUT) in refusal.message
    assert await contents(sql) == before
    assert "operator_change" not in sidecar.log.getvalue()

    request.acknowledge_lockout = True
    answer = await sidecar.call(method, request)
    assert (answer.mode, answer.locked_out_users) == (policy.MODE_BYOK_ONLY, LOCKED_OUT)


async def test_each_user_counts_as_the_policy_says(sidecar: Sidecar, make: Factory, sql: Connection) -> None:
    for tier, keys, is_out in AT_RISK:
        user = await make.user(tier)
        for columns in keys:
            await make.key(user, **columns)
        answer = await sidecar.call("SetFlags", set_flags({ONLY: True}, acknowledge=True))
        assert answer.locked_out_users == is_out, (tier, keys)
        await sql.execute("DELETE FROM users")


@pytest.mark.parametrize(
    ("min_tier", "locked_out"), [("free", 2), ("lifetime", 1), ("no such tier", 3), (None, 1)]
)
async def test_who_is_eligible_depends_on_min_tier(
    sidecar: Sidecar, make: Factory, sql: Connection, min_tier: str | None, locked_out: int
) -> None:
    await sql.execute("UPDATE feature_flags SET min_tier = $2 WHERE key = $1", ENABLED, min_tier)
    await make.user("free")
    await make.user("lifetime")
    await make.user("community")
    answer = await sidecar.call("SetFlags", set_flags({ONLY: True}, acknowledge=True))
    assert answer.locked_out_users == locked_out


async def test_a_lockout_is_no_news_in_the_mode_that_has_it_and_no_matter_in_another(
    sidecar: Sidecar, make: Factory
) -> None:
    await make.user()
    # Without byok_enabled the mode is INTERNAL_ONLY, whatever the others say.
    answer = await sidecar.call("SetFlags", set_flags({ENABLED: False, ONLY: True}))
    assert (answer.mode, answer.locked_out_users) == (policy.MODE_INTERNAL_ONLY, 0)
    (await refused(sidecar, "SetFlags", set_flags({ENABLED: True}))).check(
        grpc.StatusCode.FAILED_PRECONDITION, "LOCKOUT_NOT_ACKNOWLEDGED"
    )
    await sidecar.call("SetFlags", set_flags({ENABLED: True}, acknowledge=True))
    answer = await sidecar.call("SetFlags", set_flags({ONLY: True, CREDITS: True}))
    assert (answer.mode, answer.locked_out_users) == (policy.MODE_BYOK_ONLY, 1)
    assert on_off(answer)[CREDITS]


async def test_a_key_that_no_request_can_use_saves_nobody_from_the_lockout(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    await make.key(await make.user())
    without_a_master_key = await start_sidecar(encryption_key=None)
    (await refused(without_a_master_key, "SetFlags", set_flags({ONLY: True}))).check(
        grpc.StatusCode.FAILED_PRECONDITION, "LOCKOUT_NOT_ACKNOWLEDGED"
    )
    await sql.execute("UPDATE api_providers SET is_enabled = false WHERE id = 'openai'")
    sidecar = await start_sidecar()
    (await refused(sidecar, "SetFlags", set_flags({ONLY: True}))).check(
        grpc.StatusCode.FAILED_PRECONDITION, "LOCKOUT_NOT_ACKNOWLEDGED"
    )
    listed = await sidecar.call("ListUsersWithoutKeys", report_pb.ListUsersWithoutKeysRequest())
    assert (listed.total_count, listed.without_active_key_count) == (1, 0)
    assert listed.users[0].reason == policy.DENIAL_REASON_KEY_UNUSABLE
    await sql.execute("UPDATE api_providers SET is_enabled = true")
    assert (await sidecar.call("SetFlags", set_flags({ONLY: True}))).locked_out_users == 0


async def test_a_simulation_tells_of_those_who_made_no_request_too(sidecar: Sidecar, make: Factory) -> None:
    await make.user()
    await make.user("free")
    answer = await sidecar.call("SimulateFlags", pb.SimulateFlagsRequest(flags={ONLY: True}))
    assert (answer.denied_count, answer.locked_out_users) == (0, 1)
    answer = await sidecar.call("SimulateFlags", pb.SimulateFlagsRequest(flags={CREDITS: True}))
    assert answer.locked_out_users == 0


async def test_nobody_locked_out_needs_no_acknowledgement(sidecar: Sidecar, make: Factory) -> None:
    await make.key(await make.user())
    await make.user("free")
    answer = await sidecar.call("SetFlags", set_flags({ONLY: True}))
    assert (answer.mode, answer.locked_out_users) == (policy.MODE_BYOK_ONLY, 0)


# -- SetMode ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("before", list(itertools.product([False, True], repeat=3)))
async def test_a_mode_is_made_from_any_flags_and_leaves_those_that_do_not_matter(
    sidecar: Sidecar, make: Factory, mode: Mode, before: tuple[bool, bool, bool]
) -> None:
    flags = dict(zip(KEYS, before, strict=True))
    await make.flags(**flags)
    answer = await sidecar.call(
        "SetMode", pb.SetModeRequest(mode=policy.Mode.Value(f"MODE_{mode.name}"), reason="a test")
    )
    assert answer.mode == policy.Mode.Value(f"MODE_{mode.name}")
    expected = {
        Mode.INTERNAL_ONLY: {ENABLED: False},
        Mode.BYOK_ONLY: {ENABLED: True, ONLY: True},
        Mode.CREDIT_FIRST: {ENABLED: True, ONLY: False, CREDITS: True},
        Mode.BYOK_FIRST: {ENABLED: True, ONLY: False, CREDITS: False},
    }[mode]
    assert flags_of(mode) == expected
    assert on_off(answer) == flags | expected
    assert Flags().with_values(on_off(answer)).mode is mode


# -- bad input ----------------------------------------------------------------------------------------

NO_FLAG = "There is no such flag; there are byok_enabled, byok_uses_internal_credits, byok_only_mode."
BAD_CHANGES: list[tuple[str, Any, str, str]] = [
    ("SetFlags", set_flags({}), "flags", "at least one of byok_enabled, byok_uses_internal_credits"),
    ("SetFlags", set_flags({"x": True}), 'flags["x"]', NO_FLAG),
    ("SetFlags", set_flags({ENABLED: True, "BYOK_ENABLED": True}), 'flags["BYOK_ENABLED"]', NO_FLAG),
    ("SetFlags", set_flags({"": True}), 'flags[""]', NO_FLAG),
    ("SetFlags", set_flags({"a\0\n": True}), r'flags["a\u0000\n"]', NO_FLAG),
    ("SetFlags", set_flags({"ü" * 5000: True}), f'flags["{chr(92)}u00fc', NO_FLAG),
    ("SetFlags", set_flags({ONLY: True}, ""), "reason", "Required."),
    ("SetFlags", set_flags({ONLY: True}, " \t "), "reason", "Required."),
    ("SetFlags", set_flags({ONLY: True}, "x" * 501), "reason", "At most 500 characters; this has 501."),
    ("SetFlags", set_flags({ONLY: True}, "a\0b"), "reason", "Control characters"),
    ("SetMode", pb.SetModeRequest(reason="r"), "mode", "Required."),
    ("SetMode", pb.SetModeRequest(mode=99, reason="r"), "mode", "There is no such mode."),  # type: ignore[arg-type]
    ("SetMode", pb.SetModeRequest(mode=-1, reason="r"), "mode", "There is no such mode."),  # type: ignore[arg-type]
    ("SetMode", pb.SetModeRequest(mode=policy.MODE_BYOK_ONLY), "reason", "Required."),
    ("SetMode", pb.SetModeRequest(mode=policy.MODE_BYOK_ONLY, reason="ü" * 501), "reason", "At most 500"),
    ("ListFlagChanges", pb.ListFlagChangesRequest(key="x"), "key", NO_FLAG),
    ("ListFlagChanges", pb.ListFlagChangesRequest(key="\0"), "key", NO_FLAG),
    ("ListFlagChanges", pb.ListFlagChangesRequest(page_size=-1), "page_size", "From 1 to 1000"),
    ("ListFlagChanges", pb.ListFlagChangesRequest(page_size=1001), "page_size", "From 1 to 1000"),
]


async def test_bad_input_names_its_field_and_its_limit_and_changes_nothing(
    sidecar: Sidecar, sql: Connection
) -> None:
    before = await contents(sql)
    for method, request, field, sentence in BAD_CHANGES:
        refusal = await refused(sidecar, method, request)
        refusal.check(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "BadRequest")
        (found,) = refusal.fields
        assert found.startswith(field), (method, found)
        assert sentence in refusal.fields[found]
        assert len(found) < 300
    assert await contents(sql) == before


async def test_all_that_is_wrong_is_told_at_once_and_in_bounds(sidecar: Sidecar) -> None:
    refusal = await refused(
        sidecar, "SetFlags", pb.SetFlagsRequest(flags={f"🔑{n}" * 50: True for n in range(50)})
    )
    assert len(refusal.fields) == 4
    assert refusal.fields["reason"] == "Required."
    refusal = await refused(sidecar, "SetMode", pb.SetModeRequest())
    assert refusal.fields.keys() == {"mode", "reason"}


async def test_a_reason_at_its_limit_is_kept_whole(sidecar: Sidecar) -> None:
    reason = "ü💡" * 250
    await sidecar.call("SetFlags", set_flags({CREDITS: True}, reason))
    assert (await history(sidecar))[0].reason == reason


# -- the history --------------------------------------------------------------------------------------


async def test_plain_sql_is_in_the_history_with_its_role_and_what_it_gave_as_reason(
    sidecar: Sidecar, sql: Connection
) -> None:
    role = await sql.fetchval("SELECT session_user")
    await sql.execute("UPDATE feature_flags SET is_enabled = true WHERE key = $1", CREDITS)
    await sql.execute("UPDATE feature_flags SET min_tier = 'free' WHERE key = $1", ENABLED)
    await sql.execute("DELETE FROM feature_flags WHERE key = $1", ONLY)
    await sql.execute("INSERT INTO feature_flags (key, name, is_enabled) VALUES ($1, 'x', true)", ONLY)
    async with sql.transaction():
        await sql.execute("SET LOCAL keyturn.reason = 'incident 7'")
        await sql.execute("UPDATE feature_flags SET is_enabled = false WHERE key = $1", ONLY)
    # Another flag of the product's is none of ours.
    await sql.execute("INSERT INTO feature_flags (key, name, is_enabled) VALUES ('dark_mode', 'x', true)")

    entries = await history(sidecar)
    assert changed(entries) == [
        (CREDITS, False, True),
        (ENABLED, True, True),
        (ONLY, False, None),
        (ONLY, None, True),
        (ONLY, True, False),
    ]
    assert {entry.changed_by for entry in entries} == {f"sql:{role}"}
    assert [entry.reason for entry in entries] == ["incident 7", "", "", "", ""]
    assert (entries[3].old_min_tier, entries[3].new_min_tier) == ("premium", "free")
    assert changed(await history(sidecar, key=ENABLED)) == [(ENABLED, True, True)]


@pytest.mark.parametrize("size", [1, 2, 7, 8])
async def test_pages_of_the_history_are_complete_and_without_repetition(
    sidecar: Sidecar, sql: Connection, size: int
) -> None:
    for number in range(7):
        await sql.execute(
            "UPDATE feature_flags SET is_enabled = NOT is_enabled WHERE key = $1", KEYS[number % 2]
        )
    for key, expected in (("", 7), (ENABLED, 4), (ONLY, 0)):
        seen: list[pb.FlagChange] = []
        token = ""
        while True:
            request = pb.ListFlagChangesRequest(key=key, page_size=size, page_token=token)
            answer = await sidecar.call("ListFlagChanges", request)
            assert len(answer.changes) <= size
            seen += answer.changes
            # A change made meanwhile is newer than all pages to come.
            await sql.execute("UPDATE feature_flags SET sort_order = sort_order + 1 WHERE key = $1", CREDITS)
            if not (token := answer.next_page_token):
                break
        # The page that began it all may have seen what an earlier list's pages left behind.
        newest_first = [one.change_time.ToDatetime(UTC) for one in seen]
        assert newest_first == sorted(newest_first, reverse=True)
        assert len({one.SerializeToString() for one in seen}) == len(seen)
        old = [one for one in seen if one.old_enabled != one.new_enabled]
        assert len(old) == expected


async def test_a_token_leads_on_only_in_the_list_it_is_of(sidecar: Sidecar, sql: Connection) -> None:
    for _ in range(2):
        await sql.execute("UPDATE feature_flags SET is_enabled = NOT is_enabled WHERE key = $1", ENABLED)
    token = (await sidecar.call("ListFlagChanges", pb.ListFlagChangesRequest(page_size=1))).next_page_token
    assert token
    for request in (
        pb.ListFlagChangesRequest(page_token=token, key=ENABLED),
        pb.ListFlagChangesRequest(page_token=token[:-3]),
        pb.ListFlagChangesRequest(page_token="x"),
    ):
        refusal = await refused(sidecar, "ListFlagChanges", request)
        refusal.check(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_TOKEN", "BadRequest")
        assert list(refusal.fields) == ["page_token"]
    refusal = await refused(sidecar, "SimulateFlags", pb.SimulateFlagsRequest(page_token=token))
    assert refusal.info.metadata["cause"] == "other_query"


# -- RefreshFlags -------------------------------------------------------------------------------------


async def test_a_refresh_makes_up_for_changes_that_are_not_announced(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=1_000_000)
    one, other = await start_sidecar(), await start_sidecar()
    await sql.execute("ALTER TABLE feature_flags DISABLE TRIGGER push")
    for sidecar in (one, other):
        await sidecar.decide(user)
    await make.flags(**{ENABLED: False})
    # Nobody has been told: what was read lives on.
    for sidecar in (one, other):
        assert (await sidecar.decide(user)).mode == policy.MODE_BYOK_FIRST
    answer = await one.call("RefreshFlags", pb.RefreshFlagsRequest())
    assert (answer.mode, on_off(answer)[ENABLED]) == (policy.MODE_INTERNAL_ONLY, False)
    assert (await one.decide(user)).mode == policy.MODE_INTERNAL_ONLY
    assert '"RefreshFlags"' in one.log.getvalue()

    async def knows() -> bool:
        return bool((await other.decide(user)).mode == policy.MODE_INTERNAL_ONLY)

    await eventually(knows)


# -- at the same time ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["there", "missing"])
async def test_changes_at_the_same_time_follow_one_another(
    start_sidecar: Callable[..., Any], sql: Connection, rows: str
) -> None:
    """Whatever the order was: each change's answer is a state that the history passes through."""
    if rows == "missing":
        await sql.execute("DELETE FROM feature_flags")
        await sql.execute("TRUNCATE feature_flag_changes")
    sidecars = [await start_sidecar(), await start_sidecar()]
    requests = [
        set_flags(dict(zip(KEYS, values, strict=True)), f"change {number}")
        for number, values in enumerate(itertools.product([False, True], repeat=3))
        for _ in range(3)
    ]
    answers = await asyncio.gather(
        *(sidecars[n % 2].call("SetFlags", request) for n, request in enumerate(requests))
    )
    for answer, request in zip(answers, requests, strict=True):
        assert on_off(answer) == dict(request.flags)

    entries = list(reversed(await history(sidecars[0], page_size=1000)))
    state: dict[str, bool | None] = (
        dict.fromkeys(KEYS) if rows == "missing" else {ENABLED: True, CREDITS: False, ONLY: False}
    )
    # Each change comes from where the one before has led, and changes of one request are together.
    for _, group in itertools.groupby(entries, key=lambda entry: entry.reason):
        for entry in group:
            key, old, new = changed([entry])[0]
            assert (state[key], new) == (old, not old if old is not None else new)
            state[key] = new
        number = int(entry.reason.removeprefix("change "))
        assert list(state.values()) == [bool(number & 4), bool(number & 2), bool(number & 1)]
    assert on_off(await listed(sidecars[1])) == state


async def test_two_halves_of_a_lockout_at_the_same_time_do_not_slip_past_it(
    start_sidecar: Callable[..., Any], make: Factory
) -> None:
    """byok_enabled and byok_only_mode make BYOK_ONLY together; each alone is harmless."""
    await make.user()
    sidecars = [await start_sidecar(), await start_sidecar()]
    for _ in range(10):
        await make.flags(**{ENABLED: False, ONLY: False})
        results = await asyncio.gather(
            sidecars[0].call("SetFlags", set_flags({ENABLED: True})),
            sidecars[1].call("SetFlags", set_flags({ONLY: True})),
            return_exceptions=True,
        )
        (fault,) = [one for one in results if isinstance(one, BaseException)]
        assert isinstance(fault, Fault)
        assert Refusal.of(fault).info.reason == "LOCKOUT_NOT_ACKNOWLEDGED"
        assert (await listed(sidecars[0])).mode != policy.MODE_BYOK_ONLY


async def test_rows_that_are_missing_are_locked_too(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    """As it was, either change is harmless; the second one to come sees what the first has made."""
    await make.user()
    sidecars = [await start_sidecar(), await start_sidecar()]
    for _ in range(10):
        await sql.execute("DELETE FROM feature_flags")
        await asyncio.gather(
            sidecars[0].call("SetFlags", set_flags({ENABLED: False, ONLY: True})),
            sidecars[1].call("SetFlags", set_flags({ENABLED: True})),
            return_exceptions=True,
        )
        assert (await listed(sidecars[0])).mode == policy.MODE_INTERNAL_ONLY


async def test_a_row_that_somebody_keeps_locked_is_said_to_be(sidecar: Sidecar, sql: Connection) -> None:
    async with sql.transaction():
        await sql.execute("SELECT FROM feature_flags WHERE key = $1 FOR UPDATE", ENABLED)
        refusal = await refused(sidecar, "SetFlags", set_flags({CREDITS: True}))
        refusal.check(grpc.StatusCode.UNAVAILABLE, "ROW_LOCKED", "RetryInfo")
    answer = await sidecar.call("SetFlags", set_flags({CREDITS: True}))
    assert on_off(answer)[CREDITS]
    assert changed(await history(sidecar)) == [(CREDITS, False, True)]
