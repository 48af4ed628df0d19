"""Explain: what would `decide` answer now, and why? For support, operators, and on-call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from keyturn_server.configuration import Configuration, Provider
from keyturn_server.decide import (
    IN_FLIGHT_RETRY,
    Ask,
    Configurations,
    Decider,
    Decision,
    Holds,
    KeyRoute,
    Profiles,
    Remembered,
    TicketRoute,
    degraded,
    open_key,
    provider_of,
    stands_first,
    state_of,
)
from keyturn_server.errors import StoreUnavailable
from keyturn_server.ids import new_id
from keyturn_server.keys.envelope import Unreadable
from keyturn_server.keys.keyring import Keyring
from keyturn_server.ledger import Balance, KeyState
from keyturn_server.profiles import Profile, StoredKey
from keyturn_server.rate_limits import Limited, RateLimits
from keyturn_server.routing.model import Credits, DenialReason, Path, Plan, Verdict
from keyturn_server.routing.policy import conclude, is_eligible
from keyturn_server.routing.reasons import SENTENCES
from keyturn_server.scrub import scrub


@dataclass(frozen=True, slots=True)
class Step:
    """One step on the way to a decision, for people."""

    check: str
    result: str
    detail: str


class Explainer:
    """Explains decisions by making their plan, and asking the ledger and the limits without a hold."""

    def __init__(
        self,
        decider: Decider,
        *,
        configurations: Configurations,
        profiles: Profiles,
        holds: Holds,
        limits: RateLimits,
        keyring: Keyring | None,
        clock: Callable[[], datetime],
    ) -> None:
        self._decider = decider
        self._configurations = configurations
        self._profiles = profiles
        self._holds = holds
        self._limits = limits
        self._keyring = keyring
        self._clock = clock

    async def explain(self, ask: Ask) -> tuple[Decision, list[Step]]:
        """What `decide` would answer now, and the way to it. No hold, no rate-limit hit, no secret.

        Raises what `decide` raises, but for `RequestIdReused`: no request id is looked up.
        """
        last = None
        try:
            configuration = await self._configurations.get()
            provider = provider_of(configuration, ask.provider)
            profile = await self._profiles.get(ask.user_id)
        except StoreUnavailable:
            last = self._decider.remembered(ask)
            configuration, provider, profile = last.configuration, last.provider, last.profile
        now = self._clock()
        plan, key, _ = self._decider.plan(ask, configuration, provider, profile, now)
        amount_micros = self._decider.hold_micros(ask, configuration, now)
        balance = await self._balance(ask.user_id)
        limited = await self._limits.peek(ask.user_id, configuration.tier_of(profile.tier))

        answer = None
        if stands_first(Path.CREDITS, plan):
            if balance is None:
                raise StoreUnavailable
            answer = _credits_now(balance, amount_micros, limited, plan)
        verdict = conclude(plan, answer)
        if last is not None and verdict.path is not Path.OWN_KEY:
            raise StoreUnavailable
        decision = self._explained(plan, verdict, provider, key, amount_micros, balance, limited, now)
        if last is not None:
            decision = degraded(decision)
        steps = [
            *_database_steps(last, balance),
            *_flag_steps(configuration),
            Step("mode", plan.mode.value, "What the three flags make together."),
            Step("provider", "enabled" if provider.is_enabled else "disabled", provider.id),
            *_tier_steps(configuration, profile),
            *self._key_steps(ask, profile, now),
            _credits_step(balance, amount_micros),
            Step(
                "rate limit",
                "reached" if limited else "room",
                f"On the credits path; again in {limited.retry_after.total_seconds():.0f} s."
                if limited
                else "On the credits path.",
            ),
            *(
                Step(f"path {path.value}", "tried" if path in plan.paths else "out", _why(plan, path))
                for path in Path
            ),
            Step("route", verdict.path.value if verdict.path else "denied", decision.message),
        ]
        return decision, steps

    async def _balance(self, user_id: str) -> Balance | None:
        """The user's credits; None while nobody can say."""
        try:
            return await self._holds.balance(user_id)
        except StoreUnavailable:
            return None

    def _explained(
        self,
        plan: Plan,
        verdict: Verdict,
        provider: Provider,
        key: StoredKey | None,
        amount_micros: int,
        balance: Balance | None,
        limited: Limited | None,
        now: datetime,
    ) -> Decision:
        if verdict.path is None:
            waits = {
                DenialReason.RATE_LIMITED: limited.retry_after if limited else None,
                DenialReason.HOLDS_IN_FLIGHT: IN_FLIGHT_RETRY,
            }
            denial = verdict.denial
            return self._decider.denial(plan, verdict, waits.get(denial) if denial else None, now)
        route: KeyRoute | TicketRoute
        if verdict.path is Path.OWN_KEY and key is not None:
            route = KeyRoute(
                handle="",
                key_id=key.id,
                hint=key.hint,
                secret=None,
                provider=provider,
                expires_at=now,
            )
        elif balance is None:
            raise StoreUnavailable
        else:
            route = TicketRoute(
                ticket="",
                hold_micros=amount_micros,
                available_micros=balance.available_micros - amount_micros,
                expires_at=now,
            )
        return Decision(
            id=new_id(),
            mode=plan.mode,
            reason=verdict.reason,
            message=SENTENCES[verdict.reason],
            replayed=False,
            route=route,
        )

    def _key_steps(self, ask: Ask, profile: Profile, now: datetime) -> list[Step]:
        stored = profile.keys_for(ask.provider)
        if not stored:
            return [Step("keys", "none", f"The user has no key for {ask.provider}.")]
        refused = self._decider.refused_keys(ask)
        return [Step(f"key {key.id}", *self._key_result(ask, key, refused, now)) for key in stored]

    def _key_result(
        self, ask: Ask, key: StoredKey, refused: frozenset[tuple[UUID, int]], now: datetime
    ) -> tuple[str, str]:
        shown = f"Label {key.label!r}, priority {key.priority}, ending in {key.hint!r}."
        sealed = self._why_sealed(ask, key)
        state = state_of(key, now, is_readable=sealed is None)
        if state is KeyState.INACTIVE:
            return "inactive", f"Switched off. {shown}"
        if state is KeyState.INVALID:
            return "invalid", f"{_said(key) or 'The provider refused it.'} {shown}"
        if (key.id, key.revision) in refused:
            return "refused", f"Among the failed_key_handles of this request. {shown}"
        if state is KeyState.COOLING_DOWN and key.cooldown_until is not None:
            until = f"Until {key.cooldown_until:%Y-%m-%d %H:%M:%S} UTC."
            return "cooling down", " ".join(filter(None, (until, _said(key), shown)))
        if sealed is not None:
            return ("sealed" if self._keyring is None else "unreadable"), f"{sealed} {shown}"
        return ("usable" if state is KeyState.USABLE else "usable, unverified"), shown

    def _why_sealed(self, ask: Ask, key: StoredKey) -> str | None:
        """Why the key does not open; None when it does."""
        if self._keyring is None:
            return "This sidecar has no ENCRYPTION_KEY."
        try:
            open_key(self._keyring, ask.user_id, key)
        except Unreadable as error:
            return str(error)
        return None


