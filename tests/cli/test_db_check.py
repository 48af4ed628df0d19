"""`keyturn db check`: what it prints, how it ends, and that it shows no secret and makes nothing."""

from __future__ import annotations

import asyncio
import json

import asyncpg
import pytest

from tests.cli.command import embedded, keyturn
from tests.cli.test_commands import AWAY, DATABASES, SECRET, check_refusal
from tests.factories import KEYRING, Connection, Factory
from tests.support import MASTER_KEY, temporary_directory


async def test_a_fit_database_ends_with_0(database: str, make: Factory) -> None:
    await make.key(await make.user(micros=5))
    finished = await keyturn(
        "db", "check", "--deep", KEYTURN_DATABASE_URL=database, ENCRYPTION_KEY=MASTER_KEY
    )
    assert (finished.code, finished.err) == (0, "")
    head, *rest, last = finished.out.splitlines()
    assert head.startswith("PostgreSQL ")
    assert head.endswith(", schema public, as keyturn")
    assert last.startswith("Fit: no problems")
    assert not [line for line in rest if line.startswith("problem")]
    assert f"1 key, all under {KEYRING.current.id}." in finished.out
    assert "balance = sum of transactions holds for everybody." in finished.out
    assert MASTER_KEY not in finished.out


async def test_warnings_alone_end_with_0_and_problems_with_1_and_come_first(
    database: str, sql: Connection
) -> None:
    await sql.execute("DROP INDEX credit_holds_open")
    warned = await keyturn("db", "check", KEYTURN_DATABASE_URL=database)
    await sql.execute("ALTER TABLE user_api_keys DISABLE TRIGGER push_update")
    unfit = await keyturn("db", "check", KEYTURN_DATABASE_URL=database)
    assert (warned.code, unfit.code) == (0, 1)
    assert (warned.err, unfit.err) == ("", "")
    words = [line.split()[0] for line in unfit.out.splitlines()[1:-1]]
    severities = [word for word in words if word in {"problem", "warning", "ok"}]
    assert severities == sorted(severities, key=["problem", "warning", "ok"].index)
    assert severities[0] == "problem"
    assert "→ ALTER TABLE user_api_keys ENABLE TRIGGER push_update" in unfit.out
    assert "→ CREATE INDEX credit_holds_open ON credit_holds" in unfit.out
    assert unfit.out.splitlines()[-1].startswith("Not fit: 1 problem, ")


async def test_the_findings_as_json(database: str, sql: Connection) -> None:
    await sql.execute("ALTER TABLE users DROP COLUMN email")
    finished = await keyturn("db", "check", "--json", KEYTURN_DATABASE_URL=database)
    found = json.loads(finished.out)
    assert (finished.code, finished.err) == (1, "")
    assert found.keys() == {"is_fit", "database", "schema", "role", "server", "findings"}
    assert found["is_fit"] is False
    (problem,) = [one for one in found["findings"] if one["severity"] == "problem"]
    assert problem == {
        "severity": "problem",
        "subject": "users.email",
        "message": "The column is missing; Keyturn needs it as text.",
        "remedy": "ALTER TABLE users ADD COLUMN email text",
    }


async def test_a_products_database_is_not_fit_and_migrate_says_where_to_look(empty_database: str) -> None:
    connection = await asyncpg.connect(empty_database)
    try:
        await connection.execute("CREATE TABLE users (id uuid PRIMARY KEY)")
        check, migrate = await asyncio.gather(
            *(keyturn("db", what, KEYTURN_DATABASE_URL=empty_database) for what in ("check", "migrate"))
        )
        assert check.code == 1
        assert "It is uuid; Keyturn needs text." in check.out
        assert "?options=-csearch_path%3Dkeyturn" in check.out
        check_refusal(migrate, 'Migration 0001 (schema) cannot be applied: relation "users" already exists.')
        assert "`keyturn db check`" in migrate.err
        assert await connection.fetchval("SELECT to_regclass('schema_migrations')") is None
    finally:
        await connection.close()


@pytest.mark.parametrize("name", DATABASES)
async def test_a_database_that_cannot_be_looked_at_is_a_sentence_and_exit_code_1_or_6(name: str) -> None:
    variables, sentence = DATABASES[name]
    finished = await keyturn("db", "check", **variables)
    check_refusal(finished, sentence, code=6 if name in AWAY else 1)
    assert SECRET not in finished.err


async def test_the_password_in_the_url_is_never_shown(database: str) -> None:
    url = database.replace("keyturn@", f"keyturn:{SECRET}@")
    for arguments in ((), ("--json",)):
        finished = await keyturn("db", "check", *arguments, KEYTURN_DATABASE_URL=url)
        assert finished.code == 0
        assert SECRET not in finished.out + finished.err


async def test_an_embedded_database_is_looked_at_while_its_sidecar_runs_and_while_it_does_not() -> None:
    async with temporary_directory() as directory:
        command = ("db", "check", "--embedded", str(directory / "pg"))
        none = await keyturn(*command)
        check_refusal(none, f"There is no embedded PostgreSQL in {directory}/pg.")
        assert not (directory / "pg").exists()
        async with embedded(directory):
            up = await keyturn(*command)
        down = await keyturn(*command)
        assert (up.code, up.err, down.code, down.err) == (0, "", 0, "")
        for finished in (up, down):
            assert finished.out.splitlines()[-1] == "Fit: no problems, no warnings."
