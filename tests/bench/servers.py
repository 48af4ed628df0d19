"""The two servers, each a process of its own: a sidecar as an operator runs it, and the echo."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.machine import Cores, children, cpu_seconds, move, running
from tests.support import MASTER_KEY

_START_SECONDS = 90.0


class NotServing(Exception):  # noqa: N818 - the word of the health check
    """A server did not come up; the text has the end of its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server that listens."""

    address: str
    pid: int
    worker_pids: tuple[int, ...] = ()
    """Where `pid` is a supervisor."""
    postgres_pid: int | None = None

    def cpu_seconds(self) -> tuple[float, float]:
        """The CPU time so far: of the server's process, and of its PostgreSQL."""
        postgres: Collection[int] = ()
        if self.postgres_pid is not None:
            postgres = (self.postgres_pid, *children(self.postgres_pid))
        return cpu_seconds([self.pid, *self.worker_pids]), cpu_seconds(postgres)


@asynccontextmanager
async def echo(sizes: Collection[int], *, cores: Cores) -> AsyncIterator[Server]:
    """An echo that answers with messages of these sizes, in bytes."""
    command = [sys.executable, "-m", "tests.bench.echo", *map(str, sorted(sizes))]
    async with running(command, cores=cores.server, stdout=asyncio.subprocess.PIPE) as process:
        assert process.stdout is not None
        if not (port := await process.stdout.readline()):
            raise NotServing("the echo ended at once")
        yield Server(address=f"127.0.0.1:{int(port)}", pid=process.pid)


@asynccontextmanager
async def sidecar(
    directory: Path,
    *,
    cores: Cores,
    workers: int = 1,
    listen: str = "127.0.0.1:0",
    settings: Mapping[str, str] | None = None,
) -> AsyncIterator[tuple[Server, str]]:
    """`keyturn serve` with an embedded PostgreSQL in `directory`, and the DSN of its database.

    `settings` are the sidecar's own, as in its environment: `{"KEYTURN_CACHED_PROFILES": "1000"}`.
    """
    log = directory / "keyturn.log"
    database = directory / "pg"
    command = [sys.executable, "-m", "keyturn_server", "serve", "--embedded", str(database)]
    command += ["--listen", listen, "--insecure-loopback", "--workers", str(workers)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KEYTURN_")}
    environment |= {"ENCRYPTION_KEY": MASTER_KEY, "ENCRYPTION_KEYS_RETIRED": "", **(settings or {})}
    with log.open("wb") as stderr:
        async with running(command, cores=cores.server, environment=environment, stderr=stderr) as process:
            address = await _address(process, log)
            postgres = int((database / "data" / "postmaster.pid").read_text().split()[0])
            move((postgres, *children(postgres)), cores.rest)
            yield (
                Server(
                    address=address,
                    pid=process.pid,
                    worker_pids=tuple(children(process.pid)) if workers > 1 else (),
                    postgres_pid=postgres,
                ),
                f"postgresql://keyturn@/keyturn?host={database}/run&port=5432&sslmode=disable",
            )


async def _address(process: asyncio.subprocess.Process, log: Path) -> str:
    try:
        async with asyncio.timeout(_START_SECONDS):
            while process.returncode is None:
                for line in log.read_text().splitlines():
                    event = json.loads(line) if line.startswith("{") else {}
                    if event.get("event") == "serving" and "worker" not in event:
                        address: str = event["addresses"][0]
                        return address
                await asyncio.sleep(0.05)
    except TimeoutError:
        pass
    raise NotServing(f"the sidecar does not serve; its log ends with:\n{log.read_text()[-2000:]}")
