package dev.keyturn.client;

/**
 * Which of the four configurations of the feature flags is in force.
 *
 * <p>{@code UNRECOGNIZED} stands for every word that only a newer sidecar knows.
 */
public enum Mode {
  UNSPECIFIED,
  INTERNAL_ONLY,
  BYOK_ONLY,
  CREDIT_FIRST,
  BYOK_FIRST,
  UNRECOGNIZED
}
