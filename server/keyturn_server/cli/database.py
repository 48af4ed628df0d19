"""How commands that go to the database themselves reach it."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

from keyturn_server.app import NoDatabase
from keyturn_server.settings import Settings
from keyturn_server.store.embedded import existing_database


async def existing_database_url(settings: Settings, stack: AsyncExitStack, log: Any) -> str:
    """Of the database that is there: an embedded one is not made, and may be one that a sidecar runs.

    Raises `NoDatabase`, `EmbeddedPostgresError`.
    """
    if settings.database_url is not None and settings.embedded is None:
        return settings.database_url.get_secret_value()
    if settings.embedded is None or settings.database_url is not None:
        raise NoDatabase
    return await stack.enter_async_context(existing_database(settings.embedded, log=log))
