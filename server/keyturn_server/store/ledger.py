"""The ledger: grouped statements that place holds, settle tickets and record the use of own keys.

The statements are functions of the database (migrations/0002_ledger.sql and 0006_waited.sql), where the
locking order is written down; docs/decisions/0002-ledger-functions.md says why they are functions.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg

from keyturn_server.errors import (
    GrantConflict,
    HoldNotFound,
    InvalidFields,
    RecordConflict,
    RecordTooLate,
    RowLocked,
    UserNotFound,
)
from keyturn_server.grouping import AGAIN, Again, Group
from keyturn_server.ledger import (
    Balance,
    CostSource,
    Grant,
    Granted,
    HoldAnswer,
    HoldRequest,
    HoldStatus,
    KeyState,
    KeyUse,
    KeyUsed,
    Report,
    Settled,
    Settlement,
)

if TYPE_CHECKING:
    from keyturn_server.store.database import Database

T = TypeVar("T")

_PLACE = "SELECT * FROM keyturn_place_holds($1::keyturn_hold_request[], $2) ORDER BY ord"
_SETTLE = "SELECT * FROM keyturn_settle_tickets($1::keyturn_settlement[], $2, $3::interval[]) ORDER BY ord"
_RECORD = "SELECT * FROM keyturn_record_key_usage($1::keyturn_key_record[], $2, $3::interval[]) ORDER BY ord"
_FIND = """
SELECT 'replayed' AS status, h.id AS hold_id, h.amount_micros,
       a.balance_micros - a.held_micros AS available_micros, h.created_at, h.expires_at,
       h.provider, h.model, h.service_type,
       CASE WHEN h.state = 'open' AND h.expires_at <= now() THEN 'expired' ELSE h.state END AS state
  FROM credit_holds h JOIN credit_accounts a USING (user_id)
 WHERE h.user_id = $1 AND h.request_id = $2
"""
_BALANCE = "SELECT balance_micros, held_micros FROM credit_accounts WHERE user_id = $1"
_GRANT = "SELECT * FROM keyturn_add_grants($1::keyturn_grant[], $2) ORDER BY ord"
_EXPIRE = "SELECT * FROM keyturn_expire_holds($1)"
_FORGET = "SELECT keyturn_forget($1)"

# Enough to fill a statement under load, small enough to keep its locks short. Beyond it an item costs more
# again: the functions look their rows up one by one, in lists as long as the group.
_MOST_IN_A_GROUP = 128
# Some seconds' worth: whoever came behind it would not be answered in time.
_MOST_QUEUED = 64 * _MOST_IN_A_GROUP
_MOST_MICROS = 2**63 - 1


class Ledger:
    """Money in PostgreSQL. Made with `open_ledger`.

    Methods raise `StoreUnavailable` when the database cannot answer in time, and the grouped ones
    `Overloaded` when too many wait.
    """

    def __init__(
        self,
        database: Database,
        *,
        holds: Group[HoldRequest, HoldAnswer | Exception],
        settlements: Group[Settlement, Settled | Exception],
        key_uses: Group[KeyUse, KeyUsed | Exception],
        grants: Group[Grant, Granted | Exception],
    ) -> None:
        self._database = database
        self._holds = holds
        self._settlements = settlements
        self._key_uses = key_uses
        self._grants = grants

    async def place(self, request: HoldRequest) -> HoldAnswer:
        """Set credits aside, or say why not. The same `request_id` of a user gets its first hold again."""
        return _raised(await self._holds.submit(request))

    async def find(self, user_id: str, request_id: str) -> HoldAnswer | None:
        """The hold that this `request_id` of the user has, whatever became of it."""
        row = await self._database.fetchrow(_FIND, user_id, request_id)
        return None if row is None else _hold(row)

    async def settle(self, settlement: Settlement) -> Settled:
        """Charge a ticket, once. Raises `HoldNotFound`, `RecordTooLate`, and `RecordConflict` for other
        contents."""
        return _raised(await self._settlements.submit(settlement))

    async def record_key_use(self, use: KeyUse) -> KeyUsed:
        """Record the use of an own key, once. Raises `RecordTooLate`, and `RecordConflict` for other
        contents."""
        return _raised(await self._key_uses.submit(use))

    async def grant(self, grant: Grant) -> Granted:
        """Add credits, once for each `request_id` of the user. Raises `UserNotFound`, `GrantConflict`
        for a `request_id` with another amount, and `InvalidFields` where the balance would not fit."""
        return _raised(await self._grants.submit(grant))

    async def balance(self, user_id: str) -> Balance:
        """The user's credits now; zero for a user without an account."""
        row = await self._database.fetchrow(_BALANCE, user_id)
        if row is None:
            return Balance(balance_micros=0, held_micros=0)
        return Balance(balance_micros=row["balance_micros"], held_micros=row["held_micros"])

    async def expire_holds(self, *, at_most: int) -> tuple[int, list[str]]:
        """Release holds that have run out by the database's clock; how many, and the users whose account
        does not agree with their holds, and was left as it is."""
        row = await self._database.fetchrow(_EXPIRE, at_most)
        return (row["expired"], row["broken"]) if row is not None else (0, [])

    async def forget(self, *, at_most: int) -> int:
        """Delete closed holds after their 30 days, and spent redemptions; how many."""
        return int(await self._database.fetchval(_FORGET, at_most))


