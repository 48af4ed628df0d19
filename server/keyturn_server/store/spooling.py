"""Records by way of the spool: while PostgreSQL is away they are kept on disk, and drained when it is back.

A record keeps its `submission_id` on the way, which is what makes draining safe to repeat: one that was
committed and not yet removed, or whose commit was never answered, is known again as the same submission.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final, Protocol
from uuid import UUID

import asyncpg

from keyturn_server.errors import (
    HoldNotFound,
    Overloaded,
    RecordConflict,
    RecordTooLate,
    RowLocked,
    SpoolUnavailable,
    StoreUnavailable,
)
from keyturn_server.ledger import (
    CostSource,
    KeyUse,
    KeyUsed,
    Outcome,
    Report,
    Settled,
    Settlement,
    Spooled,
)
from keyturn_server.prices import Usage
from keyturn_server.store.spool import Kept, Spool, Spoolable

_MOST_AT_ONCE = 256  # that live requests have their share of the ledger's groups
_PAUSE = timedelta(milliseconds=250)
_PAUSE_LEFT = timedelta(seconds=2)  # after a pass that left something
_LAST_PASS = timedelta(seconds=5)

SETTLEMENT: Final = "settlement"
KEY_USE: Final = "key_use"

# What the books say of one record for good. Whatever else goes wrong may pass.
_VERDICTS: Final[Mapping[type[Exception], str]] = {
    RecordConflict: "conflict",
    HoldNotFound: "hold_not_found",
    RecordTooLate: "too_late",
}


class Signer(Protocol):
    """Signs what is spooled, so that nothing else is ever drained."""

    def sign_record(self, body: bytes) -> bytes: ...
    def is_signed(self, body: bytes, signature: bytes) -> bool: ...


class Ledger(Protocol):
    """The part of the ledger that records go to."""

    async def settle(self, settlement: Settlement) -> Settled: ...
    async def record_key_use(self, use: KeyUse) -> KeyUsed: ...


class SpoolingBooks:
    """Books that take records also while the database is away."""

    def __init__(
        self,
        ledger: Ledger,
        spool: Spool,
        signer: Signer,
        *,
        clock: Callable[[], datetime],
        on_spooled: Callable[[], None],
    ) -> None:
        self._ledger = ledger
        self._spool = spool
        self._signer = signer
        self._clock = clock
        self._on_spooled = on_spooled

    async def settle(self, settlement: Settlement) -> Settled | Spooled:
        """Charge a ticket, or keep it to be charged. Raises what the ledger raises, `SpoolUnavailable`."""
        if (known := await self._known(settlement)) is not None:
            return known
        try:
            return await self._ledger.settle(settlement)
        except RowLocked:
            raise
        except StoreUnavailable:
            return await self._keep(settlement)

    async def record_key_use(self, use: KeyUse) -> KeyUsed | Spooled:
        """Record the use of an own key, or keep it. Raises what the ledger raises, and `SpoolUnavailable`."""
        if (known := await self._known(use)) is not None:
            return known
        try:
            return await self._ledger.record_key_use(use)
        except RowLocked:
            raise
        except StoreUnavailable:
            return await self._keep(use)

    async def _known(self, record: Settlement | KeyUse) -> Spooled | None:
        """The first answer to a record that is in the spool: before the books are asked, which have not
        heard of it yet."""
        kept = await self._spool.find(_id_of(record))
        return None if kept is None else _answer(kept, record)

    async def _keep(self, record: Settlement | KeyUse) -> Spooled:
        if record.is_too_late:
            # Only a repeat would be answered, and whether it is one the books alone know.
            raise StoreUnavailable
        body = encode(record)
        kept = await self._spool.put(
            Spoolable(
                id=_id_of(record),
                user_id=record.user_id,
                taken_at=self._clock(),
                fingerprint=record.fingerprint,
                body=body,
                signature=self._signer.sign_record(body),
            )
        )
        if kept.is_new:
            self._on_spooled()
        return _answer(kept, record)


def _id_of(record: Settlement | KeyUse) -> UUID:
    return record.hold_id if isinstance(record, Settlement) else record.id


def _answer(kept: Kept, record: Settlement | KeyUse) -> Spooled:
    """Raises `RecordConflict` where the spool has this record with other contents."""
    if kept.fingerprint != record.fingerprint:
        raise RecordConflict
    first = decode(kept.body)
    return Spooled(
        charge_micros=first.charge_micros if isinstance(first, Settlement) else 0,
        cost_source=first.cost_source,
        replayed=not kept.is_new,
    )


class Drain:
    """Brings what is in the spool to the books, in the order in which it came, and removes it.

    A record that the books refuse for good is set aside. One that cannot be brought just now stays where
    it is, and those behind it go on.
    """

    def __init__(
        self,
        spool: Spool,
        ledger: Ledger,
        signer: Signer,
        *,
        is_away: Callable[[], bool],
        clock: Callable[[], datetime],
        on_drained: Callable[[int], None],
        on_set_aside: Callable[[Kept, str], None],
        on_failed: Callable[[Kept, Exception], None],
    ) -> None:
        """`on_drained` hears how many were brought, `on_set_aside` of one that was set aside and why, and
        `on_failed` of one that stays for another reason than that the database is away."""
        self._spool = spool
        self._ledger = ledger
        self._signer = signer
        self._is_away = is_away
        self._clock = clock
        self._on_drained = on_drained
        self._on_set_aside = on_set_aside
        self._on_failed = on_failed

    async def step(self) -> timedelta:
        """Wait until something is there to drain, and drain it if the database is there too; how long to
        pause before the next step."""
        await self._spool.filled.wait()
        if self._is_away():
            return _PAUSE
        try:
            return _PAUSE_LEFT if await self.drain() else _PAUSE
        except SpoolUnavailable:  # told by the spool; what has been brought is known again
            return _PAUSE_LEFT

    async def finish(self) -> None:
        """Drain for a moment more, if the database is there; what is left waits for the next start."""
        if self._spool.filled.is_set() and not self._is_away():
            with suppress(TimeoutError, SpoolUnavailable):
                async with asyncio.timeout(_LAST_PASS.total_seconds()):
                    await self.drain()

    async def drain(self) -> bool:
        """One pass over what waits; whether it left anything. Raises `SpoolUnavailable`."""
        after, left = 0, False
        while rows := await self._spool.read(after=after, at_most=_MOST_AT_ONCE):
            results = await asyncio.gather(*(self._bring(row) for row in rows))
            done = [row for row, result in zip(rows, results, strict=True) if result is None]
            set_aside = {
                row.seq: result for row, result in zip(rows, results, strict=True) if isinstance(result, str)
            }
            await self._spool.finish(done=done, set_aside=set_aside)
            if done:
                self._on_drained(len(done))
            for row in rows:
                if row.seq in set_aside:
                    self._on_set_aside(row, set_aside[row.seq])
            for row, result in zip(rows, results, strict=True):
                if isinstance(result, Exception):
                    left = True
                    if not isinstance(result, StoreUnavailable | Overloaded):
                        self._on_failed(row, result)
            if self._is_away():
                left = True
                break
            after = rows[-1].seq
        await self._spool.look()
        return left

    async def _bring(self, row: Kept) -> str | Exception | None:
        """None once the books have it; why they never will, as a word; or why they do not just now."""
        if not self._signer.is_signed(row.body, row.signature):
            # Of another database, or changed.
            return "foreign"
        try:
            record = decode(row.body)
        except (ValueError, KeyError, TypeError, AttributeError):
            return "unreadable"
        waited = max(self._clock() - row.taken_at, timedelta(0))
        try:
            if isinstance(record, Settlement):
                await self._ledger.settle(replace(record, waited=waited))
            else:
                await self._ledger.record_key_use(_rested(replace(record, waited=waited)))
        except asyncpg.DataError:
            return "bad_value"
        except asyncpg.IntegrityConstraintViolationError:
            return "bad_reference"
        except Exception as error:
            return _VERDICTS.get(type(error), error)
        return None


def _rested(use: KeyUse) -> KeyUse:
    """The use, with what is left of its key's rest: that began when it was taken."""
    if use.cooldown is None:
        return use
    return replace(use, cooldown=use.cooldown - use.waited if use.waited < use.cooldown else None)


