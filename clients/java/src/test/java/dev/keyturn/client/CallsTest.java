package dev.keyturn.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertInstanceOf;
import static org.junit.jupiter.api.Assertions.assertNotEquals;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.keyturn.v1.BatchDecideResponse;
import dev.keyturn.v1.BatchDecideResult;
import dev.keyturn.v1.DecideResponse;
import dev.keyturn.v1.ExplainRequest;
import dev.keyturn.v1.ExplainResponse;
import dev.keyturn.v1.KeyDelivery;
import dev.keyturn.v1.RecordResponse;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CompletionException;
import java.util.concurrent.TimeUnit;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Test;

class CallsTest {
  private static final DecideRequest U1 = DecideRequest.builder("u1", "openai").build();

  private final ScriptedSidecar sidecar = ScriptedSidecar.onSocket();
  private final KeyturnClient client = sidecar.client();

  @AfterEach
  void close() {
    client.close();
    sidecar.close();
  }

  private dev.keyturn.v1.DecideRequest asked() {
    return sidecar.asked(dev.keyturn.v1.DecideRequest.class).get(0);
  }

  private dev.keyturn.v1.RecordRequest record() {
    return sidecar.asked(dev.keyturn.v1.RecordRequest.class).get(0);
  }

  @Test
  void aDecisionAsksForTheSecretAndSendsARequestIdOfItsOwn() {
    sidecar.answers(ScriptedSidecar.key(), ScriptedSidecar.key());
    Decision decision = client.decide(U1);
    client.decide(U1);

    assertEquals(ScriptedSidecar.SECRET, decision.key().secret().reveal());
    assertEquals(
        Map.of("Authorization", "Bearer " + ScriptedSidecar.SECRET), decision.key().headers());
    assertEquals(KeyDelivery.KEY_DELIVERY_INLINE, asked().getKeyDelivery());
    assertTrue(asked().getRequestId().matches("[0-9a-f]{12}4[0-9a-f]{19}"));
    assertNotEquals(
        asked().getRequestId(),
        sidecar.asked(dev.keyturn.v1.DecideRequest.class).get(1).getRequestId());
  }

  @Test
  void everyFieldOfARequestIsSent() {
    client.decide(
        DecideRequest.builder("u1", "openai")
            .model("gpt-4o")
            .serviceType("copilot")
            .requestId("r1")
            .inputTokens(3)
            .maxOutputTokens(4)
            .constraint(Constraint.CREDITS_ONLY)
            .failedKey(SealedHandle.of("h1"))
            .redeem(true)
            .holdTtl(Duration.ofMillis(1500))
            .build());

    assertEquals(
        dev.keyturn.v1.DecideRequest.newBuilder()
            .setRequestId("r1")
            .setUserId("u1")
            .setProvider("openai")
            .setModel("gpt-4o")
            .setServiceType("copilot")
            .setTokens(
                dev.keyturn.v1.TokenEstimate.newBuilder().setInputTokens(3).setMaxOutputTokens(4))
            .setConstraint(dev.keyturn.v1.Constraint.CONSTRAINT_CREDITS_ONLY)
            .addFailedKeyHandles("h1")
            .setKeyDelivery(KeyDelivery.KEY_DELIVERY_REDEEM)
            .setHoldTtl(
                com.google.protobuf.Duration.newBuilder().setSeconds(1).setNanos(500_000_000))
            .build(),
        asked());
  }

  @Test
  void aCostAndTokensTogetherAreRefusedBeforeAnythingIsSent() {
    DecideRequest.Builder both =
        DecideRequest.builder("u1", "openai").costMicros(1).maxOutputTokens(1);
    assertThrows(IllegalArgumentException.class, both::build);
  }

  @Test
  void aDenialIsAnAnswer() {
    sidecar.answers(ScriptedSidecar.denial());
    Decision decision = client.decide(U1);
    assertFalse(decision.allowed());
    assertEquals(DenialReason.INSUFFICIENT_CREDITS, decision.denial().reason());
  }

  @Test
  void numbersOfANewerSidecarFailNothing() {
    sidecar.answers(
        DecideResponse.newBuilder().setModeValue(99).setReasonValue(-1).build(),
        RecordResponse.newBuilder().setCostSourceValue(77).build());
    Decision decision = client.decide(U1);
    assertEquals(Mode.UNRECOGNIZED, decision.mode());
    assertEquals(Reason.UNRECOGNIZED, decision.reason());
    assertFalse(decision.allowed());
    Recorded recorded = client.record(RecordRequest.builder(SealedTicket.of("t"), 4711).build());
    assertEquals(CostSource.UNRECOGNIZED, recorded.costSource());
    assertEquals(4711, record().getOutcomeValue());
  }

