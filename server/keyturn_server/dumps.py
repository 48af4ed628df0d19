"""Keeps this process's memory to itself: no core dump, and no look from processes of the same user.

The standard library alone: it runs before anything else is imported.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from typing import Final

_PR_GET_DUMPABLE: Final = 3
_PR_SET_DUMPABLE: Final = 4


def forbid_dumps() -> list[str]:
    """Have the kernel write no core dump of this process, and let nobody trace it, or read its memory or
    environment, but those who may do so with every process (CAP_SYS_PTRACE, CAP_PERFMON).

    A program that this process starts can be read again; it leaves no core dump either. What could not
    be done comes back, as sentences.
    """
    problems = []
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (OSError, ValueError) as error:
        problems.append(f"core dumps cannot be switched off: {error}")
    if sys.platform == "linux":
        try:
            prctl = ctypes.CDLL(None).prctl
            prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
            is_dumpable = prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0)
        except (OSError, AttributeError) as error:
            problems.append(f"this process's memory cannot be closed to others: {error}")
        else:
            if is_dumpable:
                problems.append("this process's memory cannot be closed to others: the kernel refuses")
    else:
        problems.append("this process's memory cannot be closed to others: that takes Linux")
    return problems
