package dev.keyturn.client;

import com.google.protobuf.Timestamp;
import dev.keyturn.v1.BatchDecideRequest;
import dev.keyturn.v1.BatchDecideResponse;
import dev.keyturn.v1.BatchRecordRequest;
import dev.keyturn.v1.BatchRecordResponse;
import dev.keyturn.v1.DecideResponse;
import dev.keyturn.v1.ExplainRequest;
import dev.keyturn.v1.ExplainResponse;
import dev.keyturn.v1.KeyDelivery;
import dev.keyturn.v1.RecordResponse;
import dev.keyturn.v1.TokenEstimate;
import io.grpc.Status;
import java.time.Duration;
import java.time.Instant;
import java.util.ArrayList;
import java.util.List;

/** Values to messages and back. Limits are the sidecar's to check. */
final class Wire {
  /** Unicode code points of a provider's error text that are sent. */
  private static final int ERROR_TEXT = 500;

  private Wire() {}

  static dev.keyturn.v1.DecideRequest decideRequest(DecideRequest asked) {
    dev.keyturn.v1.DecideRequest.Builder request =
        dev.keyturn.v1.DecideRequest.newBuilder()
            .setRequestId(asked.requestId() != null ? asked.requestId() : "")
            .setUserId(asked.userId())
            .setProvider(asked.provider())
            .setModel(asked.model())
            .setServiceType(asked.serviceType())
            .setConstraint(
                switch (asked.constraint()) {
                  case ANY -> dev.keyturn.v1.Constraint.CONSTRAINT_ANY;
                  case OWN_KEY_ONLY -> dev.keyturn.v1.Constraint.CONSTRAINT_OWN_KEY_ONLY;
                  case CREDITS_ONLY -> dev.keyturn.v1.Constraint.CONSTRAINT_CREDITS_ONLY;
                })
            .setKeyDelivery(
                asked.redeem() ? KeyDelivery.KEY_DELIVERY_REDEEM : KeyDelivery.KEY_DELIVERY_INLINE);
    asked.failedKeys().forEach(handle -> request.addFailedKeyHandles(handle.text()));
    if (asked.costMicros() != null) {
      request.setCostMicros(asked.costMicros());
    }
    if (asked.inputTokens() != null || asked.maxOutputTokens() != null) {
      request.setTokens(
          TokenEstimate.newBuilder()
              .setInputTokens(orZero(asked.inputTokens()))
              .setMaxOutputTokens(orZero(asked.maxOutputTokens())));
    }
    if (asked.holdTtl() != null) {
      request.setHoldTtl(duration(asked.holdTtl()));
    }
    return request.build();
  }

  static ExplainRequest explainRequest(DecideRequest asked) {
    return ExplainRequest.newBuilder().setDecide(decideRequest(asked)).build();
  }

  static BatchDecideRequest decideRequests(List<KeyturnClient.Asked> asked) {
    BatchDecideRequest.Builder batch = BatchDecideRequest.newBuilder();
    asked.forEach(each -> batch.addRequests(decideRequest(each.request())));
    return batch.build();
  }

  static dev.keyturn.v1.RecordRequest recordRequest(RecordRequest record) {
    dev.keyturn.v1.RecordRequest.Builder request =
        dev.keyturn.v1.RecordRequest.newBuilder().setOutcomeValue(record.outcomeNumber());
    if (record.settles() instanceof SealedHandle handle) {
      request.setKeyHandle(handle.text());
    } else if (record.settles() instanceof SealedTicket ticket) {
      request.setCreditTicket(ticket.text());
    }
    if (record.usage() != null) {
      request.setUsage(usage(record.usage()));
    }
    if (record.costMicros() != null) {
      request.setCostMicros(record.costMicros());
    }
    if (record.model() != null) {
      request.setModel(record.model());
    }
    if (record.endpoint() != null) {
      request.setEndpoint(record.endpoint());
    }
    if (record.responseTime() != null) {
      request.setResponseTime(duration(record.responseTime()));
    }
    if (record.httpStatus() != null) {
      request.setHttpStatus(record.httpStatus());
    }
    if (record.errorMessage() != null) {
      request.setErrorMessage(Texts.atMost(ERROR_TEXT, record.errorMessage()));
    }
    if (record.retryAfter() != null) {
      request.setRetryAfter(duration(record.retryAfter()));
    }
    return request.build();
  }

  static BatchRecordRequest recordRequests(List<dev.keyturn.v1.RecordRequest> records) {
    return BatchRecordRequest.newBuilder().addAllRequests(records).build();
  }

  static Decision decision(DecideResponse response) {
    return new Decision(
        response.getDecisionId(),
        word(Mode.values(), response.getModeValue()),
        word(Reason.values(), response.getReasonValue()),
        response.getMessage(),
        response.getDegraded(),
        response.getReplayed(),
        false,
        response.hasKey() ? key(response.getKey()) : null,
        response.hasTicket() ? ticket(response.getTicket()) : null,
        response.hasDenial() ? denial(response.getDenial()) : null);
  }