@asynccontextmanager
async def open_ledger(
    database: Database, *, on_group: Callable[[str, int], None] = lambda kind, size: None
) -> AsyncIterator[Ledger]:
    """A ledger; at the end of the block what is queued is carried out first."""

    async def run(sql: str, rows: list[tuple[Any, ...]], *more: object) -> list[asyncpg.Record]:
        # A row that somebody else keeps locked costs the group one wait, and then its own caller only.
        try:
            return await database.fetch(sql, rows, True, *more)
        except RowLocked:
            return await database.fetch(sql, rows, False, *more)

    async def place(requests: Sequence[HoldRequest]) -> list[HoldAnswer | Exception | Again]:
        return [_placed(row) for row in await run(_PLACE, [_hold_row(one) for one in requests])]

    async def settle(settlements: Sequence[Settlement]) -> list[Settled | Exception | Again]:
        rows = [_settlement_row(one) for one in settlements]
        return [_settled(row) for row in await run(_SETTLE, rows, _waited(settlements))]

    async def record(uses: Sequence[KeyUse]) -> list[KeyUsed | Exception | Again]:
        rows = [_key_use_row(one) for one in uses]
        return [_key_used(row) for row in await run(_RECORD, rows, _waited(uses))]

    async def grant(grants: Sequence[Grant]) -> list[Granted | Exception | Again]:
        rows = await run(_GRANT, [_grant_row(one) for one in grants])
        return [_granted(one, row) for one, row in zip(grants, rows, strict=True)]

    def group(kind: str, run: Any, *, keep_cancelled: bool) -> Group[Any, Any]:
        return Group(
            run,
            most=_MOST_IN_A_GROUP,
            most_queued=_MOST_QUEUED,
            keep_cancelled=keep_cancelled,
            on_group=lambda size: on_group(kind, size),
        )

    async with AsyncExitStack() as stack:
        yield Ledger(
            database,
            holds=await stack.enter_async_context(group("hold", place, keep_cancelled=False)),
            settlements=await stack.enter_async_context(group("settle", settle, keep_cancelled=True)),
            key_uses=await stack.enter_async_context(group("key_use", record, keep_cancelled=True)),
            grants=await stack.enter_async_context(group("grant", grant, keep_cancelled=True)),
        )


def _raised(result: T | Exception) -> T:
    if isinstance(result, Exception):
        raise result
    return result


def _hold_row(request: HoldRequest) -> tuple[Any, ...]:
    return (
        request.id,
        request.user_id,
        request.request_id,
        request.provider,
        request.model,
        request.service_type,
        request.mode,
        request.reason,
        request.amount_micros,
        request.ttl,
    )


