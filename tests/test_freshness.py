"""What is changed in the database steers the next decision, however it is changed and whatever breaks."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import routing_service_pb2 as pb
from tests.cli.command import free_port
from tests.factories import Connection, Factory
from tests.proxy import Proxy
from tests.support import Fault, Sidecar, eventually

# So long that nothing but the push explains a change.
FOR_AN_HOUR = {"flag_ttl": 3600, "profile_ttl": 3600, "unpushed_ttl": 3600}
QUICK_BEAT = {"push_beat": 0.1, "push_timeout": 1}
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def route_of(answer: pb.DecideResponse) -> str:
    """What an answer comes to, in one word."""
    if answer.HasField("denial"):
        return policy.DenialReason.Name(answer.denial.reason).removeprefix("DENIAL_REASON_")
    return policy.Reason.Name(answer.reason).removeprefix("REASON_")


async def until(sidecar: Sidecar, user: str, expected: str, **fields: Any) -> None:
    """Back when decisions come to that. Raises AssertionError when they do not within the limit."""

    async def comes_to() -> bool:
        try:
            answer = await sidecar.decide(user, **{"cost_micros": 1, **fields})
        except Fault as fault:
            return fault.code.name == expected
        return expected in (route_of(answer), str(answer.ticket.hold_micros))

    await eventually(comes_to)


# What is done to a premium user with a key and credits, and what the next decision comes to.
PROFILE_CHANGES = {
    "tier": ("UPDATE users SET subscription_tier = 'free' WHERE id = $1", "TIER_NOT_ELIGIBLE"),
    "key off": ("UPDATE user_api_keys SET is_active = false WHERE user_id = $1", "BYOK_FIRST_NO_KEY"),
    "key invalid": ("UPDATE user_api_keys SET is_valid = false WHERE user_id = $1", "BYOK_FIRST_KEY_FAILED"),
    "key cooling down": (
        "UPDATE user_api_keys SET cooldown_until = now() + interval '1 hour' WHERE user_id = $1",
        "BYOK_FIRST_KEY_FAILED",
    ),
    "key replaced": (
        "UPDATE user_api_keys SET encrypted_key = 'v1.x', revision = 2 WHERE user_id = $1",
        "BYOK_FIRST_KEY_FAILED",
    ),
    "key moved": (
        "UPDATE user_api_keys SET provider = 'anthropic' WHERE user_id = $1",
        "BYOK_FIRST_NO_KEY",
    ),
    "key deleted": ("DELETE FROM user_api_keys WHERE user_id = $1", "BYOK_FIRST_NO_KEY"),
    "user renamed": ("UPDATE users SET id = id || '-renamed' WHERE id = $1", "NOT_FOUND"),
    "user deleted": ("DELETE FROM users WHERE id = $1", "NOT_FOUND"),
}


async def test_a_changed_user_is_seen_by_the_next_decision(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection, subtests: pytest.Subtests
) -> None:
    sidecar = await start_sidecar(**FOR_AN_HOUR)
    for name, (change, expected) in PROFILE_CHANGES.items():
        with subtests.test(name):
            user = await make.user(micros=0 if name.startswith("user") else 1_000)
            await make.key(user)
            await until(sidecar, user, "BYOK_FIRST_OWN_KEY")
            if name.startswith("user"):
                await sql.execute("DELETE FROM user_api_keys WHERE user_id = $1", user)
                await sql.execute("DELETE FROM credit_accounts WHERE user_id = $1", user)
            await sql.execute(change, user)
            await until(sidecar, user, expected)


async def test_a_new_key_and_a_new_user_are_seen_at_once(
    start_sidecar: Callable[..., Any], make: Factory
) -> None:
    sidecar = await start_sidecar(**FOR_AN_HOUR)
    await until(sidecar, "newcomer", "NOT_FOUND")
    await make.user(name="newcomer", micros=1_000)
    assert route_of(await sidecar.decide("newcomer")) == "NO_KEY_AND_NO_CREDITS"
    await make.key("newcomer")
    await until(sidecar, "newcomer", "BYOK_FIRST_OWN_KEY")


async def test_what_is_emptied_whole_is_seen(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    sidecar = await start_sidecar(**FOR_AN_HOUR)
    users = [await make.user(micros=1_000) for _ in range(3)]
    for user in users:
        await make.key(user)
        await until(sidecar, user, "BYOK_FIRST_OWN_KEY")
    await sql.execute("TRUNCATE user_api_keys")
    for user in users:
        await until(sidecar, user, "BYOK_FIRST_NO_KEY")


# What an operator changes for everyone, what that makes of the same user, and the way back.
SHARED_CHANGES = {
    "a flag off": (
        "UPDATE feature_flags SET is_enabled = false WHERE key = 'byok_enabled'",
        "BYOK_DISABLED",
        "UPDATE feature_flags SET is_enabled = true WHERE key = 'byok_enabled'",
    ),
    "a flag on": (
        "UPDATE feature_flags SET is_enabled = true WHERE key = 'byok_uses_internal_credits'",
        "CREDIT_FIRST_CREDITS",
        # A missing row is its default.
        "DELETE FROM feature_flags WHERE key = 'byok_uses_internal_credits'",
    ),
    "min_tier": (
        "UPDATE feature_flags SET min_tier = 'lifetime' WHERE key = 'byok_enabled'",
        "TIER_NOT_ELIGIBLE",
        "UPDATE feature_flags SET min_tier = NULL WHERE key = 'byok_enabled'",
    ),
    "the rank of a tier": (
        "UPDATE subscription_tiers SET rank = 1 WHERE name = 'premium'",
        "BYOK_FIRST_OWN_KEY",
        "UPDATE subscription_tiers SET rank = 30 WHERE name = 'premium'",
    ),
    "a provider off": (
        "UPDATE api_providers SET is_enabled = false WHERE id = 'openai'",
        "PROVIDER_DISABLED",
        "UPDATE api_providers SET is_enabled = true WHERE id = 'openai'",
    ),
    "all flags gone": ("TRUNCATE feature_flags", "BYOK_FIRST_OWN_KEY", "SELECT 1"),
}


async def test_a_changed_flag_tier_or_provider_steers_the_next_decision(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection, subtests: pytest.Subtests
) -> None:
    sidecar = await start_sidecar(**FOR_AN_HOUR)
    user = await make.user(micros=1_000)
    await make.key(user)
    for name, (change, expected, back) in SHARED_CHANGES.items():
        with subtests.test(name):
            await until(sidecar, user, "BYOK_FIRST_OWN_KEY")
            await sql.execute(change)
            await until(sidecar, user, expected)
            await sql.execute(back)
    await until(sidecar, user, "BYOK_FIRST_OWN_KEY")


async def test_a_price_and_a_rate_limit_of_the_operators_are_seen(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    sidecar = await start_sidecar(**FOR_AN_HOUR)
    user = await make.user(micros=10**9)
    model = {"model": "house-model", "cost_micros": None, "tokens": {"input_tokens": 1_000_000}}
    await until(sidecar, user, "50000", **model)
    await sql.execute("INSERT INTO model_prices VALUES ('openai', 'house-model', 777, 0)")
    await until(sidecar, user, "777", **model)
    await sql.execute("UPDATE model_prices SET input_micros_per_mtok = 778")
    await until(sidecar, user, "778", **model)
    await sql.execute("DELETE FROM model_prices")
    await until(sidecar, user, "50000", **model)
    await sql.execute("UPDATE subscription_tiers SET requests_per_minute = 1 WHERE name = 'premium'")
    await until(sidecar, user, "RATE_LIMITED")


async def test_a_change_that_is_rolled_back_changes_nothing(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    sidecar = await start_sidecar(**FOR_AN_HOUR)
    user, marker = await make.user(micros=1_000), await make.user(micros=1_000)
    transaction = sql.transaction()
    await transaction.start()
    await make.flags(byok_enabled=False)
    await transaction.rollback()
    await sql.execute("UPDATE users SET subscription_tier = 'free' WHERE id = $1", marker)
    await until(sidecar, marker, "TIER_NOT_ELIGIBLE")
    assert route_of(await sidecar.decide(user, cost_micros=1)) == "BYOK_FIRST_NO_KEY"


# -- when the push breaks -----------------------------------------------------------------------------


@asynccontextmanager
async def watched(sidecar: Sidecar) -> AsyncIterator[Callable[[int], Any]]:
    """Waits for the next state of the push's health to be this one."""
    health: Any = health_pb2_grpc.HealthStub(sidecar.channel)
    watch = health.Watch(health_pb2.HealthCheckRequest(service="keyturn.push"), timeout=60)

    async def becomes(status: int) -> None:
        assert (await watch.read()).status == status

    await becomes(SERVING)
    yield becomes
    watch.cancel()


