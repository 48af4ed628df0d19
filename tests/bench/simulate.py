"""`make bench-simulate`: SimulateFlags over a million recorded requests, and Decide beside it."""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from itertools import cycle
from pathlib import Path

import asyncpg
import grpc
from google.protobuf import duration_pb2

from keyturn.v1 import flag_service_pb2, flag_service_pb2_grpc, routing_service_pb2, routing_service_pb2_grpc
from tests.bench.command import bench_directory, carry_out
from tests.bench.load import percentile
from tests.bench.machine import Cores, described, memory_mb
from tests.bench.servers import sidecar
from tests.factories import KEYRING, Connection, Factory

_DAYS = 30
_PAUSE_SECONDS = 0.005
_DECIDERS = 50

# Four providers; tiers of all kinds, half of them eligible; two thirds with credits; every tenth key
# inactive, every eleventh refused, every thirteenth cooling down. As many requests paid by credits as by
# own keys, each of any user, over thirty days. No holds: nothing here checks the books.
_FILL = (
    """
    INSERT INTO users (id, email, subscription_tier)
    SELECT 'user-' || n, 'user-' || n || '@example.com',
           (ARRAY['community', 'free', 'subscriber', 'premium', 'premium', 'lifetime'])[1 + n % 6]
      FROM generate_series(1, $1::int) n
    """,
    "UPDATE credit_accounts SET balance_micros = 5000000 WHERE hashtext(user_id) % 3 <> 0",
    """
    INSERT INTO user_api_keys (
        user_id, id, provider, label, encrypted_key, is_active, is_valid, cooldown_until)
    SELECT 'user-' || 1 + n * 7 % $1, gen_random_uuid(),
           (ARRAY['openai', 'anthropic', 'google', 'mistral'])[1 + n % 4], n::text, $2 || repeat('x', 90),
           n % 10 <> 0, n % 11 <> 0, CASE WHEN n % 13 = 0 THEN now() + interval '1 day' END
      FROM generate_series(1, $1::int * 6 / 10) n
    """,
    """
    INSERT INTO api_key_usage (
        user_id, id, key_id, provider, model, service_type, mode, reason, endpoint, outcome, input_tokens,
        output_tokens, total_tokens, cost_micros, cost_source, http_status, response_time_ms, key_state,
        is_late, fingerprint, submission_id, created_at)
    SELECT 'user-' || 1 + floor(random() * $1)::int, gen_random_uuid(), gen_random_uuid(),
           (ARRAY['openai', 'anthropic', 'google', 'mistral'])[1 + floor(random() * 4)::int], 'gpt-4o-mini',
           'chat', 'BYOK_FIRST', 'BYOK_FIRST_OWN_KEY', '/v1/chat/completions',
           CASE WHEN n % 20 = 0 THEN 'PROVIDER_ERROR' ELSE 'SUCCESS' END, 1000, 300, 1300, n % 1000, 'PRICED',
           200, 812, 'USABLE', false, decode(md5(n::text), 'hex'), gen_random_uuid(),
           now() - make_interval(secs => n * $3::float8)
      FROM generate_series($2::int, 1, -1) n
    """,
    """
    INSERT INTO credit_transactions (
        user_id, id, transaction_type, amount_micros, balance_after_micros, service_type, mode, reason,
        provider, model, endpoint, outcome, cost_source, input_tokens, output_tokens, total_tokens,
        http_status, response_time_ms, created_at)
    SELECT 'user-' || 1 + floor(random() * $1)::int, gen_random_uuid(), 'deduction', -(n % 1000), 1000,
           'chat', 'BYOK_FIRST', 'BYOK_FIRST_NO_KEY',
           (ARRAY['openai', 'anthropic', 'google', 'mistral'])[1 + floor(random() * 4)::int], 'gpt-4o-mini',
           '/v1/chat/completions', 'SUCCESS', 'PRICED', 1000, 300, 1300, 200, 812,
           now() - make_interval(secs => n * $3::float8)
      FROM generate_series($2::int, 1, -1) n
    """,
)


async def _fill(connection: Connection, *, records: int, users: int) -> None:
    key_users, credit_users, key_rows, key_uses, deductions = _FILL
    half = records // 2
    seconds = _DAYS * 86_400 / max(half, 1)
    for sql, arguments in (
        ("SELECT setseed(0.5)", ()),
        (key_users, (users,)),
        (credit_users, ()),
        (key_rows, (users, f"v1.{KEYRING.current.id}.")),
        (key_uses, (users, half, seconds)),
        (deductions, (users, half, seconds)),
        ("ANALYZE", ()),
    ):
        await connection.execute(sql, *arguments, timeout=600)


