package dev.keyturn.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.protobuf.Message;
import dev.keyturn.v1.BatchDecideResponse;
import dev.keyturn.v1.BatchDecideResult;
import io.grpc.Context;
import java.util.List;
import java.util.concurrent.CancellationException;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CountDownLatch;
import java.util.function.Function;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.RepeatedTest;
import org.junit.jupiter.api.Test;

class CancellationTest {
  private static final DecideRequest U1 = DecideRequest.builder("u1", "openai").build();
  private static final DecideRequest WITH_ID = U1.toBuilder().requestId("mine").build();

  private final ScriptedSidecar sidecar = ScriptedSidecar.onSocket();
  private final KeyturnClient client = sidecar.client();
  private final CountDownLatch arrived = new CountDownLatch(1);
  private final CountDownLatch goOn = new CountDownLatch(1);
  private final CountDownLatch ended = new CountDownLatch(1);

  @AfterEach
  void close() {
    client.close();
    sidecar.close();
  }

  /** Answers when the caller has cancelled. */
  private Function<Message, Message> late(Message answer) {
    return asked -> {
      Context.current().addListener(context -> ended.countDown(), Runnable::run);
      arrived.countDown();
      await(goOn);
      return answer;
    };
  }

  private static void await(CountDownLatch latch) {
    try {
      latch.await();
    } catch (InterruptedException error) {
      Thread.currentThread().interrupt();
    }
  }

  /** Interrupts this thread when the call has arrived. */
  private void interruptOnArrival() {
    Thread caller = Thread.currentThread();
    new Thread(
            () -> {
              await(arrived);
              caller.interrupt();
            })
        .start();
  }

  private List<dev.keyturn.v1.RecordRequest> recordedLater() {
    goOn.countDown();
    client.flush();
    return sidecar.batched();
  }

  private static final dev.keyturn.v1.RecordRequest NEVER_SENT =
      dev.keyturn.v1.RecordRequest.newBuilder()
          .setCreditTicket(ScriptedSidecar.TICKET)
          .setOutcome(dev.keyturn.v1.Outcome.OUTCOME_NEVER_SENT)
          .build();

  @Test
  void anInterruptedDecisionLeavesNoHold() {
    sidecar.does(late(ScriptedSidecar.ticket()));
    interruptOnArrival();
    assertThrows(CancellationException.class, () -> client.decide(U1));
    assertTrue(Thread.interrupted(), "the flag is kept");
    assertEquals(List.of(NEVER_SENT), recordedLater());
  }

  @Test
  void anInterruptedRequestLeavesNoHold() {
    sidecar.does(late(ScriptedSidecar.ticket()));
    interruptOnArrival();
    assertThrows(CancellationException.class, () -> client.request(U1));
    assertTrue(Thread.interrupted());
    assertEquals(List.of(NEVER_SENT), recordedLater());
  }

  @Test
  void aCancelledFutureLeavesNoHold() {
    sidecar.does(late(ScriptedSidecar.ticket()));
    CompletableFuture<Call> call = client.requestAsync(U1);
    await(arrived);
    assertTrue(call.cancel(true));
    assertTrue(call.cancel(true));
    assertEquals(List.of(NEVER_SENT), recordedLater());
  }

  @Test
  void aCancelledKeyNeedsNoRecord() {
    sidecar.does(late(ScriptedSidecar.key()));
    CompletableFuture<Decision> decision = client.decideAsync(U1);
    await(arrived);
    decision.cancel(true);
    assertEquals(List.of(), recordedLater());
  }

  @Test
  void aRequestIdOfTheCallersIsExpectedAgain() {
    sidecar.does(late(ScriptedSidecar.ticket()));
    CompletableFuture<Decision> decision = client.decideAsync(WITH_ID);
    await(arrived);
    decision.cancel(true);
    await(ended); // the call itself is cancelled
    assertEquals(List.of(), recordedLater());
  }

  @Test
  void aCancelledCallIsNotTriedAgain() {
    sidecar.does(late(ScriptedSidecar.ticket()));
    CompletableFuture<Decision> decision = client.decideAsync(WITH_ID);
    await(arrived);
    decision.cancel(true);
    await(ended);
    assertThrows(CancellationException.class, decision::join);
    goOn.countDown();
    assertTrue(client.decide(U1).allowed());
    assertEquals(2, sidecar.asked.size());
  }

