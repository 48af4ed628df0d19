package dev.keyturn.client;

/** The sidecar is overloaded, or the message is too large. */
public final class ResourceExhaustedException extends KeyturnException {
  private static final long serialVersionUID = 1L;

  ResourceExhaustedException(Fault fault) {
    super(fault);
  }
}
