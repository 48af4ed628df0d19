"""What workers that there are no more have left in their spools goes to the first one's, record by record."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import pytest

from keyturn_server.store.spool import (
    SPOOL_FILE,
    Spool,
    Spoolable,
    SpoolError,
    beside,
    look_in,
    open_spool,
    workers_in,
)


def a_record(number: int, fingerprint: bytes = b"f") -> Spoolable:
    return Spoolable(
        id=UUID(int=number),
        user_id="u1",
        taken_at=datetime.fromtimestamp(number, UTC),
        fingerprint=fingerprint,
        body=b"{}",
        signature=b"s",
    )


def spool_of(directory: Path, *, max_records: int = 10_000) -> AbstractAsyncContextManager[Spool]:
    return open_spool(directory, max_records=max_records, max_bytes=2**24, on_state=lambda state: None)


async def test_what_a_worker_left_is_taken_over_record_by_record(directory: Path) -> None:
    theirs = beside(directory, 3)
    async with spool_of(directory) as ours:
        await ours.put(a_record(1))
        await ours.put(a_record(2, b"mine"))
        async with spool_of(theirs) as other:
            for number in range(1, 1201):
                await other.put(a_record(number))
            first = await other.read(after=0, at_most=1200)
            await other.finish(done=[], set_aside={first[100].seq: "conflict"})
            with pytest.raises(SpoolError, match="a sidecar has its spool there"):
                await ours.take_over(theirs)
        assert workers_in(directory) == {3: theirs}
        # The first is a repeat; the second is another record of its decision, which ours goes before.
        assert await ours.take_over(theirs) == (1199, 1)
        assert ours.figures.waiting == 1200, "what was set aside is tried again"
        assert await ours.find(UUID(int=1200)) is not None
        (left,) = look_in(theirs, at_most=10)[1]
        assert left.id == UUID(int=2)
        (mine,) = await ours.read(after=1, at_most=1)
        assert mine.fingerprint == b"mine"
        await ours.finish(done=[mine], set_aside={})
        assert await ours.take_over(theirs) == (1, 0)
        assert await ours.take_over(theirs) == (0, 0)


async def test_what_has_no_room_stays_where_it_is(directory: Path) -> None:
    theirs = beside(directory, 1)
    directory.mkdir(mode=0o700)
    async with spool_of(theirs) as other:
        for number in range(10):
            await other.put(a_record(number))
    async with spool_of(directory, max_records=4) as ours:
        assert await ours.take_over(theirs) == (4, 6)
        assert ours.figures.waiting == 4
    assert look_in(theirs, at_most=10)[0].waiting == 6


async def test_what_is_no_spool_is_not_taken_over_and_not_touched(directory: Path) -> None:
    theirs = beside(directory, 1)
    async with spool_of(directory) as ours:
        theirs.mkdir()
        (theirs / SPOOL_FILE).write_bytes(b"nonsense" * 1000)
        with pytest.raises(SpoolError):
            await ours.take_over(theirs)
    assert (theirs / SPOOL_FILE).read_bytes() == b"nonsense" * 1000