  @Test
  void cancelledDecisionsLeaveNoHolds() {
    BatchDecideResult ticket =
        BatchDecideResult.newBuilder().setResponse(ScriptedSidecar.ticket()).build();
    sidecar.does(
        late(BatchDecideResponse.newBuilder().addResults(ticket).addResults(ticket).build()));
    var decisions = client.decideManyAsync(List.of(U1, WITH_ID));
    await(arrived);
    decisions.cancel(true);
    assertEquals(List.of(NEVER_SENT), recordedLater());
  }

  @Test
  void closingWaitsForADecisionThatNobodyWaitsFor() {
    sidecar.does(late(ScriptedSidecar.ticket()));
    CompletableFuture<Decision> decision = client.decideAsync(U1);
    await(arrived);
    decision.cancel(true);
    goOn.countDown();
    assertEquals(List.of(), client.shutdown());
    assertEquals(List.of(NEVER_SENT), sidecar.batched());
  }

  @Test
  void aCancelledRecordIsCarriedOn() {
    RecordRequest record = RecordRequest.of(SealedTicket.of("t1"), Outcome.SUCCESS);
    sidecar.does(late(ScriptedSidecar.recorded()));
    interruptOnArrival();
    assertThrows(CancellationException.class, () -> client.record(record));
    assertTrue(Thread.interrupted());
    assertEquals(List.of(Wire.recordRequest(record)), recordedLater());
  }

  @Test
  void cancelledRecordsAreCarriedOn() {
    RecordRequest record = RecordRequest.of(SealedTicket.of("t1"), Outcome.SUCCESS);
    sidecar.does(late(dev.keyturn.v1.BatchRecordResponse.getDefaultInstance()));
    var records = client.recordManyAsync(List.of(record));
    await(arrived);
    records.cancel(true);
    goOn.countDown();
    client.flush();
    assertEquals(2, sidecar.batched().size());
  }

  @Test
  void aFinishThatIsInterruptedIsCarriedOn() {
    Call call = client.request(U1);
    sidecar.does(late(ScriptedSidecar.recorded()));
    interruptOnArrival();
    assertThrows(CancellationException.class, call::finish);
    assertTrue(Thread.interrupted());
    assertEquals(null, call.unrecorded());
    call.close();
    assertEquals(1, recordedLater().size());
  }

  @Test
  void aRefusalThatIsInterruptedIsCarriedOnAndEndsTheCall() {
    sidecar.answers(ScriptedSidecar.key());
    Call call = client.request(U1);
    sidecar.does(late(ScriptedSidecar.recorded()));
    interruptOnArrival();
    assertThrows(CancellationException.class, call::keyRefused);
    assertTrue(Thread.interrupted());
    call.close();
    assertEquals(
        List.of(dev.keyturn.v1.Outcome.OUTCOME_AUTH_REJECTED),
        recordedLater().stream().map(dev.keyturn.v1.RecordRequest::getOutcome).toList());
  }

  @RepeatedTest(20)
  void aRefusalIsCancelledThroughItsFuture() {
    sidecar.answers(ScriptedSidecar.key());
    Call call = client.request(U1);
    sidecar.answers(ScriptedSidecar.recorded()).does(late(ScriptedSidecar.ticket()));
    CompletableFuture<Decision> next = call.keyRefusedAsync(Failure.of(Outcome.AUTH_REJECTED));
    await(arrived);
    next.cancel(true);
    assertEquals(List.of(NEVER_SENT), recordedLater());
    call.close();
    client.flush();
    assertEquals(1, sidecar.batched().size());
  }

  @Test
  void aCallerThatWasInterruptedBeforeIsCancelledToo() {
    Thread.currentThread().interrupt();
    assertThrows(CancellationException.class, () -> client.explain(U1));
    assertTrue(Thread.interrupted());
  }

  @Test
  void theContextOfTheCallerIsNotTheCalls() {
    Context.CancellableContext caller = Context.current().withCancellation();
    caller.cancel(null);
    caller.run(() -> assertTrue(client.decide(U1).allowed()));
  }

  @Test
  void closingEndsCallsThatStillRun() {
    sidecar.does(late(ScriptedSidecar.ticket()));
    CompletableFuture<Decision> decision = client.decideAsync(WITH_ID);
    await(arrived);
    client.close();
    goOn.countDown();
    Throwable error =
        assertThrows(java.util.concurrent.CompletionException.class, decision::join).getCause();
    assertEquals(IllegalStateException.class, error.getClass());
  }
}
