package dev.keyturn.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertInstanceOf;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.keyturn.v1.BatchRecordRequest;
import dev.keyturn.v1.BatchRecordResponse;
import dev.keyturn.v1.BatchRecordResult;
import io.grpc.Status;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.CopyOnWriteArrayList;
import java.util.concurrent.CountDownLatch;
import java.util.logging.Handler;
import java.util.logging.LogRecord;
import java.util.logging.Logger;
import java.util.logging.SimpleFormatter;
import java.util.stream.IntStream;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Test;

class SenderTest {
  private final ScriptedSidecar sidecar = ScriptedSidecar.onSocket();
  private final List<Unsent> unsent = new CopyOnWriteArrayList<>();
  private KeyturnClient client =
      KeyturnClient.create(sidecar.options().onUnsent(unsent::add).build());

  @AfterEach
  void close() {
    client.close();
    sidecar.close();
  }

  private void with(Options.Builder options) {
    client.close();
    client = KeyturnClient.create(options.build());
  }

  private static RecordRequest record(int number) {
    String ticket = ScriptedSidecar.TICKET + number;
    return RecordRequest.of(SealedTicket.of(ticket), Outcome.SUCCESS);
  }

  private static List<String> tickets(List<dev.keyturn.v1.RecordRequest> records) {
    return records.stream().map(dev.keyturn.v1.RecordRequest::getCreditTicket).toList();
  }

  private static List<String> tickets(int from, int until) {
    return IntStream.range(from, until).mapToObj(i -> ScriptedSidecar.TICKET + i).toList();
  }

  /** A batch whose items end so, in order; 0 is well. */
  private static BatchRecordResponse ending(int... codes) {
    BatchRecordResponse.Builder response = BatchRecordResponse.newBuilder();
    for (int code : codes) {
      response.addResults(
          code == 0
              ? BatchRecordResult.newBuilder().setResponse(ScriptedSidecar.recorded())
              : BatchRecordResult.newBuilder()
                  .setStatus(dev.keyturn.v1.Status.newBuilder().setCode(code).setMessage("no")));
    }
    return response.build();
  }

  /** Holds up the first batch until all are queued. */
  private void queue(int count) {
    CountDownLatch all = new CountDownLatch(1);
    sidecar.does(
        asked -> {
          try {
            all.await();
          } catch (InterruptedException ended) {
            Thread.currentThread().interrupt();
          }
          return ending(new int[((BatchRecordRequest) asked).getRequestsCount()]);
        });
    for (int i = 0; i < count; i++) {
      client.recordLater(record(i));
    }
    all.countDown();
  }

  @Test
  void whatIsQueuedGoesInBatchesOfAHundredOldestFirst() {
    queue(250);
    client.flush();
    assertEquals(tickets(0, 250), tickets(sidecar.batched()));
    assertTrue(
        sidecar.asked(BatchRecordRequest.class).stream()
            .allMatch(batch -> batch.getRequestsCount() <= 100));
    assertTrue(sidecar.asked.size() <= 4);
    assertEquals(List.of(), unsent);
  }

  @Test
  void aBatchThatFailedForAWhileIsTriedAgain() {
    sidecar
        .fails(3, ScriptedSidecar::gone)
        .fails(1, () -> ScriptedSidecar.status(Status.Code.DEADLINE_EXCEEDED, "late"))
        .fails(1, () -> ScriptedSidecar.status(Status.Code.RESOURCE_EXHAUSTED, "busy"))
        .fails(4, ScriptedSidecar::storeDown);
    client.recordLater(record(0));
    client.flush();
    assertEquals(10, sidecar.asked.size());
    assertEquals(List.of(), unsent);
  }

  @Test
  void anItemThatFailedForAWhileIsTriedAgainAndTheOthersAreNot() {
    queue(1);
    client.flush();
    sidecar.does(
        asked -> {
          int[] codes = new int[((BatchRecordRequest) asked).getRequestsCount()];
          codes[0] = 14;
          return ending(codes);
        });
    client.recordLater(record(1));
    client.recordLater(record(2));
    client.flush();
    List<String> sent = tickets(sidecar.batched());
    assertEquals(2, sent.stream().filter((ScriptedSidecar.TICKET + 1)::equals).count());
    assertEquals(1, sent.stream().filter((ScriptedSidecar.TICKET + 2)::equals).count());
  }

  @Test
  void anyOtherErrorMakesARecordUnsent() {
    sidecar.answers(ending(6));
    client.recordLater(record(0));
    client.flush();
    assertEquals(1, sidecar.asked.size());
    assertInstanceOf(AlreadyExistsException.class, unsent.get(0).error());
    assertEquals(record(0).settles(), unsent.get(0).record().settles());

    sidecar.fails(1, () -> ScriptedSidecar.status(Status.Code.PERMISSION_DENIED, "no"));
    client.recordLater(record(1));
    client.flush();
    assertInstanceOf(PermissionDeniedException.class, unsent.get(1).error());
  }