def _said(key: StoredKey) -> str:
    """What was last said against the key; empty when nobody said anything. Rows of other gateways hold
    what those thought fit, so it is scrubbed."""
    said = scrub(key.last_error)
    return said if not said or said[-1] in ".!?…" else f"{said}."


def _credits_now(balance: Balance, amount_micros: int, limited: Limited | None, plan: Plan) -> Credits:
    covered = balance.available_micros >= amount_micros
    if limited and (covered or Path.OWN_KEY not in plan.paths):
        return Credits.RATE_LIMITED
    if covered:
        return Credits.HELD
    return Credits.IN_FLIGHT if balance.balance_micros >= amount_micros else Credits.INSUFFICIENT


def _database_steps(last: Remembered | None, balance: Balance | None) -> list[Step]:
    """Only where it cannot be asked: otherwise there is nothing to say of it."""
    if last is not None:
        seconds = last.age.total_seconds()
        return [
            Step(
                "database",
                "away",
                f"Flags, tier and keys are as they were last known, {seconds:.0f} s ago: "
                "what has changed since, nobody here has heard of.",
            )
        ]
    if balance is None:
        return [Step("database", "away", "Flags, tier and keys are cached, and known to be up to date.")]
    return []


def _credits_step(balance: Balance | None, amount_micros: int) -> Step:
    if balance is None:
        return Step(
            "credits", "unknown", f"The database cannot be asked; a request holds {_usd(amount_micros)}."
        )
    return Step(
        "credits",
        "enough" if balance.available_micros >= amount_micros else "short",
        f"Balance {_usd(balance.balance_micros)}, held {_usd(balance.held_micros)}, "
        f"available {_usd(balance.available_micros)}; this request holds {_usd(amount_micros)}.",
    )


def _flag_steps(configuration: Configuration) -> list[Step]:
    flags = configuration.flags
    values: dict[str, Any] = {
        "byok_enabled": flags.byok_enabled,
        "byok_only_mode": flags.byok_only_mode,
        "byok_uses_internal_credits": flags.byok_uses_internal_credits,
    }
    return [
        Step(f"flag {key}", str(value).lower(), _origin(configuration, key)) for key, value in values.items()
    ]


def _origin(configuration: Configuration, key: str) -> str:
    """Where a flag's value comes from."""
    change = configuration.flag_changes.get(key)
    if key in configuration.flags_missing:
        origin = "The default: there is no such row in feature_flags"
    else:
        origin = "From feature_flags"
    if change is None:
        return f"{origin}."
    why = f": {change.reason!r}" if change.reason else ""
    return f"{origin}, changed by {change.changed_by} at {change.changed_at:%Y-%m-%d %H:%M:%S} UTC{why}."


def _tier_steps(configuration: Configuration, profile: Profile) -> list[Step]:
    eligible = is_eligible(configuration.flags, profile.tier, configuration.tier_ranks)
    return [
        Step(
            "tier",
            "eligible" if eligible else "not eligible",
            f"The user's tier is {profile.tier!r}; own keys are for {configuration.flags.min_tier!r} "
            "and above.",
        )
    ]


def _why(plan: Plan, path: Path) -> str:
    out = plan.out.get(path)
    if out is not None:
        return f"Out: {out.value}."
    if path in plan.paths:
        return f"Number {plan.paths.index(path) + 1} in order."
    return "Not part of this mode."


def _usd(micros: int) -> str:
    return f"{'-' if micros < 0 else ''}${abs(micros) / 1_000_000:.6f}"
