"""Ids: UUIDs of version 7 (RFC 9562, section 5.7), which sort by time."""

from __future__ import annotations

import os
import time
from uuid import UUID

_RANDOM_BITS = (1 << 74) - 1
_RANDOM_BYTES = 10
_IDS_A_FETCH = 256

_randomness: list[bytes] = []
"""For ids to come, fetched together: a system call for each would cost more than the rest of it."""
os.register_at_fork(after_in_child=_randomness.clear)


def new_id() -> UUID:
    """A new UUIDv7: 48 bits of Unix time in milliseconds, then 74 random bits."""
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(_next_random(), "big") & _RANDOM_BITS
    high, low = random >> 62, random & ((1 << 62) - 1)
    return UUID(int=(milliseconds << 80) | (0x7 << 76) | (high << 64) | (0b10 << 62) | low)


def _next_random() -> bytes:
    try:
        return _randomness.pop()
    except IndexError:  # also where another thread was faster
        fetched = os.urandom(_RANDOM_BYTES * _IDS_A_FETCH)
        _randomness.extend(
            fetched[start : start + _RANDOM_BYTES]
            for start in range(_RANDOM_BYTES, len(fetched), _RANDOM_BYTES)
        )
        return fetched[:_RANDOM_BYTES]
