"""Pings on a quiet connection: those of the clients are taken, faster ones end it."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from keyturn import _channel
from keyturn_server import serving
from tests.support import Sidecar

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS, _PING, _GOAWAY = 4, 6, 7
_ACK = 1
_ENHANCE_YOUR_CALM = 11


def _frame(kind: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + bytes(4) + payload


class Connection:
    """An HTTP/2 connection with no call on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def ping(self) -> str:
        """`answered`, or what the connection ended with."""
        self._writer.write(_frame(_PING, b"keyturn!"))
        async with asyncio.timeout(30):
            while True:
                try:
                    head = await self._reader.readexactly(9)
                    payload = await self._reader.readexactly(int.from_bytes(head[:3]))
                except (asyncio.IncompleteReadError, OSError):
                    return "closed"
                kind, flags = head[3], head[4]
                if kind == _PING and flags & _ACK:
                    return "answered"
                if kind == _GOAWAY:
                    assert int.from_bytes(payload[4:8]) == _ENHANCE_YOUR_CALM
                    return payload[8:].decode()


async def connected(sidecar: Sidecar) -> Connection:
    path = sidecar.address.removeprefix("unix:")
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(_PREFACE + _frame(_SETTINGS))
    return Connection(reader, writer)


async def ping_every(sidecar: Sidecar, interval: timedelta, times: int) -> list[str]:
    """How pings between calls are answered."""
    connection = await connected(sidecar)
    try:
        answers = []
        for _ in range(times):
            answers.append(await connection.ping())
            await asyncio.sleep(interval.total_seconds())
        return answers
    finally:
        connection._writer.close()
        await asyncio.gather(connection._writer.wait_closed(), return_exceptions=True)


def with_interval(monkeypatch: pytest.MonkeyPatch, interval: timedelta) -> None:
    """A sidecar that takes pings so often, so that no test has to wait for as long as clients do."""
    options: dict[str, Any] = dict(serving._OPTIONS)
    options["grpc.http2.min_ping_interval_without_data_ms"] = interval // timedelta(milliseconds=1)
    monkeypatch.setattr(serving, "_OPTIONS", tuple(options.items()))


async def test_pings_at_the_interval_are_taken_for_as_long_as_nobody_calls(
    start_sidecar: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_interval(monkeypatch, timedelta(milliseconds=50))
    sidecar = await start_sidecar()
    # A slow machine makes them rarer, never more frequent.
    assert await ping_every(sidecar, timedelta(milliseconds=100), 8) == ["answered"] * 8


async def test_pings_that_are_faster_end_the_connection(start_sidecar: Callable[..., Any]) -> None:
    sidecar = await start_sidecar()
    answers = await ping_every(sidecar, timedelta(), 8)
    assert answers[0] == "answered"
    assert "too_many_pings" in answers


def test_our_clients_ping_less_often_than_the_sidecar_allows() -> None:
    options = _channel.connection(
        "keyturn:1",
        token=None,
        root_certificates=None,
        private_key=None,
        certificate_chain=None,
        tls=True,
    ).options
    ours, allowed = dict(options), dict[str, Any](serving._OPTIONS)
    assert ours["grpc.keepalive_time_ms"] == 30_000
    assert ours["grpc.keepalive_timeout_ms"] == 5_000
    assert allowed["grpc.http2.min_ping_interval_without_data_ms"] < 10_000
    # Between calls too, and without end: both sides have to say so.
    assert ours["grpc.keepalive_permit_without_calls"] == allowed["grpc.keepalive_permit_without_calls"] == 1
    assert ours["grpc.http2.max_pings_without_data"] == 0
