"""The example gateways of all languages, between the official OpenAI SDK and a provider."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import openai
import pytest
import pytest_asyncio

from tests.cli.command import free_port
from tests.conformance.suites import SUITES, Suite
from tests.factories import Connection, Factory
from tests.llm_providers import (
    CACHED_TOKENS,
    INPUT_TOKENS,
    MODEL,
    OUTPUT_TOKENS,
    TEXT,
    WORDS,
    Behaviour,
    LlmProviders,
    breaks_off,
    fail,
    held,
    no_quota,
    object_to,
    playing_llm_providers,
    rate_limit,
    refuse,
)
from tests.support import Sidecar, eventually, temporary_directory

PLATFORM_KEY = "sk-canary-platform-0123456789abcdef"
OWN_KEY = "sk-canary-own-0123456789abcdef"
OTHER_KEY = "sk-canary-other-0123456789abcdef"
MESSAGES: Any = [{"role": "user", "content": "Hello"}]
_LIMIT_SECONDS = 60
_MOST_TRIES = 5
_LISTENING = "listening on "
_COST = 550
"""Of gpt-4o-2024-08-06: 80 input tokens at $2.50 a million, 40 cached at $1.25, 30 output tokens at $10."""

GATEWAYS = [suite for suite in SUITES if suite.name != "python-async"]


@dataclass(kw_only=True)
class Gateway:
    """A running gateway."""

    url: str
    process: asyncio.subprocess.Process
    http: httpx2.AsyncClient

    def sdk(self, user: str) -> openai.AsyncOpenAI:
        """The official SDK, as this user. It retries nothing, so that a test sees each answer."""
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=user, max_retries=0, http_client=self.http
        )

    async def end(self) -> int:
        """Asks it to end, and waits until it has."""
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(_LIMIT_SECONDS):
            return await self.process.wait()


class Patient(httpx2.AsyncHTTPTransport):
    """Asks a gateway again that could not ask the sidecar, as it says to: its client gives that two seconds,
    which a busy machine may take. Nothing has been sent to the provider by then."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        for _ in range(_MOST_TRIES - 1):
            response = await super().handle_async_request(request)
            if response.status_code != 503 or b"sidecar_unavailable" not in await response.aread():
                return response
            await response.aclose()
        return await super().handle_async_request(request)


@asynccontextmanager
async def running(suite: Suite, sidecar: str, llm: LlmProviders) -> AsyncIterator[Gateway]:
    """The gateway of a language, with little of our environment. It has to end well, and quote no key."""
    await asyncio.to_thread(suite.build)
    async with temporary_directory() as directory:
        with (directory / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *suite.gateway,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log.fileno(),
                cwd=directory,
                env={
                    **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
                    "KEYTURN_ADDRESS": sidecar,
                    "LISTEN": "127.0.0.1:0",
                    "OPENAI_API_KEY": PLATFORM_KEY,
                    "OPENAI_BASE_URL": llm.openai_url,
                },
            )
        read_log = (directory / "log").read_text
        try:
            assert process.stdout is not None
            async with asyncio.timeout(_LIMIT_SECONDS):
                line = (await process.stdout.readline()).decode().strip()
            assert line.startswith(_LISTENING), f"it said {line!r}: {read_log()}"
            async with httpx2.AsyncClient(transport=Patient(), timeout=_LIMIT_SECONDS) as http:
                gateway = Gateway(url=line.removeprefix(_LISTENING), process=process, http=http)
                yield gateway
            if process.returncode is None:
                assert await gateway.end() == 0, read_log()
            said = line + (await process.stdout.read()).decode() + read_log()
            for canary in (PLATFORM_KEY, OWN_KEY, OTHER_KEY, "kth1_", "ktt1_"):
                assert canary not in said
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


@pytest_asyncio.fixture
async def llm(sql: Connection) -> AsyncIterator[LlmProviders]:
    async with playing_llm_providers() as playing:
        yield playing


