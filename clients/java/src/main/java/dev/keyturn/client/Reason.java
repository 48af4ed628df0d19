package dev.keyturn.client;

/**
 * Why the route of a decision was chosen.
 *
 * <p>{@code UNRECOGNIZED} stands for every word that only a newer sidecar knows.
 */
public enum Reason {
  UNSPECIFIED,
  BYOK_FIRST_OWN_KEY,
  BYOK_FIRST_NO_KEY,
  BYOK_FIRST_KEY_FAILED,
  CREDIT_FIRST_CREDITS,
  CREDIT_FIRST_EXHAUSTED,
  BYOK_ONLY_OWN_KEY,
  BYOK_DISABLED,
  TIER_NOT_ELIGIBLE,
  CALLER_CONSTRAINT,
  DENIED,
  UNRECOGNIZED
}
