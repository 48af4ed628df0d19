"""A proxy in front of PostgreSQL that can do what networks do: cut, refuse, and go silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from keyturn_server.store.embedded import EmbeddedPostgres
from tests.support import temporary_directory

_SOCKET = ".s.PGSQL.5432"


@dataclass(eq=False)
class Link:
    """One connection through the proxy."""

    is_push: bool
    """Whether it is the one that listens for changes."""
    flowing: asyncio.Event = field(default_factory=asyncio.Event)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)


class Proxy:
    """Forwards connections to `target`. Which ones a fault is for, `push_only` says."""

    def __init__(self, directory: Path, target: Path) -> None:
        self.directory = directory
        self.refuses_push = False
        self._target = target
        self._links: set[Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def dsn(self, dsn: str) -> str:
        """The same database, by way of the proxy."""
        head, _, _ = dsn.partition("?")
        return f"{head}?host={self.directory}&port=5432&sslmode=disable"

    def silence(self, *, push_only: bool) -> None:
        """Existing connections neither close nor carry anything any more."""
        for link in self._chosen(push_only):
            link.flowing.clear()

    def cut(self, *, push_only: bool) -> None:
        """Existing connections break."""
        for link in self._chosen(push_only):
            for writer in link.writers:
                writer.transport.abort()

    def _chosen(self, push_only: bool) -> list[Link]:
        return [link for link in self._links if link.is_push or not push_only]

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carries one connection until either side closes it."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        link = Link(is_push=False)
        link.flowing.set()
        link.writers.append(writer)
        self._links.add(link)
        with suppress(OSError, asyncio.CancelledError):
            try:
                # The start-up packet names the application.
                first = await reader.read(65536)
                link.is_push = b"keyturn push" in first
                if link.is_push and self.refuses_push:
                    return
                upstream, downstream = await asyncio.open_unix_connection(self._target / _SOCKET)
                link.writers.append(downstream)
                downstream.write(first)
                carriers = (self._carry(link, reader, downstream), self._carry(link, upstream, writer))
                async with asyncio.TaskGroup() as tasks:
                    running = [tasks.create_task(carrier) for carrier in carriers]
                    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for one in running:
                        one.cancel()
            finally:
                self._links.discard(link)
                for each in link.writers:
                    each.transport.abort()

    async def _carry(self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                await link.flowing.wait()
                writer.write(data)
                await writer.drain()

    async def close(self) -> None:
        """Ends every connection."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


@asynccontextmanager
async def proxied(cluster: EmbeddedPostgres) -> AsyncIterator[Proxy]:
    """A proxy in front of the cluster."""
    async with temporary_directory() as directory:
        proxy = Proxy(directory, cluster.socket_directory)
        server = await asyncio.start_unix_server(proxy.accept, directory / _SOCKET)
        try:
            yield proxy
        finally:
            server.close()
            await proxy.close()
            await server.wait_closed()
