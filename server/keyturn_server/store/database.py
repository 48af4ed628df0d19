"""The pool of connections. Every wait has a limit, and an unreachable server is `StoreUnavailable`.

Whether the server is there is found out in one place, by a watch on a connection of its own. While it is
away nobody waits for it: what waits or runs is ended, and whatever comes fails at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import asyncpg

from keyturn_server.errors import KeyturnFault, RowLocked, StoreUnavailable
from keyturn_server.store.patience import patience

if TYPE_CHECKING:
    Pool = asyncpg.Pool[asyncpg.Record]
    Connection = asyncpg.Connection[asyncpg.Record]
    PoolConnection = asyncpg.pool.PoolConnectionProxy[asyncpg.Record]

WATCH_NAME = "keyturn watch"
"""How the watch's connection is called in pg_stat_activity."""

_INTERVAL = timedelta(milliseconds=500)  # how often the watch asks
_PAUSE = timedelta(milliseconds=250)  # before it tries another connection

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

# Of these: what only a server says that is there and takes writes.
_BUSY = (
    asyncpg.QueryCanceledError,
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
    asyncpg.InsufficientResourcesError,
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
        self,
        pool: Pool,
        made: WeakSet[Connection],
        *,
        acquire_timeout: timedelta,
        on_unavailable: Callable[[str, str], None],
    ) -> None:
        """`made` has the connections that the pool made."""
        self._pool = pool
        self._made = made
        self._acquire_seconds = acquire_timeout.total_seconds()
        self._on_unavailable = on_unavailable
        self._waits: set[asyncio.Timeout] = set()
        self._lent: dict[PoolConnection, int] = {}  # with the server's process
        self._is_away = False
        self.heard_at = 0.0
        """When a statement was answered last, by the loop's clock."""
        self.doubt = asyncio.Event()
        """Set when a statement found the server out of reach, for the watch to look after it."""

    @property
    def is_away(self) -> bool:
        """Whether the server is known to be out of reach, or to take no writes."""
        return self._is_away

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[PoolConnection]:
        """A connection of the pool for the length of the block."""
        if self._is_away:
            raise StoreUnavailable
        is_ours = False
        try:
            connection = await self._acquire()
            is_ours = True
            self._lent[connection] = connection.get_server_pid()
            try:
                if self._is_away:  # it went in this very moment
                    raise StoreUnavailable
                yield connection
                self.heard_at = asyncio.get_running_loop().time()
            except AttributeError as error:
                # asyncpg's own where `leave` ends a connection between two steps of a statement.
                if connection in self._lent:
                    raise
                raise StoreUnavailable from error
            finally:
                await self._give_back(connection)
        except Exception as error:
            if isinstance(error, asyncpg.LockNotAvailableError):
                raise RowLocked from error
            # A server that does not let us in any more cannot be reached either.
            if is_unavailable(error) or (not is_ours and isinstance(error, asyncpg.PostgresError)):
                # Never its text, which may quote a row.
                self._on_unavailable(type(error).__name__, getattr(error, "sqlstate", None) or "")
                if isinstance(error, asyncpg.ReadOnlySQLTransactionError):
                    # The name of the server may lead to another one by now.
                    await self.renew()
                if not isinstance(error, _BUSY):
                    self.doubt.set()
                raise StoreUnavailable from error
            raise

    async def _acquire(self) -> PoolConnection:
        async with asyncio.timeout(self._acquire_seconds) as wait:
            self._waits.add(wait)
            try:
                connection: PoolConnection = await self._pool.acquire()
            finally:
                self._waits.discard(wait)
        return connection

    async def _give_back(self, connection: PoolConnection) -> None:
        """To the pool. What the connection was used for stands, also where it breaks in this moment: then
        the pool has ended it."""
        try:
            await self._pool.release(connection, timeout=self._acquire_seconds)
        except Exception as error:
            if not is_unavailable(error):
                raise
            self.doubt.set()
        finally:
            self._lent.pop(connection, None)

    def leave(self) -> None:
        """The server is away: whoever waits for it, or for an answer, is told so now."""
        self._is_away = True
        now = asyncio.get_running_loop().time()
        for wait in self._waits:
            if not wait.expired():
                wait.reschedule(now)
        lent, self._lent = self._lent, {}
        for connection in lent:
            with suppress(asyncpg.InterfaceError):  # it has ended by itself
                connection.terminate()

    async def resume(self) -> None:
        """The server is back, on new connections."""
        await self.renew()
        self._is_away = False

    async def renew(self) -> None:
        """Connections made so far are not used again: the server they lead to may be gone."""
        await self._pool.expire_connections()
        # Those that nobody uses are ended here and now. The pool would end them in order once it is asked for
        # the next one, in a task that nobody waits for; and such a server may say nothing.
        lent = set(self._lent.values())
        for connection in list(self._made):
            if not connection.is_closed() and connection.get_server_pid() not in lent:
                connection.terminate()

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


async def _connect_durably(made: WeakSet[Connection], *arguments: Any, **options: Any) -> Connection:
    """An acknowledged record is durable, whatever the role's or the database's default is."""
    connection: Connection = await asyncpg.connect(*arguments, **options)
    try:
        await connection.execute(
            "SELECT set_config('synchronous_commit', 'on', false)"
            " WHERE current_setting('synchronous_commit') = 'off'"
        )
    except BaseException:
        # The pool would close it in order, and wait for a server that says nothing.
        connection.terminate()
        raise
    made.add(connection)
    return connection