@dataclass(kw_only=True)
class Scene:
    """A gateway between the SDK and the provider, on a sidecar with users."""

    gateway: Gateway
    llm: LlmProviders
    sql: Connection
    make: Factory

    async def payer(self, *keys: str, micros: int = 1_000_000) -> str:
        """A user with credits and own keys, in the order in which they are used."""
        user = await self.make.user(micros=micros)
        for priority, key in enumerate(keys):
            await self.make.key(user, secret=key, priority=priority)
        return user

    async def recorded(self, table: str, *columns: str, rows: int = 1) -> Any:
        """The rows of a table, in the order they came in, once there are so many."""

        async def enough() -> Any:
            found = await self.sql.fetch(f"SELECT {', '.join(columns)} FROM {table} ORDER BY created_at, id")
            return [tuple(row) for row in found] if len(found) >= rows else None

        return await eventually(enough)

    async def uses(self, *columns: str, rows: int = 1) -> Any:
        """What is recorded of own keys."""
        return await self.recorded("api_key_usage", *columns, rows=rows)

    async def holds(self, *columns: str, rows: int = 1) -> Any:
        """What is recorded of settled holds."""
        table = "(SELECT * FROM credit_holds WHERE state = 'settled') AS settled"
        return await self.recorded(table, *columns, rows=rows)


@pytest_asyncio.fixture(params=GATEWAYS, ids=lambda suite: suite.name)
async def scene(
    request: pytest.FixtureRequest,
    start_sidecar: Callable[..., Awaitable[Sidecar]],
    llm: LlmProviders,
    sql: Connection,
    make: Factory,
) -> AsyncIterator[Scene]:
    # Not the fixture `providers`, which start_sidecar points the database at.
    sidecar = await start_sidecar()
    await llm.play(sql)
    async with running(request.param, sidecar.address, llm) as gateway:
        yield Scene(gateway=gateway, llm=llm, sql=sql, make=make)


async def asked(scene: Scene, user: str, **fields: Any) -> Any:
    """A chat completion."""
    return await scene.gateway.sdk(user).chat.completions.create(model="gpt-4o", messages=MESSAGES, **fields)


async def refusal(scene: Scene, user: str, **fields: Any) -> openai.APIStatusError:
    """How the SDK sees a completion that is refused."""
    with pytest.raises(openai.APIStatusError) as caught:
        await asked(scene, user, **fields)
    return caught.value


async def streamed(scene: Scene, user: str) -> list[Any]:
    """The chunks of a streamed completion."""
    return [chunk async for chunk in await asked(scene, user, stream=True)]


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


async def test_an_own_key_and_credits_pay(scene: Scene) -> None:
    owner, payer = await scene.payer(OWN_KEY), await scene.payer()
    for user, key in ((owner, OWN_KEY), (payer, PLATFORM_KEY)):
        answer = await asked(scene, user)
        assert (answer.choices[0].message.content, answer.model) == (TEXT, MODEL)
        seen = scene.llm.seen[-1]
        assert (seen.method, seen.path, seen.key) == ("POST", "/openai/v1/chat/completions", key)
        assert seen.json == {"model": "gpt-4o", "messages": MESSAGES}
        assert user not in str(seen.headers)
    [used] = await scene.uses(
        "outcome",
        "model",
        "service_type",
        "input_tokens",
        "output_tokens",
        "cache_read_tokens",
        "http_status",
    )
    assert used == ("SUCCESS", MODEL, "gateway", INPUT_TOKENS, OUTPUT_TOKENS, CACHED_TOKENS, 200)
    assert await scene.holds("outcome", "charged_micros") == [("SUCCESS", _COST)]


async def test_streams_pass_through_as_they_come(scene: Scene) -> None:
    owner = await scene.payer(OWN_KEY)
    gate = asyncio.Semaphore(0)
    scene.llm.will(OWN_KEY, held(gate))
    gate.release()
    # The provider goes on only once its first chunk has come through.
    stream = await asked(scene, owner, stream=True)
    chunks = [await anext(stream)]
    assert text_of(chunks) == WORDS[0]
    for _ in range(10):
        gate.release()
    chunks += [chunk async for chunk in stream]
    assert text_of(chunks) == TEXT
    assert scene.llm.seen[0].json["stream_options"] == {"include_usage": True}
    [used] = await scene.uses("outcome", "model", "input_tokens", "output_tokens", "cache_read_tokens")
    assert used == ("SUCCESS", MODEL, INPUT_TOKENS, OUTPUT_TOKENS, CACHED_TOKENS)


