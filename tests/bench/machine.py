"""What the measurements run on: cores, processes, and clocks of the CPU time they take. Linux."""

from __future__ import annotations

import asyncio
import os
import platform
import signal
import statistics
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO

_END_SECONDS = 40.0
_FSYNC_TRIES = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Cores:
    """Which cores the server in question has, and which the load generator and PostgreSQL."""

    server: frozenset[int]
    rest: frozenset[int]

    @classmethod
    def split(cls) -> Cores:
        """One for the server, the others for the rest; the same one where there is only one."""
        first, *others = sorted(os.sched_getaffinity(0))
        return cls(server=frozenset({first}), rest=frozenset(others or {first}))

    def __str__(self) -> str:
        server, rest = (", ".join(map(str, sorted(cores))) for cores in (self.server, self.rest))
        if self.server == self.rest:
            return f"one core for everything ({server}): the servers share it with what drives them"
        return f"each server pinned to core {server}; load generator and PostgreSQL to core {rest}"


@asynccontextmanager
async def running(
    command: Sequence[str | Path],
    *,
    cores: Collection[int],
    environment: dict[str, str] | None = None,
    stdout: int | None = None,
    stderr: IO[bytes] | None = None,
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A child on these cores, ended with SIGTERM at the end of the block, with SIGKILL if need be.

    Ctrl-C reaches us alone, so that things end in order.
    """
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # children inherit it from their first moment on
    try:
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, stdout=stdout, stderr=stderr, start_new_session=True
        )
    finally:
        os.sched_setaffinity(0, ours)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(_END_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


def children(pid: int) -> list[int]:
    """The children of a process whose only thread is its first."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def move(pids: Collection[int], cores: Collection[int]) -> None:
    """Pins processes that run already; what they start from now on too."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.sched_setaffinity(pid, cores)


def cpu_seconds(pids: Collection[int]) -> float:
    """The CPU time that processes have taken so far, all their threads together."""
    total = 0.0
    for pid in pids:
        with suppress(OSError):  # it has ended
            total += time.clock_gettime((~pid) << 3 | 2)  # clock_getcpuclockid(3), which Python lacks
    return total


def memory_mb(pid: int) -> tuple[float, float]:
    """The memory of a process that is in RAM, in MB: now, and at its peak."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) / 1024, int(lines["VmHWM"].split()[0]) / 1024


def fsync_ms(directory: Path) -> float:
    """How long a write of 8 KiB takes to get to the disk: the median of some."""
    spans = []
    with (directory / "fsync").open("wb", buffering=0) as file:
        for _ in range(_FSYNC_TRIES):
            file.write(bytes(8192))
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            spans.append(time.perf_counter() - began)
    return statistics.median(spans) * 1000


def described() -> str:
    """The machine and the versions that matter, in a line."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return (
        f"{os.cpu_count()} cores ({names[0] if names else platform.machine()}), "
        f"Python {platform.python_version()}, grpcio {version('grpcio')}, uvloop {version('uvloop')}"
    )


def end_on_signals() -> None:
    """Makes Ctrl-C and SIGTERM cancel the current task, once: what it tidies up is not interrupted."""
    task = asyncio.current_task()
    assert task is not None

    def end() -> None:
        if not task.cancelling():
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, end)