  @Test
  void aRecordSendsNothingThatWasNotGiven() {
    client.record(RecordRequest.of(SealedTicket.of("t1"), Outcome.SUCCESS));
    assertEquals(
        dev.keyturn.v1.RecordRequest.newBuilder()
            .setCreditTicket("t1")
            .setOutcome(dev.keyturn.v1.Outcome.OUTCOME_SUCCESS)
            .build(),
        record());
  }

  @Test
  void everyFieldOfARecordIsSent() {
    Recorded recorded =
        client.record(
            RecordRequest.builder(SealedHandle.of("h1"), Outcome.RATE_LIMITED)
                .usage(Usage.of(1, 2).cacheReadTokens(3).cacheWriteTokens(4).totalTokens(0))
                .costMicros(0)
                .note(new Note("m", "/e", Duration.ofSeconds(2), 429))
                .errorMessage("slow down")
                .retryAfter(Duration.ofSeconds(20))
                .build());

    assertNull(recorded.balanceMicros());
    assertEquals(7, recorded.chargedMicros());
    assertEquals(
        dev.keyturn.v1.RecordRequest.newBuilder()
            .setKeyHandle("h1")
            .setOutcome(dev.keyturn.v1.Outcome.OUTCOME_RATE_LIMITED)
            .setUsage(
                dev.keyturn.v1.Usage.newBuilder()
                    .setInputTokens(1)
                    .setOutputTokens(2)
                    .setCacheReadTokens(3)
                    .setCacheWriteTokens(4)
                    .setTotalTokens(0))
            .setCostMicros(0)
            .setModel("m")
            .setEndpoint("/e")
            .setResponseTime(com.google.protobuf.Duration.newBuilder().setSeconds(2))
            .setHttpStatus(429)
            .setErrorMessage("slow down")
            .setRetryAfter(com.google.protobuf.Duration.newBuilder().setSeconds(20))
            .build(),
        record());
  }

  @Test
  void anErrorMessageIsCutBetweenCharacters() {
    client.record(
        RecordRequest.builder(SealedTicket.of("t"), Outcome.REFUSED)
            .errorMessage("😀".repeat(501))
            .build());
    assertEquals("😀".repeat(500), record().getErrorMessage());
  }

  @Test
  void whatHasNothingToRecordIsRefusedBeforeAnythingIsSent() {
    sidecar.answers(ScriptedSidecar.denial());
    Decision denied = client.decide(U1);
    assertThrows(IllegalArgumentException.class, () -> RecordRequest.of(denied, Outcome.SUCCESS));
    assertThrows(
        IllegalArgumentException.class,
        () -> RecordRequest.of(Decision.withoutSidecar(), Outcome.SUCCESS));
  }

  @Test
  void aRecordSettlesADecisionItsKeyOrItsTicket() {
    Decision key = Wire.decision(ScriptedSidecar.key());
    Decision ticket = Wire.decision(ScriptedSidecar.ticket());
    SealedHandle handle = SealedHandle.of(ScriptedSidecar.HANDLE);
    assertEquals(handle, RecordRequest.of(key, Outcome.SUCCESS).settles());
    assertEquals(handle, RecordRequest.of(key.key(), Outcome.SUCCESS).settles());
    SealedTicket sealed = SealedTicket.of(ScriptedSidecar.TICKET);
    assertEquals(sealed, RecordRequest.of(ticket, Outcome.SUCCESS).settles());
    assertEquals(sealed, RecordRequest.of(ticket.ticket(), Outcome.SUCCESS).settles());
  }

  @Test
  void aBatchHasAnAnswerOrAnErrorForEachItem() {
    sidecar.answers(
        BatchDecideResponse.newBuilder()
            .addResults(BatchDecideResult.newBuilder().setResponse(ScriptedSidecar.ticket()))
            .addResults(
                BatchDecideResult.newBuilder()
                    .setStatus(
                        dev.keyturn.v1.Status.newBuilder().setCode(5).setMessage("No user.")))
            .build());
    List<Result<Decision>> results = client.decideMany(List.of(U1, U1));
    assertEquals(50_000, results.get(0).orThrow().ticket().holdMicros());
    assertInstanceOf(NotFoundException.class, results.get(1).error());
    assertThrows(NotFoundException.class, () -> results.get(1).orThrow());
  }

  @Test
  void aBatchWithTooFewAnswersIsAFault() {
    assertThrows(InternalErrorException.class, () -> client.decideMany(List.of(U1)));
  }

  @Test
  void noItemsAskNothing() {
    assertEquals(List.of(), client.decideMany(List.of()));
    assertEquals(List.of(), client.recordMany(List.of()));
    assertEquals(List.of(), sidecar.asked);
  }