def _placed(row: asyncpg.Record) -> HoldAnswer | Exception | Again:
    match row["status"]:
        case "again":
            return AGAIN
        case "busy":
            return RowLocked()
    return _hold(row)


def _hold(row: asyncpg.Record) -> HoldAnswer:
    return HoldAnswer(
        status=HoldStatus(row["status"]),
        id=row["hold_id"],
        amount_micros=row["amount_micros"],
        available_micros=row["available_micros"],
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        provider=row["provider"],
        model=row["model"],
        service_type=row["service_type"],
        state=row["state"],
    )


def _settlement_row(settlement: Settlement) -> tuple[Any, ...]:
    report = settlement.report
    return (
        settlement.hold_id,
        settlement.user_id,
        settlement.charge_micros,
        settlement.cost_source.value,
        report.outcome.value,
        report.model,
        report.endpoint,
        *_usage_columns(report),
        report.http_status,
        _milliseconds(report),
        report.error_message or None,
        settlement.fingerprint,
        settlement.submission_id,
        settlement.is_too_late,
    )


def _settled(row: asyncpg.Record) -> Settled | Exception | Again:
    match row["status"]:
        case "again":
            return AGAIN
        case "busy":
            return RowLocked()
        case "unknown":
            return HoldNotFound()
        case "too_late":
            return RecordTooLate()
        case "conflict":
            return RecordConflict()
    return Settled(
        charged_micros=row["charged_micros"],
        released_micros=row["released_micros"],
        balance_micros=row["balance_micros"],
        cost_source=CostSource(row["cost_source"]),
        replayed=row["status"] == "replayed",
    )


def _key_use_row(use: KeyUse) -> tuple[Any, ...]:
    report = use.report
    return (
        use.id,
        use.user_id,
        use.key_id,
        use.key_revision,
        use.provider,
        use.model,
        use.service_type,
        use.mode,
        use.reason,
        report.endpoint,
        report.outcome.value,
        *_usage_columns(report),
        use.cost_micros,
        use.cost_source.value,
        report.http_status,
        _milliseconds(report),
        report.error_message or None,
        use.cooldown,
        use.is_late,
        use.fingerprint,
        use.submission_id,
        use.is_too_late,
    )


def _waited(records: Sequence[Settlement] | Sequence[KeyUse]) -> list[timedelta] | None:
    """How long each has waited; None where none has."""
    waited = [one.waited for one in records]
    return waited if any(waited) else None


def _key_used(row: asyncpg.Record) -> KeyUsed | Exception | Again:
    match row["status"]:
        case "again":
            return AGAIN
        case "busy":
            return RowLocked()
        case "too_late":
            return RecordTooLate()
        case "conflict":
            return RecordConflict()
    return KeyUsed(
        cost_source=CostSource(row["cost_source"]),
        key_state=KeyState(row["key_state"]),
        replayed=row["status"] == "replayed",
    )


def _grant_row(grant: Grant) -> tuple[Any, ...]:
    return (grant.id, grant.user_id, grant.amount_micros, grant.request_id, grant.description)


def _granted(grant: Grant, row: asyncpg.Record) -> Granted | Exception:
    match row["status"]:
        case "busy":
            return RowLocked()
        case "unknown":
            return UserNotFound(grant.user_id)
        case "too_much":
            return InvalidFields(
                ("amount_micros", f"The balance would be over its limit of {_MOST_MICROS} micros.")
            )
    if row["amount_micros"] != grant.amount_micros:
        return GrantConflict(row["amount_micros"])
    return Granted(
        transaction_id=row["transaction_id"],
        balance_micros=row["balance_micros"],
        replayed=row["status"] == "replayed",
    )


def _usage_columns(report: Report) -> tuple[int | None, ...]:
    usage = report.usage
    if usage is None:
        return (None,) * 5
    return (
        usage.input_tokens,
        usage.output_tokens,
        usage.cache_read_tokens,
        usage.cache_write_tokens,
        usage.total,
    )


def _milliseconds(report: Report) -> int | None:
    return None if report.response_time is None else round(report.response_time.total_seconds() * 1000)
