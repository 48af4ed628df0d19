"""What is recorded for a provider's HTTP answer: the table of clients/SPEC.md."""

from __future__ import annotations

import pytest

from keyturn import Outcome, outcome_of

BILLING = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "billing_error")


@pytest.mark.parametrize(
    ("statuses", "codes", "outcome"),
    [
        ((200, 201, 204, 299), (None, "insufficient_quota"), Outcome.SUCCESS),
        ((401, 403), (None, "", "invalid_api_key", "insufficient_quota"), Outcome.AUTH_REJECTED),
        ((402,), (None, "", "anything"), Outcome.PROVIDER_BILLING),
        ((429,), BILLING, Outcome.PROVIDER_BILLING),
        ((400, 401, 403, 404, 408, 422, 429, 499), ("billing_error",), Outcome.PROVIDER_BILLING),
        ((429,), (None, "", "rate_limit_exceeded", "tokens"), Outcome.RATE_LIMITED),
        ((408, 504), (None, "timeout"), Outcome.TIMEOUT),
        ((400, 404, 405, 409, 413, 422, 451, 499), (None, "insufficient_quota"), Outcome.REFUSED),
        ((500, 502, 503, 529, 599), (None, "billing_error"), Outcome.PROVIDER_ERROR),
        ((0, 100, 199, 301, 304, 399, 600, -1), (None,), Outcome.PROVIDER_ERROR),
    ],
)
def test_the_outcome_of_an_answer(
    statuses: tuple[int, ...], codes: tuple[str | None, ...], outcome: Outcome
) -> None:
    for status in statuses:
        for code in codes:
            assert outcome_of(status, code) is outcome, (status, code)
    if None in codes:
        assert {outcome_of(status) for status in statuses} == {outcome}
