"""What a request costs, in micro-USD: `genai-prices`' figures to the last digit, rounded up once.

A token at X USD per million tokens costs X micro-USD, so a rate here is an exact integer: micros
per token, times the `scale` that makes the rates of its model whole. No float anywhere.
No I/O and no clock: `now` is an argument, and the prices are those of the installed release.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from math import lcm
from typing import TYPE_CHECKING, NamedTuple

from keyturn_server.values import value

if TYPE_CHECKING:
    from genai_prices.types import (
        ModelPrice,
        StartDateConstraint,
        TieredPrices,
        TimeOfDateConstraint,
    )

# The wire contract's limits. Longer names are no model's: they are neither matched nor remembered.
MAX_PROVIDER_LENGTH = 64
MAX_MODEL_LENGTH = 256


@value
class Usage:
    """Tokens of one request, each 0 or more (ValueError), as in `keyturn.v1.Usage`.

    `input_tokens` counts all input, cached included. Where the two cache counts come to more than
    that, the caller reported as Anthropic does, and they are taken as input besides it.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    total_tokens: int | None = None

    def __post_init__(self) -> None:
        cached = min(self.cache_read_tokens, self.cache_write_tokens)
        if min(self.input_tokens, self.output_tokens, cached, self.total_tokens or 0) < 0:
            raise ValueError("a token count is negative")

    @property
    def all_input(self) -> int:
        """Input tokens, cached ones included, however the caller counted them."""
        cached = self.cache_read_tokens + self.cache_write_tokens
        return self.input_tokens if cached <= self.input_tokens else self.input_tokens + cached

    @property
    def total(self) -> int:
        """All tokens: as the provider counted them, else input and output."""
        if self.total_tokens is not None:
            return self.total_tokens
        return self.all_input + self.output_tokens

    @property
    def total_only(self) -> bool:
        """Whether a total is all that is known, which has no price: input or output?"""
        return bool(self.total_tokens) and self.all_input + self.output_tokens == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceOverride:
    """An operator's price: a row of `model_prices`. Micro-USD per million tokens, 0 or more
    (ValueError); a cache rate of None is the input rate."""

    provider: str
    model: str
    input_micros_per_mtok: int
    output_micros_per_mtok: int
    cache_read_micros_per_mtok: int | None = None
    cache_write_micros_per_mtok: int | None = None

    def __post_init__(self) -> None:
        charged = min(self.input_micros_per_mtok, self.output_micros_per_mtok)
        cached = min(self.cache_read_micros_per_mtok or 0, self.cache_write_micros_per_mtok or 0)
        if min(charged, cached) < 0:
            raise ValueError("a price is negative")


