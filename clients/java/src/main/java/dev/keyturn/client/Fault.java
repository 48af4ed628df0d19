package dev.keyturn.client;

import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.ResourceInfo;
import com.google.rpc.RetryInfo;
import io.grpc.Metadata;
import io.grpc.Status;
import java.io.IOException;
import java.io.Serializable;
import java.net.ConnectException;
import java.time.DateTimeException;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import javax.net.ssl.SSLException;

/** What is known of a fault, and the exception that says so. */
record Fault(
    Status.Code code,
    String message,
    String reason,
    List<FieldViolation> fieldViolations,
    Duration retryAfter,
    Resource resource,
    Map<String, String> metadata)
    implements Serializable {

  private static final Metadata.Key<byte[]> DETAILS =
      Metadata.Key.of("grpc-status-details-bin", Metadata.BINARY_BYTE_MARSHALLER);

  static Fault of(Status.Code code, String message) {
    return new Fault(code, message, "", List.of(), null, null, Map.of());
  }

  /** The fault of a call that ended with {@code status}, and that nobody here cancelled. */
  static Fault of(Status status, Metadata trailers) {
    List<Any> details = details(trailers);
    return of(code(status, details), describe(status)).withDetails(details);
  }

  /** The fault of one item of a batch. */
  static Fault of(dev.keyturn.v1.Status status) {
    return of(Status.fromCodeValue(status.getCode()).getCode(), status.getMessage())
        .withDetails(status.getDetailsList());
  }

  /** Whether nobody there said so: neither a sidecar, nor the one behind it. */
  boolean fromTransport() {
    return reason.isEmpty()
        && (code == Status.Code.UNAVAILABLE || code == Status.Code.DEADLINE_EXCEEDED);
  }

  String text() {
    StringBuilder text = new StringBuilder(code.name());
    if (!reason.isEmpty()) {
      text.append(" (").append(reason).append(')');
    }
    text.append(": ").append(message);
    String separator = " [";
    for (FieldViolation each : fieldViolations) {
      text.append(separator).append(each.field()).append(": ").append(each.description());
      separator = "; ";
    }
    return fieldViolations.isEmpty() ? text.toString() : text.append(']').toString();
  }

  KeyturnException exception() {
    return switch (code) {
      case INVALID_ARGUMENT -> new InvalidArgumentException(this);
      case UNAUTHENTICATED -> new UnauthenticatedException(this);
      case PERMISSION_DENIED -> new PermissionDeniedException(this);
      case NOT_FOUND -> new NotFoundException(this);
      case ALREADY_EXISTS -> new AlreadyExistsException(this);
      case FAILED_PRECONDITION -> new FailedPreconditionException(this);
      case RESOURCE_EXHAUSTED -> new ResourceExhaustedException(this);
      case UNAVAILABLE -> new UnavailableException(this);
      case DEADLINE_EXCEEDED -> new DeadlineExceededException(this);
      case INTERNAL, UNKNOWN, DATA_LOSS -> new InternalErrorException(this);
      default -> new KeyturnException(this);
    };
  }

  // Details are an extra: garbled ones must never mask the status itself.
  private static List<Any> details(Metadata trailers) {
    try {
      byte[] packed = trailers.get(DETAILS);
      return packed == null ? List.of() : com.google.rpc.Status.parseFrom(packed).getDetailsList();
    } catch (InvalidProtocolBufferException | IllegalArgumentException garbled) {
      return List.of();
    }
  }

  // A status from afar has no cause. One that a broken connection caused is UNAVAILABLE, also where
  // the library says UNKNOWN ("channel closed"). So is CANCELLED from afar without details: it is
  // what gRPC's core makes of calls that a server which ends has not looked at yet
  // (github.com/grpc/grpc/issues/41785).
  private static Status.Code code(Status status, List<Any> details) {
    boolean dropped =
        status.getCode() == Status.Code.CANCELLED && status.getCause() == null && details.isEmpty();
    boolean broken =
        status.getCode() == Status.Code.UNKNOWN || status.getCode() == Status.Code.INTERNAL;
    return dropped || broken && status.getCause() instanceof IOException
        ? Status.Code.UNAVAILABLE
        : status.getCode();
  }

  // Of what is behind a status only what says why there is no connection: no exception of the
  // library's is kept.
  private static String describe(Status status) {
    String said = status.getDescription() != null ? status.getDescription() : "";
    Throwable cause = status.getCause();
    if (status.getCode() == Status.Code.UNAVAILABLE
        && (cause instanceof ConnectException || cause instanceof SSLException)) {
      return said.isEmpty() ? cause.getMessage() : said + ": " + cause.getMessage();
    }
    return said;
  }

  private Fault withDetails(List<Any> details) {
    Fault fault = this;
    for (Any packed : details) {
      try {
        fault = fault.withDetail(packed);
      } catch (InvalidProtocolBufferException | DateTimeException | ArithmeticException garbled) {
        continue; // the others may be whole
      }
    }
    return fault;
  }

  private Fault withDetail(Any packed) throws InvalidProtocolBufferException {
    if (packed.is(ErrorInfo.class)) {
      ErrorInfo info = packed.unpack(ErrorInfo.class);
      return new Fault(
          code,
          message,
          info.getReason(),
          fieldViolations,
          retryAfter,
          resource,
          Map.copyOf(info.getMetadataMap()));
    }
    if (packed.is(BadRequest.class)) {
      List<FieldViolation> violations =
          packed.unpack(BadRequest.class).getFieldViolationsList().stream()
              .map(each -> new FieldViolation(each.getField(), each.getDescription()))
              .toList();
      return new Fault(code, message, reason, violations, retryAfter, resource, metadata);
    }
    if (packed.is(RetryInfo.class)) {
      Duration asked = Wire.duration(packed.unpack(RetryInfo.class).getRetryDelay());
      Duration wait = asked.isNegative() ? Duration.ZERO : asked;
      return new Fault(code, message, reason, fieldViolations, wait, resource, metadata);
    }
    if (packed.is(ResourceInfo.class)) {
      ResourceInfo found = packed.unpack(ResourceInfo.class);
      Resource missing =
          new Resource(found.getResourceType(), found.getResourceName(), found.getDescription());
      return new Fault(code, message, reason, fieldViolations, retryAfter, missing, metadata);
    }
    return this;
  }
}
