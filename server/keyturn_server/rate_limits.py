"""Tier rate limits on the credits path, with `limits`: fixed windows of a minute and a day."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from limits import RateLimitItem, RateLimitItemPerDay, RateLimitItemPerMinute
from limits.aio.storage import Storage
from limits.aio.strategies import FixedWindowRateLimiter

from keyturn_server.configuration import Tier


class WindowStorage(Storage):
    """Counters of fixed windows in this process, bounded, for `limits`.

    The library's own memory storage walks every key of every user at each hit; here a hit touches one.
    Windows that have ended make room when the next one opens; when `max_windows` are open, the one that
    would end first does.
    """

    STORAGE_SCHEME = None

    def __init__(self, *, max_windows: int) -> None:
        super().__init__()
        self._max_windows = max_windows
        self._windows: dict[str, tuple[int, float]] = {}
        """Count and end (Unix seconds) by key."""
        self._ends: defaultdict[float, deque[tuple[float, str]]] = defaultdict(deque)
        """Ends and keys by the length of the window: of one length, they end in the order they opened."""

    @property
    def base_exceptions(self) -> type[Exception]:
        """Nothing here fails by its nature."""
        return ValueError

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        """Count `amount` in the window of `key`, which is opened for `expiry` seconds if need be."""
        now = time.time()
        count, end = self._windows.get(key, (0, 0.0))
        if end <= now:
            ends = self._ends[expiry]
            while ends and ends[0][0] <= now:
                self._close(ends)
            if len(self._windows) >= self._max_windows:
                self._close(min(filter(None, self._ends.values()), key=lambda queue: queue[0][0]))
            count, end = 0, now + expiry
            ends.append((end, key))
        self._windows[key] = (count + amount, end)
        return count + amount

    def _close(self, ends: deque[tuple[float, str]]) -> None:
        end, key = ends.popleft()
        # Unless the key has another window by now.
        if self._windows.get(key, (0, 0.0))[1] == end:
            del self._windows[key]

    async def decr(self, key: str, amount: int = 1) -> int:
        """Take `amount` back, if the window is still open."""
        count, end = self._windows.get(key, (0, 0.0))
        if end <= time.time():
            return 0
        self._windows[key] = (max(count - amount, 0), end)
        return max(count - amount, 0)

    async def get(self, key: str) -> int:
        """The count of the open window."""
        count, end = self._windows.get(key, (0, 0.0))
        return count if end > time.time() else 0

    async def get_expiry(self, key: str) -> float:
        """When the window ends, in Unix seconds; now, if none is open."""
        _, end = self._windows.get(key, (0, 0.0))
        return max(end, time.time())

    async def check(self) -> bool:
        """Always there."""
        return True

    async def reset(self) -> int:
        """Forget everything; how many windows that were."""
        count = len(self._windows)
        self._windows.clear()
        self._ends.clear()
        return count

    async def clear(self, key: str) -> None:
        """Forget one window."""
        self._windows.pop(key, None)


@dataclass(frozen=True, slots=True)
class Limited:
    """The limit is reached; the window ends in `retry_after`."""

    retry_after: timedelta


class Hit(Protocol):
    """A request that has been counted, until it is given back."""

    async def refund(self) -> None:
        """Take the count back: the request was not made on credits after all."""
        ...


class _Counted:
    __slots__ = ("_items", "_storage", "_user_id")

    def __init__(self, storage: WindowStorage, items: tuple[RateLimitItem, ...], user_id: str) -> None:
        self._storage = storage
        self._items = items
        self._user_id = user_id

    async def refund(self) -> None:
        items, self._items = self._items, ()
        for item in items:
            await self._storage.decr(item.key_for(self._user_id))


class RateLimits:
    """Counts requests by user against the limits of a tier."""

    def __init__(self, storage: WindowStorage) -> None:
        self._storage = storage
        self._limiter = FixedWindowRateLimiter(storage)
        self._items: dict[tuple[int | None, int | None], tuple[RateLimitItem, ...]] = {}

    def _items_of(self, tier: Tier) -> tuple[RateLimitItem, ...]:
        key = (tier.requests_per_minute, tier.requests_per_day)
        items = self._items.get(key)
        if items is None:
            minute, day = key
            items = self._items[key] = (
                *((RateLimitItemPerMinute(minute),) if minute is not None else ()),
                *((RateLimitItemPerDay(day),) if day is not None else ()),
            )
        return items

    async def hit(self, user_id: str, tier: Tier | None) -> Hit | Limited:
        """Count one request, or say how long to wait. A refused request is not counted."""
        items = self._items_of(tier) if tier is not None else ()
        for index, item in enumerate(items):
            if not await self._limiter.hit(item, user_id):
                await _Counted(self._storage, items[: index + 1], user_id).refund()
                return await self._limited(item, user_id)
        return _Counted(self._storage, items, user_id)

    async def peek(self, user_id: str, tier: Tier | None) -> Limited | None:
        """What `hit` would say, without counting: None when there is room."""
        for item in self._items_of(tier) if tier is not None else ():
            if not await self._limiter.test(item, user_id):
                return await self._limited(item, user_id)
        return None

    async def _limited(self, item: RateLimitItem, user_id: str) -> Limited:
        end_seconds = await self._storage.get_expiry(item.key_for(user_id))
        return Limited(timedelta(seconds=max(end_seconds - time.time(), 0.001)))
