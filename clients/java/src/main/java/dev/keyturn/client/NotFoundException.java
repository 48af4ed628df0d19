package dev.keyturn.client;

/** No such user, or a hold that was settled and forgotten long ago. */
public final class NotFoundException extends KeyturnException {
  private static final long serialVersionUID = 1L;

  NotFoundException(Fault fault) {
    super(fault);
  }
}
