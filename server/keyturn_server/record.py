"""Record: what became of a request. Charges a ticket or counts the use of an own key, exactly once.

Settlement rules: DESIGN, "Wire contract", Record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Protocol
from uuid import UUID

from keyturn_server.configuration import Configuration
from keyturn_server.decide import Configurations, Profiles, open_key
from keyturn_server.errors import StoreUnavailable, UserNotFound
from keyturn_server.ids import new_id
from keyturn_server.keys.envelope import Unreadable
from keyturn_server.keys.keyring import Keyring
from keyturn_server.keys.tokens import HandleClaims, TicketClaims, TokenSealer
from keyturn_server.ledger import (
    CostSource,
    KeyState,
    KeyUse,
    KeyUsed,
    Outcome,
    Report,
    Settled,
    Settlement,
    Spooled,
)
from keyturn_server.prices import PriceBook, PriceOverride
from keyturn_server.profiles import Profile
from keyturn_server.scrub import STRUCK
from keyturn_server.values import value

_MAX_ERROR_TEXT = 500

_TAKEN_FOR = timedelta(days=7)
"""How long after its handle or ticket expired a record is still taken."""

_COOLDOWNS = {
    Outcome.RATE_LIMITED: timedelta(seconds=60),
    Outcome.PROVIDER_BILLING: timedelta(minutes=15),
}
"""How long a key rests when the provider did not say."""

_NEVER_CHARGED = frozenset(
    {
        Outcome.NEVER_SENT,
        Outcome.AUTH_REJECTED,
        Outcome.RATE_LIMITED,
        Outcome.PROVIDER_BILLING,
        Outcome.REFUSED,
    }
)
"""The provider did no work: nothing is charged, whatever else the report says."""


class Books(Protocol):
    """The part of the ledger that records need."""

    async def settle(self, settlement: Settlement) -> Settled | Spooled: ...
    async def record_key_use(self, use: KeyUse) -> KeyUsed | Spooled: ...


class EverKnown(Protocol):
    """What was known before the database went away, however old: enough to price a record, and to strike
    a key out of it."""

    def configuration(self) -> Configuration | None: ...
    def profile(self, user_id: str) -> Profile | None: ...


class KeyStates(Protocol):
    """Who has to hear that an outcome may have changed the state of a key, before the caller does: so
    that the next decision here does not hand out a key that was just refused."""

    async def changed(self, user_id: str) -> None: ...
    async def will_change(self, use: KeyUse) -> None: ...


@value
class Recorded:
    """A record as it was taken. Amounts in micro-USD."""

    id: UUID
    charged_micros: int
    """Of a spooled record: what will be charged."""
    released_micros: int
    balance_micros: int | None
    """None for an own key, and for a spooled record."""
    cost_source: CostSource
    key_state: KeyState | None
    """None for a ticket, and for a spooled record."""
    replayed: bool
    is_spooled: bool = False
    """Whether it is durable on our own disk, and not in the database yet."""


class Recorder:
    """Takes records. Safe for any number of callers at once."""

    def __init__(
        self,
        *,
        configurations: Configurations,
        profiles: Profiles,
        remembered: EverKnown,
        books: Books,
        keyring: Keyring | None,
        sealer: TokenSealer,
        prices: PriceBook,
        clock: Callable[[], datetime],
        key_states: KeyStates,
    ) -> None:
        self._configurations = configurations
        self._profiles = profiles
        self._remembered = remembered
        self._books = books
        self._keyring = keyring
        self._sealer = sealer
        self._prices = prices
        self._clock = clock
        self._key_states = key_states

    async def settle_ticket(self, ticket: str, report: Report) -> Recorded:
        """Charge the hold behind `ticket` and release the rest; durable when this returns.

        Raises `InvalidToken`, `RecordTooLate`, `HoldNotFound`, `RecordConflict`, `StoreUnavailable`,
        `SpoolUnavailable`.
        """
        claims = self._sealer.open_ticket(ticket)
        report = _cut(report, report.error_message)
        now = self._clock()
        charge_micros, source = await self._charge(claims, report, now)
        settled = await self._books.settle(
            Settlement(
                hold_id=claims.decision_id,
                user_id=claims.user_id,
                charge_micros=charge_micros,
                cost_source=source,
                report=report,
                fingerprint=_fingerprint(report),
                submission_id=new_id(),
                is_too_late=now > claims.expires_at + _TAKEN_FOR,
            )
        )
        if isinstance(settled, Spooled):
            return _spooled(claims.decision_id, settled)
        return Recorded(
            id=claims.decision_id,
            charged_micros=settled.charged_micros,
            released_micros=settled.released_micros,
            balance_micros=settled.balance_micros,
            cost_source=settled.cost_source,
            key_state=None,
            replayed=settled.replayed,
        )

    async def record_key(self, handle: str, report: Report) -> Recorded:
        """Count the use of the key behind `handle`, and let the outcome steer the key.

        Raises `InvalidToken`, `RecordTooLate`, `RecordConflict`, `StoreUnavailable`.
        """
        claims = self._sealer.open_handle(handle)
        error_message = await self._without_its_key(claims, report.error_message)
        report = _cut(report, error_message)
        now = self._clock()
        cost_micros, source = await self._cost(claims, report, now)
        use = KeyUse(
            id=claims.decision_id,
            user_id=claims.user_id,
            key_id=claims.key_id,
            key_revision=claims.key_revision,
            provider=claims.provider,
            model=report.model or claims.model,
            service_type=claims.service_type,
            mode=claims.mode,
            reason=claims.reason,
            cost_micros=cost_micros,
            cost_source=source,
            cooldown=_cooldown(report),
            is_late=claims.expires_at <= now,
            report=report,
            fingerprint=_fingerprint(report),
            submission_id=new_id(),
            is_too_late=now > claims.expires_at + _TAKEN_FOR,
        )
        used = await self._books.record_key_use(use)
        if isinstance(used, Spooled):
            if report.outcome is not Outcome.SUCCESS:
                await self._key_states.will_change(use)
            return _spooled(claims.decision_id, used)
        if report.outcome is not Outcome.SUCCESS:
            await self._key_states.changed(claims.user_id)
        return Recorded(
            id=claims.decision_id,
            charged_micros=0,
            released_micros=0,
            balance_micros=None,
            cost_source=used.cost_source,
            key_state=used.key_state,
            replayed=used.replayed,
        )

    async def _without_its_key(self, claims: HandleClaims, error_message: str) -> str:
        """The provider's error text, which may quote the very key, in a form that no pattern knows."""
        if not error_message or self._keyring is None:
            return error_message
        try:
            profile = await self._profiles.get(claims.user_id)
        except UserNotFound:
            return error_message
        except StoreUnavailable:
            known = self._remembered.profile(claims.user_id)
            if known is None or not known.has_key(claims.key_id, claims.key_revision):
                # What cannot be struck out is not kept.
                return STRUCK
            profile = known
        key = next((key for key in profile.keys if key.id == claims.key_id), None)
        if key is None:
            return error_message
        try:
            secret = open_key(self._keyring, claims.user_id, key)
        except Unreadable:
            return error_message
        return error_message.replace(secret.reveal(), STRUCK)

    async def _cost(
        self, claims: HandleClaims | TicketClaims, report: Report, now: datetime
    ) -> tuple[int | None, CostSource]:
        """What the request cost, as far as that is known: reported, else priced, else None."""
        if report.cost_micros is not None:
            return report.cost_micros, CostSource.REPORTED
        model = report.model or claims.model
        if report.usage is not None and model:
            priced = self._prices.cost_micros(
                claims.provider, model, report.usage, now=now, overrides=await self._overrides()
            )
            if priced is not None:
                return priced, CostSource.PRICED
        return None, CostSource.NONE

    async def _overrides(self) -> Mapping[tuple[str, str], PriceOverride]:
        """The operator's prices; while the database is away those that were last known, however old."""
        try:
            return (await self._configurations.get()).prices
        except StoreUnavailable:
            if (known := self._remembered.configuration()) is None:
                raise
            return known.prices

    async def _charge(self, claims: TicketClaims, report: Report, now: datetime) -> tuple[int, CostSource]:
        if report.outcome in _NEVER_CHARGED:
            return 0, CostSource.NONE
        cost_micros, source = await self._cost(claims, report, now)
        if cost_micros is not None:
            return cost_micros, source
        # Tokens were used, or an answer was given, and nobody knows the price: the hold is the best
        # estimate there is.
        if report.outcome is Outcome.SUCCESS or (report.usage is not None and report.usage.total > 0):
            return claims.hold_micros, CostSource.ESTIMATED
        return 0, CostSource.NONE


