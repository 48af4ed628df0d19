"""The commands beside `serve`, and what all of them say of themselves."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from keyturn_server.access_file import digest_of, parse_callers
from keyturn_server.keys.keyring import parse_master_key
from keyturn_server.watched import File
from tests.cli.command import Finished, keyturn
from tests.support import MASTER_KEY, Sidecar, temporary_directory

OPTIONS = {
    ("serve",): {
        "listen",
        "embedded",
        "spool",
        "reflection",
        "insecure-loopback",
        "socket-roles",
        "access-file",
        "tls-cert",
        "tls-key",
        "tls-client-ca",
        "metrics",
    },
    ("db", "migrate"): {"embedded"},
    ("db", "check"): {"embedded", "deep", "json"},
    ("spool", "show"): {"spool", "embedded", "limit", "json"},
    ("spool", "drop"): {"spool", "embedded"},
    ("keys", "rotate"): {"embedded", "batch", "dry-run", "force", "json"},
    ("demo",): {"once"},
    ("keygen",): set(),
    ("health",): {"address", "token-file", "ca"},
    ("token",): {"role"},
}
NOT_IN_THE_ENVIRONMENT = {"once", "limit", "role", "batch", "deep", "dry-run", "force", "json"}


async def test_the_help_of_each_command_shows_every_option_with_its_variable() -> None:
    helps = await asyncio.gather(*(keyturn(*command, "--help") for command in OPTIONS))
    for finished, (command, options) in zip(helps, OPTIONS.items(), strict=True):
        assert (finished.code, finished.err) == (0, "")
        shown = set(re.findall(r"--([a-z-]+)", finished.out)) - {"help", "no-once"}
        assert options <= shown, f"{command} has {options - shown} nowhere in its help"
        for option in options - NOT_IN_THE_ENVIRONMENT:
            assert f"[KEYTURN_{option.upper().replace('-', '_')}" in finished.out


async def test_the_help_of_the_whole_names_each_command_and_the_master_keys() -> None:
    finished = await keyturn("--help")
    assert finished.code == 0
    for word in (
        "serve",
        "db",
        "spool",
        "demo",
        "keygen",
        "health",
        "token",
        "ENCRYPTION_KEY",
        "ENCRYPTION_KEYS_RETIRED",
    ):
        assert word in finished.out


@pytest.mark.parametrize(
    "arguments",
    [["serve", "--no-such-option"], ["serve", "stray"], ["no-such-command"], ["db", "drop"], ["keygen", "x"]],
)
async def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    finished = await keyturn(*arguments)
    assert finished.code == 2
    assert arguments[-1].lstrip("-") in finished.out + finished.err


async def test_keygen_prints_a_key_that_is_accepted_and_nothing_else() -> None:
    first, second = await asyncio.gather(keyturn("keygen"), keyturn("keygen"))
    assert first.code == 0
    assert re.fullmatch(r"[0-9a-f]{64}\n", first.out)
    assert first.out != second.out
    key = parse_master_key(first.out.strip(), name="ENCRYPTION_KEY")
    assert key.id in first.err
    assert not key.is_weak
    assert first.out.strip() not in first.err


async def test_migrate_brings_an_empty_database_up_to_date_once(empty_database: str) -> None:
    first = await keyturn("db", "migrate", KEYTURN_DATABASE_URL=empty_database)
    again = await keyturn("db", "migrate", KEYTURN_DATABASE_URL=empty_database)
    assert (first.code, again.code) == (0, 0)
    assert first.out.splitlines()[0] == "applied 0001 schema"
    assert again.out == "up to date\n"


async def test_many_at_once_migrate_one_database_once(empty_database: str) -> None:
    ends = await asyncio.gather(
        *(keyturn("db", "migrate", KEYTURN_DATABASE_URL=empty_database) for _ in range(3))
    )
    assert [finished.code for finished in ends] == [0, 0, 0]
    assert sorted(finished.out.splitlines()[0] for finished in ends) == [
        "applied 0001 schema",
        "up to date",
        "up to date",
    ]


async def test_migrate_starts_and_stops_an_embedded_database() -> None:
    async with temporary_directory() as directory:
        first = await keyturn("db", "migrate", "--embedded", str(directory / "pg"))
        again = await keyturn("db", "migrate", KEYTURN_EMBEDDED=str(directory / "pg"))
    assert (first.code, again.code) == (0, 0)
    assert (first.err, again.err) == ("", "")
    assert again.out == "up to date\n"


SECRET = "Pa55-canary"
DATABASES = {
    "none": ({}, "KEYTURN_DATABASE_URL"),
    "two": (
        {"KEYTURN_DATABASE_URL": f"postgresql://u:{SECRET}@127.0.0.1:1/d", "KEYTURN_EMBEDDED": "/x"},
        "only once",
    ),
    "nobody there": (
        {"KEYTURN_DATABASE_URL": f"postgresql://u:{SECRET}@127.0.0.1:1/d"},
        "The database cannot be reached.",
    ),
    "no socket there": (
        {"KEYTURN_DATABASE_URL": f"postgresql://u:{SECRET}@/d?host=/nonexistent"},
        "The database cannot be reached.",
    ),
    "no url": ({"KEYTURN_DATABASE_URL": f"u:{SECRET}@127.0.0.1"}, "postgresql://"),
    "another scheme": ({"KEYTURN_DATABASE_URL": f"mysql://u:{SECRET}@127.0.0.1/d"}, "postgresql://"),
    "a password that breaks the URL": (
        {"KEYTURN_DATABASE_URL": f"postgresql://u:{SECRET}/#@127.0.0.1:5432/d"},
        "database",
    ),
}
AWAY = {"nobody there", "no socket there"}


@pytest.mark.parametrize("name", DATABASES)
async def test_a_database_that_cannot_be_used_is_a_sentence_and_exit_code_1_or_6(name: str) -> None:
    variables, sentence = DATABASES[name]
    finished = await keyturn("db", "migrate", **variables)
    check_refusal(finished, sentence, code=6 if name in AWAY else 1)
    assert SECRET not in finished.err


def check_refusal(finished: Finished, sentence: str, *, code: int = 1) -> None:
    """Raises AssertionError unless the command ended with `code`, and with that on stderr alone."""
    assert (finished.code, finished.out) == (code, "")
    assert sentence in finished.err
    assert "Traceback" not in finished.err


async def test_a_database_that_refuses_is_named_with_its_reason(database: str) -> None:
    missing = database.replace("/test_", "/missing_")
    stranger = database.replace("keyturn@", f"stranger:{SECRET}@")
    ends = await asyncio.gather(
        *(keyturn("db", "migrate", KEYTURN_DATABASE_URL=url) for url in (missing, stranger))
    )
    for finished, reason in zip(ends, ("does not exist", "stranger"), strict=True):
        check_refusal(finished, "The database refuses us: ")
        assert reason in finished.err
        assert SECRET not in finished.err


OTHER_KEY = "9" * 63 + "8"
MASTER_KEYS = {
    "too short": ({"ENCRYPTION_KEY": MASTER_KEY[:-1]}, "ENCRYPTION_KEY has 63 characters"),
    "a line end": ({"ENCRYPTION_KEY": f"{MASTER_KEY}\n"}, "ENCRYPTION_KEY has whitespace"),
    "retired, and base64": (
        {
            "ENCRYPTION_KEY": OTHER_KEY,
            "ENCRYPTION_KEYS_RETIRED": f"{'7' * 64},P4ocXnudIEaowOL0FjdYudp8Hj9bCSSGfay+HzBSdJY=",
        },
        "ENCRYPTION_KEYS_RETIRED[1] has 44 characters",
    ),
    "retired alone": ({"ENCRYPTION_KEYS_RETIRED": MASTER_KEY}, "ENCRYPTION_KEY is not"),
    "the same twice": (
        {"ENCRYPTION_KEY": MASTER_KEY, "ENCRYPTION_KEYS_RETIRED": MASTER_KEY},
        "ENCRYPTION_KEYS_RETIRED[0] is the same key as ENCRYPTION_KEY",
    ),
}


@pytest.mark.parametrize("name", MASTER_KEYS)
async def test_master_keys_that_cannot_be_used_are_named_and_never_printed(name: str, database: str) -> None:
    variables, problem = MASTER_KEYS[name]
    async with temporary_directory() as directory:
        finished = await keyturn(
            *("serve", "--listen", f"unix:{directory}/a/s"), KEYTURN_DATABASE_URL=database, **variables
        )
    check_refusal(finished, problem)
    for value in variables.values():
        assert not any(part[1:-1] in finished.err for part in value.strip().split(","))


SETTINGS = {
    "KEYTURN_LOG_LEVEL": "shout-canary",
    "KEYTURN_REFLECTION": "perhaps-canary",
    "KEYTURN_HOLD_TTL": "canary",
    "KEYTURN_DEFAULT_HOLD_MICROS": "-1234567",
    "KEYTURN_DATABASE_CONNECTIONS": "1.51234567",
    "KEYTURN_DRAIN_TIMEOUT": "-1234567",
}


async def test_settings_that_make_no_sense_are_all_named_without_their_values(database: str) -> None:
    finished = await keyturn("serve", KEYTURN_DATABASE_URL=database, **SETTINGS)
    for variable in SETTINGS:
        check_refusal(finished, f"{variable}: ")
    assert "canary" not in finished.err
    assert "1234567" not in finished.err


async def test_token_prints_a_token_once_and_the_entry_that_takes_it() -> None:
    first, second = await asyncio.gather(
        *(keyturn("token", "web", "--role", "gateway", "--role", "viewer") for _ in range(2))
    )
    assert first.code == 0
    assert re.fullmatch(r"kta_[A-Za-z0-9_-]{43}\n", first.out)
    assert first.out != second.out
    token = first.out.strip()
    assert token not in first.err
    file = File(path=Path("/access.toml"), mode=0o600, owner=0, contents=first.err.encode())
    assert parse_callers(file).by_token[digest_of(token)].name == "token:web"


async def test_a_token_for_no_role_or_an_unusable_name_is_not_made() -> None:
    none, unknown, name = await asyncio.gather(
        keyturn("token", "web"),
        keyturn("token", "web", "--role", "king"),
        keyturn("token", "we b", "--role", "gateway"),
    )
    assert (none.code, unknown.code, name.code) == (2, 2, 1)
    for finished in (none, unknown, name):
        assert "kta_" not in finished.out + finished.err


async def test_health_ends_with_1_where_nobody_is_and_says_so() -> None:
    async with temporary_directory() as directory:
        away = f"unix:{directory}/s"
        cases = {
            ("--address", away): "UNAVAILABLE",
            ("--address", "nonsense"): "write unix:PATH or HOST:PORT",
            ("--address", "example.com:1"): "is not this machine",
            ("--address", away, "--token-file", f"{directory}/none"): "none: cannot be read",
            ("--address", away, "--ca", f"{directory}/none"): "none: cannot be read",
        }
        ends = await asyncio.gather(*(keyturn("health", *options) for options in cases))
        spaces = await keyturn("health", "--address", away, KEYTURN_TOKEN="kta_se cret")
    for finished, reason in zip([*ends, spaces], [*cases.values(), "a token is printable"], strict=True):
        assert finished.code == 1
        assert reason in finished.err
        assert "Traceback" not in finished.err
        assert "se cret" not in finished.err


async def test_health_tells_what_the_sidecar_says_of_a_name(sidecar: Sidecar) -> None:
    well, unknown = await asyncio.gather(
        keyturn("health", "keyturn.push", KEYTURN_ADDRESS=sidecar.address),
        keyturn("health", "no.such.Service", KEYTURN_ADDRESS=sidecar.address),
    )
    assert (well.code, well.out) == (0, "SERVING\n")
    assert unknown.code == 1
    assert "NOT_FOUND" in unknown.err
