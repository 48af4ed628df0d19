"""How long to wait for a database or a disk that may be silent, where it may be us who do not listen."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta

_BITS = 5  # in which silence is measured


@asynccontextmanager
async def patience(limit: timedelta, *, give_up: Callable[[], object] | None = None) -> AsyncIterator[None]:
    """Waits in the block for somebody else, and raises TimeoutError when he has been silent for `limit`.

    Silence is measured bit by bit. A bit whose end we come to late counts for the less, since then we were
    the ones to be slow, and an answer may be there that we have not read; but for a fifth at least, so that
    it has an end. `give_up` is called before the block is cancelled: a statement is not to be cancelled with
    the server's help when that says nothing.
    """
    loop = asyncio.get_running_loop()
    bit = limit.total_seconds() / _BITS
    left = _BITS - 0.01
    began = time.monotonic()
    timer: asyncio.TimerHandle

    def end_of_a_bit() -> None:
        nonlocal left, began, timer
        late = max(0.0, time.monotonic() - began - bit)
        left -= max(1 / 5, 1 - late / bit)
        if left > 0:
            began = time.monotonic()
            timer = loop.call_later(bit, end_of_a_bit)
            return
        wait.reschedule(loop.time())
        if give_up is not None:
            give_up()

    timer = loop.call_later(bit, end_of_a_bit)
    try:
        async with asyncio.timeout(None) as wait:
            yield
    finally:
        timer.cancel()
