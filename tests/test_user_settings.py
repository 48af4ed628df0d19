"""What a user's page of keys shows, against a table written apart from it, over every combination."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from keyturn.secret import Secret
from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import user_service_pb2 as pb
from keyturn_server.configuration import Configuration, Provider
from keyturn_server.ids import new_id
from keyturn_server.keys.envelope import seal
from keyturn_server.keys.keyring import Keyring
from keyturn_server.ledger import Balance
from keyturn_server.profiles import Profile, StoredKey
from keyturn_server.routing.model import Flags
from keyturn_server.user_settings import PaymentState, UserSettings, settings_of
from tests.factories import KEYRING, Connection, Factory
from tests.routing.oracle import MAY_BRING_KEYS, MODES
from tests.support import Sidecar

NOW = datetime(2026, 5, 4, 12, tzinfo=UTC)
RANKS = {"community": 0, "free": 10, "subscriber": 20, "premium": 30, "lifetime": 40}
TIERS = (*RANKS, "nobody-described-it")
OTHER_KEYRING = Keyring.from_settings(secrets.token_hex(32), [])
assert OTHER_KEYRING is not None

# From the comments of protos/keyturn/v1/user_service.proto and the mode table of DESIGN. In each mode the
# first line that fits is the answer, and `*` fits all.
#
#   tier     ok: may bring keys; low: may not
#   cipher   yes: there is an ENCRYPTION_KEY
#   keys     none: no active one; broken: active ones, none to use; usable: at least one
#   credits  yes: some are left that nothing holds
TABLE = """
INTERNAL_ONLY
*   *   *      yes  USING_CREDITS
*   *   *      no   INSUFFICIENT_CREDITS

BYOK_ONLY
low *   *      *    TIER_NOT_ELIGIBLE
ok  no  *      *    ENCRYPTION_NOT_CONFIGURED
ok  yes none   *    BYOK_REQUIRED
ok  yes broken *    KEY_UNUSABLE
ok  yes usable *    USING_OWN_KEYS

CREDIT_FIRST
*   *   *      yes  USING_CREDITS
low *   *      no   INSUFFICIENT_CREDITS
ok  no  *      no   NO_KEY_AND_NO_CREDITS
ok  yes none   no   NO_KEY_AND_NO_CREDITS
ok  yes broken no   KEY_UNUSABLE
ok  yes usable no   USING_OWN_KEYS