def _spooled(decision_id: UUID, spooled: Spooled) -> Recorded:
    # What is released, and what is left then, the books alone know.
    return Recorded(
        id=decision_id,
        charged_micros=spooled.charge_micros,
        released_micros=0,
        balance_micros=None,
        cost_source=spooled.cost_source,
        key_state=None,
        replayed=spooled.replayed,
        is_spooled=True,
    )


def _cut(report: Report, error_message: str) -> Report:
    """The report with this error text, as far as it is kept."""
    kept = error_message[:_MAX_ERROR_TEXT]
    return report if kept == report.error_message else replace(report, error_message=kept)


def _cooldown(report: Report) -> timedelta | None:
    default = _COOLDOWNS.get(report.outcome)
    return None if default is None else (report.retry_after or default)


def _fingerprint(report: Report) -> bytes:
    """16 bytes that stand for the whole report: the same report has the same ones.

    The error text does not count: what is struck out of it may differ the next time. A field that a later
    release adds is to count only where it was said, so that reports without it keep theirs.
    """
    usage = report.usage
    said = (
        report.outcome.value,
        report.cost_micros,
        report.model,
        report.endpoint,
        report.response_time,
        report.http_status,
        report.retry_after,
        None
        if usage is None
        else (
            usage.input_tokens,
            usage.output_tokens,
            usage.cache_read_tokens,
            usage.cache_write_tokens,
            usage.total_tokens,
        ),
    )
    return hashlib.blake2b(repr(said).encode(), digest_size=16).digest()
