"""Migrations: whole or not at all, once, in order; and what the schema promises about money and spreading."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import asyncpg
import pytest
import pytest_asyncio

from keyturn_server.errors import StoreUnavailable
from keyturn_server.store.migrate import Migration, MigrationError, migrate, shipped_migrations
from tests.factories import Connection
from tests.support import eventually

SHIPPED = shipped_migrations()
NEXT = SHIPPED[-1].version + 1

# Everything that a migration makes, as sorted text.
_SCHEMA = """
SELECT format('column %s.%s %s null=%s default=%s generated=%s', table_name, column_name, data_type,
              is_nullable, column_default, generation_expression)
  FROM information_schema.columns WHERE table_schema = 'public'
UNION ALL
SELECT format('constraint %s %s %s', conrelid::regclass, conname, pg_get_constraintdef(oid))
  FROM pg_constraint WHERE connamespace = 'public'::regnamespace
UNION ALL
SELECT 'index ' || indexdef FROM pg_indexes WHERE schemaname = 'public'
UNION ALL
SELECT 'trigger ' || pg_get_triggerdef(t.oid) FROM pg_trigger t WHERE NOT t.tgisinternal
UNION ALL
SELECT 'function ' || pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = 'public'::regnamespace
UNION ALL
SELECT format('type %s.%s %s', c.relname, a.attname, format_type(a.atttypid, a.atttypmod))
  FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
 WHERE c.relkind = 'c' AND c.relnamespace = 'public'::regnamespace AND a.attnum > 0
UNION ALL
SELECT format('storage %s %s', oid::regclass, reloptions) FROM pg_class
 WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
UNION ALL
SELECT format('migration %s %s %s', version, name, checksum) FROM schema_migrations
UNION ALL
SELECT format('flag %s %s %s', key, is_enabled, min_tier) FROM feature_flags
ORDER BY 1
"""


async def schema(connection: Connection) -> list[str]:
    return [str(row[0]) for row in await connection.fetch(_SCHEMA)]


@pytest_asyncio.fixture
async def empty(empty_database: str) -> AsyncIterator[Connection]:
    """A connection to the empty database."""
    connection: Connection = await asyncpg.connect(empty_database)
    yield connection
    await connection.close()


async def test_migrated_step_by_step_is_the_same_as_fresh(
    empty_database: str, empty: Connection, sql: Connection
) -> None:
    for count in range(1, len(SHIPPED) + 1):
        assert await migrate(empty_database, SHIPPED[:count]) == [SHIPPED[count - 1]]
    assert await schema(empty) == await schema(sql)
    assert await migrate(empty_database) == []


def test_the_shipped_migrations_are_numbered_without_a_gap() -> None:
    assert [migration.version for migration in SHIPPED] == list(range(1, len(SHIPPED) + 1))
    assert len({migration.name for migration in SHIPPED}) == len(SHIPPED)


async def test_ten_at_once_on_an_empty_database_apply_each_migration_once(
    empty_database: str, empty: Connection, sql: Connection
) -> None:
    applied = await asyncio.gather(*(migrate(empty_database) for _ in range(10)))
    assert sorted(len(each) for each in applied) == [*[0] * 9, len(SHIPPED)]
    assert await schema(empty) == await schema(sql)


async def test_an_applied_migration_that_was_edited_is_refused_by_name(
    database: str, sql: Connection
) -> None:
    before = await schema(sql)
    for index, migration in enumerate(SHIPPED):
        edited = [*SHIPPED]
        edited[index] = replace(migration, sql=migration.sql + "\n-- a harmless remark")
        more = Migration(version=NEXT, name="more", sql="CREATE TABLE more ()")
        with pytest.raises(MigrationError, match=rf"Migration {migration.version} \({migration.name}\)"):
            await migrate(database, [*edited, more])
    assert await schema(sql) == before


async def test_a_database_of_a_newer_release_is_refused(database: str, sql: Connection) -> None:
    newer = Migration(version=NEXT, name="newer", sql="CREATE TABLE newer ()")
    assert await migrate(database, [*SHIPPED, newer]) == [newer]
    before = await schema(sql)
    with pytest.raises(MigrationError, match=f"has migration {NEXT}, .* newer release"):
        await migrate(database)
    assert await schema(sql) == before


FIRST = Migration(version=NEXT, name="first", sql="CREATE TABLE first_one ()")
WHOLE = Migration(version=NEXT + 1, name="half", sql="CREATE TABLE half (); CREATE TABLE rest ()")
SLOW = replace(WHOLE, sql="CREATE TABLE half (); SELECT pg_sleep(600); CREATE TABLE rest ()")
BROKEN = {
    "in the middle": replace(WHOLE, sql="CREATE TABLE half (); SELECT 1 / 0; CREATE TABLE rest ()"),
    # It runs to its end, and then cannot be written down.
    "at the end": replace(
        WHOLE, sql=f"CREATE TABLE half (); INSERT INTO schema_migrations VALUES ({NEXT + 1}, '', '')"
    ),
}


async def nothing_half_done(database: str, sql: Connection) -> None:
    """Raises AssertionError unless the first is there, nothing of the second, and the second can be run."""
    assert await sql.fetchval("SELECT to_regclass('first_one')") is not None
    assert await sql.fetchval("SELECT to_regclass('half')") is None
    assert await sql.fetchval("SELECT max(version) FROM schema_migrations") == NEXT
    assert await migrate(database, [*SHIPPED, FIRST, WHOLE]) == [WHOLE]
    assert await sql.fetchval("SELECT to_regclass('rest')") is not None


@pytest.mark.parametrize("where", BROKEN)
async def test_a_migration_that_fails_leaves_nothing_half_done(
    database: str, sql: Connection, where: str
) -> None:
    with pytest.raises(asyncpg.PostgresError):
        await migrate(database, [*SHIPPED, FIRST, BROKEN[where]])
    await nothing_half_done(database, sql)


@pytest.mark.parametrize("how", ["its connection is killed", "it is cancelled"])
async def test_a_migration_that_is_interrupted_leaves_nothing_half_done(
    database: str, sql: Connection, how: str
) -> None:
    running = asyncio.create_task(migrate(database, [*SHIPPED, FIRST, SLOW]))

    async def sleeper() -> int | None:
        pid: int | None = await sql.fetchval(
            "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
        )
        return pid

    pid = await eventually(sleeper)
    if how == "it is cancelled":
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    else:
        await sql.execute("SELECT pg_terminate_backend($1)", pid)
        with pytest.raises(StoreUnavailable):
            await running
    await nothing_half_done(database, sql)


async def test_only_providers_that_are_where_they_were_shipped_are_checked(
    empty_database: str, empty: Connection
) -> None:
    await migrate(empty_database, SHIPPED[:2])
    await empty.execute("UPDATE api_providers SET base_url = 'https://llm.example/v1' WHERE id = 'openai'")
    await empty.execute(
        "INSERT INTO api_providers (id, name, base_url) VALUES ('acme', 'Acme', 'https://a.example')"
    )
    await migrate(empty_database)
    unchecked = await empty.fetch("SELECT id FROM api_providers WHERE check_path IS NULL ORDER BY id")
    assert [row["id"] for row in unchecked] == ["acme", "openai"]


# -- what the schema promises ---------------------------------------------------------------------------

HOT = {
    "user_api_keys",
    "api_key_usage",
    "credit_accounts",
    "credit_holds",
    "credit_transactions",
    "handle_redemptions",
}
_KEYS = """
SELECT i.indrelid::regclass::text AS table_name, i.indisprimary, i.indexrelid::regclass::text AS name,
       (SELECT attname FROM pg_attribute WHERE attrelid = i.indrelid AND attnum = i.indkey[0]) AS leading
  FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid
 WHERE c.relnamespace = 'public'::regnamespace AND i.indisunique
