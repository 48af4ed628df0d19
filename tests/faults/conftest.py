"""What the fault suite is given: its form and seed, and where sidecars run that break."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio

from tests.factories import Connection
from tests.faults.processes import Place
from tests.invariants import check_invariants
from tests.proxy import Proxy
from tests.support import eventually, temporary_directory

_AT_WORK = """
SELECT count(*) FROM pg_stat_activity
 WHERE datname = current_database() AND application_name LIKE 'keyturn%' AND state <> 'idle'
"""


@dataclass(kw_only=True)
class Form:
    """How much of a fault: short as in `make test`, or long."""

    is_long: bool
    random: random.Random
    """Drawn from `--faults-seed`, for this test alone."""
    figures: dict[str, Any] = field(default_factory=dict)
    """What was done and seen, told at the end of the run where the form is long."""

    def rounds(self, short: int, long: int) -> int:
        """How often."""
        rounds = long if self.is_long else short
        self.figures["rounds"] = rounds
        return rounds


@pytest.fixture
def form(pytestconfig: pytest.Config, request: pytest.FixtureRequest) -> Iterator[Form]:
    """The form of this test."""
    is_long, seed = pytestconfig.getoption("--faults-long"), pytestconfig.getoption("--faults-seed")
    print(f"--faults-seed {seed}")
    form = Form(is_long=is_long, random=random.Random(f"{seed} {request.node.name}"))  # noqa: S311
    yield form
    print(json.dumps(form.figures))
    request.node.user_properties.append(("figures", form.figures))


@pytest_asyncio.fixture
async def place(database: str, proxy: Proxy, sql: Connection) -> AsyncIterator[Place]:
    """Where a sidecar runs by way of the proxy. What was acknowledged there is checked at the end."""
    async with temporary_directory() as home:
        place = Place(home=home, dsn=proxy.dsn(database))
        yield place

    async def is_quiet() -> bool:
        return not await sql.fetchval(_AT_WORK)

    await eventually(is_quiet)
    await check_invariants(sql, place.acknowledged)
