import type { Outcome } from "./words.js";

const BILLING = new Set([
  "insufficient_quota",
  "billing_hard_limit_reached",
  "billing_not_active",
  "billing_error",
]);

/**
 * What to record for a provider's HTTP status. `errorCode` is the `code`, else the `type`, of the
 * `error` object in the provider's answer.
 */
export function outcomeOf(status: number, errorCode?: string | null): Outcome {
  const client = status >= 400 && status <= 499;
  if (status >= 200 && status <= 299) {
    return "SUCCESS";
  }
  if (status === 402 || (client && errorCode === "billing_error")) {
    return "PROVIDER_BILLING";
  }
  if (status === 401 || status === 403) {
    return "AUTH_REJECTED";
  }
  if (status === 429) {
    return BILLING.has(errorCode ?? "") ? "PROVIDER_BILLING" : "RATE_LIMITED";
  }
  if (status === 408 || status === 504) {
    return "TIMEOUT";
  }
  return client ? "REFUSED" : "PROVIDER_ERROR";
}
