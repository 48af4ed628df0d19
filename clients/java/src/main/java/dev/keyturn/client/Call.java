package dev.keyturn.client;

import java.util.Map;
import java.util.Objects;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CompletionException;
import java.util.concurrent.Future;
import java.util.concurrent.atomic.AtomicReference;

/**
 * One request from its decision to its record: what {@link KeyturnClient#request} gives.
 *
 * <p>What is recorded:
 *
 * <ul>
 *   <li>an outcome given with {@link #failed(Failure)}: that one, whatever else was said;
 *   <li>else SUCCESS where {@link #succeeded()} was said, and by {@link #finish()};
 *   <li>else, for a call that is closed without a word, CLIENT_CANCELLED with what was noted if the
 *       request had gone out, and NEVER_SENT if it had not.
 * </ul>
 *
 * <p>The request counts as gone out once {@link #headers} or {@link #secret} was taken, {@link
 * #sending} was called, or usage or a cost was noted.
 *
 * <p>A call that ended refuses everything but reading with an {@code IllegalStateException}. An
 * unmetered one records nothing. Safe to use from several threads.
 */
public final class Call implements AutoCloseable {
  // `transient`: serializers that read fields by reflection pass over them.
  private final transient KeyturnClient client;
  private transient KeyturnClient.Asked asked;
  private transient Decision decision;
  private transient boolean open;
  private transient boolean goneOut;
  private transient boolean succeeded;
  private transient Failure failure;
  private transient Usage usage;
  private transient Long costMicros;
  private transient Note note;
  private transient RecordRequest unrecorded;

  /**
   * A call with its first decision.
   *
   * @throws DeniedException when the policy says no
   */
  Call(KeyturnClient client, KeyturnClient.Asked asked, Decision decision) {
    this.client = client;
    this.asked = asked;
    take(decision);
  }

  /** The id that makes a repeated decision find the first hold. */
  public synchronized String requestId() {
    return asked.request().requestId();
  }

  /** The decision in force: the latest, after {@link #keyRefused()}. */
  public synchronized Decision decision() {
    return decision;
  }

  /** The user's own key when that pays, or null. */
  public KeyHandle key() {
    return decision().key();
  }

  /** The hold on the user's credits when those pay, or null. */
  public CreditTicket ticket() {
    return decision().ticket();
  }

  /**
   * The headers that sign the request: the own key's, or {@code platform} when credits pay. They
   * hold a secret: never log them. Taking them means that the request goes out.
   */
  public synchronized Map<String, String> headers(Map<String, String> platform) {
    sending();
    return decision.key() != null ? decision.key().headers() : Map.copyOf(platform);
  }

  /**
   * The own key's secret, for libraries that sign by themselves; null when credits pay. Taking it
   * means that the request goes out.
   */
  public synchronized Secret secret() {
    sending();
    return decision.key() != null ? decision.key().secret() : null;
  }

  /** The request goes out now; for callers that need neither {@code headers} nor {@code secret}. */
  public synchronized void sending() {
    requireOpen();
    goneOut = true;
  }

  /** Tokens used. A count given again replaces the earlier one; the others stay. */
  public synchronized void used(Usage counts) {
    sending();
    usage = usage == null ? counts : usage.updatedBy(counts);
  }

  /** What the request cost, in micros. It wins over tokens. */
  public synchronized void cost(long micros) {
    sending();
    costMicros = micros;
  }

  /** What else is known. What is given again replaces the earlier; the rest stays. */
  public synchronized void note(Note more) {
    requireOpen();
    note = note.updatedBy(more);
  }

  /** The provider answered. */
  public synchronized void succeeded() {
    requireOpen();
    succeeded = true;
  }

  /** How the request ended else. */
  public void failed(Outcome outcome) {
    failed(Failure.of(outcome));
  }

  /** How the request ended else, and what the provider said. */
  public synchronized void failed(Failure how) {
    requireOpen();
    failure = Objects.requireNonNull(how, "failure");
  }

  /** The provider refused the own key with 401; see {@link #keyRefused(Failure)}. */
  public Decision keyRefused() {
    return keyRefused(Failure.of(Outcome.AUTH_REJECTED).httpStatus(401));
  }

  /**
   * Records that the provider refused the own key, and decides again without it, with the same
   * request id.
   *
   * @return the new decision, which is in force, with nothing noted: take {@code headers} again
   * @throws DeniedException when nobody else may pay
   * @throws KeyturnException when one of the two failed
   * @throws IllegalStateException when no own key pays for this call
   */
  public Decision keyRefused(Failure how) {
    Answer.await(client.record(refusal(how), this::takenOver, false));
    return take(client.decide(refused()));
  }

