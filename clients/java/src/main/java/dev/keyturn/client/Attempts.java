package dev.keyturn.client;

import io.grpc.Status;
import java.time.Duration;
import java.util.OptionalLong;
import java.util.concurrent.ThreadLocalRandom;
import java.util.function.LongSupplier;
import java.util.function.LongUnaryOperator;

/**
 * The attempts of one call: how long each may take, and whether there is another. In nanoseconds.
 */
final class Attempts {
  private static final long FOREVER = Long.MAX_VALUE / 4;

  private final Retries retries;
  private final LongSupplier clock;
  private final LongUnaryOperator jitter;
  private final long ends;
  private int made;

  Attempts(Retries retries, Duration timeout) {
    this(retries, timeout, System::nanoTime, Attempts::upTo);
  }

  /**
   * With a clock and a die of one's own.
   *
   * @param jitter a random number from 0 to its argument
   */
  Attempts(Retries retries, Duration timeout, LongSupplier clock, LongUnaryOperator jitter) {
    this.retries = retries;
    this.clock = clock;
    this.jitter = jitter;
    this.ends = clock.getAsLong() + nanos(timeout);
  }

  /** Until the deadline, for the attempt that begins now. */
  long left() {
    return ends - clock.getAsLong();
  }

  /**
   * How long to wait after that fault before the next attempt; empty: there is none.
   *
   * @param down the sidecar is known to be down, so that one attempt is all there is
   */
  OptionalLong waitAfter(Fault fault, boolean down) {
    made++;
    if (fault.code() != Status.Code.UNAVAILABLE || down || made >= retries.attempts()) {
      return OptionalLong.empty();
    }
    long asked = fault.retryAfter() != null ? nanos(fault.retryAfter()) : 0;
    long wait = asked + jitter.applyAsLong(backoff(retries, made));
    long left = left();
    if (wait < left) {
      return OptionalLong.of(wait);
    }
    // Jitter gives way to the deadline; what the sidecar asked for does not.
    return asked > 0 && asked < left ? OptionalLong.of(asked) : OptionalLong.empty();
  }

  /** The longest wait after that many attempts, before jitter. */
  static long backoff(Retries retries, int made) {
    long most = nanos(retries.maxDelay());
    long first = nanos(retries.firstDelay());
    int doublings = Math.min(made - 1, 40);
    return first > most >> doublings ? most : first << doublings;
  }

  static long upTo(long most) {
    return ThreadLocalRandom.current().nextLong(most + 1);
  }

  static long nanos(Duration span) {
    return span.getSeconds() >= FOREVER / 1_000_000_000 ? FOREVER : span.toNanos();
  }
}
