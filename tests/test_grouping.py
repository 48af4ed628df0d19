"""Group commit: what queues together runs together, and a bad item fails alone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from keyturn_server.errors import Overloaded, StoreUnavailable
from keyturn_server.grouping import AGAIN, Again, Group


class Statement:
    """Stands for a statement: doubles numbers, remembers the groups, waits while `gate` is closed."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.poison: set[int] = set()
        self.faults = 0
        self.again: list[int] = []

    async def __call__(self, items: Sequence[int]) -> list[int | Again]:
        self.groups.append(list(items))
        await self.gate.wait()
        if self.faults:
            self.faults -= 1
            raise StoreUnavailable
        if bad := self.poison.intersection(items):
            raise ValueError(f"bad: {bad}")
        results: list[int | Again] = []
        for item in items:
            if item in self.again:
                self.again.remove(item)
                results.append(AGAIN)
            else:
                results.append(item * 2)
        return results


def group(statement: Statement, *, keep_cancelled: bool = False) -> Group[int, int]:
    return Group(statement, most=8, most_queued=100, keep_cancelled=keep_cancelled)


async def test_what_queues_while_a_statement_runs_goes_into_the_next_one() -> None:
    statement = Statement()
    async with group(statement) as numbers:
        statement.gate.clear()
        first = asyncio.create_task(numbers.submit(0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        rest = [asyncio.create_task(numbers.submit(number)) for number in range(1, 12)]
        await asyncio.sleep(0)
        statement.gate.set()
        assert await asyncio.gather(first, *rest) == [number * 2 for number in range(12)]
    assert [len(items) for items in statement.groups] == [1, 8, 3]


async def test_a_bad_item_fails_alone() -> None:
    statement = Statement()
    statement.poison = {3}
    async with group(statement) as numbers:
        results = await asyncio.gather(
            *(numbers.submit(number) for number in range(8)), return_exceptions=True
        )
    assert isinstance(results.pop(3), ValueError)
    assert results == [0, 2, 4, 8, 10, 12, 14]


async def test_a_fault_of_the_store_is_tried_once_more_and_then_told_to_everyone() -> None:
    statement = Statement()
    statement.faults = 1
    async with group(statement) as numbers:
        assert [*await asyncio.gather(numbers.submit(1), numbers.submit(2))] == [2, 4]
        statement.faults = 2
        results = await asyncio.gather(numbers.submit(1), numbers.submit(2), return_exceptions=True)
        assert [type(result) for result in results] == [StoreUnavailable, StoreUnavailable]
        assert await numbers.submit(5) == 10


async def test_a_twin_is_asked_again_in_a_later_group() -> None:
    statement = Statement()
    statement.again = [7, 7]
    async with group(statement) as numbers:
        assert await numbers.submit(7) == 14
    assert statement.groups == [[7], [7], [7]]


async def test_a_wrong_number_of_results_is_an_error_for_its_callers_and_not_the_end() -> None:
    async def short(items: Sequence[int]) -> list[int | Again]:
        return []

    async with Group[int, int](short, most=8, most_queued=100, keep_cancelled=False) as numbers:
        with pytest.raises(RuntimeError, match="0 results for 1 items"):
            await numbers.submit(1)
        with pytest.raises(RuntimeError):
            await numbers.submit(2)


@pytest.mark.parametrize(("keep_cancelled", "ran"), [(True, [[0], [1]]), (False, [[0]])])
async def test_the_item_of_a_caller_who_went_away_is_kept_or_dropped(
    keep_cancelled: bool, ran: list[list[int]]
) -> None:
    statement = Statement()
    async with group(statement, keep_cancelled=keep_cancelled) as numbers:
        statement.gate.clear()
        first = asyncio.create_task(numbers.submit(0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        second = asyncio.create_task(numbers.submit(1))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0)
        statement.gate.set()
        assert await first == 0
    assert statement.groups == ran


async def test_closing_runs_what_is_queued_and_takes_nothing_more() -> None:
    statement = Statement()
    numbers = group(statement)
    async with numbers:
        tasks = [asyncio.create_task(numbers.submit(number)) for number in range(20)]
        await asyncio.sleep(0)
    assert await asyncio.gather(*tasks) == [number * 2 for number in range(20)]
    with pytest.raises(StoreUnavailable):
        await numbers.submit(1)


async def test_when_too_many_wait_the_next_one_hears_so_at_once() -> None:
    statement = Statement()
    async with group(statement) as numbers:
        statement.gate.clear()
        first = asyncio.create_task(numbers.submit(0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting = [asyncio.create_task(numbers.submit(number)) for number in range(100)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await numbers.submit(1)
        statement.gate.set()
        assert [await first, *await asyncio.gather(*waiting)] == [0, *(number * 2 for number in range(100))]


async def test_whoever_queued_behind_an_unreachable_store_does_not_wait_for_it_again() -> None:
    statement = Statement()
    statement.faults = 2
    async with group(statement) as numbers:
        results = await asyncio.gather(
            *(numbers.submit(number) for number in range(20)), return_exceptions=True
        )
        assert {type(result) for result in results} == {StoreUnavailable}
    assert len(statement.groups) == 2
