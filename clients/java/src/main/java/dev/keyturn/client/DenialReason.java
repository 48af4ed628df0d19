package dev.keyturn.client;

/**
 * Why nobody's credential may pay.
 *
 * <p>{@code UNRECOGNIZED} stands for every word that only a newer sidecar knows.
 */
public enum DenialReason {
  UNSPECIFIED,
  NO_KEY_AND_NO_CREDITS,
  BYOK_REQUIRED,
  TIER_NOT_ELIGIBLE,
  KEY_UNUSABLE,
  INSUFFICIENT_CREDITS,
  HOLDS_IN_FLIGHT,
  RATE_LIMITED,
  PROVIDER_DISABLED,
  ENCRYPTION_NOT_CONFIGURED,
  UNRECOGNIZED
}
