package dev.keyturn.client;

/** The same request id or record was seen before, with other contents. */
public final class AlreadyExistsException extends KeyturnException {
  private static final long serialVersionUID = 1L;

  AlreadyExistsException(Fault fault) {
    super(fault);
  }
}
