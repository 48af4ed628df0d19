"""Rate limits: counted by user, given back, bounded in memory."""

from __future__ import annotations

from keyturn_server.configuration import Tier
from keyturn_server.rate_limits import Limited, RateLimits, WindowStorage


def tier(per_minute: int | None = None, per_day: int | None = None) -> Tier:
    return Tier(name="t", rank=0, requests_per_minute=per_minute, requests_per_day=per_day)


async def hits(limits: RateLimits, user_id: str, of: Tier | None, times: int) -> list[bool]:
    return [not isinstance(await limits.hit(user_id, of), Limited) for _ in range(times)]


async def test_each_user_has_a_window_of_their_own() -> None:
    limits = RateLimits(WindowStorage(max_windows=100))
    assert await hits(limits, "a", tier(2), 3) == [True, True, False]
    assert await hits(limits, "b", tier(2), 3) == [True, True, False]


async def test_no_limit_and_no_tier_let_everything_through() -> None:
    limits = RateLimits(WindowStorage(max_windows=100))
    assert all(await hits(limits, "a", tier(), 50))
    assert all(await hits(limits, "a", None, 50))


async def test_the_limit_of_a_day_holds_besides_that_of_a_minute() -> None:
    limits = RateLimits(WindowStorage(max_windows=100))
    assert await hits(limits, "a", tier(10, 3), 4) == [True, True, True, False]
    # The refused one took nothing from the minute.
    assert await hits(limits, "a", tier(10), 8) == [True] * 7 + [False]


async def test_a_refund_makes_room_again_and_only_once() -> None:
    limits = RateLimits(WindowStorage(max_windows=100))
    hit = await limits.hit("a", tier(1))
    assert not isinstance(hit, Limited)
    await hit.refund()
    await hit.refund()
    assert await hits(limits, "a", tier(1), 2) == [True, False]


async def test_looking_does_not_count() -> None:
    limits = RateLimits(WindowStorage(max_windows=100))
    assert [await limits.peek("a", tier(1)) for _ in range(5)] == [None] * 5
    assert await hits(limits, "a", tier(1), 1) == [True]
    limited = await limits.peek("a", tier(1))
    assert limited is not None
    assert 0 < limited.retry_after.total_seconds() <= 60


async def test_memory_is_bounded() -> None:
    storage = WindowStorage(max_windows=10)
    limits = RateLimits(storage)
    for number in range(100):
        await limits.hit(f"user-{number}", tier(1))
    assert await storage.reset() == 10