async def test_a_stream_on_credits_is_charged_by_its_usage(scene: Scene) -> None:
    payer = await scene.payer()
    assert text_of(await streamed(scene, payer)) == TEXT
    assert await scene.holds("outcome", "charged_micros") == [("SUCCESS", _COST)]


async def test_the_estimate_is_what_was_asked_for_at_most(scene: Scene) -> None:
    payer = await scene.payer()
    await asked(scene, payer, max_completion_tokens=1000)
    [(held_micros,)] = await scene.holds("amount_micros")
    body = len(scene.llm.seen[0].body)
    assert 1000 * 10 + body // 4 * 2 <= held_micros <= 1000 * 10 + body * 3


@pytest.mark.parametrize(
    ("behaviour", "outcome", "status"),
    [(refuse, "AUTH_REJECTED", 401), (rate_limit, "RATE_LIMITED", 429), (no_quota, "PROVIDER_BILLING", 429)],
    ids=["refused", "limited", "unpaid"],
)
async def test_a_refused_key_gives_way_to_the_next_and_then_to_credits(
    scene: Scene, behaviour: Behaviour, outcome: str, status: int
) -> None:
    user = await scene.payer(OWN_KEY, OTHER_KEY)
    for key in (OWN_KEY, OTHER_KEY):
        scene.llm.will(key, behaviour)
    assert (await asked(scene, user)).choices[0].message.content == TEXT
    assert [seen.key for seen in scene.llm.seen] == [OWN_KEY, OTHER_KEY, PLATFORM_KEY]
    assert await scene.uses("outcome", "http_status", rows=2) == [(outcome, status)] * 2
    assert await scene.holds("outcome", "charged_micros") == [("SUCCESS", _COST)]
    # Known by now: the next request does not try them.
    assert text_of(await streamed(scene, user)) == TEXT
    assert scene.llm.seen[-1].key == PLATFORM_KEY


async def test_the_providers_own_answer_goes_back_when_nobody_else_may_pay(scene: Scene) -> None:
    user = await scene.payer(OWN_KEY, micros=0)
    scene.llm.will(OWN_KEY, refuse)
    for stream in (False, True):
        error = await refusal(scene, user, stream=stream)
        if not stream:
            assert (error.status_code, error.code) == (401, "invalid_api_key")
        else:  # it is known to be invalid by now
            assert (error.status_code, error.code) == (402, "key_unusable")
    assert await scene.uses("outcome", "http_status") == [("AUTH_REJECTED", 401)]
    assert [seen.key for seen in scene.llm.seen] == [OWN_KEY]


@pytest.mark.parametrize(
    ("behaviour", "outcome", "status"),
    [(fail, "PROVIDER_ERROR", 500), (object_to, "REFUSED", 400), (rate_limit, "RATE_LIMITED", 429)],
    ids=["fails", "objects", "limits"],
)
async def test_a_providers_errors_pass_through_and_cost_nothing(
    scene: Scene, behaviour: Behaviour, outcome: str, status: int
) -> None:
    payer = await scene.payer()
    scene.llm.will(PLATFORM_KEY, behaviour)
    error = await refusal(scene, payer)
    assert error.status_code == status
    assert isinstance(error.body, dict)
    assert error.body["message"]
    assert await scene.holds("outcome", "charged_micros") == [(outcome, 0)]


async def test_denials_are_told_in_the_form_of_openai(scene: Scene) -> None:
    poor = await scene.payer(micros=0)
    error = await refusal(scene, poor)
    assert (error.status_code, error.code, error.type) == (402, "no_key_and_no_credits", "keyturn")
    busy = await scene.payer(micros=60_000)
    gate = asyncio.Semaphore(0)
    scene.llm.will(PLATFORM_KEY, held(gate))
    first = asyncio.create_task(asked(scene, busy))
    await scene.llm.asked(1)
    error = await refusal(scene, busy)
    assert (error.status_code, error.code) == (429, "holds_in_flight")
    gate.release()
    await first
    for nobody, code in ((f"nobody-{poor}", "unknown_user"), ("", "")):
        headers = {"authorization": f"Bearer {nobody}"} if nobody else {}
        answer = await scene.gateway.http.post(
            f"{scene.gateway.url}/v1/chat/completions", json={"model": "gpt-4o"}, headers=headers
        )
        assert answer.status_code == 401
        assert answer.json()["error"]["type"] == "keyturn"
        assert not code or answer.json()["error"]["code"] == code


