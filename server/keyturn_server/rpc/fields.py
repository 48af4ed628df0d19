"""The limits that fields of different methods share, and the collector of what breaks them."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from google.protobuf import duration_pb2, timestamp_pb2

from keyturn_server.errors import InvalidFields

MAX_ID: Final = 128
MAX_PROVIDER: Final = 64
MAX_SPAN: Final = timedelta(hours=24)

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_YEAR_10000: Final = 253_402_300_800

CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Fields:
    """Collects what is wrong with a message, so that the caller hears all of it."""

    __slots__ = ("violations",)

    def __init__(self) -> None:
        self.violations: list[tuple[str, str]] = []

    def text(self, field: str, value: str, most: int, *, required: bool = False) -> str:
        """A text of at most `most` characters, without control characters."""
        if len(value) > most:
            self.violations.append((field, f"At most {most} characters; this has {len(value)}."))
        elif not value:
            if required:
                self.violations.append((field, "Required."))
        elif not value.isprintable() and CONTROL.search(value):
            self.violations.append((field, "Control characters, NUL among them, are not allowed."))
        return value

    def number(self, field: str, value: int, most: int, *, least: int = 0) -> int:
        """A whole number from `least` to `most`."""
        if not least <= value <= most:
            self.violations.append((field, f"From {least} to {most}; this is {value}."))
            return least
        return value

    def span(
        self,
        field: str,
        value: duration_pb2.Duration,
        *,
        least: timedelta = timedelta(0),
        most: timedelta = MAX_SPAN,
    ) -> timedelta | None:
        """A span of time from `least` to `most`; None when it is another, which `check` tells of."""
        # Not ToTimedelta: a Duration holds spans that a timedelta does not.
        if -(10**9) < value.nanos < 10**9 and abs(value.seconds) <= 10**9:
            span = timedelta(seconds=value.seconds, microseconds=value.nanos // 1000)
            if least <= span <= most:
                return span
        self.violations.append(
            # Twelve digits: the default of six would write a year as 3.15e+07.
            (field, f"From {least.total_seconds():.12g} to {most.total_seconds():.12g} seconds.")
        )
        return None

    def moment(self, field: str, value: timestamp_pb2.Timestamp) -> datetime | None:
        """A time from 1970 to 9999, to the microsecond; None when it is another, which `check` tells of."""
        # Not ToDatetime, for the same reason.
        if 0 <= value.seconds < _YEAR_10000 and 0 <= value.nanos < 10**9:
            return _EPOCH + timedelta(seconds=value.seconds, microseconds=value.nanos // 1000)
        self.violations.append((field, "A time from 1970-01-01 to 9999-12-31."))
        return None

    def check(self) -> None:
        """Raises `InvalidFields` with everything that was found."""
        if self.violations:
            raise InvalidFields(*self.violations)
