"""A disk that fails one process: what it asks the kernel to write or to sync is answered here instead.

The process is started with a seccomp filter that hands these calls to us, as the kernel can since Linux 5.5.
We let each through, refuse it with an error, or leave it waiting. No privilege is needed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import platform
import select
import socket
import struct
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest

# seccomp, fsync, fdatasync and pwrite64 by machine.
_CALLS: Final = {"x86_64": (317, 74, 75, 18), "aarch64": (277, 82, 83, 68)}
SYNC: Final = ("fsync", "fdatasync")
WRITE: Final = ("pwrite64",)

_RECEIVE: Final = 0xC0502100
_SEND: Final = 0xC0182101
_CONTINUE: Final = 1
_IS_AVAILABLE: Final = 2
_ASK: Final = ctypes.c_uint32(0x7FC00000)
_LIMIT_SECONDS = 30

# Installs the filter, sends us its end of it, and becomes `keyturn`. Arguments: our socket, the numbers of
# the calls, and what `keyturn` gets.
_LAUNCH = """
import ctypes, os, socket, struct, sys
path, seccomp, *numbers = sys.argv[1], *map(int, sys.argv[2].split(","))
libc = ctypes.CDLL(None, use_errno=True)
steps = [(0x20, 0, 0, 0)]  # load the number of the call
for left, number in zip(range(len(numbers), 0, -1), numbers):
    steps.append((0x15, left, 0, number))  # if it is this one, go to the last step
steps += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x7FC00000)]  # let it through; ask
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
assert libc.prctl(38, 1, 0, 0, 0) == 0  # no new privileges
listener = libc.syscall(seccomp, 1, 8, program)
assert listener >= 0, os.strerror(ctypes.get_errno())
with socket.socket(socket.AF_UNIX) as us:
    us.connect(path)
    socket.send_fds(us, [b"here"], [listener])
os.close(listener)
os.execv(sys.executable, [sys.executable, "-m", "keyturn_server", *sys.argv[3:]])
"""


class Disk:
    """What the disk does to a process that was started by `program`."""

    def __init__(self, path: Path) -> None:
        numbers = _CALLS.get(platform.machine())
        if numbers is None:
            pytest.skip(f"the numbers of system calls on {platform.machine()} are not known here")
        if ctypes.CDLL(None).syscall(numbers[0], _IS_AVAILABLE, 0, ctypes.byref(_ASK)):
            pytest.skip("no process may be told here how another one's system calls end")
        self.program: Sequence[str] = (
            *(sys.executable, "-c", _LAUNCH, str(path)),
            ",".join(map(str, numbers)),
        )
        self._names = dict(zip(numbers[1:], (*SYNC, *WRITE), strict=True))
        self._refused: dict[str, int] = {}
        self._changed = threading.Condition()
        self._is_over = False
        self.refused = 0
        """How many calls were."""

    def refuse(self, calls: Sequence[str], error: int) -> None:
        """These calls fail from now on, with this error; 0: they do not come back."""
        with self._changed:
            self._refused = dict.fromkeys(calls, error)

    def heal(self) -> None:
        """All is well again, also for calls that did not come back."""
        with self._changed:
            self._refused = {}
            self._changed.notify_all()

    def serve(self, server: socket.socket) -> None:
        """Answer one process after another until told to stop."""
        server.settimeout(0.1)
        while not self._is_over:
            try:
                with server.accept()[0] as connection:
                    connection.settimeout(_LIMIT_SECONDS)
                    _, listeners, _, _ = socket.recv_fds(connection, 100, 1)
            except TimeoutError:
                continue
            for listener in listeners:
                threading.Thread(target=self._answer, args=(listener,), daemon=True).start()

    def stop(self) -> None:
        """Answer no more. The processes have ended."""
        self._is_over = True
        self.heal()

    def _answer(self, listener: int) -> None:
        with open(listener, "rb", buffering=0):
            poll = select.poll()
            poll.register(listener, select.POLLIN)
            while not self._is_over:
                ready = poll.poll(100)
                if not ready:
                    continue
                if ready[0][1] & select.POLLHUP:
                    return
                asked = bytearray(80)
                try:
                    fcntl.ioctl(listener, _RECEIVE, asked)
                    call, number = struct.unpack_from("QIIi", asked)[0::3]
                    fcntl.ioctl(listener, _SEND, self._verdict(call, number))
                except OSError as error:
                    # Whoever asked was killed in the meantime.
                    if error.errno not in (errno.ENOENT, errno.EINTR):
                        raise

    def _verdict(self, call: int, number: int) -> bytes:
        name = self._names[number]
        with self._changed:
            self._changed.wait_for(lambda: self._refused.get(name) != 0, timeout=_LIMIT_SECONDS)
            error = self._refused.get(name)
            self.refused += bool(error)
        if error:
            return struct.pack("QqiI", call, 0, -error, 0)
        return struct.pack("QqiI", call, 0, 0, _CONTINUE)


@asynccontextmanager
async def faulty_disk(home: Path) -> AsyncIterator[Disk]:
    """A disk for processes that are started in the block."""
    disk = Disk(home / "disk.sock")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(home / "disk.sock"))
        server.listen()
        thread = threading.Thread(target=disk.serve, args=(server,))
        thread.start()
        try:
            yield disk
        finally:
            disk.stop()
            thread.join(_LIMIT_SECONDS)
