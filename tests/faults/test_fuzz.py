"""Whatever bytes come: a sidecar that goes on as before. No crash, no INTERNAL, no growth, nobody harmed.

A real `keyturn serve` on a Unix socket is sent bodies of every method that are built from the descriptors,
one edge after another; tokens that were tampered with; metadata and sizes beyond every limit; and frames that
no client would send, by a socket of our own. Meanwhile an ordinary client is served. Afterwards its log tells
of no defect, and memory and descriptors are what they were.

Short in `make test`, always from the same seed. Long with `make test-faults ARGS=--faults-long`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from grpc_channelz.v1 import channelz_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_status import rpc_status
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from keyturn.v1 import (
    credit_service_pb2,
    flag_service_pb2,
    key_service_pb2,
    report_service_pb2,
    user_service_pb2,
)
from keyturn.v1 import routing_service_pb2 as pb
from tests.cli.command import Served, serving
from tests.factories import Connection, Factory
from tests.faults.wire import PREFACE, SETTINGS, bodies, call, conversations, frame, message, mutated
from tests.providers import Providers
from tests.refusals import Refusal, contents
from tests.support import MASTER_KEY, eventually, temporary_directory

T = TypeVar("T")

_OURS = (
    pb,
    key_service_pb2,
    flag_service_pb2,
    credit_service_pb2,
    user_service_pb2,
    report_service_pb2,
)
_FOREIGN = (health_pb2, reflection_pb2, channelz_pb2)
METHODS: list[MethodDescriptor] = [
    method
    for module in (*_OURS, *_FOREIGN)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if method.name != "Watch"  # it never ends by itself
]
REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
_AT_ONCE = 16
_POOL = 8
"""How many connections to its database a sidecar may keep."""
_MOST_GROWN = 48 * 1024 * 1024
"""Of resident memory, after everything has been sent once: what allocators keep, and no leak."""


@dataclass(kw_only=True)
class Target:
    """The sidecar that is fuzzed, and an ordinary client of it."""

    served: Served
    path: Path
    channel: grpc.aio.Channel
    sql: Connection
    known: dict[str, list[bytes]]
    """Texts that mean something there, by the name of the field: users, keys, tokens of every kind."""
    body: bytes
    """A Decide that is answered."""
    answered: Counter[str] = field(default_factory=Counter)
    served_meanwhile: int = 0

    async def send(self, method: str, body: bytes, **options: Any) -> grpc.StatusCode:
        """The status of a body as it is. Raises AssertionError for one that nobody may get."""
        ask: Any = self.channel.unary_unary(method)
        try:
            await ask(body, timeout=60, **options)
        except grpc.aio.AioRpcError as error:
            code: grpc.StatusCode = error.code()
            if code not in REFUSALS:
                raise AssertionError(f"{method} {body.hex()}") from error
            if method.startswith("/keyturn.") and rpc_status.from_call(error) is not None:
                reason = Refusal.of(error).info.reason
                self.answered[reason] += 1
            else:
                self.answered[code.name] += 1
            return code
        self.answered["OK"] += 1
        return grpc.StatusCode.OK

    async def say(self, conversation: bytes) -> None:
        """Says that on a connection of its own, and goes."""
        try:
            reader, writer = await asyncio.open_unix_connection(self.path)
        except (ConnectionError, BlockingIOError):  # its queue is full for the moment
            self.answered["not let in"] += 1
            return
        try:
            writer.write(conversation)
            with suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(0.1):
                    await writer.drain()
                    while await reader.read(65536):
                        pass
            self.answered["connections"] += 1
        finally:
            writer.transport.abort()

    async def pulse(self) -> None:
        """An ordinary client, who is served whatever happens beside it."""
        request = pb.DecideRequest.FromString(self.body)
        ask: Any = self.channel.unary_unary(
            "/keyturn.v1.RoutingService/Decide",
            request_serializer=pb.DecideRequest.SerializeToString,
            response_deserializer=pb.DecideResponse.FromString,
        )
        while True:
            answer = await ask(request, timeout=60)
            assert answer.WhichOneof("route") is not None
            self.served_meanwhile += 1
            await asyncio.sleep(0.02)

    def check_log(self) -> None:
        """Raises AssertionError for a defect that the sidecar tells of."""
        assert self.served.process.returncode is None, self.served.text[-4000:]
        defects = [event for event in self.served.events if event["level"] not in ("info", "warning")]
        assert not defects, json.dumps(defects[0], indent=1)[:8000]
        assert not self.served.strays, self.served.strays[:20]

    def descriptors(self) -> int:
        """How many it has open."""
        return len(list(Path(f"/proc/{self.served.process.pid}/fd").iterdir()))

    def memory(self) -> int:
        """What of it is resident, in bytes."""
        pages = Path(f"/proc/{self.served.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
async def target(database: str, sql: Connection, make: Factory) -> AsyncIterator[Target]:
    """A sidecar with users, keys and money, with reflection and channelz, and with tokens of every kind."""
    await Providers().play(sql, at="http://127.0.0.1:1")
    # Kept out of the fuzzed users' way: the ordinary client's.
    ordinary = await make.user("free", name="ordinary", micros=10**12)
    rich = await make.user("premium", name="rich", micros=10**12)
    broke = await make.user("lifetime", name="broke")
    keys = [await make.key(broke), await make.key(rich)]
    async with temporary_directory() as directory:
        path = directory / "run" / "fuzzed"
        async with serving(
            directory,
            *("--listen", f"unix:{path}", "--reflection"),
            KEYTURN_DATABASE_URL=database,
            ENCRYPTION_KEY=MASTER_KEY,
            KEYTURN_STATEMENT_TIMEOUT="30",
            # Nothing but what is asked for changes the tables.
            KEYTURN_SWEEP_INTERVAL="3600",
        ) as served:
            channel = grpc.aio.insecure_channel(
                f"unix:{path}",
                options=[("grpc.max_receive_message_length", -1), ("grpc.max_metadata_size", 2**20)],
            )
            fuzzed = Target(
                served=served,
                path=path,
                channel=channel,
                sql=sql,
                known={},
                body=pb.DecideRequest(
                    user_id=ordinary, provider="openai", cost_micros=1, request_id="r"
                ).SerializeToString(),
            )
            tokens = await _tokens(fuzzed, rich, broke)
            handle, ticket, page = tokens
            known = {
                "user_id": [rich, rich, broke],
                "provider": ["openai", "openai", "anthropic"],
                "key_id": [str(key) for key in keys],
                "request_id": ["r1", "r2", ""],
                "model": ["gpt-4o-mini", ""],
                "tier": ["premium", "free"],
                "secret": ["sk-test-0123456789abcdef0123"],
                "key": ["byok_enabled", "byok_only_mode", "byok_uses_internal_credits"],
                "key_handle": [handle],
                "failed_key_handles": [handle],
                "credit_ticket": [ticket],
                "page_token": ["", "", page],
                "service": ["", "keyturn.v1.RoutingService"],
                "file_containing_symbol": ["keyturn.v1.RoutingService"],
                "file_by_filename": ["keyturn/v1/policy.proto"],
            }
            fuzzed.known = {name: [text.encode() for text in found] for name, found in known.items()}
            yield fuzzed
            await channel.close()
            fuzzed.check_log()


async def _tokens(target: Target, rich: str, broke: str) -> list[str]:
    """A handle, a ticket, and tokens of pages."""
    ask: Any = target.channel.unary_unary

    async def asked(method: str, request: Any, response_type: type[T]) -> T:
        answer: bytes = await ask(f"/keyturn.v1.{method}")(request.SerializeToString(), timeout=60)
        return response_type.FromString(answer)  # type: ignore[attr-defined,no-any-return]

    found = []
    for user, constraint in ((broke, 1), (rich, 3)):
        request = pb.DecideRequest(user_id=user, provider="openai", cost_micros=1, constraint=constraint)  # type: ignore[arg-type]
        answer = await asked("RoutingService/Decide", request, pb.DecideResponse)
        found.append(answer.key.handle or answer.ticket.ticket)
    grants = [
        credit_service_pb2.GrantCreditsRequest(user_id=rich, amount_micros=1, request_id=f"g{number}")
        for number in range(3)
    ]
    for grant in grants:
        await asked("CreditService/GrantCredits", grant, credit_service_pb2.GrantCreditsResponse)
    listed = credit_service_pb2.ListTransactionsRequest(user_id=rich, page_size=1)
    page = await asked("CreditService/ListTransactions", listed, credit_service_pb2.ListTransactionsResponse)
    assert all(found)
    assert page.next_page_token
    return [*found, page.next_page_token]


@asynccontextmanager
async def ordinary_client(target: Target) -> AsyncIterator[None]:
    """Is served for the length of the block. Raises what goes wrong with it."""
    async with asyncio.TaskGroup() as tasks:
        pulse = tasks.create_task(target.pulse())
        before = target.served_meanwhile
        yield
        assert not pulse.done()
        pulse.cancel()
    assert target.served_meanwhile > before, "the ordinary client was never served"


def in_loop(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
    """Runs it in the loop's thread, from another."""
    return asyncio.run_coroutine_threadsafe(work, loop).result()