async def push_metric_becomes(sidecar: Sidecar, value: str) -> None:
    """It may be down once more on a busy machine: a beat is soon missed here."""

    def read() -> str:
        with urllib.request.urlopen(f"http://{sidecar.settings.metrics}/metrics", timeout=30) as page:
            return str(page.read().decode())

    async def has_value() -> bool:
        page = await asyncio.to_thread(read)
        [line] = [line for line in page.splitlines() if line.startswith("keyturn_push_up")]
        return line.rpartition(" ")[2] == value

    await eventually(has_value)


TERMINATE_PUSH = """
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
 WHERE datname = current_database() AND application_name LIKE 'keyturn push%'
"""


async def test_a_flag_that_changes_while_the_listener_is_killed_is_not_missed(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection, database: str
) -> None:
    sidecar = await start_sidecar(**FOR_AN_HOUR)
    user = await make.user(micros=1_000)
    other: Connection = await asyncpg.connect(database)
    try:
        async with watched(sidecar) as becomes:
            for round_ in range(10):
                on = bool(round_ % 2)
                await asyncio.gather(other.execute(TERMINATE_PUSH), make.flags(byok_enabled=on))
                await until(sidecar, user, "BYOK_FIRST_NO_KEY" if on else "BYOK_DISABLED")
                await becomes(NOT_SERVING)
                await becomes(SERVING)
                assert route_of(await sidecar.decide(user, cost_micros=1)) == (
                    "BYOK_FIRST_NO_KEY" if on else "BYOK_DISABLED"
                )
    finally:
        await other.close()
    lost = [
        event
        for event in map(json.loads, sidecar.log.getvalue().splitlines())
        if event["event"] == "push_lost"
    ]
    assert len(lost) == 10


