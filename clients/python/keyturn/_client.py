"""What both clients know, and how they go by it: everything but the talking."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import timedelta

from keyturn import _channel
from keyturn._queue import OnUnsent, RecordQueue, log_unsent, report
from keyturn.errors import Unavailable
from keyturn.model import DecideRequest, Decision, RecordRequest, Unsent, unmetered_decision
from keyturn.retries import ONCE, Attempts, Reach, Retries
from keyturn.secret import Secret

WhenDown = Callable[[DecideRequest, Unavailable], bool]


class ClientState(ABC):
    """The options of a client, whether its sidecar is down, and its queue of records."""

    def __init__(
        self,
        target: str | None = None,
        *,
        token: str | Secret | None = None,
        root_certificates: bytes | None = None,
        private_key: bytes | None = None,
        certificate_chain: bytes | None = None,
        tls: bool = False,
        timeout: timedelta = timedelta(seconds=2),
        retries: Retries = Retries(),  # noqa: B008 - a frozen value
        when_down: WhenDown | None = None,
        queue_size: int = 10_000,
        close_timeout: timedelta = timedelta(seconds=5),
        on_unsent: OnUnsent = log_unsent,
    ) -> None:
        self._connection = _channel.connection(
            target,
            token=token,
            root_certificates=root_certificates,
            private_key=private_key,
            certificate_chain=certificate_chain,
            tls=tls,
        )
        self._timeout = timeout
        self._retries = retries
        self._reach = Reach()
        self._attempts(None)  # refuses a bad timeout now, not at the first call
        self._when_down = when_down
        self._queue = RecordQueue(queue_size, retries)
        if close_timeout < timedelta():
            raise ValueError("close_timeout cannot be negative")
        self._close_timeout = close_timeout
        self._on_unsent = on_unsent
        self._closing = False
        self._open()

    @abstractmethod
    def _open(self) -> None:
        """What the client has besides; nothing connects yet."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._connection.target!r})"

    @abstractmethod
    def record_later(self, record: RecordRequest) -> None:
        """See `Client.record_later`."""

    def _attempts(self, timeout: timedelta | None, *, retry: bool = True) -> Attempts:
        """The attempts of a call that begins now."""
        retries = self._retries if retry else ONCE
        return Attempts(retries, self._timeout if timeout is None else timeout, self._reach)

    def _passes(self, asked: DecideRequest, error: Unavailable) -> Decision:
        """What `when_down` makes of a decision that nobody answered. Raises `error` unless it passes."""
        if self._when_down is None or not self._when_down(asked, error):
            raise error
        return unmetered_decision()

    def _require_open(self) -> None:
        if self._closing:
            raise RuntimeError("the client is closed")

    def _hand_over(self, record: RecordRequest) -> None:
        """`record_later` for those who have nobody to raise to: what has no room is unsent."""
        try:
            self.record_later(record)
        except Exception as failure:
            report(self._on_unsent, [Unsent(record, failure)])

    def _give_up(self) -> list[Unsent]:
        """What was left in the queue, reported."""
        unsent = self._queue.give_up()
        report(self._on_unsent, unsent)
        return unsent
