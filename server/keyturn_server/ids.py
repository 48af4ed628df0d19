"""Ids: UUIDs of version 7 (RFC 9562, section 5.7), which sort by time."""

from __future__ import annotations

import os
import time
from uuid import UUID

_RANDOM_BITS = (1 << 74) - 1


def new_id() -> UUID:
    """A new UUIDv7: 48 bits of Unix time in milliseconds, then 74 random bits."""
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10), "big") & _RANDOM_BITS
    high, low = random >> 62, random & ((1 << 62) - 1)
    return UUID(int=(milliseconds << 80) | (0x7 << 76) | (high << 64) | (0b10 << 62) | low)
