"""Records on their way in the background: what both clients share, without threads, tasks or I/O.

The clients add the sender: a thread or a task that lives while something is queued, takes a `batch`, sends
it, says how it went with `answered`, waits as long as that says, and begins again.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from keyturn import _wire
from keyturn.errors import InternalError, KeyturnError, QueueFull, ResourceExhausted, Unavailable
from keyturn.model import Recorded, RecordRequest, Unsent
from keyturn.retries import Retries
from keyturn.v1 import routing_service_pb2 as pb

OnUnsent = Callable[[Unsent], None]

BATCH_TIMEOUT = timedelta(seconds=10)
"""The deadline of a batch, whatever that of calls is."""

_BATCH = 100
"""Records in a batch, at most."""
# The sidecar's limits: for a record, for a batch; and what a record takes up in a batch besides itself.
_RECORD_BYTES, _BATCH_BYTES, _FRAME = 64 * 1024, 1024 * 1024, 8
_LOG = logging.getLogger("keyturn")


@dataclass(slots=True)
class _Queued:
    """A record in the queue. Kept encoded: what cannot be sent is refused when it is queued."""

    number: int
    record: RecordRequest
    message: pb.RecordRequest
    failure: KeyturnError | None = None


class RecordQueue:
    """The records that are not sent yet, oldest first. Those on their way are still in it.

    Raises `ValueError` for a size below 1. Not safe for threads by itself.
    """

    def __init__(
        self, size: int, retries: Retries, *, jitter: Callable[[float, float], float] = random.uniform
    ) -> None:
        if size < 1:
            raise ValueError("queue_size is at least 1")
        self._size = size
        self._retries = retries
        self._jitter = jitter
        self._waiting: deque[_Queued] = deque()
        self._sent: list[_Queued] = []
        self._told: list[_Queued] = []
        self._failures = 0
        self.last = 0
        """The number of the record that was queued last, from 1."""

    def __len__(self) -> int:
        return len(self._waiting) + len(self._sent)

    def put(self, record: RecordRequest) -> None:
        """Queue a record. Raises `QueueFull`, and `TypeError` or `ValueError` for what cannot be sent."""
        message = _wire.record_request(record)
        if message.ByteSize() > _RECORD_BYTES:
            raise ValueError(f"a record has at most {_RECORD_BYTES} bytes")
        if len(self) >= self._size:
            raise QueueFull(record)
        self.last += 1
        self._waiting.append(_Queued(self.last, record, message))

    def done(self, number: int) -> bool:
        """Whether the records up to this one are sent or unsent."""
        parts = (self._told, self._sent, self._waiting)
        return all(part[0].number > number for part in parts if part)

    def batch(self) -> pb.BatchRecordRequest:
        """The oldest records, to be sent now. They stay in the queue until `answered`."""
        size = 0
        while self._waiting and len(self._sent) < _BATCH:
            size += self._waiting[0].message.ByteSize() + _FRAME
            if size > _BATCH_BYTES:
                break
            self._sent.append(self._waiting.popleft())
        return _wire.batch_of(each.message for each in self._sent)

    def answered(
        self, results: Sequence[Recorded | KeyturnError] | KeyturnError
    ) -> tuple[list[Unsent], float]:
        """How the batch went: an answer for each record, or an error for all of them.

        Gives the records that are unsent for good, and the seconds to wait before the next batch. Say
        `told` once the unsent ones are reported: until then they are not done.
        """
        sent, self._sent = self._sent, []
        if not isinstance(results, KeyturnError) and len(results) != len(sent):
            results = InternalError(f"{len(sent)} records were sent, and {len(results)} answers came")
        answers = [results] * len(sent) if isinstance(results, KeyturnError) else results
        again: list[_Queued] = []
        for queued, answer in zip(sent, answers, strict=True):
            if isinstance(answer, Unavailable | ResourceExhausted):
                queued.failure = answer
                again.append(queued)
            elif isinstance(answer, KeyturnError):
                queued.failure = answer
                self._told.append(queued)
        self._waiting.extendleft(reversed(again))
        unsent = [Unsent(each.record, each.failure) for each in self._told if each.failure]
        if not again:
            self._failures = 0
            return unsent, 0.0
        self._failures += 1
        return unsent, self._retries.delay(self._failures, self._jitter) + _longest_wait(again)

    def told(self) -> None:
        """The unsent ones of the last batch are reported."""
        self._told = []

    def give_up(self) -> list[Unsent]:
        """Empty the queue: what is left is unsent."""
        left = [*self._sent, *self._waiting]
        self._sent, self._waiting = [], deque()
        closed = RuntimeError("the client was closed before this record was sent")
        return [Unsent(each.record, each.failure or closed) for each in left]


def _longest_wait(again: Iterable[_Queued]) -> float:
    """The longest wait that the sidecar asked for, in seconds."""
    waits = [each.failure.retry_after for each in again if each.failure and each.failure.retry_after]
    return max(waits, default=timedelta()).total_seconds()


def log_unsent(unsent: Unsent) -> None:
    """What becomes of unsent records when nobody else is told: a line in the log, without their tokens."""
    kind = type(unsent.error).__name__
    _LOG.error("a record was not sent: outcome %s: %s: %s", unsent.record.outcome, kind, unsent.error)


def report(on_unsent: OnUnsent, unsent: Iterable[Unsent]) -> None:
    """Tell of each unsent record. What the callback raises is logged."""
    for each in unsent:
        try:
            on_unsent(each)
        except Exception as failure:
            # Without its traceback, whose text may hold anything of the record.
            _LOG.error("on_unsent raised %s", type(failure).__name__)
            log_unsent(each)
