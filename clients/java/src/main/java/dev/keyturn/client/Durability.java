package dev.keyturn.client;

/**
 * Where an acknowledged record is durable.
 *
 * <p>{@code UNRECOGNIZED} stands for every word that only a newer sidecar knows.
 */
public enum Durability {
  UNSPECIFIED,
  DATABASE,
  SPOOLED,
  UNRECOGNIZED
}
