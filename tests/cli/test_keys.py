"""`keyturn keys`, against a running sidecar and a provider that is played. A secret is never printed."""

from __future__ import annotations

import asyncio
import re
from uuid import uuid4

import pytest

from tests.cli.command import answered, ask, check_fault, keyturn, keyturn_on_terminal, rows_of, told
from tests.factories import Connection, Factory
from tests.providers import Providers, hang, refuse
from tests.support import Sidecar

SECRET = "sk-canary-5f1d9c0e7a3b48c2d6e4f0a1"
REFUSED = "sk-refused-9b7c5d3e1f2a4068c2d6e4f0"
# The scrubber would not know it for a secret.
PASSPHRASE = "canary-of-plain-words"
SAVE = ("--provider", "openai")


async def saved_keys(sql: Connection) -> int:
    count: int = await sql.fetchval("SELECT count(*) FROM user_api_keys")
    return count


async def test_a_key_is_saved_from_stdin_and_never_printed(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user()
    options = (*SAVE, "--label", "main", "--priority", "-7")
    said = await told(sidecar, "keys", "save", user, *options, stdin=f"{SECRET}\r\n".encode())
    key_id = await sql.fetchval("SELECT id FROM user_api_keys WHERE user_id = $1", user)
    shown = dict(rows_of(said)[1:])
    assert said.startswith("Saved.\n")
    assert (shown["Key"], shown["Label"], shown["Ends in"]) == (str(key_id), "main", SECRET[-4:])
    assert (shown["State"], shown["Priority"]) == ("usable", "-7")
    again = await answered(sidecar, "keys", "save", user, *options, stdin=SECRET.encode())
    assert again["replaced"] is True
    assert again["key"]["keyId"] == str(key_id)
    assert SECRET not in said + str(again) + sidecar.log.getvalue()
    assert (await sidecar.decide(user)).key.hint == SECRET[-4:]


async def test_on_a_terminal_the_secret_is_asked_for_and_not_shown(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user()
    code, shown = await keyturn_on_terminal(
        *("keys", "save", user, *SAVE),
        typed={"it is not shown": f"{SECRET}\n"},
        KEYTURN_ADDRESS=sidecar.address,
    )
    assert code == 0, shown
    assert "Saved." in shown
    assert SECRET not in shown
    assert await sql.fetchval("SELECT key_hint FROM user_api_keys WHERE user_id = $1", user) == SECRET[-4:]


async def test_a_key_that_the_provider_refuses_is_saved_with_a_warning_and_ends_with_3(
    sidecar: Sidecar, make: Factory, providers: Providers
) -> None:
    user = await make.user()
    providers.will(refuse, REFUSED)
    finished = await ask(sidecar, "keys", "save", user, *SAVE, stdin=REFUSED.encode())
    assert finished.code == 3
    assert "keyturn: saved, but the provider refuses it" in finished.err
    assert "it replaced" not in finished.err
    assert "invalid" in finished.out
    assert REFUSED not in finished.out + finished.err


async def test_a_refused_key_in_the_place_of_another_says_that_the_other_is_gone(
    sidecar: Sidecar, make: Factory, providers: Providers
) -> None:
    user = await make.user()
    labelled = ("keys", "save", user, *SAVE, "--label", "main")
    await told(sidecar, *labelled, stdin=SECRET.encode())
    providers.will(refuse, REFUSED)
    finished = await ask(sidecar, *labelled, stdin=REFUSED.encode())
    assert finished.code == 3
    assert finished.err.splitlines()[1:] == [
        "  it replaced the key that had this label; save the old one again to go back"
    ]
    assert finished.out.startswith("Replaced.\n")
    assert (await answered(sidecar, *labelled, stdin=SECRET.encode()))["key"]["state"] == "KEY_STATE_USABLE"


MISPLACED = {
    "an argument": ("keys", "save", "u1", *SAVE, PASSPHRASE),
    "an option": ("keys", "save", "u1", *SAVE, "--secret", PASSPHRASE),
    "an option with =": ("keys", "save", "u1", *SAVE, f"--secret={PASSPHRASE}"),
    "the key of a certificate": ("keys", "save", "u1", *SAVE, "--key", PASSPHRASE),
    "a short option": ("keys", "save", "u1", *SAVE, f"-{PASSPHRASE}"),
    "a priority": ("keys", "save", "u1", *SAVE, "--priority", PASSPHRASE),
    "instead of options": ("keys", "save", "u1", PASSPHRASE),
    "instead of a command": ("keys", PASSPHRASE),
}


@pytest.mark.parametrize("name", MISPLACED)
async def test_a_secret_as_an_argument_is_wrong_usage_and_not_quoted(
    name: str, sidecar: Sidecar, sql: Connection
) -> None:
    finished = await ask(sidecar, *MISPLACED[name], stdin=SECRET.encode())
    check_fault(finished, 2)
    assert PASSPHRASE not in finished.err
    assert await saved_keys(sql) == 0


async def test_what_is_no_secret_on_stdin_is_wrong_usage(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user()
    for stdin in (b"", b"\n", f"{SECRET}\n{SECRET}\n".encode(), b"\xff\xfe", b"x" * 20_000):
        finished = await ask(sidecar, "keys", "save", user, *SAVE, stdin=stdin)
        check_fault(finished, 2)
        assert SECRET not in finished.err
    assert await saved_keys(sql) == 0


async def test_what_cannot_be_saved_says_why(sidecar: Sidecar, make: Factory, sql: Connection) -> None:
    user, free = await make.user(), await make.user("free")
    secret = SECRET.encode()
    for code, reason, arguments, stdin in (
        (2, "INVALID_FIELD", (user, *SAVE), b"canary-of-no-provider"),
        (2, "INVALID_FIELD", (user, "--provider", "nonesuch"), secret),
        (3, "TIER_NOT_ELIGIBLE", (free, *SAVE), secret),
        (4, "USER_NOT_FOUND", ("nobody", *SAVE), secret),
    ):
        finished = await ask(sidecar, "keys", "save", *arguments, stdin=stdin)
        check_fault(finished, code, f"[{reason}]")
        assert "canary" not in finished.err
    await make.flags(byok_enabled=False)
    check_fault(await ask(sidecar, "keys", "save", user, *SAVE, stdin=secret), 3, "[BYOK_DISABLED]")
    assert await saved_keys(sql) == 0


async def test_keys_are_listed_in_the_order_in_which_they_are_tried(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user()
    second = await make.key(user, label="second", priority=2)
    first = await make.key(user, label="[b]first[/b]", priority=1, is_valid=False, last_error="no such key")
    other = await make.key(user, "anthropic", is_active=False)
    everything, some = await asyncio.gather(
        told(sidecar, "keys", "list", user), told(sidecar, "keys", "list", user, "--provider", "openai")
    )
    headings, *rows = rows_of(everything)
    assert headings[:6] == ["KEY", "PROVIDER", "LABEL", "PRIORITY", "ENDS IN", "STATE"]
    assert [row[0] for row in rows] == [str(other), str(first), str(second)]
    assert rows[0][5] == "inactive"
    assert rows[1][2] == "[b]first[/b]"
    assert (rows[1][5], rows[1][-1]) == ("invalid", "no such key")
    assert [row[0] for row in rows_of(some)[1:]] == [str(first), str(second)]
    answer = await answered(sidecar, "keys", "list", user)
    assert [key["state"] for key in answer["keys"]][:2] == ["KEY_STATE_INACTIVE", "KEY_STATE_INVALID"]


async def test_a_user_without_keys_is_a_sentence_and_one_that_is_not_there_ends_with_4(
    sidecar: Sidecar, make: Factory
) -> None:
    user = await make.user()
    assert await told(sidecar, "keys", "list", user) == "No keys.\n"
    check_fault(await ask(sidecar, "keys", "list", "nobody"), 4, "[USER_NOT_FOUND]")


async def test_ids_are_never_cut_or_wrapped_on_a_narrow_terminal(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user()
    key_id = await make.key(user, label="a long label of many words " * 4, last_error="no " * 40)
    code, shown = await keyturn_on_terminal(
        *("keys", "list", user), columns=60, KEYTURN_ADDRESS=sidecar.address
    )
    assert code == 0
    assert str(key_id) in shown
    assert len(shown.splitlines()) > 2, "the prose wrapped"


async def test_a_key_is_switched_off_and_on_and_what_is_not_given_stays(
    sidecar: Sidecar, make: Factory
) -> None:
    user = await make.user()
    key_id = str(await make.key(user, label="main", priority=3))
    off = await answered(sidecar, "keys", "update", user, key_id, "--inactive")
    assert (off["key"]["isActive"], off["key"]["label"], off["key"]["priority"]) == (False, "main", 3)
    said = await told(
        sidecar, "keys", "update", user, key_id, "--active", "--priority", "0", "--label", "spare"
    )
    shown = dict(rows_of(said))
    assert (shown["Active"], shown["Priority"], shown["Label"]) == ("yes", "0", "spare")
    await make.key(user, label="taken")
    taken = await ask(sidecar, "keys", "update", user, key_id, "--label", "taken")
    check_fault(taken, 3, "[LABEL_TAKEN]")


async def test_a_key_is_deleted_only_when_somebody_says_so(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user()
    first, second = str(await make.key(user)), str(await make.key(user))
    check_fault(await ask(sidecar, "keys", "delete", user, first, stdin=b"y\n"), 2, "--yes")
    code, shown = await keyturn_on_terminal(
        *("keys", "delete", user, first), typed={"[y/N]": "n\n"}, KEYTURN_ADDRESS=sidecar.address
    )
    assert code == 3
    assert "Nothing was deleted." in shown
    assert await saved_keys(sql) == 2
    code, shown = await keyturn_on_terminal(
        *("keys", "delete", user, first), typed={"[y/N]": "y\n"}, KEYTURN_ADDRESS=sidecar.address
    )
    assert code == 0
    assert f"Delete the key {first} of {user} for good?" in shown
    assert await told(sidecar, "keys", "delete", user, second, "--yes") == f"Deleted {second}.\n"
    assert await saved_keys(sql) == 0
    gone = await keyturn("keys", "delete", user, second, "--yes", KEYTURN_ADDRESS=sidecar.address)
    check_fault(gone, 4, "[KEY_NOT_FOUND]")


async def test_a_test_of_a_key_ends_by_what_the_provider_says(
    sidecar: Sidecar, make: Factory, providers: Providers
) -> None:
    user = await make.user()
    providers.will(refuse, REFUSED)
    good, bad = str(await make.key(user, secret=SECRET)), str(await make.key(user, secret=REFUSED))
    unreadable = str(await make.key(user, encrypted_key="v1.0000000000000000.AAAA"))
    said = await told(sidecar, "keys", "test", user, good)
    assert said.startswith("Valid: ")
    finished = await ask(sidecar, "keys", "test", user, bad)
    assert (finished.code, finished.err) == (3, "")
    assert finished.out.startswith("Invalid: ")
    assert REFUSED not in finished.out
    answer = await answered(sidecar, "keys", "test", user, unreadable, code=3)
    assert answer["check"] == "KEY_CHECK_UNREADABLE"
    providers.will(hang, SECRET)
    unverified = await ask(sidecar, "keys", "test", user, good, "--timeout", "60s")
    assert (unverified.code, unverified.err) == (6, "")
    assert unverified.out.startswith("Unverified: ")
    check_fault(await ask(sidecar, "keys", "test", user, str(uuid4())), 4, "[KEY_NOT_FOUND]")


async def test_the_providers_are_listed(sidecar: Sidecar, sql: Connection) -> None:
    await sql.execute("UPDATE api_providers SET is_enabled = false WHERE id = 'anthropic'")
    said = await told(sidecar, "keys", "providers")
    rows = {row[0]: row for row in rows_of(said)}
    assert rows["anthropic"][2] == "off"
    assert rows["openai"][2] == "on"
    assert re.search(r"\bhttp://127\.0\.0\.1:\d+/openai/v1$", rows["openai"][-1])
    answer = await answered(sidecar, "keys", "providers")
    assert {provider["providerId"] for provider in answer["providers"]} >= {"openai", "anthropic"}
