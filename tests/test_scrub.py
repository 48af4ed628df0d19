"""What leaves as `***` in logs and error texts, and what must stay readable."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import structlog

from keyturn.secret import Secret
from keyturn.v1 import routing_service_pb2 as pb
from keyturn_server.configuration import Provider
from keyturn_server.keys.provider_checks import KeyCheck, open_provider_checks
from keyturn_server.logs import configure_logs, get_log, scrub_event
from keyturn_server.rpc.decode import report_from
from keyturn_server.scrub import STRUCK, scrub
from tests.providers import playing_providers

# The text, and what is left of it.
STRUCK_OUT = {
    "OpenAI": (
        "Incorrect API key provided: sk-proj-aB3_dE-6fGh9iJkLmNoP.",
        f"Incorrect API key provided: {STRUCK}",
    ),
    "OpenAI, masked": ("provided: sk-proj-********************f9aQ. Find", f"provided: {STRUCK} Find"),
    "Anthropic": ('{"key": "sk-ant-api03-abcDEF123_-xyz"}', f'{{"key": "{STRUCK}"}}'),
    "Groq": ("gsk_0123456789abcdefghij", STRUCK),
    "xAI": ("xai-0123456789abcdefghij", STRUCK),
    "Perplexity": ("pplx-0123456789abcdefghij", STRUCK),
    "Fireworks": ("key fw_3ZkAbCdEfGhIjKlMnOpQrStU is bad", f"key {STRUCK} is bad"),
    "Google": ("?key=AIzaSyA-0123456789_abcdefghijklmnopq&alt=json", f"?key={STRUCK}&alt=json"),
    "Google, since 2026": ("key: AQ.Ab8RN6Ldefghijklmnop_qrs-tuv", f"key: {STRUCK}"),
    "Mistral": ("Unauthorized: aBcDeFgHiJkLmNoPqRsTuVwXyZ012345", f"Unauthorized: {STRUCK}"),
    "Cohere": ("invalid api token a1b2c3d4e5f6g7h8i9j0k1l2m3n4o5p6q7r8s9t0", f"invalid api token {STRUCK}"),
    "Together": (f"key {'0a1b2c3d' * 8} refused", f"key {STRUCK} refused"),
    "Together, newer": ("tgp_v1_aB3dE6fGh9iJkLmNoPqR", STRUCK),
    "bearer": ("Authorization: Bearer eyJhbGciOi.J9.e30", f"Authorization: Bearer {STRUCK}"),
    "basic": ("Authorization: Basic dXNlcjpwYXNz", f"Authorization: Basic {STRUCK}"),
    "handle": ("kth1_AAAA-bbbb_CCCC", STRUCK),
    "token": (f"it was kta_{'aB3-' * 10}xyz_", f"it was {STRUCK}"),
    "ticket": ('ticket "ktt1_AAAA-bbbb_CCCC"', f'ticket "{STRUCK}"'),
    "ciphertext": ("v1.0123456789abcdef.QUJD-_x", STRUCK),
    "ciphertext of Node": (f"row {'QUJDREVGR0hJSktM' * 4}==", f"row {STRUCK}"),
    "master key": (f"ENCRYPTION_KEY={'0123456789abcdef' * 4}", f"ENCRYPTION_KEY={STRUCK}"),
    "URL": ("postgresql://keyturn:p@ss:w/rd@db:5432/x", f"postgresql://keyturn:{STRUCK}@db:5432/x"),
    "parameter": ("host=/run password=hunter2 port=1", f"host=/run password={STRUCK} port=1"),
    "several": ("sk-0123456789abcdef and sk-fedcba9876543210", f"{STRUCK} and {STRUCK}"),
}
KEPT = (
    "The model `gpt-4o-mini-2024-07-18` does not exist or you do not have access to it.",
    "accounts/fireworks/models/llama-v3p1-405b-instruct",
    "meta-llama/Meta-Llama-3.1-405B-Instruct-Turbo",
    "claude-opus-4-20250514, gemini-2.5-flash-preview-05-20, o3-mini-2025-01-31",
    "projects/my-project-123456/locations/us-central1/publishers/google/models/gemini-2.0-flash",
    "arn:aws:bedrock:us-east-1:123456789012:inference-profile/us.anthropic.claude-3-5-sonnet-20241022-v2:0",
    "0192f3a4-5b6c-7d8e-9f01-23456789abcd",
    "user-0192f3a4-5b6c-7d8e-9f01-23456789abcd",
    "01ARZ3NDEKTSV4RRFFQ69G5FAV",
    "auth0|507f1f77bcf86cd799439011",
    "user_2NNEqL2nrIRdJ194ndJqAHwEfxC",
    "ab12CD34ef56GH78ij90KL12mn34",
    "4bf92f3577b34da6a3ce929d0e0e4736",
    "someone+tag@example.com",
    "Rate limit reached for requests. Limit: 3 / min. Please try again in 20s.",
    "Basic authentication is not supported; bearer tokens are.",
    "You exceeded your current quota, please check your plan and billing details.",
    'relation "api_key_usage" does not exist',
    "key_unreadable, api_providers, key_pattern, api_connection_error",
    "/usr/lib/python3.11/site-packages/asyncpg/protocol/protocol.pyx, line 165, in prepare",
    "https://api.openai.com/v1/chat/completions?api-version=2024-10-21",
    "postgresql://db.internal:5432/keyturn, http://[::1]:8080/x, unix:/run/keyturn/keyturn.sock",
    "Größe überschritten: 12.345 Zeichen; 東京は大丈夫です。",
    "",
)


@pytest.mark.parametrize("name", STRUCK_OUT)
def test_whatever_looks_like_a_secret_is_struck_out(name: str) -> None:
    text, left = STRUCK_OUT[name]
    assert scrub(text) == left


@pytest.mark.parametrize("text", KEPT)
def test_ids_models_and_sentences_survive(text: str) -> None:
    assert scrub(text) == text


def test_scrubbing_twice_is_scrubbing_once() -> None:
    for text, _ in STRUCK_OUT.values():
        assert scrub(scrub(text)) == scrub(text)


def test_the_work_does_not_explode_with_the_length_of_the_text() -> None:
    # Texts that make a careless pattern try every pair of places: minutes, where this takes a moment.
    for piece in ("a", "a1", "a://:", "bearer ", "password=", "sk-", "aB1aB1aB1aB1_", "a" * 15 + "-", "a.b+"):
        scrub(piece * (500_000 // len(piece)))


def test_an_error_text_of_a_provider_is_scrubbed_before_it_is_cut() -> None:
    secret = "sk-" + "0123456789abcdef" * 3
    for before in range(440, 520):
        report = report_from(
            pb.RecordRequest(
                credit_ticket="x", outcome=pb.OUTCOME_AUTH_REJECTED, error_message="." * before + f" {secret}"
            )
        )
        assert "0123" not in report.error_message
        assert "sk-" not in report.error_message


def test_an_event_is_clean_at_any_depth_and_in_any_type() -> None:
    secret = "sk-0123456789abcdef"
    event: dict[str, Any] = {
        "event": f"refused {secret}",
        "token": "short",
        "nested": {"authorization": "x", "list": [secret, (secret, {"a": secret})], secret: 1},
        "object": Secret(secret),
        "bytes": secret.encode(),
        "error": ValueError(secret),
        "exception": [{"exc_value": f"bad {secret}", "frames": [{"lineno": 3}]}],
        "count": 7,
        "ratio": 0.5,
        "nothing": None,
        "yes": True,
    }
    cleaned = scrub_event(None, "info", event)
    assert secret not in repr(cleaned)
    assert cleaned["token"] == cleaned["nested"]["authorization"] == cleaned["object"] == STRUCK
    assert cleaned["exception"][0]["frames"] == [{"lineno": 3}]
    assert [cleaned[key] for key in ("count", "ratio", "nothing", "yes")] == [7, 0.5, None, True]


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """The process's log as `serve` configures it, into a string."""
    root, before = logging.getLogger(), structlog.get_config()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    configure_logs("debug", stream=stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("keyturn").setLevel(logging.NOTSET)
    structlog.configure(**before)


async def test_whatever_is_logged_by_whomever_is_a_clean_json_line(log: io.StringIO) -> None:
    secret = "sk-0123456789abcdef"
    get_log().info("event", user_id="user-1", text=f"a {secret}\nb")
    logging.getLogger("a.library").warning("it said %s", secret, extra={"detail": secret})
    try:
        raise ValueError(secret)
    except ValueError:
        get_log().exception("failed")
        logging.getLogger("library").exception("failed too")

    async def fails() -> None:
        hidden = secret
        raise RuntimeError(f"nobody waits for {hidden}")

    asyncio.get_running_loop().call_exception_handler(
        {"message": "a task failed", "exception": await _error_of(fails())}
    )
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert len(lines) == 5
    assert secret not in log.getvalue()
    assert "locals" not in log.getvalue()
    assert {"timestamp", "level", "event"} <= set.intersection(*map(set, lines))
    assert lines[0]["user_id"] == "user-1"
    assert [line["exception"][0]["exc_type"] for line in lines[2:]] == [
        "ValueError",
        "ValueError",
        "RuntimeError",
    ]


async def _error_of(work: Any) -> BaseException:
    with pytest.raises(RuntimeError) as caught:
        await work
    return caught.value


async def test_libraries_do_not_tell_of_requests_to_providers(log: io.StringIO) -> None:
    provider = Provider(
        id="openai", name="", is_enabled=True, base_url="", auth_header="authorization", auth_prefix="",
        key_pattern="", check_path="models", check_headers={}, check_refusal=None,
    )  # fmt: skip
    async with (
        playing_providers() as providers,
        open_provider_checks(timeout=timedelta(seconds=30), proxy=None) as checks,
    ):
        url = f"{providers.url}/openai"
        assert (await checks.check(replace(provider, base_url=url), Secret("a-key"))).result is KeyCheck.VALID
    logging.getLogger("httpx").warning("this is heard")
    assert [json.loads(line)["event"] for line in log.getvalue().splitlines()] == ["this is heard"]
