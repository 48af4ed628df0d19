"""The client against the real sidecar: what a gateway's requests leave in the database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from keyturn import (
    AlreadyExists,
    AsyncClient,
    Client,
    DecideRequest,
    Decision,
    Denied,
    FailedPrecondition,
    NotFound,
    Outcome,
    Reason,
    RecordRequest,
    Usage,
)
from tests.factories import Connection, Factory
from tests.support import Sidecar

SECRET = "sk-test-canary0123456789abcdef"
PLATFORM = {"Authorization": "Bearer the-platforms-own"}


@pytest_asyncio.fixture
async def client(sidecar: Sidecar) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(sidecar.address) as client:
        yield client


async def test_a_block_signs_with_the_users_key_and_records_its_usage(
    client: AsyncClient, make: Factory, sql: Connection
) -> None:
    user = await make.user()
    await make.key(user, secret=SECRET)
    async with client.request(user_id=user, provider="openai", model="gpt-4o") as call:
        assert call.headers(PLATFORM) == {"Authorization": f"Bearer {SECRET}"}
        call.used(input_tokens=100, output_tokens=10)
    row = await sql.fetchrow("SELECT outcome, total_tokens, cost_micros FROM api_key_usage")
    assert row is not None
    assert tuple(row) == ("SUCCESS", 110, 350)
    assert SECRET not in repr(call)


async def test_a_block_on_credits_signs_with_the_platforms_key_and_is_charged(
    client: AsyncClient, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=1_000_000)
    async with client.request(
        user_id=user, provider="openai", model="gpt-4o", input_tokens=200, max_output_tokens=50
    ) as call:
        assert call.headers(PLATFORM) == PLATFORM
        call.used(input_tokens=100, output_tokens=10)
    row = await sql.fetchrow("SELECT balance_micros, held_micros FROM credit_accounts")
    assert row is not None
    assert tuple(row) == (1_000_000 - 350, 0)


@pytest.mark.parametrize(("sent", "outcome"), [(False, "NEVER_SENT"), (True, "CLIENT_CANCELLED")])
async def test_a_block_that_fails_gives_its_hold_back(
    client: AsyncClient, make: Factory, sql: Connection, sent: bool, outcome: str
) -> None:
    user = await make.user(micros=1_000_000)

    async def gateway() -> None:
        async with client.request(user_id=user, provider="openai") as call:
            if sent:
                call.headers(PLATFORM)
            raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await gateway()
    assert await sql.fetchval("SELECT outcome FROM credit_holds") == outcome
    assert await sql.fetchval("SELECT held_micros FROM credit_accounts") == 0


async def test_a_cancelled_task_leaves_no_open_hold(
    client: AsyncClient, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=1_000_000)
    entered = asyncio.Event()

    async def gateway() -> None:
        async with client.request(user_id=user, provider="openai") as call:
            call.sending()
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(gateway())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    row = await sql.fetchrow("SELECT state, outcome FROM credit_holds")
    assert row is not None
    assert tuple(row) == ("settled", "CLIENT_CANCELLED")


async def test_a_refused_key_falls_back_to_credits_in_the_same_request(
    client: AsyncClient, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=1_000_000)
    await make.key(user, secret=SECRET)
    async with client.request(user_id=user, provider="openai") as call:
        assert call.headers(PLATFORM) != PLATFORM
        await call.key_refused(http_status=401, error_message="Incorrect API key provided")
        assert call.headers(PLATFORM) == PLATFORM
        call.cost(1_234)
    assert await sql.fetchval("SELECT outcome FROM api_key_usage") == "AUTH_REJECTED"
    assert await sql.fetchval("SELECT is_valid FROM user_api_keys") is False
    assert await sql.fetchval("SELECT balance_micros FROM credit_accounts") == 1_000_000 - 1_234


async def test_a_denial_is_raised_with_its_decision(client: AsyncClient, make: Factory) -> None:
    user = await make.user()
    with pytest.raises(Denied) as caught:
        async with client.request(user_id=user, provider="openai"):
            pytest.fail("there is nothing to pay with")
    assert caught.value.decision.reason is Reason.DENIED


async def test_faults_are_typed(client: AsyncClient, make: Factory) -> None:
    with pytest.raises(NotFound, match="no such user"):
        await client.decide(user_id="nobody", provider="openai")
    user = await make.user(micros=1_000)
    await make.key(user, "anthropic", secret=SECRET)
    decision = await client.decide(user_id=user, provider="openai", cost_micros=10)
    first = await client.record(decision, Outcome.SUCCESS, cost_micros=5)
    again = await client.record(decision, Outcome.SUCCESS, cost_micros=5)
    assert (first.replayed, again.replayed) == (False, True)
    with pytest.raises(AlreadyExists):
        await client.record(decision, Outcome.SUCCESS, cost_micros=6)
    handle = (await client.decide(user_id=user, provider="anthropic", redeem=True)).key
    assert handle is not None
    assert handle.secret is None
    assert (await client.redeem(handle)).reveal() == SECRET
    with pytest.raises(FailedPrecondition):
        await client.redeem(handle)


async def test_the_blocking_client_does_the_same(sidecar: Sidecar, make: Factory, sql: Connection) -> None:
    user = await make.user(micros=1_000_000)

    def gateway() -> None:
        with Client(sidecar.address) as client:
            with client.request(user_id=user, provider="openai", model="gpt-4o") as call:
                call.sending()
                call.used(input_tokens=100, output_tokens=10)
            asks = [DecideRequest(user_id=user, provider="openai", model="gpt-4o") for _ in range(10)]
            client.record_many(
                [
                    RecordRequest(decision, Outcome.SUCCESS, usage=Usage(input_tokens=4))
                    for decision in client.decide_many(asks)
                    if isinstance(decision, Decision)
                ]
            )

    await asyncio.to_thread(gateway)
    row = await sql.fetchrow("SELECT balance_micros, held_micros FROM credit_accounts")
    assert row is not None
    assert tuple(row) == (1_000_000 - 350 - 10 * 10, 0)
