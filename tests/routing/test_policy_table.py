"""The policy against its mode table: every combination by the oracle, the rules one by one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import product, starmap
from pathlib import Path as FilePath
from typing import Any, NamedTuple
from uuid import UUID

import pytest

from keyturn_server.routing.model import (
    Constraint,
    Credits,
    DenialReason,
    Flags,
    KeyFacts,
    Mode,
    Out,
    Path,
    Plan,
    Reason,
    Verdict,
    World,
)
from keyturn_server.routing.policy import choose_route, conclude
from keyturn_server.routing.reasons import DENIALS, RETRYABLE, SENTENCES, SUGGESTIONS
from tests.routing import oracle
from tests.routing.oracle import KeyIs

# Long ago, so that a policy that looks at the clock instead of `now` finds no key cooling down.
NOW = datetime(2001, 9, 9, 1, 46, 40, tzinfo=UTC)
MINUTE = timedelta(minutes=1)

# Ranks leave gaps, begin at 0 and are not in order, so that only their comparison can be meant.
TIER_RANKS = {"premium": 30, "community": 0, "lifetime": 31, "free": 1, "subscriber": 20}
TIERS = ("community", "free", "subscriber", "premium", "lifetime", "platinum", "")

KEY_IDS = (UUID(int=0xA), UUID(int=0xB))
KEY_FACTS: dict[KeyIs, dict[str, Any]] = {
    KeyIs.USABLE: {},
    KeyIs.COOLED: {"cooldown_until": NOW - MINUTE},
    KeyIs.COOLED_NOW: {"cooldown_until": NOW},
    KeyIs.COOLING: {"cooldown_until": NOW + MINUTE},
    KeyIs.INVALID: {"is_valid": False},
    KeyIs.UNREADABLE: {"is_readable": False},
    KeyIs.REFUSED: {"was_refused": True},
    KeyIs.INACTIVE: {"is_active": False},
}
KEY_STATES = tuple(KeyIs)
NO_KEY_OR_ONE: list[tuple[KeyIs, ...]] = [(), *product(KEY_STATES)]
UP_TO_TWO_KEYS: list[tuple[KeyIs, ...]] = [*NO_KEY_OR_ONE, *product(KEY_STATES, repeat=2)]


def stored(*states: KeyIs) -> tuple[KeyFacts, ...]:
    """Keys in these states, best priority first."""
    return tuple(KeyFacts(id=id_, **KEY_FACTS[state]) for id_, state in zip(KEY_IDS, states, strict=False))


class FlagRows(NamedTuple):
    """The rows of `feature_flags`, and what they come to."""

    byok_enabled: bool
    byok_only_mode: bool
    byok_uses_internal_credits: bool
    min_tier: str
    flags: Flags


class Combination(NamedTuple):
    """One point of the table; as a string it names itself in a failure."""

    rows: FlagRows
    tier: str
    keys: tuple[KeyIs, ...]
    constraint: Constraint
    provider_enabled: bool
    encryption_configured: bool

    def __str__(self) -> str:
        return (
            f"{self.rows.flags} tier={self.tier!r} keys={[key.value for key in self.keys]} "
            f"constraint={self.constraint.name} provider_enabled={self.provider_enabled} "
            f"encryption_configured={self.encryption_configured}"
        )


def every_flag_row() -> Iterator[FlagRows]:
    """Each setting of the three flags and of `min_tier`; then no row at all."""
    switches = product((True, False), repeat=3)
    for (enabled, only, credits_first), min_tier in product(switches, oracle.MAY_BRING_KEYS):
        flags = Flags(
            byok_enabled=enabled,
            byok_only_mode=only,
            byok_uses_internal_credits=credits_first,
            min_tier=min_tier,
        )
        yield FlagRows(enabled, only, credits_first, min_tier, flags)
    yield FlagRows(True, False, False, "premium", Flags())


def combinations(key_lists: Sequence[tuple[KeyIs, ...]]) -> Iterator[Combination]:
    """Every world over these lists of keys."""
    return starmap(
        Combination,
        product(
            every_flag_row(),
            TIERS,
            key_lists,
            Constraint,
            (True, False),
            (True, False),
        ),
    )


def world_of(combination: Combination, keys: tuple[KeyFacts, ...]) -> World:
    return World(
        flags=combination.rows.flags,
        tier=combination.tier,
        tier_ranks=TIER_RANKS,
        keys=keys,
        constraint=combination.constraint,
        provider_enabled=combination.provider_enabled,
        encryption_configured=combination.encryption_configured,
    )


def test_the_policy_agrees_with_the_table_on_every_combination() -> None:
    facts = {states: stored(*states) for states in UP_TO_TWO_KEYS}
    words = {states: oracle.keys_are(states) for states in UP_TO_TWO_KEYS}
    first = {
        states: None if (at := oracle.first_usable(states)) is None else KEY_IDS[at]
        for states in UP_TO_TWO_KEYS
    }
    worlds = verdicts = 0
    modes: set[Mode] = set()
    given: set[Verdict] = set()
    read: set[oracle.Row] = set()

    for combination in combinations(UP_TO_TWO_KEYS):
        rows, tier, keys, constraint, provider_enabled, encryption_configured = combination
        row = oracle.row_for(
            oracle.MODES[rows.byok_enabled, rows.byok_only_mode, rows.byok_uses_internal_credits],
            tier,
            rows.min_tier,
            constraint,
            keys=words[keys],
            encryption_configured=encryption_configured,
            provider_enabled=provider_enabled,
        )
        plan = choose_route(world_of(combination, facts[keys]), now=NOW)

        assert (plan.mode, plan.paths, plan.key_id, plan.has_keys) == (
            row.mode,
            row.paths,
            first[keys] if Path.OWN_KEY in row.paths else None,
            words[keys] != "none",
        ), str(combination)
        for balance, expected in row.verdicts.items():
            verdict = conclude(plan, balance)
            assert verdict == expected, f"{combination} balance={balance}"
            given.add(verdict)
            verdicts += 1
        worlds += 1
        modes.add(plan.mode)
        read.add(row)

    print(f"{worlds:,} worlds, {verdicts:,} verdicts")
    # (8 flag settings x 5 min_tier + no rows) x 7 tiers x (1 + 8 + 8 x 8) lists of keys
    # x 3 constraints x provider on, off x encryption on, off; then x 4 answers of the balance.
    assert worlds == (8 * 5 + 1) * 7 * 73 * 3 * 2 * 2 == 251_412
    assert verdicts == worlds * 4 == 1_005_648
    assert modes == set(Mode)
    assert {verdict.reason for verdict in given} == set(Reason)
    assert {verdict.denial for verdict in given} == {None, *DenialReason}
    assert read == {*oracle.ROWS, *oracle.SWITCHED_OFF.values()}, "a line that nothing reads"


# The rules one by one.

BYOK_FIRST = Flags()
CREDIT_FIRST = Flags(byok_uses_internal_credits=True)
BYOK_ONLY = Flags(byok_only_mode=True)
INTERNAL_ONLY = Flags(byok_enabled=False)

SHORT = (Credits.INSUFFICIENT, Credits.IN_FLIGHT)
BROKEN = (KeyIs.COOLING, KeyIs.INVALID, KeyIs.UNREADABLE, KeyIs.REFUSED)


def plan_for(
    flags: Flags,
    *keys: KeyIs,
    tier: str = "premium",
    constraint: Constraint = Constraint.ANY,
    provider_enabled: bool = True,
    encryption_configured: bool = True,
) -> Plan:
    return choose_route(
        World(
            flags=flags,
            tier=tier,
            tier_ranks=TIER_RANKS,
            keys=stored(*keys),
            constraint=constraint,
            provider_enabled=provider_enabled,
            encryption_configured=encryption_configured,
        ),
        now=NOW,
    )


def own_key(reason: Reason) -> Verdict:
    return Verdict(reason=reason, path=Path.OWN_KEY)


def credits_pay(reason: Reason) -> Verdict:
    return Verdict(reason=reason, path=Path.CREDITS)


def denied(denial: DenialReason) -> Verdict:
    return Verdict(reason=Reason.DENIED, denial=denial)


@pytest.mark.parametrize("enabled", [True, False, None])
@pytest.mark.parametrize("only", [True, False, None])
@pytest.mark.parametrize("credits_first", [True, False, None])
def test_a_missing_flag_row_means_its_default(
    enabled: bool | None, only: bool | None, credits_first: bool | None
) -> None:
    rows: dict[str, Any] = {
        "byok_enabled": enabled,
        "byok_only_mode": only,
        "byok_uses_internal_credits": credits_first,
    }
    flags = Flags(**{key: value for key, value in rows.items() if value is not None})

    expected = oracle.MODES[enabled is not False, only is True, credits_first is True]
    assert flags.mode is expected
    assert flags.min_tier == "premium"
    assert plan_for(flags).mode is expected


def test_byok_first_uses_the_own_key_and_asks_no_balance() -> None:
    plan = plan_for(BYOK_FIRST, KeyIs.USABLE)

    assert plan.paths == (Path.OWN_KEY, Path.CREDITS)
    for balance in (None, *Credits):
        assert conclude(plan, balance) == own_key(Reason.BYOK_FIRST_OWN_KEY)


def test_byok_first_falls_back_on_credits_and_says_whether_a_key_needs_attention() -> None:
    assert conclude(plan_for(BYOK_FIRST), Credits.HELD) == credits_pay(Reason.BYOK_FIRST_NO_KEY)
    for state in BROKEN:
        plan = plan_for(BYOK_FIRST, state)
        assert conclude(plan, Credits.HELD) == credits_pay(Reason.BYOK_FIRST_KEY_FAILED)
        assert conclude(plan, Credits.INSUFFICIENT) == denied(DenialReason.KEY_UNUSABLE)


def test_credit_first_keeps_the_own_key_for_when_credits_run_out() -> None:
    plan = plan_for(CREDIT_FIRST, KeyIs.USABLE)

    assert plan.paths == (Path.CREDITS, Path.OWN_KEY)
    assert conclude(plan, Credits.HELD) == credits_pay(Reason.CREDIT_FIRST_CREDITS)
    for short in SHORT:
        assert conclude(plan, short) == own_key(Reason.CREDIT_FIRST_EXHAUSTED)


def test_byok_only_denies_rather_than_spend_credits() -> None:
    assert conclude(plan_for(BYOK_ONLY, KeyIs.USABLE), None) == own_key(Reason.BYOK_ONLY_OWN_KEY)
    assert conclude(plan_for(BYOK_ONLY), None) == denied(DenialReason.BYOK_REQUIRED)
    for state in BROKEN:
        assert conclude(plan_for(BYOK_ONLY, state), None) == denied(DenialReason.KEY_UNUSABLE)


def test_byok_only_never_ends_on_credits() -> None:
    for combination in combinations(NO_KEY_OR_ONE):
        plan = choose_route(world_of(combination, stored(*combination.keys)), now=NOW)
        if plan.mode is Mode.BYOK_ONLY:
            assert Path.CREDITS not in plan.paths, str(combination)
            for balance in (None, *Credits):
                assert conclude(plan, balance).path is not Path.CREDITS, f"{combination} balance={balance}"


def test_byok_only_overrides_credits_first() -> None:
    both = Flags(byok_only_mode=True, byok_uses_internal_credits=True)

    assert plan_for(both, KeyIs.USABLE) == plan_for(BYOK_ONLY, KeyIs.USABLE)


def test_with_byok_switched_off_credits_pay_whatever_keys_there_are() -> None:
    plan = plan_for(INTERNAL_ONLY, KeyIs.USABLE)

    assert plan.paths == (Path.CREDITS,)
    assert plan.key_id is None
    assert conclude(plan, Credits.HELD) == credits_pay(Reason.BYOK_DISABLED)
    assert conclude(plan, Credits.INSUFFICIENT) == denied(DenialReason.INSUFFICIENT_CREDITS)


@pytest.mark.parametrize("tier", ["community", "free", "subscriber", "platinum", ""])
def test_a_tier_below_the_minimum_pays_with_credits_or_not_at_all(tier: str) -> None:
    for flags in (BYOK_FIRST, CREDIT_FIRST):
        plan = plan_for(flags, KeyIs.USABLE, tier=tier)
        assert plan.paths == (Path.CREDITS,)
        assert conclude(plan, Credits.HELD) == credits_pay(Reason.TIER_NOT_ELIGIBLE)

    plan = plan_for(BYOK_ONLY, KeyIs.USABLE, tier=tier)
    assert conclude(plan, None) == denied(DenialReason.TIER_NOT_ELIGIBLE)


@pytest.mark.parametrize("tier", ["premium", "lifetime"])
def test_premium_and_lifetime_may_bring_keys(tier: str) -> None:
    assert plan_for(BYOK_FIRST, KeyIs.USABLE, tier=tier).key_id == KEY_IDS[0]


@pytest.mark.parametrize("tier", TIERS)
def test_a_minimum_that_no_tier_is_called_lets_nobody_bring_keys(tier: str) -> None:
    plan = plan_for(Flags(min_tier="platinum"), KeyIs.USABLE, tier=tier)

    assert plan.out == {Path.OWN_KEY: Out.TIER}


@pytest.mark.parametrize("flags", [BYOK_FIRST, CREDIT_FIRST, INTERNAL_ONLY])
def test_a_rate_limit_never_reroutes_to_the_own_key(flags: Flags) -> None:
    for combination in combinations(NO_KEY_OR_ONE):
        if combination.rows.flags != flags:
            continue
        plan = choose_route(world_of(combination, stored(*combination.keys)), now=NOW)
        if plan.paths[:1] == (Path.CREDITS,):
            limited = conclude(plan, Credits.RATE_LIMITED)
            assert limited == denied(DenialReason.RATE_LIMITED), str(combination)


def test_an_own_key_bypasses_the_rate_limit_on_credits() -> None:
    for flags in (BYOK_FIRST, BYOK_ONLY):
        plan = plan_for(flags, KeyIs.USABLE)
        assert conclude(plan, Credits.RATE_LIMITED).path is Path.OWN_KEY


@pytest.mark.parametrize("flags", [BYOK_FIRST, CREDIT_FIRST, INTERNAL_ONLY])
def test_a_balance_that_open_holds_take_up_is_worth_another_try(flags: Flags) -> None:
    verdict = conclude(plan_for(flags), Credits.IN_FLIGHT)

    assert verdict == denied(DenialReason.HOLDS_IN_FLIGHT)
    assert verdict.denial in RETRYABLE


@pytest.mark.parametrize("state", [*BROKEN, KeyIs.INACTIVE])
def test_a_key_that_is_out_gives_way_to_the_next_by_priority(state: KeyIs) -> None:
    for flags in (BYOK_FIRST, CREDIT_FIRST, BYOK_ONLY):
        assert plan_for(flags, KeyIs.USABLE, KeyIs.USABLE).key_id == KEY_IDS[0]
        assert plan_for(flags, state, KeyIs.USABLE).key_id == KEY_IDS[1]


def test_a_key_is_usable_again_at_the_very_moment_its_cooldown_ends() -> None:
    key = KeyFacts(id=KEY_IDS[0], cooldown_until=NOW)
    world = World(flags=BYOK_ONLY, tier="premium", tier_ranks=TIER_RANKS, keys=(key,))

    assert choose_route(world, now=NOW - timedelta(microseconds=1)).key_id is None
    assert choose_route(world, now=NOW).key_id == key.id


def test_waiting_is_offered_only_where_a_key_will_come_back_by_itself() -> None:
    def usable_at(*keys: KeyFacts) -> datetime | None:
        world = World(flags=BYOK_ONLY, tier="premium", tier_ranks=TIER_RANKS, keys=keys)
        return choose_route(world, now=NOW).keys_usable_at

    cooling = KeyFacts(id=KEY_IDS[0], cooldown_until=NOW + MINUTE)
    cooling_longer = KeyFacts(id=KEY_IDS[1], cooldown_until=NOW + 2 * MINUTE)
    assert usable_at(cooling) == NOW + MINUTE
    assert usable_at(cooling_longer, cooling) == NOW + MINUTE
    assert usable_at(*stored(KeyIs.INVALID), cooling_longer) == NOW + 2 * MINUTE
    assert usable_at() is None
    for state in (KeyIs.INVALID, KeyIs.UNREADABLE, KeyIs.REFUSED, KeyIs.INACTIVE):
        lost = KeyFacts(id=KEY_IDS[0], **KEY_FACTS[state] | {"cooldown_until": NOW + MINUTE})
        assert usable_at(lost) is None, state


def test_an_inactive_key_counts_as_none() -> None:
    for flags, balance in product((BYOK_FIRST, CREDIT_FIRST, BYOK_ONLY, INTERNAL_ONLY), Credits):
        without, inactive = plan_for(flags), plan_for(flags, KeyIs.INACTIVE)
        assert inactive == without
        assert conclude(inactive, balance) == conclude(without, balance)


def test_without_an_encryption_key_own_keys_are_out_and_credits_go_on_working() -> None:
    for flags in (BYOK_FIRST, CREDIT_FIRST):
        plan = plan_for(flags, KeyIs.USABLE, encryption_configured=False)
        assert plan.paths == (Path.CREDITS,)
        assert conclude(plan, Credits.HELD).path is Path.CREDITS

    plan = plan_for(BYOK_ONLY, KeyIs.USABLE, encryption_configured=False)
    assert conclude(plan, None) == denied(DenialReason.ENCRYPTION_NOT_CONFIGURED)


def test_a_provider_that_is_switched_off_is_denied_before_all_else() -> None:
    for combination in combinations(NO_KEY_OR_ONE):
        if not combination.provider_enabled:
            plan = choose_route(world_of(combination, stored(*combination.keys)), now=NOW)
            assert plan.paths == (), str(combination)
            assert conclude(plan, None) == denied(DenialReason.PROVIDER_DISABLED), str(combination)


def test_a_constraint_is_named_only_where_it_took_out_the_first_path() -> None:
    def reason(flags: Flags, constraint: Constraint) -> Reason:
        return conclude(plan_for(flags, KeyIs.USABLE, constraint=constraint), Credits.HELD).reason

    assert reason(BYOK_FIRST, Constraint.CREDITS_ONLY) is Reason.CALLER_CONSTRAINT
    assert reason(BYOK_FIRST, Constraint.OWN_KEY_ONLY) is Reason.BYOK_FIRST_OWN_KEY
    assert reason(CREDIT_FIRST, Constraint.OWN_KEY_ONLY) is Reason.CALLER_CONSTRAINT
    assert reason(CREDIT_FIRST, Constraint.CREDITS_ONLY) is Reason.CREDIT_FIRST_CREDITS


def test_a_constraint_tightens_the_policy_and_never_relaxes_it() -> None:
    may_pay = {Constraint.OWN_KEY_ONLY: {Path.OWN_KEY}, Constraint.CREDITS_ONLY: {Path.CREDITS}}

    for combination in combinations(NO_KEY_OR_ONE):
        if combination.constraint is Constraint.ANY:
            continue
        keys = stored(*combination.keys)
        free = choose_route(world_of(combination._replace(constraint=Constraint.ANY), keys), now=NOW)
        bound = choose_route(world_of(combination, keys), now=NOW)
        left = set(free.paths) & may_pay[combination.constraint]
        assert set(bound.paths) == left, str(combination)
        for balance in Credits:
            path = conclude(bound, balance).path
            assert path in {None, *bound.paths}, f"{combination} balance={balance}"


def test_a_path_that_is_out_is_out_for_a_reason_that_holds() -> None:
    for combination in combinations(NO_KEY_OR_ONE):
        rows, tier, keys, constraint, provider_enabled, encryption_configured = combination
        holds = {
            Out.PROVIDER_DISABLED: not provider_enabled,
            Out.BYOK_DISABLED: not rows.byok_enabled,
            Out.TIER: tier not in oracle.MAY_BRING_KEYS[rows.min_tier],
            Out.CONSTRAINT: constraint is not Constraint.ANY,
            Out.BYOK_ONLY: rows.byok_enabled and rows.byok_only_mode,
            Out.ENCRYPTION: not encryption_configured,
            Out.NO_KEY: oracle.keys_are(keys) == "none",
            Out.KEYS_UNUSABLE: oracle.keys_are(keys) == "broken",
        }
        plan = choose_route(world_of(combination, stored(*keys)), now=NOW)
        assert {*plan.paths, *plan.out} == set(Path), str(combination)
        assert not set(plan.paths) & set(plan.out), str(combination)
        assert all(holds[out] for out in plan.out.values()), f"{combination} out={plan.out}"


def test_every_reason_and_denial_has_a_sentence_and_every_denial_a_way_out() -> None:
    assert set(SENTENCES) == set(Reason) - {Reason.DENIED}, "a denial speaks for itself"
    assert set(DENIALS) == set(SUGGESTIONS) == set(DenialReason)
    for texts in (SENTENCES.values(), DENIALS.values(), SUGGESTIONS.values()):
        assert all(text.endswith(".") and text.count(". ") == 0 for text in texts)
    assert len({*SENTENCES.values(), *DENIALS.values()}) == len(SENTENCES) + len(DENIALS)


def test_the_policy_loads_from_the_standard_library_alone() -> None:
    server = FilePath(__file__).parents[2] / "server"
    program = (
        "import json, sys\n"
        "from keyturn_server.routing import model, policy, reasons\n"
        "print(json.dumps([policy.__file__, *sys.modules]))"
    )
    # -S: no site-packages, so that any other import fails.
    run = subprocess.run(
        [sys.executable, "-S", "-c", program],
        env={**os.environ, "PYTHONPATH": str(server)},
        capture_output=True,
        text=True,
        check=True,
    )

    file, *modules = json.loads(run.stdout)
    roots = {module.partition(".")[0] for module in modules} - {"__main__"}
    assert FilePath(file).is_relative_to(server)
    assert roots - sys.stdlib_module_names == {"keyturn_server"}
    assert not roots & {"asyncio", "socket", "ssl", "subprocess", "threading"}
    assert {module for module in modules if module.startswith("keyturn_server.")} == {
        "keyturn_server.routing",
        "keyturn_server.routing.model",
        "keyturn_server.routing.policy",
        "keyturn_server.routing.reasons",
    }
