"""`make bench-size`: what no cache has, asked of a small database and of a large one in turn; and memory."""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import asyncpg
import grpc

from tests.bench.command import BenchError, bench_directory, carry_out
from tests.bench.generators import Effort, drive
from tests.bench.load import Load
from tests.bench.machine import Cores, described, memory_mb
from tests.bench.measurements import MEASUREMENTS, Gateway, Measurement
from tests.bench.population import Population, fill, id_of
from tests.bench.servers import Server, sidecar
from tests.factories import Connection
from tests.invariants import check_invariants

T = TypeVar("T")

_HOW = """\
How: two sidecars, each with an embedded PostgreSQL of its own (shared_buffers of 64 MB); {concurrency} calls
in flight on one connection; in each turn {asked:,} users are asked about, everyone once; both databases
in turn; medians over the rounds. "times" compares within a round.

Cold, {rounds}x: it was announced that all users have changed, so that each call reads its user's profile; and
in the large database nobody has asked about these users since its server started.
Started, {starts}x: the first calls of a sidecar that has just started, PostgreSQL with it.
From disk, {starts}x: the same, with the files of the database put out of the kernel's cache.
"""

_TURN_SECONDS = 900.0  # at the most: a turn ends with its calls
_HURRIED = 64  # calls in flight where nobody takes the time
_PUSHED_SECONDS = 0.5  # an announcement takes a few milliseconds to arrive
_KINDS = tuple(
    next(one for one in MEASUREMENTS if one.name == name)
    for name in ("decide-own-key", "decide-credits", "record-ticket", "record-own-key")
)
_OWN_KEY = _KINDS[0]


