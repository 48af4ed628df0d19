"""Running a load generator in a process of its own: ours (`load.py`), or h2load."""

from __future__ import annotations

import asyncio
import re
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.load import Load, LoadError, percentile, write_bodies
from tests.bench.machine import running

HOW_TO_GET_H2LOAD = "apt-get update && apt-get install -y nghttp2-client"

_WARM_UP_SECONDS = 0.5
_MOST_CONNECTIONS = 4
_PREFIX_BYTES = 5  # gRPC's, before each message
_HEADERS = (
    "content-type: application/grpc",
    "te: trailers",
    "user-agent: keyturn-bench",
    "grpc-timeout: 10S",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How hard to drive a server, and from where."""

    concurrency: int
    """Calls in flight, over all connections."""
    seconds: float
    cores: frozenset[int]
    """The generator's own."""
    directory: Path
    """For the files that the generators read and write."""
    most_connections: int = _MOST_CONNECTIONS
    most_warm_up_seconds: float = _WARM_UP_SECONDS

    @property
    def connections(self) -> int:
        """As many as a few gateway processes would have."""
        return min(self.most_connections, self.concurrency)

    @property
    def warm_up_seconds(self) -> float:
        """Before the measured time; rates and latencies leave it out."""
        return min(self.most_warm_up_seconds, self.seconds)


async def drive(address: str, path: str, bodies: Sequence[bytes], effort: Effort, *, once: bool) -> Load:
    """Calls by our generator, with a body each; with `once` no body twice. Raises `LoadError`."""
    file = effort.directory / "bodies"
    write_bodies(file, bodies)
    printed = await _output(
        effort,
        *(sys.executable, "-m", "tests.bench.load", address, path, str(file)),
        *(f"--connections={effort.connections}", f"--concurrency={effort.concurrency}"),
        *(f"--warm-up={effort.warm_up_seconds}", f"--seconds={effort.seconds}"),
        *(["--once"] if once else []),
    )
    return Load.from_json(printed)


def has_h2load() -> bool:
    """Whether h2load is installed."""
    return shutil.which("h2load") is not None


async def drive_by_h2load(
    address: str, path: str, body: bytes, effort: Effort, *, response_bytes: int
) -> Load:
    """Calls by h2load, all with the same body, answered with so many bytes each. Raises `LoadError`."""
    file, log = effort.directory / "body", effort.directory / "h2load.log"
    write_bodies(file, [body])
    log.unlink(missing_ok=True)
    began, cpu_began = time.perf_counter(), _cpu_seconds_of_the_ended()
    printed = await _output(
        effort,
        *("h2load", f"--data={file}", f"--log-file={log}", *(f"--header={header}" for header in _HEADERS)),
        *(f"--clients={effort.connections}", f"-m{effort.concurrency // effort.connections}"),
        *(
            f"--warm-up-time={effort.warm_up_seconds * 1000:.0f}ms",
            f"--duration={effort.seconds * 1000:.0f}ms",
        ),
        f"http://{address}{path}",
    )
    spans = [int(line.split()[2]) for line in log.read_text().splitlines()]
    data = re.search(r"\((\d+)\) data", printed)
    # An error of gRPC's is a 200 without a message, so the messages are what counts. (h2load counts
    # those of the warm-up among the bytes, and not among the requests.)
    answered = int(data[1]) // (response_bytes + _PREFIX_BYTES) if data else 0
    if not spans or answered < len(spans) * 0.95:
        raise LoadError(f"{path}: of {len(spans)} calls, {answered} were answered with a message")
    return Load(
        calls_per_second=len(spans) / effort.seconds,
        p50_ms=percentile(spans, 50) / 1000,
        p99_ms=percentile(spans, 99) / 1000,
        made=answered,
        cpu_seconds=_cpu_seconds_of_the_ended() - cpu_began,
        wall_seconds=time.perf_counter() - began,
        sample=b"",
    )


def _cpu_seconds_of_the_ended() -> float:
    """Of all our children that have ended: h2load, between two looks."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


async def _output(effort: Effort, *command: str) -> str:
    async with running(command, cores=effort.cores, stdout=asyncio.subprocess.PIPE) as process:
        printed, _ = await process.communicate()
    if process.returncode:
        raise LoadError(f"{command[0]} failed, with exit code {process.returncode}")
    return printed.decode()