async def test_a_listener_that_was_cut_off_silently_is_found_out_by_its_beat(
    start_sidecar: Callable[..., Any], make: Factory, database: str, proxy: Proxy
) -> None:
    sidecar = await start_sidecar(
        database_url=proxy.dsn(database), metrics=f"127.0.0.1:{free_port()}", **FOR_AN_HOUR, **QUICK_BEAT
    )
    user = await make.user(micros=1_000)
    await until(sidecar, user, "BYOK_FIRST_NO_KEY")
    await push_metric_becomes(sidecar, "1.0")
    async with watched(sidecar) as becomes:
        proxy.silence(push_only=True)
        await make.flags(byok_enabled=False)
        await becomes(NOT_SERVING)
        await becomes(SERVING)
    await until(sidecar, user, "BYOK_DISABLED")
    await push_metric_becomes(sidecar, "1.0")


async def test_while_the_push_cannot_come_back_changes_arrive_within_a_moment_and_it_says_so(
    start_sidecar: Callable[..., Any], make: Factory, database: str, proxy: Proxy
) -> None:
    sidecar = await start_sidecar(
        database_url=proxy.dsn(database),
        metrics=f"127.0.0.1:{free_port()}",
        **FOR_AN_HOUR | {"unpushed_ttl": 0.1},
        **QUICK_BEAT,
    )
    user = await make.user(micros=1_000)
    async with watched(sidecar) as becomes:
        proxy.refuses_push = True
        proxy.cut(push_only=True)
        await becomes(NOT_SERVING)
        for on in (False, True, False):
            await make.flags(byok_enabled=on)
            await until(sidecar, user, "BYOK_FIRST_NO_KEY" if on else "BYOK_DISABLED")
        await push_metric_becomes(sidecar, "0.0")
        proxy.refuses_push = False
        await becomes(SERVING)
        await push_metric_becomes(sidecar, "1.0")
        await make.flags(byok_enabled=True)
        await until(sidecar, user, "BYOK_FIRST_NO_KEY")


async def test_connections_that_all_went_silent_are_replaced(
    start_sidecar: Callable[..., Any], make: Factory, database: str, proxy: Proxy
) -> None:
    sidecar = await start_sidecar(
        database_url=proxy.dsn(database),
        statement_timeout=0.3,
        connect_timeout=2,
        **FOR_AN_HOUR,
        **QUICK_BEAT,
    )
    user = await make.user(micros=1_000)
    ticket = await sidecar.decide(user, cost_micros=10, request_id="before")
    proxy.silence(push_only=False)
    await make.flags(byok_enabled=False)
    faults: list[grpc.StatusCode] = []

    async def replayed() -> bool:
        try:
            answer = await sidecar.decide(user, cost_micros=10, request_id="before")
        except Fault as fault:
            faults.append(fault.code)
            return False
        return bool(answer.ticket.ticket == ticket.ticket.ticket and route_of(answer) == "BYOK_DISABLED")

    await eventually(replayed, seconds=60)
    assert set(faults) <= {grpc.StatusCode.UNAVAILABLE}


async def test_a_database_that_breaks_every_connection_at_once_is_survived(
    start_sidecar: Callable[..., Any], make: Factory, database: str, proxy: Proxy
) -> None:
    sidecar = await start_sidecar(database_url=proxy.dsn(database), **FOR_AN_HOUR, **QUICK_BEAT)
    user = await make.user(micros=1_000_000)
    for round_ in range(5):
        calls = [asyncio.create_task(sidecar.decide(user, cost_micros=1)) for _ in range(50)]
        await asyncio.sleep(0)
        proxy.cut(push_only=False)
        await make.flags(byok_enabled=bool(round_ % 2))
        results = await asyncio.gather(*calls, return_exceptions=True)
        faults = {result.code for result in results if isinstance(result, Fault)}
        assert faults <= {grpc.StatusCode.UNAVAILABLE}
        await until(sidecar, user, "BYOK_FIRST_NO_KEY" if round_ % 2 else "BYOK_DISABLED")