# -- how a record is written down ----------------------------------------------------------------------


def encode(record: Settlement | KeyUse) -> bytes:
    """A record as JSON, for `decode`: no handle, no ticket, no secret in it."""
    values: dict[str, Any] = {
        "user_id": record.user_id,
        "cost_source": record.cost_source.value,
        "report": _report_values(record.report),
        "fingerprint": record.fingerprint.hex(),
        "submission_id": record.submission_id.hex,
    }
    if isinstance(record, Settlement):
        values |= {
            "kind": SETTLEMENT,
            "hold_id": record.hold_id.hex,
            "charge_micros": record.charge_micros,
        }
    else:
        values |= {
            "kind": KEY_USE,
            "id": record.id.hex,
            "key_id": record.key_id.hex,
            "key_revision": record.key_revision,
            "provider": record.provider,
            "model": record.model,
            "service_type": record.service_type,
            "mode": record.mode,
            "reason": record.reason,
            "cost_micros": record.cost_micros,
            "cooldown": _micros(record.cooldown),
            "is_late": record.is_late,
        }
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()


def decode(body: bytes) -> Settlement | KeyUse:
    """The record. Raises ValueError, KeyError, TypeError or AttributeError for anything else."""
    values = json.loads(body)
    user_id, cost_source = values["user_id"], CostSource(values["cost_source"])
    report = _report(values["report"])
    fingerprint = bytes.fromhex(values["fingerprint"])
    submission_id = UUID(hex=values["submission_id"])
    if values["kind"] == SETTLEMENT:
        return Settlement(
            hold_id=UUID(hex=values["hold_id"]),
            user_id=user_id,
            charge_micros=values["charge_micros"],
            cost_source=cost_source,
            report=report,
            fingerprint=fingerprint,
            submission_id=submission_id,
            is_too_late=False,
        )
    if values["kind"] != KEY_USE:
        raise ValueError("a record of no known kind")
    return KeyUse(
        id=UUID(hex=values["id"]),
        user_id=user_id,
        key_id=UUID(hex=values["key_id"]),
        key_revision=values["key_revision"],
        provider=values["provider"],
        model=values["model"],
        service_type=values["service_type"],
        mode=values["mode"],
        reason=values["reason"],
        cost_micros=values["cost_micros"],
        cost_source=cost_source,
        cooldown=_span(values["cooldown"]),
        is_late=values["is_late"],
        report=report,
        fingerprint=fingerprint,
        submission_id=submission_id,
        is_too_late=False,
    )


