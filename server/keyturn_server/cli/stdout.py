"""Writing to stdout, which may be closed, full or a pipe that nobody reads any more."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from keyturn_server.cli.exit_codes import Ended, ExitCode


def fill_closed() -> None:
    """Puts /dev/null where stdin, stdout or stderr is closed: libuv aborts when it is given such a number
    for a file of its own. `sys.stdout` stays None."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def write(text: str) -> None:
    """Prints an answer. Where the reader has gone (`keyturn … | head`), ends like any program in a pipe.

    Raises `Ended` where stdout takes nothing.
    """
    if sys.stdout is None:  # closed before we began
        raise _untold("stdout is closed")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    encoding = sys.stdout.encoding
    with _told():
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def flush() -> None:
    """Sends off what was printed. Raises `Ended` where stdout does not take it."""
    if sys.stdout is not None:
        with _told():
            sys.stdout.flush()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # What is still in the buffer would fail again, with a trace, as the interpreter ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        raise _untold(os.strerror(error.errno) if error.errno else "stdout takes nothing") from None


def _untold(why: str) -> Ended:
    return Ended(ExitCode.FAULT, f"It was done, but the answer cannot be printed: {why}.")
