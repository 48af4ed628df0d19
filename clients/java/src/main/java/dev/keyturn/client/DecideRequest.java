package dev.keyturn.client;

import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.Objects;

/** One request that a gateway is about to make for a user. What is null was not given. */
public final class DecideRequest {
  private final Builder given;

  private DecideRequest(Builder given) {
    this.given = given;
  }

  /**
   * A request of {@code userId} to {@code provider}, an id in {@code api_providers}, e.g. {@code
   * openai}.
   */
  public static Builder builder(String userId, String provider) {
    return new Builder(userId, provider);
  }

  /** The user who makes the request. */
  public String userId() {
    return given.userId;
  }

  /** The provider it goes to. */
  public String provider() {
    return given.provider;
  }

  /** The provider's name of the model; prices the estimate. Empty when not given. */
  public String model() {
    return given.model;
  }

  /** A label for reports. Empty when not given. */
  public String serviceType() {
    return given.serviceType;
  }

  /** The caller's own id of the request. */
  public String requestId() {
    return given.requestId;
  }

  /** The estimate as a cost. */
  public Long costMicros() {
    return given.costMicros;
  }

  /** The estimate as tokens in. */
  public Long inputTokens() {
    return given.inputTokens;
  }

  /** The estimate as the most tokens out. */
  public Long maxOutputTokens() {
    return given.maxOutputTokens;
  }

  /** How the policy is tightened. */
  public Constraint constraint() {
    return given.constraint;
  }

  /** Keys of earlier decisions of this request that the provider refused. */
  public List<SealedHandle> failedKeys() {
    return List.copyOf(given.failedKeys);
  }

  /** Whether the secret is left to {@link KeyturnClient#redeem}. */
  public boolean redeem() {
    return given.redeem;
  }

  /** How long the hold or the handle lives. */
  public Duration holdTtl() {
    return given.holdTtl;
  }

  /** A builder that begins with what this request has. */
  public Builder toBuilder() {
    return new Builder(given);
  }

  @Override
  public String toString() {
    return "DecideRequest[" + given.userId + ", " + given.provider + ", " + given.model + "]";
  }

  /** Collects what a request has. */
  public static final class Builder {
    private final String userId;
    private final String provider;
    private String model = "";
    private String serviceType = "";
    private String requestId;
    private Long costMicros;
    private Long inputTokens;
    private Long maxOutputTokens;
    private Constraint constraint = Constraint.ANY;
    private final List<SealedHandle> failedKeys = new ArrayList<>();
    private boolean redeem;
    private Duration holdTtl;

    private Builder(String userId, String provider) {
      this.userId = Objects.requireNonNull(userId, "userId");
      this.provider = Objects.requireNonNull(provider, "provider");
    }

    private Builder(Builder other) {
      this(other.userId, other.provider);
      model = other.model;
      serviceType = other.serviceType;
      requestId = other.requestId;
      costMicros = other.costMicros;
      inputTokens = other.inputTokens;
      maxOutputTokens = other.maxOutputTokens;
      constraint = other.constraint;
      failedKeys.addAll(other.failedKeys);
      redeem = other.redeem;
      holdTtl = other.holdTtl;
    }

    /** The provider's name of the model; prices the estimate. */
    public Builder model(String value) {
      model = Objects.requireNonNull(value, "model");
      return this;
    }

    /** A label for reports, e.g. {@code copilot}. */
    public Builder serviceType(String value) {
      serviceType = Objects.requireNonNull(value, "serviceType");
      return this;
    }

    /**
     * The gateway's own id of the request: the same id by the same user never places a second hold.
     * Not given, null or empty: each call makes a new one.
     */
    public Builder requestId(String value) {
      requestId = value == null || value.isEmpty() ? null : value;
      return this;
    }

    /** The estimate as a cost. With neither a cost nor tokens: the sidecar's default hold. */
    public Builder costMicros(long value) {
      costMicros = value;
      return this;
    }

    /** The estimate as tokens in, priced by {@code model}. */
    public Builder inputTokens(long value) {
      inputTokens = value;
      return this;
    }

    /** The estimate as the most tokens out, priced by {@code model}. */
    public Builder maxOutputTokens(long value) {
      maxOutputTokens = value;
      return this;
    }

    /** Tightens the policy for this request. */
    public Builder constraint(Constraint value) {
      constraint = Objects.requireNonNull(value, "constraint");
      return this;
    }

    /** A key of an earlier decision of this request that the provider refused: it is left out. */
    public Builder failedKey(SealedHandle value) {
      failedKeys.add(Objects.requireNonNull(value, "failedKey"));
      return this;
    }

    /** True: the answer has no secret; fetch it once with {@link KeyturnClient#redeem}. */
    public Builder redeem(boolean value) {
      redeem = value;
      return this;
    }

    /** How long the hold or the handle lives, 1 s to 24 h. Not given: the sidecar's 10 minutes. */
    public Builder holdTtl(Duration value) {
      holdTtl = value;
      return this;
    }

    /**
     * The request.
     *
     * @throws IllegalArgumentException when both a cost and tokens are given as the estimate
     */
    public DecideRequest build() {
      if (costMicros != null && (inputTokens != null || maxOutputTokens != null)) {
        throw new IllegalArgumentException(
            "estimate with costMicros or with tokens, not with both");
      }
      return new DecideRequest(new Builder(this));
    }
  }
}