  @Test
  void severalRecordsGoInOneCall() {
    RecordRequest record = RecordRequest.of(SealedTicket.of("t1"), Outcome.SUCCESS);
    List<Result<Recorded>> results = client.recordMany(List.of(record, record));
    assertEquals(
        List.of(7L, 7L), results.stream().map(each -> each.orThrow().chargedMicros()).toList());
    assertEquals(2, sidecar.batched().size());
  }

  @Test
  void anExplanationHasItsSteps() {
    sidecar.answers(
        ExplainResponse.newBuilder()
            .setDecision(ScriptedSidecar.denial())
            .addSteps(
                dev.keyturn.v1.ExplainStep.newBuilder()
                    .setCheck("tier")
                    .setResult("eligible")
                    .setDetail("premium"))
            .build());
    Explanation explanation = client.explain(U1);
    assertEquals(List.of(new ExplainStep("tier", "eligible", "premium")), explanation.steps());
    assertEquals("u1", sidecar.asked(ExplainRequest.class).get(0).getDecide().getUserId());
  }

  @Test
  void aSecretIsRedeemed() {
    assertEquals(Secret.of(ScriptedSidecar.SECRET), client.redeem(SealedHandle.of("h1")));
  }

  @Test
  void theSameCallsInTheFuture() {
    sidecar.answers(ScriptedSidecar.key());
    Decision decision = client.decideAsync(U1).join();
    assertEquals(ScriptedSidecar.HANDLE, decision.key().handle().text());
    RecordRequest record = RecordRequest.of(decision, Outcome.SUCCESS);
    assertEquals(7, client.recordAsync(record).join().chargedMicros());
    assertEquals(7, client.recordManyAsync(List.of(record)).join().get(0).answer().chargedMicros());
    assertEquals(
        ScriptedSidecar.SECRET, client.redeemAsync(decision.key().handle()).join().reveal());
    assertEquals(List.of(), client.explainAsync(U1).join().steps());
    assertEquals(List.of(), client.decideManyAsync(List.of()).join());
  }

  @Test
  void afterCloseEveryCallFails() {
    client.close();
    assertThrows(IllegalStateException.class, () -> client.decide(U1));
    assertThrows(IllegalStateException.class, () -> client.request(U1));
    assertThrows(IllegalStateException.class, client::flush);
    RecordRequest record = RecordRequest.of(SealedTicket.of("t1"), Outcome.SUCCESS);
    assertThrows(IllegalStateException.class, () -> client.recordLater(record));
    CompletionException failed =
        assertThrows(CompletionException.class, () -> client.decideAsync(U1).join());
    assertInstanceOf(IllegalStateException.class, failed.getCause());
    assertEquals(List.of(), client.shutdown());
    assertEquals(List.of(), sidecar.asked);
  }

  @Test
  void aTimeoutOfACallIsItsDeadline() {
    client.withTimeout(Duration.ofMinutes(7)).decide(U1);
    long left = sidecar.contexts.get(0).getDeadline().timeRemaining(TimeUnit.SECONDS);
    assertTrue(left > 60 && left <= 420, () -> left + " s");
    assertThrows(IllegalArgumentException.class, () -> client.withTimeout(Duration.ZERO));
  }

  @Test
  void outcomesOfHttpAnswers() {
    record Row(int status, String code, Outcome outcome) {}
    List.of(
            new Row(200, null, Outcome.SUCCESS),
            new Row(204, "x", Outcome.SUCCESS),
            new Row(401, null, Outcome.AUTH_REJECTED),
            new Row(403, null, Outcome.AUTH_REJECTED),
            new Row(402, null, Outcome.PROVIDER_BILLING),
            new Row(429, "insufficient_quota", Outcome.PROVIDER_BILLING),
            new Row(429, "billing_hard_limit_reached", Outcome.PROVIDER_BILLING),
            new Row(429, "billing_not_active", Outcome.PROVIDER_BILLING),
            new Row(429, "billing_error", Outcome.PROVIDER_BILLING),
            new Row(400, "billing_error", Outcome.PROVIDER_BILLING),
            new Row(400, "insufficient_quota", Outcome.REFUSED),
            new Row(429, "rate_limit_exceeded", Outcome.RATE_LIMITED),
            new Row(429, null, Outcome.RATE_LIMITED),
            new Row(408, null, Outcome.TIMEOUT),
            new Row(504, null, Outcome.TIMEOUT),
            new Row(404, null, Outcome.REFUSED),
            new Row(500, "billing_error", Outcome.PROVIDER_ERROR),
            new Row(302, null, Outcome.PROVIDER_ERROR),
            new Row(0, null, Outcome.PROVIDER_ERROR))
        .forEach(
            row ->
                assertEquals(row.outcome, Outcome.outcomeOf(row.status, row.code), row::toString));
  }
}
