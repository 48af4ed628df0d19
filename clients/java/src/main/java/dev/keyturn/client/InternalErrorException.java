package dev.keyturn.client;

/** A defect of the sidecar; {@link #metadata()} may hold its error id. */
public final class InternalErrorException extends KeyturnException {
  private static final long serialVersionUID = 1L;

  InternalErrorException(Fault fault) {
    super(fault);
  }
}
