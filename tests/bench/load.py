"""The load generator: unary gRPC calls over plain text, in a closed loop.

`python -m tests.bench.load HOST:PORT METHOD BODIES …` keeps a number of calls in flight, and prints
what came of them as JSON (`Load`). Every call has a body of its own, which h2load cannot do and a
Record needs: a ticket settles once. HTTP/2 is framed by hand, since a client out of a library costs
more than the servers measured here.

A call counts as answered when a message came back: a gRPC server sends none with an error. What is
in the messages, and in the database, is for the caller to check (`sample`, and the rows).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from struct import Struct
from typing import cast

import uvloop

_FRAME = Struct(">BHBBI")  # the length's high byte and low two, type, flags, stream
_MESSAGE = Struct(">BI")  # gRPC's prefix: not compressed, length
_WORD = Struct(">I")
_SETTING = Struct(">HI")
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_FIRST_WINDOW = 65_535
_OUR_WINDOW = 1 << 30
_MOST_BODY_BYTES = 16_000  # one frame
_DRAIN_SECONDS = 20.0


class LoadError(Exception):
    """The calls could not be made, or were not answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What came of one run of calls, whichever generator made them."""

    calls_per_second: float
    p50_ms: float
    p99_ms: float
    made: int
    """Calls in all, those of the warm-up included."""
    cpu_seconds: float
    """The generator's own, of the `wall_seconds`."""
    wall_seconds: float
    sample: bytes
    """One answer's message; empty where the generator keeps none."""

    @property
    def generator_busy(self) -> float:
        """How much of one core the generator used; near 1, it measured itself."""
        return self.cpu_seconds / self.wall_seconds

    def to_json(self) -> str:
        """For another process."""
        return json.dumps({**asdict(self), "sample": base64.b64encode(self.sample).decode()})

    @classmethod
    def from_json(cls, text: str) -> Load:
        """What `to_json` made."""
        values = json.loads(text)
        return cls(**{**values, "sample": base64.b64decode(values["sample"])})


def write_bodies(path: Path, bodies: Sequence[bytes]) -> None:
    """A file of bodies for the generator, each framed as gRPC does."""
    path.write_bytes(b"".join(_MESSAGE.pack(0, len(body)) + body for body in bodies))


def _messages(path: Path) -> list[bytes]:
    text = path.read_bytes()
    messages = []
    start = 0
    while start < len(text):
        end = start + _MESSAGE.size + _MESSAGE.unpack_from(text, start)[1]
        messages.append(text[start:end])
        start = end
    return messages


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that `percent` of the values do not exceed."""
    return (
        statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]
    )


class _Run:
    """The calls of all connections: what to send next, and when each was answered."""

    def __init__(self, messages: Iterator[bytes]) -> None:
        self._messages = messages
        self.stopped_at: float | None = None
        self.answered: list[tuple[float, float]] = []
        """When, and how long it took; seconds."""
        self.sample = b""
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.in_flight = 0

    def next_message(self) -> bytes | None:
        """The next call's, or None: no call is to be made any more."""
        if self.stopped_at is None:
            if (message := next(self._messages, None)) is not None:
                self.in_flight += 1
                return message
            self.stop()
        return None

    def stop(self) -> None:
        if self.stopped_at is None:
            self.stopped_at = time.perf_counter()
            self._check_over()

    def ended(self, now: float, started: float, message_bytes: int) -> None:
        self.in_flight -= 1
        if message_bytes < _MESSAGE.size:
            self.fail("a call ended without an answer: its status is an error")
        self.answered.append((now, now - started))
        if self.stopped_at is not None:
            self._check_over()

    def fail(self, why: str) -> None:
        if not self.over.done():
            self.over.set_exception(LoadError(why))

    def _check_over(self) -> None:
        if not self.in_flight and not self.over.done():
            self.over.set_result(None)


