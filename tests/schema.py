"""What the migrations make, read from a database that they are applied to; `make schema` writes it down."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg

from keyturn_server.store import schema
from keyturn_server.store.embedded import EmbeddedPostgres
from keyturn_server.store.migrate import migrate, shipped_migrations
from tests.support import temporary_directory

WRITTEN = Path(schema.__file__).with_name("schema.json")

_SCHEMA = "SELECT oid FROM pg_namespace WHERE nspname = current_schema()"


async def made_by_migrations(dsn: str) -> list[schema.Step]:
    """What each migration makes of an empty database."""
    shipped = shipped_migrations()
    steps: list[schema.Step] = []
    before: dict[schema.Name, schema.Facts] = {}
    connection = await asyncpg.connect(dsn)
    try:
        oid = await connection.fetchval(_SCHEMA)
        for count, migration in enumerate(shipped, start=1):
            await migrate(dsn, shipped[:count])
            after = await schema.described(connection, oid)
            steps += schema.steps_between(migration.version, before, after)
            before = after
    finally:
        await connection.close()
    return steps


async def _main() -> None:
    async with (
        temporary_directory() as directory,
        EmbeddedPostgres(directory / "pg", settings={"fsync": "off"}) as postgres,
    ):
        WRITTEN.write_text(schema.as_text(await made_by_migrations(postgres.dsn)))


if __name__ == "__main__":
    asyncio.run(_main())
