"""Statements that take as long as a test wants, with no lock that somebody gives up waiting for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from tests.factories import Connection
from tests.support import eventually

_CLOSE = """
CREATE TABLE gate ();
CREATE FUNCTION wait_at_the_gate() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    LOOP
        EXIT WHEN EXISTS (SELECT FROM gate);
        PERFORM pg_sleep(0.01);
    END LOOP;
    RETURN NEW;
END $$;
CREATE TRIGGER gate BEFORE INSERT OR UPDATE ON {} FOR EACH ROW EXECUTE FUNCTION wait_at_the_gate();
"""
_OPEN = "INSERT INTO gate DEFAULT VALUES"
_REMOVE = "DROP TRIGGER gate ON {}; DROP FUNCTION wait_at_the_gate; DROP TABLE gate"
_WAITING = """
SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'
"""


@asynccontextmanager
async def gate_before(sql: Connection, table: str) -> AsyncIterator[None]:
    """Whatever writes to the table waits until the end of the block."""
    await sql.execute(_CLOSE.format(table))
    try:
        yield
    finally:
        await sql.execute(_OPEN)
        await sql.execute(_REMOVE.format(table))


def gate_before_holds(sql: Connection) -> AbstractAsyncContextManager[None]:
    """Whatever places or settles a hold waits until the end of the block."""
    return gate_before(sql, "credit_holds")


async def someone_waits(sql: Connection) -> None:
    """Back when a statement stands at the gate."""

    async def waits() -> bool:
        return bool(await sql.fetchval(_WAITING))

    await eventually(waits)