class _Connection(asyncio.Protocol):
    """One connection with `streams` calls in flight."""

    def __init__(self, run: _Run, authority: str, method: str, streams: int) -> None:
        self._run = run
        self._free = streams
        self._first_block, self._block = _header_blocks(authority, method)
        self._send_window = _FIRST_WINDOW
        self._unacknowledged = 0
        self._next_stream = 1
        self._started: dict[int, float] = {}
        self._sizes: dict[int, int] = {}
        self._unsent: bytes | None = None
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own is no subclass
        settings = _SETTING.pack(2, 0) + _SETTING.pack(4, _OUR_WINDOW)  # no push; stream windows
        self._transport.write(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + _frame(_SETTINGS, 0, 0, settings)
            + _frame(_WINDOW_UPDATE, 0, 0, _WORD.pack(_OUR_WINDOW))
        )
        self._send([])

    def connection_lost(self, error: Exception | None) -> None:
        self._run.fail(f"the server closed the connection ({error})")

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        out: list[bytes] = []
        now = time.perf_counter()
        start, size = 0, len(data)
        while size - start >= _FRAME.size:
            high, low, kind, flags, stream = _FRAME.unpack_from(data, start)
            length = high << 16 | low
            end = start + _FRAME.size + length
            if end > size:
                break
            if kind == _DATA:
                self._sizes[stream] = self._sizes.get(stream, 0) + length
                self._unacknowledged += length
                if not self._run.sample:
                    self._run.sample = data[start + _FRAME.size + _MESSAGE.size : end]
            elif kind != _HEADERS:
                self._control(kind, flags, data[start + _FRAME.size : end], out)
            if flags & _END_STREAM and kind in (_DATA, _HEADERS):
                self._free += 1
                self._run.ended(now, self._started.pop(stream), self._sizes.pop(stream, 0))
            start = end
        self._rest = data[start:]
        if self._unacknowledged > _OUR_WINDOW // 2:
            out.append(_frame(_WINDOW_UPDATE, 0, 0, _WORD.pack(self._unacknowledged)))
            self._unacknowledged = 0
        self._send(out)

    def _control(self, kind: int, flags: int, payload: bytes, out: list[bytes]) -> None:
        if kind == _WINDOW_UPDATE:
            # Those of streams are for bodies larger than any here.
            self._send_window += _WORD.unpack(payload)[0]
        elif kind == _SETTINGS and not flags & _ACK:
            out.append(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            out.append(_frame(_PING, _ACK, 0, payload))
        elif kind in (_RST_STREAM, _GOAWAY):
            self._run.fail(f"the server refused (frame type {kind}: {payload!r})")

    def _send(self, out: list[bytes]) -> None:
        """Sends `out`, and new calls as long as there is room for them."""
        now = time.perf_counter()
        while self._free:
            message = self._unsent or self._run.next_message()
            if message is None:
                break
            size = len(message)
            if size > self._send_window:
                self._unsent = message
                break
            self._unsent = None
            self._send_window -= size
            self._free -= 1
            stream = self._next_stream
            block = self._block if stream > 1 else self._first_block
            out += (
                _FRAME.pack(0, len(block), _HEADERS, _END_HEADERS, stream),
                block,
                _FRAME.pack(0, size, _DATA, _END_STREAM, stream),
                message,
            )
            self._started[stream] = now
            self._next_stream = stream + 2
        if out:
            self._transport.write(b"".join(out))


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return _FRAME.pack(0, len(payload), kind, flags, stream) + payload


def _header_blocks(authority: str, method: str) -> tuple[bytes, bytes]:
    """The header block of a connection's first call, and that of the others, which points back to it."""
    # RFC 7541: the number of a name in the static table (0: spelled out), and the value.
    named: list[tuple[int, str, str]] = [
        (4, "", method),
        (1, "", authority),
        (31, "", "application/grpc"),
        (0, "te", "trailers"),
        (58, "", "keyturn-bench"),
        (0, "grpc-timeout", "10S"),
    ]
    post_http = b"\x83\x86"
    first = post_http + b"".join(
        bytes([0x40 | number]) + (_text(name) if not number else b"") + _text(value)
        for number, name, value in named
    )
    return first, post_http + bytes(0x80 | 62 + age for age in reversed(range(len(named))))


def _text(value: str) -> bytes:
    if len(value) > 126:
        raise LoadError(f"too long for this client: {value}")
    return bytes([len(value)]) + value.encode()


async def _load(options: argparse.Namespace) -> Load:
    messages = _messages(options.bodies)
    if max(map(len, messages)) > _MOST_BODY_BYTES:
        raise LoadError(f"a body has more than {_MOST_BODY_BYTES} bytes")
    loop = asyncio.get_running_loop()
    run = _Run(iter(messages) if options.once else cycle(messages))
    host, _, port = options.address.rpartition(":")
    began, cpu_began = time.perf_counter(), time.process_time()
    transports = []
    for index in range(options.connections):
        streams = len(range(index, options.concurrency, options.connections))
        connection = partial(_Connection, run, options.address, options.method, streams)
        if host == "unix":
            transport, _ = await loop.create_unix_connection(connection, port)
        else:
            transport, _ = await loop.create_connection(connection, host, int(port))
        transports.append(transport)
    window_began = time.perf_counter() + options.warm_up
    loop.call_later(options.warm_up + options.seconds, run.stop)
    async with asyncio.timeout(options.warm_up + options.seconds + _DRAIN_SECONDS):
        await run.over
    wall_seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    for transport in transports:
        transport.abort()
    assert run.stopped_at is not None
    spans = [span for end, span in run.answered if window_began <= end <= run.stopped_at]
    if not spans:
        raise LoadError("no call was answered within the time: give it more --seconds, or more bodies")
    return Load(
        calls_per_second=len(spans) / (run.stopped_at - window_began),
        p50_ms=percentile(spans, 50) * 1000,
        p99_ms=percentile(spans, 99) * 1000,
        made=len(run.answered),
        cpu_seconds=cpu_seconds,
        wall_seconds=wall_seconds,
        sample=run.sample,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.load")
    parser.add_argument("address", help="HOST:PORT or unix:PATH")
    parser.add_argument("method", help="/package.Service/Method")
    parser.add_argument("bodies", type=Path, help="a file as write_bodies makes it")
    parser.add_argument("--once", action="store_true", help="send each body once, and stop after the last")
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--concurrency", type=int, default=64, help="calls in flight, over all connections")
    parser.add_argument("--warm-up", type=float, default=0.5, help="seconds that do not count")
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds that do")
    return parser


def main() -> None:
    """Makes the calls; prints a `Load`, or says on stderr why there is none and exits with 1."""
    options = _parser().parse_args()
    gc.disable()  # nothing here goes round in circles
    try:
        load = uvloop.run(_load(options))
    except (LoadError, OSError, TimeoutError) as error:
        sys.exit(f"load: {error or 'calls were not answered in time'}")
    print(load.to_json())


if __name__ == "__main__":
    main()
