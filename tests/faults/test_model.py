"""Random work on real sidecars against a model of the ledger: tests/faults/ledger_machine.py.

Short in `make test`, always from the same seed. Long, 200,000 operations and more, with `make test-faults
ARGS=--faults-long`. A run that fails says which seed it was drawn from: `--faults-seed` draws it again.
"""

from __future__ import annotations

import itertools
import json
import time
from contextlib import AsyncExitStack, nullcontext

import pytest

from tests.factories import Connection
from tests.faults.ledger_machine import open_world, run_machine
from tests.invariants import check_invariants
from tests.support import temporary_directory

LONG_OPERATIONS = 200_000


async def test_whatever_is_done_in_whatever_order_the_answers_and_the_books_are_right(
    database: str, sql: Connection, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    is_long: bool = pytestconfig.getoption("--faults-long")
    first: int = pytestconfig.getoption("--faults-seed")
    runs, steps, crash_every = (30, 40, 1_500) if is_long else (20, 25, 150)
    began = time.monotonic()
    async with AsyncExitStack() as stack:
        directory = await stack.enter_async_context(temporary_directory())
        world = await open_world(stack, database, sql, directory, crash_every=crash_every)

        def told() -> str:
            return json.dumps(
                {"operations": world.operations, "seconds": round(time.monotonic() - began)} | world.counts
            )

        def is_enough() -> bool:
            # Whether a call is in flight when its sidecar is killed is a matter of milliseconds.
            lost = world.counts["disturbed: kill"] and world.counts["lost and asked again"]
            return bool(lost) and (not is_long or world.operations >= LONG_OPERATIONS)

        for number in itertools.count(first):
            print(f"--faults-seed {number}")
            await run_machine(world, number=number, runs=runs, steps=steps)
            with capsys.disabled() if is_long else nullcontext():
                print(told(), flush=True)
            if is_enough():
                break
    await check_invariants(sql, world.acknowledged)
