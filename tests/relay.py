"""A relay between two Unix sockets that can do what networks do: cut, refuse, and go silent."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(eq=False)
class Link:
    """One connection through the relay."""

    first: bytes = b""
    """What the caller said first."""
    flowing: asyncio.Event = field(default_factory=asyncio.Event)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)


class Relay:
    """Forwards connections to the socket `target`."""

    def __init__(self, target: Path) -> None:
        self.links: set[Link] = set()
        self._target = target
        self._flows = True
        self._tasks: set[asyncio.Task[None]] = set()

    def refuses(self, link: Link) -> bool:
        """Whether a new connection is closed at once."""
        return False

    def silence(self, links: Iterable[Link]) -> None:
        """These connections neither close nor carry anything any more."""
        for link in links:
            link.flowing.clear()

    def freeze(self) -> None:
        """No connection carries anything, neither those that are there nor new ones."""
        self._flows = False
        self.silence(self.links)

    def thaw(self) -> None:
        """All connections go on, with what was held up."""
        self._flows = True
        for link in self.links:
            link.flowing.set()

    def cut(self, links: Iterable[Link]) -> None:
        """These connections break."""
        for link in list(links):
            for writer in link.writers:
                writer.transport.abort()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carries one connection until either side closes it."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        link = Link(writers=[writer])
        if self._flows:
            link.flowing.set()
        self.links.add(link)
        with suppress(OSError, asyncio.CancelledError):
            try:
                link.first = await reader.read(65536)
                if self.refuses(link):
                    return
                await link.flowing.wait()
                upstream, downstream = await asyncio.open_unix_connection(self._target)
                link.writers.append(downstream)
                downstream.write(link.first)
                carriers = (self._carry(link, reader, downstream), self._carry(link, upstream, writer))
                async with asyncio.TaskGroup() as tasks:
                    running = [tasks.create_task(carrier) for carrier in carriers]
                    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for one in running:
                        one.cancel()
            finally:
                self.links.discard(link)
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
