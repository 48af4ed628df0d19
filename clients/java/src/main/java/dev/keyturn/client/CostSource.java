package dev.keyturn.client;

/**
 * Where a charge comes from.
 *
 * <p>{@code UNRECOGNIZED} stands for every word that only a newer sidecar knows.
 */
public enum CostSource {
  UNSPECIFIED,
  REPORTED,
  PRICED,
  ESTIMATED,
  NONE,
  UNRECOGNIZED
}
