"""Prices, by hand for known models and against genai-prices itself for all of them."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, time, timedelta, timezone
from decimal import ROUND_CEILING, Decimal, localcontext
from typing import Any

import genai_prices
import pytest
from genai_prices.data import providers as library
from genai_prices.types import (
    ModelInfo,
    ModelPrice,
    StartDateConstraint,
    TieredPrices,
    TimeOfDateConstraint,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from keyturn_server.prices import MAX_MODEL_LENGTH, PriceBook, PriceOverride, Usage

NOON = datetime(2026, 1, 15, 12, tzinfo=UTC)
MTOK = 1_000_000
BOOK = PriceBook()


def cost(
    provider: str,
    model: str,
    usage: Usage,
    *overrides: PriceOverride,
    now: datetime = NOON,
    book: PriceBook = BOOK,
) -> int | None:
    rows = {(row.provider, row.model): row for row in overrides}
    return book.cost_micros(provider, model, usage, now=now, overrides=rows)


def tokens(input_tokens: int = 0, output_tokens: int = 0, cache_read: int = 0, cache_write: int = 0) -> Usage:
    return Usage(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cache_read_tokens=cache_read,
        cache_write_tokens=cache_write,
    )


# USD per million tokens as published: gpt-4o 2.50 in, 1.25 cached, 10 out; gpt-4o-mini 0.15 in;
# Claude Opus 4.1 15 in, 18.75 written, 1.50 read, 75 out; Gemini 2.5 Pro 1.25 in, 0.125 cached,
# 10 out, above 200,000 input tokens 2.50, 0.25, 15; sonar 1 in, 1 out, 12 per thousand requests.
@pytest.mark.parametrize(
    ("provider", "model", "usage", "micros"),
    [
        ("openai", "gpt-4o", tokens(1000, 500), 2500 + 5000),
        ("openai", "gpt-4o", tokens(1000, 500, cache_read=400), 1500 + 500 + 5000),
        ("openai", "gpt-4o", tokens(1000, cache_read=1000), 1250),
        ("openai", "gpt-4o", tokens(1000, cache_write=1000), 2500),
        ("openai", "gpt-4o-mini", tokens(1), 1),
        ("openai", "gpt-4o-mini", tokens(20), 3),
        ("openai", "gpt-4o-mini", tokens(21), 4),
        ("openai", "gpt-4o", tokens(), 0),
        (
            "anthropic",
            "claude-opus-4-1",
            tokens(10_000, 100, 6000, 2000),
            30000 + 9000 + 37500 + 7500,
        ),
        (
            "anthropic",
            "claude-opus-4-1",
            tokens(2000, 100, 6000, 2000),
            30000 + 9000 + 37500 + 7500,
        ),
        ("google", "gemini-2.5-pro", tokens(200_000, 1000), 250_000 + 10_000),
        ("google", "gemini-2.5-pro", tokens(200_001, 1000), 500_003 + 15_000),
        ("google", "gemini-2.5-pro", tokens(200_000, 0, 100_000), 125_000 + 12_500),
        ("google", "gemini-2.5-pro", tokens(100_000, 0, 100_001), 250_000 + 25_001),
        ("perplexity", "sonar", tokens(100, 100), 12_000 + 200),
        ("openai", "text-embedding-3-small", tokens(1000, 1000), 20),
        ("openrouter", "openai/gpt-oss-20b:free", tokens(1000, 1000), 0),
    ],
)
def test_known_models_cost_what_their_price_lists_say(
    provider: str, model: str, usage: Usage, micros: int
) -> None:
    assert cost(provider, model, usage) == micros


def test_parts_of_a_micro_are_added_up_before_they_are_rounded() -> None:
    # 0.15 + 0.6 + 0.075: one micro, where rounding each part would make three.
    assert cost("openai", "gpt-4o-mini", tokens(2, 1, cache_read=1)) == 1


def test_a_price_follows_the_date() -> None:
    million = tokens(MTOK)
    assert cost("openai", "o3", million, now=datetime(2025, 6, 9, 23, 59, tzinfo=UTC)) == 10 * MTOK
    assert cost("openai", "o3", million, now=datetime(2025, 6, 10, tzinfo=UTC)) == 2 * MTOK


def test_a_price_follows_the_time_of_day_in_utc() -> None:
    million, day = tokens(MTOK), datetime(2026, 1, 15, tzinfo=UTC)
    beijing = timezone(timedelta(hours=8))
    for at, micros in [
        (day.replace(hour=0, minute=29), 135_000),
        (day.replace(hour=0, minute=30), 270_000),
        (day.replace(hour=16, minute=30), 135_000),
        (datetime(2026, 1, 16, 0, 30, tzinfo=beijing), 135_000),
        (datetime(2026, 1, 16, 0, 29, tzinfo=beijing), 270_000),
    ]:
        assert cost("deepseek", "deepseek-chat", million, now=at) == micros


OVERRIDE = PriceOverride(
    provider="openai",
    model="gpt-4o",
    input_micros_per_mtok=1_000_000,
    output_micros_per_mtok=2_000_000,
)


def test_an_override_wins_over_the_library() -> None:
    assert cost("openai", "gpt-4o", tokens(1000, 500), OVERRIDE) == 1000 + 1000
    assert cost("openai", "gpt-4o-mini", tokens(20), OVERRIDE) == 3


def test_an_override_prices_a_model_and_a_provider_that_the_library_does_not_know() -> None:
    row = PriceOverride(provider="in-house", model="x", input_micros_per_mtok=3, output_micros_per_mtok=0)
    assert cost("in-house", "x", tokens(MTOK, MTOK), row) == 3
    assert cost("in-house", "x", tokens(1), row) == 1
    assert cost("in-house", "y", tokens(1), row) is None


def test_an_override_without_cache_rates_bills_cached_tokens_as_input() -> None:
    assert cost("openai", "gpt-4o", tokens(1000, cache_read=400, cache_write=200), OVERRIDE) == 1000
    assert cost("openai", "gpt-4o", tokens(100, cache_read=400, cache_write=200), OVERRIDE) == 700


def test_an_override_with_cache_rates_of_its_own_uses_them_zero_included() -> None:
    row = PriceOverride(
        provider="openai",
        model="gpt-4o",
        input_micros_per_mtok=1_000_000,
        output_micros_per_mtok=0,
        cache_read_micros_per_mtok=0,
        cache_write_micros_per_mtok=2_000_000,
    )
    assert cost("openai", "gpt-4o", tokens(1000, 9, 400, 200), row) == 400 + 400


def test_overrides_that_change_take_effect_at_once() -> None:
    book, usage = PriceBook(), tokens(1000)
    assert cost("openai", "gpt-4o", usage, book=book) == 2500
    assert cost("openai", "gpt-4o", usage, OVERRIDE, book=book) == 1000
    assert cost("openai", "gpt-4o", usage, book=book) == 2500


def test_a_total_alone_has_no_price_not_even_by_an_override() -> None:
    only_total = Usage(total_tokens=1000)
    assert cost("openai", "gpt-4o", only_total) is None
    assert cost("openai", "gpt-4o", only_total, OVERRIDE) is None
    assert cost("openai", "gpt-4o", Usage(total_tokens=0)) == 0
    assert cost("openai", "gpt-4o", Usage(input_tokens=1000, total_tokens=5000)) == 2500


def test_the_total_is_the_provider_s_count_else_input_and_output() -> None:
    assert tokens(100, 20, cache_read=60).total == 120
    assert tokens(100, 20, cache_read=60, cache_write=50).total == 230
    assert Usage(input_tokens=100, output_tokens=20, total_tokens=150).total == 150
    assert Usage(input_tokens=100, total_tokens=0).total == 0


@pytest.mark.parametrize(
    "field",
    ["input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens", "total_tokens"],
)
def test_negative_tokens_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match="negative"):
        Usage(**{field: -1})


@pytest.mark.parametrize("field", ["input", "output", "cache_read", "cache_write"])
def test_negative_prices_are_refused(field: str) -> None:
    rates = {"input_micros_per_mtok": 1, "output_micros_per_mtok": 1}
    with pytest.raises(ValueError, match="negative"):
        PriceOverride(provider="p", model="m", **{**rates, f"{field}_micros_per_mtok": -1})


@pytest.mark.parametrize(
    ("provider", "model"),
    [
        ("openai", "no-such-model"),
        ("openai", ""),
        ("", "gpt-4o"),
        ("", ""),
        ("in-house", "gpt-4o"),
        ("litellm", "openai/gpt-4o"),
        ("openai", "gpt-4o\0"),
        ("openai", "gpt-4o" + "x" * MAX_MODEL_LENGTH),
        ("openai" * 100, "gpt-4o"),
        ("openai", "(a+)+$" * 40),
        ("openrouter", "\ud800\u0130\u0663-20\u0661\u06610101"),
    ],
)
def test_a_name_that_the_library_does_not_know_has_no_price(provider: str, model: str) -> None:
    assert cost(provider, model, tokens(1000)) is None


@given(provider=st.sampled_from(["openai", "azure", "openrouter", ""]) | st.text(), model=st.text())
@settings(deadline=None)
def test_no_name_makes_a_look_up_raise(provider: str, model: str) -> None:
    micros = cost(provider, model, tokens(1, 1, 1, 1), book=PriceBook())
    assert micros is None or micros >= 0


@pytest.mark.parametrize(
    ("provider", "model"),
    [
        ("openai", "gpt-4o"),
        ("anthropic", "claude-sonnet-4-5"),
        ("google", "gemini-2.5-flash"),
        ("gemini", "gemini-2.5-flash"),
        ("vertex", "claude-sonnet-4-5"),
        ("mistral", "mistral-large-latest"),
        ("groq", "llama-3.3-70b-versatile"),
        ("deepseek", "deepseek-chat"),
        ("xai", "grok-4"),
        ("x-ai", "grok-4"),
        ("together", "meta-llama/Llama-3.3-70B-Instruct-Turbo"),
        ("fireworks", "accounts/fireworks/models/deepseek-v4-flash"),
        ("cohere", "command-r-plus"),
        ("openrouter", "openai/gpt-4o"),
        ("perplexity", "sonar"),
        ("azure", "gpt-4o"),
        ("bedrock", "anthropic.claude-sonnet-4-5-20250929-v1:0"),
        ("moonshot", "kimi-k2-0905-preview"),
    ],
)
def test_the_usual_providers_and_model_names_have_a_price(provider: str, model: str) -> None:
    assert cost(provider, model, tokens(1000, 1000))


def test_the_cache_stays_within_its_bound_whatever_users_send() -> None:
    book = PriceBook(max_models=8)
    for n in range(100):
        assert cost("openai", f"made-up-{n}", tokens(1), book=book) is None
        assert cost("openai", "gpt-4o", tokens(1000), book=book) == 2500
        cost("openai", "x" * (MAX_MODEL_LENGTH + 1 + n), tokens(1), book=book)
    info = book._schedule.cache_info()
    assert info.currsize == 8
    assert info.misses == 101, "what is used stays, what is too long is never looked up"


def test_unknown_names_leave_nothing_behind_in_the_library() -> None:
    from genai_prices.data_snapshot import get_snapshot

    snapshot = get_snapshot()
    before = len(snapshot._lookup_cache) + len(snapshot._provider_misses)
    for n in range(10):
        cost(f"made-up-{n}", f"made-up-{n}", tokens(1), book=PriceBook())
    assert len(snapshot._lookup_cache) + len(snapshot._provider_misses) == before


def test_the_price_data_is_loaded_by_warm_and_not_by_the_import() -> None:
    code = (
        "import sys; from keyturn_server.prices import PriceBook\n"
        "assert 'genai_prices' not in sys.modules\n"
        "PriceBook.warm()\n"
        "assert 'genai_prices.data' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


# Against the library itself. Every model by the kind of its price, so that the rare kinds are drawn
# as often as the plain one.
Name = tuple[str, str]
NAMES: list[Name] = []
IN_OTHER_UNITS: list[Name] = []
KINDS: dict[str, list[Name]] = {}
STARTS = {0, 1, 1000}
MOMENTS = {NOON, datetime(2023, 1, 1, tzinfo=UTC), datetime(2030, 1, 1, tzinfo=UTC)}


def _name_it(model: ModelInfo) -> str:
    """A name by which the model is found: its id is not one everywhere (Fireworks, Bedrock)."""
    clauses: list[Any] = [model.match]
    for clause in clauses:
        clauses.extend(getattr(clause, "or_", ()))
    texts = (text for clause in clauses for text in vars(clause).values() if isinstance(text, str))
    return next(text for text in (model.id, *texts) if model.is_match(text))


def _sort_in(name: Name, price: ModelPrice) -> None:
    kinds = {"untiered"}
    for key, value in vars(price).items():
        if isinstance(value, TieredPrices):
            kinds = {"tiered"}
            STARTS.update(tier.start for tier in value.tiers)
        elif key == "requests_kcount":
            kinds.add(key)
    if price.input_mtok is None or price.output_mtok is None:
        kinds = {"partly priced"}
    for kind in kinds:
        KINDS.setdefault(kind, []).append(name)


def _is_in_other_units(model: ModelInfo) -> bool:
    prices = [model.prices] if isinstance(model.prices, ModelPrice) else [one.prices for one in model.prices]
    units = {key for price in prices for key, value in vars(price).items() if value is not None}
    return bool(units) and not any(unit.endswith(("put_mtok", "requests_kcount")) for unit in units)


for _provider in library:
    for _model in _provider.models:
        _name = (_provider.id, _name_it(_model))
        if _is_in_other_units(_model):
            IN_OTHER_UNITS.append(_name)
            continue
        NAMES.append(_name)
        if isinstance(_model.prices, ModelPrice):
            _sort_in(_name, _model.prices)
            continue
        for _price in _model.prices:
            _sort_in(_name, _price.prices)
            if isinstance(_price.constraint, StartDateConstraint):
                KINDS.setdefault("dated", []).append(_name)
                MOMENTS.add(datetime.combine(_price.constraint.start_date, time(0), UTC))
            elif isinstance(_price.constraint, TimeOfDateConstraint):
                KINDS.setdefault("by the hour", []).append(_name)
                for _edge in (_price.constraint.start_time, _price.constraint.end_time):
                    MOMENTS.add(datetime.combine(NOON.date(), _edge.replace(tzinfo=None), UTC))

names = st.one_of([st.sampled_from(KINDS[kind]) for kind in sorted(KINDS)])
moments = st.builds(
    lambda at, seconds, hours: (at + timedelta(seconds=seconds)).astimezone(timezone(timedelta(hours=hours))),
    st.sampled_from(sorted(MOMENTS)),
    st.sampled_from([-1, 0, 1, 86_400]),
    st.integers(-12, 14),
)
counts = st.one_of(
    st.integers(0, 1_000_000_000),
    st.integers(0, 5000),
    st.builds(lambda start, by: max(0, start + by), st.sampled_from(sorted(STARTS)), st.integers(-1, 1)),
)


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    """Cached tokens within the input, or besides it: both near the thresholds of tiers."""
    all_input = draw(counts)
    read = draw(st.integers(0, all_input) | st.just(0))
    write = draw(st.integers(0, all_input - read) | st.just(0))
    uncached = all_input - read - write
    besides = draw(st.booleans()) and read + write > uncached
    return tokens(uncached if besides else all_input, draw(counts), read, write)


def library_cost(name: Name, usage: Usage, now: datetime) -> int | None:
    reported = genai_prices.Usage(
        input_tokens=usage.all_input,
        output_tokens=usage.output_tokens,
        cache_read_tokens=usage.cache_read_tokens,
        cache_write_tokens=usage.cache_write_tokens,
    )
    provider, model = name
    with localcontext(prec=100):
        try:
            price = genai_prices.calc_price(
                reported, model, provider_id=provider, genai_request_timestamp=now
            )
        except LookupError:
            return None
        micros: Decimal = price.total_price * 1_000_000
        return int(micros.to_integral_value(ROUND_CEILING))


def test_the_library_s_data_has_every_kind_of_price() -> None:
    assert set(KINDS) == {*("untiered", "tiered", "dated", "by the hour", "requests_kcount", "partly priced")}


@given(name=names, usage=usages(), now=moments)
@settings(max_examples=1000, deadline=None)
def test_any_usage_at_any_time_costs_what_the_library_says_rounded_up(
    name: Name, usage: Usage, now: datetime
) -> None:
    assert cost(*name, usage, now=now) == library_cost(name, usage, now)


def test_a_model_priced_in_seconds_or_pages_has_no_price_by_tokens() -> None:
    assert ("openai", "whisper-1") in IN_OTHER_UNITS
    assert [name for name in IN_OTHER_UNITS if cost(*name, tokens(1000, 100)) is not None] == []


def test_every_model_costs_what_the_library_says_rounded_up() -> None:
    usage = tokens(300_001, 7001, 40_003, 1009)
    for name in NAMES:
        micros = cost(*name, usage)
        assert micros is not None, name
        assert micros == library_cost(name, usage, NOON), name
