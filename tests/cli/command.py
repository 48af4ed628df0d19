"""The command `keyturn` as people run it: a process of its own."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import asyncpg
import grpc

from tests.canaries import check_text
from tests.factories import Connection
from tests.support import MASTER_KEY, Sidecar, eventually

_LIMIT_SECONDS = 60
_KEYTURN = (sys.executable, "-m", "keyturn_server")


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
    *arguments: str,
    program: Sequence[str] = _KEYTURN,
    stdin: int = asyncio.subprocess.DEVNULL,
    stdout: int,
    stderr: int | Any,
    variables: dict[str, str],
) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(*program, *arguments),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        cwd="/",
        env=environment_of(**variables),
    )


async def keyturn(*arguments: str, **variables: str) -> Finished:
    """Run a command that ends by itself."""
    return await _finished(arguments, variables, b"")


async def _finished(arguments: Sequence[str], variables: dict[str, str], stdin: bytes) -> Finished:
    pipe = asyncio.subprocess.PIPE
    process = await _start(*arguments, stdin=pipe, stdout=pipe, stderr=pipe, variables=variables)
    try:
        async with asyncio.timeout(_LIMIT_SECONDS):
            out, err = await process.communicate(stdin)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    check_text("stderr of a command", err.decode())
    return Finished(process.returncode or 0, out.decode(), err.decode())


@contextmanager
def sigint_ignored() -> Iterator[None]:
    """What is started in the block ignores SIGINT from the first, as if a shell ran it in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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


async def ask(sidecar: Sidecar, *arguments: str, stdin: bytes = b"") -> Finished:
    """Run a command that asks a running sidecar."""
    return await _finished(arguments, {"KEYTURN_ADDRESS": sidecar.address}, stdin)


async def told(sidecar: Sidecar, *arguments: str, stdin: bytes = b"") -> str:
    """What a command that asks a running sidecar tells people. It must end well, and say nothing else."""
    finished = await ask(sidecar, *arguments, stdin=stdin)
    assert (finished.code, finished.err) == (0, "")
    return finished.out


async def answered(sidecar: Sidecar, *arguments: str, stdin: bytes = b"", code: int = 0) -> Any:
    """What a command that asks a running sidecar tells programs."""
    finished = await ask(sidecar, *arguments, "--json", stdin=stdin)
    assert finished.code == code, finished.err
    return json.loads(finished.out)


def rows_of(text: str) -> list[list[str]]:
    """The cells of the lines of a table, its headings among them."""
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines()]


def check_fault(finished: Finished, code: int, *sentences: str) -> None:
    """Raises AssertionError unless the command ended with `code`, and with that on stderr alone."""
    assert (finished.code, finished.out) == (code, ""), finished.err
    assert finished.err.startswith("keyturn: ")
    assert "Traceback" not in finished.err
    for sentence in sentences:
        assert sentence in finished.err


# Makes its stdin the terminal of the session that it leads, and becomes the command.
_ON_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "keyturn_server", *sys.argv[1:]])
"""


async def keyturn_on_terminal(
    *arguments: str, typed: Mapping[str, str] = MappingProxyType({}), columns: int = 80, **variables: str
) -> tuple[int, str]:
    """Run a command on a terminal: its exit code, and all that was seen there. Once the terminal shows a
    key of `typed`, its value is typed."""
    return await asyncio.to_thread(_on_terminal, arguments, typed, columns, environment_of(**variables))


def _on_terminal(
    arguments: Sequence[str], typed: Mapping[str, str], columns: int, environment: dict[str, str]
) -> tuple[int, str]:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {"TERM": "xterm-256color", **environment}
    environment.pop("COLUMNS")
    process = subprocess.Popen(
        [sys.executable, "-c", _ON_TERMINAL, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env=environment,
        cwd="/",
    )
    os.close(theirs)
    shown, waiting = b"", dict(typed)
    try:
        while select.select([ours], [], [], _LIMIT_SECONDS)[0]:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            shown += part
            for prompt in [prompt for prompt in waiting if prompt.encode() in shown]:
                os.write(ours, waiting.pop(prompt).encode())
        return process.wait(_LIMIT_SECONDS), shown.decode().replace("\r\n", "\n")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(ours)


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

    def event(self, name: str, **facts: Any) -> dict[str, Any] | None:
        """The first event of that name and with those facts, if there is one yet."""
        found = (event for event in self.events if event["event"] == name)
        return next((event for event in found if facts.items() <= event.items()), None)

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
async def started(
    directory: Path, *arguments: str, program: Sequence[str] = _KEYTURN, **variables: str
) -> AsyncIterator[Served]:
    """`keyturn serve`, which may not serve yet. What still runs at the end of the block is killed.

    `program` starts `keyturn` with what stands behind it."""
    output = directory / f"{secrets.token_hex(4)}.log"
    with output.open("wb") as file:
        process = await _start(
            *("serve", *arguments),
            program=program,
            stdout=file.fileno(),
            stderr=file.fileno(),
            variables=variables,
        )
    try:
        yield Served(process=process, output=output, addresses=[])
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    check_text("the output of a sidecar", output.read_text())


@asynccontextmanager
async def serving(
    directory: Path, *arguments: str, program: Sequence[str] = _KEYTURN, **variables: str
) -> AsyncIterator[Served]:
    """`keyturn serve`, once it serves. What still runs at the end of the block is killed."""
    async with started(directory, *arguments, program=program, **variables) as served:

        async def serves() -> dict[str, Any] | None:
            assert served.process.returncode is None, f"it ended: {served.text}"
            # Each of several workers has such a line, before the supervisor has one for all of them.
            return next(
                (event for event in served.events if event["event"] == "serving" and "worker" not in event),
                None,
            )

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
