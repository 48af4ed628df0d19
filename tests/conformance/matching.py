"""Comparing what a client answered with what a scenario expects, and filling in what it refers to.

An expectation is JSON. An object names the fields that matter, a list all its items in order; anything else
is compared as it is, and null also matches what is not there. Objects with one key that begins with `$` are
questions: see `_QUESTIONS`. Text that begins with `$` refers to an earlier answer: `$first.ticket.ticket`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Answers = Mapping[str, Any]
"""What was kept of earlier answers, by name."""


class Mismatch(AssertionError):  # noqa: N818 - what is found, not what went wrong
    """An answer is not as expected; the message says where, what and why."""


def filled(value: Any, answers: Answers) -> Any:
    """`value` with what it refers to in its place, and `{"$repeat": [text, times]}` carried out."""
    match value:
        case str() if re.match(r"\$[a-z]", value):
            return _referred(value, answers)
        case {"$repeat": [text, times], **rest} if not rest:
            return text * times if isinstance(text, str) else [filled(text, answers)] * times
        case {"$number": number, **rest} if not rest:
            return number
        case dict():
            return {key: filled(item, answers) for key, item in value.items()}
        case list():
            return [filled(item, answers) for item in value]
    return value


def check(expected: Any, actual: Any, answers: Answers, where: str = "answer") -> None:
    """Raises `Mismatch` unless `actual` is as `expected`."""
    match expected:
        case dict() if (name := _question(expected)) is not None:
            _QUESTIONS[name](expected[name], actual, answers, where)
        case dict():
            _require(isinstance(actual, dict), where, expected, actual)
            for key, item in expected.items():
                check(item, actual.get(key), answers, f"{where}.{key}")
        case list():
            _require(isinstance(actual, list) and len(actual) == len(expected), where, expected, actual)
            for index, item in enumerate(expected):
                check(item, actual[index], answers, f"{where}[{index}]")
        case _:
            wanted = filled(expected, answers)
            # Equal numbers of different kinds are no mistake; a flag for a number is.
            alike = isinstance(wanted, bool) == isinstance(actual, bool)
            _require(alike and actual == wanted, where, wanted, actual)


def _question(expected: dict[str, Any]) -> str | None:
    """The question that an expectation is, if it is one."""
    return next((name for name in expected if len(expected) == 1 and name in _QUESTIONS), None)


def _require(holds: bool, where: str, expected: Any, actual: Any) -> None:
    if not holds:
        raise Mismatch(f"{where}: expected {expected!r}, got {actual!r}")


def _referred(reference: str, answers: Answers) -> Any:
    name, *path = reference[1:].split(".")
    value = answers[name]
    for part in path:
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def _any(expected: Any, actual: Any, answers: Answers, where: str) -> None:
    """`{"$any": true}`: something is there, and is not empty."""
    _require(bool(actual) is expected, where, "something" if expected else "nothing", actual)


def _matches(pattern: str, actual: Any, answers: Answers, where: str) -> None:
    """`{"$matches": pattern}`: text in which the regular expression is found."""
    _require(isinstance(actual, str) and re.search(pattern, actual) is not None, where, pattern, actual)


def _not(expected: Any, actual: Any, answers: Answers, where: str) -> None:
    """`{"$not": expectation}`."""
    try:
        check(expected, actual, answers, where)
    except Mismatch:
        return
    raise Mismatch(f"{where}: expected anything but {expected!r}, got {actual!r}")


def _between(limits: list[int], actual: Any, answers: Answers, where: str) -> None:
    """`{"$between": [least, most]}`: a number, the limits included."""
    least, most = limits
    _require(isinstance(actual, int | float) and least <= actual <= most, where, limits, actual)


def _one_of(choices: list[Any], actual: Any, answers: Answers, where: str) -> None:
    """`{"$one_of": [expectation, …]}`."""
    for each in choices:
        try:
            return check(each, actual, answers, where)
        except Mismatch:
            continue
    raise Mismatch(f"{where}: expected one of {choices!r}, got {actual!r}")


def _all(expected: Any, actual: Any, answers: Answers, where: str) -> None:
    """`{"$all": expectation}`: a list, every item of which is so."""
    _require(isinstance(actual, list) and bool(actual), where, "a list", actual)
    for index, item in enumerate(actual):
        check(expected, item, answers, f"{where}[{index}]")


def _tally(expected: list[list[Any]], actual: Any, answers: Answers, where: str) -> None:
    """`{"$tally": [[expectation, count], …]}`: a list of so many items that are so, and no others."""
    _require(isinstance(actual, list), where, "a list", actual)
    rest = list(actual)
    for wanted, count in expected:
        left = [item for item in rest if not _holds(wanted, item, answers)]
        found = len(rest) - len(left)
        _require(found == count, f"{where}: how many {wanted!r}", count, found)
        rest = left
    _require(not rest, where, "nothing else", rest)


def _holds(expected: Any, actual: Any, answers: Answers) -> bool:
    try:
        check(expected, actual, answers)
    except Mismatch:
        return False
    return True


_QUESTIONS: Mapping[str, Callable[[Any, Any, Answers, str], None]] = {
    "$any": _any,
    "$matches": _matches,
    "$not": _not,
    "$between": _between,
    "$one_of": _one_of,
    "$all": _all,
    "$tally": _tally,
}
