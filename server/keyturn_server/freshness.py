"""Cached readings that a push keeps fresh: aiocache below, a single flight in front.

While the push is up an entry lives for its lifetime or until the push says that it changed. While it
is down an entry lives for a moment only (`unpushed_ttl`), so that a change still arrives soon; what
was cached before is dropped. A reading that was under way when its change was announced is not kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, NamedTuple, TypeVar

from aiocache import SimpleMemoryCache

T = TypeVar("T")


class BoundedMemoryCache(SimpleMemoryCache):  # type: ignore[misc]  # aiocache has no types
    """aiocache's memory cache with a bound: the oldest entry makes room. (It has none of its own.)"""

    def __init__(self, *, max_entries: int, **options: Any) -> None:
        super().__init__(**options)
        self._max_entries = max_entries

    async def _set(
        self, key: str, value: Any, ttl: float | None = None, _cas_token: Any = None, _conn: Any = None
    ) -> Any:
        if key not in self._cache and len(self._cache) >= self._max_entries:
            await self._delete(next(iter(self._cache)))
        return await super()._set(key, value, ttl=ttl, _cas_token=_cas_token, _conn=_conn)

    async def _clear(self, namespace: str | None = None, _conn: Any = None) -> Any:
        # The library forgets these timers and lets them run: each would end a later entry early.
        for timer in self._handlers.values():
            timer.cancel()
        return await super()._clear(namespace, _conn)

    def peek(self, key: str) -> Any:
        """The entry or None, without the library's wrappers, which cost more than the look-up."""
        return self._cache.get(key)

    def __len__(self) -> int:
        return len(self._cache)


class _Flight(Generic[T]):
    """One reading under way, and those who wait for it."""

    __slots__ = ("future", "is_current")

    def __init__(self) -> None:
        self.future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.is_current = True


class _Abandoned(Exception):  # noqa: N818 - not an error: the leader was cancelled, somebody else leads
    pass


@dataclass(slots=True, eq=False)
class _Span:
    """A time through which changes were announced, or were not."""

    is_pushed: bool
    ended_at: float | None = None


class _Last(NamedTuple, Generic[T]):
    """The last reading of a key."""

    value: T
    loaded_at: float
    span: _Span
    is_outdated: bool = False
    """Whether it was announced that it has changed."""

    def known_at(self, now: float) -> float:
        """When it was last known to be true: as long as nobody announced that it was not."""
        if not self.span.is_pushed:
            return self.loaded_at
        return now if self.span.ended_at is None else self.span.ended_at


class PushedCache(Generic[T]):
    """Readings by key. `load` is called once for any number of callers at the same time."""

    def __init__(
        self,
        load: Callable[[str], Awaitable[T]],
        *,
        ttl: timedelta,
        unpushed_ttl: timedelta,
        max_entries: int,
    ) -> None:
        self._load = load
        self._ttl_seconds = ttl.total_seconds()
        self._unpushed_seconds = unpushed_ttl.total_seconds()
        self._cache = BoundedMemoryCache(max_entries=max_entries, timeout=None)
        self._flights: dict[str, _Flight[T]] = {}
        self._span = _Span(is_pushed=False)
        self._last: dict[str, _Last[T]] = {}
        self._max_entries = max_entries

    async def get(self, key: str) -> T:
        """The reading, from the cache or by `load`. Raises what `load` raises, which is not cached."""
        while True:
            if (found := self.cached(key)) is not None:
                return found
            flight = self._flights.get(key)
            if flight is None:
                return await self._lead(key)
            try:
                return await asyncio.shield(flight.future)
            except _Abandoned:
                continue

    def cached(self, key: str) -> T | None:
        """The reading if it is in the cache."""
        found: T | None = self._cache.peek(key)
        return found

    async def _lead(self, key: str) -> T:
        flight = self._flights[key] = _Flight[T]()
        try:
            value = await self._load(key)
            if flight.is_current:
                ttl = self._ttl_seconds if self._span.is_pushed else self._unpushed_seconds
                self._remember(key, _Last(value, asyncio.get_running_loop().time(), self._span))
                await self._cache.set(key, value, ttl=ttl)
        except BaseException as error:
            passed_on = error if isinstance(error, Exception) else _Abandoned()
            if not flight.future.done():
                flight.future.set_exception(passed_on)
                flight.future.exception()  # nobody may be waiting
            raise
        else:
            flight.future.set_result(value)
            return value
        finally:
            if self._flights.get(key) is flight:
                del self._flights[key]

    async def expire(self, key: str) -> None:
        """The reading for `key` has changed: the next `get` loads it."""
        if (last := self._last.get(key)) is not None:
            self._last[key] = last._replace(is_outdated=True)
        await self._drop(key)

    async def amend(self, key: str, change: Callable[[T], T]) -> None:
        """The reading for `key` has changed, and so far we alone know: the next `get` loads it, and until
        then it is known as `change` makes it."""
        if (last := self._last.get(key)) is not None:
            self._last[key] = last._replace(value=change(last.value))
        await self._drop(key)

    async def _drop(self, key: str) -> None:
        if (flight := self._flights.pop(key, None)) is not None:
            flight.is_current = False
        await self._cache.delete(key)

    def ever_known(self, key: str) -> T | None:
        """The last reading for `key`, out of date or not."""
        last = self._last.get(key)
        return None if last is None else last.value

    def last_known(self, key: str) -> tuple[T, timedelta] | None:
        """The last reading for `key` that nobody has said to be out of date, and for how long nobody
        could have said so. For when `get` cannot load."""
        last = self._last.get(key)
        if last is None or last.is_outdated:
            return None
        now = asyncio.get_running_loop().time()
        return last.value, timedelta(seconds=now - last.known_at(now))

    def _remember(self, key: str, last: _Last[T]) -> None:
        self._last.pop(key, None)
        self._last[key] = last
        if len(self._last) > self._max_entries:
            del self._last[next(iter(self._last))]

    async def expire_all(self, *, pushed: bool) -> None:
        """Nothing cached counts any more; `pushed` says whether changes are announced from now on."""
        if pushed and self._span.is_pushed:
            # It was announced that all has changed.
            self._last = {key: last._replace(is_outdated=True) for key, last in self._last.items()}
        else:
            self._span.ended_at = asyncio.get_running_loop().time()
            self._span = _Span(is_pushed=pushed)
        for flight in self._flights.values():
            flight.is_current = False
        self._flights.clear()
        await self._cache.clear()
