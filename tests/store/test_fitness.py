"""Whether a database is fit: each thing that can be wrong with one, and that nothing is written to it."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import asyncpg
import pytest

from keyturn_server.keys.keyring import Keyring
from keyturn_server.store.comparison import Finding, Severity
from keyturn_server.store.embedded import EmbeddedPostgres
from keyturn_server.store.fitness import Checkup, check_database
from keyturn_server.store.migrate import MigrationError, migrate, shipped_migrations
from keyturn_server.store.schema import as_text, described, from_text
from tests.conftest import database_in
from tests.factories import KEYRING, Connection, Factory, legacy_sealed
from tests.refusals import contents
from tests.schema import WRITTEN, made_by_migrations
from tests.support import MASTER_KEY, running_sidecar

PROBLEM, WARNING, OK = Severity.PROBLEM, Severity.WARNING, Severity.OK
SHIPPED = shipped_migrations()
OWN_SCHEMA = "&options=-csearch_path%3Dkeyturn"


async def checked(
    dsn: str, *, keyring: Keyring | None = KEYRING, deep: bool = False, connections: int = 8
) -> Checkup:
    return await check_database(
        dsn,
        connections=connections,
        keyring=keyring,
        deep=deep,
        connect_timeout=timedelta(seconds=10),
        statement_timeout=timedelta(seconds=60),
    )


def told(checkup: Checkup, *severities: Severity) -> list[tuple[Severity, str]]:
    """What there is to tell of, but for what this machine's PostgreSQL does for speed."""
    return [
        (one.severity, one.subject)
        for one in checkup.findings
        if one.severity in (severities or (PROBLEM, WARNING)) and one.subject != "fsync"
    ]


def of(checkup: Checkup, subject: str) -> Finding:
    """The one finding of that subject that is not fine."""
    (found,) = [one for one in checkup.findings if one.subject == subject and one.severity is not OK]
    return found


# -- the description -----------------------------------------------------------------------------------


async def test_the_written_description_is_what_the_migrations_make(empty_database: str) -> None:
    made = as_text(await made_by_migrations(empty_database))
    assert WRITTEN.read_text() == made, "run `make schema`"
    assert as_text(from_text(made)) == made


async def test_the_description_leaves_out_no_kind_of_object(sql: Connection) -> None:
    schema = await sql.fetchval("SELECT 'public'::regnamespace::oid")
    found = await described(sql, schema)
    counts = await sql.fetchrow(
        """
        SELECT (SELECT count(*) FROM pg_proc WHERE pronamespace = $1::oid) AS function,
               (SELECT count(*) FROM pg_class
                 WHERE relnamespace = $1::oid AND relkind NOT IN ('i', 'S', 'c')) AS table,
               (SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal) AS trigger,
               (SELECT count(*) FROM pg_class WHERE relnamespace = $1::oid AND relkind = 'i')
               - (SELECT count(*) FROM pg_constraint
                   WHERE connamespace = $1::oid AND contype IN ('p', 'u', 'x')) AS index
        """,
        schema,
    )
    assert counts is not None
    for kind, count in counts.items():
        assert sum(name.kind == kind for name in found) == count > 0, kind


# -- fit -----------------------------------------------------------------------------------------------


async def test_a_migrated_database_is_fit(database: str, make: Factory) -> None:
    user = await make.user(micros=1_000)
    await make.key(user)
    checkup = await checked(database, deep=True)
    assert (checkup.is_fit, told(checkup)) == (True, [])
    assert (checkup.schema, checkup.role) == ("public", "keyturn")
    assert {"migrations", "schema", "role", "LISTEN", "flags", "master keys", "money"} <= {
        one.subject for one in checkup.findings
    }


async def test_an_empty_database_is_fit_and_stays_empty(empty_database: str) -> None:
    checkup = await checked(empty_database)
    assert checkup.is_fit
    assert told(checkup) == [(WARNING, "migrations")]
    assert all(f"{one.version:04d} ({one.name})" in of(checkup, "migrations").message for one in SHIPPED)
    connection: Connection = await asyncpg.connect(empty_database)
    try:
        assert await contents(connection) == {}
    finally:
        await connection.close()


