"""The official SDKs through Keyturn's transport: a real sidecar, and providers that speak real HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, NoReturn

import anthropic
import httpx2
import openai
import pytest
import pytest_asyncio

from keyturn import AsyncClient, Client, Denied, NotFound, Retries, Unavailable
from keyturn.httpx import AsyncKeyturnTransport, KeyturnTransport
from tests import llm_providers as playing
from tests.factories import Connection, Factory
from tests.llm_providers import LlmProviders, playing_llm_providers
from tests.providers import Providers
from tests.support import Sidecar, eventually

PLATFORM = "sk-the-platforms-own-0123456789"
CANARY = "sk-canary-users-own-key-0123456789abcdef"
OTHER_CANARY = "sk-canary-users-other-key-0123456789ab"
CHAT: dict[str, Any] = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello"}]}
MESSAGE: dict[str, Any] = {"model": playing.CLAUDE, "max_tokens": 100, "messages": CHAT["messages"]}
ALL_TOKENS = playing.INPUT_TOKENS + playing.OUTPUT_TOKENS


@pytest_asyncio.fixture
async def llm(sql: Connection, providers: Providers) -> AsyncIterator[LlmProviders]:
    """The providers' APIs; the users' own keys lead here."""
    async with playing_llm_providers() as llm:
        await llm.play(sql)
        yield llm


class Sdks:
    """The SDKs of one kind, blocking or not, behind one face: everything is awaited."""

    def __init__(self, blocking: bool, address: str, llm: LlmProviders) -> None:
        self.blocking = blocking
        self.llm = llm
        self.keyturn: Any = (Client if blocking else AsyncClient)(
            address, retries=Retries(attempts=1), timeout=timedelta(seconds=20)
        )
        self._opened: list[Any] = []

    def openai(self, user_id: Any = None, **options: Any) -> Any:
        url = options.pop("base_url", self.llm.openai_url)
        http = self._http(provider="openai", user_id=user_id, **options.pop("terms", {}))
        make = openai.OpenAI if self.blocking else openai.AsyncOpenAI
        return make(api_key=PLATFORM, base_url=url, http_client=http, **{"max_retries": 0, **options})

    def anthropic(self, user_id: Any = None, **options: Any) -> Any:
        http = self._http(provider="anthropic", user_id=user_id)
        make = anthropic.Anthropic if self.blocking else anthropic.AsyncAnthropic
        url = self.llm.anthropic_url
        return make(api_key=PLATFORM, base_url=url, http_client=http, **{"max_retries": 0, **options})

    def _http(self, **terms: Any) -> Any:
        http: Any
        if self.blocking:
            http = httpx2.Client(transport=KeyturnTransport(self.keyturn, **terms))
        else:
            http = httpx2.AsyncClient(transport=AsyncKeyturnTransport(self.keyturn, **terms))
        self._opened.append(http)
        return http

    async def do(self, call: Callable[..., Any], *args: Any, **fields: Any) -> Any:
        """Calls a method of an SDK."""
        if self.blocking:
            return await asyncio.to_thread(call, *args, **fields)
        return await call(*args, **fields)

    async def all(self, stream: Any) -> list[Any]:
        """Everything that a stream gives."""
        if self.blocking:
            return await asyncio.to_thread(list, stream)
        return [each async for each in stream]

    async def next(self, stream: Any) -> Any:
        if self.blocking:
            return await asyncio.to_thread(next, stream)
        return await anext(stream)

    async def recorded(self) -> None:
        """Waits until all that was to be recorded is."""
        await self.do(self.keyturn.flush)

    async def close(self) -> None:
        for http in self._opened:
            await self.do(http.close if self.blocking else http.aclose)
        assert await self.do(self.keyturn.close) == []


@pytest_asyncio.fixture(params=[True, False], ids=["blocking", "asyncio"])
async def sdks(
    request: pytest.FixtureRequest, llm: LlmProviders, start_sidecar: Callable[..., Any]
) -> AsyncIterator[Sdks]:
    sidecar: Sidecar = await start_sidecar()
    sdks = Sdks(request.param, sidecar.address, llm)
    yield sdks
    await sdks.close()


async def user_with_key(make: Factory, provider: str = "openai", *, micros: int = 0) -> str:
    user = await make.user(micros=micros)
    await make.key(user, provider, secret=CANARY)
    return user


async def usage(sql: Connection) -> list[dict[str, Any]]:
    """What own keys were used for, in order."""
    return [dict(row) for row in await sql.fetch("SELECT * FROM api_key_usage ORDER BY id")]


async def holds(sql: Connection) -> list[tuple[str | None, int | None]]:
    """How each hold ended, and what it was charged, in order."""
    rows = await sql.fetch("SELECT outcome, charged_micros FROM credit_holds ORDER BY id")
    return [tuple(row) for row in rows]


async def the_usage(sql: Connection) -> dict[str, Any]:
    (row,) = await usage(sql)
    return row


async def error_of(sdks: Sdks, provider: str, user: str) -> Any:
    """What an SDK that tries again where that makes sense raises in the end."""
    try:
        if provider == "openai":
            await sdks.do(sdks.openai(user, max_retries=2).chat.completions.create, **CHAT)
        else:
            await sdks.do(sdks.anthropic(user, max_retries=2).messages.create, **MESSAGE)
    except (openai.APIError, anthropic.APIError) as error:
        return error
    raise AssertionError("nothing was raised")


# ----------------------------------------------------------------------- who signs, and where to


async def test_an_own_key_signs_and_its_use_is_recorded(
    sdks: Sdks, llm: LlmProviders, make: Factory, sql: Connection
) -> None:
    user = await user_with_key(make)
    sdk = sdks.openai(user, base_url="http://127.0.0.1:1/v1", organization="org-platform", project="proj")
    answer = await sdks.do(sdk.chat.completions.create, **CHAT)
    assert answer.choices[0].message.content == playing.TEXT
    (seen,) = llm.seen
    assert (seen.path, seen.key) == ("/openai/v1/chat/completions", CANARY)
    assert seen.json == CHAT
    assert not [
        name for name in seen.headers if "keyturn" in name or name in ("openai-organization", "x-api-key")
    ]
    assert "openai-project" not in seen.headers
    assert PLATFORM not in str(seen.headers)
    await sdks.recorded()
    row = await the_usage(sql)
    assert (row["outcome"], row["model"], row["endpoint"]) == (
        "SUCCESS",
        playing.MODEL,
        "/v1/chat/completions",
    )
    assert (row["input_tokens"], row["output_tokens"], row["cache_read_tokens"], row["total_tokens"]) == (
        playing.INPUT_TOKENS,
        playing.OUTPUT_TOKENS,
        playing.CACHED_TOKENS,
        ALL_TOKENS,
    )
    assert (row["http_status"], row["service_type"]) == (200, "")
    assert row["response_time_ms"] is not None


async def test_credits_pay_with_the_platforms_key_and_are_charged(
    sdks: Sdks, llm: LlmProviders, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=1_000_000)
    sdk = sdks.openai(user, organization="org-platform", terms={"service_type": "copilot"})
    await sdks.do(sdk.chat.completions.create, **CHAT, max_completion_tokens=100)
    (seen,) = llm.seen
    assert seen.key == PLATFORM
    assert seen.headers["openai-organization"] == "org-platform"
    await sdks.recorded()
    ((outcome, charged),) = await holds(sql)
    assert outcome == "SUCCESS"
    assert charged
    row = await sql.fetchrow("SELECT amount_micros, model, service_type FROM credit_holds")
    assert row is not None
    # A quarter of the body as input, 100 of output: 10 micros a token of gpt-4o's output.
    assert 1_000 < row["amount_micros"] < 1_200
    assert (row["model"], row["service_type"]) == ("gpt-4o", "copilot")


async def test_anthropic_counts_its_cache_besides_its_input(
    sdks: Sdks, llm: LlmProviders, make: Factory, sql: Connection
) -> None:
    user = await user_with_key(make, "anthropic")
    sdk = sdks.anthropic(user)
    answer = await sdks.do(sdk.messages.create, **MESSAGE)
    assert answer.content[0].text == playing.TEXT
    (seen,) = llm.seen
    assert (seen.path, seen.headers["x-api-key"]) == ("/anthropic/v1/messages", CANARY)
    assert "authorization" not in seen.headers
    assert "anthropic-version" in seen.headers
    await sdks.recorded()
    row = await the_usage(sql)
    assert (row["model"], row["input_tokens"], row["output_tokens"]) == (
        playing.CLAUDE,
        playing.INPUT_TOKENS,
        playing.OUTPUT_TOKENS,
    )
    assert (row["cache_read_tokens"], row["cache_write_tokens"]) == (
        playing.CACHE_READ_TOKENS,
        playing.CACHE_WRITE_TOKENS,
    )


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
async def test_responses_and_embeddings_are_counted_too(
    sdks: Sdks, llm: LlmProviders, make: Factory, sql: Connection, zipped: bool
) -> None:
    user = await user_with_key(make)
    if zipped:
        llm.will(CANARY, playing.zipped)
    sdk = sdks.openai(user)
    answer = await sdks.do(sdk.responses.create, model="gpt-4o", input="Hello")
    assert answer.output_text == playing.TEXT
    vectors = await sdks.do(
        sdk.embeddings.create, model="text-embedding-3-small", input="Hello", encoding_format="float"
    )
    assert vectors.data[0].embedding == [0.5, -0.25]
    await sdks.recorded()
    responses, embeddings = await usage(sql)
    assert (responses["input_tokens"], responses["output_tokens"], responses["cache_read_tokens"]) == (
        playing.INPUT_TOKENS,
        playing.OUTPUT_TOKENS,
        playing.CACHED_TOKENS,
    )
    assert (embeddings["input_tokens"], embeddings["output_tokens"]) == (playing.INPUT_TOKENS, 0)
    assert embeddings["cost_micros"] > 0


async def test_what_is_only_read_costs_nothing(
    sdks: Sdks, llm: LlmProviders, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=1_000_000)
    assert (await sdks.do(sdks.openai(user).models.list)).data == []
    await sdks.recorded()
    assert await holds(sql) == [("SUCCESS", 0)]
    owner = await user_with_key(make)
    await sdks.do(sdks.openai(owner).models.list)
    await sdks.recorded()
    assert llm.seen[-1].key == CANARY
    assert (await the_usage(sql))["cost_micros"] == 0


# ---------------------------------------------------------------------------- for whom it is


async def test_a_request_may_have_a_user_of_its_own(
    sdks: Sdks, llm: LlmProviders, make: Factory, sql: Connection
) -> None:
    one, other = await user_with_key(make), await make.user(micros=1_000_000)
    sdk = sdks.openai(one)
    await sdks.do(sdk.chat.completions.create, **CHAT, extra_headers={"x-keyturn-user": other})
    await sdks.do(sdk.with_options(default_headers={"X-Keyturn-User": other}).chat.completions.create, **CHAT)
    await sdks.do(sdk.chat.completions.create, **CHAT)
    assert [seen.key for seen in llm.seen] == [PLATFORM, PLATFORM, CANARY]
    assert not [name for seen in llm.seen for name in seen.headers if "keyturn" in name]
    assert other not in str([(seen.headers, seen.body) for seen in llm.seen])


async def test_the_user_may_come_from_where_the_request_is_made(
    sdks: Sdks, llm: LlmProviders, make: Factory
) -> None:
    current: ContextVar[str | None] = ContextVar("current", default=None)
    sdk = sdks.openai(current.get)
    current.set(await user_with_key(make))
    await sdks.do(sdk.chat.completions.create, **CHAT)
    current.set(await make.user(micros=1_000_000))
    await sdks.do(sdk.chat.completions.create, **CHAT)
    assert [seen.key for seen in llm.seen] == [CANARY, PLATFORM]


async def test_a_request_of_nobody_goes_nowhere(sdks: Sdks, llm: LlmProviders) -> None:
    for user in (None, "", lambda: None):
        with pytest.raises(openai.AuthenticationError, match="x-keyturn-user") as caught:
            await sdks.do(sdks.openai(user, max_retries=2).chat.completions.create, **CHAT)
        assert caught.value.code == "missing_user"
    assert llm.seen == []


# ---------------------------------------------------------------------------------- streams


async def test_a_stream_comes_through_event_by_event_and_is_counted_at_its_end(
    sdks: Sdks, llm: LlmProviders, make: Factory, sql: Connection
) -> None:
    user = await user_with_key(make)
    gate = asyncio.Semaphore(0)
    llm.will(CANARY, playing.held(gate))
    creating = asyncio.create_task(sdks.do(sdks.openai(user).chat.completions.create, **CHAT, stream=True))
    gate.release()
    stream = await creating
    for word in playing.WORDS:
        assert (await sdks.next(stream)).choices[0].delta.content == word
        assert not llm.seen[0].answered
        await sdks.recorded()
        assert await usage(sql) == []
        gate.release()
    for _ in range(3):
        gate.release()
    rest = await sdks.all(stream)
    # Nobody had asked for the usage, so nobody sees the event that tells it.
    assert [each.choices[0].finish_reason for each in rest] == ["stop"]
    assert llm.seen[0].json["stream_options"] == {"include_usage": True}
    await sdks.recorded()
    row = await the_usage(sql)
    assert (row["outcome"], row["model"], row["total_tokens"]) == ("SUCCESS", playing.MODEL, ALL_TOKENS)


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("asks", [False, True], ids=["unasked", "asked for"])
async def test_the_usage_of_a_stream_is_seen_by_whoever_asked_for_it(
    sdks: Sdks, llm: LlmProviders, make: Factory, sql: Connection, asks: bool, zipped: bool
) -> None:
    user = await make.user(micros=1_000_000)
    if zipped:
        llm.will(PLATFORM, playing.zipped)
    options = {"stream_options": {"include_usage": True}} if asks else {}
    stream = await sdks.do(sdks.openai(user).chat.completions.create, **CHAT, stream=True, **options)
    chunks = await sdks.all(stream)
    assert "".join(each.choices[0].delta.content or "" for each in chunks if each.choices) == playing.TEXT
    told = [each.usage.total_tokens for each in chunks if each.usage is not None]
    assert told == ([ALL_TOKENS] if asks else [])
    assert all(each.choices for each in chunks) is not asks
    await sdks.recorded()
    ((outcome, charged),) = await holds(sql)
    assert outcome == "SUCCESS"
    assert 0 < (charged or 0) < 1_000


async def test_events_of_responses_and_messages_are_read_too(
    sdks: Sdks, llm: LlmProviders, make: Factory, sql: Connection
) -> None:
    user = await user_with_key(make)
    await make.key(user, "anthropic", secret=OTHER_CANARY)
    events = await sdks.all(
        await sdks.do(sdks.openai(user).responses.create, model="gpt-4o", input="Hello", stream=True)
    )
    assert events[-1].response.usage.total_tokens == ALL_TOKENS
    events = await sdks.all(await sdks.do(sdks.anthropic(user).messages.create, **MESSAGE, stream=True))
    assert "".join(each.delta.text for each in events if each.type == "content_block_delta") == playing.TEXT
    await sdks.recorded()
    for row in await usage(sql):
        assert (row["outcome"], row["input_tokens"], row["output_tokens"], row["cache_read_tokens"]) == (
            "SUCCESS",
            playing.INPUT_TOKENS,
            playing.OUTPUT_TOKENS,
            playing.CACHED_TOKENS,
        )


async def test_a_stream_that_is_closed_early_is_cancelled_with_the_usage_so_far(
    sdks: Sdks, llm: LlmProviders, make: Factory, sql: Connection
) -> None:
    user = await user_with_key(make, "anthropic")
    gate = asyncio.Semaphore(4)
    llm.will(CANARY, playing.held(gate))
    stream = await sdks.do(sdks.anthropic(user).messages.create, **MESSAGE, stream=True)
    while (await sdks.next(stream)).type != "content_block_delta":
        pass
    await sdks.do(stream.close)
    await llm.left_alone(llm.seen[0])
    await sdks.recorded()
    row = await the_usage(sql)
    assert row["outcome"] == "CLIENT_CANCELLED"
    assert (row["input_tokens"], row["output_tokens"]) == (playing.INPUT_TOKENS, 1)


async def test_a_task_that_is_cancelled_hangs_up_and_is_recorded(
    llm: LlmProviders, start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    sidecar = await start_sidecar()
    sdks = Sdks(False, sidecar.address, llm)
    user = await make.user(micros=1_000_000)
    llm.will(PLATFORM, playing.hang)
    asking = asyncio.create_task(sdks.openai(user).chat.completions.create(**CHAT))
    seen = await llm.asked()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await llm.left_alone(seen)
    await sdks.recorded()
    assert await holds(sql) == [("CLIENT_CANCELLED", 0)]
    await sdks.close()


@pytest.mark.parametrize(
    ("behaviour", "raised"),
    [
        (playing.breaks_off(2), openai.APIError),
        (playing.breaks_off(2, rudely=False), None),
        (playing.breaks_down, openai.APIError),
    ],
    ids=["cut", "short", "told"],
)
async def test_a_stream_that_breaks_is_the_providers_fault(
    sdks: Sdks, llm: LlmProviders, make: Factory, sql: Connection, behaviour: Any, raised: Any
) -> None:
    user = await make.user(micros=1_000_000)
    llm.will(PLATFORM, behaviour)
    stream = await sdks.do(sdks.openai(user).chat.completions.create, **CHAT, stream=True)
    if raised is None:
        assert len(await sdks.all(stream)) == 2
    else:
        with pytest.raises(raised):
            await sdks.all(stream)
    await sdks.recorded()
    assert await holds(sql) == [("PROVIDER_ERROR", 0)]


async def test_a_broken_stream_of_messages_is_charged_as_far_as_it_came(
    sdks: Sdks, llm: LlmProviders, make: Factory, sql: Connection
) -> None:
    user = await user_with_key(make, "anthropic")
    llm.will(CANARY, playing.breaks_down)
    stream = await sdks.do(sdks.anthropic(user).messages.create, **MESSAGE, stream=True)
    with pytest.raises(anthropic.APIStatusError, match="Overloaded"):
        await sdks.all(stream)
    await sdks.recorded()
    row = await the_usage(sql)
    assert (row["outcome"], row["input_tokens"], row["error_message"]) == (
        "PROVIDER_ERROR",
        playing.INPUT_TOKENS,
        "Overloaded",
    )


# ------------------------------------------------------------------- when the provider refuses


@pytest.mark.parametrize(
    ("behaviour", "outcome", "status"),
    [
        (playing.refuse, "AUTH_REJECTED", 401),
        (playing.forbid, "AUTH_REJECTED", 403),
        (playing.rate_limit, "RATE_LIMITED", 429),
        (playing.no_quota, "PROVIDER_BILLING", 429),
        (playing.unpaid, "PROVIDER_BILLING", 400),
    ],
    ids=["401", "403", "429", "quota", "billing"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_refused_key_is_recorded_and_the_platform_pays_on(
    sdks: Sdks,
    llm: LlmProviders,
    make: Factory,
    sql: Connection,
    behaviour: Any,
    outcome: str,
    status: int,
    stream: bool,
) -> None:
    user = await user_with_key(make, micros=1_000_000)
    llm.will(CANARY, behaviour)
    answer = await sdks.do(sdks.openai(user).chat.completions.create, **CHAT, stream=stream)
    if stream:
        assert len(await sdks.all(answer)) == 4
    assert [seen.key for seen in llm.seen] == [CANARY, PLATFORM]
    assert llm.seen[0].body == llm.seen[1].body
    await sdks.recorded()
    row = await the_usage(sql)
    assert (row["outcome"], row["http_status"]) == (outcome, status)
    assert row["error_message"]
    assert CANARY not in row["error_message"]
    ((settled, charged),) = await holds(sql)
    assert settled == "SUCCESS"
    assert charged
    if outcome == "RATE_LIMITED":
        assert (
            10
            < (await sql.fetchval("SELECT extract(epoch FROM cooldown_until - now()) FROM user_api_keys"))
            <= 20
        )


async def test_the_next_key_is_tried_before_credits(
    sdks: Sdks, llm: LlmProviders, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=1_000_000)
    await make.key(user, secret=CANARY, priority=0)
    await make.key(user, secret=OTHER_CANARY, priority=1)
    llm.will(CANARY, playing.refuse)
    await sdks.do(sdks.openai(user).chat.completions.create, **CHAT)
    assert [seen.key for seen in llm.seen] == [CANARY, OTHER_CANARY]
    await sdks.recorded()
    assert [row["outcome"] for row in await usage(sql)] == ["AUTH_REJECTED", "SUCCESS"]
    assert await holds(sql) == []


async def test_no_more_than_three_keys_are_tried(
    sdks: Sdks, llm: LlmProviders, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=1_000_000)
    keys = [f"sk-canary-number-{number}-0123456789" for number in range(4)]
    for number, key in enumerate(keys):
        await make.key(user, secret=key, priority=number)
        llm.will(key, playing.refuse)
    with pytest.raises(openai.AuthenticationError):
        await sdks.do(sdks.openai(user).chat.completions.create, **CHAT)
    assert [seen.key for seen in llm.seen] == keys[:3]
    await sdks.recorded()
    assert [row["outcome"] for row in await usage(sql)] == [*["AUTH_REJECTED"] * 3, "NEVER_SENT"]


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
async def test_where_nobody_else_may_pay_the_providers_own_answer_comes_back(
    sdks: Sdks, llm: LlmProviders, make: Factory, sql: Connection, provider: str
) -> None:
    user = await user_with_key(make, provider)
    llm.will(CANARY, playing.refuse)
    raised = await error_of(sdks, provider, user)
    assert isinstance(raised, openai.AuthenticationError | anthropic.AuthenticationError)
    assert CANARY not in str(raised)
    assert CANARY not in raised.response.text
    assert raised.response.headers["x-request-id"] == "req_1"
    assert len(llm.seen) == 1
    await sdks.recorded()
    assert (await the_usage(sql))["outcome"] == "AUTH_REJECTED"
    assert await sql.fetchval("SELECT is_valid FROM user_api_keys") is False


@pytest.mark.parametrize(
    ("behaviour", "outcome", "raised"),
    [
        (playing.refuse, "AUTH_REJECTED", openai.AuthenticationError),
        (playing.rate_limit, "RATE_LIMITED", openai.RateLimitError),
        (playing.no_quota, "PROVIDER_BILLING", openai.RateLimitError),
        (playing.object_to, "REFUSED", openai.BadRequestError),
        (playing.fail, "PROVIDER_ERROR", openai.InternalServerError),
        (playing.close, "PROVIDER_ERROR", openai.APIConnectionError),
    ],
    ids=["401", "429", "quota", "400", "500", "closed"],
)
async def test_a_failure_of_the_platforms_own_request_costs_nothing(
    sdks: Sdks, llm: LlmProviders, make: Factory, sql: Connection, behaviour: Any, outcome: str, raised: Any
) -> None:
    user = await make.user(micros=1_000_000)
    llm.will(PLATFORM, behaviour)
    with pytest.raises(raised):
        await sdks.do(sdks.openai(user).chat.completions.create, **CHAT)
    await sdks.recorded()
    assert await holds(sql) == [(outcome, 0)]


async def test_no_answer_in_time_is_a_timeout(
    sdks: Sdks, llm: LlmProviders, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=1_000_000)
    llm.will(PLATFORM, playing.hang)
    with pytest.raises(openai.APITimeoutError):
        await sdks.do(sdks.openai(user, timeout=0.3).chat.completions.create, **CHAT)
    await llm.left_alone(llm.seen[0])
    await sdks.recorded()
    assert await holds(sql) == [("TIMEOUT", 0)]


async def test_a_provider_that_cannot_be_reached_was_never_sent_to(
    sdks: Sdks, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=1_000_000)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    sdk = sdks.openai(user, base_url=f"http://127.0.0.1:{port}/v1")
    with pytest.raises(openai.APIConnectionError):
        await sdks.do(sdk.chat.completions.create, **CHAT)
    await sdks.recorded()
    assert await holds(sql) == [("NEVER_SENT", 0)]


async def test_every_attempt_of_the_sdk_is_settled_and_one_is_charged(
    sdks: Sdks, llm: LlmProviders, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=1_000_000)
    llm.will(PLATFORM, playing.fail, playing.close, playing.accept)
    await sdks.do(sdks.openai(user, max_retries=2).chat.completions.create, **CHAT)
    assert len(llm.seen) == 3
    await sdks.recorded()
    ended = await holds(sql)
    assert [outcome for outcome, _ in ended] == ["PROVIDER_ERROR", "PROVIDER_ERROR", "SUCCESS"]
    assert [bool(charged) for _, charged in ended] == [False, False, True]
    assert await sql.fetchval("SELECT held_micros FROM credit_accounts") == 0


async def test_requests_at_once_are_each_charged_once(
    sdks: Sdks, llm: LlmProviders, make: Factory, sql: Connection
) -> None:
    user = await make.user(micros=10_000_000)
    sdk = sdks.openai(user)

    async def ask(number: int) -> None:
        if number % 2:
            await sdks.all(await sdks.do(sdk.chat.completions.create, **CHAT, stream=True))
        else:
            await sdks.do(sdk.chat.completions.create, **CHAT)

    await asyncio.gather(*map(ask, range(8)))
    await sdks.recorded()
    ended = await holds(sql)
    assert len(ended) == 8
    assert len(set(ended)) == 1
    assert ended[0][0] == "SUCCESS"
    balance = await sql.fetchval("SELECT balance_micros FROM credit_accounts")
    assert balance == 10_000_000 - 8 * (ended[0][1] or 0)


# ---------------------------------------------------------------- when nobody pays, or may not


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
async def test_a_denial_is_an_answer_that_sdks_do_not_try_again(
    sdks: Sdks, llm: LlmProviders, make: Factory, provider: str
) -> None:
    user = await make.user()
    raised = await error_of(sdks, provider, user)
    assert raised.status_code == 402
    said = raised.response.json()["error"]
    assert (said["type"], said["code"]) == ("keyturn", "no_key_and_no_credits")
    assert said["message"]
    assert isinstance(raised.response.extensions["keyturn"], Denied)
    assert llm.seen == []
    if provider == "openai":
        assert (raised.code, raised.type) == ("no_key_and_no_credits", "keyturn")


async def test_a_denial_that_may_pass_says_when(
    sdks: Sdks, llm: LlmProviders, make: Factory, sql: Connection
) -> None:
    user = await make.user("community", micros=1_000_000)
    await sql.execute("UPDATE subscription_tiers SET requests_per_minute = 1 WHERE name = 'community'")

    async def limited() -> Any:
        try:
            await sdks.do(sdks.openai(user).chat.completions.create, **CHAT)
        except openai.RateLimitError as raised:
            return raised
        return None

    error = await eventually(limited)
    assert error.code == "rate_limited"
    assert 1 <= int(error.response.headers["retry-after"]) <= 60
    assert "x-should-retry" not in error.response.headers


async def test_a_user_that_is_not_there_is_not_the_providers_fault(sdks: Sdks, llm: LlmProviders) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        await sdks.do(sdks.openai("nobody", max_retries=2).chat.completions.create, **CHAT)
    assert caught.value.code == "unknown_user"
    assert isinstance(caught.value.response.extensions["keyturn"], NotFound)
    assert llm.seen == []


@pytest.mark.parametrize("passes", [False, True], ids=["closed", "open"])
@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "asyncio"])
async def test_a_sidecar_that_is_down_is_an_outage_unless_when_down_lets_it_pass(
    llm: LlmProviders, blocking: bool, passes: bool
) -> None:
    sdks = Sdks(blocking, "unix:/nobody/is/here.sock", llm)
    sdks.keyturn._when_down = (lambda request, error: True) if passes else None
    if passes:
        assert (
            await sdks.do(sdks.openai("u1").chat.completions.create, **CHAT)
        ).usage.total_tokens == ALL_TOKENS
        assert [seen.key for seen in llm.seen] == [PLATFORM]
    else:
        with pytest.raises(openai.InternalServerError) as caught:
            await sdks.do(sdks.openai("u1").chat.completions.create, **CHAT)
        assert (caught.value.status_code, caught.value.code) == (503, "sidecar_unavailable")
        assert caught.value.response.headers["retry-after"] == "1"
        assert isinstance(caught.value.response.extensions["keyturn"], Unavailable)
        assert llm.seen == []
    await sdks.recorded()
    await sdks.close()


# --------------------------------------------------------------------------------- secrets


def report_of(error: BaseException) -> str:
    """What a reporter of errors prints: every local variable of every frame but the test's own."""
    trace = error.__traceback__
    below = trace.tb_next if trace is not None else None
    report = traceback.TracebackException(type(error), error, below, capture_locals=True)
    return "".join(report.format())


