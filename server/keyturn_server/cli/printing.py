"""What commands print. Answers go to stdout: tables for people, one JSON document for programs; all
else goes to stderr.

People see dollars and times in UTC. What a table cannot show in full on a narrow terminal wraps where it
is prose; ids are never cut and never wrapped. Away from a terminal there is no wrapping and no colour.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from keyturn_server.cli.stdout import write

Answer = TypeVar("Answer", bound=Message)

_UNLIMITED: Final = 100_000
_MOST_PROSE: Final = 60
_MICROS: Final = 1_000_000


def show(answer: Answer, for_people: Callable[[Answer], str], *, as_json: bool) -> None:
    """Prints an answer: as `for_people` renders it, or in protobuf's JSON mapping, all fields included."""
    write(MessageToJson(answer, always_print_fields_with_no_presence=True) if as_json else for_people(answer))


def note(*lines: str) -> None:
    """Says on stderr what is no answer."""
    for index, line in enumerate(lines):
        print(f"  {printable(line)}" if index else f"keyturn: {printable(line)}", file=sys.stderr)


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: Collection[str] = (),
    prose: Collection[str] = (),
    empty: str = "",
) -> str:
    """Aligned columns; without any row, the sentence `empty`. `numbers` are aligned right; only the
    columns in `prose` wrap."""
    cells = [[printable(cell) for cell in row] for row in rows]
    if not cells and empty:
        return empty
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, heading in enumerate(headings):
        longest = max((Text(row[index]).cell_len for row in cells), default=0)
        wraps = heading in prose
        grid.add_column(
            heading.upper(),
            justify="right" if heading in numbers else "left",
            no_wrap=not wraps,
            min_width=min(longest, _MOST_PROSE // 3) if wraps else longest,
            overflow="fold",
        )
    for row in cells:
        grid.add_row(*(Text(cell) for cell in row))
    return _rendered(grid)


def _rendered(grid: Table) -> str:
    """The table as wide as the terminal, or wider where what must not wrap needs it."""
    terminal = Console(highlight=False, markup=False, emoji=False)
    if terminal.no_color:  # NO_COLOR: nothing bold either
        terminal = Console(highlight=False, markup=False, emoji=False, color_system=None)
    if terminal.is_terminal:
        needed = Measurement.get(terminal, terminal.options.update(width=_UNLIMITED), grid).minimum
        terminal.width = max(terminal.width, needed)
    else:
        terminal.width = _UNLIMITED
    with terminal.capture() as captured:
        terminal.print(grid)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def fields(*pairs: tuple[str, str]) -> str:
    """Names and values under each other; those without a value are left out."""
    given = [(name, value) for name, value in pairs if value]
    width = max((len(name) for name, _ in given), default=0)
    return "\n".join(f"{name:<{width}}  {printable(value)}" for name, value in given)


def printable(text: str) -> str:
    """`text` with what would steer the terminal, or break the line, written out: it may be anybody's."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text
    )


def dollars(micros: int) -> str:
    """Exact, with 2 to 6 decimals: `-$1,234.50`, `$0.000125`."""
    text = f"{Decimal(abs(micros)) / _MICROS:,.6f}"
    return f"{'-' if micros < 0 else ''}${text[:-4]}{text[-4:].rstrip('0')}"


def moment(time: Timestamp | datetime) -> str:
    """To the second, in UTC; empty for a timestamp that was not set."""
    if isinstance(time, Timestamp):
        if not time.seconds:
            return ""
        time = time.ToDatetime(tzinfo=UTC)
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"


def seconds(span: Duration) -> str:
    """A span in seconds; empty for one that was not set."""
    total = Decimal(span.seconds) + Decimal(span.nanos) / 1_000_000_000
    return f"{total.normalize():f} s" if total else ""


def counted(count: int, what: str) -> str:
    """`1 user`, `1,200 users`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def yes_no(value: bool) -> str:
    return "yes" if value else "no"


def on_off(value: bool) -> str:
    return "on" if value else "off"


def word(enum: Any, number: int) -> str:
    """A generated enum's name for a number, without the type's prefix; a newer sidecar's number as such."""
    try:
        name = str(enum.Name(number))
    except ValueError:
        return str(number)
    prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.DESCRIPTOR.name).upper()
    return name.removeprefix(f"{prefix}_")


def phrase(enum: Any, number: int) -> str:
    """The same in lower case with spaces, e.g. `cooling down`."""
    return word(enum, number).lower().replace("_", " ")
