package dev.keyturn.client;

import java.time.Duration;
import java.util.Objects;

/**
 * How a request ended that did not succeed.
 *
 * @param outcome how it ended; not SUCCESS
 * @param httpStatus the provider's HTTP status, or null
 * @param errorMessage the provider's error text, or null; the sidecar strikes out keys
 * @param retryAfter how long the provider asked to wait, or null
 */
public record Failure(
    Outcome outcome, Integer httpStatus, String errorMessage, Duration retryAfter) {

  /** Refuses SUCCESS with an {@code IllegalArgumentException}. */
  public Failure {
    Objects.requireNonNull(outcome, "outcome");
    if (outcome == Outcome.SUCCESS) {
      throw new IllegalArgumentException("SUCCESS is no failure: say succeeded()");
    }
  }

  /** That outcome, and nothing else known. */
  public static Failure of(Outcome outcome) {
    return new Failure(outcome, null, null, null);
  }

  /** This, with that status. */
  public Failure httpStatus(int value) {
    return new Failure(outcome, value, errorMessage, retryAfter);
  }

  /** This, with that text. */
  public Failure errorMessage(String value) {
    return new Failure(outcome, httpStatus, value, retryAfter);
  }

  /** This, with that wait. */
  public Failure retryAfter(Duration value) {
    return new Failure(outcome, httpStatus, errorMessage, value);
  }

  /** Without the provider's text, which may quote a key. */
  @Override
  public String toString() {
    return "Failure[" + outcome + (httpStatus != null ? ", HTTP " + httpStatus : "") + "]";
  }
}
