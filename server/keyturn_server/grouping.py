"""Group commit: what has queued while the last statement ran goes into the next one. No timer."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Final, Generic, TypeVar

from keyturn_server.errors import Overloaded, StoreUnavailable

T = TypeVar("T")
R = TypeVar("R")


class Again:
    """The result of an item that must be asked again in a later group."""


AGAIN: Final = Again()

# A twin stands before an item once, and a race with another sidecar may add a few.
_MOST_TRIES = 20


class Group(Generic[T, R]):
    """Runs many callers' items through one statement at a time.

    `run` takes a list of items and gives a result for each, in order, or `AGAIN`. It must be safe to
    run again with the same items: after `StoreUnavailable` the whole group is tried once more on
    another connection. Any other error of a group means that one of its items is bad: the group is
    split until that item stands alone, and only its caller sees the error.

    When the store is unavailable, whoever queued meanwhile hears so as well: the next attempt would
    only make them wait as long again.

    The statement runs in this object's own task, so a caller that is cancelled leaves nothing half
    done. With `keep_cancelled` the item of a caller that went away still runs; without it, an item
    that has not started yet is dropped.
    """

    def __init__(
        self,
        run: Callable[[Sequence[T]], Awaitable[Sequence[R | Again]]],
        *,
        most: int,
        most_queued: int,
        keep_cancelled: bool,
        on_group: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._run = run
        self._most = most
        self._most_queued = most_queued
        self._keep_cancelled = keep_cancelled
        self._on_group = on_group
        self._queue: deque[tuple[T, asyncio.Future[R], int]] = deque()
        self._wake = asyncio.Event()
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Group[T, R]:
        self._task = asyncio.create_task(self._work(), name="group")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Runs what is queued, then stops."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await self._task

    async def submit(self, item: T) -> R:
        """The result of `item`. Raises what its statement raised, `Overloaded` when too many wait, and
        `StoreUnavailable` once closed."""
        if self._closing:
            raise StoreUnavailable
        if len(self._queue) >= self._most_queued:
            raise Overloaded
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._queue.append((item, future, 0))
        self._wake.set()
        return await future

    async def _work(self) -> None:
        while self._queue or not self._closing:
            if not self._queue:
                self._wake.clear()
                await self._wake.wait()
                continue
            group: list[tuple[T, asyncio.Future[R], int]] = []
            while self._queue and len(group) < self._most:
                entry = self._queue.popleft()
                if self._keep_cancelled or not entry[1].done():
                    group.append(entry)
            if group:
                self._on_group(len(group))
                await self._run_group(group)

    async def _run_group(self, group: list[tuple[T, asyncio.Future[R], int]]) -> None:
        items = [item for item, _, _ in group]
        try:
            try:
                results = await self._run(items)
            except StoreUnavailable:
                results = await self._run(items)
            if len(results) != len(items):
                raise RuntimeError(f"{len(results)} results for {len(items)} items")
        except StoreUnavailable as error:
            waiting = [*group, *self._queue]
            self._queue.clear()
            for _, future, _ in waiting:
                _fail(future, error)
        except Exception as error:
            if len(group) == 1:
                _fail(group[0][1], error)
                return
            middle = len(group) // 2
            await self._run_group(group[:middle])
            await self._run_group(group[middle:])
        else:
            for (item, future, tries), result in zip(group, results, strict=True):
                if not isinstance(result, Again):
                    if not future.done():
                        future.set_result(result)
                elif tries < _MOST_TRIES:
                    self._queue.append((item, future, tries + 1))
                else:
                    _fail(future, StoreUnavailable())


def _fail(future: asyncio.Future[R], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # a caller that went away does not read it; that is no news
