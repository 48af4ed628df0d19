"""Random work on real sidecars against a model of the ledger: tests/faults/ledger_machine.py.

Short in `make test`, always from the same seed. Long, 200,000 operations and more, with `make test-faults
ARGS=--long`. A run that fails says which seed it was drawn from: `--faults-seed` draws it again.
"""

from __future__ import annotations

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
    number: int = pytestconfig.getoption("--faults-seed")
    began = time.monotonic()
    async with AsyncExitStack() as stack:
        directory = await stack.enter_async_context(temporary_directory())
        world = await open_world(stack, database, sql, directory, crash_every=1_500 if is_long else 150)
        print(f"--faults-seed {number}")
        await run_machine(world, number=number, runs=30 if is_long else 20, steps=40 if is_long else 25)
        while is_long and world.operations < LONG_OPERATIONS:
            number += 1
            with capsys.disabled():
                print(
                    f"{world.operations} operations, {time.monotonic() - began:.0f} s; seed {number}",
                    flush=True,
                )
            await run_machine(world, number=number, runs=30, steps=40)
    await check_invariants(sql, world.acknowledged)
    told = json.dumps(
        {"operations": world.operations, "seconds": round(time.monotonic() - began)} | world.counts
    )
    with capsys.disabled() if is_long else nullcontext():
        print(told)
    assert world.counts["lost and asked again"], "no answer was ever lost"
    assert world.counts["disturbed: kill"], "nothing was ever killed"
