package dev.keyturn.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertSame;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.protobuf.Any;
import com.google.protobuf.ByteString;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.ResourceInfo;
import io.grpc.Metadata;
import io.grpc.Status;
import java.io.ByteArrayInputStream;
import java.io.ByteArrayOutputStream;
import java.io.ObjectInputStream;
import java.io.ObjectOutputStream;
import java.time.Duration;
import java.util.Arrays;
import java.util.List;
import java.util.Map;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Test;

class ErrorsTest {
  private static final DecideRequest U1 = DecideRequest.builder("u1", "openai").build();
  private static final Metadata.Key<byte[]> DETAILS =
      Metadata.Key.of("grpc-status-details-bin", Metadata.BINARY_BYTE_MARSHALLER);

  private final ScriptedSidecar sidecar = ScriptedSidecar.onSocket();
  private final KeyturnClient client =
      KeyturnClient.create(sidecar.options().retries(Retries.of(1)).build());

  @AfterEach
  void close() {
    client.close();
    sidecar.close();
  }

  private KeyturnException failing(Status.Code code, Any... details) {
    sidecar.fails(1, () -> ScriptedSidecar.status(code, "It is so.", details));
    return assertThrows(KeyturnException.class, () -> client.decide(U1));
  }

  @Test
  void everyStatusHasItsKind() {
    Map<Status.Code, Class<?>> kinds =
        Map.ofEntries(
            Map.entry(Status.Code.INVALID_ARGUMENT, InvalidArgumentException.class),
            Map.entry(Status.Code.UNAUTHENTICATED, UnauthenticatedException.class),
            Map.entry(Status.Code.PERMISSION_DENIED, PermissionDeniedException.class),
            Map.entry(Status.Code.NOT_FOUND, NotFoundException.class),
            Map.entry(Status.Code.ALREADY_EXISTS, AlreadyExistsException.class),
            Map.entry(Status.Code.FAILED_PRECONDITION, FailedPreconditionException.class),
            Map.entry(Status.Code.RESOURCE_EXHAUSTED, ResourceExhaustedException.class),
            Map.entry(Status.Code.UNAVAILABLE, UnavailableException.class),
            Map.entry(Status.Code.DEADLINE_EXCEEDED, DeadlineExceededException.class),
            Map.entry(Status.Code.INTERNAL, InternalErrorException.class),
            Map.entry(Status.Code.UNKNOWN, InternalErrorException.class),
            Map.entry(Status.Code.DATA_LOSS, InternalErrorException.class));
    for (Status.Code code : Status.Code.values()) {
      if (code != Status.Code.OK) {
        KeyturnException error = failing(code, ScriptedSidecar.retryAfter(Duration.ZERO));
        assertSame(kinds.getOrDefault(code, KeyturnException.class), error.getClass());
        assertEquals(code, error.code());
        assertEquals(code + ": It is so.", error.getMessage());
      }
    }
  }

  @Test
  void everythingThatTheSidecarSaysIsThere() {
    KeyturnException error =
        failing(
            Status.Code.NOT_FOUND,
            Any.pack(
                ErrorInfo.newBuilder().setReason("USER_NOT_FOUND").putMetadata("a", "b").build()),
            Any.pack(
                BadRequest.newBuilder()
                    .addFieldViolations(
                        BadRequest.FieldViolation.newBuilder()
                            .setField("user_id")
                            .setDescription("Required."))
                    .addFieldViolations(
                        BadRequest.FieldViolation.newBuilder().setField("x").setDescription("y"))
                    .build()),
            ScriptedSidecar.retryAfter(Duration.ofMillis(1500)),
            Any.pack(
                ResourceInfo.newBuilder().setResourceType("user").setResourceName("u404").build()));

    assertEquals(
        "NOT_FOUND (USER_NOT_FOUND): It is so. [user_id: Required.; x: y]", error.getMessage());
    assertEquals("It is so.", error.message());
    assertEquals("USER_NOT_FOUND", error.reason());
    assertEquals(Map.of("a", "b"), error.metadata());
    assertEquals(
        List.of(new FieldViolation("user_id", "Required."), new FieldViolation("x", "y")),
        error.fieldViolations());
    assertEquals(Duration.ofMillis(1500), error.retryAfter());
    assertEquals(new Resource("user", "u404", ""), error.resource());
  }

  @Test
  void garbledDetailsDoNotMaskTheStatus() {
    Any garbled =
        Any.newBuilder()
            .setTypeUrl("type.googleapis.com/google.rpc.BadRequest")
            .setValue(ByteString.copyFromUtf8("\u0007garbled"))
            .build();
    KeyturnException error =
        failing(
            Status.Code.NOT_FOUND,
            garbled,
            Any.pack(ErrorInfo.newBuilder().setReason("USER_NOT_FOUND").build()));
    assertEquals("USER_NOT_FOUND", error.reason());
    assertEquals(List.of(), error.fieldViolations());

    Metadata trailers = new Metadata();
    trailers.put(DETAILS, new byte[] {1, 2, 3});
    sidecar.fails(1, () -> Status.NOT_FOUND.asRuntimeException(trailers));
    assertSame(
        NotFoundException.class,
        assertThrows(KeyturnException.class, () -> client.decide(U1)).getClass());
  }

  @Test
  void aWaitBelowZeroIsNone() {
    assertEquals(
        Duration.ZERO,
        failing(Status.Code.UNAVAILABLE, ScriptedSidecar.retryAfter(Duration.ofSeconds(-5)))
            .retryAfter());
  }

  @Test
  void anErrorHasNoCauseAndTheStackOfTheCaller() {
    KeyturnException error = failing(Status.Code.INTERNAL);
    assertNull(error.getCause());
    assertEquals(0, error.getSuppressed().length);
    assertTrue(
        Arrays.stream(error.getStackTrace())
            .anyMatch(frame -> frame.getClassName().equals(ErrorsTest.class.getName())));
  }

  @Test
  void anErrorSaysWhyThereIsNoConnection() {
    sidecar.stopListening();
    UnavailableException error = assertThrows(UnavailableException.class, () -> client.decide(U1));
    assertTrue(error.getMessage().startsWith("UNAVAILABLE: "), error::getMessage);
    assertFalse(error.message().isBlank());
    sidecar.listen();
  }

  @Test
  void aDenialStandsOutsideOfTheTree() {
    sidecar.answers(ScriptedSidecar.denial());
    DeniedException denied = assertThrows(DeniedException.class, () -> client.request(U1));
    assertFalse(KeyturnException.class.isAssignableFrom(DeniedException.class));
    assertEquals("INSUFFICIENT_CREDITS: Nobody pays.", denied.getMessage());
    assertEquals("d3", denied.decision().decisionId());
  }

  @Test
  void anErrorCanBeSerialized() throws Exception {
    KeyturnException error = failing(Status.Code.NOT_FOUND);
    ByteArrayOutputStream bytes = new ByteArrayOutputStream();
    try (ObjectOutputStream out = new ObjectOutputStream(bytes)) {
      out.writeObject(error);
    }
    try (ObjectInputStream in =
        new ObjectInputStream(new ByteArrayInputStream(bytes.toByteArray()))) {
      assertEquals(error.getMessage(), ((KeyturnException) in.readObject()).getMessage());
    }
  }
}
