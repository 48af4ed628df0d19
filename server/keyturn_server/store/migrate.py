"""Migrations: the numbered SQL files beside this module, applied in order, each once."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import resources
from typing import TYPE_CHECKING

import asyncpg

from keyturn_server.errors import KeyturnFault, StoreUnavailable
from keyturn_server.store.database import fault_of, is_unavailable

if TYPE_CHECKING:
    from keyturn_server.store.database import Connection, Database, PoolConnection

# The same for every sidecar; the number means nothing else.
_ADVISORY_LOCK = 0x6B657974_75726E00

# Of the schema that CREATE would go to: a product's own table further down the search path is not ours.
_EXISTS = """
SELECT EXISTS (SELECT FROM pg_class WHERE relname = 'schema_migrations'
                  AND relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = current_schema()))
"""
_CREATE = """
CREATE TABLE IF NOT EXISTS schema_migrations (
    version    integer PRIMARY KEY,
    name       text NOT NULL,
    checksum   text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
)"""
_APPLIED = "SELECT version, name, checksum FROM schema_migrations ORDER BY version"
_INSERT = "INSERT INTO schema_migrations (version, name, checksum) VALUES ($1, $2, $3)"

# What the database itself has against a migration: it stands in the way, or is not allowed.
_IN_THE_WAY = (
    asyncpg.DuplicateTableError,
    asyncpg.DuplicateObjectError,
    asyncpg.DuplicateFunctionError,
    asyncpg.DuplicateColumnError,
    asyncpg.InsufficientPrivilegeError,
    asyncpg.InvalidSchemaNameError,
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.UndefinedObjectError,
    asyncpg.UndefinedFunctionError,
    asyncpg.WrongObjectTypeError,
)


class MigrationError(KeyturnFault):
    """The database is not what the migrations say; the message names the migration and the way out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """One numbered file of SQL."""

    version: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the SQL, in hex."""
        return hashlib.sha256(self.sql.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """One line of the table `schema_migrations`."""

    version: int
    name: str
    checksum: str


def shipped_migrations() -> tuple[Migration, ...]:
    """The migrations of this release, in order."""
    found = [
        Migration(version=int(match[1]), name=match[2], sql=file.read_text("utf-8"))
        for file in resources.files("keyturn_server.store").joinpath("migrations").iterdir()
        if (match := re.fullmatch(r"(\d{4})_(\w+)\.sql", file.name))
    ]
    return tuple(sorted(found, key=lambda migration: migration.version))


async def applied_migrations(connection: Connection | PoolConnection) -> list[Applied]:
    """What the database says was applied to it, in order; nothing where it was never migrated.

    Raises `MigrationError` when its table `schema_migrations` is another program's, or not ours to read.
    """
    if not await connection.fetchval(_EXISTS):
        return []
    try:
        return [Applied(**row) for row in await connection.fetch(_APPLIED)]
    except asyncpg.InsufficientPrivilegeError:
        raise MigrationError("This role may not read the table schema_migrations.") from None
    except (asyncpg.UndefinedColumnError, asyncpg.WrongObjectTypeError):
        raise MigrationError(
            "The table schema_migrations is another program's, so Keyturn needs a schema of its own: "
            "`keyturn db check` says how."
        ) from None


async def require_migrated(database: Database) -> None:
    """Raises `MigrationError` unless every migration of this release was applied, `StoreUnavailable`."""
    async with database.connection() as connection:
        applied = {one.version for one in await applied_migrations(connection)}
    if missing := [one for one in shipped_migrations() if one.version not in applied]:
        raise MigrationError(
            f"The database lacks migration {missing[0].version:04d} ({missing[0].name}): "
            "start a sidecar of this release first, or run `keyturn db migrate`."
        )


async def migrate(
    dsn: str,
    migrations: Sequence[Migration] | None = None,
    *,
    connect_timeout: timedelta = timedelta(seconds=5),
    on_wait: Callable[[], object] = lambda: None,
) -> list[Migration]:
    """Bring the database at `dsn` up to date; what was applied comes back.

    Each migration is one transaction, and all run under an advisory lock: any number of sidecars may
    start at once. `on_wait` hears that another one holds the lock, and is waited for.

    Raises `MigrationError` when an applied migration differs from the shipped one or is newer than
    this release, or when something in the database is in the way of the next one, `StoreUnavailable`
    when the database cannot be reached, and `DatabaseRefused` when it does not let us in.
    """
    try:
        connection = await asyncpg.connect(dsn, timeout=connect_timeout.total_seconds())
    except Exception as error:
        raise fault_of(error) from None
    try:
        try:
            shipped = shipped_migrations() if migrations is None else migrations
            return await _migrate(connection, shipped, on_wait)
        finally:
            await connection.close(timeout=5)
    except Exception as error:
        if is_unavailable(error):
            raise StoreUnavailable from error
        raise


async def _migrate(
    connection: Connection, migrations: Sequence[Migration], on_wait: Callable[[], object]
) -> list[Migration]:
    # Held by the session: it is let go when the connection closes, however that comes about.
    if not await connection.fetchval("SELECT pg_try_advisory_lock($1)", _ADVISORY_LOCK):
        on_wait()
        await connection.execute("SELECT pg_advisory_lock($1)", _ADVISORY_LOCK)
    applied = {one.version: one for one in await applied_migrations(connection)}
    newest = max((migration.version for migration in migrations), default=0)
    if ahead := [version for version in applied if version > newest]:
        raise MigrationError(
            f"The database has migration {max(ahead)}, which this release does not know: "
            "it was migrated by a newer release. Run that release."
        )
    done: list[Migration] = []
    for migration in migrations:
        if (before := applied.get(migration.version)) is not None:
            if before.checksum != migration.checksum:
                raise MigrationError(
                    f"Migration {migration.version} ({migration.name}) was applied with other contents "
                    "than this release ships. An applied migration is never edited: restore the file, "
                    "or start from a backup."
                )
            continue
        try:
            async with connection.transaction():
                if not applied and not done:
                    await connection.execute(_CREATE)
                await connection.execute(migration.sql)
                await connection.execute(_INSERT, migration.version, migration.name, migration.checksum)
        except _IN_THE_WAY as error:
            raise MigrationError(
                f"Migration {migration.version:04d} ({migration.name}) cannot be applied: {error.args[0]}. "
                "Nothing of it was kept. `keyturn db check` says what is in the way."
            ) from error
        done.append(migration)
    return done
