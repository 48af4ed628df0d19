"""When a call is tried again. The one retry policy: grpc's own is switched off."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from keyturn.errors import DeadlineExceeded, KeyturnError, Unavailable, came_from_the_sidecar


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """Exponential backoff with full jitter, for UNAVAILABLE only, within the call's deadline.

    Before attempt n+1 the client waits a random time up to `first_delay * 2^(n-1)`, at most
    `max_delay`; on top of the time the server asked to wait, if it asked. A wait that does not fit
    in the deadline is not begun: the error is raised at once. `Retries(attempts=1)` never retries.

    Raises `ValueError` when `attempts` is below 1 or a delay is negative.
    """

    attempts: int = 5
    first_delay: timedelta = timedelta(milliseconds=100)
    max_delay: timedelta = timedelta(seconds=1)

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError("attempts is at least 1")
        if self.first_delay < timedelta() or self.max_delay < timedelta():
            raise ValueError("a delay cannot be negative")

    def delay(self, failures: int, jitter: Callable[[float, float], float]) -> float:
        """Seconds to wait after so many failures in a row, from 1, without what the server asked for."""
        doubled = self.first_delay.total_seconds() * 2.0 ** min(failures - 1, 30)
        return jitter(0.0, min(doubled, self.max_delay.total_seconds()))


ONCE = Retries(attempts=1)


class Reach:
    """Whether the sidecar answers. One that is down costs no more than an attempt a call.

    It is down once all attempts of a call have ended with UNAVAILABLE and the last one found nobody who
    answered; until somebody does, with whatever status.
    """

    down = False

    def answered(self, error: KeyturnError | None = None) -> None:
        """An attempt was answered, or failed with `error`: then only if that came from the sidecar."""
        if error is None or came_from_the_sidecar(error):
            self.down = False


class Attempts:
    """The attempts of one call: how long each may take, and whether there is another.

    Raises `ValueError` when `timeout` is not positive.
    """

    def __init__(
        self,
        retries: Retries,
        timeout: timedelta,
        reach: Reach,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        if timeout <= timedelta():
            raise ValueError("a timeout is more than zero")
        self._retries = ONCE if reach.down else retries
        self._reach = reach
        self._clock = clock
        self._jitter = jitter
        self._ends = clock() + timeout.total_seconds()
        self._made = 0

    def seconds_left(self) -> float:
        """Until the deadline, for the attempt that begins now."""
        return self._ends - self._clock()

    def wait_after(self, error: KeyturnError) -> float | None:
        """Seconds to wait before the next attempt; None: there is none, raise `error`."""
        self._reach.answered(error)
        wait = self._next_wait(error)
        if wait is None and type(error) is Unavailable and not came_from_the_sidecar(error):
            self._reach.down = True
        return wait

    def answered(self) -> None:
        """This attempt was answered with OK."""
        self._reach.answered()

    def _next_wait(self, error: KeyturnError) -> float | None:
        self._made += 1
        if not isinstance(error, Unavailable) or isinstance(error, DeadlineExceeded):
            return None
        if self._made >= self._retries.attempts:
            return None
        wait = self._retries.delay(self._made, self._jitter)
        asked = error.retry_after.total_seconds() if error.retry_after is not None else 0.0
        left = self.seconds_left()
        if asked + wait < left:
            return asked + wait
        # Jitter gives way to the deadline; what the server asked for does not.
        return asked if 0.0 < asked < left else None
