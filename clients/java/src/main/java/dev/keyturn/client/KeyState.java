package dev.keyturn.client;

/**
 * Whether a stored key can be used, and if not, why.
 *
 * <p>{@code UNRECOGNIZED} stands for every word that only a newer sidecar knows.
 */
public enum KeyState {
  UNSPECIFIED,
  USABLE,
  UNVERIFIED,
  INACTIVE,
  INVALID,
  COOLING_DOWN,
  UNREADABLE,
  DELETED,
  UNRECOGNIZED
}
