package dev.keyturn.client;

import java.time.Duration;
import java.util.Objects;

/** What became of one request. What is null was not given. */
public final class RecordRequest {
  private final Builder given;

  private RecordRequest(Builder given) {
    this.given = given;
  }

  /**
   * A record with an outcome alone.
   *
   * @throws IllegalArgumentException for a decision that was denied or is unmetered: it has nothing
   *     to record
   */
  public static RecordRequest of(Settles settles, Outcome outcome) {
    return builder(settles, outcome).build();
  }

  /**
   * A record that says more than the outcome.
   *
   * @throws IllegalArgumentException as {@link #of}
   */
  public static Builder builder(Settles settles, Outcome outcome) {
    return new Builder(settles, Wire.number(outcome));
  }

  /**
   * A record with an outcome that this client has no word for: its number in the contract.
   *
   * @throws IllegalArgumentException as {@link #of}
   */
  public static Builder builder(Settles settles, int outcomeNumber) {
    return new Builder(settles, outcomeNumber);
  }

  /** The sealed text of what is settled: a {@link SealedHandle} or a {@link SealedTicket}. */
  public Settles settles() {
    return given.settles;
  }

  /** How the request ended; UNKNOWN for a number that this client has no word for. */
  public Outcome outcome() {
    return Wire.outcome(given.outcome);
  }

  /** The number of the outcome in the contract. */
  public int outcomeNumber() {
    return given.outcome;
  }

  /** Tokens used. */
  public Usage usage() {
    return given.usage;
  }

  /** What the request cost. */
  public Long costMicros() {
    return given.costMicros;
  }

  /** The model that answered. */
  public String model() {
    return given.model;
  }

  /** The provider's endpoint. */
  public String endpoint() {
    return given.endpoint;
  }

  /** How long the provider took. */
  public Duration responseTime() {
    return given.responseTime;
  }

  /** The provider's HTTP status. */
  public Integer httpStatus() {
    return given.httpStatus;
  }

  /** The provider's error text. */
  public String errorMessage() {
    return given.errorMessage;
  }

  /** How long the provider asked to wait. */
  public Duration retryAfter() {
    return given.retryAfter;
  }

  /** The outcome and the cut text of what is settled: not the provider's error text. */
  @Override
  public String toString() {
    return "RecordRequest[" + given.settles + ", " + outcome() + "]";
  }

  /** Collects what a record has. */
  public static final class Builder {
    private final Settles settles;
    private final int outcome;
    private Usage usage;
    private Long costMicros;
    private String model;
    private String endpoint;
    private Duration responseTime;
    private Integer httpStatus;
    private String errorMessage;
    private Duration retryAfter;

    private Builder(Settles settles, int outcome) {
      this.settles = sealed(settles);
      this.outcome = outcome;
    }

    private Builder(Builder other) {
      settles = other.settles;
      outcome = other.outcome;
      usage = other.usage;
      costMicros = other.costMicros;
      model = other.model;
      endpoint = other.endpoint;
      responseTime = other.responseTime;
      httpStatus = other.httpStatus;
      errorMessage = other.errorMessage;
      retryAfter = other.retryAfter;
    }

    /** Tokens used. Not given is not zero: it means that the caller does not know. */
    public Builder usage(Usage value) {
      usage = value;
      return this;
    }

    /** What the request cost, when the caller knows; wins over {@code usage}. */
    public Builder costMicros(long value) {
      costMicros = value;
      return this;
    }

    /** The model that answered, the endpoint, the response time and the HTTP status, if given. */
    public Builder note(Note note) {
      model = note.model() != null ? note.model() : model;
      endpoint = note.endpoint() != null ? note.endpoint() : endpoint;
      responseTime = note.responseTime() != null ? note.responseTime() : responseTime;
      httpStatus = note.httpStatus() != null ? note.httpStatus() : httpStatus;
      return this;
    }

    /**
     * The provider's error text; 500 characters of it are sent, and the sidecar strikes out keys.
     */
    public Builder errorMessage(String value) {
      errorMessage = value;
      return this;
    }

    /** How long the provider asked to wait. */
    public Builder retryAfter(Duration value) {
      retryAfter = value;
      return this;
    }

    /** The record. */
    public RecordRequest build() {
      return new RecordRequest(new Builder(this));
    }

    private static Settles sealed(Settles settles) {
      Settles sealed = Objects.requireNonNull(settles, "settles");
      if (sealed instanceof Decision decision) {
        sealed = decision.key() != null ? decision.key() : decision.ticket();
      }
      if (sealed instanceof KeyHandle key) {
        sealed = key.handle();
      } else if (sealed instanceof CreditTicket ticket) {
        sealed = ticket.ticket();
      }
      if (sealed == null) {
        throw new IllegalArgumentException(
            "nothing to record: the decision is denied, unmetered or of an explanation");
      }
      return sealed;
    }
  }
}
