"""`keyturn spool`: the records that wait on the sidecar's own disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import cyclopts
from cyclopts import Parameter

from keyturn_server.cli.exit_codes import wrong_usage
from keyturn_server.cli.printing import counted, dollars, fields, moment, table
from keyturn_server.cli.stdout import write
from keyturn_server.cli.values import Count
from keyturn_server.ledger import KeyUse, Settlement
from keyturn_server.settings import read_settings
from keyturn_server.store.spool import Figures, Kept, SpoolError, look_in, together, workers_in
from keyturn_server.store.spool import drop as drop_from
from keyturn_server.store.spooling import KEY_USE, SETTLEMENT, decode

app = cyclopts.App(name="spool", help="Look at the records that wait on a sidecar's own disk.")

_CAUSES = {
    "conflict": "recorded before with other contents",
    "hold_not_found": "its hold is not in the database",
    "too_late": "its hold or handle expired too long ago",
    "foreign": "spooled for another database, or changed since",
    "unreadable": "made by another release",
    "bad_value": "the database does not take a value of it",
    "bad_reference": "it refers to a row that is gone",
}


@app.command
def show(
    *,
    spool: Path | None = None,
    embedded: Path | None = None,
    limit: Count = 50,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Show what is in a spool, whether its sidecar runs or not, and in those of its workers; what was
    set aside first.

    Parameters
    ----------
    spool
        The directory of the spool. [KEYTURN_SPOOL]
    embedded
        The directory of an embedded PostgreSQL, whose spool is in it unless --spool says otherwise.
        [KEYTURN_EMBEDDED]
    limit
        How many records at most.
    as_json
        Print figures and records as JSON.
    """
    seen = [look_in(directory, at_most=limit) for directory in _directories(spool, embedded)]
    figures = together([figures for figures, _ in seen])
    records = [one for _, records in seen for one in records]
    records = sorted(records, key=lambda one: (one.cause is None, one.taken_at))[:limit]
    write(json.dumps(_as_json(figures, records), indent=2) if as_json else _in_words(figures, records))


@app.command
def drop(
    *decisions: str,
    spool: Path | None = None,
    embedded: Path | None = None,
) -> None:
    """Delete records that were set aside, once somebody has looked after them; no others.

    Parameters
    ----------
    decisions
        The ids of their decisions, as `keyturn spool show` has them.
    spool
        The directory of the spool. [KEYTURN_SPOOL]
    embedded
        The directory of an embedded PostgreSQL, whose spool is in it unless --spool says otherwise.
        [KEYTURN_EMBEDDED]
    """
    try:
        ids = [UUID(one) for one in decisions]
    except ValueError:
        raise wrong_usage("A decision's id is a UUID, as `keyturn spool show` has it.") from None
    dropped = sum(drop_from(directory, ids) for directory in _directories(spool, embedded))
    write(f"Dropped {counted(dropped, 'record')}.")
    if dropped < len(set(ids)):
        raise SpoolError("The others are not there, or not set aside.")


def _directories(spool: Path | None, embedded: Path | None) -> list[Path]:
    """The spool's, and those of its workers."""
    directory = read_settings(spool=spool, embedded=embedded).spool_directory
    if directory is None:
        raise SpoolError(
            "Say where the spool is: --spool DIR (KEYTURN_SPOOL), or --embedded DIR (KEYTURN_EMBEDDED)."
        )
    return [directory, *workers_in(directory).values()]


def _record(kept: Kept) -> Settlement | KeyUse | None:
    try:
        return decode(kept.body)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _as_json(figures: Figures, records: list[Kept]) -> dict[str, Any]:
    return {
        "waiting": figures.waiting,
        "set_aside": figures.set_aside,
        "file_bytes": figures.file_bytes,
        "oldest": figures.oldest.isoformat() if figures.oldest else None,
        "records": [
            {
                "decision_id": str(one.id),
                "user_id": one.user_id,
                "taken_at": one.taken_at.isoformat(),
                "cause": one.cause,
                **_details(_record(one)),
            }
            for one in records
        ],
    }


def _details(record: Settlement | KeyUse | None) -> dict[str, Any]:
    if record is None:
        return {"kind": None, "outcome": None, "charge_micros": None}
    is_ticket = isinstance(record, Settlement)
    return {
        "kind": SETTLEMENT if is_ticket else KEY_USE,
        "outcome": record.report.outcome.value,
        "charge_micros": record.charge_micros if isinstance(record, Settlement) else None,
    }


def _in_words(figures: Figures, records: list[Kept]) -> str:
    head = fields(
        ("Waiting", counted(figures.waiting, "record")),
        ("Set aside", counted(figures.set_aside, "record")),
        ("Used", f"{figures.file_bytes:,} bytes"),
        ("Oldest", moment(figures.oldest) if figures.oldest else ""),
    )
    if not records:
        return head
    rows = []
    for one in records:
        details = _details(_record(one))
        charge = details["charge_micros"]
        rows.append(
            (
                str(one.id),
                one.user_id,
                moment(one.taken_at),
                (details["outcome"] or "?").lower().replace("_", " "),
                "own key" if charge is None else dollars(charge),
                "waiting" if one.cause is None else f"set aside: {_CAUSES.get(one.cause, one.cause)}",
            )
        )
    headings = ("decision", "user", "taken", "outcome", "charge", "state")
    return f"{head}\n\n{table(headings, rows, numbers={'charge'}, prose={'state'})}"
