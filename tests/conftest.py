"""One PostgreSQL a session, one database a test, and a sidecar where a test asks for one."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import asyncpg
import pytest_asyncio

from keyturn_server.store.embedded import EmbeddedPostgres
from keyturn_server.store.migrate import migrate
from tests.factories import Connection, Factory
from tests.invariants import check_invariants
from tests.providers import NOBODY, Providers, playing_providers
from tests.support import Sidecar, in_own_task, running_sidecar, temporary_directory

_TEMPLATE = "migrated"


def pytest_configure() -> None:
    """Tests read nothing from the environment of whoever runs them."""
    for name in [name for name in os.environ if name.startswith(("KEYTURN_", "ENCRYPTION_KEY"))]:
        del os.environ[name]


def database_in(cluster: EmbeddedPostgres, name: str) -> str:
    """The DSN of another database of the cluster."""
    head, slash, query = cluster.dsn.partition("?")
    return f"{head.rpartition('/')[0]}/{name}{slash}{query}"


@pytest_asyncio.fixture(scope="session")
async def cluster() -> AsyncIterator[EmbeddedPostgres]:
    """A PostgreSQL for this run, with a migrated database to copy."""
    async with (
        temporary_directory() as directory,
        in_own_task(
            EmbeddedPostgres(directory / "pg", settings={"fsync": "off", "max_connections": "200"})
        ) as postgres,
    ):
        connection = await asyncpg.connect(postgres.dsn)
        await connection.execute(f"CREATE DATABASE {_TEMPLATE}")
        await connection.close()
        template = database_in(postgres, _TEMPLATE)
        await migrate(template)
        connection = await asyncpg.connect(template)
        # No test reaches the internet.
        await Providers().play(connection, at=NOBODY)
        await connection.close()
        yield postgres


@pytest_asyncio.fixture
async def empty_database(cluster: EmbeddedPostgres) -> AsyncIterator[str]:
    """The DSN of a new database with nothing in it."""
    async with AsyncExitStack() as stack:
        yield await _new_database(cluster, "template1", stack)


@pytest_asyncio.fixture
async def database(cluster: EmbeddedPostgres) -> AsyncIterator[str]:
    """The DSN of a new, migrated database."""
    async with AsyncExitStack() as stack:
        yield await _new_database(cluster, _TEMPLATE, stack)


async def _new_database(cluster: EmbeddedPostgres, template: str, stack: AsyncExitStack) -> str:
    name = f"test_{secrets.token_hex(6)}"

    async def run(sql: str) -> None:
        connection = await asyncpg.connect(cluster.dsn)
        try:
            await connection.execute(sql)
        finally:
            await connection.close()

    await run(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
    stack.push_async_callback(run, f"DROP DATABASE {name} WITH (FORCE)")
    return database_in(cluster, name)


@pytest_asyncio.fixture
async def sql(database: str) -> AsyncIterator[Connection]:
    """A plain connection to the test's database, as psql would have. Checks the invariants at the end."""
    connection: Connection = await asyncpg.connect(database)
    try:
        yield connection
        await check_invariants(connection)
    finally:
        await connection.close()


@pytest_asyncio.fixture
async def make(sql: Connection) -> Factory:
    """Makes users, keys and credits."""
    return Factory(sql)


@pytest_asyncio.fixture
async def providers(sql: Connection) -> AsyncIterator[Providers]:
    """The providers that sidecars ask about keys, played by a server of ours."""
    async with playing_providers() as providers:
        await providers.play(sql)
        yield providers


@pytest_asyncio.fixture
async def start_sidecar(
    database: str, sql: Connection, providers: Providers
) -> AsyncIterator[Callable[..., Any]]:
    """Starts sidecars on the test's database; what they acknowledged is checked at the end."""
    sidecars: list[Sidecar] = []
    async with AsyncExitStack() as stack:

        async def start(**changes: Any) -> Sidecar:
            sidecar = await stack.enter_async_context(running_sidecar(database, **changes))
            sidecars.append(sidecar)
            return sidecar

        yield start
    await check_invariants(sql, [record for sidecar in sidecars for record in sidecar.acknowledged])


@pytest_asyncio.fixture
async def sidecar(start_sidecar: Callable[..., Any]) -> Sidecar:
    """A sidecar with the default settings."""
    started: Sidecar = await start_sidecar()
    return started
