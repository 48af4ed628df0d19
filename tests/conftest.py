"""One PostgreSQL a session, one database a test, and a sidecar where a test asks for one."""

from __future__ import annotations

import json
import os
import secrets
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from keyturn_server import app
from keyturn_server.store.embedded import EmbeddedPostgres
from keyturn_server.store.migrate import migrate
from tests.canaries import WatchedMetrics, check_text, forget
from tests.factories import Connection, Factory
from tests.invariants import check_invariants
from tests.providers import NOBODY, Providers, playing_providers
from tests.proxy import Proxy, proxied
from tests.support import Sidecar, in_own_task, running_sidecar, temporary_directory

_TEMPLATE = "migrated"


def pytest_configure() -> None:
    """Tests read nothing from the environment of whoever runs them, and see what sidecars count."""
    for name in [name for name in os.environ if name.startswith(("KEYTURN_", "ENCRYPTION_KEY"))]:
        del os.environ[name]
    app.Metrics = WatchedMetrics  # type: ignore[attr-defined]
    # A shell has what it runs in the background ignore it, and a program hands that on to what it starts;
    # unlike a handler.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda number, frame: None)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The fault suite's: tests/faults/."""
    group = parser.getgroup("faults", "the fault suite")
    group.addoption("--faults-long", action="store_true", help="its long form, which takes an hour or so")
    group.addoption("--faults-seed", type=int, default=1, help="what its random parts are drawn from")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the long form of the fault suite did and saw, also where workers of their own did it."""
    if not terminalreporter.config.getoption("--faults-long"):
        return
    for report in terminalreporter.getreports(""):  # how fixtures ended
        if figures := dict(report.user_properties).get("figures"):
            terminalreporter.write_line(f"{report.nodeid}: {json.dumps(figures)}")


@pytest.fixture(autouse=True)
def secrets_of_its_own() -> None:
    """Each test is searched for its own secrets."""
    forget(but="master key")


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
        check_text("PostgreSQL's log", (directory / "pg" / "postgres.log").read_text(), ever=True)


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
async def proxy(cluster: EmbeddedPostgres) -> AsyncIterator[Proxy]:
    """A proxy in front of the cluster, for a sidecar whose connections break."""
    async with proxied(cluster) as running:
        yield running


@pytest_asyncio.fixture
async def directory() -> AsyncIterator[Path]:
    """Where a spool may be made."""
    async with temporary_directory() as made:
        yield made / "spool"


@pytest_asyncio.fixture
async def spooling(
    start_sidecar: Callable[..., Any], database: str, proxy: Proxy, directory: Path
) -> Callable[..., Any]:
    """Starts a sidecar with a spool, by way of the proxy."""

    async def start(**changes: Any) -> Sidecar:
        sidecar: Sidecar = await start_sidecar(
            **{"database_url": proxy.dsn(database), "spool": directory, **changes}
        )
        return sidecar

    return start


@pytest_asyncio.fixture
async def sidecar(start_sidecar: Callable[..., Any]) -> Sidecar:
    """A sidecar with the default settings."""
    started: Sidecar = await start_sidecar()
    return started
