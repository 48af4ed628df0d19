"""SimulateFlags over real gRPC: against an oracle, paged, under load, and leaving no trace."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2

from keyturn.v1 import flag_service_pb2 as pb
from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import routing_service_pb2
from keyturn_server.ids import new_id
from keyturn_server.keys.keyring import Keyring
from keyturn_server.routing.model import FLAG_KEYS, Credits, DenialReason, Flags, KeyFacts, Mode, Path, World
from keyturn_server.routing.policy import choose_route, conclude
from keyturn_server.simulation import (
    MOST_ASKING,
    MOST_KEPT,
    MOST_MOVES,
    DeniedUser,
    KeptSimulations,
    PackedDenials,
    Simulation,
    SimulationAsk,
    Simulator,
)
from keyturn_server.store.database import open_database
from keyturn_server.store.simulation import RequestLog
from tests.factories import KEYRING, Connection, Factory
from tests.refusals import Refusal, contents, refused
from tests.support import Fault, Sidecar, eventually

ENABLED, CREDITS, ONLY = "byok_enabled", "byok_uses_internal_credits", "byok_only_mode"
HOLD_MICROS = 50_000
_LOST = Keyring.from_settings("00ff" * 15 + "0a1b", [])
assert _LOST is not None
LOST: Keyring = _LOST
"""A master key that the sidecar does not have."""


async def simulated(sidecar: Sidecar, **fields: Any) -> pb.SimulateFlagsResponse:
    answer: pb.SimulateFlagsResponse = await sidecar.call("SimulateFlags", pb.SimulateFlagsRequest(**fields))
    return answer


def days(count: float) -> duration_pb2.Duration:
    return duration_pb2.Duration(seconds=round(count * 86_400))


def ago(count: float) -> datetime:
    """So many days ago."""
    return datetime.now(UTC) - timedelta(days=count)


# -- recorded requests, as the ledger writes them -------------------------------------------------------


def own_key_requests(
    source: str,
    *,
    user: str = "$1",
    provider: str = "'openai'",
    outcome: str = "'SUCCESS'",
    tokens: str = "NULL",
    cost_micros: str = "NULL",
    at: str = "now() - interval '1 hour'",
) -> str:
    """SQL that records a request for each row of `source`."""
    return f"""
    INSERT INTO api_key_usage (
        user_id, id, key_id, provider, model, service_type, mode, reason, endpoint, outcome, total_tokens,
        cost_micros, cost_source, key_state, is_late, fingerprint, submission_id, created_at)
    SELECT {user}, gen_random_uuid(), gen_random_uuid(), {provider}, '', '', '', '', '', {outcome}, {tokens},
           {cost_micros}, '', '', false, '', gen_random_uuid(), {at} FROM {source}
    """


PAID_BY_KEY = own_key_requests(
    "(VALUES (1)) one", provider="$2", outcome="$3", tokens="$4::bigint", cost_micros="$5::bigint", at="$6"
)
OPEN_HOLD = """
WITH account AS (UPDATE credit_accounts SET held_micros = held_micros + $2 WHERE user_id = $1)
INSERT INTO credit_holds (user_id, id, provider, model, service_type, mode, reason, amount_micros, state,
                          created_at, expires_at)
VALUES ($1, gen_random_uuid(), 'openai', '', '', '', '', $2, 'open', now(), now() + interval '1 day')
"""
SETTLED_HOLD = """
INSERT INTO credit_holds (user_id, id, provider, model, service_type, mode, reason, amount_micros, state,
                          created_at, expires_at, closed_at, outcome, charged_micros, fingerprint)
VALUES ($1, $2, $3, '', '', '', '', $4, 'settled', $5, $5, $5, 'SUCCESS', $4, '')
"""
DEDUCTION = """
WITH account AS (UPDATE credit_accounts SET balance_micros = balance_micros - $4 WHERE user_id = $1
                 RETURNING balance_micros)
INSERT INTO credit_transactions (user_id, id, transaction_type, amount_micros, balance_after_micros, provider,
                                 outcome, total_tokens, created_at)
