import assert from "node:assert/strict";
import { test } from "node:test";

import { outcomeOf } from "@keyturn/client";

test("an HTTP status has its outcome", () => {
  const outcomes: [number, string | null | undefined, string][] = [
    [200, undefined, "SUCCESS"],
    [299, null, "SUCCESS"],
    [401, "invalid_api_key", "AUTH_REJECTED"],
    [403, undefined, "AUTH_REJECTED"],
    [402, undefined, "PROVIDER_BILLING"],
    [429, "insufficient_quota", "PROVIDER_BILLING"],
    [429, "billing_hard_limit_reached", "PROVIDER_BILLING"],
    [429, "billing_not_active", "PROVIDER_BILLING"],
    [429, "billing_error", "PROVIDER_BILLING"],
    [400, "billing_error", "PROVIDER_BILLING"],
    [400, "insufficient_quota", "REFUSED"],
    [500, "billing_error", "PROVIDER_ERROR"],
    [429, "rate_limit_exceeded", "RATE_LIMITED"],
    [429, undefined, "RATE_LIMITED"],
    [408, undefined, "TIMEOUT"],
    [504, undefined, "TIMEOUT"],
    [404, undefined, "REFUSED"],
    [499, undefined, "REFUSED"],
    [500, undefined, "PROVIDER_ERROR"],
    [302, undefined, "PROVIDER_ERROR"],
    [0, undefined, "PROVIDER_ERROR"],
  ];
  for (const [status, code, outcome] of outcomes) {
    assert.equal(outcomeOf(status, code), outcome, `${status} ${code}`);
  }
});