@dataclass(slots=True, kw_only=True)
class Side:
    """A database of one size, and the users to ask about."""

    directory: Path
    population: Population
    unasked: list[int]
    asked: list[int]

    def users(self, count: int) -> list[str]:
        """So many users who have not been asked about; all over again once everybody has."""
        if len(self.unasked) < count:
            self.unasked, self.asked = [*self.unasked, *self.asked], []
        chosen, self.unasked = self.unasked[:count], self.unasked[count:]
        self.asked += chosen
        return [id_of(user) for user in chosen]

    def forget_pages(self) -> None:
        """Puts the files of the database, whose server must have ended, out of the kernel's cache."""
        for path in self.directory.joinpath("pg", "data").rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fdatasync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def bytes_on_disk(self) -> int:
        """The size of the database."""
        return sum(path.stat().st_size for path in self.directory.joinpath("pg", "data", "base").rglob("*"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A side whose sidecar runs."""

    side: Side
    server: Server
    connection: Connection
    gateway: Gateway

    async def forget_users(self) -> None:
        """Has the sidecar read every profile anew."""
        await self.connection.execute("SELECT pg_notify('keyturn', 'users')")
        await asyncio.sleep(_PUSHED_SECONDS)

    async def turn(self, measurement: Measurement, requests: Sequence[bytes], effort: Effort) -> Load:
        """Makes the calls. Raises `BenchError` and `LoadError`."""
        before = await self.gateway.count(measurement)
        load = await drive(self.server.address, measurement.path, requests, effort, once=True)
        if load.made != len(requests) or not measurement.is_right(load.sample):
            raise BenchError(f"{measurement.name}: an answer is not the one to be measured")
        if measurement.rows and await self.gateway.count(measurement) - before != load.made:
            raise BenchError(f"{measurement.name}: {load.made} calls acknowledged, other rows found")
        return load


@asynccontextmanager
async def running(
    side: Side, cores: Cores, settings: Mapping[str, str] | None = None
) -> AsyncIterator[Running]:
    """Its sidecar, for the length of the block."""
    async with AsyncExitStack() as stack:
        server, dsn = await stack.enter_async_context(sidecar(side.directory, cores=cores, settings=settings))
        connection: Connection = await asyncpg.connect(dsn)
        stack.push_async_callback(connection.close)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(server.address))
        gateway = Gateway(channel, connection)
        yield Running(side=side, server=server, connection=connection, gateway=gateway)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A kind of call under some circumstances, and what came of it, turn by turn."""

    name: str
    small: list[Load] = field(default_factory=list)
    large: list[Load] = field(default_factory=list)

    def figures(self) -> Iterable[str]:
        """Of the table: p50, p99 and their ratios."""
        for loads in (self.small, self.large):
            yield f"{statistics.median(load.p50_ms for load in loads):.2f}"
            yield f"{statistics.median(load.p99_ms for load in loads):.2f}"
        pairs = list(zip(self.small, self.large, strict=True))
        yield f"{statistics.median(large.p50_ms / small.p50_ms for small, large in pairs):.2f}"
        yield f"{statistics.median(large.p99_ms / small.p99_ms for small, large in pairs):.2f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Both sides, and the means to ask them in turn."""

    small: Side
    large: Side
    cores: Cores
    effort: Effort
    asked: int

    async def starts(self, count: int) -> Iterable[Row]:
        """The first calls of sidecars that have just started."""
        started, from_disk = Row(name="decide-own-key, started"), Row(name="decide-own-key, from disk")
        for number in range(count):
            for row in (started, from_disk):
                _say(f"start {number + 1}/{count}: {row.name}")
                for side, loads in _in_turn((self.small, row.small), (self.large, row.large), number):
                    if row is from_disk:
                        side.forget_pages()
                    async with running(side, self.cores) as one:
                        one.gateway.serve(side.users(self.asked))
                        requests = await one.gateway.asks_for_keys(self.asked)
                        loads.append(await one.turn(_OWN_KEY, requests, self.effort))
        return started, from_disk

    async def rounds(self, count: int) -> Iterable[Row]:
        """Every kind of call, cold; decisions on own keys with the profile cached as well."""
        warm = Row(name="decide-own-key, cached")
        rows = {kind.name: Row(name=f"{kind.name}, cold") for kind in _KINDS}
        async with running(self.small, self.cores) as small, running(self.large, self.cores) as large:
            for number in range(count):
                for one in (small, large):
                    one.gateway.serve(one.side.users(self.asked))
                for kind in _KINDS:
                    _say(f"round {number + 1}/{count}: {kind.name}")
                    row = rows[kind.name]
                    for one, loads in _in_turn((small, row.small), (large, row.large), number):
                        requests = await kind.bodies(one.gateway, self.asked)
                        await one.forget_users()
                        loads.append(await one.turn(kind, requests, self.effort))
                    if kind is _OWN_KEY:
                        for one, loads in _in_turn((small, warm.small), (large, warm.large), number):
                            requests = await kind.bodies(one.gateway, self.asked)
                            loads.append(await one.turn(kind, requests, self.effort))
            for one in (small, large):
                await check_invariants(one.connection)
        return *rows.values(), warm

    async def memory(self, cached: int) -> Sequence[str]:
        """How much memory the sidecar of the large database takes."""
        # No profile is to lapse on the way.
        effort = replace(self.effort, concurrency=_HURRIED)
        settings = {"KEYTURN_CACHED_PROFILES": str(cached), "KEYTURN_PROFILE_TTL": "P1D"}
        async with running(self.large, self.cores, settings) as one:
            asked, sizes = 0, [memory_mb(one.server.pid)[0]]
            lines = [f"{'started':>22} {sizes[0]:6.1f} MB"]
            for until in (self.asked, cached, 2 * cached):
                one.gateway.serve(one.side.users(until - asked))
                requests = await one.gateway.asks_for_keys(until - asked)
                _say(f"memory: {len(requests):,} users")
                if requests:
                    await one.turn(_OWN_KEY, requests, effort)
                asked = until
                sizes.append(memory_mb(one.server.pid)[0])
                lines.append(f"{f'after {asked:,} users':>22} {sizes[-1]:6.1f} MB")
            each = (sizes[2] - sizes[1]) * 1024 * 1024 / max(cached - self.asked, 1)
            return [*lines, f"{f'{cached:,} cached':>22} {each:6.0f} bytes a profile"]


def _in_turn(first: T, second: T, number: int) -> tuple[T, T]:
    return (first, second) if number % 2 == 0 else (second, first)


async def bench(options: argparse.Namespace) -> None:
    """Makes the databases, measures, and prints the figures."""
    cores = Cores.split()
    os.sched_setaffinity(0, cores.rest)
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(bench_directory())
        print(f"{described()}\n{cores}\nLoad average before: {os.getloadavg()[0]:.1f}\n")
        print(_HOW.format(**vars(options)), flush=True)
        share = options.few_users / options.users
        large = Population(users=options.users, keys=options.keys, usage_rows=options.usage_rows)
        small = Population(
            users=options.few_users,
            keys=round(options.keys * share),
            usage_rows=round(options.usage_rows * share),
        )
        asked = options.asked * (2 * options.starts + options.rounds) + 2 * options.cached_profiles
        sides = [
            await _made(directory / name, population, cores, population.some_users(asked))
            for name, population in (("small", small), ("large", large))
        ]
        both = Bench(
            small=sides[0],
            large=sides[1],
            cores=cores,
            effort=Effort(
                concurrency=options.concurrency,
                seconds=_TURN_SECONDS,
                cores=cores.rest,
                directory=directory,
                most_connections=1,
                most_warm_up_seconds=0,
            ),
            asked=options.asked,
        )
        rows = [*await both.starts(options.starts), *await both.rounds(options.rounds)]
        print("\n".join(_table(rows, both)))
        print(f"\nResident memory of the sidecar's process, {both.large.population.users:,} users:")
        print("\n".join(await both.memory(options.cached_profiles)))
        print(f"\nLoad average after: {os.getloadavg()[0]:.1f}")


async def _made(directory: Path, population: Population, cores: Cores, asked: list[int]) -> Side:
    directory.mkdir(mode=0o755)
    side = Side(directory=directory, population=population, unasked=asked, asked=[])
    began = time.perf_counter()
    async with running(side, cores) as one:
        await fill(one.connection, population, opened=asked)
    print(
        f"{population}: {side.bytes_on_disk() / 1e6:,.0f} MB, made in {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    return side


def _table(rows: Sequence[Row], both: Bench) -> Iterable[str]:
    names = [f"{side.population.users:,} users" for side in (both.small, both.large)]
    yield f"\n{'':28}" + "".join(f"{name:>20}" for name in (*names, "times"))
    yield f"{'':28}" + f"{'p50 ms':>12}{'p99':>8}" * 2 + f"{'p50':>12}{'p99':>8}"
    for row in rows:
        yield f"{row.name:28}" + "".join(
            f"{figure:>{12 - 4 * (index % 2)}}" for index, figure in enumerate(row.figures())
        )


def _say(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


def main() -> None:
    """Reads the options, measures, and leaves nothing behind. Exit codes: 0, 1 with the reason, 130."""
    parser = argparse.ArgumentParser(prog="make bench-size ARGS=…", description=__doc__)
    for option, default, what in (
        ("--users", 1_000_000, "in the large database"),
        ("--keys", 1_500_000, "in the large database, one a user at the least"),
        ("--usage-rows", 10_000_000, "in the large database"),
        ("--few-users", 1000, "in the small database, with as many keys and usage rows each"),
        ("--asked", 1000, "users asked about in a turn, --few-users at the most"),
        ("--rounds", 7, "turns of each"),
        ("--starts", 3, "of the sidecars, for their first calls"),
        ("--concurrency", 4, "calls in flight"),
        ("--cached-profiles", 100_000, "that the sidecar keeps, whose memory is measured"),
    ):
        parser.add_argument(option, type=int, default=default, help=f"{what} (default {default})")
    options = parser.parse_args()
    if not options.asked <= options.few_users <= options.users <= options.keys:
        parser.error("it takes --asked <= --few-users <= --users <= --keys")
    if options.asked > options.cached_profiles:
        parser.error("it takes --asked <= --cached-profiles")
    carry_out(bench(options))


if __name__ == "__main__":
    main()
