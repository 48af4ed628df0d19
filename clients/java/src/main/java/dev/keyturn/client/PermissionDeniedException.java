package dev.keyturn.client;

/** The caller's role may not do this. */
public final class PermissionDeniedException extends KeyturnException {
  private static final long serialVersionUID = 1L;

  PermissionDeniedException(Fault fault) {
    super(fault);
  }
}
