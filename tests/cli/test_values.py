"""How values are written on the command line, and how answers are printed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import routing_service_pb2 as pb
from keyturn_server.cli.exit_codes import EPILOGUE, Ended, ExitCode
from keyturn_server.cli.printing import dollars, fields, moment, phrase, printable, seconds, table, word
from keyturn_server.cli.reports import window
from keyturn_server.cli.values import day_of, micros_of, positive_span_of, span_of, switches_of, whole_of


@pytest.mark.parametrize(
    ("text", "micros"),
    [
        ("0", 0),
        ("5", 5_000_000),
        ("0.25", 250_000),
        ("0.000001", 1),
        ("007.10", 7_100_000),
        ("1000000", 1_000_000_000_000),
        ("999999.999999", 999_999_999_999),
        ("1000000000", 1_000_000_000_000_000),
    ],
)
def test_dollars_are_read_exactly(text: str, micros: int) -> None:
    assert micros_of(text) == micros


NO_DOLLARS = (
    *("", " ", "-1", "+1", "1e3", "1E3", "NaN", "nan", "inf", "Infinity", "0x10", "1_000", "1,000", "$5"),
    *("0.0000001", "1.", ".5", "5 ", "٣", "1.2.3", "five", "5\n", "1000000000.01", "9" * 21, "9" * 5000),
)


@pytest.mark.parametrize("text", NO_DOLLARS)
def test_what_is_no_plain_decimal_is_no_money(text: str) -> None:
    with pytest.raises(ValueError, match="dollars"):
        micros_of(text)


@pytest.mark.parametrize(
    ("micros", "shown"),
    [
        (0, "$0.00"),
        (1, "$0.000001"),
        (-1, "-$0.000001"),
        (1_234_500_000, "$1,234.50"),
        (-250_000, "-$0.25"),
        (123_450, "$0.12345"),
        (9_223_372_036_854_775_807, "$9,223,372,036,854.775807"),
    ],
)
def test_money_is_shown_exactly(micros: int, shown: str) -> None:
    assert dollars(micros) == shown


@pytest.mark.parametrize("micros", [0, 1, 10, 999_999, 1_000_000, 123_456_789, 1_000_000_000_000])
def test_money_that_was_shown_can_be_typed_again(micros: int) -> None:
    assert micros_of(dollars(micros).removeprefix("$").replace(",", "")) == micros


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("10", timedelta(seconds=10)),
        ("0.5", timedelta(milliseconds=500)),
        ("90s", timedelta(seconds=90)),
        ("5m", timedelta(minutes=5)),
        ("12h", timedelta(hours=12)),
        ("7d", timedelta(days=7)),
        ("1h30m", timedelta(minutes=90)),
        ("1.5h", timedelta(minutes=90)),
        ("0s", timedelta()),
    ],
)
def test_spans_are_read_with_their_units(text: str, span: timedelta) -> None:
    assert span_of(text) == span


READERS: dict[str, tuple[Callable[[str], Any], tuple[str, ...]]] = {
    "span": (span_of, ("", "s", "-5s", "5w", "5 s", "1e3", "nan", "5s5", "9" * 7, "1s" * 30)),
    "span above zero": (positive_span_of, ("0", "0.0s", "x")),
    "whole number": (whole_of(1, 100), ("", "0", "101", "1.5", "1e1", "0x1", "١", "-1", "9" * 30, " 5")),
    "day": (day_of, ("", "2026-13-01", "2026-02-30", "01/02/2026", "2026-01-31T00:00", "today")),
    "flag": (lambda text: switches_of(text.split()), ("a", "a=", "=on", "a=maybe", "a=1", "a=on a=off")),
}


@pytest.mark.parametrize(
    ("kind", "text"), [(kind, text) for kind, (_, texts) in READERS.items() for text in texts]
)
def test_what_cannot_be_read_is_refused_and_not_quoted(kind: str, text: str) -> None:
    read, _ = READERS[kind]
    with pytest.raises(ValueError, match=r"^(write|each) .+\.$") as caught:
        read(text)
    assert len(text) < 4 or text not in str(caught.value)


def test_whole_numbers_days_and_flags_are_read() -> None:
    assert [whole_of(-5, 5)(text) for text in ("-5", "0", "05")] == [-5, 0, 5]
    assert day_of("2026-01-31") == date(2026, 1, 31)
    assert switches_of(["a=on", "b=OFF", "c=true", "d=false"]) == {
        "a": True,
        "b": False,
        "c": True,
        "d": False,
    }


NOW = datetime(2026, 3, 10, 15, 30, tzinfo=UTC)


def test_a_reports_window_is_the_last_days_or_whole_days_in_utc_both_included() -> None:
    def day(month: int, number: int) -> datetime:
        return datetime(2026, month, number, tzinfo=UTC)

    assert window(None, None, None, now=NOW) == (NOW - timedelta(days=30), NOW)
    assert window(1, None, None, now=NOW) == (NOW - timedelta(days=1), NOW)
    assert window(None, date(2026, 1, 1), date(2026, 1, 31), now=NOW) == (day(1, 1), day(2, 1))
    assert window(None, date(2026, 3, 1), None, now=NOW) == (day(3, 1), NOW)
    assert window(None, date(2026, 3, 10), date(2026, 3, 10), now=NOW) == (day(3, 10), NOW)


@pytest.mark.parametrize(
    ("days", "start", "end"),
    [
        (3, date(2026, 1, 1), None),
        (3, None, date(2026, 1, 1)),
        (367, None, None),
        (None, None, date(2026, 1, 1)),
        (None, date(2026, 1, 2), date(2026, 1, 1)),
        (None, date(2026, 3, 11), None),
    ],
)
def test_a_window_that_cannot_be_is_wrong_usage(
    days: int | None, start: date | None, end: date | None
) -> None:
    with pytest.raises(Ended) as caught:
        window(days, start, end, now=NOW)
    assert caught.value.code is ExitCode.USAGE


def test_times_and_spans_are_shown_with_their_units_and_nothing_when_not_set() -> None:
    time = Timestamp()
    assert moment(time) == ""
    time.FromDatetime(NOW)
    assert moment(time) == "2026-03-10 15:30:00 UTC"
    assert seconds(Duration()) == ""
    assert seconds(Duration(seconds=100)) == "100 s"
    assert seconds(Duration(seconds=1, nanos=500_000_000)) == "1.5 s"


def test_enums_are_shown_without_their_types_prefix_and_unknown_ones_as_numbers() -> None:
    assert word(policy.DenialReason, policy.DENIAL_REASON_RATE_LIMITED) == "RATE_LIMITED"
    assert word(pb.CostSource, pb.COST_SOURCE_PRICED) == "PRICED"
    assert phrase(policy.KeyState, policy.KEY_STATE_COOLING_DOWN) == "cooling down"
    assert word(policy.Mode, 99) == "99"


def test_a_table_away_from_a_terminal_is_as_wide_as_it_needs_to_be() -> None:
    long = "word " * 100
    text = table(("id", "n", "words"), [("a" * 200, "7", long), ("b", "1,000", "x")], numbers={"n"})
    assert text.splitlines() == [
        f"{'ID':<200}      N  WORDS",
        f"{'a' * 200}      7  {long.rstrip()}",
        f"{'b':<200}  1,000  x",
    ]


def test_an_empty_table_is_a_sentence() -> None:
    assert table(("id",), [], empty="None.") == "None."


def test_what_is_printed_steers_no_terminal_and_breaks_no_line() -> None:
    evil = "a\x1b[31m\nb\u202ec\x9b\ud800"
    assert printable(evil) == "a\\x1b[31m\\nb\\u202ec\\x9b\\ud800"
    assert printable("é 漢字 🙂 [red]x[/red]") == "é 漢字 🙂 [red]x[/red]"
    assert printable(evil) in table(("x",), [(evil,)])
    assert fields(("Name", evil), ("Empty", ""), ("N", "1")) == f"Name  {printable(evil)}\nN     1"


def test_the_table_of_exit_codes_is_in_every_help() -> None:
    for code in ExitCode:
        assert f" {code.value} " in EPILOGUE
