"""The audit: a line for every secret that leaves, with the right ids and without the secret."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import io
import json
import os
import re
import secrets
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest

from keyturn.v1 import routing_service_pb2 as pb
from keyturn.v1 import user_service_pb2 as user_pb
from keyturn_server.access import ALL_ROLES, Caller
from keyturn_server.audit import Audit, open_audit
from keyturn_server.ids import new_id
from keyturn_server.logs import LineWriter
from keyturn_server.store.database import Database
from tests.cli.command import environment_of
from tests.factories import Connection, Factory
from tests.support import (
    MASTER_KEY,
    Fault,
    Sidecar,
    eventually,
    method_of,
    running_sidecar,
    temporary_directory,
)
from tests.test_access import handed_out
from tests.test_docs import OPERATING, blocks, section

INLINE = pb.KEY_DELIVERY_INLINE
CALLER = Caller("token:web", ALL_ROLES)


async def lines(sidecar: Sidecar, count: int) -> list[dict[str, Any]]:
    """The lines of the audit, once there are so many; then there must be no more."""

    async def written() -> bool:
        return len(handed_out(sidecar)) >= count

    if count:
        await eventually(written)
    await asyncio.sleep(0.05)
    return handed_out(sidecar)


async def test_every_secret_handed_out_is_one_line(sidecar: Sidecar, make: Factory) -> None:
    kept = {}
    for _ in range(3):
        user, secret = await make.user(), f"sk-audit-{secrets.token_hex(16)}"
        kept[user] = (str(await make.key(user, secret=secret)), secret)
    expected = []

    def expect(decision: pb.DecideResponse, user: str, by: str) -> None:
        assert decision.key.key_id == kept[user][0]
        expected.append((user, decision.key.key_id, decision.decision_id, by))

    for user in kept:
        for _ in range(20):
            decision = await sidecar.decide(user, key_delivery=INLINE)
            assert decision.key.secret == kept[user][1]
            expect(decision, user, "Decide")
    request = pb.BatchDecideRequest(
        requests=[pb.DecideRequest(user_id=user, provider="openai", key_delivery=INLINE) for user in kept]
        * 40
    )
    batch = await sidecar.call("BatchDecide", request)
    for user, one in zip([*kept] * 40, batch.results, strict=True):
        expect(one.response, user, "BatchDecide")
    for user in kept:
        decision = await sidecar.decide(user)
        redeemed = await sidecar.call("Redeem", pb.RedeemRequest(key_handle=decision.key.handle))
        assert redeemed.secret == kept[user][1]
        expect(decision, user, "Redeem")

    audited = await lines(sidecar, len(expected))
    ids = ("user_id", "key_id", "decision_id", "by")
    assert sorted(tuple(line[name] for name in ids) for line in audited) == sorted(expected)
    in_order = [line["decision_id"] for line in audited if line["by"] == "Decide"]
    assert in_order == [decision for *_, decision, by in expected if by == "Decide"]
    for line in audited:
        assert set(line) == {*ids, "event", "level", "timestamp", "caller"}
        assert (line["level"], line["caller"]) == ("info", "socket")
        assert abs(datetime.fromisoformat(line["timestamp"]) - datetime.now(UTC)) < timedelta(minutes=5)
    for _, secret in kept.values():
        assert secret not in sidecar.log.getvalue()


async def test_what_hands_out_no_secret_is_no_line(sidecar: Sidecar, make: Factory) -> None:
    user, payer = await make.user(), await make.user(micros=1_000)
    await make.key(user)
    decision = await sidecar.decide(user)
    await sidecar.decide(user, key_delivery=pb.KEY_DELIVERY_REDEEM)
    await sidecar.decide(payer, cost_micros=1, key_delivery=INLINE)
    await sidecar.decide(await make.user(), key_delivery=INLINE)
    ask = pb.DecideRequest(user_id=user, provider="openai", key_delivery=INLINE)
    await sidecar.call("Explain", pb.ExplainRequest(decide=ask))
    await sidecar.record(decision, pb.OUTCOME_SUCCESS)
    for request in (pb.DecideRequest(user_id="nobody", provider="openai", key_delivery=INLINE),):
        with pytest.raises(Fault):
            await sidecar.call("Decide", request)
    redeem = pb.RedeemRequest(key_handle=decision.key.handle)
    await sidecar.call("Redeem", redeem)
    with pytest.raises(Fault):
        await sidecar.call("Redeem", redeem)
    assert [line["by"] for line in await lines(sidecar, 1)] == ["Redeem"]


ODD = 'a"b\\c\u2028\u00e9\u6771\U0001f600{"event": "secret_handed_out"}'


async def test_an_odd_user_id_stands_in_its_line_as_it_is(sidecar: Sidecar, make: Factory) -> None:
    await make.user(name=ODD)
    await make.key(ODD)
    await sidecar.decide(ODD, key_delivery=INLINE)
    (line,) = await lines(sidecar, 1)
    assert line["user_id"] == ODD


async def test_what_waits_is_written_before_the_end(database: str, make: Factory) -> None:
    user = await make.user()
    await make.key(user)
    async with running_sidecar(database) as sidecar:
        answers = await asyncio.gather(*(sidecar.decide(user, key_delivery=INLINE) for _ in range(200)))
    assert len(handed_out(sidecar)) == 200
    assert {line["decision_id"] for line in handed_out(sidecar)} == {each.decision_id for each in answers}


# -- the parts alone ----------------------------------------------------------------------------------


def hand_out(audit: Audit, user: str = "u1") -> None:
    audit.secret_handed_out(
        CALLER, user_id=user, key_id=str(new_id()), decision_id=str(new_id()), by="Decide"
    )


def lost_some(lines: int) -> None:
    raise AssertionError(f"{lines} lines were lost")


class Counting(io.StringIO):
    writes = 0

    def write(self, text: str, /) -> int:
        self.writes += 1
        return super().write(text)


async def test_lines_are_written_together_and_in_order() -> None:
    sink = Counting()
    with open_audit(sink, on_lost=lost_some) as audit:
        for number in range(100):
            hand_out(audit, f"u{number}")
        audit.changed(CALLER, "SaveKey", user_id="u1", count=3, key_id="k", note="sk-0123456789abcdef")
        hand_out(audit, "last")
    told = [json.loads(line) for line in sink.getvalue().splitlines()]
    assert [each.get("user_id") for each in told] == [*(f"u{n}" for n in range(100)), "u1", "last"]
    assert sink.writes == 3
    change = told[100]
    assert (change["event"], change["action"], change["caller"]) == (
        "operator_change",
        "SaveKey",
        "token:web",
    )
    assert (change["count"], change["note"]) == (3, "***")


async def test_a_broken_log_loses_lines_and_nothing_else() -> None:
    lost: list[int] = []
    sink = io.StringIO()
    with open_audit(sink, on_lost=lost.append) as audit:
        hand_out(audit)
        sink.close()
        hand_out(audit)
        audit.changed(CALLER, "SaveKey")
        hand_out(audit)
    assert lost == [2, 1, 1]


async def test_whoever_logs_does_not_wait_for_a_reader() -> None:
    reading, writing = os.pipe()
    writer = LineWriter(writing)
    line = f"{'x' * 1023}\n"
    written = 0
    while writer.write(line):  # far beyond what a pipe holds
        written += 1
        assert written < 100_000
    assert writer.write(line) == 0

    def read() -> bytes:
        with os.fdopen(reading, "rb") as pipe:
            return pipe.read()

    async def takes_more() -> bool:
        return writer.write("after\n") > 0

    reader = asyncio.create_task(asyncio.to_thread(read))
    await eventually(takes_more)
    await asyncio.to_thread(writer.close)
    os.close(writing)
    got = (await reader).decode().splitlines()
    notice = json.loads(next(each for each in got if each.startswith("{")))
    assert notice["event"] == "log_lost"
    assert notice["lines"] >= 2
    assert got.count(line.rstrip()) == written
    assert got[-1] == "after"


async def test_a_sidecar_whose_log_nobody_reads_answers(database: str, make: Factory) -> None:
    user = await make.user()
    await make.key(user)
    request = pb.DecideRequest(user_id=user, provider="openai", key_delivery=INLINE)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writing, bytes(4096)):
            pass
    os.set_blocking(writing, True)
    async with temporary_directory() as directory:
        address = f"unix:{directory}/run/s"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "keyturn_server", "serve", "--listen", address),
            stderr=writing,
            cwd="/",
            env=environment_of(KEYTURN_DATABASE_URL=database, ENCRYPTION_KEY=MASTER_KEY),
        )
        try:
            async with grpc.aio.insecure_channel(address) as channel:
                decide = method_of(channel, "Decide")
                for _ in range(200):
                    answer = await decide(request, timeout=60, wait_for_ready=True)
                    assert answer.key.secret
                assert process.returncode is None
        finally:
            process.kill()
            await process.wait()
            os.close(writing)
            os.close(reading)


async def test_a_change_whose_caller_hangs_up_is_made_whole_and_audited(
    database: str, sql: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetchval, begun, may_go_on = Database.fetchval, asyncio.Event(), asyncio.Event()

    async def slow(database: Database, statement: str, *arguments: Any) -> Any:
        if "INSERT INTO users" in statement:
            begun.set()
            await may_go_on.wait()
        return await fetchval(database, statement, *arguments)

    monkeypatch.setattr(Database, "fetchval", slow)
    async with running_sidecar(database) as sidecar:
        request = user_pb.PutUserRequest(user_id="u1", tier="lifetime")
        call = method_of(sidecar.channel, "PutUser")(request, timeout=30)
        await begun.wait()
        assert call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        # Over the same connection, so the sidecar has heard of the cancellation before.
        with pytest.raises(Fault):
            await sidecar.call("GetUser", user_pb.GetUserRequest(user_id="u1"))
        may_go_on.set()
    # The drain has waited for it.
    assert await sql.fetchval("SELECT subscription_tier FROM users WHERE id = 'u1'") == "lifetime"
    told = [json.loads(line) for line in sidecar.log.getvalue().splitlines() if "operator_change" in line]
    assert [(line["action"], line["user_id"]) for line in told] == [("PutUser", "u1")]


async def test_a_log_that_nobody_ever_reads_does_not_keep_the_process(monkeypatch: Any) -> None:
    monkeypatch.setattr("keyturn_server.logs._LAST_WRITE", timedelta(milliseconds=50))
    reading, writing = os.pipe()
    writer = LineWriter(writing)
    writer.write("x" * 1_000_000 + "\n")
    await asyncio.to_thread(writer.close)
    os.close(reading)  # the thread ends now
    os.close(writing)


async def test_a_closed_pipe_is_told_of_to_whoever_writes() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    writer = LineWriter(writing)

    async def is_told() -> bool:
        return writer.write("line\n") == 0

    await eventually(is_told)
    writer.close()
    os.close(writing)


def test_the_line_in_the_documents_is_such_a_line() -> None:
    (shown,) = [json.loads(block) for block in blocks(section(OPERATING, "Access"), "json")]
    sink = io.StringIO()

    async def written() -> None:
        with open_audit(sink, on_lost=lost_some) as audit:
            hand_out(audit)

    asyncio.run(written())
    line = json.loads(sink.getvalue())
    assert list(shown) == list(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?Z", line["timestamp"])


# Two processes that write long lines to one narrow pipe, each by a writer of its own.
_TOGETHER = """
import os
from keyturn_server.logs import LineWriter
turns = os.memfd_create("turns")
for name in "ab":
    if not os.fork():
        writer = LineWriter(1, turns=turns)
        for _ in range(50):
            writer.write(name * 20_000 + "\\n")
        writer.close()
        os._exit(0)
for _ in range(2):
    os.wait()
"""


async def test_lines_of_several_processes_stay_whole() -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", _TOGETHER, stdout=writing)
    os.close(writing)

    def read() -> str:
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            return b"".join(iter(lambda: pipe.read(1000), b"")).decode()

    lines = (await asyncio.to_thread(read)).splitlines()
    assert await process.wait() == 0
    assert sorted(lines) == ["a" * 20_000] * 50 + ["b" * 20_000] * 50
