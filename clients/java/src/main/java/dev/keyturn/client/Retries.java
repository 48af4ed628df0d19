package dev.keyturn.client;

import java.time.Duration;

/**
 * Exponential backoff with full jitter, for UNAVAILABLE only, within the call's deadline.
 *
 * <p>Before attempt n+1 the client waits a random time up to {@code firstDelay * 2^(n-1)}, at most
 * {@code maxDelay}, on top of the time that the sidecar asked to wait. A wait that does not fit in
 * the deadline is not begun: the error is thrown at once.
 *
 * @param attempts how many at most; 1 never retries
 * @param firstDelay the longest wait before the second attempt
 * @param maxDelay the longest wait before any
 */
public record Retries(int attempts, Duration firstDelay, Duration maxDelay) {
  /** 5 attempts, from 100 ms to 1 s apart. */
  public static final Retries DEFAULT =
      new Retries(5, Duration.ofMillis(100), Duration.ofSeconds(1));

  /**
   * Checks its arguments.
   *
   * @throws IllegalArgumentException when {@code attempts} is below 1 or a delay is negative
   */
  public Retries {
    if (attempts < 1) {
      throw new IllegalArgumentException("attempts is at least 1");
    }
    if (firstDelay.isNegative() || maxDelay.isNegative()) {
      throw new IllegalArgumentException("a delay cannot be negative");
    }
  }

  /** That many attempts, with the usual delays. */
  public static Retries of(int attempts) {
    return new Retries(attempts, DEFAULT.firstDelay, DEFAULT.maxDelay);
  }
}
