package dev.keyturn.client;

/** A field is wrong, or a handle or ticket is garbled, truncated or foreign. */
public final class InvalidArgumentException extends KeyturnException {
  private static final long serialVersionUID = 1L;

  InvalidArgumentException(Fault fault) {
    super(fault);
  }
}
