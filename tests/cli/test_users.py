"""`keyturn users`, against a running sidecar."""

from __future__ import annotations

import asyncio

from tests.cli.command import answered, ask, check_fault, rows_of, told
from tests.factories import Connection, Factory
from tests.support import Sidecar


async def test_a_user_is_made_and_set_and_keeps_the_email_that_is_not_mentioned(sidecar: Sidecar) -> None:
    made = await told(sidecar, "users", "put", "ada", "--tier", "premium", "--email", "ada@example.com")
    assert made.startswith("Made.\nUser     ada\n")
    said = await told(sidecar, "users", "put", "ada", "--tier", "lifetime")
    assert said.startswith("Set.\n")
    for line in (["Tier", "lifetime"], ["Email", "ada@example.com"]):
        assert line in rows_of(said)
    cleared = await answered(sidecar, "users", "put", "ada", "--tier", "lifetime", "--email", "")
    assert cleared["created"] is False
    assert cleared["user"]["email"] == ""


async def test_a_tier_that_is_not_known_is_taken_with_a_warning_on_stderr(sidecar: Sidecar) -> None:
    finished = await ask(sidecar, "users", "put", "ada", "--tier", "platinum")
    assert finished.code == 0
    assert "no tier 'platinum'" in finished.err
    assert "platinum (not known: below all others)" in finished.out
    assert (await answered(sidecar, "users", "get", "ada"))["user"]["isKnownTier"] is False


async def test_a_user_is_shown_with_times_in_utc(sidecar: Sidecar, make: Factory, sql: Connection) -> None:
    user = await make.user(name="ünïcödé 漢字")
    made = await sql.fetchval("SELECT created_at FROM users WHERE id = $1", user)
    shown = dict(rows_of(await told(sidecar, "users", "get", user)))
    assert shown["User"] == user
    assert shown["Made"] == f"{made:%Y-%m-%d %H:%M:%S} UTC"
    assert (await answered(sidecar, "users", "get", user))["user"]["userId"] == user


async def test_settings_say_who_pays_and_what_is_missing(sidecar: Sidecar, make: Factory) -> None:
    rich, poor = await make.user(micros=1_000_000), await make.user()
    await make.key(rich)
    paid, missing = await asyncio.gather(*(told(sidecar, "users", "settings", user) for user in (rich, poor)))
    shown = dict(rows_of(paid))
    assert (shown["State"], shown["Mode"], shown["Keys for"]) == ("USING_OWN_KEYS", "BYOK_FIRST", "openai")
    assert (shown["Page visible"], shown["Has credits"]) == ("yes", "yes")
    assert "Reason" not in shown
    shown = dict(rows_of(missing))
    assert (shown["State"], shown["Reason"]) == ("ACTION_REQUIRED", "NO_KEY_AND_NO_CREDITS")
    assert shown["Keys for"] == "no provider"
    answer = await answered(sidecar, "users", "settings", poor)
    assert answer["state"] == "PAYMENT_STATE_ACTION_REQUIRED"
    assert answer["hasCredits"] is False


async def test_users_that_are_not_there_end_with_4_and_ids_that_cannot_be_with_2(sidecar: Sidecar) -> None:
    for finished in await asyncio.gather(
        *(ask(sidecar, "users", command, "nobody") for command in ("get", "settings"))
    ):
        check_fault(finished, 4, "[USER_NOT_FOUND]")
    for finished in await asyncio.gather(
        ask(sidecar, "users", "get", ""),
        ask(sidecar, "users", "put", "u" * 129, "--tier", "free"),
        ask(sidecar, "users", "put", "u1", "--tier", ""),
    ):
        check_fault(finished, 2, "[INVALID_FIELD]")
