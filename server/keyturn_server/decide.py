"""Decide: whose credential pays for this request?

A decision reads the cached configuration and profile, asks the pure policy for a plan, and asks the
ledger for a hold only where credits stand first in it. The own-key path touches no database.

While the database cannot be asked an own key is decided on from what was last known, for a bounded
time. Nothing else is: credits, denials and users that nobody remembers wait for the database.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Protocol
from uuid import UUID

from keyturn.secret import Secret
from keyturn_server.configuration import Configuration, Provider
from keyturn_server.errors import InvalidFields, RequestIdReused, StoreUnavailable
from keyturn_server.ids import new_id
from keyturn_server.keys.envelope import Unreadable, opener
from keyturn_server.keys.keyring import Keyring
from keyturn_server.keys.tokens import HandleClaims, TicketClaims, TokenSealer
from keyturn_server.ledger import Balance, HoldAnswer, HoldRequest, HoldStatus, KeyState
from keyturn_server.prices import PriceBook, Usage
from keyturn_server.profiles import Profile, StoredKey
from keyturn_server.rate_limits import Limited, RateLimits
from keyturn_server.routing.model import (
    Constraint,
    Credits,
    DenialReason,
    KeyFacts,
    Mode,
    Path,
    Plan,
    Reason,
    Verdict,
    World,
)
from keyturn_server.routing.policy import choose_route, conclude
from keyturn_server.routing.reasons import DENIALS, RETRYABLE, SENTENCES, SUGGESTIONS
from keyturn_server.values import value

# Holds end when requests do: there is no telling when, only that it is soon.
IN_FLIGHT_RETRY = timedelta(seconds=1)


class Configurations(Protocol):
    """Where the configuration comes from."""

    async def get(self) -> Configuration: ...
    def cached(self) -> Configuration | None: ...


class Profiles(Protocol):
    """Where profiles come from. `get` raises `UserNotFound`."""

    async def get(self, key: str) -> Profile: ...
    def cached(self, key: str) -> Profile | None: ...


class LastKnown(Protocol):
    """What is remembered for when the database cannot be asked, and for how long nobody could have said
    that it is out of date."""

    def configuration(self) -> tuple[Configuration, timedelta] | None: ...
    def profile(self, user_id: str) -> tuple[Profile, timedelta] | None: ...


class Holds(Protocol):
    """The part of the ledger that decisions need."""

    async def place(self, request: HoldRequest) -> HoldAnswer: ...
    async def find(self, user_id: str, request_id: str) -> HoldAnswer | None: ...
    async def balance(self, user_id: str) -> Balance: ...


@value
class Ask:
    """One request that a gateway is about to make. Amounts in micro-USD; limits checked."""

    user_id: str
    provider: str
    request_id: str | None = None
    model: str = ""
    service_type: str = ""
    cost_micros: int | None = None
    tokens: Usage | None = None
    """The estimate as tokens: the limit on output tokens as `output_tokens`."""
    constraint: Constraint = Constraint.ANY
    failed_key_handles: Sequence[str] = field(default=(), repr=False)
    inline: bool = False
    hold_ttl: timedelta | None = None


@value
class KeyRoute:
    """The user's own key pays."""

    handle: str = field(repr=False)
    key_id: UUID
    hint: str
    secret: Secret | None
    """Only where the caller asked for it inline."""
    provider: Provider
    expires_at: datetime


@value
class TicketRoute:
    """Credits pay: a hold is placed. Amounts in micro-USD."""

    ticket: str = field(repr=False)
    hold_micros: int
    available_micros: int
    expires_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Denied:
    """Nobody's credential may pay."""

    reason: DenialReason
    retryable: bool
    retry_after: timedelta | None
    suggestion: str