  static Recorded recorded(RecordResponse response) {
    return new Recorded(
        response.getRecordId(),
        response.getChargedMicros(),
        response.getReleasedMicros(),
        response.hasBalanceMicros() ? response.getBalanceMicros() : null,
        word(CostSource.values(), response.getCostSourceValue()),
        response.getReplayed(),
        word(Durability.values(), response.getDurabilityValue()),
        word(KeyState.values(), response.getKeyStateValue()));
  }

  static Explanation explanation(ExplainResponse response) {
    return new Explanation(
        decision(response.getDecision()),
        response.getStepsList().stream()
            .map(step -> new ExplainStep(step.getCheck(), step.getResult(), step.getDetail()))
            .toList());
  }

  /** An answer or an error for each of {@code asked} items, in order. */
  static List<Result<Decision>> results(BatchDecideResponse response, int asked) {
    complete(response.getResultsCount(), asked);
    List<Result<Decision>> results = new ArrayList<>(asked);
    response
        .getResultsList()
        .forEach(
            each ->
                results.add(
                    each.hasStatus()
                        ? Result.failed(Fault.of(each.getStatus()).exception())
                        : Result.of(decision(each.getResponse()))));
    return List.copyOf(results);
  }

  /** An answer or an error for each of {@code asked} items, in order. */
  static List<Result<Recorded>> results(BatchRecordResponse response, int asked) {
    complete(response.getResultsCount(), asked);
    List<Result<Recorded>> results = new ArrayList<>(asked);
    response
        .getResultsList()
        .forEach(
            each ->
                results.add(
                    each.hasStatus()
                        ? Result.failed(Fault.of(each.getStatus()).exception())
                        : Result.of(recorded(each.getResponse()))));
    return List.copyOf(results);
  }

  // SUCCESS is 1, and the others follow in the order of the contract.
  static int number(Outcome outcome) {
    return outcome.ordinal() + 1;
  }

  static Outcome outcome(int number) {
    Outcome[] words = Outcome.values();
    return number >= 1 && number <= words.length ? words[number - 1] : Outcome.UNKNOWN;
  }

  static Duration duration(com.google.protobuf.Duration span) {
    return Duration.ofSeconds(span.getSeconds(), span.getNanos());
  }

  private static com.google.protobuf.Duration duration(Duration span) {
    com.google.protobuf.Duration.Builder duration = com.google.protobuf.Duration.newBuilder();
    // Seconds and nanos have the same sign there; here nanos are never below zero.
    boolean borrow = span.isNegative() && span.getNano() > 0;
    return duration
        .setSeconds(borrow ? span.getSeconds() + 1 : span.getSeconds())
        .setNanos(borrow ? span.getNano() - 1_000_000_000 : span.getNano())
        .build();
  }

  private static KeyHandle key(dev.keyturn.v1.KeyHandle key) {
    return new KeyHandle(
        key.getHandle().isEmpty() ? null : SealedHandle.of(key.getHandle()),
        key.getKeyId(),
        key.getProvider(),
        key.getHint(),
        key.getSecret().isEmpty() ? null : Secret.of(key.getSecret()),
        key.getAuth().getHeader(),
        key.getAuth().getPrefix(),
        key.getBaseUrl(),
        key.hasExpireTime() ? time(key.getExpireTime()) : null);
  }

  private static CreditTicket ticket(dev.keyturn.v1.CreditTicket ticket) {
    return new CreditTicket(
        ticket.getTicket().isEmpty() ? null : SealedTicket.of(ticket.getTicket()),
        ticket.getHoldMicros(),
        ticket.getAvailableMicros(),
        ticket.hasExpireTime() ? time(ticket.getExpireTime()) : null);
  }

  private static Denial denial(dev.keyturn.v1.Denial denial) {
    return new Denial(
        word(DenialReason.values(), denial.getReasonValue()),
        denial.getRetryable(),
        denial.hasRetryAfter() ? duration(denial.getRetryAfter()) : null,
        denial.getSuggestion());
  }

  private static dev.keyturn.v1.Usage usage(Usage usage) {
    dev.keyturn.v1.Usage.Builder message =
        dev.keyturn.v1.Usage.newBuilder()
            .setInputTokens(orZero(usage.inputTokens()))
            .setOutputTokens(orZero(usage.outputTokens()))
            .setCacheReadTokens(orZero(usage.cacheReadTokens()))
            .setCacheWriteTokens(orZero(usage.cacheWriteTokens()));
    if (usage.totalTokens() != null) {
      message.setTotalTokens(usage.totalTokens());
    }
    return message.build();
  }

  // The words of answers stand in the order of their numbers, UNRECOGNIZED last; a test holds them
  // to the contract.
  private static <E> E word(E[] words, int number) {
    boolean known = number >= 0 && number < words.length;
    return known ? words[number] : words[words.length - 1];
  }

  private static Instant time(Timestamp stamp) {
    return Instant.ofEpochSecond(stamp.getSeconds(), stamp.getNanos());
  }

  private static long orZero(Long count) {
    return count != null ? count : 0;
  }

  private static void complete(int answered, int asked) {
    if (answered != asked) {
      String message = "The answer has " + answered + " results for " + asked + " items.";
      throw Fault.of(Status.Code.INTERNAL, message).exception();
    }
  }
}
