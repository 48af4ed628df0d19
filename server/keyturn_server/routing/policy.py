"""Whose credential pays: the pure heart of Keyturn. Rules: DESIGN, "The policy"."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from keyturn_server.routing.model import (
    Constraint,
    Credits,
    DenialReason,
    Flags,
    Mode,
    Out,
    Path,
    Plan,
    Reason,
    Verdict,
    World,
)

_ORDER = {
    Mode.INTERNAL_ONLY: (Path.CREDITS,),
    Mode.BYOK_ONLY: (Path.OWN_KEY,),
    Mode.CREDIT_FIRST: (Path.CREDITS, Path.OWN_KEY),
    Mode.BYOK_FIRST: (Path.OWN_KEY, Path.CREDITS),
}


def is_eligible(flags: Flags, tier: str, tier_ranks: Mapping[str, int]) -> bool:
    """Whether the user's tier may bring keys. An unknown tier, or an unknown minimum, is below it."""
    rank = tier_ranks.get(tier)
    minimum = tier_ranks.get(flags.min_tier)
    return rank is not None and minimum is not None and rank >= minimum


def choose_route(world: World, *, now: datetime) -> Plan:
    """The paths to try, in order, and why each other path is out.

    An own key among the paths is usable and ends the search; credits may still turn out short, which
    only the ledger can tell. `conclude` joins the two.
    """
    mode = world.flags.mode
    key = next((key for key in world.keys if key.is_usable(now)), None)
    has_keys = any(key.is_active for key in world.keys)
    out: dict[Path, Out] = {}
    if (own_key := _own_key_out(world, mode, has_keys, usable=key is not None)) is not None:
        out[Path.OWN_KEY] = own_key
    if (credit := _credits_out(world, mode)) is not None:
        out[Path.CREDITS] = credit
    paths = tuple(path for path in _ORDER[mode] if path not in out)
    cooling = [
        key.cooldown_until
        for key in world.keys
        if key.cooldown_until is not None and not key.is_usable(now) and key.is_usable(key.cooldown_until)
    ]
    return Plan(
        mode=mode,
        paths=paths,
        out=out,
        key_id=key.id if key is not None and Path.OWN_KEY in paths else None,
        has_keys=has_keys,
        keys_usable_at=min(cooling, default=None),
    )


def _own_key_out(world: World, mode: Mode, has_keys: bool, *, usable: bool) -> Out | None:
    # The policy speaks before the caller, and both before the state of the keys.
    if not world.provider_enabled:
        return Out.PROVIDER_DISABLED
    if mode is Mode.INTERNAL_ONLY:
        return Out.BYOK_DISABLED
    if not is_eligible(world.flags, world.tier, world.tier_ranks):
        return Out.TIER
    if world.constraint is Constraint.CREDITS_ONLY:
        return Out.CONSTRAINT
    if not world.encryption_configured:
        return Out.ENCRYPTION
    if not has_keys:
        return Out.NO_KEY
    return None if usable else Out.KEYS_UNUSABLE


def _credits_out(world: World, mode: Mode) -> Out | None:
    if not world.provider_enabled:
        return Out.PROVIDER_DISABLED
    if mode is Mode.BYOK_ONLY:
        return Out.BYOK_ONLY
    if world.constraint is Constraint.OWN_KEY_ONLY:
        return Out.CONSTRAINT
    return None


def conclude(plan: Plan, balance: Credits | None) -> Verdict:
    """The verdict of a plan.

    `balance` is what came of asking for credits. It is needed where credits stand first among the
    paths (ValueError without), and may be None elsewhere. A rate limit denies and never reroutes.
    """
    for path in plan.paths:
        if path is Path.OWN_KEY:
            return Verdict(reason=_own_key_reason(plan), path=path)
        if balance is None:
            raise ValueError("credits stand first in this plan, and the balance was not asked")
        if balance is Credits.HELD:
            return Verdict(reason=_credits_reason(plan), path=path)
        if balance is Credits.RATE_LIMITED:
            return Verdict(reason=Reason.DENIED, denial=DenialReason.RATE_LIMITED)
    return Verdict(reason=Reason.DENIED, denial=_denial(plan, balance))


def _own_key_reason(plan: Plan) -> Reason:
    if plan.mode is Mode.BYOK_ONLY:
        return Reason.BYOK_ONLY_OWN_KEY
    if plan.mode is Mode.BYOK_FIRST:
        return Reason.BYOK_FIRST_OWN_KEY
    # CREDIT_FIRST: credits stood before it, and were either ruled out by the caller or too few.
    return Reason.CREDIT_FIRST_EXHAUSTED if Path.CREDITS in plan.paths else Reason.CALLER_CONSTRAINT


def _credits_reason(plan: Plan) -> Reason:
    own_key = plan.out.get(Path.OWN_KEY)
    if plan.mode is Mode.INTERNAL_ONLY:
        return Reason.BYOK_DISABLED
    if own_key is Out.TIER:
        return Reason.TIER_NOT_ELIGIBLE
    if plan.mode is Mode.CREDIT_FIRST:
        return Reason.CREDIT_FIRST_CREDITS
    if own_key is Out.CONSTRAINT:
        return Reason.CALLER_CONSTRAINT
    return Reason.BYOK_FIRST_KEY_FAILED if plan.has_keys else Reason.BYOK_FIRST_NO_KEY


# Why a denial, where only an own key may pay: by what keeps that path out.
_WITHOUT_CREDITS = {
    Out.PROVIDER_DISABLED: DenialReason.PROVIDER_DISABLED,
    Out.TIER: DenialReason.TIER_NOT_ELIGIBLE,
    Out.ENCRYPTION: DenialReason.ENCRYPTION_NOT_CONFIGURED,
    Out.KEYS_UNUSABLE: DenialReason.KEY_UNUSABLE,
    Out.BYOK_DISABLED: DenialReason.BYOK_REQUIRED,
    Out.CONSTRAINT: DenialReason.BYOK_REQUIRED,
    Out.NO_KEY: DenialReason.BYOK_REQUIRED,
}


def _denial(plan: Plan, balance: Credits | None) -> DenialReason:
    own_key = plan.out[Path.OWN_KEY]
    if Path.CREDITS in plan.out:
        return _WITHOUT_CREDITS[own_key]
    if balance is Credits.IN_FLIGHT:
        return DenialReason.HOLDS_IN_FLIGHT
    if own_key is Out.KEYS_UNUSABLE:
        return DenialReason.KEY_UNUSABLE
    if own_key in (Out.NO_KEY, Out.ENCRYPTION):
        return DenialReason.NO_KEY_AND_NO_CREDITS
    return DenialReason.INSUFFICIENT_CREDITS
