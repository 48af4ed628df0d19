"""A Unix socket for several workers.

Two processes cannot bind one path, and gRPC takes no listener that somebody else has opened. So the
supervisor listens, each worker takes connections from its socket, and passes what comes on to its own server,
which listens on a path of its own beside it. docs/decisions/0017-workers.md
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import cast

# After each connection that a worker takes: so the next one is for a worker that has not just had one.
_OTHERS_TURN = timedelta(milliseconds=2)
_LAST_BYTES = timedelta(seconds=2)


class Relay:
    """Passes connections on; made with `relaying`."""

    def __init__(self) -> None:
        self._open: set[asyncio.Transport] = set()
        self._connecting: set[asyncio.Task[None]] = set()

    @contextmanager
    def accepting(self, listeners: Sequence[socket.socket], targets: Sequence[Path]) -> Iterator[None]:
        """Take connections from each listener for its target, for the length of the block, and close it."""
        loop = asyncio.get_running_loop()
        waiting: dict[int, asyncio.TimerHandle] = {}

        def listen(listener: socket.socket, target: Path) -> None:
            loop.add_reader(listener.fileno(), accept, listener, target)

        def accept(listener: socket.socket, target: Path) -> None:
            try:
                connection, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return  # another worker was quicker
            except OSError:
                connection = None  # no descriptors are left: later, perhaps
            loop.remove_reader(listener.fileno())
            waiting[listener.fileno()] = loop.call_later(
                _OTHERS_TURN.total_seconds(), listen, listener, target
            )
            if connection is not None:
                task = loop.create_task(self._connect(connection, target))
                self._connecting.add(task)
                task.add_done_callback(self._connecting.discard)

        for listener, target in zip(listeners, targets, strict=True):
            listen(listener, target)
        try:
            yield
        finally:
            for timer in waiting.values():
                timer.cancel()
            for listener in listeners:
                loop.remove_reader(listener.fileno())
                listener.close()

    async def _connect(self, connection: socket.socket, target: Path) -> None:
        """Join one connection with one of our own to the target."""
        loop = asyncio.get_running_loop()
        near, far = _End(self._open), _End(self._open)
        near.other, far.other = far, near
        try:
            await loop.create_unix_connection(lambda: far, str(target))
        except OSError:  # the server there is about to end
            connection.close()
            return
        await loop.connect_accepted_socket(lambda: near, connection)

    async def close(self) -> None:
        """Wait for what is still on its way, then cut."""
        for task in tuple(self._connecting):
            await task
        for transport in tuple(self._open):
            transport.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_BYTES.total_seconds()):
                while self._open:  # noqa: ASYNC110 - only here, at the end
                    await asyncio.sleep(0.01)
        for transport in tuple(self._open):
            transport.abort()


@asynccontextmanager
async def relaying() -> AsyncIterator[Relay]:
    """A relay that at the end of the block has passed on what was on its way."""
    relay = Relay()
    try:
        yield relay
    finally:
        await relay.close()


class _End(asyncio.Protocol):
    """One end of a joint: it passes on what it hears to the other one."""

    other: _End

    def __init__(self, open_ones: set[asyncio.Transport]) -> None:
        self._open = open_ones
        self._transport: asyncio.Transport | None = None
        self._early: list[bytes] = []
        """What the other one has heard before this one was there."""
        self.is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._open.add(self._transport)
        for data in self._early:
            self._transport.write(data)
        self._early.clear()
        if self.other.is_lost:
            self._transport.close()

    def write(self, data: bytes) -> None:
        """Say it here."""
        if self._transport is None:
            self._early.append(data)
        else:
            self._transport.write(data)

    def end(self) -> None:
        """Nothing more is said here; what was said still goes."""
        if self._transport is not None:
            self._transport.close()

    def hold(self, *, on: bool) -> None:
        """Hear nothing while the other one is full."""
        if self._transport is None or self.is_lost:
            return
        if on:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        self.other.write(data)

    def pause_writing(self) -> None:
        self.other.hold(on=True)

    def resume_writing(self) -> None:
        self.other.hold(on=False)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_lost = True
        if self._transport is not None:
            self._open.discard(self._transport)
        self.other.end()