def _report_values(report: Report) -> dict[str, Any]:
    usage = report.usage
    return {
        "outcome": report.outcome.value,
        "usage": None
        if usage is None
        else [
            usage.input_tokens,
            usage.output_tokens,
            usage.cache_read_tokens,
            usage.cache_write_tokens,
            usage.total_tokens,
        ],
        "cost_micros": report.cost_micros,
        "model": report.model,
        "endpoint": report.endpoint,
        "response_time": _micros(report.response_time),
        "http_status": report.http_status,
        "error_message": report.error_message,
        "retry_after": _micros(report.retry_after),
    }


def _report(values: Mapping[str, Any]) -> Report:
    return Report(
        outcome=Outcome(values["outcome"]),
        usage=None if values["usage"] is None else _usage(values["usage"]),
        cost_micros=values["cost_micros"],
        model=values["model"],
        endpoint=values["endpoint"],
        response_time=_span(values["response_time"]),
        http_status=values["http_status"],
        error_message=values["error_message"],
        retry_after=_span(values["retry_after"]),
    )


def _usage(counts: Sequence[int | None]) -> Usage:
    input_tokens, output_tokens, cache_read, cache_write, total = counts
    return Usage(
        input_tokens=input_tokens or 0,
        output_tokens=output_tokens or 0,
        cache_read_tokens=cache_read or 0,
        cache_write_tokens=cache_write or 0,
        total_tokens=total,
    )


def _micros(span: timedelta | None) -> int | None:
    return None if span is None else span // timedelta(microseconds=1)


def _span(micros: int | None) -> timedelta | None:
    return None if micros is None else timedelta(microseconds=micros)
