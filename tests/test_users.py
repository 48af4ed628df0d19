"""UserService: users are made and changed once, read as they are, and seen by the next decision."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import asyncpg
import grpc
import pytest

from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import user_service_pb2 as pb
from tests.factories import Connection, Factory
from tests.refusals import contents, refused
from tests.support import Sidecar
from tests.test_bad_input import Case, too_long

UNICODE_IDS = ("ü-\N{GRINNING FACE}", "用户", "a b'c\"d%_\\", "\N{GRINNING FACE}" * 128, "x" * 128, "None")


async def put(sidecar: Sidecar, user_id: str, tier: str = "premium", email: str = "") -> pb.PutUserResponse:
    answer: pb.PutUserResponse = await sidecar.call(
        "PutUser", pb.PutUserRequest(user_id=user_id, email=email, tier=tier)
    )
    return answer


async def get(sidecar: Sidecar, user_id: str) -> pb.User:
    user: pb.User = (await sidecar.call("GetUser", pb.GetUserRequest(user_id=user_id))).user
    return user


async def test_a_user_is_made_then_changed_and_the_same_again_changes_nothing(
    sidecar: Sidecar, sql: Connection
) -> None:
    before = datetime.now(UTC)
    made = await put(sidecar, "u1", "free", "u1@example.com")
    assert made.created
    assert (made.user.user_id, made.user.email, made.user.tier) == ("u1", "u1@example.com", "free")
    assert made.user.is_known_tier
    assert made.user.create_time == made.user.update_time
    assert before <= made.user.create_time.ToDatetime(UTC) <= datetime.now(UTC)
    assert await get(sidecar, "u1") == made.user

    row = await sql.fetchrow("SELECT xmin::text, * FROM users")
    again = await put(sidecar, "u1", "free", "u1@example.com")
    assert (again.created, again.user) == (False, made.user)
    assert await sql.fetchrow("SELECT xmin::text, * FROM users") == row, "the row was not even touched"

    changed = await put(sidecar, "u1", "lifetime", "new@example.com")
    assert not changed.created
    assert (changed.user.tier, changed.user.email) == ("lifetime", "new@example.com")
    assert changed.user.create_time == made.user.create_time
    assert changed.user.update_time.ToDatetime() > made.user.update_time.ToDatetime()
    assert await get(sidecar, "u1") == changed.user
    assert await sql.fetchval("SELECT count(*) FROM credit_accounts") == 1


async def test_an_empty_email_clears_it(sidecar: Sidecar, sql: Connection) -> None:
    await put(sidecar, "u1", email="u1@example.com")
    assert (await put(sidecar, "u1")).user.email == ""
    assert await sql.fetchval("SELECT email FROM users") is None
    row = await sql.fetchrow("SELECT xmin::text FROM users")
    await put(sidecar, "u1")
    assert await sql.fetchrow("SELECT xmin::text FROM users") == row


async def test_a_tier_that_nobody_described_is_taken_and_told(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    assert not (await put(sidecar, "u1", "platinum")).user.is_known_tier
    assert not (await get(sidecar, "u1")).is_known_tier
    await make.key("u1")
    await make.grant("u1", 1_000)
    decided = await sidecar.decide("u1", cost_micros=1)
    assert decided.reason == policy.REASON_TIER_NOT_ELIGIBLE
    await sql.execute("INSERT INTO subscription_tiers (name, rank) VALUES ('platinum', 50)")
    assert (await get(sidecar, "u1")).is_known_tier


async def test_ids_of_any_script_go_in_and_come_out(sidecar: Sidecar, subtests: pytest.Subtests) -> None:
    for user_id in UNICODE_IDS:
        with subtests.test(user_id):
            email = f"{user_id[:300]}@example.com"
            assert (await put(sidecar, user_id, "premium", email)).created
            user = await get(sidecar, user_id)
            assert (user.user_id, user.email) == (user_id, email)
            page = await sidecar.call("GetUserSettings", pb.GetUserSettingsRequest(user_id=user_id))
            assert page.page_visible


async def test_users_that_a_product_inserts_are_there(sidecar: Sidecar, sql: Connection) -> None:
    await sql.execute(
        "INSERT INTO users (id, email, subscription_tier) VALUES ('sql', 'sql@example.com', 'premium')"
    )
    await sql.execute("INSERT INTO users (id) VALUES ('bare')")
    await sql.execute(
        "INSERT INTO users (id, email, subscription_tier)"
        " VALUES ('0192f0c1-2d3e-7a4b-8c5d-6e7f8091a2b3'::uuid, 'uuid@example.com', 'premium')"
    )
    assert (await get(sidecar, "sql")).email == "sql@example.com"
    bare = await get(sidecar, "bare")
    assert (bare.email, bare.tier) == ("", "free")
    assert not (await put(sidecar, "bare", "free")).created
    assert (await get(sidecar, "0192f0c1-2d3e-7a4b-8c5d-6e7f8091a2b3")).tier == "premium"


async def test_a_changed_tier_is_seen_by_the_next_decision_without_any_announcement(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    sidecar: Sidecar = await start_sidecar(profile_ttl=3600, unpushed_ttl=3600)
    await sql.execute("ALTER TABLE users DISABLE TRIGGER push_update")
    user = await make.user("free", micros=1_000)
    await make.key(user)
    assert (await sidecar.decide(user, cost_micros=1)).WhichOneof("route") == "ticket"
    await put(sidecar, user, "premium")
    assert (await sidecar.decide(user, cost_micros=1)).WhichOneof("route") == "key"


async def test_of_many_who_make_a_user_at_once_one_makes_it(
    start_sidecar: Callable[..., Any], sql: Connection
) -> None:
    sidecars = [await start_sidecar(), await start_sidecar()]
    tiers = ("free", "premium", "lifetime")
    answers = await asyncio.gather(
        *(put(sidecars[index % 2], "u1", tiers[index % 3], f"{index}@example.com") for index in range(60))
    )
    assert sum(answer.created for answer in answers) == 1
    assert await sql.fetchval("SELECT count(*) FROM users") == 1
    assert await sql.fetchval("SELECT count(*) FROM credit_accounts") == 1
    user = await get(sidecars[0], "u1")
    assert user in [answer.user for answer in answers]


async def test_users_made_and_deleted_at_once_are_answered(sidecar: Sidecar, sql: Connection) -> None:
    async def delete() -> None:
        for _ in range(100):
            await sql.execute("DELETE FROM users WHERE id = 'u1'")

    deleting = asyncio.create_task(delete())
    answers = [await put(sidecar, "u1") for _ in range(60)]
    await deleting
    assert {answer.user.user_id for answer in answers} == {"u1"}
    await put(sidecar, "u1")
    assert (await get(sidecar, "u1")).tier == "premium"


async def test_a_row_that_somebody_keeps_locked_is_no_outage(
    sidecar: Sidecar, make: Factory, database: str
) -> None:
    user = await make.user("free")
    psql = await asyncpg.connect(database)
    try:
        async with psql.transaction():
            await psql.execute("SELECT 1 FROM users WHERE id = $1 FOR UPDATE", user)
            refusal = await refused(sidecar, "PutUser", pb.PutUserRequest(user_id=user, tier="premium"))
    finally:
        await psql.close()
    refusal.check(grpc.StatusCode.UNAVAILABLE, "ROW_LOCKED", "RetryInfo")
    assert refusal.retry.retry_delay.seconds == 1
    assert (await put(sidecar, user, "premium")).user.tier == "premium"


BAD_USERS: list[Case] = [
    ({"user_id": ""}, "user_id", "Required."),
    *too_long("user_id", 128),
    *too_long("email", 320),
    ({"tier": ""}, "tier", "Required."),
    *too_long("tier", 64),
]


async def test_a_user_that_breaks_a_limit_is_refused_by_name_and_changes_nothing(
    sidecar: Sidecar, make: Factory, sql: Connection, subtests: pytest.Subtests
) -> None:
    user = await make.user()
    before = await contents(sql)
    good: dict[str, Any] = {"user_id": user, "email": "u@example.com", "tier": "free"}
    for fields, field, sentence in BAD_USERS:
        with subtests.test(repr(fields)):
            refusal = await refused(sidecar, "PutUser", pb.PutUserRequest(**good | fields))
            refusal.check_field(field, sentence)
    all_wrong = pb.PutUserRequest(email="a\nb@example.com")
    assert set((await refused(sidecar, "PutUser", all_wrong)).fields) == {"user_id", "email", "tier"}
    assert await contents(sql) == before
    await put(sidecar, user, "t" * 64, "e" * 320)


async def test_reading_breaks_on_the_same_limits_and_names_who_is_not_there(
    sidecar: Sidecar, subtests: pytest.Subtests
) -> None:
    requests = {"GetUser": pb.GetUserRequest, "GetUserSettings": pb.GetUserSettingsRequest}
    for method, request in requests.items():
        for fields, field, sentence in [({"user_id": ""}, "user_id", "Required."), *too_long("user_id", 128)]:
            with subtests.test(f"{method} {fields}"):
                (await refused(sidecar, method, request(**fields))).check_field(field, sentence)
        refusal = await refused(sidecar, method, request(user_id="nobody"))
        refusal.check(grpc.StatusCode.NOT_FOUND, "USER_NOT_FOUND", "ResourceInfo")
        assert (refusal.resource.resource_type, refusal.resource.resource_name) == ("user", "nobody")


async def test_a_change_says_who_made_it_and_never_where_the_user_is_told(sidecar: Sidecar) -> None:
    await put(sidecar, "u1", "premium", "private@example.com")
    lines = [json.loads(line) for line in sidecar.log.getvalue().splitlines()]
    (line,) = [line for line in lines if line["event"] == "operator_change"]
    assert (line["action"], line["caller"], line["user_id"]) == ("PutUser", "socket", "u1")
    assert "private@example.com" not in sidecar.log.getvalue()
