"""How values are written on the command line: money, spans, whole numbers, flags, days.

No message quotes what was given: what stands in the wrong place may be a secret.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Final, TypeAlias

from cyclopts import Parameter, Token

_MICROS: Final = 1_000_000
_MOST_DOLLARS: Final = 1_000_000_000
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SWITCH: Final = {"on": True, "true": True, "off": False, "false": False}


def micros_of(text: str) -> int:
    """Dollars as an exact decimal, e.g. `5` or `0.25`, in micros. Raises `ValueError`."""
    if re.fullmatch(r"[0-9]+(\.[0-9]{1,6})?", text) is None:
        raise ValueError("write dollars as a plain decimal like 5 or 0.25, with at most 6 decimals.")
    if len(text) > 20 or (dollars := Decimal(text)) > _MOST_DOLLARS:
        raise ValueError(f"at most {_MOST_DOLLARS:,} dollars.")
    return int(dollars * _MICROS)


def span_of(text: str) -> timedelta:
    """A span like `90s`, `5m`, `12h`, `7d` or `1h30m`; a bare number is seconds. Raises `ValueError`."""
    if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", text):
        text += "s"
    if re.fullmatch(r"([0-9]{1,6}(\.[0-9]{1,3})?[smhd])+", text) is None or len(text) > 40:
        raise ValueError("write a span like 90s, 5m, 12h or 7d.")
    parts = re.findall(r"([0-9.]+)([smhd])", text)
    return timedelta(seconds=float(sum(Decimal(number) * _UNITS[unit] for number, unit in parts)))


def positive_span_of(text: str) -> timedelta:
    """A span above zero. Raises `ValueError`."""
    if not (span := span_of(text)):
        raise ValueError("write a span above zero.")
    return span


def whole_of(least: int, most: int) -> Callable[[str], int]:
    """Reads whole numbers in a range."""

    def whole(text: str) -> int:
        if re.fullmatch(r"-?[0-9]{1,19}", text) is None or not least <= (number := int(text)) <= most:
            raise ValueError(f"write a whole number from {least} to {most}.")
        return number

    return whole


def day_of(text: str) -> date:
    """A day like `2026-01-31`. Raises `ValueError`."""
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).date()
    except ValueError:
        raise ValueError("write a day like 2026-01-31.") from None


def switches_of(settings: Sequence[str]) -> dict[str, bool]:
    """`KEY=on` and `KEY=off` as values by key. Raises `ValueError`."""
    flags: dict[str, bool] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if not key or (switched := _SWITCH.get(value.lower())) is None:
            raise ValueError("write a flag as KEY=on or KEY=off.")
        if key in flags:
            raise ValueError("each flag may be given once.")
        flags[key] = switched
    return flags


def read_by(read: Callable[[str], Any]) -> Parameter:
    """A parameter whose value `read` makes of what is written."""

    def convert(_: Any, tokens: Sequence[Token]) -> Any:
        return read(tokens[0].value)

    return Parameter(converter=convert)


Dollars: TypeAlias = Annotated[int, read_by(micros_of)]
"""Written in dollars, read as micros."""
Span: TypeAlias = Annotated[timedelta, read_by(span_of)]
PositiveSpan: TypeAlias = Annotated[timedelta, read_by(positive_span_of)]
Day: TypeAlias = Annotated[date, read_by(day_of)]
Count: TypeAlias = Annotated[int, read_by(whole_of(1, 1_000_000_000))]
Tokens: TypeAlias = Annotated[int, read_by(whole_of(0, 1_000_000_000))]
Int32: TypeAlias = Annotated[int, read_by(whole_of(-(2**31), 2**31 - 1))]
