"""A proxy in front of PostgreSQL that can tell the connection that listens for changes from the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from keyturn_server.store.embedded import EmbeddedPostgres
from tests.relay import Link, Relay
from tests.support import temporary_directory

_SOCKET = ".s.PGSQL.5432"


class Proxy:
    """A relay to the cluster's socket. Which connections a fault is for, `push_only` says."""

    def __init__(self, directory: Path, target: Path) -> None:
        self.directory = directory
        self.refuses_push = False
        self.refuses_all = False
        self.relay = _PushRelay(self, target / _SOCKET)

    def dsn(self, dsn: str) -> str:
        """The same database, by way of the proxy."""
        head, _, _ = dsn.partition("?")
        return f"{head}?host={self.directory}&port=5432&sslmode=disable"

    def silence(self, *, push_only: bool) -> None:
        """Existing connections neither close nor carry anything any more."""
        self.relay.silence(self._chosen(push_only))

    def cut(self, *, push_only: bool) -> None:
        """Existing connections break."""
        self.relay.cut(self._chosen(push_only))

    def go_away(self) -> None:
        """As a server that is gone: existing connections break, and new ones are refused."""
        self.refuses_all = True
        self.cut(push_only=False)

    def come_back(self) -> None:
        """As that server when it is there again."""
        self.refuses_all = False

    def _chosen(self, push_only: bool) -> list[Link]:
        return [link for link in self.relay.links if is_push(link) or not push_only]


class _PushRelay(Relay):
    def __init__(self, proxy: Proxy, target: Path) -> None:
        super().__init__(target)
        self._proxy = proxy

    def refuses(self, link: Link) -> bool:
        return self._proxy.refuses_all or (self._proxy.refuses_push and is_push(link))


def is_push(link: Link) -> bool:
    """Whether it is the connection that listens for changes: the start-up packet names the application."""
    return b"keyturn push" in link.first


@asynccontextmanager
async def proxied(cluster: EmbeddedPostgres) -> AsyncIterator[Proxy]:
    """A proxy in front of the cluster."""
    async with temporary_directory() as directory:
        proxy = Proxy(directory, cluster.socket_directory)
        server = await asyncio.start_unix_server(proxy.relay.accept, directory / _SOCKET)
        try:
            yield proxy
        finally:
            server.close()
            await proxy.relay.close()
            await server.wait_closed()
