"""`make bench-workers`: own-key Decide by one process and by several, in turn, over TCP and a Unix socket."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import asyncpg
import grpc

from tests.bench.command import bench_directory, carry_out
from tests.bench.generators import Effort, drive
from tests.bench.load import Load, LoadError
from tests.bench.machine import Cores, described
from tests.bench.measurements import MEASUREMENTS, Gateway
from tests.bench.servers import Server, sidecar

_MEASUREMENT = next(one for one in MEASUREMENTS if one.name == "decide-own-key")

_HOW = """\
How: {measurement}; a closed loop, {concurrency} calls in flight on {connections} connections; {seconds:g} s
measured after a warm-up; all four sidecars in turn, {rounds}x; medians. Nothing is pinned: workers,
PostgreSQL, which has nothing to do here, and the load generator share all cores. "busy" is how many cores the
sidecar used, "generator" how much of one the generator did: where the two come to all there are, more workers
gain nothing, and where they do not, other work on this machine took the rest. "times" compares with one
process in the same round.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One run of calls against one sidecar."""

    load: Load
    cpu_us: float
    """Processor time a call, of all its processes but PostgreSQL's."""
    busy: float
    """How many cores they used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A sidecar and what came of it, round by round."""

    name: str
    server: Server
    turns: list[Turn] = field(default_factory=list)


async def bench(options: argparse.Namespace) -> None:
    """Measures, and prints the table."""
    everything = frozenset(os.sched_getaffinity(0))
    cores = Cores(server=everything, rest=everything)
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(bench_directory())
        effort = Effort(
            concurrency=options.concurrency,
            seconds=options.seconds,
            cores=everything,
            directory=directory,
            most_connections=options.connections,
        )
        how = _HOW.format(**vars(options), measurement=_MEASUREMENT.what)
        print(f"{described()}\nLoad average before: {os.getloadavg()[0]:.1f}\n\n{how}", flush=True)
        rows: list[Row] = []
        for kind in ("TCP", "Unix"):
            for workers in (1, options.workers):
                home = directory / f"{kind}-{workers}"
                home.mkdir(mode=0o755)
                listen = "127.0.0.1:0" if kind == "TCP" else f"unix:{home}/run/s"
                server, dsn = await stack.enter_async_context(
                    sidecar(home, cores=cores, workers=workers, listen=listen)
                )
                connection = await asyncpg.connect(dsn)
                stack.push_async_callback(connection.close)
                channel = await stack.enter_async_context(grpc.aio.insecure_channel(server.address))
                gateway = Gateway(channel, connection)
                await gateway.make_users(options.users)
                rows.append(Row(name=f"{kind}, {workers}", server=server))
        # The ids of users are the same everywhere.
        requests = await _MEASUREMENT.bodies(gateway, options.users)
        for number in range(1, options.rounds + 1):
            for row in rows:
                turn = await _turn(row.server, requests, effort)
                row.turns.append(turn)
                rate = f"{turn.load.calls_per_second:,.0f}/s"
                print(f"round {number}/{options.rounds}, {row.name}: {rate}", file=sys.stderr, flush=True)
    print("\n".join(_table(rows)))


def _table(rows: Sequence[Row]) -> Iterable[str]:
    headings = ("calls/s", "times", "p50 ms", "p99 ms", "CPU us/call", "busy", "generator")
    yield f"{'workers':10}" + "".join(f"{heading:>12}" for heading in headings)
    for index, row in enumerate(rows):
        rates = [turn.load.calls_per_second for turn in row.turns]
        alone = [turn.load.calls_per_second for turn in rows[index - index % 2].turns]
        figures = (
            f"{statistics.median(rates):,.0f}",
            f"{statistics.median(ours / one for ours, one in zip(rates, alone, strict=True)):.2f}",
            f"{statistics.median(turn.load.p50_ms for turn in row.turns):.1f}",
            f"{statistics.median(turn.load.p99_ms for turn in row.turns):.1f}",
            f"{statistics.median(turn.cpu_us for turn in row.turns):.0f}",
            f"{statistics.median(turn.busy for turn in row.turns):.2f}",
            f"{statistics.median(turn.load.generator_busy for turn in row.turns):.2f}",
        )
        yield f"{row.name:10}" + "".join(f"{figure:>12}" for figure in figures)


async def _turn(server: Server, requests: list[bytes], effort: Effort) -> Turn:
    """One run of calls."""
    before, _ = server.cpu_seconds()
    load = await drive(server.address, _MEASUREMENT.path, requests, effort, once=False)
    after, _ = server.cpu_seconds()
    if not _MEASUREMENT.is_right(load.sample):
        raise LoadError("an answer is not the one to be measured")
    used = after - before
    return Turn(load=load, cpu_us=used / load.made * 1e6, busy=used / load.wall_seconds)


def main() -> None:
    """Reads the options, measures, and leaves nothing behind. Exit codes: 0, 1 with the reason, 130."""
    parser = argparse.ArgumentParser(prog="make bench-workers ARGS=…", description=__doc__)
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 2, help="beside one (default: a core each)"
    )
    parser.add_argument("--connections", type=int, default=16, help="of the generator (default 16)")
    parser.add_argument("--concurrency", type=int, default=64, help="calls in flight (default 64)")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured in each turn (default 5)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each sidecar (default 3)")
    parser.add_argument("--users", type=int, default=1000, help="in each database (default 1000)")
    options = parser.parse_args()
    carry_out(bench(options))


if __name__ == "__main__":
    main()