async def test_the_secret_shows_up_nowhere(
    sdks: Sdks, llm: LlmProviders, make: Factory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "anthropic", "httpx2", "httpcore2", "keyturn"):
        caplog.set_level(logging.DEBUG, logger=name)
    user = await user_with_key(make)
    await make.key(user, "anthropic", secret=OTHER_CANARY)
    sdk, claude = sdks.openai(user), sdks.anthropic(user)
    shown: list[str] = []

    raw = await sdks.do(sdk.chat.completions.with_raw_response.create, **CHAT)
    request = raw.http_response.request
    assert request.headers["authorization"] == f"Bearer {PLATFORM}"
    assert str(request.url) == f"{llm.openai_url}/chat/completions"
    shown += [repr(raw), repr(vars(raw)), str(list(request.headers.raw)), str(list(raw.headers.raw))]

    for key, ask, fields in (
        (CANARY, sdk.chat.completions.create, CHAT),
        (CANARY, sdk.chat.completions.create, {**CHAT, "stream": True}),
        (OTHER_CANARY, claude.messages.create, MESSAGE),
        (OTHER_CANARY, claude.messages.create, {**MESSAGE, "stream": True}),
    ):
        for behaviour in (playing.close, playing.breaks_off(1), playing.object_to, playing.refuse):
            llm.will(key, behaviour)
            try:
                answer = await sdks.do(ask, **fields)
                if "stream" in fields:
                    await sdks.all(answer)
            except (openai.APIError, anthropic.APIError, httpx2.RequestError) as error:
                shown.append(report_of(error))
    assert len(shown) > 8
    for text in (*shown, caplog.text, str([vars(each) for each in caplog.records])):
        assert CANARY not in text
        assert OTHER_CANARY not in text
    assert any(each.name.startswith("httpcore") for each in caplog.records)
    await sdks.recorded()