async def throw_bodies(target: Target, *, number: int, examples: int) -> None:
    """Bodies of every method, in groups: each group at once. What refuses a whole group changes no table."""
    loop = asyncio.get_running_loop()
    messages = {method.full_name: bodies(method.input_type, target.known) for method in METHODS}

    def of_one(method: MethodDescriptor) -> st.SearchStrategy[tuple[str, list[bytes]]]:
        drawn = st.lists(messages[method.full_name], min_size=1, max_size=_AT_ONCE)
        return drawn.map(lambda found: (_path_of(method), found))

    before: dict[str, str] | None = None

    async def throw(path: str, group: list[bytes]) -> None:
        nonlocal before
        if before is None:
            before = await contents(target.sql)
        codes = await asyncio.gather(*(target.send(path, body) for body in group))
        if grpc.StatusCode.OK in codes:
            before = None
            return
        after = await contents(target.sql)
        assert after == before, f"{path}: refused, and yet it changed something"

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(st.sampled_from(METHODS).flatmap(of_one))
    def run(drawn: tuple[str, list[bytes]]) -> None:
        in_loop(loop, throw(*drawn))

    await asyncio.to_thread(run)


def _path_of(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


async def throw_conversations(target: Target, draw: random.Random, *, mutations: int) -> None:
    """Every conversation once, and so many mutations of them."""
    known = conversations(target.body)
    said = list(known.values()) + [
        mutated(draw.choice(list(known.values()))[:20_000], draw) for _ in range(mutations)
    ]
    draw.shuffle(said)
    for start in range(0, len(said), _AT_ONCE):
        await asyncio.gather(*(target.say(one) for one in said[start : start + _AT_ONCE]))


def _growth(sizes: Sequence[int]) -> float:
    """How much larger the last ones are than the first: what is kept for the moment goes up and down."""
    third = max(len(sizes) // 3, 1)
    return median(sizes[-third:]) - median(sizes[:third])


async def _settled(target: Target, descriptors: int) -> None:
    """Back when the sidecar has no more descriptors open than before, but for those of its database."""

    async def are_closed() -> bool:
        return target.descriptors() <= descriptors + _POOL

    await eventually(are_closed, seconds=60)


async def test_bodies_of_every_method_are_answered_or_refused_and_nothing_else(
    target: Target, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    is_long: bool = pytestconfig.getoption("--faults-long")
    number: int = pytestconfig.getoption("--faults-seed")
    print(f"--faults-seed {number}")
    assert len(METHODS) > 30
    rounds, examples = (40, 500) if is_long else (2, 120)
    descriptors = target.descriptors()
    sizes = []
    async with ordinary_client(target):
        for each in range(rounds):
            await throw_bodies(target, number=number + each, examples=examples)
            sizes.append(target.memory())
            target.check_log()
    await _settled(target, descriptors)
    with capsys.disabled() if is_long else nullcontext():
        print(json.dumps({"seed": number, "MiB": [size >> 20 for size in sizes]} | target.answered))
    assert _growth(sizes) < _MOST_GROWN
    # What is thrown comes far enough to meet every kind of check.
    for reason in ("OK", "MALFORMED_REQUEST", "INVALID_FIELD", "INVALID_TOKEN"):
        assert target.answered[reason], reason


async def test_frames_that_no_client_would_send_harm_nobody(
    target: Target, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    is_long: bool = pytestconfig.getoption("--faults-long")
    number: int = pytestconfig.getoption("--faults-seed")
    print(f"--faults-seed {number}")
    rounds, mutations = (60, 300) if is_long else (3, 60)
    draw = random.Random(number)  # noqa: S311 - has to come again
    descriptors = target.descriptors()
    sizes = []
    async with ordinary_client(target):
        for _ in range(rounds):
            await throw_conversations(target, draw, mutations=mutations)
            sizes.append(target.memory())
            target.check_log()
    await _settled(target, descriptors)
    with capsys.disabled() if is_long else nullcontext():
        print(json.dumps({"seed": number, "MiB": [size >> 20 for size in sizes]} | target.answered))
    assert _growth(sizes) < _MOST_GROWN
    assert target.answered["connections"] > rounds * mutations / 2


async def test_what_is_beyond_every_limit_is_refused_and_forgotten(
    target: Target, pytestconfig: pytest.Config
) -> None:
    """Sizes of bodies and of metadata, and batches as large as they may be of items that are all bad."""
    is_long: bool = pytestconfig.getoption("--faults-long")
    decide, batch = "/keyturn.v1.RoutingService/Decide", "/keyturn.v1.RoutingService/BatchDecide"
    before = await contents(target.sql)
    items = pb.BatchDecideRequest(
        requests=[pb.DecideRequest(user_id="\N{GRINNING FACE}" * 500, provider="\0")] * 500
    ).SerializeToString()
    asks: list[tuple[str, bytes, dict[str, Any]]] = [
        *((decide, b"x" * size, {}) for size in (2**16, 2**16 + 1, 2**20 + 2**16, 2**20 + 2**16 + 1, 2**22)),
        *((batch, b"x" * size, {}) for size in (2**20, 2**20 + 1, 2**20 + 2**16 + 1, 2**24)),
        (decide, b"", {"metadata": [("x", "v" * 20_000)]}),
        (decide, b"", {"metadata": [(f"x-{index}", "v" * 50) for index in range(300)]}),
        (decide, b"", {"metadata": [("x-bin", b"\0\xff" * 9_000)]}),
        (decide, b"", {"metadata": [("keyturn-actor", "x" * 65)]}),
        (decide, b"", {"metadata": [("keyturn-actor", "a"), ("keyturn-actor", "b")]}),
        (batch, items, {}),
    ]
    sizes, descriptors = [], target.descriptors()
    async with ordinary_client(target):
        for _ in range(200 if is_long else 6):
            codes = await asyncio.gather(
                *(target.send(method, body, **options) for method, body, options in asks)
            )
            assert set(codes[:-1]) <= REFUSALS
            assert codes[-1] is grpc.StatusCode.OK, "each item has its own status"
            sizes.append(target.memory())
    await _settled(target, descriptors)
    assert _growth(sizes) < _MOST_GROWN, sizes
    assert await contents(target.sql) == before | {
        name: rows
        for name, rows in (await contents(target.sql)).items()
        if name in ("credit_accounts", "credit_holds") and "ordinary" in rows
    }


async def test_callers_who_stay_and_say_nothing_cost_no_more_than_their_connection(target: Target) -> None:
    """Connections without a word, calls that are begun and not ended, and answers that nobody reads."""
    hello = PREFACE + frame(SETTINGS)
    shut = PREFACE + frame(SETTINGS, payload=b"\0\x04\0\0\0\0")  # a window of nothing
    whole = call(1, b"RoutingService/Decide", message(target.body))
    begun = whole[: len(whole) - len(message(target.body)) - 9]
    descriptors, writers = target.descriptors(), []
    async with ordinary_client(target):
        for said in (b"", PREFACE[:5], hello, hello + begun, hello + whole[:-3], shut + whole) * 20:
            _, writer = await asyncio.open_unix_connection(target.path)
            writer.write(said)
            writers.append(writer)
        served = target.served_meanwhile

        async def go_on() -> bool:
            return target.served_meanwhile > served + 20

        await eventually(go_on, seconds=60)
        for writer in writers:
            writer.transport.abort()
        await _settled(target, descriptors)
    target.check_log()
