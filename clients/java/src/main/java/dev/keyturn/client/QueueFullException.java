package dev.keyturn.client;

/** The queue of the background is full; the record is still the caller's. */
public final class QueueFullException extends RuntimeException {
  private static final long serialVersionUID = 1L;

  QueueFullException(int size) {
    super("the queue holds " + size + " records and is full");
  }
}
