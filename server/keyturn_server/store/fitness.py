"""Whether a database is fit for a sidecar: what is missing, what differs, what is in the way.

Nothing is written. What is read is read in one read-only transaction, so that the findings are of one
moment. The only statement outside of it is a NOTIFY to ourselves.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import asyncpg

from keyturn_server.errors import StoreUnavailable
from keyturn_server.keys.keyring import Keyring
from keyturn_server.routing.model import Flags
from keyturn_server.store.comparison import (
    OWN_SCHEMA,
    Comparison,
    Finding,
    Severity,
    fine,
    problem,
    warning,
)
from keyturn_server.store.database import fault_of, is_unavailable
from keyturn_server.store.migrate import (
    Applied,
    Migration,
    MigrationError,
    applied_migrations,
    shipped_migrations,
)
from keyturn_server.store.people import LEGACY
from keyturn_server.store.schema import described, expected_at, occupied, shipped_steps

if TYPE_CHECKING:
    from keyturn_server.store.database import Connection

_OLDEST = 15
_MIGRATIONS = "schema_migrations"
_LISTEN_LIMIT = timedelta(seconds=3)
_NAMED = 5  # of rows that have something wrong with them

# What a sidecar does to each table; it only reads the others.
_NEEDED = {
    "users": "SELECT, INSERT, UPDATE",
    "user_api_keys": "SELECT, INSERT, UPDATE, DELETE",
    "api_key_usage": "SELECT, INSERT",
    "credit_accounts": "SELECT, INSERT, UPDATE",
    "credit_holds": "SELECT, INSERT, UPDATE, DELETE",
    "credit_transactions": "SELECT, INSERT",
    "handle_redemptions": "SELECT, INSERT, DELETE",
    "feature_flags": "SELECT, INSERT, UPDATE",
    "feature_flag_changes": "SELECT, INSERT",
    "token_roots": "SELECT, INSERT",
}

_SERVER = """
SELECT current_database() AS database, session_user AS role, version() AS version,
       current_setting('server_version_num')::integer / 10000 AS major,
       current_setting('server_version') AS number,
       current_setting('server_encoding') AS encoding,
       current_setting('default_transaction_read_only')::boolean AS is_read_only,
       pg_is_in_recovery() AS is_standby,
       current_setting('synchronous_commit') AS synchronous_commit,
       current_setting('fsync')::boolean AS fsync,
       current_setting('full_page_writes')::boolean AS full_page_writes,
       current_setting('idle_session_timeout') AS idle_session_timeout,
       current_setting('session_replication_role') AS replication_role,
       (SELECT nspname FROM pg_namespace WHERE nspname = current_schema()) AS schema,
       (SELECT oid FROM pg_namespace WHERE nspname = current_schema()) AS schema_oid
