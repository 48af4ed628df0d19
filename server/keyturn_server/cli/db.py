"""`keyturn db`: the database."""

from __future__ import annotations

from contextlib import AsyncExitStack

import cyclopts
import uvloop

from keyturn_server.app import database_url
from keyturn_server.logs import configure_logs, get_log
from keyturn_server.settings import Settings, read_settings
from keyturn_server.store.migrate import migrate as apply_migrations

app = cyclopts.App(name="db", help="Look after the database.")


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
        print(f"applied {migration.version:04d} {migration.name}")
    if not applied:
        print("up to date")
