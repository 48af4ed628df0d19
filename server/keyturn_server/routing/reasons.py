"""What the verdicts mean, in one plain sentence each, for logs, support and users."""

from __future__ import annotations

from keyturn_server.routing.model import DenialReason, Reason

SENTENCES: dict[Reason, str] = {
    Reason.BYOK_FIRST_OWN_KEY: "Own keys come first, and the user has a usable one.",
    Reason.BYOK_FIRST_NO_KEY: "Own keys come first, but the user has none for this provider: credits pay.",
    Reason.BYOK_FIRST_KEY_FAILED: (
        "Own keys come first, but none of the user's keys for this provider is usable: credits pay."
    ),
    Reason.CREDIT_FIRST_CREDITS: "Credits come first, and the balance covers the request.",
    Reason.CREDIT_FIRST_EXHAUSTED: (
        "Credits come first, but the balance does not cover the request: the user's own key pays."
    ),
    Reason.BYOK_ONLY_OWN_KEY: "Only own keys may pay, and the user has a usable one.",
    Reason.BYOK_DISABLED: "Own keys are switched off for everyone: credits pay.",
    Reason.TIER_NOT_ELIGIBLE: "The user's tier may not bring keys: credits pay.",
    Reason.CALLER_CONSTRAINT: "The caller ruled out the path that the policy would have tried first.",
}

DENIALS: dict[DenialReason, str] = {
    DenialReason.NO_KEY_AND_NO_CREDITS: (
        "The user has no usable key for this provider and not enough credits."
    ),
    DenialReason.BYOK_REQUIRED: "Only an own key may pay for this request, and there is none to use.",
    DenialReason.TIER_NOT_ELIGIBLE: "Only an own key may pay, and the user's tier may not bring one.",
    DenialReason.KEY_UNUSABLE: "None of the user's keys for this provider is usable.",
    DenialReason.INSUFFICIENT_CREDITS: "The balance does not cover the request.",
    DenialReason.HOLDS_IN_FLIGHT: "Requests still in flight hold the rest of the balance.",
    DenialReason.RATE_LIMITED: "The tier's rate limit on credits is reached.",
    DenialReason.PROVIDER_DISABLED: "The provider is switched off.",
    DenialReason.ENCRYPTION_NOT_CONFIGURED: (
        "Only an own key may pay, and this sidecar has no ENCRYPTION_KEY to open one with."
    ),
}

SUGGESTIONS: dict[DenialReason, str] = {
    DenialReason.NO_KEY_AND_NO_CREDITS: "Add a key for this provider, or buy credits.",
    DenialReason.BYOK_REQUIRED: (
        "Add a key for this provider, if own keys are switched on and the caller allows them."
    ),
    DenialReason.TIER_NOT_ELIGIBLE: "Upgrade to a tier that may bring keys.",
    DenialReason.KEY_UNUSABLE: "Test or replace the key for this provider.",
    DenialReason.INSUFFICIENT_CREDITS: "Buy credits.",
    DenialReason.HOLDS_IN_FLIGHT: "Wait for running requests to finish, then try again.",
    DenialReason.RATE_LIMITED: "Wait, then try again.",
    DenialReason.PROVIDER_DISABLED: "Use another provider.",
    DenialReason.ENCRYPTION_NOT_CONFIGURED: "An operator must set ENCRYPTION_KEY.",
}

RETRYABLE = frozenset({DenialReason.HOLDS_IN_FLIGHT, DenialReason.RATE_LIMITED})
"""Denials that time alone may lift; KEY_UNUSABLE joins them while a key cools down."""
