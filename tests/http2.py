"""A client that speaks HTTP/2 by the frame, and so may behave as no gRPC client does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Self

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.exceptions import ProtocolError


class Http2:
    """One connection. Made by `http2`; reads what comes all the time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._h2 = H2Connection(H2Configuration(client_side=True))
        self.ended: dict[int, int | None] = {}
        """Streams that are over, and their gRPC status; None where the stream was reset."""
        self.told_to_go = False
        self.closed = asyncio.Event()
        """Set when the server has closed the connection."""
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._h2.initiate_connection()
        await self._flush()
        self._task = asyncio.create_task(self._listen())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()

    async def open(self, path: str, message: bytes | None = None, **headers: str) -> int:
        """Begin a call, with its whole request if there is one; its stream."""
        stream = self._h2.get_next_available_stream_id()
        self._h2.send_headers(
            stream,
            [
                (":method", "POST"),
                (":scheme", "http"),
                (":path", path),
                (":authority", "localhost"),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
                *headers.items(),
            ],
        )
        if message is not None:
            self._h2.send_data(stream, b"\0" + len(message).to_bytes(4, "big") + message, end_stream=True)
        await self._flush()
        return stream

    async def reset(self, stream: int) -> None:
        """Break a call off, as a client does that cancels."""
        self._h2.reset_stream(stream, ErrorCodes.CANCEL)
        await self._flush()

    async def end_of(self, stream: int) -> int | None:
        """The gRPC status of a call once it is over. Raises ConnectionError where the connection is first."""
        while stream not in self.ended:
            if self.closed.is_set():
                raise ConnectionError
            self._changed.clear()
            await self._changed.wait()
        return self.ended[stream]

    async def _flush(self) -> None:
        self._writer.write(self._h2.data_to_send())
        await self._writer.drain()

    async def _listen(self) -> None:
        try:
            while data := await self._reader.read(65536):
                for event in self._h2.receive_data(data):
                    match event:
                        case DataReceived():
                            self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                        case ResponseReceived() | TrailersReceived():
                            for name, value in event.headers:
                                if name == b"grpc-status":
                                    self.ended[event.stream_id] = int(value)
                        case StreamEnded() | StreamReset():
                            self.ended.setdefault(event.stream_id, None)
                        case ConnectionTerminated():
                            self.told_to_go = True
                self._changed.set()
                await self._flush()
        except (OSError, ProtocolError):
            pass  # it is over either way
        finally:
            self.closed.set()
            self._changed.set()


@asynccontextmanager
async def http2(address: str) -> AsyncIterator[Http2]:
    """A connection to an address as a sidecar has it, `unix:PATH` or `host:port`, without TLS."""
    if address.startswith("unix:"):
        reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
    else:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
    async with Http2(reader, writer) as connection:
        yield connection
