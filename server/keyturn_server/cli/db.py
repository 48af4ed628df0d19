"""`keyturn db`: the database."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import uvloop
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from keyturn_server.app import database_url
from keyturn_server.cli.database import existing_database_url
from keyturn_server.cli.stdout import write
from keyturn_server.keys.keyring import Keyring
from keyturn_server.logs import configure_logs, get_log
from keyturn_server.settings import Settings, read_settings
from keyturn_server.store.comparison import Severity
from keyturn_server.store.fitness import Checkup, check_database
from keyturn_server.store.migrate import migrate as apply_migrations

app = cyclopts.App(name="db", help="Look after the database.")

_STYLES = {Severity.PROBLEM: "red", Severity.WARNING: "yellow", Severity.OK: "green"}
_LIMIT = timedelta(minutes=1)
_DEEP_LIMIT = timedelta(minutes=30)


@app.command
def migrate(*, embedded: str | None = None) -> None:
    """Bring the database up to date. Safe to run at any time, by any number at once; `serve` does it too.

    Parameters
    ----------
    embedded
        The directory of an embedded PostgreSQL; without it, KEYTURN_DATABASE_URL. [KEYTURN_EMBEDDED]
    """
    settings = read_settings(embedded=embedded)
    configure_logs("warning")
    uvloop.run(_migrate(settings))


async def _migrate(settings: Settings) -> None:
    async with AsyncExitStack() as stack:
        applied = await apply_migrations(await database_url(settings, stack, get_log()))
    for migration in applied:
        write(f"applied {migration.version:04d} {migration.name}")
    if not applied:
        write("up to date")


@app.command
def check(
    *,
    embedded: Path | None = None,
    deep: Annotated[bool, Parameter(negative="")] = False,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Say whether the database is fit for a sidecar: what is missing, what differs, what is in the way.

    For a new database, for one that a product has already, and for one of which somebody is in doubt.
    Writes nothing. Exit code 0: fit, perhaps with warnings; 1: not fit, or not to be
    looked at, and it says why; 6: the database cannot be reached.

    Parameters
    ----------
    embedded
        The directory of an embedded PostgreSQL, whether its sidecar runs or not; without it,
        KEYTURN_DATABASE_URL. [KEYTURN_EMBEDDED]
    deep
        Add up all the money as well: reads every row of the books.
    as_json
        Print the findings as JSON.
    """
    settings = read_settings(embedded=embedded)
    configure_logs("warning")
    checkup = uvloop.run(_check(settings, deep=deep))
    if as_json:
        write(json.dumps({"is_fit": checkup.is_fit, **_as_json(checkup)}, indent=2))
    else:
        write(_in_words(checkup))
    if not checkup.is_fit:
        raise SystemExit(1)


async def _check(settings: Settings, *, deep: bool) -> Checkup:
    keyring = Keyring.from_settings(
        settings.encryption_key.get_secret_value() if settings.encryption_key else None, settings.retired_keys
    )
    async with AsyncExitStack() as stack:
        return await check_database(
            await existing_database_url(settings, stack, get_log()),
            connections=settings.database_connections,
            keyring=keyring,
            deep=deep,
            connect_timeout=settings.connect_timeout,
            statement_timeout=_DEEP_LIMIT if deep else _LIMIT,
        )


def _as_json(checkup: Checkup) -> dict[str, Any]:
    return {**asdict(checkup), "findings": [asdict(one) for one in checkup.findings]}


def _in_words(checkup: Checkup) -> str:
    console = Console(highlight=False)
    head = Text(
        f"{checkup.server}, database {checkup.database}, schema {checkup.schema or '(none)'}, "
        f"as {checkup.role}"
    )
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    table.add_column(overflow="fold", ratio=3)
    for severity in Severity:
        for one in checkup.findings:
            if one.severity is severity:
                words = Text(one.message)
                if one.remedy:
                    words.append(f"\n→ {one.remedy}", style="dim")
                table.add_row(Text(severity.value, style=_STYLES[severity]), Text(one.subject), words)
    counts = {severity: sum(one.severity is severity for one in checkup.findings) for severity in Severity}
    told = f"{_times(counts[Severity.PROBLEM], 'problem')}, {_times(counts[Severity.WARNING], 'warning')}"
    with console.capture() as captured:
        console.print(head, soft_wrap=True)
        console.print(table)
        console.print(f"{'Fit' if checkup.is_fit else 'Not fit'}: {told}.", style="bold")
    return captured.get().removesuffix("\n")


def _times(count: int, what: str) -> str:
    return f"1 {what}" if count == 1 else f"{count or 'no'} {what}s"