class Tattler(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """The body of an answer that breaks with the signature of its request in every frame, and behind them."""

    def __init__(self, request: httpx2.Request) -> None:
        self.request = request

    def __iter__(self) -> Iterator[bytes]:
        yield b"data: {}\n\n"
        tattle(self.request)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"data: {}\n\n"
        tattle(self.request)


def tattle(request: httpx2.Request) -> NoReturn:
    signature = request.headers["authorization"]
    raise httpx2.ReadError("The connection broke.", request=request) from OSError(signature)


@pytest.mark.parametrize("stream", [False, True], ids=["at once", "in the middle"])
async def test_what_is_below_leaves_no_trace_in_an_error(
    sdks: Sdks, make: Factory, sql: Connection, stream: bool
) -> None:
    def provider(request: httpx2.Request) -> httpx2.Response:
        if not stream:
            tattle(request)
        headers = {"content-type": "text/event-stream"}
        return httpx2.Response(200, headers=headers, stream=Tattler(request))

    user = await user_with_key(make)
    sdk = sdks.openai(user, terms={"transport": httpx2.MockTransport(provider)})

    async def ask() -> None:
        answer = await sdks.do(sdk.chat.completions.create, **CHAT, stream=stream)
        await sdks.all(answer)

    with pytest.raises(openai.APIConnectionError) as caught:
        await ask()
    assert CANARY not in report_of(caught.value)
    broken: Any = caught.value.__cause__
    assert isinstance(broken, httpx2.ReadError)
    assert str(broken) == "The connection broke."
    assert broken.request.headers["authorization"] == f"Bearer {PLATFORM}"
    await sdks.recorded()
    assert (await the_usage(sql))["outcome"] == "PROVIDER_ERROR"


# ------------------------------------------------------------------- what it is made for and of


def test_the_older_httpx_will_do_where_the_newer_is_not(tmp_path: Any) -> None:
    """As with SDKs of before they changed over."""
    program = """
import json, sys
sys.modules["httpx2"] = None
import httpx
from keyturn import Client
from keyturn.httpx import KeyturnTransport

asked = []
def provider(request):
    asked.append(request)
    return httpx.Response(200, json={"usage": {"prompt_tokens": 1, "completion_tokens": 2}})

with Client(sys.argv[1], when_down=lambda request, error: True) as client:
    below = httpx.MockTransport(provider)
    transport = KeyturnTransport(client, provider="openai", user_id="u1", transport=below)
    with httpx.Client(transport=transport) as http:
        print(http.post("https://api.openai.com/v1/chat/completions", json={"model": "m"}).json())
    assert asked[0].headers["host"] == "api.openai.com"
"""
    ran = subprocess.run(
        [sys.executable, "-c", program, f"unix:{tmp_path}/nobody.sock"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "prompt_tokens" in ran.stdout


def test_the_client_alone_needs_no_http_library() -> None:
    program = "import sys, keyturn; print([name for name in sys.modules if 'httpx' in name])"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == []
