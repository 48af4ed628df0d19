"""`make bench`: what a decision and a record cost, beside a bare echo on the same machine in the same run."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import grpc

from tests.bench.command import BenchError, bench_directory, carry_out
from tests.bench.echo import path_of
from tests.bench.generators import HOW_TO_GET_H2LOAD, Effort, drive, drive_by_h2load, has_h2load
from tests.bench.load import Load
from tests.bench.machine import Cores, described, fsync_ms
from tests.bench.measurements import MEASUREMENTS, Gateway, Measurement
from tests.bench.servers import Server, echo, sidecar
from tests.invariants import check_invariants

_HOW = """\
How: a closed loop, {concurrency} calls in flight on {connections} connections; {seconds:g} s measured after a
warm-up; echo and Keyturn in turn, {rounds}x; {users:,} users. All figures are medians over the rounds.
"of echo" compares the rates of one round. The echo is a bare grpc.aio server on uvloop which takes the
same requests and answers with as many bytes.

Load generator: HTTP/2 framed by hand (tests/bench/load.py), in a process of its own. h2load sends one
body over and over, and a ticket settles only once. The row by h2load, which is written in C, must tell
the same ratio as the row above it.

"CPU us/call" is processor time per call: of the server's process, and of all PostgreSQL's. "busy" is how
much of a core each process used. The generator ("gen"): well below 100 %, its cost is not in the figures.
The echo: waits for nothing, so what is missing to 100 % was taken by other work on this machine, and the
row had better be measured again. Keyturn: what is missing beyond that was spent waiting for PostgreSQL.

What was acknowledged is counted in the database after every turn, and the books are checked at the end.
"""

_FIRST_GUESS = 0.4  # of the echo's rate: what a call that needs a body of its own may reach
_BATCHED = 8  # times as many items in batches
_SPARE = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One run of calls against one server; CPU times in microseconds a call."""

    load: Load
    server_cpu_us: float
    postgres_cpu_us: float
    server_busy: float
    """How much of one core the server used."""

    def summary(self, items: int = 1) -> dict[str, float]:
        """The figures by name; rates and processor time for each of so many items in a call."""
        return {
            "calls_per_second": self.load.calls_per_second * items,
            "p50_ms": self.load.p50_ms,
            "p99_ms": self.load.p99_ms,
            "server_cpu_us": self.server_cpu_us / items,
            "postgres_cpu_us": self.postgres_cpu_us / items,
            "server_busy": self.server_busy,
            "generator_busy": self.load.generator_busy,
            "calls": self.load.made,
        }


@dataclass(slots=True, kw_only=True)
class Row:
    """A measurement and what came of it, round by round."""

    measurement: Measurement
    request: bytes
    response: bytes
    """Of one real call."""
    echo: list[Turn] = field(default_factory=list)
    keyturn: list[Turn] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """The medians, and the rounds they are from."""
        items = self.measurement.items
        rounds = {
            "echo": [t.summary() for t in self.echo],
            "keyturn": [t.summary(items) for t in self.keyturn],
        }
        pairs = zip(self.echo, self.keyturn, strict=True)
        return {
            "name": self.measurement.name,
            "what": self.measurement.what,
            "request_bytes": len(self.request),
            "response_bytes": len(self.response),
            "of_echo": statistics.median(
                ours.load.calls_per_second * items / bare.load.calls_per_second for bare, ours in pairs
            ),
            **{name: _medians(turns) for name, turns in rounds.items()},
            "rounds": rounds,
        }


def _medians(turns: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Two servers, and the means to drive them in turn."""

    gateway: Gateway
    echo: Server
    sidecar: Server
    effort: Effort
    users: int

    async def one_round(self, row: Row, label: str) -> None:
        """The echo's turn, then Keyturn's. Raises `BenchError` and `LoadError`."""
        measurement = row.measurement
        bare = await self._turn(self.echo, path_of(len(row.response)), [row.request], row, once=False)
        _say(f"{label}: echo {bare.load.calls_per_second:,.0f}/s")

        requests = await measurement.bodies(self.gateway, self._requests_for(row, bare))
        rows_before = await self.gateway.count(measurement)
        ours = await self._turn(self.sidecar, measurement.path, requests, row, once=measurement.once)
        _say(f"{label}: Keyturn {ours.load.calls_per_second:,.0f}/s")

        # Of a batch's answer the sample is the first frame alone.
        sample = ours.load.sample if measurement.unary is None else row.response
        if sample and not measurement.is_right(sample):
            raise BenchError(f"{measurement.name}: an answer is not the one to be measured")
        rows = await self.gateway.count(measurement) - rows_before
        if measurement.rows and rows != ours.load.made * measurement.items:
            raise BenchError(f"{measurement.name}: {ours.load.made} calls acknowledged, {rows} rows found")
        row.echo.append(bare)
        row.keyturn.append(ours)

    def _requests_for(self, row: Row, bare: Turn) -> int:
        if not row.measurement.once:
            return self.users
        seen = max((turn.load.calls_per_second for turn in row.keyturn), default=0.0)
        rate = seen or bare.load.calls_per_second * _FIRST_GUESS / row.measurement.items * _BATCHED
        return round(rate * _SPARE * (self.effort.warm_up_seconds + self.effort.seconds))

    async def _turn(
        self, server: Server, path: str, requests: Sequence[bytes], row: Row, *, once: bool
    ) -> Turn:
        server_before, postgres_before = server.cpu_seconds()
        if row.measurement.by_h2load:
            load = await drive_by_h2load(
                server.address, path, requests[0], self.effort, response_bytes=len(row.response)
            )
        else:
            load = await drive(server.address, path, requests, self.effort, once=once)
        server_after, postgres_after = server.cpu_seconds()
        return Turn(
            load=load,
            server_cpu_us=(server_after - server_before) / load.made * 1e6,
            postgres_cpu_us=(postgres_after - postgres_before) / load.made * 1e6,
            server_busy=(server_after - server_before) / load.wall_seconds,
        )


async def bench(options: argparse.Namespace) -> None:
    """Measures, and prints the table."""
    cores = Cores.split()
    os.sched_setaffinity(0, cores.rest)
    measurements = [one for one in MEASUREMENTS if not options.only or one.name in options.only]
    if any(one.by_h2load for one in measurements) and not has_h2load():
        measurements = [one for one in measurements if not one.by_h2load]
        print(f"h2load is not installed, so its row is left out. To have it: {HOW_TO_GET_H2LOAD}\n")

    async with AsyncExitStack() as stack:
        directory = stack.enter_context(bench_directory())
        effort = Effort(
            concurrency=options.concurrency, seconds=options.seconds, cores=cores.rest, directory=directory
        )
        keyturn, dsn = await stack.enter_async_context(sidecar(directory, cores=cores))
        connection = await asyncpg.connect(dsn)
        stack.push_async_callback(connection.close)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(keyturn.address))
        gateway = Gateway(channel, connection)
        await gateway.make_users(options.users)
        rows = [
            Row(measurement=one, request=request, response=response)
            for one in measurements
            for request, response in [await gateway.call(one)]
        ]
        bare = await stack.enter_async_context(echo({len(row.response) for row in rows}, cores=cores))

        store = await connection.fetchrow(
            "SELECT current_setting('server_version') AS version, current_setting('fsync') AS fsync,"
            " current_setting('synchronous_commit') AS synchronous_commit"
        )
        assert store is not None
        machine = (
            f"{described()}\nEmbedded PostgreSQL {store['version']}: fsync {store['fsync']},"
            f" synchronous_commit {store['synchronous_commit']}; an fdatasync of 8 KiB takes"
            f" {fsync_ms(directory):.2f} ms here\n{cores}\nLoad average before: {os.getloadavg()[0]:.1f}"
        )
        print(f"{machine}\n\n{_HOW.format(**vars(options), connections=effort.connections)}", flush=True)

        both = Bench(gateway=gateway, echo=bare, sidecar=keyturn, effort=effort, users=options.users)
        for number in range(1, options.rounds + 1):
            for row in rows:
                await both.one_round(row, f"round {number}/{options.rounds}, {row.measurement.name}")
        await check_invariants(connection)

    summaries = [row.summary() for row in rows]
    print("\n".join(_table(summaries)))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine.splitlines(), "rows": summaries}, indent=2))


def _say(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


_COLUMNS: tuple[tuple[str, str, int, Callable[[dict[str, Any]], str]], ...] = (
    ("bytes", "in", 7, lambda row: f"{row['request_bytes']}"),
    ("", "out", 6, lambda row: f"{row['response_bytes']}"),
    ("calls/s", "echo", 9, lambda row: f"{row['echo']['calls_per_second']:,.0f}"),
    ("", "Keyturn", 9, lambda row: f"{row['keyturn']['calls_per_second']:,.0f}"),
    ("", "of echo", 9, lambda row: f"{row['of_echo']:.2f}"),
    ("p50 ms", "echo", 8, lambda row: f"{row['echo']['p50_ms']:.1f}"),
    ("", "Keyturn", 9, lambda row: f"{row['keyturn']['p50_ms']:.1f}"),
    ("p99 ms", "echo", 8, lambda row: f"{row['echo']['p99_ms']:.1f}"),
    ("", "Keyturn", 9, lambda row: f"{row['keyturn']['p99_ms']:.1f}"),
    ("CPU us/call", "echo", 13, lambda row: f"{row['echo']['server_cpu_us']:.0f}"),
    ("", "Keyturn", 9, lambda row: f"{row['keyturn']['server_cpu_us']:.0f}"),
    ("", "PostgreSQL", 12, lambda row: f"{row['keyturn']['postgres_cpu_us']:.0f}"),
    ("busy", "echo", 7, lambda row: f"{row['echo']['server_busy']:.0%}"),
    ("", "Keyturn", 9, lambda row: f"{row['keyturn']['server_busy']:.0%}"),
    ("", "gen", 6, lambda row: f"{max(row[one]['generator_busy'] for one in ('echo', 'keyturn')):.0%}"),
)


def _table(rows: Sequence[dict[str, Any]]) -> Iterable[str]:
    width = max(len(row["name"]) for row in rows)
    yield " " * width + "".join(f"{group:>{size}}" for group, _, size, _ in _COLUMNS)
    yield " " * width + "".join(f"{heading:>{size}}" for _, heading, size, _ in _COLUMNS)
    for row in rows:
        yield f"{row['name']:{width}}" + "".join(f"{show(row):>{size}}" for _, _, size, show in _COLUMNS)
    yield ""
    for row in rows:
        yield f"{row['name']:{width}}  {row['what']}"
    yield ""
    rates = {row["name"]: row["keyturn"]["calls_per_second"] for row in rows}
    for name, unary in ((one.name, one.unary) for one in MEASUREMENTS):
        if name in rates and unary in rates:
            yield f"{name}: {rates[name] / rates[unary]:.1f} times the rate of {unary}"


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if (value := kind(text)) <= 0:
            raise argparse.ArgumentTypeError("must be above 0")
        return value

    return parse


def main() -> None:
    """Reads the options, measures, and leaves nothing behind. Exit codes: 0, 1 with the reason, 130."""
    parser = argparse.ArgumentParser(prog="make bench ARGS=…", description=__doc__)
    number, seconds = _positive(int), _positive(float)
    parser.add_argument("--seconds", type=seconds, default=5.0, help="measured in each turn (default 5)")
    parser.add_argument("--rounds", type=number, default=3, help="turns of each server (default 3)")
    parser.add_argument("--concurrency", type=number, default=64, help="calls in flight (default 64)")
    parser.add_argument("--users", type=number, default=1000, help="of each kind (default 1000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE as well")
    parser.add_argument(
        "--only", action="append", choices=[one.name for one in MEASUREMENTS], help="may be given again"
    )
    options = parser.parse_args()
    carry_out(bench(options))


if __name__ == "__main__":
    main()
