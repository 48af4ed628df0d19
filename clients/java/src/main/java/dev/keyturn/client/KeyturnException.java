package dev.keyturn.client;

import io.grpc.Status;
import java.time.Duration;
import java.util.List;
import java.util.Map;

/**
 * A fault: the sidecar did not answer, or refused the call.
 *
 * <pre>
 * KeyturnException
 * ├── InvalidArgumentException      a field is wrong, or a token is garbled
 * ├── UnauthenticatedException      no token or certificate, or one that the sidecar does not know
 * ├── PermissionDeniedException     the caller's role may not do this
 * ├── NotFoundException             no such user, or a hold settled and forgotten
 * ├── AlreadyExistsException        the same request or record was seen with other contents
 * ├── FailedPreconditionException   too late, redeemed already, no longer usable
 * ├── ResourceExhaustedException    the sidecar is overloaded, or the message too large
 * ├── UnavailableException          the sidecar or its store is out of reach
 * │   └── DeadlineExceededException no answer in time; the call may have been carried out
 * └── InternalErrorException        a defect of the sidecar
 *
 * DeniedException                   the policy said no. An answer, not a fault, so it stands outside
 * </pre>
 *
 * <p>A status without a class here (UNIMPLEMENTED, …) is a plain {@code KeyturnException}.
 * CANCELLED by the other side is an {@code UnavailableException}: a sidecar that ends drops so what
 * it has not looked at yet. It never holds the request, a token, a handle or a secret, and has no
 * cause.
 */
public class KeyturnException extends RuntimeException {
  private static final long serialVersionUID = 1L;

  private final Fault fault;

  KeyturnException(Fault fault) {
    super(fault.text());
    this.fault = fault;
  }

  /** The status of gRPC. */
  public Status.Code code() {
    return fault.code();
  }

  /** The stable name for programs, e.g. {@code STORE_UNAVAILABLE}; may be empty. */
  public String reason() {
    return fault.reason();
  }

  /** One plain sentence. {@link #getMessage()} says the code, the reason and the fields too. */
  public String message() {
    return fault.message();
  }

  /** The fields that the sidecar refused, and why. */
  public List<FieldViolation> fieldViolations() {
    return fault.fieldViolations();
  }

  /** How long the sidecar asks to wait, or null. */
  public Duration retryAfter() {
    return fault.retryAfter();
  }

  /** What was not found, or null. */
  public Resource resource() {
    return fault.resource();
  }

  /** What is known besides, e.g. an error id to quote to the operators. */
  public Map<String, String> metadata() {
    return fault.metadata();
  }
}
