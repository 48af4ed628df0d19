package dev.keyturn.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertInstanceOf;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.protobuf.Any;
import com.google.rpc.ErrorInfo;
import io.grpc.Status;
import java.time.Duration;
import java.util.List;
import java.util.OptionalLong;
import java.util.concurrent.atomic.AtomicLong;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Test;

class RetriesTest {
  private static final DecideRequest U1 = DecideRequest.builder("u1", "openai").build();
  private static final Fault DOWN = Fault.of(Status.Code.UNAVAILABLE, "gone");

  private final ScriptedSidecar sidecar = ScriptedSidecar.onSocket();
  private final KeyturnClient client = sidecar.client();

  @AfterEach
  void close() {
    client.close();
    sidecar.close();
  }

  private List<String> requestIds() {
    return sidecar.asked(dev.keyturn.v1.DecideRequest.class).stream()
        .map(dev.keyturn.v1.DecideRequest::getRequestId)
        .toList();
  }

  @Test
  void unavailableIsTriedAgainWithTheSameRequestId() {
    sidecar.fails(4, ScriptedSidecar::storeDown);
    assertTrue(client.decide(U1).allowed());
    assertEquals(5, requestIds().size());
    assertEquals(1, requestIds().stream().distinct().count());
  }

  @Test
  void fiveAttemptsAreAll() {
    sidecar.fails(6, ScriptedSidecar::storeDown);
    UnavailableException error = assertThrows(UnavailableException.class, () -> client.decide(U1));
    assertEquals("STORE_UNAVAILABLE", error.reason());
    assertEquals(5, sidecar.asked.size());
  }

  @Test
  void nothingElseIsTriedAgain() {
    for (Status.Code code : Status.Code.values()) {
      if (code == Status.Code.OK || code == Status.Code.UNAVAILABLE) {
        continue;
      }
      int before = sidecar.asked.size();
      Any because = Any.pack(ErrorInfo.newBuilder().setReason("BECAUSE").build());
      sidecar.fails(1, () -> ScriptedSidecar.status(code, "no", because));
      KeyturnException error = assertThrows(KeyturnException.class, () -> client.decide(U1));
      assertEquals(code, error.code());
      assertEquals(before + 1, sidecar.asked.size(), code::name);
    }
  }

  @Test
  void aCallThatTheSidecarDroppedAsItEndedIsTriedAgain() {
    sidecar.fails(1, Status.CANCELLED::asRuntimeException);
    assertTrue(client.decide(U1).allowed());
    assertEquals(2, sidecar.asked.size());
  }

  @Test
  void recordsAndExplanationsAreTriedAgainAndRedemptionsAreNot() {
    RecordRequest record = RecordRequest.of(SealedTicket.of("t"), Outcome.SUCCESS);
    sidecar.fails(1, ScriptedSidecar::storeDown);
    client.record(record);
    sidecar.fails(1, ScriptedSidecar::storeDown);
    client.recordMany(List.of(record));
    sidecar.fails(1, ScriptedSidecar::storeDown);
    client.explain(U1);
    assertEquals(6, sidecar.asked.size());
    sidecar.fails(1, ScriptedSidecar::storeDown);
    assertThrows(UnavailableException.class, () -> client.redeem(SealedHandle.of("h")));
    assertEquals(7, sidecar.asked.size());
  }

  @Test
  void aSidecarThatIsDownCostsOneAttemptUntilItAnswers() {
    sidecar.fails(6, ScriptedSidecar::gone);
    assertThrows(UnavailableException.class, () -> client.decide(U1));
    assertEquals(5, sidecar.asked.size());
    assertThrows(UnavailableException.class, () -> client.decide(U1));
    assertEquals(6, sidecar.asked.size());

    // Answered, though by an error: the policy is whole again, for this very call too.
    sidecar.fails(1, ScriptedSidecar::storeDown).fails(4, ScriptedSidecar::gone);
    assertThrows(UnavailableException.class, () -> client.decide(U1));
    assertEquals(11, sidecar.asked.size());
    assertThrows(
        UnavailableException.class,
        () -> {
          sidecar.fails(1, ScriptedSidecar::gone);
          client.decide(U1);
        });
    assertEquals(12, sidecar.asked.size());
    client.decide(U1);
    sidecar.fails(1, ScriptedSidecar::gone);
    client.decide(U1);
    assertEquals(15, sidecar.asked.size());
  }

  @Test
  void aStoreThatIsDownIsNoSidecarThatIsDown() {
    sidecar.fails(5, ScriptedSidecar::storeDown);
    assertThrows(UnavailableException.class, () -> client.decide(U1));
    sidecar.fails(4, ScriptedSidecar::storeDown);
    client.decide(U1);
    assertEquals(10, sidecar.asked.size());
  }

