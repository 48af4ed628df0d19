"""Decide, Redeem, Explain and batches over real gRPC: the mode table, key states, and handles."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest

from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import routing_service_pb2 as pb
from keyturn_server.keys.keyring import Keyring
from tests.factories import Connection, Factory
from tests.support import Fault, Sidecar, eventually

SECRET = "sk-test-0123456789abcdef0123"
INLINE = pb.KEY_DELIVERY_INLINE

# Flags, then for each of a user with a key, with credits, with both, with neither, and a free user
# with both: the route and the reason (or the denial's).
KEY, TICKET, DENIAL = "key", "ticket", "denial"
MODES: dict[str, tuple[dict[str, bool], list[tuple[str, str]]]] = {
    "BYOK_FIRST": (
        {},
        [
            (KEY, "BYOK_FIRST_OWN_KEY"),
            (TICKET, "BYOK_FIRST_NO_KEY"),
            (KEY, "BYOK_FIRST_OWN_KEY"),
            (DENIAL, "NO_KEY_AND_NO_CREDITS"),
            (TICKET, "TIER_NOT_ELIGIBLE"),
        ],
    ),
    "CREDIT_FIRST": (
        {"byok_uses_internal_credits": True},
        [
            (KEY, "CREDIT_FIRST_EXHAUSTED"),
            (TICKET, "CREDIT_FIRST_CREDITS"),
            (TICKET, "CREDIT_FIRST_CREDITS"),
            (DENIAL, "NO_KEY_AND_NO_CREDITS"),
            (TICKET, "TIER_NOT_ELIGIBLE"),
        ],
    ),
    "BYOK_ONLY": (
        {"byok_only_mode": True, "byok_uses_internal_credits": True},
        [
            (KEY, "BYOK_ONLY_OWN_KEY"),
            (DENIAL, "BYOK_REQUIRED"),
            (KEY, "BYOK_ONLY_OWN_KEY"),
            (DENIAL, "BYOK_REQUIRED"),
            (DENIAL, "TIER_NOT_ELIGIBLE"),
        ],
    ),
    "INTERNAL_ONLY": (
        {"byok_enabled": False, "byok_only_mode": True},
        [
            (DENIAL, "INSUFFICIENT_CREDITS"),
            (TICKET, "BYOK_DISABLED"),
            (TICKET, "BYOK_DISABLED"),
            (DENIAL, "INSUFFICIENT_CREDITS"),
            (TICKET, "BYOK_DISABLED"),
        ],
    ),
}


def reason_of(answer: pb.DecideResponse) -> str:
    if answer.WhichOneof("route") == "denial":
        assert answer.reason == policy.REASON_DENIED
        return policy.DenialReason.Name(answer.denial.reason).removeprefix("DENIAL_REASON_")
    return policy.Reason.Name(answer.reason).removeprefix("REASON_")


@pytest.mark.parametrize("mode", MODES)
async def test_each_mode_tries_its_paths_in_its_order(
    make: Factory, start_sidecar: Callable[..., Any], mode: str
) -> None:
    flags, expected = MODES[mode]
    await make.flags(**flags)
    users = [
        await make.user(),
        await make.user(micros=1_000_000),
        await make.user(micros=1_000_000),
        await make.user(),
        await make.user("free", micros=1_000_000),
    ]
    for index in (0, 2, 4):
        await make.key(users[index])
    sidecar = await start_sidecar()
    for user, (route, reason) in zip(users, expected, strict=True):
        answer = await sidecar.decide(user)
        assert policy.Mode.Name(answer.mode) == f"MODE_{mode}"
        assert (answer.WhichOneof("route"), reason_of(answer)) == (route, reason)
        assert answer.message
        explained = (await sidecar.call("Explain", explain(user))).decision
        assert (explained.WhichOneof("route"), reason_of(explained)) == (route, reason)


def explain(user_id: str, **fields: Any) -> pb.ExplainRequest:
    return pb.ExplainRequest(decide=pb.DecideRequest(user_id=user_id, provider="openai", **fields))


async def test_the_own_key_comes_decrypted_with_all_that_signing_needs(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user("lifetime")
    key_id = await make.key(user, "anthropic", secret=SECRET)
    base_url = await sql.fetchval("SELECT base_url FROM api_providers WHERE id = 'anthropic'")
    answer = await sidecar.decide(user, "anthropic", key_delivery=INLINE)
    assert answer.key.secret == SECRET
    assert answer.key.hint == SECRET[-4:]
    assert answer.key.key_id == str(key_id)
    assert (answer.key.auth.header, answer.key.auth.prefix) == ("x-api-key", "")
    assert answer.key.base_url == base_url
    lifetime = answer.key.expire_time.ToDatetime(UTC) - datetime.now(UTC)
    assert timedelta(minutes=9) < lifetime <= timedelta(minutes=10)


async def test_a_handle_gives_up_its_secret_once(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user()
    await make.key(user, secret=SECRET)
    answer = await sidecar.decide(user)
    assert answer.key.secret == ""
    redeem = pb.RedeemRequest(key_handle=answer.key.handle)
    results = await asyncio.gather(
        *(sidecar.call("Redeem", redeem) for _ in range(20)), return_exceptions=True
    )
    secrets = [result.secret for result in results if not isinstance(result, BaseException)]
    faults = [result for result in results if isinstance(result, Fault)]
    assert secrets == [SECRET]
    assert {fault.code for fault in faults} == {grpc.StatusCode.FAILED_PRECONDITION}
    assert len(faults) == 19


async def test_a_handle_of_a_key_deleted_since_is_not_redeemed_and_still_recorded(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user()
    await make.key(user)
    answer = await sidecar.decide(user)
    await sql.execute("DELETE FROM user_api_keys")

    async def refused() -> bool:
        with pytest.raises(Fault) as caught:
            await sidecar.call("Redeem", pb.RedeemRequest(key_handle=answer.key.handle))
        return caught.value.code is grpc.StatusCode.FAILED_PRECONDITION

    async def gone() -> bool:
        return (await sidecar.decide(user)).WhichOneof("route") == "denial"

    await eventually(gone)
    assert await refused()
    recorded = await sidecar.record(answer, pb.OUTCOME_SUCCESS, cost_micros=5)
    assert recorded.key_state == policy.KEY_STATE_DELETED


async def test_keys_are_tried_in_the_order_of_their_priority(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user()
    second = await make.key(user, priority=2)
    first = await make.key(user, priority=1)
    answers = [await sidecar.decide(user)]
    answers.append(await sidecar.decide(user, failed_key_handles=[answers[0].key.handle]))
    assert [answer.key.key_id for answer in answers] == [str(first), str(second)]


async def test_failed_handles_lead_to_credits_when_no_key_is_left(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user(micros=1_000_000)
    await make.key(user)
    first = await sidecar.decide(user, request_id="r")
    again = await sidecar.decide(user, request_id="r", failed_key_handles=[first.key.handle])
    assert again.WhichOneof("route") == "ticket"
    assert reason_of(again) == "BYOK_FIRST_KEY_FAILED"


async def test_a_key_replaced_after_it_failed_is_tried_again(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user()
    key_id = await make.key(user)
    first = await sidecar.decide(user)
    await sql.execute("UPDATE user_api_keys SET revision = revision + 1 WHERE id = $1", key_id)

    async def tried() -> bool:
        answer = await sidecar.decide(user, failed_key_handles=[first.key.handle])
        return answer.key.key_id == str(key_id)

    await eventually(tried)
    # And what the earlier secret came to says nothing about this one.
    recorded = await sidecar.record(first, pb.OUTCOME_AUTH_REJECTED, http_status=401)
    assert recorded.key_state == policy.KEY_STATE_UNVERIFIED


async def test_a_refused_key_is_marked_and_not_handed_out_again(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user()
    key_id = await make.key(user)
    answer = await sidecar.decide(user)
    recorded = await sidecar.record(
        answer,
        pb.OUTCOME_AUTH_REJECTED,
        http_status=401,
        error_message=f"Incorrect API key provided: {SECRET}",
    )
    assert recorded.key_state == policy.KEY_STATE_INVALID
    # At once here, without waiting for the push.
    denied = await sidecar.decide(user)
    assert reason_of(denied) == "KEY_UNUSABLE"
    assert not denied.denial.retryable
    row = await sql.fetchrow("SELECT is_valid, last_error FROM user_api_keys WHERE id = $1", key_id)
    assert row is not None
    assert not row["is_valid"]
    assert row["last_error"] == "Incorrect API key provided: ***"


async def test_a_key_that_no_pattern_knows_is_struck_out_of_its_own_error(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user()
    secret = "5f2b1c9d0a7e4f6388b1c2d3e4f5a6b7"
    await make.key(user, secret=secret)
    answer = await sidecar.decide(user)
    await sidecar.record(
        answer, pb.OUTCOME_AUTH_REJECTED, error_message="x" * 480 + f" <{secret}> is no key of ours"
    )
    for statement in ("SELECT error_message FROM api_key_usage", "SELECT last_error FROM user_api_keys"):
        assert await sql.fetchval(statement) == ("x" * 480 + " <***> is no key of ours")[:500]


async def test_an_error_text_is_kept_to_500_characters(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=1_000)
    answer = await sidecar.decide(user, cost_micros=10)
    await sidecar.record(answer, pb.OUTCOME_PROVIDER_ERROR, cost_micros=1, error_message="x" * 5_000)
    kept = await sql.fetchval("SELECT error_message FROM credit_transactions WHERE amount_micros < 0")
    assert kept == "x" * 500


@pytest.mark.parametrize(
    ("outcome", "fields", "least_seconds", "most_seconds"),
    [
        (pb.OUTCOME_RATE_LIMITED, {}, 50, 60),
        (pb.OUTCOME_RATE_LIMITED, {"retry_after": {"seconds": 300}}, 290, 300),
        (pb.OUTCOME_PROVIDER_BILLING, {}, 890, 900),
    ],
)
async def test_a_key_cools_down_and_a_success_ends_it(
    sidecar: Sidecar,
    make: Factory,
    outcome: int,
    fields: dict[str, Any],
    least_seconds: int,
    most_seconds: int,
) -> None:
    user = await make.user()
    await make.key(user)
    first, second = await sidecar.decide(user), await sidecar.decide(user)
    recorded = await sidecar.record(first, outcome, **fields)
    assert recorded.key_state == policy.KEY_STATE_COOLING_DOWN
    denied = await sidecar.decide(user)
    assert reason_of(denied) == "KEY_UNUSABLE"
    assert denied.denial.retryable
    assert least_seconds < denied.denial.retry_after.ToTimedelta().total_seconds() <= most_seconds

    recorded = await sidecar.record(second, pb.OUTCOME_SUCCESS)
    assert recorded.key_state == policy.KEY_STATE_USABLE

    async def back() -> bool:
        return (await sidecar.decide(user)).WhichOneof("route") == "key"

    await eventually(back)


async def test_a_cooldown_ends_by_time_alone(sidecar: Sidecar, make: Factory, sql: Connection) -> None:
    user = await make.user(micros=1_000_000)
    await make.key(user, priority=2)
    first = await make.key(user, priority=1)
    answer = await sidecar.decide(user)
    assert answer.key.key_id == str(first)
    await sidecar.record(answer, pb.OUTCOME_RATE_LIMITED, retry_after={"seconds": 2})
    assert (await sidecar.decide(user)).key.key_id != str(first)
    # Nobody changes anything from here on.

    async def back() -> bool:
        return bool((await sidecar.decide(user)).key.key_id == str(first))

    await eventually(back)


async def test_what_was_planned_for_one_request_is_not_taken_for_another(
    sidecar: Sidecar, make: Factory
) -> None:
    user = await make.user(micros=1_000_000)
    keys = [await make.key(user), await make.key(user, "anthropic")]

    async def routed(provider: str = "openai", **fields: Any) -> str:
        answer = await sidecar.decide(user, provider, cost_micros=1, **fields)
        return str(answer.key.key_id) or str(answer.WhichOneof("route"))

    for _ in range(2):
        assert await routed() == str(keys[0])
        assert await routed("anthropic") == str(keys[1])
        assert await routed(constraint=policy.CONSTRAINT_CREDITS_ONLY) == "ticket"
        refused = (await sidecar.decide(user)).key.handle
        assert await routed(failed_key_handles=[refused]) == "ticket"
        assert await routed("anthropic", failed_key_handles=[refused]) == str(keys[1])


async def test_own_key_usage_is_counted_once(sidecar: Sidecar, make: Factory, sql: Connection) -> None:
    user = await make.user()
    key_id = await make.key(user)
    answers = [await sidecar.decide(user, model="gpt-4o", service_type="agents") for _ in range(20)]
    usage = pb.Usage(input_tokens=1_000, output_tokens=100, cache_read_tokens=400)
    results = await asyncio.gather(
        *(sidecar.record(answer, pb.OUTCOME_SUCCESS, usage=usage) for answer in answers for _ in range(5))
    )
    assert sum(not result.replayed for result in results) == 20
    # gpt-4o: $2.50 uncached, $1.25 cached, $10 out, a million.
    assert await sql.fetchval("SELECT sum(cost_micros) FROM api_key_usage") == 20 * (1_500 + 500 + 1_000)
    row = await sql.fetchrow("SELECT total_requests, total_tokens FROM user_api_keys WHERE id = $1", key_id)
    assert row is not None
    assert tuple(row) == (20, 20 * 1_100)
    with pytest.raises(Fault) as caught:
        await sidecar.record(answers[0], pb.OUTCOME_SUCCESS)
    assert caught.value.code is grpc.StatusCode.ALREADY_EXISTS


async def test_absent_usage_is_not_zero(sidecar: Sidecar, make: Factory, sql: Connection) -> None:
    user = await make.user()
    await make.key(user)
    recorded = await sidecar.record(await sidecar.decide(user), pb.OUTCOME_SUCCESS)
    assert recorded.cost_source == pb.COST_SOURCE_NONE
    row = await sql.fetchrow("SELECT total_tokens, cost_micros FROM api_key_usage")
    assert row is not None
    assert tuple(row) == (None, None)


async def test_a_key_under_another_master_key_is_unusable_and_reported_and_others_are_tried(
    sidecar: Sidecar, make: Factory
) -> None:
    user = await make.user()
    other = Keyring.from_settings("9d" + "3f8a1c5e7b9d2046a8c0e2f4163758b9da7c1e3f5b0924867dacbe1f305274", [])
    assert other is not None
    lost = await make.key(user, keyring=other, priority=1)
    good = await make.key(user, priority=2)
    answer = await sidecar.decide(user)
    assert answer.key.key_id == str(good)
    assert "key_unreadable" in sidecar.log.getvalue()
    assert str(lost) in sidecar.log.getvalue()


async def test_without_an_encryption_key_credits_go_on_and_own_keys_do_not(
    start_sidecar: Callable[..., Any], make: Factory
) -> None:
    sidecar = await start_sidecar(encryption_key=None)
    user = await make.user(micros=1_000_000)
    await make.key(user)
    assert reason_of(await sidecar.decide(user)) == "BYOK_FIRST_KEY_FAILED"
    denied = await sidecar.decide(user, constraint=policy.CONSTRAINT_OWN_KEY_ONLY)
    assert reason_of(denied) == "ENCRYPTION_NOT_CONFIGURED"


async def test_retired_master_keys_still_open_old_rows(
    start_sidecar: Callable[..., Any], make: Factory
) -> None:
    user = await make.user()
    await make.key(user, secret=SECRET)
    new = "b7e151628aed2a6abf7158809cf4f3c762e7160f38b4da56a784d9045190cfef"
    retired = "3f8a1c5e7b9d2046a8c0e2f4163758b9da7c1e3f5b0924867dacbe1f30527496"
    sidecar = await start_sidecar(encryption_key=new, encryption_keys_retired=retired)
    assert (await sidecar.decide(user, key_delivery=INLINE)).key.secret == SECRET


async def test_the_callers_constraint_tightens_and_never_relaxes(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user(micros=1_000_000)
    await make.key(user)
    answer = await sidecar.decide(user, constraint=policy.CONSTRAINT_CREDITS_ONLY)
    assert (answer.WhichOneof("route"), reason_of(answer)) == ("ticket", "CALLER_CONSTRAINT")
    free = await make.user("free", micros=1_000_000)
    denied = await sidecar.decide(free, constraint=policy.CONSTRAINT_OWN_KEY_ONLY)
    assert reason_of(denied) == "TIER_NOT_ELIGIBLE"


async def test_a_switched_off_provider_is_denied(sidecar: Sidecar, make: Factory, sql: Connection) -> None:
    user = await make.user(micros=1_000_000)
    await sql.execute("UPDATE api_providers SET is_enabled = false WHERE id = 'openai'")

    async def denied() -> bool:
        answer = await sidecar.decide(user)
        return answer.WhichOneof("route") == "denial" and reason_of(answer) == "PROVIDER_DISABLED"

    await eventually(denied)


# -- rate limits ------------------------------------------------------------------------------------


async def limit_tier(sql: Connection, tier: str, per_minute: int) -> None:
    await sql.execute(
        "INSERT INTO subscription_tiers (name, rank, requests_per_minute) VALUES ($1, 30, $2)",
        tier,
        per_minute,
    )


async def test_a_rate_limit_denies_credits_and_says_when_to_come_back(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    await limit_tier(sql, "slow", 3)
    sidecar = await start_sidecar()
    user = await make.user("slow", micros=1_000_000)
    routes = [await sidecar.decide(user, cost_micros=1) for _ in range(5)]
    assert [answer.WhichOneof("route") for answer in routes] == [TICKET] * 3 + [DENIAL] * 2
    assert reason_of(routes[4]) == "RATE_LIMITED"
    assert routes[4].denial.retryable
    assert 0 < routes[4].denial.retry_after.ToTimedelta().total_seconds() <= 60


async def test_an_own_key_bypasses_the_rate_limit(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    await limit_tier(sql, "slow", 1)
    sidecar = await start_sidecar()
    user = await make.user("slow")
    await make.key(user)
    assert {(await sidecar.decide(user)).WhichOneof("route") for _ in range(5)} == {KEY}


async def test_a_denied_or_replayed_decision_does_not_count_against_the_limit(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    await limit_tier(sql, "slow", 2)
    sidecar = await start_sidecar()
    user = await make.user("slow", micros=100)
    for _ in range(10):
        assert reason_of(await sidecar.decide(user, cost_micros=10_000)) == "NO_KEY_AND_NO_CREDITS"
    for _ in range(10):
        assert (await sidecar.decide(user, cost_micros=1, request_id="r")).WhichOneof("route") == TICKET
    assert (await sidecar.decide(user, cost_micros=1)).WhichOneof("route") == TICKET
    assert reason_of(await sidecar.decide(user, cost_micros=1)) == "RATE_LIMITED"


async def test_a_rate_limit_does_not_stand_before_an_own_key_when_credits_are_exhausted(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    await limit_tier(sql, "slow", 1)
    await make.flags(byok_uses_internal_credits=True)
    sidecar = await start_sidecar()
    user = await make.user("slow", micros=100)
    await make.key(user)
    assert (await sidecar.decide(user, cost_micros=60)).WhichOneof("route") == TICKET
    # Credits are left: the limit denies, and never reroutes.
    assert reason_of(await sidecar.decide(user, cost_micros=40)) == "RATE_LIMITED"
    # None are left for this one: credits are not used, so their limit does not apply.
    assert reason_of(await sidecar.decide(user, cost_micros=60)) == "CREDIT_FIRST_EXHAUSTED"


# -- estimates --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "hold_micros"),
    [
        ({}, 50_000),
        ({"cost_micros": 123}, 123),
        ({"model": "gpt-4o", "tokens": {"input_tokens": 1_000, "max_output_tokens": 100}}, 3_500),
        ({"model": "gpt-4o-mini", "tokens": {"input_tokens": 1}}, 1),
        ({"model": "nobody-knows", "tokens": {"input_tokens": 1_000}}, 50_000),
        ({"tokens": {"input_tokens": 1_000}}, 50_000),
        ({"model": "gpt-4o", "tokens": {}}, 50_000),
    ],
)
async def test_the_hold_is_the_estimate_or_the_default(
    sidecar: Sidecar, make: Factory, fields: dict[str, Any], hold_micros: int
) -> None:
    user = await make.user(micros=1_000_000)
    answer = await sidecar.decide(user, **fields)
    assert answer.ticket.hold_micros == hold_micros
    assert answer.ticket.available_micros == 1_000_000 - hold_micros


async def test_an_operators_price_wins(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    await sql.execute("INSERT INTO model_prices VALUES ('openai', 'gpt-4o', 1000000, 2000000)")
    sidecar = await start_sidecar()
    user = await make.user(micros=1_000_000)
    answer = await sidecar.decide(user, model="gpt-4o", tokens={"input_tokens": 100, "max_output_tokens": 10})
    assert answer.ticket.hold_micros == 120
    recorded = await sidecar.record(
        answer, pb.OUTCOME_SUCCESS, usage=pb.Usage(input_tokens=100, output_tokens=1)
    )
    assert recorded.charged_micros == 102


# -- explain and batches ------------------------------------------------------------------------------


async def test_explain_has_no_side_effect_and_no_secret(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=1_000_000)
    key_id = await make.key(user, secret=SECRET)
    await make.key(user, is_active=False)
    answer = await sidecar.call("Explain", explain(user, key_delivery=INLINE))
    assert answer.decision.key.key_id == str(key_id)
    assert not answer.decision.decision_id
    assert not answer.decision.key.handle
    assert SECRET not in str(answer)
    checks = {step.check: step.result for step in answer.steps}
    assert checks["flag byok_enabled"] == "true"
    assert checks["tier"] == "eligible"
    assert checks[f"key {key_id}"] == "usable, unverified"
    assert "inactive" in checks.values()
    assert checks["credits"] == "enough"
    assert checks["rate limit"] == "room"
    assert checks["route"] == "OWN_KEY"
    assert await sql.fetchval("SELECT count(*) FROM credit_holds") == 0


async def test_explain_says_what_the_provider_said_of_a_key(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user()
    refused = await make.key(user, is_valid=False, last_error=f"Incorrect API key provided: {SECRET}")
    resting = await make.key(
        user, cooldown_until=datetime.now(UTC) + timedelta(hours=1), last_error="Slow down!"
    )
    answer = await sidecar.call("Explain", explain(user))
    told = {step.check: step for step in answer.steps}
    assert told[f"key {refused}"].detail.startswith("Incorrect API key provided: ***. Label ")
    assert told[f"key {resting}"].detail.startswith("Until 2")
    assert " UTC. Slow down! Label " in told[f"key {resting}"].detail
    assert SECRET not in str(answer)


async def test_explain_says_who_set_a_flag_and_why(sidecar: Sidecar, make: Factory, sql: Connection) -> None:
    user = await make.user()

    async def origins() -> dict[str, str]:
        answer = await sidecar.call("Explain", explain(user))
        return {step.check: f"{step.result}: {step.detail}" for step in answer.steps}

    assert (await origins())["flag byok_only_mode"] == "false: From feature_flags."
    async with sql.transaction():
        await sql.execute("SELECT set_config('keyturn.actor', 'ann', true)")
        await sql.execute("SELECT set_config('keyturn.reason', 'Credits run low', true)")
        await make.flags(byok_only_mode=True)
    await sql.execute("DELETE FROM feature_flags WHERE key = 'byok_uses_internal_credits'")

    async def told() -> bool:
        steps = await origins()
        set_by_ann = steps["flag byok_only_mode"]
        deleted = steps["flag byok_uses_internal_credits"]
        return (
            set_by_ann.startswith("true: From feature_flags, changed by ann at 20")
            and set_by_ann.endswith(" UTC: 'Credits run low'.")
            and deleted.startswith(
                "false: The default: there is no such row in feature_flags, changed by sql:"
            )
        )

    await eventually(told)


async def test_a_batch_answers_each_item_in_order(sidecar: Sidecar, make: Factory, sql: Connection) -> None:
    with_key, with_credits = await make.user(), await make.user(micros=10_000)
    await make.key(with_key)
    requests = [
        pb.DecideRequest(user_id=user, provider="openai", cost_micros=1_000)
        for _ in range(100)
        for user in (with_key, with_credits, "nobody", "")
    ]
    answer = await sidecar.call("BatchDecide", pb.BatchDecideRequest(requests=requests))
    kinds = [
        result.response.WhichOneof("route") if result.HasField("response") else result.status.code
        for result in answer.results
    ]
    not_found, invalid = grpc.StatusCode.NOT_FOUND.value[0], grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert kinds[0::4] == ["key"] * 100
    assert kinds[1::4] == ["ticket"] * 10 + ["denial"] * 90
    assert kinds[2::4] == [not_found] * 100
    assert kinds[3::4] == [invalid] * 100

    records = []
    for result in answer.results:
        route = result.response.WhichOneof("route")
        if route in ("key", "ticket"):
            settles = (
                {"key_handle": result.response.key.handle}
                if route == "key"
                else {"credit_ticket": result.response.ticket.ticket}
            )
            records.append(pb.RecordRequest(outcome=pb.OUTCOME_SUCCESS, cost_micros=900, **settles))
    records.append(pb.RecordRequest(outcome=pb.OUTCOME_SUCCESS, credit_ticket="ktt1_garbled"))
    recorded = await sidecar.call("BatchRecord", pb.BatchRecordRequest(requests=records))
    assert [result.HasField("response") for result in recorded.results] == [True] * 110 + [False]
    row = await sql.fetchrow("SELECT balance_micros FROM credit_accounts WHERE user_id = $1", with_credits)
    assert row is not None
    assert row["balance_micros"] == 10_000 - 10 * 900
