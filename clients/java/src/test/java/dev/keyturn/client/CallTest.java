package dev.keyturn.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.grpc.Status;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CompletionException;
import java.util.function.Consumer;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Test;

class CallTest {
  private static final DecideRequest U1 = DecideRequest.builder("u1", "openai").build();
  private static final Map<String, String> PLATFORM = Map.of("Authorization", "Bearer platform");

  private final ScriptedSidecar sidecar = ScriptedSidecar.onSocket();
  private KeyturnClient client = sidecar.client();

  @AfterEach
  void close() {
    client.close();
    sidecar.close();
  }

  /** What is recorded of a call that was used so and then closed. */
  private dev.keyturn.v1.RecordRequest closedAfter(Consumer<Call> use) {
    try (Call call = client.request(U1)) {
      use.accept(call);
    }
    client.flush();
    List<dev.keyturn.v1.RecordRequest> records = sidecar.batched();
    return records.get(records.size() - 1);
  }

  private List<dev.keyturn.v1.RecordRequest> foreground() {
    return sidecar.asked(dev.keyturn.v1.RecordRequest.class);
  }

  @Test
  void whatIsRecordedByItsEnd() {
    Map<Consumer<Call>, Outcome> rows =
        Map.of(
            call -> {},
            Outcome.NEVER_SENT,
            call -> call.note(Note.NONE.model("m")),
            Outcome.NEVER_SENT,
            Call::sending,
            Outcome.CLIENT_CANCELLED,
            call -> call.headers(PLATFORM),
            Outcome.CLIENT_CANCELLED,
            Call::secret,
            Outcome.CLIENT_CANCELLED,
            call -> call.used(Usage.of(1, 2)),
            Outcome.CLIENT_CANCELLED,
            call -> call.cost(5),
            Outcome.CLIENT_CANCELLED,
            Call::succeeded,
            Outcome.SUCCESS,
            call -> call.failed(Outcome.TIMEOUT),
            Outcome.TIMEOUT,
            call -> {
              call.failed(Outcome.REFUSED);
              call.succeeded();
            },
            Outcome.REFUSED);
    rows.forEach(
        (use, outcome) -> assertEquals(Wire.number(outcome), closedAfter(use).getOutcomeValue()));
    assertEquals(List.of(), foreground());
  }

  @Test
  void anExceptionOfTheBlockEndsTheCallToo() {
    assertThrows(
        ArithmeticException.class,
        () -> closedAfter(call -> call.headers(Map.of("x", "" + 1 / (call.hashCode() * 0)))));
    client.flush();
    assertEquals(dev.keyturn.v1.Outcome.OUTCOME_NEVER_SENT, sidecar.batched().get(0).getOutcome());
  }

  @Test
  void whatWasNotedIsSent() {
    dev.keyturn.v1.RecordRequest record =
        closedAfter(
            call -> {
              call.used(Usage.NONE.inputTokens(1).outputTokens(2));
              call.used(Usage.NONE.outputTokens(20).cacheReadTokens(3));
              call.cost(70);
              call.note(new Note("m", "/e", Duration.ofSeconds(1), 200));
              call.note(Note.NONE.model("m2"));
              call.succeeded();
            });
    assertEquals(
        dev.keyturn.v1.RecordRequest.newBuilder()
            .setCreditTicket(ScriptedSidecar.TICKET)
            .setOutcome(dev.keyturn.v1.Outcome.OUTCOME_SUCCESS)
            .setUsage(
                dev.keyturn.v1.Usage.newBuilder()
                    .setInputTokens(1)
                    .setOutputTokens(20)
                    .setCacheReadTokens(3))
            .setCostMicros(70)
            .setModel("m2")
            .setEndpoint("/e")
            .setResponseTime(com.google.protobuf.Duration.newBuilder().setSeconds(1))
            .setHttpStatus(200)
            .build(),
        record);
  }

  @Test
  void usageThatWasNotGivenIsNotSent() {
    assertFalse(closedAfter(Call::succeeded).hasUsage());
  }

  @Test
  void headersAreTheOwnKeysOrThePlatforms() {
    sidecar.answers(ScriptedSidecar.key());
    try (Call call = client.request(U1)) {
      assertEquals(
          Map.of("Authorization", "Bearer " + ScriptedSidecar.SECRET), call.headers(PLATFORM));
      assertEquals(ScriptedSidecar.SECRET, call.secret().reveal());
      assertNull(call.ticket());
    }
    try (Call call = client.request(U1)) {
      assertEquals(PLATFORM, call.headers(PLATFORM));
      assertNull(call.secret());
      assertNull(call.key());
      assertEquals(50_000, call.ticket().holdMicros());
    }
  }