"""
_CONNECTIONS = """
SELECT current_setting('max_connections')::integer
       - current_setting('superuser_reserved_connections')::integer AS most,
       (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend') AS taken,
       (SELECT nullif(rolconnlimit, -1) FROM pg_roles WHERE rolname = session_user) AS of_role,
       (SELECT nullif(datconnlimit, -1) FROM pg_database WHERE datname = current_database()) AS of_database
"""
_SCHEMA_RIGHTS = """
SELECT has_schema_privilege($1::oid, 'USAGE') AS usage, has_schema_privilege($1::oid, 'CREATE') AS create
"""
_TABLE_RIGHTS = """
SELECT c.relname AS table, pg_has_role(c.relowner, 'USAGE') AS is_owner,
       row_security_active(c.oid) AS is_filtered,
       ARRAY(SELECT one FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS one
              WHERE has_table_privilege(c.oid, one)) AS rights
  FROM pg_class c WHERE c.relnamespace = $1::oid AND c.relname = ANY ($2) AND c.relkind IN ('r', 'p', 'v')
 ORDER BY c.relname
"""
_UNLOGGED = """
SELECT c.relname AS table FROM pg_class c
 WHERE c.relnamespace = $1::oid AND c.relname = ANY ($2)
   AND c.relkind IN ('r', 'p') AND c.relpersistence <> 'p'
 ORDER BY c.relname
"""
_RULES = """
SELECT c.relname AS table, r.rulename AS rule
  FROM pg_rewrite r JOIN pg_class c ON c.oid = r.ev_class
 WHERE c.relnamespace = $1::oid AND c.relname = ANY ($2) AND r.rulename <> '_RETURN' AND r.ev_enabled <> 'D'
 ORDER BY c.relname, r.rulename
"""
_FUNCTION_RIGHTS = """
SELECT p.proname AS name FROM pg_proc p
 WHERE p.pronamespace = $1::oid AND p.proname = ANY ($2) AND NOT has_function_privilege(p.oid, 'EXECUTE')
 ORDER BY p.proname
"""

_FLAGS = "SELECT key, min_tier FROM feature_flags WHERE key = ANY ($1)"
_FLAG_KEYS = ("byok_enabled", "byok_uses_internal_credits", "byok_only_mode")
_TIER_EXISTS = "SELECT EXISTS (SELECT FROM subscription_tiers WHERE name = $1)"
_UNKNOWN_TIERS = """
SELECT u.subscription_tier AS name, count(*) AS rows FROM users u
 WHERE NOT EXISTS (SELECT FROM subscription_tiers t WHERE t.name = u.subscription_tier)
 GROUP BY 1 ORDER BY 2 DESC, 1
"""
_UNKNOWN_PROVIDERS = """
SELECT k.provider AS name, count(*) AS rows FROM user_api_keys k
 WHERE NOT EXISTS (SELECT FROM api_providers p WHERE p.id = k.provider)
 GROUP BY 1 ORDER BY 2 DESC, 1
"""
_KEYS_WITHOUT_USERS = """
SELECT count(*) FROM user_api_keys k WHERE NOT EXISTS (SELECT FROM users u WHERE u.id = k.user_id)
"""
_WITHOUT_ACCOUNT = """
SELECT count(*) FROM users u WHERE NOT EXISTS (SELECT FROM credit_accounts a WHERE a.user_id = u.id)
"""
_MASTER_KEYS = (
    "SELECT keyturn_master_key_id(encrypted_key) AS id, count(*) AS keys FROM user_api_keys GROUP BY 1"
)

# DESIGN, "Money". Each gives the users whose books break one of the invariants.
_BALANCES = """
SELECT coalesce(a.user_id, t.user_id) AS user_id
  FROM credit_accounts a
  FULL JOIN (SELECT user_id, sum(amount_micros) AS sum FROM credit_transactions GROUP BY user_id) t
    ON t.user_id = a.user_id
 WHERE coalesce(a.balance_micros, 0) <> coalesce(t.sum, 0)
 ORDER BY 1
"""
_HOLDS = """
SELECT coalesce(a.user_id, h.user_id) AS user_id
  FROM credit_accounts a
  FULL JOIN (SELECT user_id, sum(amount_micros) AS sum FROM credit_holds
              WHERE state = 'open' GROUP BY user_id) h
    ON h.user_id = a.user_id
 WHERE coalesce(a.held_micros, 0) <> coalesce(h.sum, 0)
 ORDER BY 1
"""
_SETTLED = """
SELECT DISTINCT h.user_id
  FROM credit_holds h
  LEFT JOIN credit_transactions t ON t.user_id = h.user_id AND t.id = h.id
 WHERE h.state = 'settled' AND coalesce(-t.amount_micros, 0) <> h.charged_micros
 ORDER BY 1
"""
_MONEY = {
    "balance = sum of transactions": _BALANCES,
    "held = sum of open holds": _HOLDS,
    "charge of a settled hold = its deduction": _SETTLED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkup:
    """What was found."""

    database: str
    schema: str
    role: str
    server: str
    findings: Sequence[Finding]

    @property
    def is_fit(self) -> bool:
        """A sidecar works on this database, once it has migrated it."""
        return not any(one.severity is Severity.PROBLEM for one in self.findings)


@dataclass(kw_only=True)
class _Look:
    """One look at the database."""

    connection: Connection
    keyring: Keyring | None
    connections: int
    server: asyncpg.Record
    shipped: Sequence[Migration]
    applied: Sequence[Applied] = ()
    findings: list[Finding] = field(default_factory=list)

    @property
    def version(self) -> int:
        """The newest migration of ours that was applied; 0 for none."""
        return max((one.version for one in self.applied), default=0)

    @property
    def pending(self) -> list[Migration]:
        there = {one.version for one in self.applied}
        return [one for one in self.shipped if one.version not in there]


async def check_database(
    dsn: str,
    *,
    connections: int,
    keyring: Keyring | None,
    deep: bool,
    connect_timeout: timedelta,
    statement_timeout: timedelta,
) -> Checkup:
    """How fit the database at `dsn` is for a sidecar with a pool of `connections` and this keyring.

    `deep` adds up all the money, which reads every row of the books. Raises `StoreUnavailable` and
    `DatabaseRefused` where there is nothing to look at.
    """
    async with AsyncExitStack() as stack:

        async def connect() -> Connection:
            try:
                connection: Connection = await asyncpg.connect(
                    dsn,
                    timeout=connect_timeout.total_seconds(),
                    command_timeout=statement_timeout.total_seconds() + 1,
                    statement_cache_size=0,
                    server_settings={"application_name": "keyturn check"},
                )
            except Exception as error:
                raise fault_of(error) from None
            stack.callback(connection.terminate)
            return connection

        connection, other = await connect(), await connect()
        try:
            findings = await _listening(connection, other)
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                await connection.execute(
                    f"SET LOCAL statement_timeout = {round(statement_timeout.total_seconds() * 1000)}"
                )
                server = await _one(connection, _SERVER)
                look = _Look(
                    connection=connection,
                    keyring=keyring,
                    connections=connections,
                    server=server,
                    shipped=shipped_migrations(),
                )
                await _look(look, deep=deep)
        except Exception as error:
            if is_unavailable(error):
                raise StoreUnavailable from error
            raise
    return Checkup(
        database=server["database"],
        schema=server["schema"] or "",
        role=server["role"],
        server=server["version"].partition(" on ")[0],
        findings=[*look.findings, *findings],
    )


async def _look(look: _Look, *, deep: bool) -> None:
    look.findings += _of_server(look.server)
    look.findings += await _of_connections(look)
    if look.server["schema_oid"] is None:
        look.findings.append(
            problem("schema", "There is no schema on the search path to make tables in.", OWN_SCHEMA)
        )
        return
    try:
        async with look.connection.transaction():  # a savepoint: the transaction outlives its failure
            look.applied = await applied_migrations(look.connection)
    except MigrationError:
        look.findings.append(
            problem(_MIGRATIONS, "This table is another program's, or not this role's to read.", OWN_SCHEMA)
        )
    else:
        look.findings += _of_migrations(look)
    if look.version > look.shipped[-1].version:
        return
    look.findings += await _of_schema(look)
    look.findings += await _of_rights(look)
    if look.applied:
        await _look_at_rows(look, deep=deep)


# -- the server ----------------------------------------------------------------------------------------


def _of_server(server: asyncpg.Record) -> Iterator[Finding]:
    if server["major"] < _OLDEST:
        yield problem("PostgreSQL", f"It is {server['number']}; Keyturn needs {_OLDEST} or newer.")
    else:
        yield fine("PostgreSQL", f"Version {server['number']}.")
    if server["encoding"] != "UTF8":
        yield problem("encoding", f"The database is {server['encoding']}; Keyturn needs UTF8.")
    if server["is_standby"]:
        yield problem("standby", "This server is a standby and takes no writes: give the primary's address.")
    elif server["is_read_only"]:
        yield problem(
            "default_transaction_read_only",
            "It is on for this role or database: nothing can be written.",
            "ALTER ROLE … RESET default_transaction_read_only, or the same for the database.",
        )
    if server["replication_role"] == "replica":
        yield problem(
            "session_replication_role",
            "It is replica for this role or database, which switches triggers off: changes of flags are "
            "neither kept in their history nor heard of.",
            "ALTER ROLE … RESET session_replication_role, or the same for the database.",
        )
    if server["synchronous_commit"] == "off":
        yield warning("synchronous_commit", "It is off. Sidecars switch it on for themselves.")
    for setting in ("fsync", "full_page_writes"):
        if not server[setting]:
            yield warning(setting, "It is off: a crash of the server can lose or ruin what was acknowledged.")
    if server["idle_session_timeout"] not in {"0", "0ms"}:
        yield warning(
            "idle_session_timeout",
            f"Connections are cut after {server['idle_session_timeout']} of silence, and made again.",
        )


async def _of_connections(look: _Look) -> list[Finding]:
    row = await _one(look.connection, _CONNECTIONS)
    needed = look.connections + 2  # the push and the watch have one each
    findings = []
    for name, most in (
        ("max_connections", row["most"]),
        ("connection limit of the role", row["of_role"]),
        ("connection limit of the database", row["of_database"]),
    ):
        if most is not None and most < needed:
            findings.append(
                problem(
                    name,
                    f"It allows {most}; one sidecar takes up to {needed} (KEYTURN_DATABASE_CONNECTIONS).",
                )
            )
    if not findings and row["most"] - row["taken"] < needed:
        findings.append(
            warning(
                "max_connections",
                f"{row['taken']} of {row['most']} are taken; one sidecar takes up to {needed}.",
            )
        )
    return findings or [
        fine("connections", f"{row['taken']} of {row['most']} are taken; a sidecar needs {needed}.")
    ]


async def _listening(connection: Connection, other: Connection) -> list[Finding]:
    """Whether changes can be heard of: LISTEN works, and a session stays a session."""
    pid = "SELECT pg_backend_pid()"
    # Behind a pooler in transaction mode the first connection's server goes to the other's transaction.
    async with connection.transaction(readonly=True):
        first = await connection.fetchval(pid)
    async with other.transaction(readonly=True):
        await other.fetchval(pid)
        async with connection.transaction(readonly=True):
            second = await connection.fetchval(pid)
    if first != second:
        return [
            problem(
                "LISTEN",
                "There is a pooler in transaction mode in between: changes would not be heard.",
                "Give the server's own address, or a pooler in session mode.",
            )
        ]
    heard = asyncio.Event()

    def listener(*_: object) -> None:
        heard.set()

    channel = f"keyturn_check_{secrets.token_hex(8)}"
    try:
        async with asyncio.timeout(_LISTEN_LIMIT.total_seconds()):
            await connection.add_listener(channel, listener)
            await connection.execute(f'NOTIFY "{channel}"')
            await heard.wait()
            await connection.remove_listener(channel, listener)
    except (TimeoutError, asyncpg.PostgresError) as error:
        said = f" ({error.args[0]})" if isinstance(error, asyncpg.PostgresError) else ""
        return [problem("LISTEN", f"Changes would not be heard: LISTEN and NOTIFY do not work{said}.")]
    return [fine("LISTEN", "Changes can be heard.")]


# -- the schema ----------------------------------------------------------------------------------------


def _of_migrations(look: _Look) -> Iterator[Finding]:
    shipped = {one.version: one for one in look.shipped}
    for one in look.applied:
        if (ours := shipped.get(one.version)) is None:
            yield problem(
                f"migration {one.version:04d} ({one.name})",
                "This release does not know it: the database was migrated by a newer one.",
                "Run that release.",
            )
        elif ours.checksum != one.checksum:
            yield problem(
                _named(ours),
                f"It was applied with other contents than this release ships "
                f"({one.checksum[:12]}… there, {ours.checksum[:12]}… here).",
                "Run the release that applied it, or start from a backup.",
            )
    if look.pending:
        yield warning(
            "migrations",
            f"To be applied: {', '.join(_named(one).removeprefix('migration ') for one in look.pending)}.",
            "The next `keyturn serve` applies them, or `keyturn db migrate`.",
        )
    else:
        yield fine("migrations", f"All {len(shipped)} are applied.")


def _named(migration: Migration) -> str:
    return f"migration {migration.version:04d} ({migration.name})"


async def _of_schema(look: _Look) -> list[Finding]:
    steps = shipped_steps()
    now, then = expected_at(steps, look.version), expected_at(steps, look.shipped[-1].version)
    if not now:  # it is made only where it is missing, and has been looked at
        then = {name: facts for name, facts in then.items() if _MIGRATIONS not in (name.table, name.name)}
    labels = {one.version: _named(one) for one in look.shipped}
    made_by = {}
    for step in steps:
        # Who made what is there, or else who will.
        if step.facts is not None and (step.version <= look.version or step.name not in made_by):
            made_by[step.name] = labels[step.version]
    coming = {one.name for one in then.keys() - now.keys() if one.kind in {"table", "index"}}
    comparison = Comparison(
        now=now,
        then=then,
        found=await described(look.connection, look.server["schema_oid"], names=now.keys() | then.keys()),
        occupied=await occupied(look.connection, look.server["schema_oid"], coming),
        made_by=made_by,
    )
    findings = [
        *comparison.findings(),
        *await _of_tables(look, [one.name for one in now if one.kind == "table"]),
    ]
    if now and not any(one.severity is not Severity.OK for one in findings):
        tables = sum(one.kind == "table" for one in now)
        findings.append(
            fine("schema", f"All {tables} tables and what belongs to them are as they were made.")
        )
    return findings


async def _of_tables(look: _Look, tables: Sequence[str]) -> list[Finding]:
    """What of tables no description tells: whether they outlive a crash, and what is made of statements."""
    oid = look.server["schema_oid"]
    findings = [
        problem(
            row["table"],
            "It is UNLOGGED: a crash of the server empties it.",
            f"ALTER TABLE {row['table']} SET LOGGED",
        )
        for row in await look.connection.fetch(_UNLOGGED, oid, tables)
    ]
    findings += [
        problem(
            f"{row['table']}.{row['rule']}",
            "A rule, which rewrites statements: what Keyturn writes may be dropped or changed.",
            f"DROP RULE {_quoted(row['rule'])} ON {row['table']}",
        )
        for row in await look.connection.fetch(_RULES, oid, tables)
    ]
    return findings


# -- what the role may do ------------------------------------------------------------------------------


async def _of_rights(look: _Look) -> list[Finding]:
    schema, oid = look.server["schema"], look.server["schema_oid"]
    findings = []
    rights = await _one(look.connection, _SCHEMA_RIGHTS, oid)
    if look.pending and not rights["create"]:
        findings.append(
            problem(
                f"schema {schema}",
                "The role may not make tables in it, and migrations are to be applied.",
                f"GRANT CREATE ON SCHEMA {schema} TO {look.server['role']}",
            )
        )
    if not rights["usage"]:
        findings.append(
            problem(
                f"schema {schema}",
                "The role may not use it.",
                f"GRANT USAGE ON SCHEMA {schema} TO {look.server['role']}",
            )
        )
    ours = expected_at(shipped_steps(), look.version)
    tables = sorted(one.name for one in ours if one.kind == "table")
    for row in await look.connection.fetch(_TABLE_RIGHTS, oid, tables):
        needed = _NEEDED.get(row["table"], "SELECT").split(", ")
        if missing := ", ".join(right for right in needed if right not in row["rights"]):
            findings.append(
                problem(
                    row["table"],
                    f"The role lacks {missing}.",
                    f"GRANT {missing} ON {row['table']} TO {look.server['role']}",
                )
            )
        if row["is_filtered"]:
            findings.append(problem(row["table"], "Row security hides rows of it from the role."))
        if look.pending and not row["is_owner"]:
            findings.append(
                problem(
                    row["table"],
                    "The role does not own it, and migrations that may change it are to be applied.",
                )
            )
    functions = sorted({one.name.partition("(")[0] for one in ours if one.kind == "function"})
    findings += [
        problem(
            f"{row['name']}()",
            "The role may not execute it.",
            f"GRANT EXECUTE ON FUNCTION {row['name']} TO {look.server['role']}",
        )
        for row in await look.connection.fetch(_FUNCTION_RIGHTS, oid, functions)
    ]
    return findings or [fine("role", f"{look.server['role']} has the rights that a sidecar needs.")]


# -- the rows ------------------------------------------------------------------------------------------


async def _look_at_rows(look: _Look, *, deep: bool) -> None:
    looks = [
        ("flags", _of_flags),
        ("tiers", _of_tiers),
        ("providers", _of_providers),
        ("master keys", _of_master_keys),
        ("accounts", _of_accounts),
        ("numbers", _of_numbers),
        *([("money", _of_money)] if deep else []),
    ]
    for subject, of_rows in looks:
        try:
            async with look.connection.transaction():
                look.findings += await of_rows(look)
        except asyncpg.QueryCanceledError:
            look.findings.append(warning(subject, "Looking took too long, and was given up."))
        except (asyncpg.SyntaxOrAccessError, asyncpg.DataError):
            # What is missing, or not ours to read, has been told above.
            look.findings.append(
                warning(subject, "Could not be looked at, for what is wrong with the schema.")
            )


async def _of_flags(look: _Look) -> list[Finding]:
    rows = {row["key"]: row["min_tier"] for row in await look.connection.fetch(_FLAGS, _FLAG_KEYS)}
    findings = [
        warning(f"flag {key}", "There is no such row: its default holds.")
        for key in _FLAG_KEYS
        if key not in rows
    ]
    min_tier = rows.get("byok_enabled") or Flags().min_tier
    if not await look.connection.fetchval(_TIER_EXISTS, min_tier):
        findings.append(
            problem(
                "flag byok_enabled",
                f"Its min_tier {min_tier!r} is not in subscription_tiers: nobody may use own keys.",
            )
        )
    return findings or [fine("flags", "All three are there.")]


async def _of_tiers(look: _Look) -> list[Finding]:
    return [
        warning(
            "users",
            f"{_rows(row['rows'], 'user')} of the tier {row['name']!r}, which subscription_tiers does not "
            "have: they count as below all others.",
        )
        for row in await look.connection.fetch(_UNKNOWN_TIERS)
    ]


async def _of_providers(look: _Look) -> list[Finding]:
    findings = [
        problem(
            "user_api_keys",
            f"{_rows(row['rows'], 'key')} for the provider {row['name']!r}, "
            "which api_providers does not have.",
        )
        for row in await look.connection.fetch(_UNKNOWN_PROVIDERS)
    ]
    if count := await look.connection.fetchval(_KEYS_WITHOUT_USERS):
        findings.append(problem("user_api_keys", f"{_rows(count, 'key')} of users that are not there."))
    return findings


async def _of_accounts(look: _Look) -> list[Finding]:
    if count := await look.connection.fetchval(_WITHOUT_ACCOUNT):
        return [
            warning(
                "credit_accounts",
                f"{_rows(count, 'user')} without an account: the balance is 0 until a grant opens one.",
            )
        ]
    return []


async def _of_master_keys(look: _Look) -> list[Finding]:
    counts = {row["id"]: row["keys"] for row in await look.connection.fetch(_MASTER_KEYS)}
    if look.keyring is None:
        told = ", ".join(f"{counts[id_]} under {id_}" for id_ in sorted(counts))
        message = "ENCRYPTION_KEY is not set here, so the stored keys are held against none"
        return [fine("master keys", f"{message}: {told}." if told else f"{message}.")]
    findings = []
    for id_ in sorted(counts.keys() - {look.keyring.current.id}):
        keys = _rows(counts[id_], "key")
        if id_ == LEGACY:
            findings.append(
                warning("master keys", f"{keys} in the format of the Node gateways.", "keyturn keys rotate")
            )
        elif look.keyring.by_id(id_) is not None:
            findings.append(warning("master keys", f"{keys} under the retired {id_}.", "keyturn keys rotate"))
        else:
            findings.append(
                problem(
                    "master keys",
                    f"{keys} under {id_}, which is not set: they do not open.",
                    "Add that master key to ENCRYPTION_KEYS_RETIRED.",
                )
            )
    current = look.keyring.current.id
    return findings or [fine("master keys", f"{_rows(counts.get(current, 0), 'key')}, all under {current}.")]


async def _of_numbers(look: _Look) -> list[Finding]:
    """A generated column has no NaN; another numeric one, of whoever added it, may."""
    columns = [
        (name.table, name.name)
        for name, facts in (
            await described(
                look.connection,
                look.server["schema_oid"],
                names=expected_at(shipped_steps(), look.version).keys(),
            )
        ).items()
        if name.kind == "column"
        and str(facts["type"]).startswith(("numeric", "real", "double"))
        and "generated" not in facts
    ]
    findings = []
    for table, column in columns:
        has_nan = await look.connection.fetchval(
            f"SELECT EXISTS (SELECT FROM {_quoted(table)} WHERE {_quoted(column)} = 'NaN')"  # noqa: S608
        )
        if has_nan:
            findings.append(problem(f"{table}.{column}", "It holds NaN, which every sum of it becomes."))
    return findings


async def _of_money(look: _Look) -> list[Finding]:
    findings = []
    for invariant, query in _MONEY.items():
        users = [row["user_id"] for row in await look.connection.fetch(query)]
        if users:
            named = ", ".join(repr(one) for one in users[:_NAMED])
            more = f" and {len(users) - _NAMED} more" if len(users) > _NAMED else ""
            findings.append(problem("money", f"{invariant} does not hold for {named}{more}."))
        else:
            findings.append(fine("money", f"{invariant} holds for everybody."))
    return findings


async def _one(connection: Connection, query: str, *arguments: Any) -> asyncpg.Record:
    """The row of a query that has always one."""
    (row,) = await connection.fetch(query, *arguments)
    return row


def _quoted(name: Any) -> str:
    return '"' + str(name).replace('"', '""') + '"'


def _rows(count: int, what: str) -> str:
    return f"1 {what}" if count == 1 else f"{count} {what}s"