  @Test
  void tryingInTheBackgroundNeverFindsOutThatTheSidecarIsDown() {
    sidecar.fails(6, ScriptedSidecar::gone);
    client.recordLater(record(0));
    client.flush();
    sidecar.fails(1, ScriptedSidecar::gone);
    client.decide(DecideRequest.builder("u1", "openai").build());
    assertEquals(9, sidecar.asked.size());
  }

  @Test
  void aFullQueueRefusesTheRecord() {
    sidecar.stopListening();
    with(sidecar.options().queueSize(2).onUnsent(unsent::add).closeTimeout(Duration.ZERO));
    client.recordLater(record(0));
    client.recordLater(record(1));
    assertThrows(QueueFullException.class, () -> client.recordLater(record(2)));
    assertEquals(List.of(), unsent);
    sidecar.listen();
  }

  @Test
  void aCallThatEndsIntoAFullQueueIsUnsent() {
    with(sidecar.options().queueSize(1).onUnsent(unsent::add).closeTimeout(Duration.ZERO));
    Call call = client.request(DecideRequest.builder("u1", "openai").build());
    sidecar.fails(1_000, ScriptedSidecar::storeDown);
    client.recordLater(record(0));
    call.close();
    assertEquals(1, unsent.size());
    assertInstanceOf(QueueFullException.class, unsent.get(0).error());
  }

  @Test
  void aRecordThatNoBatchCanHoldIsRefused() {
    RecordRequest huge =
        RecordRequest.builder(SealedTicket.of("t"), Outcome.SUCCESS)
            .note(Note.NONE.model("x".repeat(1_100_000)))
            .build();
    assertThrows(IllegalArgumentException.class, () -> client.recordLater(huge));
  }

  @Test
  void closingGoesOnSending() {
    sidecar.fails(3, ScriptedSidecar::storeDown);
    queue(3);
    assertEquals(List.of(), client.shutdown());
    assertTrue(tickets(sidecar.batched()).containsAll(tickets(0, 3)));
    assertEquals(List.of(), unsent);
  }

  @Test
  void closingGivesUpAfterAWhileAndGivesBackWhatIsLeft() {
    with(sidecar.options().onUnsent(unsent::add).closeTimeout(Duration.ofMillis(50)));
    sidecar.fails(100_000, ScriptedSidecar::storeDown);
    client.recordLater(record(0));
    client.recordLater(record(1));
    List<Unsent> left = client.shutdown();
    assertEquals(2, left.size());
    assertEquals(left, unsent);
    assertEquals(left, client.shutdown());
    assertEquals(2, unsent.size());
  }

  @Test
  void anInterruptedThreadClosesAtOnce() {
    sidecar.fails(100_000, ScriptedSidecar::storeDown);
    with(sidecar.options().onUnsent(unsent::add).closeTimeout(Duration.ofDays(1)));
    client.recordLater(record(0));
    Thread.currentThread().interrupt();
    assertEquals(1, client.shutdown().size());
    assertTrue(Thread.interrupted());
  }

  @Test
  void whatTheCallbackThrowsDoesNotStopTheSender() {
    with(
        sidecar
            .options()
            .onUnsent(
                each -> {
                  unsent.add(each);
                  throw new IllegalStateException(each.record().settles().toString());
                }));
    List<String> logged =
        logged(
            () -> {
              sidecar.answers(ending(3));
              client.recordLater(record(0));
              client.flush();
              client.recordLater(record(1));
              client.flush();
            });
    assertEquals(1, unsent.size());
    assertEquals(ScriptedSidecar.TICKET + 1, tickets(sidecar.batched()).get(1));
    assertEquals(1, logged.size());
    assertTrue(logged.get(0).contains("onUnsent threw java.lang.IllegalStateException"));
  }

  @Test
  void unsentRecordsAreLoggedWithNeitherHandleNorTicket() {
    with(sidecar.options());
    List<String> logged =
        logged(
            () -> {
              sidecar.answers(ending(6));
              client.recordLater(record(0));
              client.flush();
            });
    assertEquals(1, logged.size());
    assertTrue(
        logged.get(0).contains("a record was not sent: outcome SUCCESS: ALREADY_EXISTS: no"));
    assertFalse(logged.get(0).contains("ktt1_"));
  }

  /** The lines that the client logged meanwhile. */
  private static List<String> logged(Runnable work) {
    Logger logger = Logger.getLogger("dev.keyturn.client");
    List<String> lines = new ArrayList<>();
    Handler keeper =
        new Handler() {
          @Override
          public void publish(LogRecord line) {
            lines.add(new SimpleFormatter().format(line));
          }

          @Override
          public void flush() {}

          @Override
          public void close() {}
        };
    logger.addHandler(keeper);
    logger.setUseParentHandlers(false);
    try {
      work.run();
    } finally {
      logger.removeHandler(keeper);
      logger.setUseParentHandlers(true);
    }
    return lines;
  }
}