async def test_a_caller_who_hangs_up_ends_the_request_and_pays_for_nothing(scene: Scene) -> None:
    payer = await scene.payer()
    gate = asyncio.Semaphore(1)
    scene.llm.will(PLATFORM_KEY, held(gate))
    stream = await asked(scene, payer, stream=True)
    await anext(stream)
    await stream.close()
    await scene.llm.left_alone(scene.llm.seen[0])
    assert await scene.holds("outcome", "charged_micros") == [("CLIENT_CANCELLED", 0)]


async def test_a_stream_that_breaks_off_is_the_providers_error(scene: Scene) -> None:
    payer = await scene.payer()
    scene.llm.will(PLATFORM_KEY, breaks_off(2))
    with pytest.raises((openai.APIConnectionError, httpx2.TransportError, openai.APIError)):
        await streamed(scene, payer)
    assert await scene.holds("outcome", "charged_micros") == [("PROVIDER_ERROR", 0)]


async def test_eight_callers_at_once(scene: Scene) -> None:
    users = [await scene.payer(*([OWN_KEY] if number % 2 else [])) for number in range(8)]
    answers = await asyncio.gather(
        *(asked(scene, user) for user in users), *(streamed(scene, user) for user in users)
    )
    assert [answer.choices[0].message.content for answer in answers[:8]] == [TEXT] * 8
    assert [text_of(chunks) for chunks in answers[8:]] == [TEXT] * 8
    assert await scene.uses("outcome", rows=8) == [("SUCCESS",)] * 8
    assert await scene.holds("outcome", "charged_micros", rows=8) == [("SUCCESS", _COST)] * 8


async def test_records_are_flushed_when_the_gateway_ends(scene: Scene) -> None:
    payer = await scene.payer()
    for _ in range(5):
        await asked(scene, payer)
    assert await scene.gateway.end() == 0
    found = await scene.sql.fetchval("SELECT count(*) FROM credit_holds WHERE outcome = 'SUCCESS'")
    assert found == 5


@pytest.mark.parametrize("suite", GATEWAYS, ids=lambda suite: suite.name)
async def test_a_sidecar_or_a_provider_that_is_away(
    suite: Suite,
    start_sidecar: Callable[..., Awaitable[Sidecar]],
    llm: LlmProviders,
    sql: Connection,
    make: Factory,
) -> None:
    sidecar = await start_sidecar()
    payer = await make.user(micros=1_000_000)
    async with AsyncExitStack() as stack:
        away = await stack.enter_async_context(running(suite, "unix:/nonexistent/keyturn.sock", llm))
        with pytest.raises(openai.APIStatusError) as caught:
            await away.sdk(payer).chat.completions.create(model="gpt-4o", messages=MESSAGES)
        assert (caught.value.status_code, caught.value.code) == (503, "sidecar_unavailable")
        assert caught.value.response.headers["retry-after"] == "1"
        assert not llm.seen
        nobody = LlmProviders(url=f"http://127.0.0.1:{free_port()}")
        alone = await stack.enter_async_context(running(suite, sidecar.address, nobody))
        assert (await alone.http.get(f"{alone.url}/healthz")).status_code == 200
        with pytest.raises(openai.APIStatusError) as caught:
            await alone.sdk(payer).chat.completions.create(model="gpt-4o", messages=MESSAGES)
        assert caught.value.status_code == 502

        async def never_sent() -> Any:
            return await sql.fetchval(
                "SELECT outcome = 'NEVER_SENT' FROM credit_holds WHERE state = 'settled'"
            )

        await eventually(never_sent)
