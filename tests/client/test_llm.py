"""What is read of requests to providers, and of their answers, however they are cut into chunks."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from keyturn import _llm
from keyturn._llm import AnswerReader, endpoint_of, read_error, read_request, retry_after_of

STREAM = "text/event-stream; charset=utf-8"
NOW = datetime(2026, 5, 6, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("path", "base", "endpoint"),
    [
        ("/v1/chat/completions", None, "/chat/completions"),
        ("/openai/v1/chat/completions", None, "/chat/completions"),
        ("/v1beta/openai/chat/completions", "/v1beta/openai/", "/chat/completions"),
        ("/v1/files/v1/content", None, "/files/v1/content"),
        ("/v1/messages", None, "/messages"),
        ("/v1/messages", "/elsewhere", "/messages"),
        ("/v1x/y", "/v1", "/y"),
        ("/chat/completions", None, "/chat/completions"),
        ("/chat/completions", "/", "/chat/completions"),
        ("/proxy/openai/chat/completions", "/proxy/openai", "/chat/completions"),
    ],
)
def test_the_endpoint_is_what_stays_under_another_base_url(
    path: str, base: str | None, endpoint: str
) -> None:
    assert endpoint_of(path, base) == endpoint


def read(
    body: Any, *, method: str = "POST", endpoint: str = "/chat/completions", provider: str = "openai"
) -> Any:
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_request(method, endpoint, provider, sent)


def test_the_estimate_is_what_the_request_may_use() -> None:
    asked = read({"model": "m", "max_tokens": 9, "max_completion_tokens": 7})
    assert (asked.model, asked.max_output_tokens) == ("m", 7)
    assert asked.input_tokens == len(asked.body) // 4
    assert read({"max_output_tokens": 5}, endpoint="/responses").max_output_tokens == 5
    assert read({"input": "x"}, endpoint="/embeddings").max_output_tokens == 0
    for body in ({}, {"max_tokens": "9"}, {"max_tokens": True}, {"max_tokens": -1}, {"max_tokens": 10**12}):
        assert (read(body).input_tokens, read(body).max_output_tokens) == (None, None)


@pytest.mark.parametrize("body", [b"", b"\xff\x00", b"[1]", b'"x"', b"{", b"[" * 100_000])
def test_a_body_that_is_no_object_is_sent_as_it_is(body: bytes) -> None:
    asked = read(body)
    assert (asked.body, asked.model, asked.hides_usage) == (body, "", False)


def test_usage_is_asked_for_where_it_is_not_told_unasked() -> None:
    asked = read({"stream": True, "stream_options": {"x": 1}, "messages": ["\ud800ü"]})
    assert asked.hides_usage
    assert json.loads(asked.body)["stream_options"] == {"x": 1, "include_usage": True}
    assert json.loads(asked.body)["messages"] == ["\ud800ü"]
    for body, endpoint, provider in (
        ({"stream": True, "stream_options": {"include_usage": True}}, "/chat/completions", "openai"),
        ({"stream": False}, "/chat/completions", "openai"),
        ({"stream": True}, "/responses", "openai"),
        ({"stream": True}, "/messages", "anthropic"),
        ({"stream": True}, "/chat/completions", "mistral"),
        ({"stream": True, "stream_options": "?"}, "/chat/completions", "openai"),
    ):
        asked = read(body, endpoint=endpoint, provider=provider)
        assert (asked.hides_usage, json.loads(asked.body)) == (False, body)


@pytest.mark.parametrize(
    ("method", "endpoint", "free"),
    [
        ("GET", "/models", True),
        ("DELETE", "/files/f1", True),
        ("POST", "/moderations", True),
        ("POST", "/messages/count_tokens", True),
        ("POST", "/messages", False),
        ("POST", "/filesystem", False),
        ("POST", "/chat/completions", False),
    ],
)
def test_what_providers_charge_nothing_for(method: str, endpoint: str, free: bool) -> None:
    assert read({}, method=method, endpoint=endpoint).free is free


CHUNK = b'data: {"model": "m", "choices": [{"delta": {"content": "caf\xc3\xa9"}}]}'
TOLD = b'data: {"model": "m", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}'
DONE = b"data: [DONE]"


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("hides", [False, True])
def test_a_stream_is_read_however_it_is_cut(newline: bytes, size: int, hides: bool) -> None:
    end = newline * 2
    comment = b": keep-alive" + end
    body = comment + CHUNK + end + TOLD + end + DONE + end
    reader = AnswerReader(STREAM, hides_usage=hides)
    shown = b"".join(reader.feed(body[at : at + size]) for at in range(0, len(body), size)) + reader.end()
    assert shown == (body.replace(TOLD + end, b"") if hides else body)
    assert (reader.done, reader.error, reader.model) == (True, None, "m")
    assert reader.usage == {"input_tokens": 3, "output_tokens": 4}


def test_what_is_left_without_its_blank_line_is_read_and_shown() -> None:
    for hides in (False, True):
        reader = AnswerReader(STREAM, hides_usage=hides)
        shown = reader.feed(CHUNK + b"\n\n" + DONE) + reader.end()
        assert shown == CHUNK + b"\n\n" + DONE
        assert reader.done


def test_a_whole_event_is_never_held_back() -> None:
    reader = AnswerReader(STREAM, hides_usage=True)
    assert reader.feed(CHUNK + b"\n\n") == CHUNK + b"\n\n"
    assert reader.feed(CHUNK) == b""


def whole(said: Any) -> Any:
    reader: Any = AnswerReader("application/json; charset=utf-8")
    body = said if isinstance(said, bytes) else json.dumps(said).encode()
    assert reader.feed(body) == body
    assert not reader.done
    reader.end()
    assert reader.done
    return reader


@pytest.mark.parametrize(
    ("counts", "used"),
    [
        (
            {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11},
            {"input_tokens": 9, "output_tokens": 2, "total_tokens": 11},
        ),
        (
            {"input_tokens": 9, "output_tokens": 0, "input_tokens_details": {"cached_tokens": 4}},
            {"input_tokens": 9, "output_tokens": 0, "cache_read_tokens": 4},
        ),
        (
            {
                "input_tokens": 9,
                "output_tokens": 2,
                "cache_read_input_tokens": 5,
                "cache_creation_input_tokens": None,
            },
            {"input_tokens": 14, "output_tokens": 2, "cache_read_tokens": 5, "cache_write_tokens": 0},
        ),
        ({"prompt_tokens": "9", "completion_tokens": -1, "total_tokens": True}, None),
        ({}, None),
    ],
)
def test_tokens_in_the_words_of_each_provider(counts: Any, used: Any) -> None:
    assert whole({"model": "m", "usage": counts}).usage == used


@pytest.mark.parametrize(
    "said", [b"", b"\xff\xd8binary", b"null", {"usage": None}, {"usage": [1]}, {"text": "hi"}]
)
def test_an_answer_that_tells_no_usage(said: Any) -> None:
    assert whole(said).usage is None


def test_sound_and_images_are_not_kept() -> None:
    reader = AnswerReader("audio/mpeg")
    assert reader.feed(b"x" * 1000) == b"x" * 1000
    assert len(reader._rest) == 0
    assert reader.end() == b""
    assert (reader.done, reader.usage) == (True, None)


def test_the_counts_of_a_message_grow_with_its_events() -> None:
    reader: Any = AnswerReader(STREAM)
    for said in (
        {
            "type": "message_start",
            "message": {"model": "c", "usage": {"input_tokens": 5, "cache_read_input_tokens": 2}},
        },
        {"type": "message_delta", "usage": {"output_tokens": 7, "input_tokens": None}},
    ):
        reader.feed(b"event: x\ndata: " + json.dumps(said).encode() + b"\n\n")
    assert not reader.done
    reader.feed(b'data: {"type": "message_stop"}\n\n')
    assert reader.done
    assert reader.usage == {
        "input_tokens": 7,
        "output_tokens": 7,
        "cache_read_tokens": 2,
        "cache_write_tokens": 0,
    }


@pytest.mark.parametrize(
    ("event", "error"),
    [
        ({"error": {"message": "broke"}}, "broke"),
        ({"error": "broke"}, "broke"),
        ({"type": "error", "error": {"type": "overloaded_error", "message": "broke"}}, "broke"),
        ({"type": "error", "code": "server_error", "message": "broke"}, "broke"),
        ({"type": "response.failed", "response": {"error": {"code": "x", "message": "broke"}}}, "broke"),
        ({"type": "response.failed"}, ""),
    ],
)
def test_an_error_in_a_stream(event: Any, error: str) -> None:
    reader = AnswerReader(STREAM)
    reader.feed(b"data: " + json.dumps(event).encode() + b"\n\n")
    assert (reader.error, reader.done) == (error, False)


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ({"error": {"message": "m", "type": "t", "code": "c"}}, "c", "m"),
        ({"error": {"message": "m", "type": "t", "code": None}}, "t", "m"),
        ({"type": "error", "error": {"type": "t", "message": "m"}}, "t", "m"),
        ([{"error": {"code": 400, "message": "m"}}], None, "m"),
        ({"code": "c", "error": "m"}, "c", "m"),
        ({"message": "m"}, None, "m"),
        (b"<html>m</html>", None, "<html>m</html>"),
        (b"", None, ""),
        ([], None, "[]"),
    ],
)
def test_the_errors_of_providers(body: Any, code: str | None, message: str) -> None:
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert read_error(sent) == (code, message)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "20"}, 20),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "Wed, 06 May 2026 12:01:00 GMT"}, 60),
        ({"retry-after": "Wed, 06 May 2026 11:00:00 GMT"}, 0),
        ({"retry-after": "999999999"}, 86_400),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "1.2.3"}, None),
        ({"retry-after-ms": "nan"}, None),
        ({"retry-after-ms": "inf"}, None),
    ],
)
def test_how_long_a_provider_asks_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    asked = retry_after_of(headers, NOW)
    assert asked == (None if seconds is None else timedelta(seconds=seconds))


def test_a_refusal_says_either_when_to_try_again_or_not_to() -> None:
    refusal = _llm.refusal(401, "missing_user", "Who?")
    assert refusal.headers == {"x-should-retry": "false"}
    assert refusal.body["error"]["code"] == "missing_user"
