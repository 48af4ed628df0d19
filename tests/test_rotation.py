"""Rotation: under load, interrupted, beside others who write; and what it leaves alone."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

import asyncpg
import pytest
import pytest_asyncio

from keyturn.secret import Secret
from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import routing_service_pb2 as pb
from keyturn_server import rotation as rotation_module
from keyturn_server.keys.envelope import UnreadableCause, open_sealed, seal
from keyturn_server.keys.keyring import Keyring
from keyturn_server.rotation import Progress, Rotated, Rotation, SealedKey, SidecarsBehind
from keyturn_server.store.database import Database, open_database
from keyturn_server.store.rotation import SealedKeyRows
from tests.cli.command import rotating
from tests.factories import KEYRING, Connection, Factory, legacy_sealed
from tests.support import MASTER_KEY, Sidecar, eventually

NEW_KEY = "b7e151628aed2a6abf7158809cf4f3c762e7160f38b4da56a784d9045190cfef"
LOST_KEY = "c4d1f0b38e6a27955b0d9c8e1f3a6472d85be07493cf16a2b8e4570d2c91a63f"


def keyring_of(current: str, *retired: str) -> Keyring:
    keyring = Keyring.from_settings(current, retired)
    assert keyring is not None
    return keyring


RING = keyring_of(NEW_KEY, MASTER_KEY)
NEW_RING = keyring_of(NEW_KEY)
NEW, OLD = RING.ids


LIMIT = timedelta(seconds=60)


@pytest_asyncio.fixture
async def pool(database: str) -> AsyncIterator[Database]:
    async with open_database(
        database, connections=4, connect_timeout=LIMIT, statement_timeout=LIMIT
    ) as opened:
        yield opened


@pytest.fixture
def rows(pool: Database) -> SealedKeyRows:
    """The test's stored keys."""
    return SealedKeyRows(pool)


async def rotated(rows: SealedKeyRows, *, ring: Keyring = RING, **options: Any) -> Rotated:
    return await Rotation(rows, ring, **{"batch": 7, **options}).run()


async def secrets_of(sql: Connection, ring: Keyring) -> dict[UUID, str]:
    """Every stored key, opened."""
    return {
        row["id"]: open_sealed(
            ring, row["encrypted_key"], user_id=row["user_id"], provider=row["provider"], row_id=row["id"]
        ).reveal()
        for row in await sql.fetch("SELECT user_id, id, provider, encrypted_key FROM user_api_keys")
    }


async def resting(sql: Connection) -> Counter[str]:
    """How many keys rest under each master key, counted without an index."""
    found = await sql.fetch("SELECT keyturn_master_key_id(encrypted_key) AS id FROM user_api_keys")
    return Counter(row["id"] for row in found)


async def besides(sql: Connection) -> list[str]:
    """Every stored key but for its ciphertext, as text."""
    query = "SELECT (to_jsonb(k) - 'encrypted_key')::text FROM user_api_keys k ORDER BY user_id, id"
    return [row[0] for row in await sql.fetch(query)]


async def some_keys(make: Factory, *, users: int = 12) -> dict[UUID, str]:
    """Users with keys in every shape that opens, and what those are."""
    made = {}
    for number in range(users):
        user = await make.user(name=f"u{number}-{'äß🔑'[number % 3]}-{secrets.token_hex(2)}")
        for provider in ("openai", "anthropic"):
            text = f"sk-test-{secrets.token_hex(12)}-é"
            made[await make.key(user, provider, secret=text)] = text
        text = f"sk-old-{secrets.token_hex(12)}"
        made[await make.key(user, encrypted_key=legacy_sealed(text), label="node")] = text
        text = f"sk-new-{secrets.token_hex(12)}"
        made[await make.key(user, secret=text, keyring=NEW_RING, label="current")] = text
    return made


# -- what it does, and what it leaves alone ------------------------------------------------------------