"""


async def test_every_hot_tables_unique_keys_lead_with_the_user(sql: Connection) -> None:
    with_user = await sql.fetch(
        "SELECT table_name FROM information_schema.columns "
        "WHERE column_name = 'user_id' AND table_schema = 'public'"
    )
    assert {row["table_name"] for row in with_user} >= HOT
    keys = await sql.fetch(_KEYS)
    for row in with_user:
        mine = [key for key in keys if key["table_name"] == row["table_name"]]
        assert any(key["indisprimary"] for key in mine), f"{row['table_name']} has no primary key"
        assert {key["leading"] for key in mine} == {"user_id"}, mine


async def test_money_is_whole_micros_and_what_is_numeric_is_generated(sql: Connection) -> None:
    columns = await sql.fetch(
        "SELECT table_name, column_name, data_type, is_generated FROM information_schema.columns "
        "WHERE table_schema = 'public'"
    )
    micros = [column for column in columns if "micros" in column["column_name"]]
    assert len(micros) > 10
    assert {column["data_type"] for column in micros} == {"bigint"}
    assert not [column for column in columns if column["data_type"] in {"real", "double precision", "money"}]
    numeric = [column for column in columns if column["data_type"] == "numeric"]
    assert {column["column_name"] for column in numeric} == {
        "cost_cents",
        "balance_after",
        "estimated_cost_cents",
    }
    assert {column["is_generated"] for column in numeric} == {"ALWAYS"}


NAN_WRITES = {
    "a generated column": "UPDATE credit_transactions SET cost_cents = 'NaN'",
    "another": "UPDATE api_key_usage SET estimated_cost_cents = 'NaN'",
    "a balance": "UPDATE credit_accounts SET balance_micros = 'NaN'",
    "a balance, by way of numeric": "UPDATE credit_accounts SET balance_micros = 'NaN'::numeric",
    "a balance, by way of a float": "UPDATE credit_accounts SET balance_micros = 'Infinity'::float8",
    "a grant": "SELECT keyturn_grant_credits(gen_random_uuid(), 'u', 'NaN'::numeric::bigint, NULL, '')",
    "a price": "INSERT INTO model_prices VALUES ('openai', 'm', 'NaN'::numeric, 0)",
}


@pytest.mark.parametrize("name", NAN_WRITES)
async def test_not_a_number_cannot_be_written_anywhere(sql: Connection, name: str) -> None:
    await sql.execute("INSERT INTO users (id) VALUES ('u')")
    with pytest.raises(asyncpg.PostgresError) as caught:
        await sql.execute(NAN_WRITES[name])
    assert isinstance(
        caught.value,
        asyncpg.GeneratedAlwaysError
        | asyncpg.InvalidTextRepresentationError
        | asyncpg.NumericValueOutOfRangeError
        | asyncpg.FeatureNotSupportedError,
    )


async def test_a_flag_changed_by_plain_sql_is_in_the_audit(sql: Connection) -> None:
    await sql.execute("UPDATE feature_flags SET is_enabled = true WHERE key = 'byok_only_mode'")
    await sql.execute("UPDATE feature_flags SET is_enabled = is_enabled")
    await sql.execute("DELETE FROM feature_flags WHERE key = 'byok_only_mode'")
    rows = await sql.fetch(
        "SELECT old_value ->> 'is_enabled' AS old, new_value ->> 'is_enabled' AS new, changed_by "
        "FROM feature_flag_changes WHERE key = 'byok_only_mode' ORDER BY id"
    )
    assert [(row["old"], row["new"]) for row in rows] == [("false", "true"), ("true", None)]
    assert {row["changed_by"] for row in rows} == {"sql:keyturn"}
