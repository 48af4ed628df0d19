"""A relay between two Unix sockets that can do what networks do: cut, refuse, and go silent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(eq=False)
class Link:
    """One connection through the relay."""

    first: bytes = b""
    """What the caller said first."""
    asks: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while what the caller says is carried."""
    answers: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while what is said to the caller is carried."""
    writers: list[asyncio.StreamWriter] = field(default_factory=list)


class Relay:
    """Forwards connections to the socket `target`."""

    def __init__(self, target: Path) -> None:
        self.links: set[Link] = set()
        self.delay: Callable[[], float] = lambda: 0
        """How many seconds what comes in next is on its way."""
        self._target = target
        self._carries_asks = self._carries_answers = True
        self._tasks: set[asyncio.Task[None]] = set()

    def refuses(self, link: Link) -> bool:
        """Whether a new connection is closed at once."""
        return False

    def silence(self, links: Iterable[Link]) -> None:
        """These connections neither close nor carry anything any more."""
        for link in links:
            link.asks.clear()
            link.answers.clear()

    def freeze(self) -> None:
        """No connection carries anything, neither those that are there nor new ones."""
        self._carries_asks = self._carries_answers = False
        self.silence(self.links)

    def hold_answers(self) -> None:
        """Whatever is asked still arrives, and no answer comes back any more."""
        self._carries_answers = False
        for link in self.links:
            link.answers.clear()

    def lose_answers(self) -> None:
        """The connections whose answers were held break; new ones are as ever."""
        self._carries_answers = True
        self.cut([link for link in self.links if not link.answers.is_set()])

    def thaw(self) -> None:
        """All connections go on, with what was held up."""
        self._carries_asks = self._carries_answers = True
        for link in self.links:
            link.asks.set()
            link.answers.set()

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
        if self._carries_asks:
            link.asks.set()
        if self._carries_answers:
            link.answers.set()
        self.links.add(link)
        with suppress(OSError, asyncio.CancelledError):
            try:
                link.first = await reader.read(65536)
                if self.refuses(link):
                    return
                await link.asks.wait()
                upstream, downstream = await asyncio.open_unix_connection(self._target)
                link.writers.append(downstream)
                downstream.write(link.first)
                carriers = (
                    self._carry(link.asks, reader, downstream),
                    self._carry(link.answers, upstream, writer),
                )
                async with asyncio.TaskGroup() as tasks:
                    running = [tasks.create_task(carrier) for carrier in carriers]
                    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for one in running:
                        one.cancel()
            finally:
                self.links.discard(link)
                for each in link.writers:
                    each.transport.abort()

    async def _carry(
        self, flows: asyncio.Event, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                await asyncio.sleep(self.delay())
                await flows.wait()
                writer.write(data)
                await writer.drain()

    async def close(self) -> None:
        """Ends every connection."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
