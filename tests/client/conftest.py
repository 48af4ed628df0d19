"""A scripted sidecar for each test, and clients that talk to it over a Unix socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from keyturn import AsyncClient, Client, Retries
from keyturn._calls import CallState
from tests.client.scripted import Sidecar, serving

# Long enough for a slow machine: a test that waits for it has failed.
PATIENCE = timedelta(seconds=60)
QUICK = Retries(first_delay=timedelta(milliseconds=1), max_delay=timedelta(milliseconds=2))


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[Sidecar]:
    """A sidecar on a Unix socket."""
    with serving(f"unix:{tmp_path}/k.sock") as running:
        yield running


@pytest.fixture
def client(sidecar: Sidecar) -> Iterator[Client]:
    with Client(sidecar.target, timeout=PATIENCE, retries=QUICK) as opened:
        yield opened


@pytest.fixture
async def aclient(sidecar: Sidecar) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(sidecar.target, timeout=PATIENCE, retries=QUICK) as opened:
        yield opened


class Either:
    """One of the two clients behind one face, so that one test holds for both."""

    def __init__(self, client: Client | AsyncClient) -> None:
        self.client = client

    async def __call__(self, method: str, *args: Any, **fields: Any) -> Any:
        """Call a method of the client, and wait for what it gives."""
        bound = getattr(self.client, method)
        if isinstance(self.client, AsyncClient):
            return await bound(*args, **fields)
        return await asyncio.to_thread(bound, *args, **fields)

    async def request(self, block: Callable[[Any], object], **fields: Any) -> CallState:
        """Run `block(call)` inside `with client.request(...) as call`."""
        if isinstance(self.client, AsyncClient):
            acall = self.client.request(**fields)
            async with acall:
                block(acall)
            return acall
        return await asyncio.to_thread(_blocking, self.client, block, fields)

    async def close(self) -> None:
        if isinstance(self.client, AsyncClient):
            await self.client.close()
        else:
            self.client.close()


def _blocking(client: Client, block: Callable[[Any], object], fields: Any) -> CallState:
    with client.request(**fields) as call:
        block(call)
    return call


Connect = Callable[..., Either]


@pytest.fixture(params=[Client, AsyncClient], ids=["threads", "asyncio"])
async def connect(request: pytest.FixtureRequest, sidecar: Sidecar) -> AsyncIterator[Connect]:
    """Makes a client of either kind; to the test's sidecar, when no target is given."""
    made: list[Either] = []

    def make(target: str | None = None, **settings: Any) -> Either:
        either = Either(request.param(target or sidecar.target, **settings))
        made.append(either)
        return either

    yield make
    for each in made:
        await each.close()


@pytest.fixture
def either(connect: Connect) -> Either:
    """A client of either kind that is patient and retries at once."""
    return connect(timeout=PATIENCE, retries=QUICK)
