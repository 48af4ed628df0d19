package dev.keyturn.client;

import java.util.concurrent.CancellationException;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ExecutionException;

/** A future whose cancellation is told to what works for it, once. */
final class Answer<T> extends CompletableFuture<T> {
  private final Runnable onCancel;

  Answer(Runnable onCancel) {
    this.onCancel = onCancel;
  }

  @Override
  public boolean cancel(boolean mayInterruptIfRunning) {
    if (completeExceptionally(new CancellationException("the caller cancelled the call"))) {
      onCancel.run();
      return true;
    }
    return isCancelled();
  }

  /**
   * Waits for what comes of {@code future}, and throws its error as one of this thread.
   *
   * @throws CancellationException when this thread is interrupted, or the future cancelled
   */
  static <T> T await(CompletableFuture<T> future) {
    try {
      try {
        return future.get();
      } catch (InterruptedException interrupted) {
        Thread.currentThread().interrupt();
        if (future.cancel(true)) {
          throw new CancellationException("the thread was interrupted during the call");
        }
        return future.join(); // it ended just before
      }
    } catch (ExecutionException | java.util.concurrent.CompletionException failed) {
      throw here(failed.getCause());
    }
  }

  /** {@code error}, which nobody else has, with the stack of this thread. */
  private static RuntimeException here(Throwable error) {
    if (error instanceof Error defect) {
      throw defect;
    }
    error.fillInStackTrace();
    return (RuntimeException) error;
  }
}
