package dev.keyturn.client;

/** Says whether a request may go ahead while the sidecar is out of reach. */
@FunctionalInterface
public interface WhenDown {
  /**
   * Whether {@code request} may go ahead all the same, on the platform's own credential and without
   * a record. What this throws is thrown to the caller.
   */
  boolean mayProceed(DecideRequest request, UnavailableException error);
}