SELECT $1, $2, 'deduction', -$4::bigint, balance_micros, $3, 'SUCCESS', $6, $5 FROM account
"""


async def paid_by_key(
    sql: Connection,
    user_id: str,
    provider: str,
    at: datetime,
    *,
    outcome: str = "SUCCESS",
    tokens: int | None = None,
    cost_micros: int | None = None,
) -> None:
    await sql.execute(PAID_BY_KEY, user_id, provider, outcome, tokens, cost_micros, at)


async def paid_by_credits(
    sql: Connection, user_id: str, provider: str, at: datetime, *, tokens: int | None = None, micros: int = 0
) -> None:
    """A hold that was settled: its row, the deduction, and the balance."""
    hold_id = new_id()
    await sql.execute(SETTLED_HOLD, user_id, hold_id, provider, micros, at)
    await sql.execute(DEDUCTION, user_id, hold_id, provider, micros, at, tokens)


# -- the oracle: a small world, decided request by request ------------------------------------------------

TIER_RANKS = {"community": 0, "free": 10, "subscriber": 20, "premium": 30, "lifetime": 40}
PROVIDERS = ("openai", "anthropic", "groq", "nobody-described-it")
DISABLED = "groq"


@dataclass(kw_only=True)
class Person:
    """A user of the made-up world."""

    user_id: str
    tier: str
    email: str
    keys: dict[str, list[KeyFacts]]
    """By provider, in the order to try them."""
    available_micros: int


@dataclass(kw_only=True)
class Request:
    """A recorded request."""

    user_id: str
    provider: str
    at: datetime
    paid_by: Path
    tokens: int | None
    cost_micros: int | None
    counts: bool = True


@dataclass(kw_only=True)
class MadeUp:
    """A world, as it has been written to the database."""

    people: dict[str, Person] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)


async def make_world(make: Factory, sql: Connection, seed: int) -> MadeUp:
    """Users of every tier, keys in every state, balances on both sides of the hold; requests of 12 days."""
    dice = random.Random(seed)  # noqa: S311 - no secret
    world = MadeUp()
    await sql.execute("UPDATE api_providers SET is_enabled = false WHERE id = $1", DISABLED)
    for number in range(40):
        micros = dice.choice([0, 0, HOLD_MICROS - 1, HOLD_MICROS, 10 * HOLD_MICROS])
        name = dice.choice(["ann", "Zoë", "張", "🦊", "a b"]) + f"-{number}"
        tier = dice.choice([*TIER_RANKS, "premium", "lifetime", "a tier that nobody described"])
        user = await make.user(tier, name=name)
        if number % 7 == 0:
            await sql.execute("UPDATE users SET email = NULL WHERE id = $1", user)
        email = await sql.fetchval("SELECT coalesce(email, '') FROM users WHERE id = $1", user)
        keys: dict[str, list[KeyFacts]] = {}
        # The table of keys wants a provider that exists.
        for provider in PROVIDERS[:3]:
            for priority in range(dice.choice([0, 0, 1, 1, 2, 3])):
                keys.setdefault(provider, []).append(await make_key(make, dice, user, provider, priority))
        for _ in range(dice.choice([0, 1, 8])):
            world.requests.append(await make_request(sql, dice, user))
        # What the deductions took is given back, so that the balance is what was drawn.
        spent = -await sql.fetchval("SELECT balance_micros FROM credit_accounts WHERE user_id = $1", user)
        held = dice.choice([0, 0, 1, HOLD_MICROS])
        if spent + micros + held > 0:
            await make.grant(user, spent + micros + held)
        if held and number % 2:
            await sql.execute(OPEN_HOLD, user, held)
            available = micros
        else:
            available = micros + held
        world.people[user] = Person(
            user_id=user, tier=tier, email=email, keys=keys, available_micros=available
        )
    for user in dice.sample(sorted({request.user_id for request in world.requests}), 3):
        await sql.execute("DELETE FROM users WHERE id = $1", user)
        del world.people[user]
    # An account that was never opened is an empty one.
    user = await make.user(name="without an account")
    await sql.execute("DELETE FROM credit_accounts WHERE user_id = $1", user)
    email = await sql.fetchval("SELECT email FROM users WHERE id = $1", user)
    world.people[user] = Person(user_id=user, tier="premium", email=email, keys={}, available_micros=0)
    world.requests.append(await make_request(sql, dice, user, path=Path.OWN_KEY))
    return world


async def make_key(make: Factory, dice: random.Random, user: str, provider: str, priority: int) -> KeyFacts:
    is_active, is_valid = dice.random() < 0.7, dice.random() < 0.7
    cooldown = dice.choice([None, None, timedelta(hours=1), timedelta(hours=-1)])
    until = None if cooldown is None else datetime.now(UTC) + cooldown
    kind = dice.choice(["ours", "ours", "lost", "legacy"])
    columns: dict[str, Any] = (
        {"encrypted_key": "bGVnYWN5IGFuZCB0aGVyZWZvcmUgbG9uZyBlbm91Z2g="} if kind == "legacy" else {}
    )
    key_id = await make.key(
        user,
        provider,
        keyring=LOST if kind == "lost" else KEYRING,
        priority=priority,
        is_active=is_active,
        is_valid=is_valid,
        cooldown_until=until,
        **columns,
    )
    return KeyFacts(
        id=key_id, is_active=is_active, is_valid=is_valid, cooldown_until=until, is_readable=kind != "lost"
    )


async def make_request(
    sql: Connection, dice: random.Random, user: str, *, path: Path | None = None
) -> Request:
    request = Request(
        user_id=user,
        provider=dice.choice(PROVIDERS),
        at=ago(dice.uniform(0.001, 12)),
        paid_by=path or dice.choice([Path.OWN_KEY, Path.CREDITS]),
        tokens=dice.choice([None, 0, 7, 1_000_000_000]),
        cost_micros=dice.choice([None, 0, 9, 250_000]),
    )
    if request.paid_by is Path.CREDITS:
        request.cost_micros = request.cost_micros or 0
        await paid_by_credits(
            sql, user, request.provider, request.at, tokens=request.tokens, micros=request.cost_micros
        )
    else:
        outcome = dice.choice(["SUCCESS", "SUCCESS", "AUTH_REJECTED", "TIMEOUT"])
        request.counts = outcome == "SUCCESS" or bool(request.tokens) or bool(request.cost_micros)
        await paid_by_key(
            sql,
            user,
            request.provider,
            request.at,
            outcome=outcome,
            tokens=request.tokens,
            cost_micros=request.cost_micros,
        )
    return request


Expected = tuple[list[pb.SimulatedMove], list[pb.SimulatedDenial], int]


def expected(
    world: MadeUp, flags: Flags, start: datetime, end: datetime, *, encryption_configured: bool = True
) -> Expected:
    """Moves, denials and how many requests are left out: by the policy, request by request."""
    moves: dict[tuple[str, str, str, int, int], Counter[str]] = {}
    denials: dict[tuple[str, str], tuple[DenialReason, int]] = {}
    skipped = 0
    for request in world.requests:
        if not start <= request.at < end or not request.counts:
            continue
        person = world.people.get(request.user_id)
        if person is None:
            skipped += 1
            continue
        plan = choose_route(
            World(
                flags=flags,
                tier=person.tier,
                tier_ranks=TIER_RANKS,
                keys=tuple(person.keys.get(request.provider, ())),
                provider_enabled=request.provider in PROVIDERS[:3] and request.provider != DISABLED,
                encryption_configured=encryption_configured,
            ),
            now=end,
        )
        has_credits = person.available_micros >= HOLD_MICROS
        verdict = conclude(plan, Credits.HELD if has_credits else Credits.INSUFFICIENT)
        if verdict.denial is not None:
            key = (person.user_id, request.provider)
            denials[key] = (verdict.denial, denials.get(key, (None, 0))[1] + 1)
        to_path = "DENIED" if verdict.path is None else verdict.path.name
        move = (
            request.at.date().isoformat(),
            request.provider,
            person.tier,
            pb.PaymentPath.Value(f"PAYMENT_PATH_{request.paid_by.name}"),
            pb.PaymentPath.Value(f"PAYMENT_PATH_{to_path}"),
        )
        sums = moves.setdefault(move, Counter())
        sums.update(requests=1, tokens=request.tokens or 0, cost=request.cost_micros or 0)
    return (
        [
            pb.SimulatedMove(
                day=day,
                provider=provider,
                tier=tier,
                from_path=from_path,  # type: ignore[arg-type]
                to_path=to_path,  # type: ignore[arg-type]
                requests=sums["requests"],
                total_tokens=sums["tokens"],
                cost_micros=sums["cost"],
            )
            for (day, provider, tier, from_path, to_path), sums in sorted(moves.items())
        ],
        [
            pb.SimulatedDenial(
                user_id=user_id,
                email=world.people[user_id].email,
                provider=provider,
                reason=policy.DenialReason.Value(f"DENIAL_REASON_{reason.name}"),
                requests=requests,
            )
            for (user_id, provider), (reason, requests) in sorted(denials.items())
        ],
        skipped,
    )


PROPOSALS: list[dict[str, bool]] = [
    {key: value for key, value in zip(FLAG_KEYS, values, strict=True) if value is not None}
    for values in itertools.product([None, False, True], repeat=3)
]


@pytest.mark.parametrize(("seed", "has_master_key"), [(1, True), (2, True), (3, True), (4, False)], ids=str)
async def test_a_simulation_is_what_the_policy_says_of_each_request(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection, seed: int, has_master_key: bool
) -> None:
    world = await make_world(make, sql, seed)
    await make.flags(**{CREDITS: seed % 2 == 0})
    current = Flags(byok_uses_internal_credits=seed % 2 == 0)
    sidecar = await start_sidecar(**({} if has_master_key else {"encryption_key": None}))
    before = await contents(sql)
    seen: set[Any] = set()
    for proposed in PROPOSALS:
        answer = await simulated(sidecar, flags=proposed, window=days(10), page_size=1000)
        flags = current.with_values(proposed)
        moves, denials, skipped = expected(
            world,
            flags,
            answer.start_time.ToDatetime(UTC),
            answer.end_time.ToDatetime(UTC),
            encryption_configured=has_master_key,
        )
        assert answer.current_mode == policy.Mode.Value(f"MODE_{current.mode.name}")
        assert answer.proposed_mode == policy.Mode.Value(f"MODE_{flags.mode.name}")
        assert list(answer.moves) == moves
        assert list(answer.denials) == denials
        assert (answer.denied_count, answer.skipped_requests) == (len(denials), skipped)
        assert answer.next_page_token == ""
        assert answer.end_time.ToDatetime(UTC) - answer.start_time.ToDatetime(UTC) == timedelta(days=10)
        seen |= {denial.reason for denial in answer.denials}
    assert skipped
    assert len(moves) > 20
    if has_master_key:
        # The world has all that can be said of today's users.
        assert {policy.DenialReason.Name(reason).removeprefix("DENIAL_REASON_") for reason in seen} == {
            "NO_KEY_AND_NO_CREDITS",
            "BYOK_REQUIRED",
            "TIER_NOT_ELIGIBLE",
            "KEY_UNUSABLE",
            "INSUFFICIENT_CREDITS",
            "PROVIDER_DISABLED",
        }
    else:
        assert policy.DENIAL_REASON_ENCRYPTION_NOT_CONFIGURED in seen
    assert await contents(sql) == before
    assert await sql.fetchval("SELECT count(*) FROM pg_class WHERE relpersistence = 't'") == 0


async def test_a_simulation_agrees_with_the_decisions_that_are_made_then(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    """Not the oracle's word, but Decide's own: under each mode, for each user and provider."""
    world = await make_world(make, sql, 5)
    # Whether a legacy ciphertext opens, only Decide finds out.
    await sql.execute("DELETE FROM user_api_keys WHERE encrypted_key NOT LIKE 'v1.%'")
    compared = 0
    for flags in ({}, {CREDITS: True}, {ONLY: True}, {ENABLED: False}):
        answer = await simulated(sidecar, flags=flags, window=days(30), page_size=1000)
        await sidecar.call(
            "SetFlags",
            pb.SetFlagsRequest(flags=flags or {ENABLED: True}, reason="r", acknowledge_lockout=True),
        )
        denied = {(one.user_id, one.provider): one.reason for one in answer.denials}
        pairs = {
            (request.user_id, request.provider)
            for request in world.requests
            # An unknown provider is a fault of Decide's caller.
            if request.counts and request.user_id in world.people and request.provider in PROVIDERS[:3]
        }
        for user, provider in sorted(pairs):
            explained = await sidecar.call("Explain", explain_request(user, provider))
            reason = explained.decision.denial.reason
            # Explain knows of holds in flight; a simulation counts what is available.
            if reason == policy.DENIAL_REASON_HOLDS_IN_FLIGHT:
                continue
            assert denied.get((user, provider), 0) == reason, (user, provider)
            compared += 1
        await sidecar.call("SetMode", pb.SetModeRequest(mode=policy.MODE_BYOK_FIRST, reason="r"))
    assert compared > 60


def explain_request(user: str, provider: str) -> Any:
    return routing_service_pb2.ExplainRequest(
        decide=routing_service_pb2.DecideRequest(user_id=user, provider=provider)
    )


# -- the window -----------------------------------------------------------------------------------------


async def test_the_flags_as_they_are_move_nothing_that_today_does_not_explain(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    owner, payer = await make.user(name="owner"), await make.user(name="payer", micros=1_000_000)
    await make.key(owner)
    await paid_by_key(sql, owner, "openai", ago(1), tokens=10, cost_micros=20)
    await paid_by_credits(sql, payer, "openai", ago(1), tokens=30, micros=40)
    answer = await simulated(sidecar)
    assert answer.current_mode == answer.proposed_mode == policy.MODE_BYOK_FIRST
    assert [(move.from_path, move.to_path) for move in answer.moves] == [
        (pb.PAYMENT_PATH_OWN_KEY, pb.PAYMENT_PATH_OWN_KEY),
        (pb.PAYMENT_PATH_CREDITS, pb.PAYMENT_PATH_CREDITS),
    ]
    assert [(move.total_tokens, move.cost_micros) for move in answer.moves] == [(10, 20), (30, 40)]
    assert answer.denied_count == 0

    await sql.execute("DELETE FROM user_api_keys")
    (denial,) = (await simulated(sidecar)).denials
    assert (denial.user_id, denial.reason) == ("owner", policy.DENIAL_REASON_NO_KEY_AND_NO_CREDITS)


@pytest.mark.parametrize(
    ("window", "counted"), [(None, 2), (1 / 1440, 0), (1.5, 1), (7, 2), (40, 3), (366, 4)]
)
async def test_a_window_leaves_out_what_is_older(
    sidecar: Sidecar, make: Factory, sql: Connection, window: float | None, counted: int
) -> None:
    user = await make.user()
    for age in (1, 6.9, 39, 365, 367):
        await paid_by_key(sql, user, "openai", ago(age))
    fields = {} if window is None else {"window": days(window)}
    answer = await simulated(sidecar, **fields)
    assert sum(move.requests for move in answer.moves) == counted
    assert answer.end_time.seconds - answer.start_time.seconds == round((window or 7) * 86_400)


async def test_a_day_is_a_day_in_utc_wherever_the_database_is(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    name = await sql.fetchval("SELECT current_database()")
    await sql.execute(f"ALTER DATABASE {name} SET timezone = 'Pacific/Kiritimati'")
    user = await make.user()
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=1)
    for offset in (-1, 0, 1):
        await paid_by_key(sql, user, "openai", midnight + timedelta(microseconds=offset))
    answer = await simulated(sidecar)
    assert [(move.day, move.requests) for move in answer.moves] == [
        ((midnight - timedelta(days=1)).date().isoformat(), 1),
        (midnight.date().isoformat(), 2),
    ]


async def test_nothing_recorded_makes_an_empty_answer(sidecar: Sidecar, make: Factory) -> None:
    await make.user()
    answer = await simulated(sidecar, flags={ONLY: True})
    assert (list(answer.moves), list(answer.denials), answer.denied_count) == ([], [], 0)
    assert answer.proposed_mode == policy.MODE_BYOK_ONLY


async def test_more_moves_than_an_answer_holds_are_refused(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user()
    insert = own_key_requests("generate_series($2::int, $3) n", provider="'p' || n")
    # Those of users who are gone are no moves, whatever their number.
    await sql.execute(insert, "gone", 1, 100)
    await sql.execute(insert, user, 1, MOST_MOVES)
    answer = await simulated(sidecar, flags={CREDITS: True})
    assert (len(answer.moves), answer.skipped_requests) == (MOST_MOVES, 100)
    await sql.execute(insert, user, 0, 0)
    refusal = await refused(sidecar, "SimulateFlags", pb.SimulateFlagsRequest())
    refusal.check_field("window", f"more than {MOST_MOVES} moves")


# -- bad input ------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"flags": {"x": True}}, 'flags["x"]', "There is no such flag; there are byok_enabled"),
    ({"flags": {ENABLED: True, "🔑\n": False}}, r'flags["\ud83d\udd11\n"]', "There is no such flag"),
    ({"window": duration_pb2.Duration(seconds=59)}, "window", "From 60 to 31622400 seconds."),
    ({"window": duration_pb2.Duration(seconds=59, nanos=999_999_999)}, "window", "From 60"),
    ({"window": duration_pb2.Duration(seconds=366 * 86_400 + 1)}, "window", "31622400"),
    ({"window": duration_pb2.Duration(seconds=-60)}, "window", "From 60"),
    ({"window": duration_pb2.Duration()}, "window", "From 60"),
    ({"window": duration_pb2.Duration(seconds=2**62)}, "window", "From 60"),
    ({"page_size": -1}, "page_size", "From 1 to 1000; this is -1."),
    ({"page_size": 1001}, "page_size", "From 1 to 1000; this is 1001."),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: str(bad[1]))
async def test_bad_input_names_its_field_and_its_limit(
    sidecar: Sidecar, bad: tuple[dict[str, Any], str, str]
) -> None:
    fields, field_name, sentence = bad
    refusal = await refused(sidecar, "SimulateFlags", pb.SimulateFlagsRequest(**fields))
    refusal.check(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "BadRequest")
    assert list(refusal.fields) == [field_name]
    assert sentence in refusal.fields[field_name]


async def test_all_that_is_wrong_is_told_at_once(sidecar: Sidecar) -> None:
    request = pb.SimulateFlagsRequest(flags={"x": True}, window=duration_pb2.Duration(), page_size=5000)
    refusal = await refused(sidecar, "SimulateFlags", request)
    assert refusal.fields.keys() == {'flags["x"]', "window", "page_size"}


# -- pages ----------------------------------------------------------------------------------------------

CROWD = 1203


async def make_crowd(sql: Connection) -> list[str]:
    """Users without keys and credits, who have all asked something; their ids in order."""
    await sql.execute(
        "INSERT INTO users (id, email, subscription_tier)"
        " SELECT (ARRAY['u', 'Ü', '😀', '\"\\\t', 'Z'])[1 + n % 5] || n, n || '@example.com', 'premium'"
        " FROM generate_series(1, $1::int) n",
        CROWD,
    )
    await ask_again(sql, "now() - interval '1 day'")
    return sorted(row["id"] for row in await sql.fetch("SELECT id FROM users"))


async def ask_again(sql: Connection, at: str) -> None:
    """One more request of everybody."""
    await sql.execute(own_key_requests("users", user="id", at=at))


async def page_through(
    sidecars: Sequence[Sidecar],
    *,
    sizes: Sequence[int],
    between: Callable[[], Any] | None = None,
    **fields: Any,
) -> tuple[list[pb.SimulatedDenial], list[pb.SimulateFlagsResponse]]:
    """All denials, page by page, each page from the next sidecar and of the next size."""
    denials: list[pb.SimulatedDenial] = []
    answers: list[pb.SimulateFlagsResponse] = []
    token = ""
    for sidecar, size in zip(itertools.cycle(sidecars), itertools.cycle(sizes), strict=False):
        answer = await simulated(sidecar, page_size=size, page_token=token, **fields)
        assert len(answer.denials) <= size
        denials += answer.denials
        answers.append(answer)
        if not (token := answer.next_page_token):
            return denials, answers
        if between is not None:
            await between()
    raise AssertionError


@pytest.mark.parametrize("sizes", [[1000], [0], [7, 500, 1], [501], [CROWD // 3]], ids=str)
async def test_pages_are_complete_in_order_and_of_one_simulation(
    sidecar: Sidecar, sql: Connection, sizes: list[int]
) -> None:
    users = await make_crowd(sql)

    async def more_requests() -> None:
        await ask_again(sql, "now()")

    denials, answers = await page_through(
        [sidecar], sizes=[size or 100 for size in sizes], between=more_requests, flags={ONLY: True}
    )
    assert [denial.user_id for denial in denials] == users
    assert {denial.requests for denial in denials} == {1}
    assert {denial.reason for denial in denials} == {policy.DENIAL_REASON_BYOK_REQUIRED}
    first, *others = answers
    assert sum(move.requests for move in first.moves) == CROWD
    for answer in others:
        assert len(answer.moves) == 0
        for name in ("current_mode", "proposed_mode", "denied_count", "start_time", "end_time"):
            assert getattr(answer, name) == getattr(first, name)


async def test_a_page_has_a_hundred_unless_asked_otherwise(sidecar: Sidecar, sql: Connection) -> None:
    await make_crowd(sql)
    answer = await simulated(sidecar)
    assert (len(answer.denials), answer.denied_count) == (100, CROWD)


async def test_another_sidecar_goes_on_where_this_one_was(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    """Nothing but the token passes between them: it holds the time and the flags of the simulation."""
    users = await make_crowd(sql)
    sidecars = [await start_sidecar() for _ in range(3)]

    async def meanwhile() -> None:
        await ask_again(sql, "now()")
        await make.flags(**{ENABLED: False, CREDITS: True})

    denials, answers = await page_through(
        sidecars, sizes=[250], between=meanwhile, flags={ONLY: True}, window=days(3)
    )
    assert [denial.user_id for denial in denials] == users
    assert {denial.requests for denial in denials} == {1}
    assert {denial.reason for denial in denials} == {policy.DENIAL_REASON_BYOK_REQUIRED}
    assert {answer.proposed_mode for answer in answers} == {policy.MODE_BYOK_ONLY}
    assert len({answer.end_time.ToNanoseconds() for answer in answers}) == 1
    assert [len(answer.moves) for answer in answers[1:]] == [0] * (len(answers) - 1)


async def test_a_token_leads_on_only_in_the_simulation_it_is_of(sidecar: Sidecar, sql: Connection) -> None:
    await make_crowd(sql)
    token = (await simulated(sidecar, flags={ONLY: True}, window=days(7))).next_page_token
    for fields in (
        {"flags": {ONLY: False}, "window": days(7)},
        {"flags": {ONLY: True}, "window": days(6)},
        {"flags": {ONLY: True}},
        {},
    ):
        request = pb.SimulateFlagsRequest(page_token=token, **fields)
        refusal = await refused(sidecar, "SimulateFlags", request)
        refusal.check(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_TOKEN", "BadRequest")
        assert refusal.info.metadata["cause"] == "other_query"


async def test_what_is_not_kept_for_its_size_is_simulated_again(database: str, sql: Connection) -> None:
    users = await make_crowd(sql)
    timeout = timedelta(seconds=30)
    async with open_database(
        database, connections=2, connect_timeout=timeout, statement_timeout=timeout
    ) as opened:
        simulator = Simulator(
            RequestLog(opened), keyring=None, default_hold_micros=HOLD_MICROS, most_kept_bytes=1
        )
        ask = SimulationAsk(proposed={ONLY: True}, window=timedelta(days=7), size=300, after=None)
        page = await simulator.simulate(ask)
        found, pages = list(page.denials), 1
        while page.next is not None:
            page = await simulator.simulate(replace(ask, after=page.next))
            assert page.simulation.denials.count == CROWD
            found += page.denials
            pages += 1
        assert [one.user_id for one in found] == users
        assert pages > CROWD // 300


def denied_users(numbers: range) -> list[DeniedUser]:
    return [
        DeniedUser(f"user-{number:06}", "", "openai", DenialReason.BYOK_REQUIRED, number)
        for number in numbers
    ]


def test_packed_denials_say_where_they_end() -> None:
    everyone = denied_users(range(2000))
    packed = PackedDenials(after=("user-000499", "openai"), most_bytes=1)
    for start in range(0, 2000, 400):
        packed.add(everyone[start : start + 400])
    assert packed.count == 2000
    # One block is kept, whatever it takes: what is in it of 400 to 799 comes after the place.
    assert packed.page(("user-000499", "openai"), 100) == (everyone[500:600], True)
    assert packed.page(("user-000499", "openai"), 300) == (everyone[500:800], True)
    assert packed.page(("user-000499", "openai"), 1000) == (everyone[500:800], True)
    assert packed.page(("user-000799", "openai"), 1) is None
    assert packed.page(("user-000498", "openai"), 1) is None
    assert packed.page(None, 1) is None


def test_packed_denials_that_are_whole_have_a_last_page() -> None:
    everyone = denied_users(range(1000))
    packed = PackedDenials(after=None, most_bytes=1 << 20)
    for start in range(0, 1000, 500):
        packed.add(everyone[start : start + 500])
    assert packed.page(None, 1000) == (everyone, False)
    assert packed.page(None, 999) == (everyone[:999], True)
    assert packed.page(("user-000998", "openai"), 5) == (everyone[999:], False)
    assert packed.page(("user-000999", "openai"), 5) == ([], False)
    assert packed.packed_bytes < 20 * 1000


async def test_simulations_are_kept_in_bounds() -> None:
    def simulation(denials: int = 1) -> Simulation:
        packed = PackedDenials(after=None, most_bytes=1 << 20)
        packed.add(denied_users(range(denials)))
        now = datetime.now(UTC)
        return Simulation(
            id=new_id(),
            current_mode=Mode.BYOK_FIRST,
            proposed=Flags(),
            start=now,
            end=now,
            moves=(),
            skipped_requests=0,
            locked_out_users=0,
            denials=packed,
        )

    kept = KeptSimulations(most_bytes=1 << 20)
    many = [simulation() for _ in range(MOST_KEPT + 3)]
    for one in many:
        kept.keep(one)
    assert [kept.get(one.id) is not None for one in many] == [False] * 3 + [True] * MOST_KEPT

    large = [simulation(5000) for _ in range(3)]
    kept = KeptSimulations(most_bytes=large[0].denials.packed_bytes * 5 // 2)
    for one in large:
        kept.keep(one)
    assert [kept.get(one.id) is not None for one in large] == [False, True, True]


# -- under load -----------------------------------------------------------------------------------------

GATE = 4711


@asynccontextmanager
async def simulations_that_wait(sql: Connection) -> AsyncIterator[Callable[[], Any]]:
    """Simulations that come to the keys stay there until the gate is opened, or the block ends."""
    await sql.execute(
        f"""
        CREATE OR REPLACE FUNCTION keyturn_master_key_id(ciphertext text) RETURNS text
        LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
        BEGIN
            WHILE NOT pg_try_advisory_xact_lock_shared({GATE}) LOOP PERFORM pg_sleep(0.01); END LOOP;
            RETURN CASE WHEN ciphertext LIKE 'v1.%' THEN split_part(ciphertext, '.', 2) ELSE 'legacy' END;
        END $$
        """
    )
    await sql.execute("SELECT pg_advisory_lock($1)", GATE)

    async def open_gate() -> None:
        await sql.execute("SELECT pg_advisory_unlock_all()")

    try:
        yield open_gate
    finally:
        await open_gate()


async def simulating(sql: Connection) -> int:
    """How many simulations are under way."""
    count: int = await sql.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'active'"
        " AND query LIKE '%keyturn_master_key_id%' AND pid <> pg_backend_pid()"
    )
    return count


async def test_decisions_are_made_while_a_simulation_is_under_way(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    owner, payer = await make.user(), await make.user(micros=1_000_000)
    await make.key(owner)
    async with simulations_that_wait(sql) as open_gate:
        simulation = asyncio.create_task(simulated(sidecar))
        await eventually(lambda: simulating(sql))
        for _ in range(20):
            assert (await sidecar.decide(owner)).WhichOneof("route") == "key"
            assert (await sidecar.decide(payer)).WhichOneof("route") in {"ticket", "denial"}
        assert not simulation.done()
        await open_gate()
        assert (await simulation).current_mode == policy.MODE_BYOK_FIRST


async def test_one_simulation_at_a_time_a_few_wait_and_the_rest_are_told_to_come_back(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    sidecar, other = await start_sidecar(), await start_sidecar()
    await make.key(await make.user())
    async with simulations_that_wait(sql) as open_gate:
        calls = [asyncio.create_task(simulated(sidecar)) for _ in range(MOST_ASKING + 7)]
        refused_calls: set[Any] = set()
        while len(refused_calls) < 7:
            done, _ = await asyncio.wait(
                set(calls) - refused_calls, timeout=20, return_when=asyncio.FIRST_COMPLETED
            )
            assert done
            refused_calls |= done
        for call in refused_calls:
            fault = call.exception()
            assert isinstance(fault, Fault)
            Refusal.of(fault).check(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", "RetryInfo")
        await eventually(lambda: simulating(sql))
        assert await simulating(sql) == 1
        # Another sidecar has a queue of its own.
        elsewhere = asyncio.create_task(simulated(other))

        async def both() -> bool:
            return await simulating(sql) == 2

        await eventually(both)
        await open_gate()
        await elsewhere
        for call in set(calls) - refused_calls:
            assert (await call).current_mode == policy.MODE_BYOK_FIRST
    assert await simulated(sidecar)


async def test_a_caller_who_hangs_up_ends_the_simulation_and_gives_up_the_turn(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    await make.key(await make.user())
    async with simulations_that_wait(sql) as open_gate:
        calls = [asyncio.create_task(simulated(sidecar)) for _ in range(MOST_ASKING)]
        await eventually(lambda: simulating(sql))
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

        async def idle() -> bool:
            return await simulating(sql) == 0

        await eventually(idle)
        await open_gate()
        answers = await asyncio.gather(*(simulated(sidecar) for _ in range(MOST_ASKING)))
        assert len(answers) == MOST_ASKING


async def test_pages_of_a_simulation_do_not_wait_for_another_one(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    users = await make_crowd(sql)
    await make.key(await make.user(name="~ the last one"))
    token = (await simulated(sidecar, flags={ONLY: True})).next_page_token
    async with simulations_that_wait(sql) as open_gate:
        simulation = asyncio.create_task(simulated(sidecar))
        await eventually(lambda: simulating(sql))
        answer = await simulated(sidecar, flags={ONLY: True}, page_token=token)
        assert [denial.user_id for denial in answer.denials] == users[100:200]
        assert not simulation.done()
        await open_gate()
        await simulation