@pytest.mark.parametrize("count", range(1, len(SHIPPED)))
async def test_a_half_migrated_database_is_fit_and_says_what_is_to_come(
    empty_database: str, count: int
) -> None:
    await migrate(empty_database, SHIPPED[:count])
    checkup = await checked(empty_database)
    assert told(checkup) == [(WARNING, "migrations")]
    assert SHIPPED[count - 1].name not in of(checkup, "migrations").message
    assert SHIPPED[count].name in of(checkup, "migrations").message


async def test_looking_changes_nothing(database: str, sql: Connection, make: Factory) -> None:
    await make.key(await make.user(micros=5))
    await sql.execute("DROP INDEX credit_holds_open; ALTER TABLE users ADD COLUMN note numeric")
    schema = await sql.fetchval("SELECT 'public'::regnamespace::oid")
    before = await contents(sql), await described(sql, schema)
    await checked(database, deep=True)
    assert (await contents(sql), await described(sql, schema)) == before


# -- the schema ----------------------------------------------------------------------------------------

DAMAGE: dict[str, tuple[str, Severity, str, str]] = {
    "a column is gone": (
        "ALTER TABLE users DROP COLUMN email",
        PROBLEM,
        "users.email",
        "The column is missing; Keyturn needs it as text.",
    ),
    "a column with a default is gone": (
        "ALTER TABLE user_api_keys DROP COLUMN total_tokens",
        PROBLEM,
        "user_api_keys.total_tokens",
        "missing",
    ),
    "a generated column is gone": (
        "ALTER TABLE api_key_usage DROP COLUMN estimated_cost_cents",
        PROBLEM,
        "api_key_usage.estimated_cost_cents",
        "missing",
    ),
    "a table is gone": ("DROP TABLE handle_redemptions", PROBLEM, "handle_redemptions", "missing"),
    "a table is a view": (
        "ALTER TABLE model_prices RENAME TO prices; CREATE VIEW model_prices AS SELECT * FROM prices",
        PROBLEM,
        "model_prices",
        "It is a view; Keyturn needs a table.",
    ),
    "a column has another type": (
        "ALTER TABLE feature_flags ALTER COLUMN sort_order TYPE text",
        PROBLEM,
        "feature_flags.sort_order",
        "It is text; Keyturn needs integer.",
    ),
    "a column has a type that does as well": (
        "ALTER TABLE users ALTER COLUMN email TYPE varchar(90)",
        WARNING,
        "users.email",
        "It is character varying(90); Keyturn makes it text.",
    ),
    "a column takes more": (
        "ALTER TABLE subscription_tiers ALTER COLUMN rank TYPE bigint",
        WARNING,
        "subscription_tiers.rank",
        "bigint",
    ),
    "a column takes less": (
        "ALTER TABLE credit_accounts ALTER COLUMN balance_micros TYPE integer",
        PROBLEM,
        "credit_accounts.balance_micros",
        "It is integer; Keyturn needs bigint.",
    ),
    "a column may be empty": (
        "ALTER TABLE credit_holds ALTER COLUMN model DROP NOT NULL",
        WARNING,
        "credit_holds.model",
        "It may be NULL",
    ),
    "a column must not be empty": (
        "ALTER TABLE users ALTER COLUMN email SET NOT NULL",
        PROBLEM,
        "users.email",
        "It is NOT NULL; Keyturn may leave it empty.",
    ),
    "a default is gone": (
        "ALTER TABLE users ALTER COLUMN created_at DROP DEFAULT",
        PROBLEM,
        "users.created_at",
        "Its default is missing; Keyturn relies on now().",
    ),
    "a default is another": (
        "ALTER TABLE users ALTER COLUMN subscription_tier SET DEFAULT 'gold'",
        WARNING,
        "users.subscription_tier",
        "Its default is 'gold'::text; Keyturn relies on 'free'::text.",
    ),
    "a column is generated no more": (
        "ALTER TABLE credit_transactions ALTER COLUMN cost_cents DROP EXPRESSION",
        PROBLEM,
        "credit_transactions.cost_cents",
        "It must be generated, as CASE WHEN",
    ),
    "numbers are given no more": (
        "ALTER TABLE feature_flag_changes ALTER COLUMN id DROP IDENTITY",
        PROBLEM,
        "feature_flag_changes.id",
        "identity",
    ),
    "an extra column must be filled": (
        "ALTER TABLE users ADD COLUMN name text NOT NULL",
        PROBLEM,
        "users.name",
        "Keyturn's inserts would fail",
    ),
    "a primary key is gone": (
        "ALTER TABLE credit_accounts DROP CONSTRAINT credit_accounts_pkey",
        PROBLEM,
        "credit_accounts.credit_accounts_pkey",
        "PRIMARY KEY (user_id)",
    ),
    "a check is gone": (
        "ALTER TABLE credit_accounts DROP CONSTRAINT credit_accounts_held_micros_check",
        PROBLEM,
        "credit_accounts.credit_accounts_held_micros_check",
        "CHECK ((held_micros >= 0))",
    ),
    "a check is another": (
        (
            "ALTER TABLE credit_accounts DROP CONSTRAINT credit_accounts_held_micros_check,"
            " ADD CONSTRAINT credit_accounts_held_micros_check CHECK (held_micros >= -1)"
        ),
        PROBLEM,
        "credit_accounts.credit_accounts_held_micros_check",
        "'-1'::integer)); Keyturn needs CHECK ((held_micros >= 0))",
    ),
    "an extra check": (
        "ALTER TABLE users ADD CONSTRAINT shouting CHECK (email = upper(email))",
        WARNING,
        "users.shouting",
        "may refuse what Keyturn writes",
    ),
    "a check that old rows were not held against": (
        (
            "ALTER TABLE credit_accounts DROP CONSTRAINT credit_accounts_held_micros_check,"
            " ADD CONSTRAINT credit_accounts_held_micros_check CHECK (held_micros >= 0) NOT VALID"
        ),
        PROBLEM,
        "credit_accounts.credit_accounts_held_micros_check",
        "NOT VALID",
    ),
    "an index is gone": ("DROP INDEX credit_holds_open", WARNING, "credit_holds.credit_holds_open", "slower"),
    "a unique index is gone": (
        "DROP INDEX credit_holds_by_request",
        PROBLEM,
        "credit_holds.credit_holds_by_request",
        "twins are not refused",
    ),
    "a unique index is unique no more": (
        (
            "DROP INDEX credit_holds_by_request;"
            "CREATE INDEX credit_holds_by_request ON credit_holds (user_id, request_id)"
        ),
        PROBLEM,
        "credit_holds.credit_holds_by_request",
        "Keyturn needs CREATE UNIQUE INDEX",
    ),
    "an extra unique index": (
        "CREATE UNIQUE INDEX one_email ON users (lower(email))",
        WARNING,
        "users.one_email",
        "may refuse",
    ),
    "a trigger is gone": (
        "DROP TRIGGER push_update ON user_api_keys",
        PROBLEM,
        "user_api_keys.push_update",
        "The trigger is missing",
    ),
    "a trigger is disabled": (
        "ALTER TABLE feature_flags DISABLE TRIGGER audit",
        PROBLEM,
        "feature_flags.audit",
        "The trigger is disabled.",
    ),
    "a trigger fires at another time": (
        (
            "DROP TRIGGER push ON feature_flags; CREATE TRIGGER push AFTER INSERT ON feature_flags "
            "FOR EACH STATEMENT EXECUTE FUNCTION keyturn_push_configuration()"
        ),
        PROBLEM,
        "feature_flags.push",
        "Keyturn needs CREATE TRIGGER push AFTER INSERT OR DELETE OR UPDATE OR TRUNCATE",
    ),
    "an extra trigger": (
        "CREATE TRIGGER more AFTER INSERT ON users FOR EACH ROW EXECUTE FUNCTION keyturn_open_account()",
        WARNING,
        "users.more",
        "runs with Keyturn's statements",
    ),
    "a function is gone": (
        "DROP FUNCTION keyturn_forget(integer)",
        PROBLEM,
        "keyturn_forget(integer)",
        "The function is missing, which migration 0002 (ledger) made.",
    ),
    "a function has another body": (
        (
            "CREATE OR REPLACE FUNCTION keyturn_touch() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN RETURN NEW; END'"
        ),
        PROBLEM,
        "keyturn_touch()",
        "The function is not what migration 0001 (schema) made.",
    ),
    "a function plans otherwise": (
        "ALTER FUNCTION keyturn_lock_accounts(text[], boolean) RESET ALL",
        PROBLEM,
        "keyturn_lock_accounts(text[], boolean)",
        "not what migration 0002 (ledger) made",
    ),
    "a table is not logged": (
        "ALTER TABLE credit_transactions SET UNLOGGED",
        PROBLEM,
        "credit_transactions",
        "It is UNLOGGED: a crash of the server empties it.",
    ),
    "a rule": (
        'CREATE RULE "Quiet" AS ON INSERT TO api_key_usage DO INSTEAD NOTHING',
        PROBLEM,
        "api_key_usage.Quiet",
        "what Keyturn writes may be dropped or changed",
    ),
    "a type has one more": (
        "ALTER TYPE keyturn_settlement ADD ATTRIBUTE more text",
        PROBLEM,
        "keyturn_settlement",
        "The type is not what",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
async def test_damage_is_named_and_what_is_to_be_done_repairs_it(
    database: str, sql: Connection, name: str
) -> None:
    damage, severity, subject, message = DAMAGE[name]
    async with sql.transaction():
        await sql.execute(damage)
    checkup = await checked(database)
    assert told(checkup) == [(severity, subject)]
    found = of(checkup, subject)
    assert message in found.message
    assert checkup.is_fit == (severity is WARNING)
    if found.remedy.startswith(("CREATE", "ALTER", "DROP")):
        await sql.execute(found.remedy)
        assert told(await checked(database)) == []


HARMLESS = {
    "an extra column": ("ALTER TABLE users ADD COLUMN name text", "users.name"),
    "an extra column with a default": (
        "ALTER TABLE users ADD COLUMN plan text NOT NULL DEFAULT ''",
        "users.plan",
    ),
    "an extra index": ("CREATE INDEX by_email ON users (email)", "users.by_email"),
    "an extra default": ("ALTER TABLE users ALTER COLUMN email SET DEFAULT ''", "users.email"),
    "a table of somebody else": ("CREATE TABLE orders (id bigint, user_id text)", ""),
    "a function of another signature": (
        "CREATE FUNCTION keyturn_forget(text) RETURNS text LANGUAGE sql AS 'SELECT $1'",
        "",
    ),
}


@pytest.mark.parametrize("name", HARMLESS)
async def test_what_is_extra_and_harmless_is_said_to_be_so(database: str, sql: Connection, name: str) -> None:
    statement, subject = HARMLESS[name]
    await sql.execute(statement)
    checkup = await checked(database)
    assert told(checkup) == []
    if subject:
        assert "harmless" in next(one for one in checkup.findings if one.subject == subject).message


async def test_an_index_whose_making_was_interrupted_is_not_taken_for_one(
    database: str, sql: Connection, make: Factory
) -> None:
    await sql.execute("DROP INDEX credit_transactions_by_request")
    user = await make.user(micros=5)
    for _ in range(2):
        await sql.execute(
            "INSERT INTO credit_transactions (user_id, id, transaction_type, amount_micros, "
            "balance_after_micros, request_id) VALUES ($1, gen_random_uuid(), 'grant', 0, 5, 'twin')",
            user,
        )
    with pytest.raises(asyncpg.UniqueViolationError):
        await sql.execute(
            "CREATE UNIQUE INDEX CONCURRENTLY credit_transactions_by_request "
            "ON credit_transactions (user_id, request_id) WHERE request_id IS NOT NULL"
        )
    found = of(await checked(database), "credit_transactions.credit_transactions_by_request")
    assert found.severity is PROBLEM
    assert "not valid" in found.message
    await sql.execute("DELETE FROM credit_transactions WHERE request_id = 'twin'")
    await sql.execute(found.remedy)
    assert told(await checked(database)) == []


# -- migrations ----------------------------------------------------------------------------------------


async def test_a_migration_with_other_contents_and_one_of_a_newer_release_are_named(
    database: str, sql: Connection
) -> None:
    await sql.execute("UPDATE schema_migrations SET checksum = 'ab' WHERE version = 2")
    checkup = await checked(database)
    assert told(checkup) == [(PROBLEM, "migration 0002 (ledger)")]
    await sql.execute("INSERT INTO schema_migrations (version, name, checksum) VALUES (4711, 'later', '')")
    checkup = await checked(database)
    assert told(checkup, PROBLEM) == [
        (PROBLEM, "migration 0002 (ledger)"),
        (PROBLEM, "migration 4711 (later)"),
    ]
    assert "newer" in of(checkup, "migration 4711 (later)").message


# A product's own tables, of the kinds that products have.
PRODUCT = """
CREATE TABLE users (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), email varchar(255) NOT NULL,
                    plan text NOT NULL, subscription_tier varchar(20) DEFAULT 'free');
CREATE INDEX credit_holds_open ON users (email);
CREATE TABLE feature_flags (id serial PRIMARY KEY, name text, enabled boolean);
CREATE VIEW subscription_tiers AS SELECT 'free' AS name;
CREATE FUNCTION keyturn_touch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
INSERT INTO users (email, plan) VALUES ('a@example.com', 'gold');
"""
IN_THE_WAY = {
    "users": "There is a table of this name, and migration 0001 (schema) makes its own: it would fail.",
    "users.id": "It is uuid; Keyturn needs text.",
    "users.plan": "An extra column that is NOT NULL and has no default: Keyturn's inserts would fail.",
    "users.created_at": "The column is missing; Keyturn needs it as timestamp with time zone.",
    "feature_flags": "There is a table of this name",
    "feature_flags.is_enabled": "The column is missing; Keyturn needs it as boolean.",
    "subscription_tiers": "There is a view of this name",
    "credit_holds.credit_holds_open": "There is an index of users of this name",
    "keyturn_touch()": "There is a function of this name",
}


@asynccontextmanager
async def product(empty_database: str, statements: str = PRODUCT) -> AsyncIterator[Connection]:
    connection: Connection = await asyncpg.connect(empty_database)
    try:
        await connection.execute(statements)
        yield connection
    finally:
        await connection.close()


async def test_a_products_own_tables_are_named_with_what_would_not_do(empty_database: str) -> None:
    async with product(empty_database) as connection:
        before = await contents(connection)
        checkup = await checked(empty_database)
        assert not checkup.is_fit
        problems = {one.subject: one.message for one in checkup.findings if one.severity is PROBLEM}
        for subject, message in IN_THE_WAY.items():
            assert message in problems[subject]
        assert (WARNING, "users.subscription_tier") in told(checkup)
        assert await contents(connection) == before


OBSTACLES = {
    "a table": ("CREATE TABLE users (id uuid)", 'relation "users" already exists'),
    "an index": (
        "CREATE TABLE x (id int); CREATE INDEX credit_holds_open ON x (id)",
        'relation "credit_holds_open" already exists',
    ),
    "a function": (
        "CREATE FUNCTION keyturn_forget(integer) RETURNS int LANGUAGE sql AS 'SELECT 1'",
        'function "keyturn_forget" already exists',
    ),
    "a type": ("CREATE TYPE keyturn_settlement AS (x text)", 'type "keyturn_settlement" already exists'),
    "migrations of another program": (
        "CREATE TABLE schema_migrations (version varchar PRIMARY KEY)",
        "The table schema_migrations is another program's",
    ),
}


@pytest.mark.parametrize("name", OBSTACLES)
async def test_a_migration_that_something_is_in_the_way_of_says_so_and_leaves_nothing_of_itself(
    empty_database: str, name: str
) -> None:
    statements, said = OBSTACLES[name]
    async with product(empty_database, statements) as connection:
        made_before = set(await contents(connection))
        with pytest.raises(MigrationError) as caught:
            await migrate(empty_database)
        assert said in str(caught.value)
        assert "keyturn db check" in str(caught.value)
        assert not (await checked(empty_database)).is_fit
        applied = 0
        if name in {"a function", "a type"}:  # of the second: the first is whole
            applied = 1
            assert await connection.fetchval("SELECT count(*) FROM schema_migrations") == applied
        else:
            assert set(await contents(connection)) == made_before


async def test_a_schema_of_its_own_beside_a_products_tables_is_fit_and_serves(empty_database: str) -> None:
    async with product(empty_database) as connection:
        await connection.execute("CREATE SCHEMA keyturn")
        dsn = empty_database + OWN_SCHEMA
        assert (await checked(dsn)).is_fit
        await migrate(dsn)
        checkup = await checked(dsn, deep=True)
        assert (checkup.schema, told(checkup)) == ("keyturn", [])
        await connection.execute("SET search_path = keyturn")
        make = Factory(connection)
        user = await make.user(micros=1_000_000)
        await make.key(user)
        async with running_sidecar(dsn) as sidecar:
            by_key = await sidecar.decide(user)
            by_credits = await sidecar.decide(user, "anthropic")
            await sidecar.record(by_key, 1)
            await sidecar.record(by_credits, 1)
        assert (by_key.WhichOneof("route"), by_credits.WhichOneof("route")) == ("key", "ticket")
        assert await connection.fetchval("SELECT count(*) FROM credit_transactions") == 2
        assert told(await checked(dsn, deep=True)) == []
        assert await connection.fetchval("SELECT count(*) FROM public.users") == 1


# -- the role and the server ---------------------------------------------------------------------------


async def test_triggers_that_are_switched_off_for_the_database_are_a_problem(
    database: str, sql: Connection
) -> None:
    name = await sql.fetchval("SELECT quote_ident(current_database())")
    await sql.execute(f"ALTER DATABASE {name} SET session_replication_role = local")  # they fire
    assert told(await checked(database)) == []
    await sql.execute(f"ALTER DATABASE {name} SET session_replication_role = replica")
    checkup = await checked(database)
    assert told(checkup) == [(PROBLEM, "session_replication_role")]
    assert "RESET session_replication_role" in of(checkup, "session_replication_role").remedy
    await sql.execute(f"ALTER DATABASE {name} RESET session_replication_role")
    assert told(await checked(database)) == []


@asynccontextmanager
async def as_role(sql: Connection, database: str, grants: str) -> AsyncIterator[str]:
    """The DSN of a role of its own, with these grants (`{}` is its name)."""
    role = f"role_{secrets.token_hex(4)}"
    await sql.execute(f"CREATE ROLE {role} LOGIN; GRANT {role} TO keyturn; {grants.format(role)}")
    try:
        yield f"{database}&role={role}"
    finally:
        await sql.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


ALL_TABLES = "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {}"


async def test_a_role_that_only_reads_is_told_what_it_lacks(database: str, sql: Connection) -> None:
    reads = "GRANT SELECT ON ALL TABLES IN SCHEMA public TO {}"
    async with as_role(sql, database, reads) as dsn:
        checkup = await checked(dsn, deep=True)
        assert not checkup.is_fit
        assert (PROBLEM, "users") in told(checkup)
        assert of(checkup, "users").message == "The role lacks INSERT, UPDATE."
        assert of(checkup, "token_roots").message == "The role lacks INSERT."
        assert "model_prices" not in {subject for _, subject in told(checkup)}
    async with as_role(sql, database, ALL_TABLES) as dsn:
        assert told(await checked(dsn, deep=True)) == []


async def test_a_role_that_may_not_even_read_is_told_so_and_no_more_is_looked_at(
    database: str, sql: Connection
) -> None:
    async with as_role(sql, database, "") as dsn:
        checkup = await checked(dsn, deep=True)
    assert not checkup.is_fit
    assert (PROBLEM, "schema_migrations") in told(checkup)


async def test_a_right_less_on_one_table_does_not_hide_the_rest(
    database: str, sql: Connection, make: Factory
) -> None:
    await make.user("gold")
    without = f"{ALL_TABLES}; REVOKE SELECT ON user_api_keys FROM {{}}"
    async with as_role(sql, database, without.replace("{}", "{0}")) as dsn:
        checkup = await checked(dsn, deep=True)
    assert of(checkup, "user_api_keys").message == "The role lacks SELECT."
    assert "Could not be looked at" in of(checkup, "master keys").message
    assert "'gold'" in of(checkup, "users").message


async def test_a_role_that_cannot_migrate_is_told_so_only_where_there_is_something_to_migrate(
    empty_database: str, database: str, sql: Connection
) -> None:
    async with as_role(sql, database, f"{ALL_TABLES}; REVOKE CREATE ON SCHEMA public FROM PUBLIC") as dsn:
        assert (await checked(dsn)).is_fit
        checkup = await checked(empty_database + dsn.removeprefix(database))
        assert told(checkup, PROBLEM) == [(PROBLEM, "schema public")]
        with pytest.raises(MigrationError, match="permission denied for schema public"):
            await migrate(empty_database + dsn.removeprefix(database))
        assert await migrate(dsn) == []


async def test_rows_that_are_hidden_and_functions_that_are_forbidden_are_problems(
    database: str, sql: Connection
) -> None:
    await sql.execute("ALTER TABLE users ENABLE ROW LEVEL SECURITY")
    await sql.execute("REVOKE EXECUTE ON FUNCTION keyturn_forget FROM PUBLIC")
    async with as_role(sql, database, ALL_TABLES) as dsn:
        checkup = await checked(dsn)
    assert told(checkup) == [(PROBLEM, "users"), (PROBLEM, "keyturn_forget()")]


async def test_settings_of_the_role_that_stand_in_the_way_are_named(database: str, sql: Connection) -> None:
    checkup = await checked(f"{database}&default_transaction_read_only=on&synchronous_commit=off")
    assert told(checkup) == [(PROBLEM, "default_transaction_read_only"), (WARNING, "synchronous_commit")]
    assert told(await checked(f"{database}&idle_session_timeout=60000")) == [
        (WARNING, "idle_session_timeout")
    ]
    checkup = await checked(f"{database}&search_path=nowhere")
    assert (PROBLEM, "schema") in told(checkup)


async def test_too_few_connections_are_told_of(database: str, sql: Connection) -> None:
    free = await sql.fetchval("SELECT 197 - count(*) FROM pg_stat_activity WHERE backend_type LIKE 'client%'")
    # A sidecar takes two beside its pool.
    assert told(await checked(database, connections=free - 1)) == [(WARNING, "max_connections")]
    assert told(await checked(database, connections=500)) == [(PROBLEM, "max_connections")]
    name = await sql.fetchval("SELECT current_database()")
    await sql.execute(f"ALTER DATABASE {name} CONNECTION LIMIT 6")
    assert told(await checked(database)) == [(PROBLEM, "connection limit of the database")]
    assert told(await checked(database, connections=5)) == [(PROBLEM, "connection limit of the database")]
    assert told(await checked(database, connections=4)) == []


async def test_a_database_of_another_encoding_is_refused(cluster: EmbeddedPostgres) -> None:
    name = f"latin_{secrets.token_hex(4)}"
    connection = await asyncpg.connect(cluster.dsn)
    try:
        await connection.execute(
            f"CREATE DATABASE {name} TEMPLATE template0 ENCODING LATIN1 LOCALE 'C' LOCALE_PROVIDER libc"
        )
        checkup = await checked(database_in(cluster, name))
        assert told(checkup, PROBLEM) == [(PROBLEM, "encoding")]
    finally:
        await connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await connection.close()


# -- the rows ------------------------------------------------------------------------------------------


async def test_flags_tiers_and_accounts_that_do_not_fit_are_told_of(
    database: str, sql: Connection, make: Factory
) -> None:
    for tier in ("gold", "gold", "silver", "free"):
        await make.user(tier)
    await sql.execute("DELETE FROM feature_flags WHERE key = 'byok_only_mode'")
    await sql.execute("DELETE FROM credit_accounts WHERE user_id IN (SELECT id FROM users LIMIT 3)")
    checkup = await checked(database)
    assert told(checkup) == [
        (WARNING, "flag byok_only_mode"),
        (WARNING, "users"),
        (WARNING, "users"),
        (WARNING, "credit_accounts"),
    ]
    words = " ".join(one.message for one in checkup.findings)
    assert "2 users of the tier 'gold'" in words
    assert "1 user of the tier 'silver'" in words
    assert "3 users without an account" in words
    await sql.execute("UPDATE feature_flags SET min_tier = 'Premium' WHERE key = 'byok_enabled'")
    assert (PROBLEM, "flag byok_enabled") in told(await checked(database))
    await sql.execute("UPDATE feature_flags SET min_tier = NULL WHERE key = 'byok_enabled'")
    assert (PROBLEM, "flag byok_enabled") not in told(await checked(database))


async def test_keys_of_providers_and_users_that_are_not_there_are_problems(
    database: str, sql: Connection, make: Factory
) -> None:
    await sql.execute(
        "ALTER TABLE user_api_keys DROP CONSTRAINT user_api_keys_provider_fkey, "
        "DROP CONSTRAINT user_api_keys_user_id_fkey"
    )
    await make.key("nobody", "nowhere")
    words = [one.message for one in (await checked(database)).findings if one.subject == "user_api_keys"]
    assert words == [
        "1 key for the provider 'nowhere', which api_providers does not have.",
        "1 key of users that are not there.",
    ]


async def test_the_master_keys_that_stored_keys_rest_under_are_held_against_ours(
    database: str, make: Factory
) -> None:
    new = "b7e151628aed2a6abf7158809cf4f3c762e7160f38b4da56a784d9045190cfef"
    user = await make.user()
    await make.key(user)
    await make.key(user, encrypted_key=legacy_sealed("sk"))

    async def of_keys(*keys: str) -> list[tuple[Severity, str]]:
        keyring = Keyring.from_settings(keys[0], keys[1:]) if keys else None
        checkup = await checked(database, keyring=keyring)
        return [(one.severity, one.message) for one in checkup.findings if one.subject == "master keys"]

    legacy = (WARNING, "1 key in the format of the Node gateways.")
    assert await of_keys(MASTER_KEY) == [legacy]
    assert await of_keys(new, MASTER_KEY) == [
        (WARNING, f"1 key under the retired {KEYRING.current.id}."),
        legacy,
    ]
    assert await of_keys(new) == [
        (PROBLEM, f"1 key under {KEYRING.current.id}, which is not set: they do not open."),
        legacy,
    ]
    ((severity, message),) = await of_keys()
    assert severity is OK
    assert f"1 under {KEYRING.current.id}, 1 under legacy" in message


async def test_not_a_number_in_somebodys_column_is_found(
    database: str, sql: Connection, make: Factory
) -> None:
    await make.user()
    await sql.execute('ALTER TABLE users ADD COLUMN "Sp""ent" numeric DEFAULT 1, ADD COLUMN ratio real')
    assert told(await checked(database)) == []
    await sql.execute("UPDATE users SET \"Sp\"\"ent\" = 'NaN', ratio = 'NaN'")
    assert told(await checked(database)) == [(PROBLEM, 'users.Sp"ent'), (PROBLEM, "users.ratio")]


BROKEN_BOOKS = {
    "UPDATE credit_accounts SET balance_micros = balance_micros + 1": "balance = sum of transactions",
    "DELETE FROM credit_transactions": "balance = sum of transactions",
    "UPDATE credit_accounts SET held_micros = 7": "held = sum of open holds",
    "DELETE FROM credit_accounts": "balance = sum of transactions",
    """
    INSERT INTO credit_holds (user_id, id, provider, model, service_type, mode, reason, amount_micros, state,
                              created_at, expires_at, charged_micros, fingerprint)
    SELECT id, gen_random_uuid(), '', '', '', '', '', 9, 'settled', now(), now(), 9, '' FROM users
    """: "charge of a settled hold = its deduction",
}


@pytest.mark.parametrize("statement", BROKEN_BOOKS)
async def test_books_that_do_not_add_up_are_found_by_a_deep_look(empty_database: str, statement: str) -> None:
    await migrate(empty_database)
    async with product(empty_database, "SET search_path = public") as connection:
        make = Factory(connection)
        user = await make.user(name="ü1", micros=1_000)
        await make.user(micros=500, name="zz")
        await connection.execute(statement)
        assert (PROBLEM, "money") not in told(await checked(empty_database))
        checkup = await checked(empty_database, deep=True)
        problems = [
            one.message for one in checkup.findings if one.subject == "money" and one.severity is PROBLEM
        ]
        assert problems == [f"{BROKEN_BOOKS[statement]} does not hold for 'zz', {user!r}."] or problems == [
            f"{BROKEN_BOOKS[statement]} does not hold for {user!r}, 'zz'."
        ]
