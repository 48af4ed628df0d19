"""When a database counts as silent, and what becomes of watches and connections that are ended."""

from __future__ import annotations

import asyncio
import gc
import time
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from keyturn_server.errors import StoreUnavailable
from keyturn_server.store.database import Database, Watch, open_database
from keyturn_server.store.patience import patience
from tests.factories import Connection
from tests.support import eventually, temporary_directory

MOMENT = timedelta(milliseconds=50)


@contextmanager
def a_busy_loop() -> Iterator[None]:
    """Each round of the event loop takes as long as the whole of a moment."""
    loop = asyncio.get_running_loop()
    is_over = False

    def stand_still() -> None:
        time.sleep(MOMENT.total_seconds())
        if not is_over:
            loop.call_soon(stand_still)

    loop.call_soon(stand_still)
    try:
        yield
    finally:
        is_over = True


async def test_silence_has_a_limit() -> None:
    given_up: list[bool] = []
    with pytest.raises(TimeoutError):
        async with patience(MOMENT, give_up=lambda: given_up.append(True)):
            await asyncio.Event().wait()
    assert given_up == [True]


async def test_an_answer_that_our_own_lateness_keeps_us_from_reading_is_waited_for() -> None:
    with a_busy_loop():
        async with patience(MOMENT):
            for _ in range(15):  # rounds of the loop, as there are in making a connection
                await asyncio.sleep(0)


async def test_lateness_does_not_make_patience_endless() -> None:
    with a_busy_loop(), pytest.raises(TimeoutError):
        async with asyncio.timeout(60) as limit, patience(MOMENT):
            await asyncio.Event().wait()
    assert not limit.expired()


async def test_an_error_in_the_block_is_its_own() -> None:
    with pytest.raises(ZeroDivisionError):
        async with patience(MOMENT):
            raise ZeroDivisionError


@asynccontextmanager
async def opened(dsn: str) -> AsyncIterator[Database]:
    limit = timedelta(seconds=20)
    async with open_database(dsn, connections=2, connect_timeout=limit, statement_timeout=limit) as database:
        yield database


@asynccontextmanager
async def silent_server(directory: Path) -> AsyncIterator[list[asyncio.StreamWriter]]:
    """Takes connections in `directory` as PostgreSQL would, and says nothing."""
    taken: list[asyncio.StreamWriter] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.append(writer)

    server = await asyncio.start_unix_server(take, directory / ".s.PGSQL.5432")
    try:
        yield taken
    finally:
        server.close()
        for writer in taken:
            writer.transport.abort()
        await server.wait_closed()


async def test_a_database_that_answers_statements_is_not_silent(database: str) -> None:
    news: list[tuple[bool, str]] = []
    async with temporary_directory() as home, silent_server(home) as taken, opened(database) as pool:
        watch = Watch(
            pool,
            f"postgresql://keyturn@/keyturn?host={home}&sslmode=disable",
            limit=timedelta(seconds=1.6),
            on_change=lambda is_there, error, sqlstate: news.append((is_there, error)),
        )
        watching = asyncio.create_task(watch.run())
        try:

            async def asked_again() -> bool:
                await pool.fetchval("SELECT 1")
                return len(taken) >= 3

            await eventually(asked_again)
            assert not pool.is_away

            async def is_away() -> bool:
                return pool.is_away

            await eventually(is_away)
            assert news == [(False, "TimeoutError")]
        finally:
            watching.cancel()
            await asyncio.wait((watching,))


async def test_a_watch_that_is_ended_at_any_moment_leaves_no_connection(
    database: str, sql: Connection
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with opened(database) as pool:
            for moment in range(100):
                watch = Watch(pool, database, limit=timedelta(seconds=30), on_change=lambda *news: None)
                watching = asyncio.create_task(watch.run())
                await asyncio.sleep(moment * 0.0002)
                watching.cancel()
                await asyncio.wait((watching,))
        gc.collect()
    assert [str(one.message) for one in caught if issubclass(one.category, ResourceWarning)] == []

    async def nobody_is_left() -> bool:
        return not await sql.fetchval(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name LIKE 'keyturn%'"
        )

    await eventually(nobody_is_left)


async def test_connections_that_are_not_used_again_end_at_once(database: str, sql: Connection) -> None:
    open_ones = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = 'keyturn'"
    )
    async with opened(database) as pool, pool.connection() as in_use:
        assert await pool.fetchval("SELECT 1") == 1  # on another one
        assert await sql.fetchval(open_ones) == 2
        await pool.renew()

        async def one_is_left() -> bool:
            return bool(await sql.fetchval(open_ones) == 1)

        await eventually(one_is_left)
        assert await in_use.fetchval("SELECT 2") == 2
        assert await pool.fetchval("SELECT 3") == 3


async def test_an_answer_stands_though_its_connection_breaks_as_it_is_given_back(database: str) -> None:
    async with opened(database) as pool:
        async with pool.connection() as connection:
            answer = await connection.fetchval("SELECT 1")
            asyncio.get_running_loop().call_soon(connection.terminate)
        assert answer == 1
        assert await pool.fetchval("SELECT 2") == 2


async def test_a_statement_that_is_cancelled_as_connections_are_renewed_is_cancelled(
    database: str, sql: Connection
) -> None:
    async def runs() -> bool:
        return bool(await sql.fetchval("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"))

    renewing: list[asyncio.Task[None]] = []
    async with opened(database) as pool:
        waiting = asyncio.create_task(pool.fetchval("SELECT pg_sleep(60)"))
        await eventually(runs)
        # One round of the loop later, when the connection is on its way back.
        asyncio.get_running_loop().call_soon(lambda: renewing.append(asyncio.create_task(pool.renew())))
        waiting.cancel()
        await asyncio.wait((waiting,))
        assert waiting.cancelled()
        await renewing[0]
        assert await pool.fetchval("SELECT 2") == 2


async def test_a_statement_whose_connection_is_ended_at_any_moment_is_answered_or_unavailable(
    database: str,
) -> None:
    async with opened(database) as pool:
        ended = 0
        for moment in range(400):
            asking = asyncio.create_task(pool.fetchval(f"SELECT {moment}"))  # a statement that is new to it
            for _ in range(moment // 2):  # rounds of the loop
                await asyncio.sleep(0)
            pool.leave()
            try:
                assert await asking == moment
            except StoreUnavailable:
                ended += 1
            await pool.resume()
        assert 0 < ended < 400
