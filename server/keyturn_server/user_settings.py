"""What a product's own page of API keys shows to a user: who pays now, and what is missing.

The same policy decides here as in `decide`, once over all of the user's keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Protocol

from keyturn_server.configuration import Configuration
from keyturn_server.decide import Configurations, Profiles, facts_of, opens
from keyturn_server.keys.keyring import Keyring
from keyturn_server.ledger import Balance
from keyturn_server.profiles import Profile
from keyturn_server.routing.model import Credits, DenialReason, Mode, Path, Reason, Verdict, World
from keyturn_server.routing.policy import choose_route, conclude, is_eligible


class PaymentState(Enum):
    """Who pays for a user's requests, as a page shows it."""

    USING_OWN_KEYS = "USING_OWN_KEYS"
    USING_CREDITS = "USING_CREDITS"
    ACTION_REQUIRED = "ACTION_REQUIRED"


@dataclass(frozen=True, slots=True, kw_only=True)
class UserSettings:
    """What to show on a user's page of API keys."""

    page_visible: bool
    """Whether the user may bring keys at all."""
    mode: Mode
    state: PaymentState
    action_reason: DenialReason | None
    """What is missing, where action is required."""
    message: str
    """One plain sentence for the user."""
    providers_with_keys: tuple[str, ...]
    has_credits: bool


_MESSAGES: dict[Reason | DenialReason, str] = {
    Reason.BYOK_FIRST_OWN_KEY: "Your own keys pay for your requests.",
    Reason.BYOK_ONLY_OWN_KEY: "Your own keys pay for your requests.",
    Reason.CREDIT_FIRST_EXHAUSTED: "Your credits are used up, and your own keys pay for your requests.",
    Reason.CREDIT_FIRST_CREDITS: "Your credits pay for your requests.",
    Reason.BYOK_DISABLED: "Your credits pay for your requests.",
    Reason.BYOK_FIRST_NO_KEY: "Your credits pay for your requests until you add a key of your own.",
    Reason.BYOK_FIRST_KEY_FAILED: (
        "None of your keys can be used right now, and your credits pay for your requests."
    ),
    Reason.TIER_NOT_ELIGIBLE: "Your credits pay for your requests; keys of your own need a higher tier.",
    DenialReason.BYOK_REQUIRED: "Add a key of your own: credits do not pay for requests.",
    DenialReason.KEY_UNUSABLE: "None of your keys can be used right now: test or replace them.",
    DenialReason.TIER_NOT_ELIGIBLE: "Only own keys pay for requests, and they need a higher tier: upgrade.",
    DenialReason.INSUFFICIENT_CREDITS: "You have not enough credits left: buy some.",
    DenialReason.NO_KEY_AND_NO_CREDITS: (
        "You have no key that can be used and not enough credits left: add a key or buy credits."
    ),
    DenialReason.ENCRYPTION_NOT_CONFIGURED: (
        "Own keys cannot be used until an operator of this service has set it up for them."
    ),
}


def settings_of(
    configuration: Configuration,
    profile: Profile,
    balance: Balance,
    *,
    keyring: Keyring | None,
    hold_micros: int,
    now: datetime,
) -> UserSettings:
    """What the page shows. Pure.

    Keys for providers that are switched off do not count; those that do not open count as unusable.
    Credits count when what no open hold takes up covers a request of `hold_micros`.
    """
    keys = tuple(key for key in profile.keys if _is_offered(configuration, key.provider))
    world = World(
        flags=configuration.flags,
        tier=profile.tier,
        tier_ranks=configuration.tier_ranks,
        keys=tuple(facts_of(key, is_readable=opens(keyring, profile.user_id, key)) for key in keys),
        encryption_configured=keyring is not None,
    )
    has_credits = balance.available_micros >= max(hold_micros, 1)
    plan = choose_route(world, now=now)
    verdict = conclude(plan, Credits.HELD if has_credits else Credits.INSUFFICIENT)
    return UserSettings(
        page_visible=configuration.flags.byok_enabled
        and is_eligible(world.flags, world.tier, world.tier_ranks),
        mode=plan.mode,
        state=_state(verdict),
        action_reason=verdict.denial,
        message=_MESSAGES[verdict.denial or verdict.reason],
        providers_with_keys=tuple(sorted({key.provider for key in keys if key.is_active})),
        has_credits=has_credits,
    )


def _is_offered(configuration: Configuration, provider: str) -> bool:
    found = configuration.providers.get(provider)
    return found is not None and found.is_enabled


def _state(verdict: Verdict) -> PaymentState:
    match verdict.path:
        case Path.OWN_KEY:
            return PaymentState.USING_OWN_KEYS
        case Path.CREDITS:
            return PaymentState.USING_CREDITS
        case None:
            return PaymentState.ACTION_REQUIRED


class Balances(Protocol):
    """Where balances come from: never a cache."""

    async def balance(self, user_id: str) -> Balance: ...


class SettingsPage:
    """Reads what `settings_of` needs. `clock` tells the time."""

    def __init__(
        self,
        *,
        configurations: Configurations,
        profiles: Profiles,
        balances: Balances,
        keyring: Keyring | None,
        default_hold_micros: int,
        clock: Callable[[], datetime],
    ) -> None:
        self._configurations = configurations
        self._profiles = profiles
        self._balances = balances
        self._keyring = keyring
        self._default_hold_micros = default_hold_micros
        self._clock = clock

    async def of(self, user_id: str) -> UserSettings:
        """What the page shows to the user now. Raises `UserNotFound` and `StoreUnavailable`."""
        return settings_of(
            await self._configurations.get(),
            await self._profiles.get(user_id),
            await self._balances.balance(user_id),
            keyring=self._keyring,
            hold_micros=self._default_hold_micros,
            now=self._clock(),
        )
