"""The pool of connections. Every wait has a limit, and an unreachable server is `StoreUnavailable`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import asyncpg

from keyturn_server.errors import KeyturnFault, RowLocked, StoreUnavailable

if TYPE_CHECKING:
    Pool = asyncpg.Pool[asyncpg.Record]
    Connection = asyncpg.Connection[asyncpg.Record]
    PoolConnection = asyncpg.pool.PoolConnectionProxy[asyncpg.Record]

# What means "not now" and not "not like this": the server is away, going, full, too slow, read-only
# after a failover, or two transactions stood in each other's way.
_UNAVAILABLE = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.IdleSessionTimeoutError,
    asyncpg.QueryCanceledError,
    asyncpg.LockNotAvailableError,
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
    asyncpg.InsufficientResourcesError,
    asyncpg.ReadOnlySQLTransactionError,
)


def is_unavailable(error: BaseException) -> bool:
    """Whether `error` means that the server cannot serve now, rather than that a statement is bad."""
    # asyncpg raises InterfaceError for a bad argument too, as DataError's and ValueError's kin.
    if isinstance(error, asyncpg.InterfaceError):
        return not isinstance(error, asyncpg.exceptions.DataError | ValueError | TypeError)
    return isinstance(error, _UNAVAILABLE)


class DatabaseRefused(KeyturnFault):
    """PostgreSQL does not let us in, or its URL is none; the message never holds the password."""


def fault_of(error: Exception) -> Exception:
    """What to raise for an `error` of connecting."""
    if is_unavailable(error):
        return StoreUnavailable()
    if isinstance(error, asyncpg.PostgresError):
        return DatabaseRefused(f"The database refuses us: {error}.")
    if isinstance(error, ValueError):  # its text may quote the URL
        return DatabaseRefused("The database's URL is not like postgresql://user:password@host/database.")
    return error


class Database:
    """A pool, made with `open_database`. Its methods raise `StoreUnavailable` and asyncpg's data errors."""

    def __init__(
        self, pool: Pool, *, acquire_timeout: timedelta, on_unavailable: Callable[[str, str], None]
    ) -> None:
        self._pool = pool
        self._acquire_seconds = acquire_timeout.total_seconds()
        self._on_unavailable = on_unavailable

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[PoolConnection]:
        """A connection of the pool for the length of the block."""
        is_ours = False
        try:
            async with self._pool.acquire(timeout=self._acquire_seconds) as connection:
                is_ours = True
                yield connection
        except Exception as error:
            if isinstance(error, asyncpg.LockNotAvailableError):
                raise RowLocked from error
            # A server that does not let us in any more cannot be reached either.
            if is_unavailable(error) or (not is_ours and isinstance(error, asyncpg.PostgresError)):
                # Never its text, which may quote a row.
                self._on_unavailable(type(error).__name__, getattr(error, "sqlstate", None) or "")
                raise StoreUnavailable from error
            raise

    async def renew(self) -> None:
        """Connections made so far are not used again: the server they lead to may be gone."""
        await self._pool.expire_connections()

    async def fetch(self, sql: str, *arguments: Any) -> list[asyncpg.Record]:
        """The rows of one statement."""
        async with self.connection() as connection:
            return await connection.fetch(sql, *arguments)

    async def fetchrow(self, sql: str, *arguments: Any) -> asyncpg.Record | None:
        """The first row of one statement, or None."""
        async with self.connection() as connection:
            return await connection.fetchrow(sql, *arguments)

    async def fetchval(self, sql: str, *arguments: Any) -> Any:
        """The first column of the first row, or None."""
        async with self.connection() as connection:
            return await connection.fetchval(sql, *arguments)


async def _begin(connection: Connection) -> None:
    """An acknowledged record is durable, whatever the role's or the database's default is."""
    await connection.execute(
        "SELECT set_config('synchronous_commit', 'on', false)"
        " WHERE current_setting('synchronous_commit') = 'off'"
    )


async def _keep(connection: Connection) -> None:
    """Nothing: asyncpg's default would add a round trip to every statement, to undo settings that
    nobody here changes. An open transaction it ends by itself."""


@asynccontextmanager
async def open_database(
    dsn: str,
    *,
    connections: int,
    connect_timeout: timedelta,
    statement_timeout: timedelta,
    lock_timeout: timedelta = timedelta(milliseconds=250),
    on_unavailable: Callable[[str, str], None] = lambda error, sqlstate: None,
) -> AsyncIterator[Database]:
    """A pool of up to `connections` connections, closed at the end of the block.

    `on_unavailable` hears of every statement that ends in `StoreUnavailable`: the error's name and its
    SQLSTATE, empty where the server said nothing.

    Raises `StoreUnavailable` when the first connection cannot be made, and `DatabaseRefused` when the
    server does not want it (wrong password, no such database).
    """
    statement_seconds = statement_timeout.total_seconds()
    try:
        pool = await asyncpg.create_pool(
            dsn,
            min_size=1,
            max_size=connections,
            timeout=connect_timeout.total_seconds(),
            # The server gives up first, and says so; ours is for a server that says nothing.
            command_timeout=statement_seconds + 1,
            init=_begin,
            reset=_keep,
            server_settings={
                "application_name": "keyturn",
                "default_transaction_isolation": "read committed",
                "lock_timeout": str(round(lock_timeout.total_seconds() * 1000)),
                "statement_timeout": str(round(statement_seconds * 1000)),
                "idle_in_transaction_session_timeout": str(round(statement_seconds * 2000)),
                "jit": "off",
                "timezone": "UTC",
            },
        )
    except Exception as error:
        raise fault_of(error) from None
    try:
        yield Database(pool, acquire_timeout=connect_timeout, on_unavailable=on_unavailable)
    finally:
        try:
            async with asyncio.timeout(connect_timeout.total_seconds()):
                await pool.close()
        except TimeoutError:
            pool.terminate()
