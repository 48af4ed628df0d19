"""Processes that one process starts, and starts again when they die.

It forks, so whoever uses it has no thread and no event loop, and has not begun with gRPC, whose core does not
survive a fork. Signals are all that it waits for: they are blocked, and taken one by one.
docs/decisions/0017-workers.md
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, Self

Report = Callable[[str], None]
Work = Callable[[Report], int]
"""What a process does: it reports a line once it is up, and comes to an exit code."""

_PR_SET_PDEATHSIG: Final = 1
_LOOK: Final = timedelta(milliseconds=10)  # how often a start is looked after
_FIRST_PAUSE: Final = timedelta(milliseconds=100)  # before a restart; doubles up to the last
_LAST_PAUSE: Final = timedelta(seconds=15)
_STEADY: Final = timedelta(minutes=1)  # after so long the pauses begin anew


class _Ending(Exception):  # noqa: N818 - the end, not always an error
    """Everything is to end, and what for: an exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass(slots=True, kw_only=True)
class _Child:
    work: Work
    facts: dict[str, Any]
    """What log lines call it by."""
    is_vital: bool
    pid: int | None = None
    reports: int | None = None
    """Where its reports are read."""
    started: float = 0.0
    pause: timedelta = _FIRST_PAUSE
    due: float = 0.0
    """When it is started again, while it has no process."""


class Supervisor:
    """`with Supervisor(log, …) as one:`, then `start` and `watch`; afterwards there is the exit `code`.

    A SIGTERM or SIGINT ends the block quietly, and so does a process that cannot start, or a vital one that
    ends. At the end of the block all processes are told to end, the vital ones last, and are waited for; a
    second signal ends them, and this process, at once. If this process is killed the kernel kills them.
    """

    def __init__(self, log: Any, *, on_end: Callable[[], None]) -> None:
        """`on_end` is called before the processes are told to end."""
        self._log = log
        self._on_end = on_end
        self._children: list[_Child] = []
        self._is_signalled = False
        self.code = 0

    def __enter__(self) -> Self:
        self._stopping = {signal.SIGTERM}
        # A shell has what it runs in the background ignore SIGINT; a blocked one would come all the same.
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._stopping.add(signal.SIGINT)
        self._taken = {*self._stopping, signal.SIGCHLD}
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._taken)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, _Ending):
            self.code = error.code
        try:
            self._on_end()
            for is_vital in (False, True):
                self._end([child for child in self._children if child.is_vital is is_vital])
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        return isinstance(error, _Ending)

    def start(self, work: Work, *, is_vital: bool = False, **facts: Any) -> str:
        """Do `work` in a process of its own; back with the line that it reports.

        If it ends before that, so does the block, with its exit code.
        """
        child = _Child(work=work, facts=facts, is_vital=is_vital)
        self._children.append(child)
        self._fork(child)
        reported = b""
        while not reported.endswith(b"\n"):
            self._wait(_LOOK)
            # In this order: what it has said before its end is there to be read after it.
            code = self._ended(child)
            reported += self._read(child)
            if code is not None and not reported.endswith(b"\n"):
                if code < 0:
                    self._log.error("process_ended", status=code, **facts)
                raise _Ending(code if code > 0 else 1)
            if code is not None:
                self._postpone(child, code)
        return reported.decode().strip()

    def watch(self) -> None:
        """Start again whatever ends, until the block ends."""
        while True:
            for child in self._children:
                if (code := self._ended(child)) is not None:
                    self._postpone(child, code)
                if child.pid is None and child.due <= time.monotonic():
                    self._log.info("process_restarted", **child.facts)
                    self._fork(child)
            due = min((child.due for child in self._children if child.pid is None), default=None)
            self._wait(None if due is None else timedelta(seconds=max(due - time.monotonic(), 0)))

    def _fork(self, child: _Child) -> None:
        self._forget_reports(child)
        ours, theirs = os.pipe()
        os.set_blocking(ours, False)
        parent = os.getpid()
        pid = os.fork()
        if pid:
            os.close(theirs)
            child.pid, child.reports, child.started = pid, ours, time.monotonic()
            return
        code = 1
        try:
            # A session of its own: Ctrl-C is for the parent, who passes it on.
            os.setsid()
            _end_with(parent)
            for other in self._children:
                self._forget_reports(other)
            os.close(ours)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            code = child.work(lambda line: _report(theirs, line))
        except Exception:
            self._log.exception("crashed", **child.facts)
        finally:
            # Whatever this process has been in the middle of is its parent's.
            if sys.stderr is not None:
                sys.stderr.flush()
            os._exit(code)

    def _wait(self, limit: timedelta | None) -> None:
        """Until a signal comes, or so long. Raises `_Ending` when it says so."""
        if limit is None:
            taken = signal.sigwaitinfo(self._taken)
        elif (timed := signal.sigtimedwait(self._taken, limit.total_seconds())) is not None:
            taken = timed
        else:
            return
        if taken.si_signo not in self._stopping:
            return
        if self._is_signalled:
            os._exit(128 + taken.si_signo)
        self._is_signalled = True
        self._log.info("signalled", signal=signal.Signals(taken.si_signo).name)
        raise _Ending(0)

    def _end(self, children: Collection[_Child]) -> None:
        for child in children:
            if child.pid is not None:
                os.kill(child.pid, signal.SIGTERM)
        while True:
            for child in children:
                code = self._ended(child)
                # One that has only just begun may not mind signals yet.
                if code not in (None, 0, -signal.SIGTERM):
                    self._log.error("process_ended", status=code, **child.facts)
                    self.code = self.code or 1
            if all(child.pid is None for child in children):
                return
            try:
                self._wait(None)
            except _Ending:
                continue

    def _ended(self, child: _Child) -> int | None:
        """Its exit code, or minus the signal that killed it, if it has ended since it was last asked."""
        if child.pid is None:
            return None
        pid, status = os.waitpid(child.pid, os.WNOHANG)
        if not pid:
            return None
        child.pid = None
        return os.waitstatus_to_exitcode(status)

    def _postpone(self, child: _Child, code: int) -> None:
        """Have it started again, not at once where it keeps ending."""
        self._log.error("process_ended", status=code, **child.facts)
        if child.is_vital:
            raise _Ending(code if code > 0 else 1)
        now = time.monotonic()
        if now - child.started > _STEADY.total_seconds():
            child.pause = _FIRST_PAUSE
        child.due = now + child.pause.total_seconds()
        child.pause = min(2 * child.pause, _LAST_PAUSE)

    def _read(self, child: _Child) -> bytes:
        if child.reports is None:
            return b""
        try:
            return os.read(child.reports, 4096)
        except BlockingIOError:
            return b""

    def _forget_reports(self, child: _Child) -> None:
        if child.reports is not None:
            os.close(child.reports)
            child.reports = None


def _report(descriptor: int, line: str) -> None:
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that ends."""
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) or os.getppid() != parent:
        raise RuntimeError("the parent has gone")
