"""How commands end: the one table of exit codes, and what ends a command without its answer."""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class ExitCode(IntEnum):
    """What a command's exit code means."""

    DONE = 0
    FAULT = 1
    USAGE = 2
    REFUSED = 3
    NOT_FOUND = 4
    NOT_ALLOWED = 5
    UNAVAILABLE = 6
    INTERRUPTED = 130


MEANINGS: Final = {
    ExitCode.DONE: "done",
    ExitCode.FAULT: "something went wrong (stderr says what, with the reason in brackets)",
    ExitCode.USAGE: "wrong usage, or a value that the sidecar refuses",
    ExitCode.REFUSED: (
        "the policy or the state of things says no, and nothing was changed; or a provider refuses the key"
    ),
    ExitCode.NOT_FOUND: "no such user, key or hold",
    ExitCode.NOT_ALLOWED: "the sidecar does not know the caller, or its role may not do this",
    ExitCode.UNAVAILABLE: "the sidecar, its database or a provider is out of reach or busy (try again)",
    ExitCode.INTERRUPTED: "interrupted",
}

EPILOGUE: Final = "Exit codes: " + "; ".join(f"{code.value} {text}" for code, text in MEANINGS.items()) + "."
"""The table as every command's help shows it."""


class Ended(Exception):  # noqa: N818 - the end of a command, not always an error
    """A command ends without its answer: with which code, and what stderr says."""

    def __init__(self, code: ExitCode, message: str, *next_steps: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.next_steps = next_steps


def wrong_usage(message: str) -> Ended:
    """The end of a command that was given something that cannot be; `message` quotes no secret."""
    return Ended(ExitCode.USAGE, message)