async def test_every_key_rests_under_the_new_master_key_afterwards_and_is_otherwise_as_it_was(
    rows: SealedKeyRows, make: Factory, sql: Connection
) -> None:
    made = await some_keys(make)
    await sql.execute(
        "UPDATE user_api_keys SET last_error = 'no', last_error_at = now(), cooldown_until = now(), "
        "total_tokens = 5, revision = 3, is_valid = false WHERE provider = 'anthropic'"
    )
    before = await besides(sql)
    seen: list[Progress] = []
    outcome = await rotated(rows, on_progress=seen.append)
    assert await resting(sql) == {NEW: 48}
    assert await secrets_of(sql, NEW_RING) == made
    assert await besides(sql) == before, "revision and updated_at among it"
    assert outcome.found == outcome.rewritten == {OLD: 24, "legacy": 12}
    assert (outcome.left, outcome.unreadable, outcome.is_done) == ({}, {}, True)
    assert list(outcome.removable) == [OLD]
    assert [one.rewritten for one in seen] == sorted(one.rewritten for one in seen)
    assert seen[-1] == Progress(total=36, rewritten=36, unreadable=0)


async def test_a_second_run_finds_nothing_to_do(rows: SealedKeyRows, make: Factory, sql: Connection) -> None:
    await some_keys(make)
    await rotated(rows)
    before = await sql.fetch("SELECT encrypted_key, xmin FROM user_api_keys ORDER BY user_id, id")
    outcome = await rotated(rows)
    assert (outcome.found, outcome.rewritten, outcome.is_done) == ({}, {}, True)
    assert before == await sql.fetch("SELECT encrypted_key, xmin FROM user_api_keys ORDER BY user_id, id")


async def test_legacy_keys_are_rewritten_also_when_the_master_key_stays(
    rows: SealedKeyRows, make: Factory, sql: Connection
) -> None:
    user = await make.user()
    key = await make.key(user, encrypted_key=legacy_sealed("sk-node"))
    outcome = await rotated(rows, ring=KEYRING)
    assert await secrets_of(sql, KEYRING) == {key: "sk-node"}
    assert await resting(sql) == {OLD: 1}
    assert (outcome.rewritten, outcome.removable) == ({"legacy": 1}, ())


async def test_a_rehearsal_opens_every_key_and_writes_nothing(
    rows: SealedKeyRows, make: Factory, sql: Connection
) -> None:
    await some_keys(make)
    user = await make.user()
    await make.key(user, encrypted_key=legacy_sealed("sk", master_key=LOST_KEY))
    before = await sql.fetch("SELECT encrypted_key, xmin FROM user_api_keys ORDER BY user_id, id")
    outcome = await Rotation(rows, RING, batch=5).rehearse()
    assert before == await sql.fetch("SELECT encrypted_key, xmin FROM user_api_keys ORDER BY user_id, id")
    assert outcome.rewritten == {OLD: 24, "legacy": 12}
    assert outcome.unreadable == {("legacy", UnreadableCause.TAMPERED): 1}
    assert outcome.left == outcome.found == {OLD: 24, "legacy": 13}
    assert (outcome.is_done, outcome.removable) == (False, ())