  @Test
  void aSidecarThatCameBackIsFoundByTheNextCall() {
    sidecar.stopListening();
    for (int i = 0; i < 20; i++) {
      assertThrows(UnavailableException.class, () -> client.decide(U1));
    }
    sidecar.listen();
    long gaveUp = System.nanoTime() + Duration.ofSeconds(20).toNanos();
    while (true) { // a reconnection is begun a second after the last one at most
      try {
        client.decide(U1);
        return;
      } catch (UnavailableException notYet) {
        assertTrue(System.nanoTime() < gaveUp, "never found again");
        Thread.onSpinWait();
      }
    }
  }

  @Test
  void aConnectionThatBreaksIsMadeAgain() {
    try (ScriptedSidecar loopback = ScriptedSidecar.onLoopback();
        Relay relay = new Relay(loopback.target());
        KeyturnClient relayed =
            KeyturnClient.create(loopback.options().target(relay.target()).build())) {
      for (int i = 0; i < 100; i++) {
        assertTrue(relayed.decide(U1).allowed());
        relay.cut(i % 2 == 0);
      }
    }
  }

  @Test
  void noAnswerInTimeIsDeadlineExceededAndOneAttempt() {
    sidecar.does(
        asked -> {
          try {
            Thread.sleep(400);
          } catch (InterruptedException ended) {
            Thread.currentThread().interrupt();
          }
          return ScriptedSidecar.ticket();
        });
    UnavailableException error =
        assertThrows(
            UnavailableException.class,
            () -> client.withTimeout(Duration.ofMillis(100)).decide(U1));
    assertInstanceOf(DeadlineExceededException.class, error);
    assertTrue(sidecar.asked.size() <= 1);
  }

  // ------------------------------------------------------------------ the arithmetic of waits

  private static final class Clock extends AtomicLong {
    private static final long serialVersionUID = 1L;

    void pass(long millis) {
      addAndGet(millis * 1_000_000);
    }
  }

  private static Fault asking(long millis) {
    return new Fault(
        Status.Code.UNAVAILABLE,
        "",
        "STORE_UNAVAILABLE",
        List.of(),
        Duration.ofMillis(millis),
        null,
        java.util.Map.of());
  }

  private static OptionalLong millis(long millis) {
    return OptionalLong.of(millis * 1_000_000);
  }

  @Test
  void waitsDoubleUpToTheLongest() {
    Retries retries = new Retries(9, Duration.ofMillis(100), Duration.ofSeconds(1));
    Attempts attempts =
        new Attempts(retries, Duration.ofMinutes(1), new Clock()::get, most -> most);
    for (long each : new long[] {100, 200, 400, 800, 1000, 1000, 1000, 1000}) {
      assertEquals(millis(each), attempts.waitAfter(DOWN, false));
    }
    assertEquals(OptionalLong.empty(), attempts.waitAfter(DOWN, false));
  }

  @Test
  void whatTheSidecarAsksIsWaitedBesidesTheJitter() {
    Attempts attempts =
        new Attempts(Retries.DEFAULT, Duration.ofSeconds(2), new Clock()::get, most -> most);
    assertEquals(millis(600), attempts.waitAfter(asking(500), false));
  }

  @Test
  void jitterGivesWayToTheDeadlineAndWhatWasAskedDoesNot() {
    Clock clock = new Clock();
    Attempts attempts =
        new Attempts(Retries.DEFAULT, Duration.ofSeconds(2), clock::get, most -> most);
    clock.pass(1450);
    assertEquals(millis(500), attempts.waitAfter(asking(500), false));
    clock.pass(100);
    assertEquals(OptionalLong.empty(), attempts.waitAfter(asking(500), false));
    assertEquals(OptionalLong.empty(), attempts.waitAfter(asking(1L << 60), false));
    clock.pass(400);
    assertEquals(OptionalLong.empty(), attempts.waitAfter(DOWN, false));
  }

  @Test
  void jitterIsFromNothingToAll() {
    boolean low = false;
    boolean high = false;
    for (int i = 0; i < 10_000; i++) {
      long drawn = Attempts.upTo(3);
      assertTrue(drawn >= 0 && drawn <= 3);
      low |= drawn == 0;
      high |= drawn == 3;
    }
    assertTrue(low && high);
    assertEquals(0, Attempts.upTo(0));
  }

  @Test
  void aPolicyThatMakesNoSenseIsRefused() {
    assertThrows(IllegalArgumentException.class, () -> Retries.of(0));
    Duration below = Duration.ofMillis(-1);
    assertThrows(IllegalArgumentException.class, () -> new Retries(1, below, Duration.ZERO));
    assertFalse(Retries.of(1).equals(Retries.DEFAULT));
  }
}