  @Test
  void aCallAlwaysAsksForTheSecret() {
    client.request(DecideRequest.builder("u1", "openai").redeem(true).build()).close();
    assertEquals(
        dev.keyturn.v1.KeyDelivery.KEY_DELIVERY_INLINE,
        sidecar.asked(dev.keyturn.v1.DecideRequest.class).get(0).getKeyDelivery());
  }

  @Test
  void finishRecordsInTheForegroundAndEndsTheCall() {
    try (Call call = client.request(U1)) {
      call.used(Usage.of(1, 2));
      assertEquals(7, call.finish().chargedMicros());
      assertNull(call.unrecorded());
      assertThrows(IllegalStateException.class, call::finish);
      assertThrows(IllegalStateException.class, call::sending);
      assertThrows(IllegalStateException.class, () -> call.used(Usage.of(1, 2)));
      assertThrows(IllegalStateException.class, () -> call.note(Note.NONE));
      assertThrows(IllegalStateException.class, () -> call.failed(Outcome.TIMEOUT));
      assertThrows(IllegalStateException.class, call::keyRefused);
      assertEquals("d2", call.decision().decisionId());
    }
    client.flush();
    assertEquals(dev.keyturn.v1.Outcome.OUTCOME_SUCCESS, foreground().get(0).getOutcome());
    assertEquals(List.of(), sidecar.batched());
  }

  @Test
  void aRecordThatFinishCouldNotSendIsStillThere() {
    Call call = client.request(U1);
    sidecar.fails(1, () -> ScriptedSidecar.status(Status.Code.INTERNAL, "no"));
    assertThrows(InternalErrorException.class, call::finish);
    assertEquals(Outcome.SUCCESS, call.unrecorded().outcome());
    client.record(call.unrecorded());
  }

  @Test
  void successIsNoFailure() {
    try (Call call = client.request(U1)) {
      assertThrows(IllegalArgumentException.class, () -> call.failed(Outcome.SUCCESS));
    }
  }

  @Test
  void aRefusedKeyIsRecordedAndLeftOutOfTheNextDecision() {
    sidecar.answers(ScriptedSidecar.key());
    Call call = client.request(U1);
    call.used(Usage.of(1, 2));
    Decision next = call.keyRefused();

    assertEquals("d2", next.decisionId());
    assertEquals(next, call.decision());
    dev.keyturn.v1.RecordRequest refusal = foreground().get(0);
    assertEquals(dev.keyturn.v1.Outcome.OUTCOME_AUTH_REJECTED, refusal.getOutcome());
    assertEquals(401, refusal.getHttpStatus());
    List<dev.keyturn.v1.DecideRequest> asked = sidecar.asked(dev.keyturn.v1.DecideRequest.class);
    assertEquals(asked.get(0).getRequestId(), asked.get(1).getRequestId());
    assertEquals(List.of(ScriptedSidecar.HANDLE), asked.get(1).getFailedKeyHandlesList());

    call.close(); // nothing is noted of the new route
    client.flush();
    assertEquals(dev.keyturn.v1.Outcome.OUTCOME_NEVER_SENT, sidecar.batched().get(0).getOutcome());
    assertFalse(sidecar.batched().get(0).hasUsage());
  }

  @Test
  void aRefusedKeyWithNobodyElseToPayIsDenied() {
    sidecar.answers(ScriptedSidecar.key(), ScriptedSidecar.recorded(), ScriptedSidecar.denial());
    Call call = client.request(U1);
    Failure billing =
        Failure.of(Outcome.PROVIDER_BILLING)
            .httpStatus(402)
            .errorMessage("pay")
            .retryAfter(Duration.ofSeconds(3));
    assertThrows(DeniedException.class, () -> call.keyRefused(billing));
    call.close();
    client.flush();
    assertEquals(List.of(), sidecar.batched());
    assertEquals(3, foreground().get(0).getRetryAfter().getSeconds());
    assertEquals("pay", foreground().get(0).getErrorMessage());
  }

