"""LISTEN under a flood: announcements beyond number, and sessions killed meanwhile. No change is missed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import asyncpg

from keyturn.v1 import policy_pb2 as policy
from tests.factories import Connection, Factory
from tests.faults.conftest import Form
from tests.outages import SERVING, becomes
from tests.support import eventually
from tests.test_freshness import FOR_AN_HOUR, TERMINATE_PUSH, until

# Changes of many users in one statement, each announced; and what nobody but a stranger would announce.
CHANGES = "UPDATE users SET email = 'at-' || clock_timestamp() || '@example.com' WHERE id LIKE $1"
NONSENSE = "SELECT pg_notify('keyturn', repeat('x', 7000) || n) FROM generate_series(1, 5) n"
CROWD = 500
FLOODING = 3


async def test_a_flood_of_announcements_hides_no_change_and_stops_no_decision(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection, database: str, form: Form
) -> None:
    sidecar = await start_sidecar(**FOR_AN_HOUR)
    await sql.execute(
        "INSERT INTO users (id, subscription_tier) SELECT 'crowd-' || n % $2 || '-' || n, 'premium'"
        " FROM generate_series(1, $1) n",
        FLOODING * CROWD,
        FLOODING,
    )
    user = await make.user(micros=10**9)
    await make.key(user)
    announced = decided = 0
    is_over = False

    async def flood(connection: Connection, number: int) -> None:
        nonlocal announced
        while not is_over:
            await connection.execute(CHANGES, f"crowd-{number}-%")
            await connection.fetch(NONSENSE)
            announced += CROWD + 5

    async def decide() -> None:
        nonlocal decided
        while not is_over:
            await sidecar.decide(user, cost_micros=1, constraint=policy.CONSTRAINT_CREDITS_ONLY)
            decided += 1

    clock = asyncio.get_running_loop().time
    slowest = 0.0
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        for number in range(FLOODING):
            connection: Connection = await asyncpg.connect(database)
            stack.push_async_callback(connection.close)
            tasks.create_task(flood(connection, number))
        tasks.create_task(decide())
        for round_ in range(form.rounds(6, 200)):
            on = bool(round_ % 2)
            if round_ % 3 == 2:
                await sql.fetch(TERMINATE_PUSH)
            began = clock()
            await make.flags(byok_enabled=on)
            await until(sidecar, user, "BYOK_FIRST_OWN_KEY" if on else "BYOK_DISABLED")
            slowest = max(slowest, clock() - began)
        is_over = True
    await becomes(sidecar, "keyturn.push", SERVING)

    async def all_is_heard() -> bool:
        return bool(await sql.fetchval("SELECT pg_notification_queue_usage()") < 0.01)

    await eventually(all_is_heard)
    assert decided > 0
    form.figures |= {
        "announcements": announced,
        "decisions meanwhile": decided,
        "changes missed": 0,
        "seconds until a change was seen, at most": round(slowest, 1),
    }
