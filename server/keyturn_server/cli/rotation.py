"""`keyturn keys rotate`: seal every stored key anew under ENCRYPTION_KEY."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import uvloop
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from keyturn_server.cli.database import existing_database_url
from keyturn_server.cli.stdout import write
from keyturn_server.errors import KeyturnFault, StoreUnavailable
from keyturn_server.keys.envelope import UnreadableCause
from keyturn_server.keys.keyring import Keyring
from keyturn_server.logs import configure_logs, get_log
from keyturn_server.rotation import Progress, Rotated, Rotation
from keyturn_server.settings import Settings, read_settings
from keyturn_server.store.database import open_database
from keyturn_server.store.migrate import require_migrated
from keyturn_server.store.rotation import SealedKeyRows

_STATEMENT_LIMIT = timedelta(minutes=2)  # counting a large table takes its time
_LOCK_LIMIT = timedelta(seconds=10)  # of a table, while somebody alters it: rows are not waited for
_MOST_SHOWN = 20
_LINE_SECONDS = 5

_REMEDIES = {
    UnreadableCause.UNKNOWN_KEY: "their master key is not set: add it to ENCRYPTION_KEYS_RETIRED",
    UnreadableCause.TAMPERED: "changed, moved from another row, or of a master key that is not set",
    UnreadableCause.MALFORMED: "no stored key: something else was written there",
}


class NoMasterKey(KeyturnFault):
    """There is no master key to rotate to."""

    def __init__(self) -> None:
        super().__init__(
            "ENCRYPTION_KEY is not set: set it to the new master key, "
            "and ENCRYPTION_KEYS_RETIRED to the old one."
        )


class Interrupted(StoreUnavailable):
    """The database went away in the middle."""

    def __init__(self, rewritten: int) -> None:
        KeyturnFault.__init__(
            self,
            f"The database cannot be reached. Keys sealed anew until then: {rewritten}. "
            "Run it again: it goes on with the rest.",
        )


def rotate(
    *,
    embedded: Path | None = None,
    batch: Annotated[int, Parameter(validator=Number(gte=1, lte=10_000))] = 200,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    force: Annotated[bool, Parameter(negative="")] = False,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Seal every stored key anew under ENCRYPTION_KEY; keys under ENCRYPTION_KEYS_RETIRED are opened.

    Sidecars go on serving. Restart all of them with both variables first: one that runs with another
    ENCRYPTION_KEY is refused. Interrupted, it goes on with the next run. Exit code 0: nothing is left
    under another master key; 1: something is, and it says what; 6: the database
    cannot be reached.

    Parameters
    ----------
    embedded
        The directory of an embedded PostgreSQL, whether its sidecar runs or not; without it,
        KEYTURN_DATABASE_URL. [KEYTURN_EMBEDDED]
    batch
        How many keys are sealed in one transaction.
    dry_run
        Open every key and say what would be done; write nothing.
    force
        Go on although sidecars run whose ENCRYPTION_KEY is another one.
    as_json
        Print the outcome as JSON.
    """
    settings = read_settings(embedded=embedded)
    configure_logs("warning")
    started = time.monotonic()
    rotated = uvloop.run(_rotate(settings, batch=batch, dry_run=dry_run, force=force))
    seconds = time.monotonic() - started
    if as_json:
        write(json.dumps(_as_json(rotated, dry_run=dry_run, seconds=seconds), indent=2))
    else:
        write("\n".join(_in_words(rotated, dry_run=dry_run, seconds=seconds)))
    if not dry_run and (rotated.left or rotated.behind or not rotated.is_done):
        raise SystemExit(1)