  @Test
  void aRefusalThatWasNotRecordedIsWhatTheEndRecords() {
    sidecar.answers(ScriptedSidecar.key());
    sidecar.fails(1, () -> ScriptedSidecar.status(Status.Code.INTERNAL, "no"));
    Call call = client.request(U1);
    assertThrows(InternalErrorException.class, call::keyRefused);
    call.close();
    client.flush();
    assertEquals(foreground().get(0), sidecar.batched().get(0));
  }

  @Test
  void creditsHaveNoKeyToRefuse() {
    try (Call call = client.request(U1)) {
      assertThrows(IllegalStateException.class, call::keyRefused);
    }
  }

  @Test
  void theSameInTheFuture() {
    sidecar.answers(ScriptedSidecar.key());
    try (Call call = client.requestAsync(U1).join()) {
      Failure refused = Failure.of(Outcome.AUTH_REJECTED);
      assertEquals("d2", call.keyRefusedAsync(refused).join().decisionId());
      call.used(Usage.of(1, 2));
      assertEquals(7, call.finishAsync().join().chargedMicros());
    }
    sidecar.answers(ScriptedSidecar.denial());
    CompletionException denied =
        assertThrows(CompletionException.class, () -> client.requestAsync(U1).join());
    assertEquals(DeniedException.class, denied.getCause().getClass());
  }

  @Test
  void whileTheSidecarIsDownACallbackMayLetRequestsPass() {
    client.close();
    List<String> asked = new ArrayList<>();
    client =
        KeyturnClient.create(
            sidecar
                .options()
                .retries(Retries.of(1))
                .whenDown(
                    (request, error) -> {
                      asked.add(request.userId() + " " + request.requestId() + " " + error.code());
                      return request.userId().equals("u1");
                    })
                .build());
    sidecar.fails(1, ScriptedSidecar::gone);
    DecideRequest request = U1.toBuilder().requestId("r1").build();
    try (Call call = client.request(request)) {
      assertTrue(call.decision().unmetered());
      assertTrue(call.decision().allowed());
      assertEquals(PLATFORM, call.headers(PLATFORM));
      assertNull(call.finish());
    }
    sidecar.fails(1, () -> ScriptedSidecar.status(Status.Code.DEADLINE_EXCEEDED, "late"));
    client.request(request).close();
    sidecar.fails(1, ScriptedSidecar::gone);
    assertTrue(client.decideAsync(request).join().unmetered());
    assertEquals(
        List.of("u1 r1 UNAVAILABLE", "u1 r1 DEADLINE_EXCEEDED", "u1 r1 UNAVAILABLE"), asked);

    sidecar.fails(1, ScriptedSidecar::gone);
    DecideRequest u2 = DecideRequest.builder("u2", "openai").build();
    assertThrows(UnavailableException.class, () -> client.decide(u2));

    sidecar.answers(ScriptedSidecar.denial());
    assertThrows(DeniedException.class, () -> client.request(U1));
    sidecar.fails(1, () -> ScriptedSidecar.status(Status.Code.INTERNAL, "no"));
    assertThrows(InternalErrorException.class, () -> client.decide(U1));
    sidecar.fails(1, ScriptedSidecar::gone);
    assertThrows(UnavailableException.class, () -> client.decideMany(List.of(U1)));
    assertEquals(4, asked.size());
    client.flush();
    assertEquals(List.of(), sidecar.batched());
    assertEquals(List.of(), foreground());
  }

  @Test
  void whatTheCallbackThrowsIsThrown() {
    client.close();
    client =
        KeyturnClient.create(
            sidecar
                .options()
                .retries(Retries.of(1))
                .whenDown(
                    (request, error) -> {
                      throw new ArithmeticException("mine");
                    })
                .build());
    sidecar.fails(2, ScriptedSidecar::gone);
    assertThrows(ArithmeticException.class, () -> client.decide(U1));
    CompletionException later =
        assertThrows(CompletionException.class, () -> client.decideAsync(U1).join());
    assertEquals("mine", later.getCause().getMessage());
  }

  @Test
  void aCallThatEndsAfterTheClientIsUnsent() {
    List<Unsent> unsent = new ArrayList<>();
    client.close();
    client = KeyturnClient.create(sidecar.options().onUnsent(unsent::add).build());
    Call call = client.request(U1);
    client.close();
    call.close();
    assertEquals(1, unsent.size());
    assertEquals(IllegalStateException.class, unsent.get(0).error().getClass());
  }
}