class PriceBook:
    """Prices of at most `max_models` (provider, model) pairs at hand; the least used leave first.

    Names without a price are among them: names come from users, and a look-up takes up to 1 ms.
    The library matches names loosely (case, dates, aliases); an override matches exactly.
    """

    def __init__(self, *, max_models: int = 4096) -> None:
        # Not DataSnapshot.find_provider_model: its own caches keep every name ever asked for.
        self._schedule = lru_cache(maxsize=max_models)(_look_up)

    @staticmethod
    def warm() -> None:
        """Loads the price data, some 60 ms and 7 MB, which the first look-up does otherwise."""
        import genai_prices.data  # noqa: F401

    def cost_micros(
        self,
        provider: str,
        model: str,
        usage: Usage,
        *,
        now: datetime,
        overrides: Mapping[tuple[str, str], PriceOverride],
    ) -> int | None:
        """The cost in micro-USD, rounded up; 0 for a free model; `now` selects among dated prices.

        None: no price is known. The provider or its model isn't, or the usage is only a total. For
        an estimate, give the limit on output tokens as `output_tokens`. Raises nothing.
        """
        if not model or usage.total_only:
            return None
        all_input = usage.all_input
        row = overrides.get((provider, model))
        if row is not None:
            rates = _overriding(row)
        elif len(provider) > MAX_PROVIDER_LENGTH or len(model) > MAX_MODEL_LENGTH:
            return None
        elif schedule := self._schedule(provider, model):
            rates = _in_force(schedule, now, all_input)
        else:
            return None
        read, write = usage.cache_read_tokens, usage.cache_write_tokens
        scaled = (
            (all_input - read - write) * rates.uncached
            + read * rates.cache_read
            + write * rates.cache_write
            + usage.output_tokens * rates.output
            + rates.request
        )
        return -(-scaled // rates.scale)


class _Rates(NamedTuple):
    """What holds above so many input tokens: micros times `scale`, per token and per request."""

    above: int
    scale: int
    uncached: int
    cache_read: int
    cache_write: int
    output: int
    request: int


# A model's prices, the first active one holds (the last has no constraint); of each, its bands by
# input tokens, the highest first (the last is above -1).
_Schedule = tuple[tuple["StartDateConstraint | TimeOfDateConstraint | None", tuple[_Rates, ...]], ...]


_COUNTED = {"input_mtok", "output_mtok", "cache_read_mtok", "cache_write_mtok", "requests_kcount"}


def _overriding(row: PriceOverride) -> _Rates:
    uncached = row.input_micros_per_mtok
    read, write = row.cache_read_micros_per_mtok, row.cache_write_micros_per_mtok
    return _Rates(
        above=-1,
        scale=1_000_000,
        uncached=uncached,
        cache_read=uncached if read is None else read,
        cache_write=uncached if write is None else write,
        output=row.output_micros_per_mtok,
        request=0,
    )


def _in_force(schedule: _Schedule, now: datetime, all_input: int) -> _Rates:
    bands = next(bands for when, bands in schedule if when is None or when.active(now))
    return bands[0] if len(bands) == 1 else next(r for r in bands if all_input > r.above)


def _look_up(provider_id: str, model_name: str) -> _Schedule:
    """The library's prices for this provider's model; empty where it knows none.

    Never goes from the model's name to a provider: what a private one charges isn't known.
    """
    from genai_prices.data import providers
    from genai_prices.data_snapshot import find_provider_by_id
    from genai_prices.types import ModelPrice

    provider = find_provider_by_id(providers, provider_id)
    model = provider.find_model(model_name, all_providers=providers) if provider else None
    if model is None or not model.prices:
        return ()
    if isinstance(model.prices, ModelPrice):
        return ((None, _bands(model.prices)),) if _is_by_tokens(model.prices) else ()
    if not any(_is_by_tokens(price.prices) for price in model.prices):
        return ()
    first, *later = model.prices  # the last active one holds; where none is, the first
    dated = [(price.constraint, _bands(price.prices)) for price in reversed(later)]
    return (*dated, (None, _bands(first.prices)))


def _is_by_tokens(price: ModelPrice) -> bool:
    """False where a price is in other units alone (seconds, pages, characters), so that tokens say
    nothing of the cost. A price with no rates at all is that of a free model."""
    rates = {name for name, rate in vars(price).items() if rate is not None}
    return not rates or not rates.isdisjoint(_COUNTED)


def _bands(price: ModelPrice) -> tuple[_Rates, ...]:
    """As the library resolves the same usage: cached tokens without a rate of their own cost the
    input rate, whatever else lacks a rate is free, and units that `Usage` doesn't count (audio,
    images, searches) came to none."""
    uncached, read, write = price.input_mtok, price.cache_read_mtok, price.cache_write_mtok
    steps = (
        _steps(uncached),
        _steps(uncached if read is None else read),
        _steps(uncached if write is None else write),
        _steps(price.output_mtok),
        _steps(price.requests_kcount, micros=1000),  # USD per thousand, where tokens go by million
    )
    bands = [
        (above, [each[max(start for start in each if start <= above)] for each in steps])
        for above in sorted({start for each in steps for start in each}, reverse=True)
    ]
    scale = lcm(*(rate.denominator for _, rates in bands for rate in rates))
    return tuple(_Rates(above, scale, *(int(r * scale) for r in rates)) for above, rates in bands)


def _steps(price: Decimal | TieredPrices | None, micros: int = 1) -> dict[int, Fraction]:
    """Total of input tokens -> the rate for all tokens once it is exceeded; -1: from the start."""
    if price is None:
        return {-1: Fraction(0)}
    if isinstance(price, Decimal):
        return {-1: Fraction(price) * micros}
    tiers = {tier.start: Fraction(tier.price) * micros for tier in price.tiers}
    return {-1: Fraction(price.base) * micros, **tiers}