async def test_keys_that_do_not_open_stay_and_are_counted_and_listed(
    rows: SealedKeyRows, make: Factory, sql: Connection
) -> None:
    made = await some_keys(make, users=3)
    user, other = await make.user(), await make.user()
    lost = keyring_of(LOST_KEY)
    old = seal(KEYRING, Secret("sk-moved"), user_id=other, provider="openai", row_id=UUID(int=5))
    expected: dict[UUID, tuple[str, UnreadableCause]] = {
        await make.key(user, keyring=lost): (lost.current.id, UnreadableCause.UNKNOWN_KEY),
        await make.key(user, encrypted_key=old): (OLD, UnreadableCause.TAMPERED),
        await make.key(user, encrypted_key=f"v1.{OLD}.AAAA"): (OLD, UnreadableCause.MALFORMED),
        await make.key(user, encrypted_key="v1."): ("", UnreadableCause.MALFORMED),
        await make.key(user, encrypted_key="v1.ü"): ("ü", UnreadableCause.MALFORMED),
        await make.key(user, encrypted_key=""): ("legacy", UnreadableCause.MALFORMED),
        await make.key(user, encrypted_key=legacy_sealed("x", master_key=LOST_KEY)): (
            "legacy",
            UnreadableCause.TAMPERED,
        ),
    }
    before = await sql.fetch("SELECT * FROM user_api_keys WHERE id = ANY ($1) ORDER BY id", list(expected))
    outcome = await rotated(rows, batch=2)
    after = await sql.fetch("SELECT * FROM user_api_keys WHERE id = ANY ($1) ORDER BY id", list(expected))
    assert before == after
    assert {one.key_id: (one.master_key_id, one.cause) for one in outcome.listed} == expected
    assert outcome.unreadable == Counter(expected.values())
    assert outcome.left == Counter(id_ for id_, _ in expected.values())
    assert outcome.is_done, "there is nothing more that it could do"
    assert outcome.removable == (), "keys rest under it"
    await sql.execute("DELETE FROM user_api_keys WHERE id = ANY ($1)", list(expected))
    assert await secrets_of(sql, NEW_RING) == made


async def test_a_thousand_are_listed_and_all_are_counted(
    rows: SealedKeyRows, make: Factory, sql: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotation_module, "MOST_LISTED", 10)
    user = await make.user()
    for _ in range(25):
        await make.key(user, encrypted_key="rubbish")
    outcome = await rotated(rows)
    assert len(outcome.listed) == 10
    assert outcome.unreadable == {("legacy", UnreadableCause.MALFORMED): 25}


# -- beside others who write -----------------------------------------------------------------------------


async def test_a_key_saved_anew_between_reading_and_writing_keeps_its_new_secret(
    pool: Database, make: Factory, sql: Connection
) -> None:
    made = await some_keys(make, users=4)
    user = await make.user()
    key = await make.key(user, secret="sk-first")

    class Overtaken(SealedKeyRows):
        """Somebody saves the key, under the old master key, and another is deleted, before each write."""

        times = 0

        async def rewrite(self, changes: Sequence[tuple[SealedKey, str]]) -> int:
            if key in [one.id for one, _ in changes]:
                self.times += 1
                if self.times < 4:
                    await sql.execute(
                        "UPDATE user_api_keys SET encrypted_key = $2, revision = revision + 1 WHERE id = $1",
                        key,
                        sealed_again(user, key, f"sk-saved-{self.times}"),
                    )
            return await super().rewrite(changes)

    overtaken = Overtaken(pool)
    outcome = await rotated(overtaken)
    assert overtaken.times == 4
    assert await secrets_of(sql, NEW_RING) == {**made, key: "sk-saved-3"}
    assert outcome.is_done
    assert outcome.rewritten[OLD] == 9


def sealed_again(user: str, key: UUID, text: str) -> str:
    return seal(KEYRING, Secret(text), user_id=user, provider="openai", row_id=key)


@pytest.mark.parametrize("under", [OLD, "legacy"])
async def test_a_row_that_somebody_has_locked_is_waited_for_by_nobody(
    rows: SealedKeyRows,
    database: str,
    make: Factory,
    sql: Connection,
    monkeypatch: pytest.MonkeyPatch,
    under: str,
) -> None:
    made = await some_keys(make)
    monkeypatch.setattr(rotation_module, "_PAUSE_SECONDS", 0.01)
    locked = await sql.fetchval(
        "SELECT id FROM user_api_keys WHERE keyturn_master_key_id(encrypted_key) = $1 LIMIT 1", under
    )
    holder: Connection = await asyncpg.connect(database)
    transaction = holder.transaction()
    await transaction.start()
    try:
        await holder.execute("SELECT FROM user_api_keys WHERE id = $1 FOR UPDATE", locked)
        outcome = await rotated(rows)
        assert (outcome.is_done, outcome.left, outcome.removable) == (False, {under: 1}, ())
        assert await resting(sql) == {NEW: 47, under: 1}
    finally:
        await transaction.rollback()
        await holder.close()
    assert (await rotated(rows)).removable == (OLD,)
    assert await secrets_of(sql, NEW_RING) == made


