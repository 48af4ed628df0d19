package dev.keyturn.client;

/** No answer in time. The call may have been carried out. */
public final class DeadlineExceededException extends UnavailableException {
  private static final long serialVersionUID = 1L;

  DeadlineExceededException(Fault fault) {
    super(fault);
  }
}
