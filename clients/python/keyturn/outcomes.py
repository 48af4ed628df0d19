"""What to record for a provider's HTTP answer."""

from __future__ import annotations

from keyturn.model import Outcome

_BILLING_CODES = {
    "insufficient_quota",
    "billing_hard_limit_reached",
    "billing_not_active",
    "billing_error",
}


def outcome_of(status: int, error_code: str | None = None) -> Outcome:
    """The outcome of a request that a provider answered with this HTTP status.

    `error_code` is the `code`, else the `type`, of the `error` object in the answer, if there is one: it
    tells a quota that ran out from a rate limit.
    """
    refused = 400 <= status < 500
    if 200 <= status < 300:
        return Outcome.SUCCESS
    if status == 402 or (status == 429 and error_code in _BILLING_CODES):
        return Outcome.PROVIDER_BILLING
    if refused and error_code == "billing_error":
        return Outcome.PROVIDER_BILLING
    if status in (401, 403):
        return Outcome.AUTH_REJECTED
    if status == 429:
        return Outcome.RATE_LIMITED
    if status in (408, 504):
        return Outcome.TIMEOUT
    return Outcome.REFUSED if refused else Outcome.PROVIDER_ERROR
