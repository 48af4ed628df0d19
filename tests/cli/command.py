"""The command `keyturn` as people run it: a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import grpc

from tests.factories import Connection
from tests.support import MASTER_KEY, eventually

_LIMIT_SECONDS = 60


class Finished(NamedTuple):
    """What a command came to."""

    code: int
    out: str
    err: str


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment_of(**variables: str) -> dict[str, str]:
    """What a command gets to see: little of ours, and `variables`."""
    return {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "COLUMNS": "300", **variables}


async def _start(
    *arguments: str, stdout: int, stderr: int | Any, variables: dict[str, str]
) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "keyturn_server", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        cwd="/",
        env=environment_of(**variables),
    )


async def keyturn(*arguments: str, **variables: str) -> Finished:
    """Run a command that ends by itself."""
    pipe = asyncio.subprocess.PIPE
    process = await _start(*arguments, stdout=pipe, stderr=pipe, variables=variables)
    try:
        async with asyncio.timeout(_LIMIT_SECONDS):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return Finished(process.returncode or 0, out.decode(), err.decode())


@asynccontextmanager
async def rotating(
    *arguments: str, database: str, current: str, retired: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """`keyturn keys rotate` as it runs. What still runs at the end of the block is killed."""
    nowhere = asyncio.subprocess.DEVNULL
    variables = {
        "KEYTURN_DATABASE_URL": database,
        "ENCRYPTION_KEY": current,
        "ENCRYPTION_KEYS_RETIRED": retired,
    }
    process = await _start("keys", "rotate", *arguments, stdout=nowhere, stderr=nowhere, variables=variables)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@dataclass(kw_only=True)
class Served:
    """A running `keyturn serve`."""

    process: asyncio.subprocess.Process
    output: Path
    """All that it prints."""
    addresses: list[str]

    @property
    def text(self) -> str:
        return self.output.read_text()

    @property
    def events(self) -> list[dict[str, Any]]:
        """Its log, without the lines that are not JSON: see `strays`."""
        return [json.loads(line) for line in self.text.splitlines() if line.startswith("{")]

    @property
    def strays(self) -> list[str]:
        """Lines of its log that are not JSON."""
        return [line for line in self.text.splitlines() if not line.startswith("{")]

    def event(self, name: str) -> dict[str, Any] | None:
        """The first event of that name, if there is one yet."""
        return next((event for event in self.events if event["event"] == name), None)

    def channel(self, index: int = 0) -> grpc.aio.Channel:
        """A connection of its own to one of the addresses."""
        return grpc.aio.insecure_channel(
            self.addresses[index], options=[("grpc.use_local_subchannel_pool", 1)]
        )

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def end(self) -> int:
        """How the process ends, which it is about to do by itself."""
        async with asyncio.timeout(_LIMIT_SECONDS):
            return await self.process.wait()


@asynccontextmanager
async def started(directory: Path, *arguments: str, **variables: str) -> AsyncIterator[Served]:
    """`keyturn serve`, which may not serve yet. What still runs at the end of the block is killed."""
    output = directory / f"{secrets.token_hex(4)}.log"
    with output.open("wb") as file:
        process = await _start(
            "serve", *arguments, stdout=file.fileno(), stderr=file.fileno(), variables=variables
        )
    try:
        yield Served(process=process, output=output, addresses=[])
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@asynccontextmanager
async def serving(directory: Path, *arguments: str, **variables: str) -> AsyncIterator[Served]:
    """`keyturn serve`, once it serves. What still runs at the end of the block is killed."""
    async with started(directory, *arguments, **variables) as served:

        async def serves() -> dict[str, Any] | None:
            assert served.process.returncode is None, f"it ended: {served.text}"
            return served.event("serving")

        served.addresses = (await eventually(serves, seconds=_LIMIT_SECONDS))["addresses"]
        yield served


@asynccontextmanager
async def embedded(
    directory: Path, *arguments: str, **variables: str
) -> AsyncIterator[tuple[Served, grpc.aio.Channel]]:
    """A sidecar with a database of its own in `directory`, and a channel to it."""
    places = ("--embedded", str(directory / "pg"), "--listen", f"unix:{directory}/run/s")
    async with (
        serving(directory, *places, *arguments, **{"ENCRYPTION_KEY": MASTER_KEY, **variables}) as served,
        served.channel() as channel,
    ):
        yield served, channel
        if served.process.returncode is None:
            served.signal(signal.SIGTERM)
            assert await served.end() == 0


@asynccontextmanager
async def inside(directory: Path) -> AsyncIterator[Connection]:
    """A connection to the embedded database in `directory`."""
    connection: Connection = await asyncpg.connect(
        f"postgresql://keyturn@/keyturn?host={directory}/pg/run&sslmode=disable"
    )
    try:
        yield connection
    finally:
        await connection.close()
