package dev.keyturn.client;

/** Too late, redeemed already, or no longer usable. */
public final class FailedPreconditionException extends KeyturnException {
  private static final long serialVersionUID = 1L;

  FailedPreconditionException(Fault fault) {
    super(fault);
  }
}
