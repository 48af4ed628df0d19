"""PostgreSQL away, silent, read-only, and back: what goes on meanwhile, and that nothing is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import pytest

from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import routing_service_pb2 as pb
from tests.cli.command import keyturn, serving
from tests.factories import Connection, Factory
from tests.outages import (
    NOT_SERVING,
    SERVING,
    away,
    becomes,
    drained,
    events,
    health_of,
    remembered,
    unavailable,
    watched,
)
from tests.proxy import Proxy
from tests.refusals import Refusal
from tests.support import Fault, temporary_directory

SUCCESS, SPOOLED = pb.OUTCOME_SUCCESS, pb.DURABILITY_SPOOLED
CREDITS_ONLY = policy.CONSTRAINT_CREDITS_ONLY
INLINE = pb.KEY_DELIVERY_INLINE


# -- decisions without the database -------------------------------------------------------------------


async def test_an_own_key_is_decided_on_from_what_was_last_known(
    spooling: Callable[..., Any], proxy: Proxy, make: Factory
) -> None:
    sidecar = await spooling(profile_ttl=0.01)
    user, stranger = await make.user(micros=1_000), await make.user(micros=1_000)
    for each in (user, stranger):
        await make.key(each, secret=f"sk-test-{each}")
    await remembered(sidecar, make)
    before = await sidecar.decide(user, key_delivery=INLINE)
    assert not before.degraded
    await asyncio.sleep(0.05)  # past its time to live
    await away(sidecar, proxy)
    decision = await sidecar.decide(user, key_delivery=INLINE)
    assert (decision.degraded, decision.key.secret) == (True, f"sk-test-{user}")
    assert (decision.reason, decision.mode) == (before.reason, before.mode)
    assert decision.message == (
        f"{before.message} The database cannot be reached: this is from what was last known."
    )
    await unavailable(sidecar, stranger)
    await unavailable(sidecar, "nobody")
    await unavailable(sidecar, user, failed_key_handles=[decision.key.handle])
    await unavailable(sidecar, user, constraint=CREDITS_ONLY)
    proxy.come_back()
    await becomes(sidecar, "keyturn.push", SERVING)
    assert not (await sidecar.decide(user)).degraded


async def test_what_credits_would_pay_first_waits_for_the_database(
    spooling: Callable[..., Any], proxy: Proxy, make: Factory
) -> None:
    await make.flags(byok_uses_internal_credits=True)
    sidecar = await spooling()
    user = await make.user(micros=1_000)
    await make.key(user)
    await remembered(sidecar, make, user)
    await away(sidecar, proxy)
    await unavailable(sidecar, user)
    own = await sidecar.decide(user, constraint=policy.CONSTRAINT_OWN_KEY_ONLY)
    assert (own.degraded, own.HasField("key")) == (True, True)
    proxy.come_back()


async def test_nobody_is_denied_from_what_was_last_known(
    spooling: Callable[..., Any], proxy: Proxy, make: Factory
) -> None:
    await make.flags(byok_only_mode=True)
    sidecar = await spooling()
    user, free = await make.user(), await make.user("free")
    await remembered(sidecar, make, user, free)
    await away(sidecar, proxy)
    for each in (user, free):
        await unavailable(sidecar, each)
    proxy.come_back()


async def test_what_was_last_known_is_trusted_for_a_time_only(
    spooling: Callable[..., Any], proxy: Proxy, make: Factory
) -> None:
    user = await make.user()
    await make.key(user)
    for degraded_for, expected in ((0, False), (3600, True)):
        sidecar = await spooling(degraded_for=degraded_for, spool=None)
        await remembered(sidecar, make, user)
        await away(sidecar, proxy)
        await becomes(sidecar, "keyturn.push", NOT_SERVING)
        if expected:
            assert (await sidecar.decide(user)).degraded
        else:
            await unavailable(sidecar, user)
        proxy.come_back()


async def test_a_key_that_changed_just_before_the_outage_is_not_handed_out(
    spooling: Callable[..., Any], proxy: Proxy, make: Factory, sql: Connection
) -> None:
    sidecar = await spooling()
    user = await make.user()
    await make.key(user)
    await remembered(sidecar, make, user)
    await sql.execute("UPDATE user_api_keys SET is_active = false WHERE user_id = $1", user)
    await remembered(sidecar, make)
    await away(sidecar, proxy)
    await unavailable(sidecar, user)
    proxy.come_back()


async def test_explain_says_from_what_it_is_decided(
    spooling: Callable[..., Any], proxy: Proxy, make: Factory
) -> None:
    sidecar = await spooling()
    user, payer = await make.user(), await make.user(micros=1_000)
    await make.key(user)
    await remembered(sidecar, make, user, payer)

    async def explain(each: str) -> pb.ExplainResponse:
        ask = pb.DecideRequest(user_id=each, provider="openai")
        answer: pb.ExplainResponse = await sidecar.call("Explain", pb.ExplainRequest(decide=ask))
        return answer

    assert "database" not in {step.check for step in (await explain(user)).steps}
    await away(sidecar, proxy)
    await becomes(sidecar, "keyturn.push", NOT_SERVING)
    answer = await explain(user)
    assert (answer.decision.degraded, answer.decision.HasField("key")) == (True, True)
    steps = {step.check: (step.result, step.detail) for step in answer.steps}
    assert steps["database"][0] == "away"
    assert "as they were last known" in steps["database"][1]
    assert steps["credits"][0] == "unknown"
    with pytest.raises(Fault) as caught:
        await explain(payer)
    Refusal.of(caught.value).check(grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE", "RetryInfo")
    proxy.come_back()


# -- silence, and a server that takes no writes -------------------------------------------------------


async def test_a_database_that_says_nothing_is_noticed_and_nobody_waits_for_it(
    spooling: Callable[..., Any], proxy: Proxy, directory: Path, make: Factory, sql: Connection
) -> None:
    # With a limit so short, and statements that may take so long, nothing but the watch explains the answers.
    sidecar = await spooling(silence_timeout=1, statement_timeout=600, connect_timeout=600)
    user = await make.user(micros=10**6)
    tickets = [await sidecar.decide(user, cost_micros=1) for _ in range(20)]
    proxy.relay.freeze()
    waiting = [
        asyncio.create_task(sidecar.decide(user, cost_micros=1, request_id="in flight")),
        *(asyncio.create_task(sidecar.record(one, SUCCESS, cost_micros=1)) for one in tickets[:10]),
    ]
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(results[0], Fault)
    assert results[0].code is grpc.StatusCode.UNAVAILABLE
    assert {one.durability for one in results[1:]} == {SPOOLED}  # type: ignore[union-attr]
    assert await health_of(sidecar, "keyturn.database") == NOT_SERVING
    await asyncio.gather(*(unavailable(sidecar, user, cost_micros=1) for _ in range(50)))
    for one in tickets[10:]:
        assert (await sidecar.record(one, SUCCESS, cost_micros=1)).durability == SPOOLED
    proxy.relay.thaw()
    await becomes(sidecar, "keyturn.database", SERVING)
    assert (await sidecar.decide(user, cost_micros=1, request_id="in flight")).HasField("ticket")
    await drained(directory)
    assert await sql.fetchval("SELECT balance_micros FROM credit_accounts") == 10**6 - 20


@asynccontextmanager
async def read_only(database: str) -> AsyncIterator[None]:
    """The database takes no writes, for sessions that begin from now on."""
    elsewhere: Connection = await asyncpg.connect(database, database="postgres")
    name = database.partition("?")[0].rpartition("/")[2]
    try:
        await elsewhere.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        yield
        await elsewhere.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    finally:
        await elsewhere.close()


@pytest.mark.parametrize("sessions", ["that are there end", "that are there stay"])
async def test_a_failover_to_a_server_that_takes_no_writes_is_noticed_and_over_with_it(
    spooling: Callable[..., Any],
    proxy: Proxy,
    directory: Path,
    database: str,
    make: Factory,
    sql: Connection,
    sessions: str,
) -> None:
    sidecar = await spooling()
    user, owner = await make.user(micros=10**6), await make.user()
    await make.key(owner)
    key = await sidecar.decide(owner)
    tickets = [await sidecar.decide(user, cost_micros=1) for _ in range(2)]
    await watched(sql)  # a connection that is cut while it is made would be the verdict
    async with read_only(database):
        if sessions == "that are there end":
            proxy.cut(push_only=False)
        else:
            await sql.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND application_name = 'keyturn'"
            )
        assert (await sidecar.record(tickets[0], SUCCESS, cost_micros=1)).durability == SPOOLED
        await becomes(sidecar, "keyturn.database", NOT_SERVING)
        assert events(sidecar, "database_away")[-1]["sqlstate"] == "25006"
        assert (await sidecar.record(tickets[1], SUCCESS, cost_micros=1)).durability == SPOOLED
        await unavailable(sidecar, user, cost_micros=1)
        assert (await sidecar.record(key, SUCCESS)).durability == SPOOLED
    await becomes(sidecar, "keyturn.database", SERVING)
    assert (await sidecar.decide(user, cost_micros=1)).HasField("ticket")
    await drained(directory)


async def test_a_database_that_lets_nobody_in_is_away_once_those_inside_have_left(
    spooling: Callable[..., Any],
    directory: Path,
    database: str,
    make: Factory,
    sql: Connection,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sidecar = await spooling()
    user = await make.user(micros=10**6)
    ticket = await sidecar.decide(user, cost_micros=1)
    name = database.partition("?")[0].rpartition("/")[2]
    elsewhere: Connection = await asyncpg.connect(database, database="postgres")
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND "
    try:
        await elsewhere.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        await sql.execute(f"{end} application_name = 'keyturn watch'")
        for _ in range(20):
            assert (await sidecar.decide(user, cost_micros=1)).HasField("ticket")
            await asyncio.sleep(0.02)
        assert await health_of(sidecar, "keyturn.database") == SERVING
        await sql.execute(f"{end} application_name LIKE 'keyturn%'")
        await becomes(sidecar, "keyturn.database", NOT_SERVING)
        assert (await sidecar.record(ticket, SUCCESS, cost_micros=1)).durability == SPOOLED
        await unavailable(sidecar, user, cost_micros=1)
        await elsewhere.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    finally:
        await elsewhere.close()
    await drained(directory)
    # Nobody tries besides the watch and the push: what a library says for itself is no line of ours.
    assert [record.getMessage() for record in caplog.records if record.name.startswith("asyncpg")] == []


# -- two on one spool ----------------------------------------------------------------------------------


async def test_a_second_process_on_the_same_spool_ends_and_says_why(database: str, proxy: Proxy) -> None:
    async with temporary_directory() as home:
        variables = {"KEYTURN_DATABASE_URL": proxy.dsn(database), "KEYTURN_SPOOL": f"{home}/spool"}
        async with serving(home, "--listen", f"unix:{home}/run/s", **variables):
            other = await keyturn("serve", "--listen", f"unix:{home}/run/t", **variables)
            assert other.code == 1
            assert f"{home}/spool: another sidecar has its spool there." in other.err
            assert "Traceback" not in other.err


async def test_a_sidecar_that_cannot_reach_its_database_when_it_starts_ends_and_says_so(
    database: str, proxy: Proxy
) -> None:
    async with temporary_directory() as home:
        options = ("--listen", f"unix:{home}/run/s")
        variables = {
            "KEYTURN_DATABASE_URL": proxy.dsn(database),
            "KEYTURN_SPOOL": f"{home}/spool",
            "KEYTURN_CONNECT_TIMEOUT": "1",
        }
        for fault in (proxy.relay.freeze, proxy.go_away):
            fault()
            finished = await keyturn("serve", *options, **variables)
            assert finished.code == 6
            assert finished.err.splitlines()[-1] == "keyturn: The database cannot be reached."
            assert "Traceback" not in finished.err
        proxy.relay.thaw()
        proxy.come_back()
        async with serving(home, *options, **variables):
            pass
