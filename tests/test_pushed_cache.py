"""The cache in front of flags and profiles: one reading for many callers, and never a stale one kept."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta

import pytest

from keyturn_server.freshness import PushedCache
from tests.support import eventually

LONG, SHORT = timedelta(hours=1), timedelta(seconds=0.02)


class Source:
    """Something to read, with a gate: counts the readings, each gives the value there is at its end."""

    def __init__(self) -> None:
        self.value = "old"
        self.loads = 0
        self.open = asyncio.Event()
        self.open.set()
        self.error: Exception | None = None

    async def load(self, key: str) -> str:
        self.loads += 1
        value = self.value
        await self.open.wait()
        if self.error is not None:
            raise self.error
        return f"{key}={value}"


def cache_of(
    load: Callable[[str], Awaitable[str]],
    *,
    ttl: timedelta = LONG,
    unpushed_ttl: timedelta = LONG,
    max_entries: int = 10,
) -> PushedCache[str]:
    return PushedCache(load, ttl=ttl, unpushed_ttl=unpushed_ttl, max_entries=max_entries)


async def waiting(source: Source, loads: int) -> None:
    """Back when that many readings have begun."""

    async def begun() -> bool:
        return source.loads >= loads

    await eventually(begun)


async def test_any_number_of_callers_at_once_share_one_reading() -> None:
    source = Source()
    cache = cache_of(source.load)
    source.open.clear()
    callers = [asyncio.create_task(cache.get("a")) for _ in range(1000)]
    await waiting(source, 1)
    source.open.set()
    assert set(await asyncio.gather(*callers)) == {"a=old"}
    assert await cache.get("a") == "a=old"
    assert source.loads == 1


async def test_different_keys_are_read_side_by_side() -> None:
    source = Source()
    cache = cache_of(source.load)
    source.open.clear()
    callers = [asyncio.create_task(cache.get(key)) for key in "abc"]
    await waiting(source, 3)
    source.open.set()
    assert await asyncio.gather(*callers) == ["a=old", "b=old", "c=old"]


async def test_a_caller_who_hangs_up_takes_nobody_with_him() -> None:
    source = Source()
    cache = cache_of(source.load)
    source.open.clear()
    leader, *others = [asyncio.create_task(cache.get("a")) for _ in range(10)]
    await waiting(source, 1)
    leader.cancel()
    others[0].cancel()
    await waiting(source, 2)
    source.open.set()
    results = await asyncio.gather(leader, *others, return_exceptions=True)
    assert [isinstance(result, asyncio.CancelledError) for result in results] == [True, True, *[False] * 8]
    assert set(results[2:]) == {"a=old"}
    assert source.loads == 2


async def test_when_all_hang_up_the_next_one_reads_anew() -> None:
    source = Source()
    cache = cache_of(source.load)
    source.open.clear()
    callers = [asyncio.create_task(cache.get("a")) for _ in range(10)]
    await waiting(source, 1)
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    source.open.set()
    before = source.loads
    assert await cache.get("a") == "a=old"
    assert source.loads == before + 1


async def test_an_error_reaches_all_who_wait_and_is_not_kept() -> None:
    source = Source()
    cache = cache_of(source.load)
    source.open.clear()
    source.error = ValueError("down")
    callers = [asyncio.create_task(cache.get("a")) for _ in range(10)]
    await waiting(source, 1)
    source.open.set()
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert all(isinstance(result, ValueError) for result in results)
    assert source.loads == 1
    source.error = None
    assert await cache.get("a") == "a=old"


@pytest.mark.parametrize("everything", [False, True])
async def test_a_reading_from_before_a_change_is_neither_kept_nor_joined(everything: bool) -> None:
    source = Source()
    cache = cache_of(source.load)
    await cache.expire_all(pushed=True)
    source.open.clear()
    before = asyncio.create_task(cache.get("a"))
    await waiting(source, 1)
    source.value = "new"
    await (cache.expire_all(pushed=True) if everything else cache.expire("a"))
    after = asyncio.create_task(cache.get("a"))
    await waiting(source, 2)
    source.open.set()
    assert (await before, await after) == ("a=old", "a=new")
    assert await cache.get("a") == "a=new"
    assert source.loads == 2


@pytest.mark.parametrize("everything", [False, True])
async def test_a_reading_that_ends_after_its_change_is_not_kept(everything: bool) -> None:
    source = Source()
    cache = cache_of(source.load)
    await cache.expire_all(pushed=True)
    source.open.clear()
    before = asyncio.create_task(cache.get("a"))
    await waiting(source, 1)
    source.value = "new"
    await (cache.expire_all(pushed=True) if everything else cache.expire("a"))
    source.open.set()
    assert await before == "a=old"
    assert await cache.get("a") == "a=new"


async def test_a_change_to_one_key_leaves_the_others() -> None:
    source = Source()
    cache = cache_of(source.load)
    for key in "ab":
        await cache.get(key)
    source.value = "new"
    await cache.expire("a")
    await cache.expire("never cached")
    assert [await cache.get(key) for key in "ab"] == ["a=new", "b=old"]


async def test_the_bound_is_kept_and_the_oldest_make_room() -> None:
    source = Source()
    cache = cache_of(source.load, max_entries=3)
    for key in "abcde":
        await cache.get(key)
    assert source.loads == 5
    for key in "cde":
        await cache.get(key)
    assert source.loads == 5, "the newest are still there"
    await cache.get("a")
    assert source.loads == 6


async def reads_again(cache: PushedCache[str], source: Source) -> bool:
    """Whether the entry ran out."""
    before = source.loads

    async def loaded() -> bool:
        await cache.get("a")
        return source.loads > before

    return bool(await eventually(loaded))


async def test_without_the_push_an_entry_lives_for_a_moment_only() -> None:
    source = Source()
    cache = cache_of(source.load, unpushed_ttl=SHORT)
    await cache.get("a")
    assert await reads_again(cache, source)
    await cache.expire_all(pushed=True)
    await cache.get("a")
    await cache.expire_all(pushed=False)
    assert await reads_again(cache, source)


async def test_with_the_push_an_entry_lives_for_its_lifetime() -> None:
    source = Source()
    cache = cache_of(source.load, ttl=LONG, unpushed_ttl=SHORT)
    await cache.get("a")
    # The timer of an entry from before must not end the one from after.
    await cache.expire_all(pushed=True)
    await cache.get("a")
    before = source.loads
    await asyncio.sleep(SHORT.total_seconds() * 5)
    await cache.get("a")
    assert source.loads == before
    brief = cache_of(source.load, ttl=SHORT)
    await brief.expire_all(pushed=True)
    await brief.get("a")
    assert await reads_again(brief, source)


async def test_losing_and_regaining_the_push_drops_what_was_cached() -> None:
    source = Source()
    cache = cache_of(source.load)
    for pushed in (True, False, True):
        await cache.expire_all(pushed=pushed)
        source.value = f"pushed {pushed} {source.loads}"
        assert await cache.get("a") == f"a={source.value}"


async def known(cache: PushedCache[str], key: str = "a") -> tuple[str | None, bool]:
    """What was last known of a key, and whether that is as good as new."""
    last = cache.last_known(key)
    return (None, False) if last is None else (last[0], last[1] == timedelta(0))


async def test_what_was_read_is_known_for_as_long_as_nobody_says_otherwise() -> None:
    source = Source()
    cache = cache_of(source.load, ttl=SHORT)
    assert await known(cache) == (None, False)
    await cache.expire_all(pushed=True)
    await cache.get("a")

    async def is_gone_from_the_cache() -> bool:
        return cache._cache.peek("a") is None

    await eventually(is_gone_from_the_cache)
    assert await known(cache) == ("a=old", True), "a change would have been announced"
    await cache.expire("a")
    assert await known(cache) == (None, False), "one was"
    assert cache.ever_known("a") == "a=old"
    source.value = "new"
    await cache.get("a")
    assert await known(cache) == ("a=new", True)


async def test_what_is_known_grows_old_from_when_changes_are_not_announced_any_more() -> None:
    source = Source()
    cache = cache_of(source.load)
    await cache.expire_all(pushed=True)
    await cache.get("a")
    await cache.expire_all(pushed=False)
    await asyncio.sleep(0.01)
    assert await known(cache) == ("a=old", False)
    [_, first] = cache.last_known("a") or ("", timedelta(0))
    # It is not made new by the push, which does not tell what it missed.
    await cache.expire_all(pushed=True)
    await asyncio.sleep(0.01)
    [_, second] = cache.last_known("a") or ("", timedelta(0))
    assert second > first
    await cache.expire_all(pushed=True)
    assert await known(cache) == (None, False), "all was announced to have changed"


async def test_what_is_read_without_announcements_is_as_old_as_its_reading() -> None:
    cache = cache_of(Source().load)
    await cache.get("a")
    await asyncio.sleep(0.01)
    assert await known(cache) == ("a=old", False)


async def test_what_we_alone_know_is_known_until_it_is_read_again() -> None:
    source = Source()
    cache = cache_of(source.load)
    await cache.expire_all(pushed=True)
    await cache.get("a")
    await cache.amend("a", str.upper)
    await cache.amend("b", str.upper)
    assert (await known(cache), await known(cache, "b")) == (("A=OLD", True), (None, False))
    assert await cache.get("a") == "a=old"
    await cache.expire("a")
    await cache.amend("a", str.upper)
    assert await known(cache) == (None, False), "what is out of date stays so"


async def test_the_oldest_of_what_is_known_makes_room() -> None:
    cache = cache_of(Source().load, max_entries=2)
    for key in ("a", "b", "a", "c"):
        await cache.expire(key)
        await cache.get(key)
    assert [cache.ever_known(key) for key in "abc"] == ["a=old", None, "c=old"]