async def _keep(connection: Connection) -> None:
    """Nothing: asyncpg's default would add a round trip to every statement, to undo settings that
    nobody here changes. An open transaction it ends by itself."""


class Watch:
    """Looks whether the server answers and takes writes, again and again, on a connection of its own.

    A connection that breaks, that says nothing for a while, or that is read-only proves little: another
    one is made, and what comes of that is the verdict. Where the server answers and does not let us in (too
    many connections, another password), those that we have are asked: while they work, it is there. Nor is
    it silent where it has answered a statement meanwhile.

    With a limit of 2 seconds silence is noticed within 2 seconds: up to 0.5 until it is asked again, and
    0.75 for each of the two. While the server is away a new connection may take the whole limit.
    Where our own process comes too late to hear an answer it takes longer: see `patience`.
    """

    def __init__(
        self,
        database: Database,
        dsn: str,
        *,
        limit: timedelta,
        on_change: Callable[[bool, str, str], None],
    ) -> None:
        """`on_change` hears whether the server is there, and of the error and SQLSTATE that say it is not."""
        self._database = database
        self._dsn = dsn
        self._limit = limit
        self._on_change = on_change

    async def run(self) -> None:
        """Look until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            self._database.doubt.clear()
            connection, error = await self._look()
            try:
                await self._judge(error, since=began)
                if connection is not None and error is None:
                    await self._until_doubtful(connection)
            finally:
                if connection is not None:
                    connection.terminate()
            # However many statements fail, it is not asked more often than this.
            await asyncio.sleep(began + _PAUSE.total_seconds() - loop.time())

    async def _look(self) -> tuple[Connection | None, Exception | None]:
        """A new connection if it can be made, and why the server is not one that takes writes."""
        limit = self._limit if self._database.is_away else self._limit * 3 / 8
        connection = None
        try:
            async with patience(limit):
                connection = await _connect(self._dsn)
            is_read_only = await self._is_read_only(connection, limit)
        except Exception as error:  # whatever it is, the answer is to try again
            return connection, error
        except BaseException:
            if connection is not None:
                connection.terminate()
            raise
        return connection, asyncpg.ReadOnlySQLTransactionError() if is_read_only else None

    async def _judge(self, error: Exception | None, *, since: float) -> None:
        if error is None:
            if self._database.is_away:
                await self._database.resume()
                self._on_change(True, "", "")
        elif not self._database.is_away and not await self._others_work(error, since):
            self._database.leave()
            self._on_change(False, type(error).__name__, getattr(error, "sqlstate", None) or "")

    async def _others_work(self, error: Exception, since: float) -> bool:
        """Whether the pool's connections do, though no new one can be made."""
        if isinstance(error, TimeoutError):
            return self._database.heard_at > since
        if not _is_refusal(error):
            return False
        try:
            async with patience(self._limit):
                await self._database.fetchval("SELECT 1")
        except TimeoutError:  # all are in use
            return True
        except Exception:  # which has been told
            return False
        return True

    async def _until_doubtful(self, connection: Connection) -> None:
        """Back when there is reason to look anew: this connection broke, says nothing or that it is
        read-only, or a statement on another one failed so."""
        doubt = self._database.doubt

        def ended(connection: object) -> None:
            doubt.set()

        connection.add_termination_listener(ended)
        try:
            while not await _is_set(doubt, within=_INTERVAL):
                if await self._is_read_only(connection, self._limit * 3 / 8):
                    return
        except Exception:  # the next look says what it is
            return
        finally:
            connection.remove_termination_listener(ended)

    async def _is_read_only(self, connection: Connection, limit: timedelta) -> bool:
        async with patience(limit, give_up=connection.terminate):
            return bool(await connection.fetchval("SELECT current_setting('transaction_read_only') = 'on'"))


def _is_refusal(error: Exception) -> bool:
    """Whether a server that is there and answers says so."""
    return isinstance(error, asyncpg.InsufficientResourcesError) or (
        isinstance(error, asyncpg.PostgresError) and not is_unavailable(error)
    )


async def _connect(dsn: str) -> Connection:
    connection: Connection = await asyncpg.connect(dsn, server_settings={"application_name": WATCH_NAME})
    return connection


async def _is_set(event: asyncio.Event, *, within: timedelta) -> bool:
    try:
        async with asyncio.timeout(within.total_seconds()):
            return await event.wait()
    except TimeoutError:
        return False


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

    `on_unavailable` hears of every statement that ends in `StoreUnavailable` by trying: the error's name
    and its SQLSTATE, empty where the server said nothing.

    Raises `StoreUnavailable` when the first connection cannot be made, and `DatabaseRefused` when the
    server does not want it (wrong password, no such database).
    """
    statement_seconds = statement_timeout.total_seconds()
    made: WeakSet[Connection] = WeakSet()
    try:
        pool = await asyncpg.create_pool(
            dsn,
            # One to see that we are let in. None is kept up in the background: the watch looks after the
            # server, and says so.
            init_size=1,
            min_size=0,
            max_size=connections,
            timeout=connect_timeout.total_seconds(),
            # The server gives up first, and says so; ours is for a server that says nothing.
            command_timeout=statement_seconds + 1,
            connect=partial(_connect_durably, made),
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
        yield Database(pool, made, acquire_timeout=connect_timeout, on_unavailable=on_unavailable)
    finally:
        try:
            async with asyncio.timeout(connect_timeout.total_seconds()):
                await pool.close()
        except TimeoutError:
            pool.terminate()