async def _rotate(settings: Settings, *, batch: int, dry_run: bool, force: bool) -> Rotated:
    keyring = Keyring.from_settings(
        settings.encryption_key.get_secret_value() if settings.encryption_key else None, settings.retired_keys
    )
    if keyring is None:
        raise NoMasterKey
    rewritten = 0
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(
            open_database(
                await existing_database_url(settings, stack, get_log()),
                connections=1,
                connect_timeout=settings.connect_timeout,
                statement_timeout=_STATEMENT_LIMIT,
                lock_timeout=_LOCK_LIMIT,
            )
        )
        await require_migrated(database)
        show = stack.enter_context(_progress())

        def progressed(progress: Progress) -> None:
            nonlocal rewritten
            rewritten = progress.rewritten
            show(progress)

        rotation = Rotation(
            SealedKeyRows(database), keyring, batch=batch, force=force, on_progress=progressed
        )
        try:
            return await (rotation.rehearse() if dry_run else rotation.run())
        except StoreUnavailable:
            raise Interrupted(rewritten) from None


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """Shows progress on stderr: a bar on a terminal, else a line every few seconds."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    columns = (
        TextColumn("Sealing anew"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    started = time.monotonic()
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, rate="")

        def show(progress: Progress) -> None:
            bar.update(
                task,
                total=progress.total,
                completed=min(_gone_over(progress), progress.total),
                rate=_rate(progress, time.monotonic() - started),
            )

        yield show


def _lines() -> Callable[[Progress], None]:
    started = time.monotonic()
    next_line = started + _LINE_SECONDS

    def show(progress: Progress) -> None:
        nonlocal next_line
        if (now := time.monotonic()) >= next_line:
            next_line = now + _LINE_SECONDS
            rate = _rate(progress, now - started)
            print(f"{_gone_over(progress)} of {progress.total} keys, {rate}", file=sys.stderr, flush=True)

    return show


def _gone_over(progress: Progress) -> int:
    return progress.rewritten + progress.unreadable


def _rate(progress: Progress, seconds: float) -> str:
    return f"{_gone_over(progress) / seconds:.0f}/s" if seconds > 0 else ""


def _in_words(rotated: Rotated, *, dry_run: bool, seconds: float) -> Iterator[str]:
    done = "Would seal anew" if dry_run else "Sealed anew"
    yield f"{done} under {rotated.current}: {_keys(sum(rotated.rewritten.values()))}, in {seconds:.1f} s."
    for master_key_id, count in sorted(rotated.rewritten.items()):
        if count:
            yield f"  {count} from {master_key_id}"
    if rotated.unreadable:
        yield f"Do not open, and stay as they are: {_keys(sum(rotated.unreadable.values()))}."
        for (master_key_id, cause), count in sorted(rotated.unreadable.items()):
            yield f"  {count} under {master_key_id}: {cause} ({_REMEDIES[cause]})"
        for key in rotated.listed[:_MOST_SHOWN]:
            yield f"  user {key.user_id!r}, provider {key.provider!r}, key {key.key_id}: {key.cause}"
        if sum(rotated.unreadable.values()) > _MOST_SHOWN:
            yield f"  … --json lists up to {len(rotated.listed)} of them."
    if dry_run:
        return
    if not rotated.is_done:
        yield (
            f"Not finished: {_keys(sum(rotated.left.values()))} under other master keys. Rows are locked by "
            "somebody else, or go on being saved under another master key. Run it again."
        )
    for one in rotated.behind:
        yield (
            f"The sidecar at {one.address} (PostgreSQL process {one.backend}) seals under "
            f"{one.master_key_id}: restart it with the new ENCRYPTION_KEY, then run this again."
        )
    for master_key_id in sorted(rotated.left):
        yield f"Left under {master_key_id}: {_keys(rotated.left[master_key_id])}."
    if not rotated.left and rotated.is_done:
        yield "No key is left under another master key."
    if rotated.removable:
        yield f"Can be removed from ENCRYPTION_KEYS_RETIRED: {', '.join(rotated.removable)}."


def _keys(count: int) -> str:
    return "1 key" if count == 1 else f"{count} keys"


def _as_json(rotated: Rotated, *, dry_run: bool, seconds: float) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "master_key_id": rotated.current,
        "found": rotated.found,
        "sealed_anew": rotated.rewritten,
        "left": rotated.left,
        "is_done": rotated.is_done,
        "removable": list(rotated.removable),
        "sidecars_behind": [
            {"address": one.address, "backend": one.backend, "master_key_id": one.master_key_id}
            for one in rotated.behind
        ],
        "unreadable": [
            {"master_key_id": master_key_id, "cause": cause, "keys": count}
            for (master_key_id, cause), count in sorted(rotated.unreadable.items())
        ],
        "unreadable_keys": [
            {
                "user_id": key.user_id,
                "key_id": str(key.key_id),
                "provider": key.provider,
                "master_key_id": key.master_key_id,
                "cause": key.cause,
            }
            for key in rotated.listed
        ],
        "seconds": round(seconds, 3),
    }
