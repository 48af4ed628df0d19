"""A database that goes away, as tests see it: how the sidecar is meanwhile, and what is in its spool."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import routing_service_pb2 as pb
from keyturn_server.store.database import WATCH_NAME
from keyturn_server.store.spool import SPOOL_FILE
from tests.factories import Connection, Factory
from tests.proxy import Proxy
from tests.refusals import refused
from tests.support import Sidecar, eventually

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def events(sidecar: Sidecar, name: str) -> list[dict[str, Any]]:
    lines = map(json.loads, sidecar.log.getvalue().splitlines())
    return [line for line in lines if line["event"] == name]


async def health_of(sidecar: Sidecar, name: str) -> int:
    stub: Any = health_pb2_grpc.HealthStub(sidecar.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=30)
    return int(answer.status)


async def remembered(sidecar: Sidecar, make: Factory, *users: str) -> None:
    """Whatever was changed so far has been announced, and these users were asked for since."""
    marker = await make.user()
    await make.key(marker)
    only: dict[str, Any] = {"constraint": policy.CONSTRAINT_OWN_KEY_ONLY}
    await sidecar.decide(marker, **only)
    await make.connection.execute("UPDATE user_api_keys SET is_active = false WHERE user_id = $1", marker)

    async def is_heard() -> bool:
        return bool((await sidecar.decide(marker, **only)).HasField("denial"))

    await eventually(is_heard)
    for user in users:
        await sidecar.decide(user, cost_micros=1)


async def away(sidecar: Sidecar, proxy: Proxy) -> None:
    """The database goes away, and the sidecar has noticed."""
    proxy.go_away()
    await becomes(sidecar, "keyturn.database", NOT_SERVING)


async def watched(sql: Connection) -> None:
    """Back when a watch is content: it has made its connection, and asked on it more than once."""

    async def is_content() -> bool:
        return bool(
            await sql.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                " AND application_name = $1 AND query_start > backend_start + interval '0.4 s'",
                WATCH_NAME,
            )
        )

    await eventually(is_content)


async def becomes(sidecar: Sidecar, name: str, status: int) -> None:
    async def is_so() -> bool:
        return await health_of(sidecar, name) == status

    await eventually(is_so)


async def drained(directory: Path) -> None:
    """Back when nothing is in the spool."""

    async def is_empty() -> bool:
        return rows(directory) == []

    await eventually(is_empty)


def rows(directory: Path) -> list[tuple[Any, ...]]:
    """What is in the file, as somebody sees it who looks in."""
    with closing(sqlite3.connect(directory / SPOOL_FILE)) as connection:
        return connection.execute("SELECT id, user_id, body, cause FROM records ORDER BY seq").fetchall()


async def unavailable(sidecar: Sidecar, user: str, **fields: Any) -> None:
    """Raises AssertionError unless a decision has to wait for the database."""
    refusal = await refused(sidecar, "Decide", pb.DecideRequest(user_id=user, provider="openai", **fields))
    refusal.check(grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE", "RetryInfo")
