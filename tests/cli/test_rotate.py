"""`keyturn keys rotate`: what it prints, how it ends, and where it finds the database."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import asyncpg

from keyturn_server.keys.envelope import open_sealed
from keyturn_server.keys.keyring import Keyring, parse_master_key
from tests.cli.command import Finished, embedded, environment_of, inside, keyturn
from tests.factories import KEYRING, Connection, Factory, legacy_sealed
from tests.support import MASTER_KEY, eventually, temporary_directory

NEW_KEY = "b7e151628aed2a6abf7158809cf4f3c762e7160f38b4da56a784d9045190cfef"
NEW = parse_master_key(NEW_KEY, name="new").id
OLD = KEYRING.current.id
SECRET = "sk-test-canary0123456789"


async def rotate(*arguments: str, database: str, **variables: str) -> Finished:
    """The command with the new key set and the old one retired; it shows no key and no secret."""
    keys = {"ENCRYPTION_KEY": NEW_KEY, "ENCRYPTION_KEYS_RETIRED": MASTER_KEY, **variables}
    finished = await keyturn("keys", "rotate", *arguments, KEYTURN_DATABASE_URL=database, **keys)
    for hidden in (NEW_KEY, MASTER_KEY, SECRET, "Traceback"):
        assert hidden not in finished.out + finished.err
    return finished


async def three_keys(make: Factory) -> str:
    user = await make.user(name="u1")
    await make.key(user, secret=SECRET)
    await make.key(user, "anthropic", secret=SECRET)
    await make.key(user, encrypted_key=legacy_sealed(SECRET))
    return user


async def resting(sql: Connection) -> set[str]:
    rows = await sql.fetch("SELECT DISTINCT keyturn_master_key_id(encrypted_key) FROM user_api_keys")
    return {row[0] for row in rows}


async def test_it_says_what_it_did_and_that_the_old_key_can_go(
    database: str, make: Factory, sql: Connection
) -> None:
    await three_keys(make)
    finished = await rotate(database=database)
    assert (finished.code, finished.err) == (0, "")
    head, *rest = finished.out.splitlines()
    assert head.startswith(f"Sealed anew under {NEW}: 3 keys, in ")
    assert rest == [
        f"  2 from {OLD}",
        "  1 from legacy",
        "No key is left under another master key.",
        f"Can be removed from ENCRYPTION_KEYS_RETIRED: {OLD}.",
    ]
    assert await resting(sql) == {NEW}
    again = await rotate(database=database)
    assert again.code == 0
    assert again.out.splitlines()[0].startswith(f"Sealed anew under {NEW}: 0 keys")


async def test_a_dry_run_says_it_and_changes_nothing(database: str, make: Factory, sql: Connection) -> None:
    await three_keys(make)
    before = await sql.fetch("SELECT * FROM user_api_keys ORDER BY id")
    finished = await rotate("--dry-run", database=database)
    assert (finished.code, finished.err) == (0, "")
    assert finished.out.splitlines()[0].startswith(f"Would seal anew under {NEW}: 3 keys")
    assert finished.out.splitlines()[1:] == [f"  2 from {OLD}", "  1 from legacy"]
    assert before == await sql.fetch("SELECT * FROM user_api_keys ORDER BY id")


async def test_keys_that_do_not_open_end_with_1_and_are_named(
    database: str, make: Factory, sql: Connection
) -> None:
    user = await three_keys(make)
    broken = await make.key(user, encrypted_key=f"v1.{OLD}.AAAA")
    lost = await make.key(user, encrypted_key=legacy_sealed(SECRET, master_key="c4" * 32))
    finished = await rotate(database=database)
    assert (finished.code, finished.err) == (1, "")
    assert f"  user 'u1', provider 'openai', key {broken}: malformed" in finished.out.splitlines()
    assert f"  user 'u1', provider 'openai', key {lost}: tampered" in finished.out.splitlines()
    assert "Do not open, and stay as they are: 2 keys." in finished.out
    assert f"Left under {OLD}: 1 key." in finished.out
    assert "Left under legacy: 1 key." in finished.out
    assert "Can be removed" not in finished.out
    assert await resting(sql) == {NEW, OLD, "legacy"}


async def test_the_summary_as_json(database: str, make: Factory) -> None:
    user = await three_keys(make)
    broken = await make.key(user, encrypted_key="rubbish")
    rehearsed = await rotate("--json", "--dry-run", database=database)
    finished = await rotate("--json", "--batch", "1", database=database)
    assert (rehearsed.code, finished.code) == (0, 1)
    summary = json.loads(finished.out)
    assert summary.pop("seconds") > 0
    assert summary == {
        "dry_run": False,
        "master_key_id": NEW,
        "found": {OLD: 2, "legacy": 2},
        "sealed_anew": {OLD: 2, "legacy": 1},
        "left": {"legacy": 1},
        "is_done": True,
        "removable": [OLD],
        "sidecars_behind": [],
        "unreadable": [{"master_key_id": "legacy", "cause": "malformed", "keys": 1}],
        "unreadable_keys": [
            {
                "user_id": "u1",
                "key_id": str(broken),
                "provider": "openai",
                "master_key_id": "legacy",
                "cause": "malformed",
            }
        ],
    }
    planned = json.loads(rehearsed.out)
    assert planned["sealed_anew"] == summary["sealed_anew"]
    assert planned["left"] == planned["found"] == summary["found"]


async def test_the_retired_key_that_is_missing_is_named(
    database: str, make: Factory, sql: Connection
) -> None:
    await three_keys(make)
    finished = await rotate(database=database, ENCRYPTION_KEYS_RETIRED="")
    assert finished.code == 1
    assert f"  2 under {OLD}: unknown_key (their master key is not set" in finished.out
    assert await resting(sql) == {OLD, "legacy"}


async def test_without_a_master_key_or_on_a_database_that_is_not_migrated_it_refuses(
    database: str, empty_database: str
) -> None:
    none, empty, no_batch = await asyncio.gather(
        keyturn("keys", "rotate", KEYTURN_DATABASE_URL=database),
        rotate(database=empty_database),
        rotate("--batch", "0", database=database),
    )
    assert (none.code, none.out) == (1, "")
    assert "ENCRYPTION_KEY is not set" in none.err
    assert (empty.code, empty.out) == (1, "")
    assert "lacks migration 0001 (schema)" in empty.err
    assert no_batch.code == 2


async def test_a_database_that_is_not_there_ends_with_6() -> None:
    finished = await rotate(database="postgresql://u:p@127.0.0.1:9/x")
    assert (finished.code, finished.out) == (6, "")
    assert finished.err == "keyturn: The database cannot be reached.\n"


async def on_a_terminal(*arguments: str, **variables: str) -> tuple[int, str]:
    """How a command ends whose stderr is a terminal, and what is shown there."""
    here, there = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "keyturn_server", *arguments),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=there,
        env=environment_of(TERM="xterm", **variables),
    )
    os.close(there)

    def read() -> bytes:
        shown = b""
        with suppress(OSError):  # how a terminal tells that nobody is on it any more
            while part := os.read(here, 65_536):
                shown += part
        return shown

    shown = await asyncio.to_thread(read)
    os.close(here)
    return await process.wait(), shown.decode()


async def test_a_terminal_sees_how_far_it_is(database: str, make: Factory) -> None:
    user = await make.user()
    for _ in range(300):
        await make.key(user)
    code, shown = await on_a_terminal(
        *("keys", "rotate", "--batch", "1"),
        KEYTURN_DATABASE_URL=database,
        ENCRYPTION_KEY=NEW_KEY,
        ENCRYPTION_KEYS_RETIRED=MASTER_KEY,
    )
    assert code == 0
    assert "Sealing anew" in shown
    assert "/300" in shown
    assert "/s" in shown


@asynccontextmanager
async def away(database: str, sql: Connection) -> AsyncIterator[None]:
    """The database lets nobody in but `sql`, and has thrown out everybody else."""
    name = await sql.fetchval("SELECT current_database()")
    elsewhere = await asyncpg.connect(database, database="postgres")
    try:
        await elsewhere.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        await sql.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        yield
    finally:
        await elsewhere.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        await elsewhere.close()


async def test_when_the_database_goes_away_it_says_that_it_can_be_run_again(
    database: str, make: Factory, sql: Connection
) -> None:
    user = await make.user()
    for _ in range(2000):
        await make.key(user)
    running = asyncio.create_task(rotate("--batch", "1", database=database))

    async def has_begun() -> bool:
        return (await resting(sql)) != {OLD}

    await eventually(has_begun)
    async with away(database, sql):
        finished = await running
    assert finished.code == 6
    assert "Run it again: it goes on with the rest." in finished.err
    assert await resting(sql) == {OLD, NEW}
    assert (await rotate(database=database)).code == 0
    assert await resting(sql) == {NEW}


# -- the embedded database ---------------------------------------------------------------------------------


async def make_key(directory: Path) -> None:
    async with inside(directory) as connection:
        make = Factory(connection)
        await make.key(await make.user(name="u1"), secret=SECRET)


async def the_secret(directory: Path) -> str:
    async with inside(directory) as connection:
        row = await connection.fetchrow("SELECT id, encrypted_key FROM user_api_keys")
    assert row is not None
    keyring = Keyring.from_settings(NEW_KEY, [])
    assert keyring is not None
    opened = open_sealed(keyring, row["encrypted_key"], user_id="u1", provider="openai", row_id=row["id"])
    return opened.reveal()


BOTH = {"ENCRYPTION_KEY": NEW_KEY, "ENCRYPTION_KEYS_RETIRED": MASTER_KEY}


async def test_an_embedded_database_is_rotated_while_its_sidecar_runs_and_while_it_does_not() -> None:
    async with temporary_directory() as directory:
        command = ("keys", "rotate", "--embedded", str(directory / "pg"))
        async with embedded(directory):  # under the old key: it makes the database
            await make_key(directory)
            behind = await keyturn(*command, **BOTH)
            assert behind.code == 1
            assert "Restart them with the new key" in behind.err
            assert OLD in behind.err
        down = await keyturn(*command, **BOTH)
        assert (down.code, down.err) == (0, "")
        assert "1 from" in down.out
        async with embedded(directory, **BOTH):
            assert await the_secret(directory) == SECRET
            up = await keyturn(*command, **BOTH)
            assert (up.code, up.err) == (0, "")
            assert "No key is left under another master key." in up.out


async def test_an_embedded_database_that_is_not_there_is_not_made() -> None:
    async with temporary_directory() as directory:
        finished = await keyturn("keys", "rotate", "--embedded", str(directory / "pg"), **BOTH)
        assert (finished.code, finished.out) == (1, "")
        assert f"There is no embedded PostgreSQL in {directory}/pg." in finished.err
        assert not (directory / "pg").exists()