@value
class Decision:
    """The answer to an `Ask`."""

    id: UUID
    mode: Mode
    reason: Reason
    message: str
    replayed: bool
    route: KeyRoute | TicketRoute | Denied
    degraded: bool = False
    """Whether it was made from what was last known, because the database could not be asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """What a decision is made from while the database cannot be asked."""

    configuration: Configuration
    provider: Provider
    profile: Profile
    age: timedelta
    """For how long nobody could have said that it is out of date."""


@dataclass(frozen=True, slots=True)
class _CreditsAnswer:
    """What came of asking for credits: the hold, or how long to wait."""

    credits: Credits
    hold: HoldAnswer | None = None
    retry_after: timedelta | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """A plan that holds as long as its configuration and its profile do, whatever the time."""

    configuration: Configuration
    plan: Plan
    key: StoredKey | None
    opener: Callable[[], Secret] | None = field(repr=False)

    def opened(self) -> tuple[Plan, StoredKey | None, Secret | None]:
        return self.plan, self.key, None if self.opener is None else self.opener()


class Decider:
    """Makes decisions. Safe for any number of callers at once.

    `on_unreadable` hears of a stored key that does not open, once a decision; `on_degraded` of each
    decision made from what is `remembered`, which is trusted for `degraded_for`.
    """

    def __init__(
        self,
        *,
        configurations: Configurations,
        profiles: Profiles,
        remembered: LastKnown,
        holds: Holds,
        limits: RateLimits,
        keyring: Keyring | None,
        sealer: TokenSealer,
        prices: PriceBook,
        degraded_for: timedelta,
        default_hold_micros: int,
        default_ttl: timedelta,
        clock: Callable[[], datetime],
        on_unreadable: Callable[[str, StoredKey, Unreadable], None],
        on_degraded: Callable[[], None],
    ) -> None:
        self._configurations = configurations
        self._profiles = profiles
        self._remembered = remembered
        self._degraded_for = degraded_for
        self._on_degraded = on_degraded
        self._holds = holds
        self._limits = limits
        self._keyring = keyring
        self._sealer = sealer
        self._prices = prices
        self._default_hold_micros = default_hold_micros
        self._default_ttl = default_ttl
        self._clock = clock
        self._on_unreadable = on_unreadable

    def decide(self, ask: Ask) -> Decision | Coroutine[Any, Any, Decision]:
        """Whose credential pays, with the key or the hold to pay with; or why nobody's does.

        At once, where everything that it takes is cached, or else what to wait for. Raises `InvalidFields`
        (unknown provider, a failed handle of somebody else), `InvalidToken`, `UserNotFound`,
        `RequestIdReused` and `StoreUnavailable`.
        """
        configuration = self._configurations.cached()
        profile = self._profiles.cached(ask.user_id)
        if configuration is None or profile is None:
            return self._read_and_decide(ask)
        return self._decide(ask, configuration, provider_of(configuration, ask.provider), profile)

    async def _read_and_decide(self, ask: Ask) -> Decision:
        try:
            configuration = await self._configurations.get()
            provider = provider_of(configuration, ask.provider)
            profile = await self._profiles.get(ask.user_id)
        except StoreUnavailable:
            return self._decide_degraded(ask)
        begun = self._decide(ask, configuration, provider, profile)
        return begun if isinstance(begun, Decision) else await begun

    def _decide(
        self, ask: Ask, configuration: Configuration, provider: Provider, profile: Profile
    ) -> Decision | Coroutine[Any, Any, Decision]:
        now = self._clock()
        plan, key, secret = self.plan(ask, configuration, provider, profile, now)
        if not stands_first(Path.CREDITS, plan):
            return self._concluded(ask, plan, provider, key, secret, None, now)

        async def after_credits() -> Decision:
            answer = await self._ask_credits(ask, configuration, profile, plan, now)
            return self._concluded(ask, plan, provider, key, secret, answer, now)

        return after_credits()

    def _concluded(
        self,
        ask: Ask,
        plan: Plan,
        provider: Provider,
        key: StoredKey | None,
        secret: Secret | None,
        answer: _CreditsAnswer | None,
        now: datetime,
    ) -> Decision:
        verdict = conclude(plan, answer.credits if answer else None)
        if verdict.path is Path.OWN_KEY and key is not None:
            return self._own_key(ask, plan, verdict, provider, key, secret, now)
        if verdict.path is Path.CREDITS and answer is not None and answer.hold is not None:
            return self._ticket(ask, plan, verdict, answer.hold)
        return self.denial(plan, verdict, answer.retry_after if answer else None, now)

    def _decide_degraded(self, ask: Ask) -> Decision:
        """An own key, where it stands first. Raises `StoreUnavailable` for whatever else would be."""
        last = self.remembered(ask)
        now = self._clock()
        plan, key, secret = self.plan(ask, last.configuration, last.provider, last.profile, now)
        if key is None or not stands_first(Path.OWN_KEY, plan):
            raise StoreUnavailable
        decision = self._own_key(ask, plan, conclude(plan, None), last.provider, key, secret, now)
        self._on_degraded()
        return degraded(decision)

    def remembered(self, ask: Ask) -> Remembered:
        """What to decide from while the database cannot be asked.

        Raises `StoreUnavailable` where that is not known, or was too long ago.
        """
        configuration, profile = self._remembered.configuration(), self._remembered.profile(ask.user_id)
        if configuration is None or profile is None:
            raise StoreUnavailable
        provider = configuration[0].providers.get(ask.provider)
        age = max(configuration[1], profile[1])
        if provider is None or age > self._degraded_for:
            raise StoreUnavailable
        return Remembered(configuration=configuration[0], provider=provider, profile=profile[0], age=age)

    # -- the plan ---------------------------------------------------------------------------------

    def plan(
        self,
        ask: Ask,
        configuration: Configuration,
        provider: Provider,
        profile: Profile,
        now: datetime,
    ) -> tuple[Plan, StoredKey | None, Secret | None]:
        """The plan, and the key it stands on, opened: a key that does not open is not usable.

        What depends on neither the time nor handles that failed is planned once for each profile. The
        secret is opened every time: it is not kept.
        """
        kind = (ask.provider, ask.constraint.value)
        planned: _Planned | None = profile.planned.get(kind)
        if planned is not None and planned.configuration is configuration and not ask.failed_key_handles:
            return planned.opened()
        stored = profile.keys_for(ask.provider)
        lasts = not ask.failed_key_handles and all(key.cooldown_until is None for key in stored)
        refused = self.refused_keys(ask)
        world = World(
            flags=configuration.flags,
            tier=profile.tier,
            tier_ranks=configuration.tier_ranks,
            keys=tuple(facts_of(key, was_refused=(key.id, key.revision) in refused) for key in stored),
            constraint=ask.constraint,
            provider_enabled=provider.is_enabled,
            encryption_configured=self._keyring is not None,
        )
        while True:
            plan = choose_route(world, now=now)
            key = next((key for key in stored if key.id == plan.key_id), None)
            opener = None
            try:
                if key is not None and self._keyring is not None:
                    opener = opener_of(self._keyring, ask.user_id, key)
                planned = _Planned(configuration=configuration, plan=plan, key=key, opener=opener)
                opened = planned.opened()
                if lasts:
                    profile.planned[kind] = planned
                return opened
            except Unreadable as error:
                if key is None:
                    raise
                lasts = False  # every decision tells of it
                self._on_unreadable(ask.user_id, key, error)
                world = replace(
                    world,
                    keys=tuple(
                        replace(facts, is_readable=False) if facts.id == key.id else facts
                        for facts in world.keys
                    ),
                )

    def refused_keys(self, ask: Ask) -> frozenset[tuple[UUID, int]]:
        """The keys that the caller says the provider refused, with the revision it was told of."""
        claims = [self._sealer.open_handle(handle) for handle in ask.failed_key_handles]
        for index, claim in enumerate(claims):
            if claim.user_id != ask.user_id:
                raise InvalidFields((f"failed_key_handles[{index}]", "This handle is another user's."))
        return frozenset((claim.key_id, claim.key_revision) for claim in claims)

    # -- credits ----------------------------------------------------------------------------------

    async def _ask_credits(
        self, ask: Ask, configuration: Configuration, profile: Profile, plan: Plan, now: datetime
    ) -> _CreditsAnswer:
        amount_micros = self.hold_micros(ask, configuration, now)
        hit = await self._limits.hit(ask.user_id, configuration.tier_of(profile.tier))
        if isinstance(hit, Limited):
            # A repeat that has its ticket is no new request.
            if ask.request_id is not None and (found := await self._holds.find(ask.user_id, ask.request_id)):
                return _held(ask, found)
            # The limit is on using credits: where they are short anyway, the own key is next in line.
            if Path.OWN_KEY in plan.paths:
                balance = await self._holds.balance(ask.user_id)
                if balance.available_micros < amount_micros:
                    return _CreditsAnswer(Credits.INSUFFICIENT)
            return _CreditsAnswer(Credits.RATE_LIMITED, retry_after=hit.retry_after)
        placed = False
        try:
            hold = await self._holds.place(
                HoldRequest(
                    id=new_id(),
                    user_id=ask.user_id,
                    request_id=ask.request_id,
                    provider=ask.provider,
                    model=ask.model,
                    service_type=ask.service_type,
                    mode=plan.mode.value,
                    reason=conclude(plan, Credits.HELD).reason.value,
                    amount_micros=amount_micros,
                    ttl=ask.hold_ttl or self._default_ttl,
                )
            )
            placed = hold.status is HoldStatus.PLACED
        finally:
            # Also when the caller went away: only a request that is made on credits counts.
            if not placed:
                await hit.refund()
        match hold.status:
            case HoldStatus.INSUFFICIENT:
                return _CreditsAnswer(Credits.INSUFFICIENT)
            case HoldStatus.IN_FLIGHT:
                return _CreditsAnswer(Credits.IN_FLIGHT, retry_after=IN_FLIGHT_RETRY)
            case HoldStatus.PLACED | HoldStatus.REPLAYED:
                return _held(ask, hold)

    def hold_micros(self, ask: Ask, configuration: Configuration, now: datetime) -> int:
        """What the request holds on the credits path, in micro-USD: its estimate, else the default."""
        if ask.cost_micros is not None:
            return ask.cost_micros
        if ask.tokens is not None:
            priced = self._prices.cost_micros(
                ask.provider, ask.model, ask.tokens, now=now, overrides=configuration.prices
            )
            if priced is not None:
                return priced
        return self._default_hold_micros

    # -- the answers ------------------------------------------------------------------------------

    def _own_key(
        self,
        ask: Ask,
        plan: Plan,
        verdict: Verdict,
        provider: Provider,
        key: StoredKey,
        secret: Secret | None,
        now: datetime,
    ) -> Decision:
        decision_id = new_id()
        expires_at = now + (ask.hold_ttl or self._default_ttl)
        handle = self._sealer.seal_handle(
            HandleClaims(
                decision_id=decision_id,
                user_id=ask.user_id,
                provider=ask.provider,
                model=ask.model,
                service_type=ask.service_type,
                mode=plan.mode.value,
                reason=verdict.reason.value,
                key_id=key.id,
                key_revision=key.revision,
                issued_at=now,
                expires_at=expires_at,
            )
        )
        return Decision(
            id=decision_id,
            mode=plan.mode,
            reason=verdict.reason,
            message=SENTENCES[verdict.reason],
            replayed=False,
            route=KeyRoute(
                handle=handle,
                key_id=key.id,
                hint=key.hint,
                secret=secret if ask.inline else None,
                provider=provider,
                expires_at=expires_at,
            ),
        )

    def _ticket(self, ask: Ask, plan: Plan, verdict: Verdict, hold: HoldAnswer) -> Decision:
        ticket = self._sealer.seal_ticket(
            TicketClaims(
                decision_id=hold.id,
                user_id=ask.user_id,
                provider=hold.provider,
                model=hold.model,
                service_type=hold.service_type,
                hold_micros=hold.amount_micros,
                issued_at=hold.created_at,
                expires_at=hold.expires_at,
            )
        )
        return Decision(
            id=hold.id,
            mode=plan.mode,
            reason=verdict.reason,
            message=_ticket_message(verdict, hold),
            replayed=hold.status is HoldStatus.REPLAYED,
            route=TicketRoute(
                ticket=ticket,
                hold_micros=hold.amount_micros,
                available_micros=hold.available_micros,
                expires_at=hold.expires_at,
            ),
        )

    def denial(self, plan: Plan, verdict: Verdict, retry_after: timedelta | None, now: datetime) -> Decision:
        reason = verdict.denial
        if reason is None:
            raise RuntimeError(f"a verdict with neither path nor denial: {verdict}")
        retryable = reason in RETRYABLE
        if reason is DenialReason.KEY_UNUSABLE and plan.keys_usable_at is not None:
            retryable, retry_after = True, plan.keys_usable_at - now
        return Decision(
            id=new_id(),
            mode=plan.mode,
            reason=verdict.reason,
            message=DENIALS[reason],
            replayed=False,
            route=Denied(
                reason=reason,
                retryable=retryable,
                retry_after=retry_after if retryable else None,
                suggestion=SUGGESTIONS[reason],
            ),
        )


def stands_first(path: Path, plan: Plan) -> bool:
    """Whether this is what pays, if it can."""
    return plan.paths[:1] == (path,)


def degraded(decision: Decision) -> Decision:
    """The decision as one that was made without the database."""
    message = f"{decision.message} The database cannot be reached: this is from what was last known."
    return replace(decision, message=message, degraded=True)


def open_key(keyring: Keyring, user_id: str, key: StoredKey) -> Secret:
    """The secret of a stored key. Raises `Unreadable`."""
    return opener_of(keyring, user_id, key)()


def opener_of(keyring: Keyring, user_id: str, key: StoredKey) -> Callable[[], Secret]:
    """What opens a stored key, over and over. Both raise `Unreadable`."""
    return opener(keyring, key.ciphertext, user_id=user_id, provider=key.provider, row_id=key.id)


def opens(keyring: Keyring | None, user_id: str, key: StoredKey) -> bool:
    """Whether a stored key opens; without a master key none does."""
    if keyring is None:
        return False
    try:
        open_key(keyring, user_id, key)
    except Unreadable:
        return False
    return True


def facts_of(key: StoredKey, *, is_readable: bool = True, was_refused: bool = False) -> KeyFacts:
    """What the policy needs to know of a stored key."""
    return KeyFacts(
        id=key.id,
        is_active=key.is_active,
        is_valid=key.is_valid,
        cooldown_until=key.cooldown_until,
        is_readable=is_readable,
        was_refused=was_refused,
    )


def state_of(key: StoredKey, now: datetime, *, is_readable: bool) -> KeyState:
    """Whether a stored key can be used now, and the first reason why not."""
    if not key.is_active:
        return KeyState.INACTIVE
    if not key.is_valid:
        return KeyState.INVALID
    if key.cooldown_until is not None and key.cooldown_until > now:
        return KeyState.COOLING_DOWN
    if not is_readable:
        return KeyState.UNREADABLE
    return KeyState.USABLE if key.is_verified else KeyState.UNVERIFIED


def _held(ask: Ask, hold: HoldAnswer) -> _CreditsAnswer:
    if hold.provider != ask.provider:
        raise RequestIdReused(hold.provider)
    return _CreditsAnswer(Credits.HELD, hold=hold)


def _ticket_message(verdict: Verdict, hold: HoldAnswer) -> str:
    sentence = SENTENCES[verdict.reason]
    if hold.status is HoldStatus.PLACED:
        return sentence
    return f"{sentence} This request_id was seen before: the ticket is its first one, which is {hold.state}."


def provider_of(configuration: Configuration, provider_id: str) -> Provider:
    """The provider that is asked for. Raises `InvalidFields` for one that nobody has described."""
    provider = configuration.providers.get(provider_id)
    if provider is None:
        raise InvalidFields(("provider", "There is no such provider in api_providers."))
    return provider
