package dev.keyturn.client;

/** The sidecar or its store is out of reach, after all retries that the deadline allowed. */
public class UnavailableException extends KeyturnException {
  private static final long serialVersionUID = 1L;

  UnavailableException(Fault fault) {
    super(fault);
  }
}
