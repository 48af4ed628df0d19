package dev.keyturn.client;

/** No token or certificate, or one that the sidecar does not know. */
public final class UnauthenticatedException extends KeyturnException {
  private static final long serialVersionUID = 1L;

  UnauthenticatedException(Fault fault) {
    super(fault);
  }
}