async def test_several_at_once_do_no_harm(rows: SealedKeyRows, make: Factory, sql: Connection) -> None:
    made = await some_keys(make, users=40)
    outcomes = await asyncio.gather(*(rotated(rows, batch=batch) for batch in (3, 3, 7, 11)))
    assert await resting(sql) == {NEW: 160}
    assert await secrets_of(sql, NEW_RING) == made
    assert all(outcome.is_done for outcome in outcomes)
    assert sum(sum(outcome.rewritten.values()) for outcome in outcomes) == 120


async def test_records_and_rotation_do_not_stand_in_each_others_way(
    rows: SealedKeyRows, start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    sidecar: Sidecar = await start_sidecar(encryption_key=NEW_KEY, encryption_keys_retired=MASTER_KEY)
    users = [await make.user() for _ in range(20)]
    for user in users:
        await make.key(user)
    decisions = await asyncio.gather(*(sidecar.decide(user) for user in users for _ in range(5)))
    rotation = asyncio.create_task(rotated(rows, batch=20))
    await asyncio.gather(*(sidecar.record(decision, pb.OUTCOME_SUCCESS) for decision in decisions))
    assert (await rotation).removable == (OLD,)
    assert await sql.fetchval("SELECT sum(total_requests) FROM user_api_keys") == 100
    assert await resting(sql) == {NEW: 20}


async def test_a_handle_given_out_before_is_good_afterwards(
    rows: SealedKeyRows, start_sidecar: Callable[..., Any], make: Factory
) -> None:
    sidecar: Sidecar = await start_sidecar(encryption_key=NEW_KEY, encryption_keys_retired=MASTER_KEY)
    user = await make.user()
    await make.key(user, secret="sk-test-0123456789abcdef")
    decision = await sidecar.decide(user)
    await rotated(rows)
    redeemed = await sidecar.call("Redeem", pb.RedeemRequest(key_handle=decision.key.handle))
    assert redeemed.secret == "sk-test-0123456789abcdef"
    recorded = await sidecar.record(decision, pb.OUTCOME_AUTH_REJECTED)
    assert recorded.key_state == policy.KEY_STATE_INVALID, "it is the same secret: what happened to it counts"


# -- sidecars that are behind ------------------------------------------------------------------------------


async def test_it_refuses_while_a_sidecar_seals_under_another_master_key(
    rows: SealedKeyRows, start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    await some_keys(make)
    await start_sidecar(encryption_key=NEW_KEY, encryption_keys_retired=MASTER_KEY)
    await start_sidecar(encryption_key=None)
    assert {one.master_key_id for one in await rows.sidecars()} == {NEW, None}
    await start_sidecar(encryption_keys_retired=NEW_KEY)
    with pytest.raises(SidecarsBehind) as caught:
        await rotated(rows)
    assert [one.master_key_id for one in caught.value.behind] == [OLD]
    assert str(caught.value.behind[0].backend) in str(caught.value)
    assert (await resting(sql))[OLD] == 24
    outcome = await rotated(rows, force=True)
    assert await resting(sql) == {NEW: 48}
    assert outcome.is_done
    assert outcome.removable == (), "the next key that it saves rests under the old one"
    assert [one.master_key_id for one in outcome.behind] == [OLD]


async def test_it_stops_when_such_a_sidecar_appears(
    pool: Database, start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    await some_keys(make, users=30)
    waiting = asyncio.Event()
    going_on = asyncio.Event()

    class Slow(SealedKeyRows):
        async def rewrite(self, changes: Sequence[tuple[SealedKey, str]]) -> int:
            waiting.set()
            await going_on.wait()
            return await super().rewrite(changes)

    running = asyncio.create_task(rotated(Slow(pool), batch=1))
    await waiting.wait()
    await start_sidecar()
    going_on.set()
    with pytest.raises(SidecarsBehind):
        await running
    assert (await resting(sql))[NEW] > 30
    assert (await resting(sql))[OLD] > 0


async def test_sidecars_of_another_database_are_not_meant(
    rows: SealedKeyRows, empty_database: str, make: Factory
) -> None:
    connection = await asyncpg.connect(
        empty_database, server_settings={"application_name": f"keyturn push {OLD}"}
    )
    try:
        assert await rows.sidecars() == []
        assert (await rotated(rows)).is_done
    finally:
        await connection.close()


async def test_a_role_without_more_rights_than_it_needs_sees_the_sidecars_and_rotates(
    database: str, start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    made = await some_keys(make)
    await start_sidecar(encryption_key=NEW_KEY, encryption_keys_retired=MASTER_KEY)
    role = f"rotator_{secrets.token_hex(4)}"
    await sql.execute(f"CREATE ROLE {role}; GRANT SELECT, UPDATE ON user_api_keys TO {role}")
    try:
        async with open_database(
            f"{database}&role={role}", connections=2, connect_timeout=LIMIT, statement_timeout=LIMIT
        ) as pool:
            rows = SealedKeyRows(pool)
            assert await pool.fetchval("SELECT current_user") == role
            assert [one.master_key_id for one in await rows.sidecars()] == [NEW]
            assert (await rotated(rows)).is_done
    finally:
        await sql.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
    assert await secrets_of(sql, NEW_RING) == made


# -- under load --------------------------------------------------------------------------------------------


async def test_no_decision_fails_while_it_runs_is_killed_and_runs_again(
    database: str, start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    wanted = {}
    for number in range(1500):
        user, text = f"user-{number}", f"sk-test-{number:032x}"
        legacy: dict[str, Any] = {"encrypted_key": legacy_sealed(text)} if number % 5 == 0 else {}
        await make.user(name=user)
        await make.key(user, secret=text, **legacy)
        wanted[user] = text
    both = {"encryption_key": NEW_KEY, "encryption_keys_retired": MASTER_KEY}
    sidecars: list[Sidecar] = [await start_sidecar(**both)]
    answered = 0
    stop = asyncio.Event()

    async def ask(start: int) -> None:
        nonlocal answered
        pick = random.Random(start)  # noqa: S311
        while not stop.is_set():
            # Few users often: with a profile from before. Many once: with what is there now.
            user = f"user-{pick.randrange(20 if answered % 2 else 1500)}"
            sidecar = sidecars[answered % len(sidecars)]
            decision = await sidecar.decide(user, key_delivery=pb.KEY_DELIVERY_INLINE)
            assert decision.key.secret == wanted[user], decision.reason
            answered += 1

    async def has_begun(left: int) -> bool:
        return 0 < sum((await resting(sql) - Counter({NEW: 10**6})).values()) < left

    async with asyncio.TaskGroup() as group:
        for start in range(4):
            group.create_task(ask(start))
        await eventually(lambda: _done(answered > 50))
        left = 1500
        for round_ in range(2):
            async with rotating(
                "--batch", "2", database=database, current=NEW_KEY, retired=MASTER_KEY
            ) as run:
                await eventually(partial(has_begun, left))
                assert run.returncode is None, "it was to be killed in the middle"
                run.kill()
                assert await run.wait() == -9
            now = await resting(sql)
            left = now.total() - now[NEW]
            assert left > 0
            if round_ == 0:
                sidecars.append(await start_sidecar(**both))
        async with rotating("--batch", "50", database=database, current=NEW_KEY, retired=MASTER_KEY) as run:
            assert await run.wait() == 0
        before = answered
        await eventually(lambda: _done(answered > before + 50))
        stop.set()
    assert await resting(sql) == {NEW: 1500}
    assert not [sidecar for sidecar in sidecars if "key_unreadable" in sidecar.log.getvalue()]

    only_new: Sidecar = await start_sidecar(encryption_key=NEW_KEY)
    for user, text in wanted.items():
        decision = await only_new.decide(user, key_delivery=pb.KEY_DELIVERY_INLINE)
        assert decision.key.secret == text


async def _done(value: bool) -> bool:
    return value
