"""The spool: records that are durable on our own disk while PostgreSQL cannot be reached.

A SQLite file in WAL mode with synchronous=FULL: a commit returns once its records are on the disk. All
work on it is done by one thread of its own, and whatever has queued while one commit ran goes into the
next. One process owns the directory, by a lock on a file in it; commands may look in meanwhile.
What is kept, and why: docs/decisions/0014-spool.md.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from uuid import UUID

from keyturn_server.errors import KeyturnFault, SpoolCause, SpoolUnavailable
from keyturn_server.grouping import Group
from keyturn_server.private_files import locked, make_private
from keyturn_server.store.patience import patience

T = TypeVar("T")

SPOOL_FILE: Final = "records.sqlite3"
_LOCK_FILE: Final = "lock"
_WORKER: Final = "worker-"
_APPLICATION: Final = 0x4B545350  # "KTSP", for whoever finds the file
_VERSION: Final = 1

# `cause` says why a record was set aside, and is NULL while it waits. The one row of `pulse` is written to
# see whether the disk takes anything.
_SCHEMA: Final = f"""
BEGIN IMMEDIATE;
CREATE TABLE records (
    seq         INTEGER PRIMARY KEY AUTOINCREMENT,
    id          BLOB NOT NULL UNIQUE CHECK (typeof(id) = 'blob' AND length(id) = 16),
    user_id     TEXT NOT NULL CHECK (typeof(user_id) = 'text'),
    taken_at    INTEGER NOT NULL CHECK (typeof(taken_at) = 'integer' AND taken_at BETWEEN 0 AND 1e17),
    fingerprint BLOB NOT NULL CHECK (typeof(fingerprint) = 'blob'),
    body        BLOB NOT NULL CHECK (typeof(body) = 'blob'),
    signature   BLOB NOT NULL CHECK (typeof(signature) = 'blob'),
    cause       TEXT CHECK (typeof(cause) IN ('text', 'null'))
);
CREATE INDEX waiting ON records (seq) WHERE cause IS NULL;
CREATE TABLE pulse (id INTEGER PRIMARY KEY CHECK (id = 1), at INTEGER NOT NULL);
INSERT INTO pulse VALUES (1, 0);
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_VERSION};
COMMIT;
"""  # noqa: S608 - of constants
_INSERT: Final = """
INSERT INTO records (id, user_id, taken_at, fingerprint, body, signature) VALUES (?, ?, ?, ?, ?, ?)
"""
_COLUMNS: Final = "SELECT seq, id, user_id, taken_at, fingerprint, body, signature, cause FROM records"
_FIND: Final = f"{_COLUMNS} WHERE id = ?"
_READ: Final = f"{_COLUMNS} WHERE cause IS NULL AND seq > ? ORDER BY seq LIMIT ?"
_READ_ANY: Final = f"{_COLUMNS} WHERE seq > ? ORDER BY seq LIMIT ?"
_SHOW: Final = f"{_COLUMNS} ORDER BY cause IS NULL, seq LIMIT ?"
_IDS: Final = "SELECT id FROM records"
_REMOVE: Final = "DELETE FROM records WHERE seq = ?"
_SET_ASIDE: Final = "UPDATE records SET cause = ? WHERE seq = ?"
_TRY_AGAIN: Final = "UPDATE records SET cause = NULL WHERE cause IS NOT NULL"
_DROP: Final = "DELETE FROM records WHERE id = ? AND cause IS NOT NULL"
_PULSE: Final = "UPDATE pulse SET at = ?"
_COUNT: Final = "SELECT count(*) - count(cause), count(cause), min(taken_at) FROM records"

_MOST_IN_A_GROUP = 512
_MOST_QUEUED = 16 * _MOST_IN_A_GROUP
_ROW_BYTES = 256  # about what a record takes beside its body, its places in the indexes among it
_LARGEST_BYTES = 16 * 1024  # more than any record
_BUSY_SECONDS = 1.0  # how long a command that looks in may hold us up
_LIMIT = timedelta(seconds=5)  # how long a record may wait for the disk
_PULSE_INTERVAL = timedelta(seconds=5)
_PULSE_INTERVAL_UNWELL = timedelta(seconds=1)
# The file is not ours, or not whole: no waiting helps.
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class SpoolError(KeyturnFault):
    """The spool cannot be used as it is; the message names it and the way out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spoolable:
    """A record to keep."""

    id: UUID
    """That of the decision: one is kept once."""
    user_id: str
    taken_at: datetime
    fingerprint: bytes
    """Of what was reported: the same again is a repeat."""
    body: bytes
    signature: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept(Spoolable):
    """A record as it is in the spool."""

    seq: int
    """Its place in the order in which records came."""
    is_new: bool
    """Whether it was kept by this very call."""
    cause: str | None
    """Why it was set aside; None while it waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """How much is in the spool."""

    waiting: int = 0
    set_aside: int = 0
    file_bytes: int = 0
    """What is used of the file."""
    oldest: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoolState:
    """How the spool is."""

    figures: Figures
    cause: SpoolCause | None
    """Why it takes nothing; None while it is well."""
    error: str
    """What the disk said: the name of an error, or empty."""


class Spool:
    """Records on disk. Made with `open_spool`. Its methods raise `SpoolUnavailable`.

    `on_state` hears how it is, over and over.
    """

    def __init__(
        self,
        file: _File,
        thread: ThreadPoolExecutor,
        *,
        max_records: int,
        max_bytes: int,
        on_state: Callable[[SpoolState], None],
    ) -> None:
        self._file = file
        self._thread = thread
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._on_state = on_state
        self._puts: Group[Spoolable, Kept | SpoolUnavailable] = Group(
            self._put_group, most=_MOST_IN_A_GROUP, most_queued=_MOST_QUEUED, keep_cancelled=True
        )
        self._ids: set[bytes] = set()
        self._state = SpoolState(figures=Figures(), cause=None, error="")
        self._has_tried_again = False
        self.filled = asyncio.Event()
        """Set while a record may wait."""

    async def __aenter__(self) -> Self:
        await self._prepare()
        await self._puts.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._puts.__aexit__(kind, error, trace)

    @property
    def figures(self) -> Figures:
        """How much is in it, as of a moment ago."""
        return self._state.figures

    async def put(self, record: Spoolable) -> Kept:
        """Keep a record: it is on the disk when this returns. One by the same id comes back as it is.

        Raises `SpoolUnavailable`, and `Overloaded` when too many wait.
        """
        kept = await self._in_time(self._puts.submit(record))
        if isinstance(kept, SpoolUnavailable):
            raise kept
        return kept

    async def find(self, record_id: UUID) -> Kept | None:
        """The record by this id, waiting or set aside. Without one in the spool it costs nothing."""
        if record_id.bytes not in self._ids:
            return None
        return await self._in_time(self._run(lambda connection: _find(connection, record_id)))

    async def read(self, *, after: int, at_most: int) -> list[Kept]:
        """The next records that wait, in the order in which they came."""

        def read(connection: sqlite3.Connection) -> list[Kept]:
            return [_kept(row) for row in connection.execute(_READ, (after, at_most))]

        return await self._run(read)

    async def finish(self, *, done: Sequence[Kept], set_aside: Mapping[int, str]) -> None:
        """Remove what is done, and set aside what cannot be: by `seq`, with the cause."""

        def finish(connection: sqlite3.Connection) -> None:
            with _transaction(connection):
                connection.executemany(_REMOVE, [(one.seq,) for one in done])
                connection.executemany(_SET_ASIDE, [(cause, seq) for seq, cause in set_aside.items()])

        await self._run(finish)
        self._ids.difference_update(one.id.bytes for one in done)

    async def take_over(self, directory: Path) -> tuple[int, int]:
        """Bring what is in another spool into this one: how many records, and how many had to stay there.

        Each is here before it is gone there, so that it may be interrupted at any moment, and done again.
        What stays has no room here, or there is another record of the same decision, which goes first.
        Raises `SpoolError` where the other spool cannot be used as it is, or is somebody's, and
        `SpoolUnavailable`.
        """
        taken = f"{directory}: a sidecar has its spool there."
        with locked(directory / _LOCK_FILE, taken=taken, fault=SpoolError):
            moved, seen, after = 0, 0, 0
            while batch := await asyncio.to_thread(_read_any, directory, after):
                here = await self._run(partial(self._keep, batch))
                await asyncio.to_thread(_remove, directory, here)
                moved, seen, after = moved + len(here), seen + len(batch), batch[-1].seq
        await self.look()
        return moved, seen - moved

    def _keep(self, records: Sequence[Kept], connection: sqlite3.Connection) -> list[Kept]:
        """Those of another spool's records that are here now."""
        here: list[Kept] = []
        used_bytes, count = _used_bytes(connection), _count(connection)
        with _transaction(connection):
            for record in records:
                found = _find(connection, record.id)
                if found is None and self._has_room(count, used_bytes):
                    connection.execute(_INSERT, _row(record))
                    used_bytes, count = used_bytes + len(record.body) + _ROW_BYTES, count + 1
                    here.append(record)
                elif found is not None and found.fingerprint == record.fingerprint:
                    here.append(record)
        return here

    async def look(self) -> None:
        """Find out how much there is, and whether the disk takes anything."""

        def look(connection: sqlite3.Connection) -> tuple[Figures, set[bytes] | None]:
            with _transaction(connection):
                connection.execute(_PULSE, (time.time_ns() // 1000,))
                if not self._has_tried_again:
                    connection.execute(_TRY_AGAIN)
            figures = _figures(connection)
            # Read at the start; and when a command has dropped something.
            is_as_known = figures.waiting + figures.set_aside == len(self._ids)
            return figures, None if is_as_known else {row[0] for row in connection.execute(_IDS)}

        with suppress(SpoolUnavailable):  # which has been told
            figures, ids = await self._run(look)
            self._has_tried_again = True
            if ids is not None:
                self._ids = ids
            if figures.waiting:
                self.filled.set()
            else:
                self.filled.clear()
            is_full = not self._has_room(len(self._ids), figures.file_bytes)
            self._tell(SpoolCause.FULL if is_full else None, "", figures)

    async def keep_looking(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await self.look()
            interval = _PULSE_INTERVAL if self._state.cause is None else _PULSE_INTERVAL_UNWELL
            await asyncio.sleep(interval.total_seconds())

    async def _prepare(self) -> None:
        """Open the file. Raises `SpoolError` for one that no waiting helps; a disk that takes nothing just
        now is told of, and tried again."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._file.connection)
        except sqlite3.Error as error:
            if _code(error) in _DAMAGED:
                raise SpoolError(
                    f"{self._file.path}: is no spool, or damaged ({_name_of(error)}). "
                    "Move it away and keep it: it may hold records that were acknowledged."
                ) from None
        except OSError:
            pass
        await self.look()  # says what else there was

    async def _put_group(self, records: Sequence[Spoolable]) -> list[Kept | SpoolUnavailable]:
        known = len(self._ids)

        def put(connection: sqlite3.Connection) -> list[Kept | SpoolUnavailable]:
            answers: list[Kept | SpoolUnavailable] = []
            used_bytes, count = _used_bytes(connection), known
            with _transaction(connection):
                for record in records:
                    if (found := _find(connection, record.id)) is not None:
                        answers.append(found)
                    elif self._has_room(count, used_bytes):
                        connection.execute(_INSERT, _row(record))
                        answers.append(_new(record))
                        used_bytes, count = used_bytes + len(record.body) + _ROW_BYTES, count + 1
                    else:
                        answers.append(SpoolUnavailable(SpoolCause.FULL))
            return answers

        answers = await self._run(put)
        self._ids.update(one.id.bytes for one in answers if isinstance(one, Kept))
        self.filled.set()
        is_full = any(isinstance(one, SpoolUnavailable) for one in answers)
        new = [one for one in answers if isinstance(one, Kept) and one.is_new]
        self._tell(SpoolCause.FULL if is_full else None, "", self._with(new))
        return answers

    def _with(self, new: Sequence[Kept]) -> Figures:
        """The figures with these as well, until the next look has exact ones."""
        figures = self._state.figures
        if not new:
            return figures
        return replace(figures, waiting=figures.waiting + len(new), oldest=figures.oldest or new[0].taken_at)

    def _has_room(self, count: int, used_bytes: int) -> bool:
        return count < self._max_records and used_bytes + _LARGEST_BYTES <= self._max_bytes

    async def _in_time(self, work: Awaitable[T]) -> T:
        """What `work` comes to, for a caller who does not wait for a disk that hangs."""
        try:
            async with patience(_LIMIT):
                return await work
        except TimeoutError:
            self._tell(SpoolCause.DISK, "TIMEOUT")
            raise SpoolUnavailable(SpoolCause.DISK) from None

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What `work` comes to in the thread; whatever is wrong with the disk is `SpoolUnavailable`."""

        def run() -> T:
            try:
                return work(self._file.connection())
            except (sqlite3.Error, OSError):
                self._file.close()  # the next one begins anew
                raise

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, run)
        # `SpoolError` where somebody has put another file there.
        except (sqlite3.Error, OSError, SpoolError) as error:
            self._tell(SpoolCause.DISK, _name_of(error))
            raise SpoolUnavailable(SpoolCause.DISK) from error

    def _tell(self, cause: SpoolCause | None, error: str, figures: Figures | None = None) -> None:
        self._state = SpoolState(figures=figures or self._state.figures, cause=cause, error=error)
        self._on_state(self._state)


@asynccontextmanager
async def open_spool(
    directory: Path, *, max_records: int, max_bytes: int, on_state: Callable[[SpoolState], None]
) -> AsyncIterator[Spool]:
    """The spool in a directory, which is made if it is missing; ours alone until the end of the block.

    What was set aside before is tried again. Raises `SpoolError`.
    """
    make_private(directory, what="spool", fault=SpoolError)
    taken = f"{directory}: another sidecar has its spool there. Give each one a directory of its own."
    with locked(directory / _LOCK_FILE, taken=taken, fault=SpoolError):
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spool")
        file = _File(directory / SPOOL_FILE)
        try:
            spool = Spool(file, thread, max_records=max_records, max_bytes=max_bytes, on_state=on_state)
            async with spool:
                yield spool
        finally:
            await asyncio.get_running_loop().run_in_executor(thread, file.close)
            thread.shutdown()


def beside(directory: Path, worker: int) -> Path:
    """Where one of several workers has its spool; the first has the directory itself."""
    return directory / f"{_WORKER}{worker}" if worker else directory


def workers_in(directory: Path) -> dict[int, Path]:
    """The spools of other workers than the first, by worker, whether these workers are still there or not."""
    found: dict[int, Path] = {}
    for path in directory.glob(f"{_WORKER}*/{SPOOL_FILE}"):
        number = path.parent.name.removeprefix(_WORKER)
        if number.isdecimal() and number == str(int(number)):
            found[int(number)] = path.parent
    return dict(sorted(found.items()))


def look_in(directory: Path, *, at_most: int) -> tuple[Figures, list[Kept]]:
    """What is in a spool, whether a sidecar runs on it or not; what was set aside first.

    Raises `SpoolError`.
    """
    with _visiting(directory) as connection:
        return _figures(connection), [_kept(row) for row in connection.execute(_SHOW, (at_most,))]


def together(figures: Sequence[Figures]) -> Figures:
    """The figures of several spools as those of one."""
    return Figures(
        waiting=sum(one.waiting for one in figures),
        set_aside=sum(one.set_aside for one in figures),
        file_bytes=sum(one.file_bytes for one in figures),
        oldest=min((one.oldest for one in figures if one.oldest is not None), default=None),
    )


def _read_any(directory: Path, after: int) -> list[Kept]:
    """The next records of a spool, those that were set aside among them."""
    with _visiting(directory) as connection:
        rows = connection.execute(_READ_ANY, (after, _MOST_IN_A_GROUP))
        return [_kept(row) for row in rows]


def _remove(directory: Path, records: Sequence[Kept]) -> None:
    with _visiting(directory) as connection, _transaction(connection):
        connection.executemany(_REMOVE, [(one.seq,) for one in records])


def drop(directory: Path, record_ids: Sequence[UUID]) -> int:
    """Delete records that were set aside, and no others; how many. Raises `SpoolError`."""
    with _visiting(directory) as connection, _transaction(connection):
        return sum(connection.execute(_DROP, (one.bytes,)).rowcount for one in record_ids)


class _File:
    """The file, for one thread: opened when it is needed, and anew after an error."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection: sqlite3.Connection | None = None
        self._inode = 0

    def connection(self) -> sqlite3.Connection:
        """An open connection to the file. Raises `sqlite3.Error` and OSError."""
        if self._connection is not None:
            # What is written to a file that somebody has removed would be gone with us.
            if self.path.stat().st_ino != self._inode:
                raise FileNotFoundError(errno.ENOENT, "the file was replaced", str(self.path))
            return self._connection
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        self.path.chmod(0o600)
        _sync_directory(self.path.parent)
        connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        self._inode = self.path.stat().st_ino
        self._connection = connection
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise sqlite3.OperationalError(f"the file system cannot have a write-ahead log: {mode}")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA journal_size_limit = 4194304")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            connection.executescript(_SCHEMA)
        elif version != _VERSION:
            raise SpoolError(f"{self.path}: was made by another release of Keyturn; use that one.")
        # After a failed fsync the kernel may take for written what is not: so what the log holds is written
        # anew, to the file itself, before anybody is told that it is there.
        (is_busy, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if is_busy:
            raise sqlite3.OperationalError("somebody reads the file")

    def close(self) -> None:
        """Close it, whatever the disk says to that: what was committed is in the file or in its log."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextmanager
def _visiting(directory: Path) -> Iterator[sqlite3.Connection]:
    path = directory / SPOOL_FILE
    if not path.exists():
        raise SpoolError(f"{directory}: there is no spool.")
    try:
        connection = sqlite3.connect(path, timeout=5 * _BUSY_SECONDS, isolation_level=None)
        try:
            if connection.execute("PRAGMA user_version").fetchone() != (_VERSION,):
                raise SpoolError(f"{path}: is no spool of this release of Keyturn.")
            yield connection
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise SpoolError(f"{path}: cannot be read: {_name_of(error)}.") from None


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _figures(connection: sqlite3.Connection) -> Figures:
    waiting, set_aside, oldest = connection.execute(_COUNT).fetchone()
    return Figures(
        waiting=waiting,
        set_aside=set_aside,
        file_bytes=_used_bytes(connection),
        oldest=None if oldest is None else _moment(oldest),
    )


def _count(connection: sqlite3.Connection) -> int:
    waiting, set_aside, _ = connection.execute(_COUNT).fetchone()
    return int(waiting + set_aside)


def _used_bytes(connection: sqlite3.Connection) -> int:
    pages, free, size = (
        connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)


def _find(connection: sqlite3.Connection, record_id: UUID) -> Kept | None:
    row = connection.execute(_FIND, (record_id.bytes,)).fetchone()
    return None if row is None else _kept(row)


def _row(record: Spoolable) -> tuple[Any, ...]:
    return (
        record.id.bytes,
        record.user_id,
        round(record.taken_at.timestamp() * 1_000_000),
        record.fingerprint,
        record.body,
        record.signature,
    )


def _new(record: Spoolable) -> Kept:
    return Kept(
        id=record.id,
        user_id=record.user_id,
        taken_at=record.taken_at,
        fingerprint=record.fingerprint,
        body=record.body,
        signature=record.signature,
        seq=0,
        is_new=True,
        cause=None,
    )


def _kept(row: tuple[Any, ...]) -> Kept:
    seq, record_id, user_id, taken_at, fingerprint, body, signature, cause = row
    return Kept(
        id=UUID(bytes=record_id),
        user_id=user_id,
        taken_at=_moment(taken_at),
        fingerprint=fingerprint,
        body=body,
        signature=signature,
        seq=seq,
        is_new=False,
        cause=cause,
    )


def _moment(micros: int) -> datetime:
    return datetime.fromtimestamp(0, UTC) + timedelta(microseconds=micros)


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary error code; 0 for an error of Python's own."""
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF


def _name_of(error: Exception) -> str:
    """A word for the log: never the error's text, which may quote a path or a value."""
    if isinstance(error, OSError) and error.errno is not None:
        return errno.errorcode.get(error.errno, type(error).__name__)
    return getattr(error, "sqlite_errorname", None) or type(error).__name__