  /** {@link #keyRefused(Failure)}, later. */
  public CompletableFuture<Decision> keyRefusedAsync(Failure how) {
    CompletableFuture<Recorded> recorded = client.record(refusal(how), this::takenOver, true);
    // Whoever cancels finds the decision that was begun, or it is not begun.
    Object beginning = new Object();
    AtomicReference<Future<?>> running = new AtomicReference<>(recorded);
    Answer<Decision> answer =
        new Answer<>(
            () -> {
              synchronized (beginning) {
                running.get().cancel(true);
              }
            });
    recorded
        .thenCompose(
            taken -> {
              synchronized (beginning) {
                if (answer.isCancelled()) {
                  return answer;
                }
                CompletableFuture<Decision> decided = client.decideAsync(refused(), this::take);
                running.set(decided);
                return decided;
              }
            })
        .whenComplete(
            (decided, error) -> {
              if (error == null) {
                answer.complete(decided);
              } else {
                answer.completeExceptionally(
                    error instanceof CompletionException ? error.getCause() : error);
              }
            });
    return answer;
  }

  /**
   * Ends the call, and records in the foreground.
   *
   * @return how the record was taken; null for an unmetered call
   * @throws KeyturnException when it was not: {@link #unrecorded()} is what to give to {@link
   *     KeyturnClient#recordLater}
   */
  public Recorded finish() {
    RecordRequest record = end(true);
    if (record == null) {
      return null;
    }
    Recorded recorded = Answer.await(client.record(record, this::takenOver, false));
    recorded();
    return recorded;
  }

  /** {@link #finish()}, later. */
  public CompletableFuture<Recorded> finishAsync() {
    RecordRequest record = end(true);
    if (record == null) {
      return CompletableFuture.completedFuture(null);
    }
    Answer<Recorded> answer = client.record(record, this::takenOver, true);
    answer.thenRun(this::recorded);
    return answer;
  }

  /** The record that {@link #finish()} could not get through, or null. */
  public synchronized RecordRequest unrecorded() {
    return unrecorded;
  }

  /** Ends the call if nothing has, and hands its record to the background. Never throws. */
  @Override
  public void close() {
    RecordRequest record;
    synchronized (this) {
      if (!open) {
        return;
      }
      record = end(false);
      unrecorded = null;
    }
    if (record != null) {
      client.takeOver(record);
    }
  }

  /** The request id and the decision, without its secret. */
  @Override
  public synchronized String toString() {
    return "Call[" + requestId() + ", " + decision + "]";
  }

  /** A new route, with nothing noted about it. */
  private synchronized Decision take(Decision next) {
    if (!next.allowed()) {
      throw new DeniedException(next);
    }
    decision = next;
    goneOut = false;
    succeeded = false;
    failure = null;
    usage = null;
    costMicros = null;
    note = Note.NONE;
    open = true;
    return next;
  }

  /** The record of a refused key. Until it got through, it is what the end records. */
  private synchronized RecordRequest refusal(Failure how) {
    requireOpen();
    if (decision.key() == null) {
      throw new IllegalStateException("no own key pays for this call: there is none to refuse");
    }
    failed(how);
    return noted(Wire.number(how.outcome()));
  }

  /** The refusal is recorded: what to ask next, without that key. */
  private synchronized KeyturnClient.Asked refused() {
    open = false;
    asked = asked.without(decision.key().handle());
    return asked;
  }

  /** The background has the record. */
  private synchronized void takenOver() {
    open = false;
    unrecorded = null;
  }

  private synchronized RecordRequest end(boolean well) {
    requireOpen();
    open = false;
    if (decision.unmetered()) {
      return null;
    }
    Outcome outcome = goneOut ? Outcome.CLIENT_CANCELLED : Outcome.NEVER_SENT;
    if (failure != null) {
      outcome = failure.outcome();
    } else if (well || succeeded) {
      outcome = Outcome.SUCCESS;
    }
    unrecorded = noted(Wire.number(outcome));
    return unrecorded;
  }

  private synchronized void recorded() {
    unrecorded = null;
  }

  private RecordRequest noted(int outcome) {
    RecordRequest.Builder record = RecordRequest.builder(decision, outcome).note(note).usage(usage);
    if (costMicros != null) {
      record.costMicros(costMicros);
    }
    if (failure != null) {
      record
          .note(new Note(null, null, null, failure.httpStatus()))
          .errorMessage(failure.errorMessage())
          .retryAfter(failure.retryAfter());
    }
    return record.build();
  }

  private void requireOpen() {
    if (!open) {
      throw new IllegalStateException("this call has ended");
    }
  }
}
