"""The pool of connections. Every wait has a limit, and an unreachable server is `StoreUnavailable`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import asyncpg

from keyturn_server.errors import KeyturnFault, StoreUnavailable

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

    def __init__(self, pool: Pool, *, acquire_timeout: timedelta) -> None:
        self._pool = pool
        self._acquire_seconds = acquire_timeout.total_seconds()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[PoolConnection]:
        """A connection of the pool for the length of the block."""
        is_ours = False
        try:
            async with self._pool.acquire(timeout=self._acquire_seconds) as connection:
                is_ours = True
                yield connection
        except Exception as error:
            # A server that does not let us in any more cannot be reached either.
            if is_unavailable(error) or (not is_ours and isinstance(error, asyncpg.PostgresError)):
                raise StoreUnavailable from error
            raise

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


@asynccontextmanager
async def open_database(
    dsn: str,
    *,
    connections: int,
    connect_timeout: timedelta,
    statement_timeout: timedelta,
) -> AsyncIterator[Database]:
    """A pool of up to `connections` connections, closed at the end of the block.

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
            server_settings={
                "application_name": "keyturn",
                "statement_timeout": str(round(statement_seconds * 1000)),
                "idle_in_transaction_session_timeout": str(round(statement_seconds * 2000)),
                "jit": "off",
                "timezone": "UTC",
            },
        )
    except Exception as error:
        raise fault_of(error) from None
    try:
        yield Database(pool, acquire_timeout=connect_timeout)
    finally:
        try:
            async with asyncio.timeout(connect_timeout.total_seconds()):
                await pool.close()
        except TimeoutError:
            pool.terminate()