def _forget_peak(pid: int) -> None:
    """The peak is the most from now on."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


async def _decide_until(
    ended: Callable[[], bool], decide: Callable[[str], Awaitable[object]], users: Iterator[str]
) -> list[float]:
    """One call after the other, a moment apart; the latencies in milliseconds."""
    spans = []
    while not ended():
        began = time.perf_counter()
        await decide(next(users))
        spans.append((time.perf_counter() - began) * 1000)
        await asyncio.sleep(_PAUSE_SECONDS)
    return spans


async def bench(options: argparse.Namespace) -> None:
    """Fills a database, simulates, and prints the figures."""
    before_load = os.getloadavg()[0]
    cores = Cores.split()
    os.sched_setaffinity(0, cores.rest)
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(bench_directory())
        server, dsn = await stack.enter_async_context(sidecar(directory, cores=cores))
        connection: Connection = await asyncpg.connect(dsn)
        stack.push_async_callback(connection.close)
        began = time.perf_counter()
        await _fill(connection, records=options.records, users=options.users)
        print(f"{described()}\n{cores}")
        print(
            f"{options.records:,} recorded requests of {options.users:,} users over {_DAYS} days,"
            f" written in {time.perf_counter() - began:.0f} s\n",
            flush=True,
        )
        make = Factory(connection)
        owners = [await make.user() for _ in range(_DECIDERS)]
        payers = [await make.user(micros=10**12) for _ in range(_DECIDERS)]
        for owner in owners:
            await make.key(owner)

        channel = await stack.enter_async_context(grpc.aio.insecure_channel(server.address))
        elsewhere = await stack.enter_async_context(
            grpc.aio.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)])
        )
        flags = flag_service_pb2_grpc.FlagServiceStub(channel)
        routing = routing_service_pb2_grpc.RoutingServiceStub(elsewhere)

        async def decide(user_id: str) -> object:
            request = routing_service_pb2.DecideRequest(user_id=user_id, provider="openai")
            return await routing.Decide(request, timeout=30)

        async def simulate(size: int, token: str = "") -> flag_service_pb2.SimulateFlagsResponse:
            return await flags.SimulateFlags(
                flag_service_pb2.SimulateFlagsRequest(
                    flags={"byok_only_mode": True},
                    window=duration_pb2.Duration(seconds=(_DAYS + 1) * 86_400),
                    page_size=size,
                    page_token=token,
                ),
                timeout=120,
            )

        for user in (*owners, *payers):
            await decide(user)
        idle: dict[str, list[float]] = {}
        for name, users in (("own key", cycle(owners)), ("credits", cycle(payers))):
            over = asyncio.create_task(asyncio.sleep(options.idle_seconds))
            idle[name] = await _decide_until(over.done, decide, users)

        busy: dict[str, list[float]] = {name: [] for name in idle}
        firsts, memory, cpu = [], [], []
        for number in range(options.rounds):
            before, _ = memory_mb(server.pid)
            _forget_peak(server.pid)
            server_before, postgres_before = server.cpu_seconds()
            began = time.perf_counter()
            simulation = asyncio.create_task(simulate(1000))
            name, users = (("own key", cycle(owners)), ("credits", cycle(payers)))[number % 2]
            busy[name] += await _decide_until(simulation.done, decide, users)
            answer = await simulation
            firsts.append(time.perf_counter() - began)
            server_after, postgres_after = server.cpu_seconds()
            cpu.append((server_after - server_before, postgres_after - postgres_before))
            memory.append((before, *memory_mb(server.pid)))
        began = time.perf_counter()
        page = await simulate(1000, answer.next_page_token) if answer.next_page_token else answer
        second = time.perf_counter() - began
        pages = 2
        while page.next_page_token:
            page = await simulate(1000, page.next_page_token)
            pages += 1
        rest = time.perf_counter() - began

    counted = sum(move.requests for move in answer.moves)
    print(f"first page   {', '.join(f'{one:.2f} s' for one in firsts)} (Decide was called meanwhile)")
    print(f"second page  {second * 1000:.1f} ms; all {pages} pages of 1,000 denials: {rest:.1f} s")
    print(
        f"answer       {len(answer.moves):,} moves of {counted:,} requests, {answer.denied_count:,} denials,"
        f" first page of {answer.ByteSize():,} bytes"
    )
    print(
        "CPU          "
        + ", ".join(f"sidecar {ours:.2f} s and PostgreSQL {postgres:.2f} s" for ours, postgres in cpu)
        + " (the calls of Decide included)"
    )
    for number, (before, after, peak) in enumerate(memory, start=1):
        print(f"memory {number}     RSS before {before:.0f} MB, peak {peak:.0f} MB, after {after:.0f} MB")
    print(f"load         average {before_load:.1f} before, {os.getloadavg()[0]:.1f} after")
    for name, spans in idle.items():
        for when, some in (("idle", spans), ("meanwhile", busy[name])):
            if some:
                print(
                    f"Decide       {name}, {when}: p50 {statistics.median(some):.2f} ms,"
                    f" p99 {percentile(some, 99):.2f} ms, most {max(some):.2f} ms, of {len(some)} calls"
                )


def main() -> None:
    """Reads the options, measures, and leaves nothing behind. Exit codes: 0, 1 with the reason, 130."""
    parser = argparse.ArgumentParser(prog="make bench-simulate ARGS=…", description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000, help="recorded requests (default 1000000)")
    parser.add_argument("--users", type=int, default=100_000, help="users (default 100000)")
    parser.add_argument("--rounds", type=int, default=4, help="simulations (default 4)")
    parser.add_argument("--idle-seconds", type=float, default=5.0, help="of Decide alone (default 5)")
    options = parser.parse_args()
    carry_out(bench(options))


if __name__ == "__main__":
    main()