BYOK_FIRST
ok  yes usable *    USING_OWN_KEYS
*   *   *      yes  USING_CREDITS
low *   *      no   INSUFFICIENT_CREDITS
ok  no  *      no   NO_KEY_AND_NO_CREDITS
ok  yes none   no   NO_KEY_AND_NO_CREDITS
ok  yes broken no   KEY_UNUSABLE
"""
BLOCKS = {
    name: [line.split() for line in lines]
    for name, *lines in (block.splitlines() for block in TABLE.strip().split("\n\n"))
}


def answer(mode: str, *facts: str) -> str:
    """The last cell of the first line that fits."""
    return next(
        line[-1]
        for line in BLOCKS[mode]
        if all(cell in ("*", fact) for cell, fact in zip(line[:-1], facts, strict=True))
    )


@dataclass(frozen=True)
class Keys:
    """Some keys of a user, and what the table calls them."""

    are: str
    listed: tuple[str, ...]
    keys: tuple[StoredKey, ...]


def key(provider: str = "openai", keyring: Keyring | None = KEYRING, **changes: Any) -> StoredKey:
    key_id = new_id()
    assert keyring is not None
    stored = StoredKey(
        id=key_id,
        provider=provider,
        label="",
        priority=0,
        ciphertext=seal(keyring, Secret("sk-test"), user_id="u", provider=provider, row_id=key_id),
        hint="test",
        revision=1,
        is_active=True,
        is_valid=True,
        is_verified=True,
        cooldown_until=None,
    )
    return replace(stored, **changes)


SOON = NOW + timedelta(minutes=1)
KEYS = {
    "none at all": Keys("none", (), ()),
    "inactive": Keys("none", (), (key(is_active=False),)),
    "of a provider that is switched off": Keys("none", (), (key("closed"),)),
    "of a provider that is gone": Keys("none", (), (key("gone"),)),
    "invalid": Keys("broken", ("openai",), (key(is_valid=False),)),
    "cooling down": Keys("broken", ("openai",), (key(cooldown_until=SOON),)),
    "under another master key": Keys("broken", ("openai",), (key(keyring=OTHER_KEYRING),)),
    "no ciphertext": Keys("broken", ("openai",), (key(ciphertext="v1.garbage"),)),
    "moved from another row": Keys("broken", ("openai",), (replace(key(), id=new_id()),)),
    "all broken": Keys(
        "broken", ("anthropic", "openai"), (key(is_valid=False), key("anthropic", cooldown_until=SOON))
    ),
    "usable": Keys("usable", ("openai",), (key(),)),
    "unverified": Keys("usable", ("openai",), (key(is_verified=False),)),
    "cooled down just now": Keys("usable", ("openai",), (key(cooldown_until=NOW),)),
    "one of two usable": Keys(
        "usable", ("anthropic", "openai"), (key(keyring=OTHER_KEYRING), key("anthropic"), key())
    ),
    "usable beside one switched off": Keys("usable", ("anthropic",), (key("closed"), key("anthropic"))),
}
CREDITS = {
    # balance, held
    (0, 0): "no",
    (-3, 0): "no",
    (5, 5): "no",
    (5, 6): "no",
    (1, 0): "yes",
    (5, 4): "yes",
    (2**63 - 1, 0): "yes",
}


def provider(name: str, *, is_enabled: bool = True) -> Provider:
    return Provider(
        id=name,
        name=name,
        is_enabled=is_enabled,
        base_url="",
        auth_header="",
        auth_prefix="",
        key_pattern="",
        check_path=None,
        check_headers={},
        check_refusal=None,
    )


def settings(
    flags: Flags, tier: str, keys: tuple[StoredKey, ...], funds: tuple[int, int], keyring: Keyring | None
) -> UserSettings:
    configuration = Configuration(
        flags=flags,
        flags_missing=frozenset(),
        flag_changes={},
        tiers={},
        tier_ranks=RANKS,
        providers={
            "openai": provider("openai"),
            "anthropic": provider("anthropic"),
            "closed": provider("closed", is_enabled=False),
        },
        prices={},
    )
    balance = Balance(balance_micros=funds[0], held_micros=funds[1])
    profile = Profile(user_id="u", tier=tier, keys=keys)
    return settings_of(configuration, profile, balance, keyring=keyring, hold_micros=1, now=NOW)


def test_the_page_shows_what_the_table_says_in_every_combination() -> None:
    seen = set()
    states = {state.value for state in PaymentState}
    for (enabled, only, credits_first), tier, min_tier, keys, funds, keyring in itertools.product(
        MODES, TIERS, MAY_BRING_KEYS, KEYS.values(), CREDITS, (KEYRING, None)
    ):
        flags = Flags(
            byok_enabled=enabled,
            byok_only_mode=only,
            byok_uses_internal_credits=credits_first,
            min_tier=min_tier,
        )
        mode, eligible = MODES[enabled, only, credits_first], tier in MAY_BRING_KEYS[min_tier]
        shown = settings(flags, tier, keys.keys, funds, keyring)
        expected = answer(
            mode.name, "ok" if eligible else "low", "yes" if keyring else "no", keys.are, CREDITS[funds]
        )
        seen.add(expected)
        assert shown.mode is mode
        assert shown.page_visible is (enabled and eligible)
        assert shown.has_credits is (CREDITS[funds] == "yes")
        assert shown.providers_with_keys == keys.listed
        if expected in states:
            assert (shown.state.value, shown.action_reason) == (expected, None)
        else:
            assert shown.action_reason is not None
            assert (shown.state, shown.action_reason.value) == (PaymentState.ACTION_REQUIRED, expected)
        assert SAYS[shown.action_reason.value if shown.action_reason else shown.state.value] in shown.message
        assert shown.message.endswith(".")
        assert ". " not in shown.message
    assert seen == {line[-1] for lines in BLOCKS.values() for line in lines}


# What the sentence must hold, for each answer.
SAYS = {
    "USING_OWN_KEYS": "our own keys pay",
    "USING_CREDITS": "our credits pay",
    "INSUFFICIENT_CREDITS": "buy",
    "TIER_NOT_ELIGIBLE": "upgrade",
    "ENCRYPTION_NOT_CONFIGURED": "operator",
    "BYOK_REQUIRED": "Add a key",
    "KEY_UNUSABLE": "test or replace",
    "NO_KEY_AND_NO_CREDITS": "add a key or buy credits",
}


STATES = {
    "key": pb.PAYMENT_STATE_USING_OWN_KEYS,
    "ticket": pb.PAYMENT_STATE_USING_CREDITS,
    "denial": pb.PAYMENT_STATE_ACTION_REQUIRED,
    None: pb.PAYMENT_STATE_UNSPECIFIED,
}


async def test_the_page_over_grpc_says_the_same_as_the_next_decision(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection, subtests: pytest.Subtests
) -> None:
    users = {
        "own key": await make.user(),
        "credits": await make.user(micros=100_000),
        "both": await make.user("lifetime", micros=100_000),
        "neither": await make.user(),
        "free": await make.user("free", micros=100_000),
        "free and poor": await make.user("free"),
        "broken": await make.user(),
    }
    for name in ("own key", "both", "free"):
        await make.key(users[name])
    await make.key(users["broken"], encrypted_key="v1.garbage")
    for enabled, only, credits_first in MODES:
        await make.flags(byok_enabled=enabled, byok_only_mode=only, byok_uses_internal_credits=credits_first)
        sidecar: Sidecar = await start_sidecar()
        for name, user in users.items():
            with subtests.test(f"{enabled} {only} {credits_first} {name}"):
                shown = await sidecar.call("GetUserSettings", pb.GetUserSettingsRequest(user_id=user))
                decided = await sidecar.decide(user, cost_micros=1)
                assert shown.mode == decided.mode
                assert shown.action_reason == decided.denial.reason
                assert shown.state == STATES[decided.WhichOneof("route")]


async def test_the_page_without_a_master_key_asks_for_an_operator(
    start_sidecar: Callable[..., Any], make: Factory
) -> None:
    await make.flags(byok_only_mode=True)
    sidecar: Sidecar = await start_sidecar(encryption_key=None)
    user = await make.user(micros=50_000)
    await make.key(user)
    await make.key(user, "anthropic")
    shown = await sidecar.call("GetUserSettings", pb.GetUserSettingsRequest(user_id=user))
    assert shown.page_visible
    assert shown.has_credits
    assert shown.action_reason == policy.DENIAL_REASON_ENCRYPTION_NOT_CONFIGURED
    assert list(shown.providers_with_keys) == ["anthropic", "openai"]


async def test_credits_that_are_held_are_none_to_the_page(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user(micros=50_000)
    ask = pb.GetUserSettingsRequest(user_id=user)
    assert (await sidecar.call("GetUserSettings", ask)).has_credits
    # One micro less than a request without an estimate takes: it would be denied.
    await sidecar.decide(user, cost_micros=1)
    shown = await sidecar.call("GetUserSettings", ask)
    assert (shown.has_credits, shown.state) == (False, pb.PAYMENT_STATE_ACTION_REQUIRED)
    assert (await sidecar.decide(user)).HasField("denial")
    await make.grant(user, 1)
    assert (await sidecar.call("GetUserSettings", ask)).has_credits
