package dev.keyturn.client;

import java.time.Duration;

/**
 * What else is known of a request. What is null was not given.
 *
 * @param model the model that answered
 * @param endpoint the provider's endpoint, e.g. {@code /v1/chat/completions}
 * @param responseTime how long the provider took
 * @param httpStatus the provider's HTTP status
 */
public record Note(String model, String endpoint, Duration responseTime, Integer httpStatus) {
  /** Nothing given. */
  public static final Note NONE = new Note(null, null, null, null);

  /** This, with that model. */
  public Note model(String value) {
    return new Note(value, endpoint, responseTime, httpStatus);
  }

  /** This, with that endpoint. */
  public Note endpoint(String value) {
    return new Note(model, value, responseTime, httpStatus);
  }

  /** This, with that time. */
  public Note responseTime(Duration value) {
    return new Note(model, endpoint, value, httpStatus);
  }

  /** This, with that status. */
  public Note httpStatus(int value) {
    return new Note(model, endpoint, responseTime, value);
  }

  /** This, with what {@code later} has in place of its own. */
  Note updatedBy(Note later) {
    return new Note(
        later.model != null ? later.model : model,
        later.endpoint != null ? later.endpoint : endpoint,
        later.responseTime != null ? later.responseTime : responseTime,
        later.httpStatus != null ? later.httpStatus : httpStatus);
  }
}
