package dev.keyturn.client;

import dev.keyturn.v1.BatchDecideResponse;
import dev.keyturn.v1.DecideResponse;
import dev.keyturn.v1.RedeemRequest;
import dev.keyturn.v1.RoutingServiceGrpc;
import io.grpc.MethodDescriptor;
import java.time.Duration;
import java.util.List;
import java.util.UUID;
import java.util.concurrent.CompletableFuture;
import java.util.function.BiConsumer;
import java.util.function.BiFunction;
import java.util.function.Consumer;
import java.util.function.Function;

/**
 * A connection to the sidecar, to be made once, kept and shared: it is safe to use from many
 * threads. Nothing connects before the first call. Its threads are daemons.
 *
 * <p>Every call throws a {@link KeyturnException}, and {@code IllegalStateException} once the
 * client is closed. The thread that waits for one may be interrupted: that cancels the call, which
 * throws {@link java.util.concurrent.CancellationException} with the thread's interrupt flag set.
 * The methods {@code …Async} complete their future with the same errors; cancelling the future they
 * gave (not one that depends on it) cancels the call. A future's dependents run in its default
 * executor.
 *
 * <p>A {@code decide} or {@code request} that is cancelled, and whose request id was made here,
 * leaves no hold behind: it goes on in the background, and its ticket is recorded as NEVER_SENT. A
 * record that is cancelled goes on in the background too.
 */
public final class KeyturnClient implements AutoCloseable {
  // `transient`: serializers that read fields by reflection pass over them.
  private final transient Options options;
  private final transient Connection connection;
  private final transient Sender sender;
  private final transient Duration timeout;

  private KeyturnClient(Options options, Connection connection, Sender sender, Duration timeout) {
    this.options = options;
    this.connection = connection;
    this.sender = sender;
    this.timeout = timeout;
  }

  /** A client of the sidecar that {@code KEYTURN_ADDRESS} names, else that of this machine. */
  public static KeyturnClient create() {
    return create(Options.DEFAULT);
  }

  /**
   * A client.
   *
   * @throws IllegalArgumentException for a target, a token or certificates that cannot work
   */
  public static KeyturnClient create(Options options) {
    Connection connection = new Connection(options);
    return new KeyturnClient(
        options, connection, new Sender(connection, options), options.timeout());
  }

  /** This client with another deadline for its calls. Closing either closes both. */
  public KeyturnClient withTimeout(Duration deadline) {
    return new KeyturnClient(
        options, connection, sender, Options.Builder.positive("timeout", deadline));
  }

  /**
   * Decides, and gives the call that records: for try-with-resources.
   *
   * @throws DeniedException when the policy says no
   */
  public Call request(DecideRequest request) {
    Asked asked = Asked.of(request, false);
    return new Call(this, asked, decide(asked));
  }

  /** {@link #request}, later. */
  public CompletableFuture<Call> requestAsync(DecideRequest request) {
    Asked asked = Asked.of(request, false);
    return decideAsync(asked, decision -> new Call(this, asked, decision));
  }

  /**
   * Whose credential pays for a request? A denial is an answer too: see {@link Decision#allowed()}.
   * Tried again when unavailable, with the same request id, so that no second hold is placed.
   */
  public Decision decide(DecideRequest request) {
    return decide(Asked.of(request, request.redeem()));
  }

  /** {@link #decide(DecideRequest)}, later. */
  public CompletableFuture<Decision> decideAsync(DecideRequest request) {
    return decideAsync(Asked.of(request, request.redeem()), Function.identity());
  }

  /**
   * Several decisions in one call, up to 500: an answer or an error for each, in order. {@link
   * WhenDown} is not asked for them.
   */
  public List<Result<Decision>> decideMany(List<DecideRequest> requests) {
    return Answer.await(decideMany(requests, false));
  }

  /** {@link #decideMany(List)}, later. */
  public CompletableFuture<List<Result<Decision>>> decideManyAsync(List<DecideRequest> requests) {
    return decideMany(requests, true);
  }

  /** What would {@code decide} answer now, and why? Places no hold, tells no secret. */
  public Explanation explain(DecideRequest request) {
    return Answer.await(explain(request, false));
  }

  /** {@link #explain(DecideRequest)}, later. */
  public CompletableFuture<Explanation> explainAsync(DecideRequest request) {
    return explain(request, true);
  }

  /**
   * What became of a request: charges the ticket or counts the own key's usage, once. Durable when
   * it returns; tried again when unavailable, because the same record again gets the first answer.
   */
  public Recorded record(RecordRequest record) {
    return Answer.await(record(record, () -> {}, false));
  }

  /** {@link #record(RecordRequest)}, later. */
  public CompletableFuture<Recorded> recordAsync(RecordRequest record) {
    return record(record, () -> {}, true);
  }

  /** Several records in one call, up to 500: an answer or an error for each, in order. */
  public List<Result<Recorded>> recordMany(List<RecordRequest> records) {
    return Answer.await(recordMany(records, false));
  }

  /** {@link #recordMany(List)}, later. */
  public CompletableFuture<List<Result<Recorded>>> recordManyAsync(List<RecordRequest> records) {
    return recordMany(records, true);
  }

  /**
   * The secret behind a handle that was decided with {@code redeem(true)}; once per handle. Never
   * tried again: a redemption that seemed to fail may have been carried out. Decide again with the
   * same request id for a fresh handle.
   */
  public Secret redeem(SealedHandle handle) {
    return Answer.await(redeem(handle, false));
  }

  /** {@link #redeem(SealedHandle)}, later. */
  public CompletableFuture<Secret> redeemAsync(SealedHandle handle) {
    return redeem(handle, true);
  }

  /**
   * Puts a record into the queue of the background, and returns at once.
   *
   * @throws QueueFullException when there is no room: the record is still the caller's
   */
  public void recordLater(RecordRequest record) {
    sender.add(record);
  }

  /** Waits until what was queued before is sent or unsent. */
  public void flush() {
    Answer.await(flushAsync());
  }

  /** {@link #flush()}, later. */
  public CompletableFuture<Void> flushAsync() {
    return connection.isClosing()
        ? CompletableFuture.failedFuture(Connection.closed())
        : sender.flush();
  }

  /**
   * Closes the client: takes no more, goes on sending what is in the queue for as long as the
   * option {@code closeTimeout} says (not at all when this thread is interrupted), and then ends
   * calls that still run in other threads.
   *
   * @return the records that were left in the queue; {@code onUnsent} was called with each
   */
  public List<Unsent> shutdown() {
    connection.closing();
    List<Unsent> left = sender.close(options.closeTimeout());
    connection.close();
    return left;
  }

  /** {@link #shutdown()}, without what was left. */
  @Override
  public void close() {
    shutdown();
  }

  /** Where the sidecar is: no token. */
  @Override
  public String toString() {
    return "KeyturnClient[" + connection.target().text() + "]";
  }

  // ---------------------------------------------------------------------------- for Call

  /** One question: its request has an id, which was made here or not. */
  record Asked(DecideRequest request, boolean ours) {
    static Asked of(DecideRequest request, boolean redeem) {
      boolean ours = request.requestId() == null;
      String id = ours ? UUID.randomUUID().toString().replace("-", "") : request.requestId();
      return new Asked(request.toBuilder().requestId(id).redeem(redeem).build(), ours);
    }

    Asked without(SealedHandle refused) {
      return new Asked(request.toBuilder().failedKey(refused).build(), ours);
    }
  }

  Decision decide(Asked asked) {
    try {
      return Answer.await(answer(ask(asked), reading(Wire::decision), abandon(asked), false));
    } catch (UnavailableException error) {
      return whenDown(asked, error);
    }
  }

  <T> CompletableFuture<T> decideAsync(Asked asked, Function<Decision, T> then) {
    return answer(
        ask(asked),
        (response, error) ->
            then.apply(
                error instanceof UnavailableException down
                    ? whenDown(asked, down)
                    : Wire.decision(orThrow(response, error))),
        abandon(asked),
        true);
  }

  /**
   * Records.
   *
   * @param onTakenOver what follows when the caller cancels, and the record goes to the background
   */
  Answer<Recorded> record(RecordRequest record, Runnable onTakenOver, boolean async) {
    return answer(
        begin(RoutingServiceGrpc.getRecordMethod(), Wire.recordRequest(record)),
        reading(Wire::recorded),
        exchange -> {
          exchange.cancel(true);
          sender.takeOver(record);
          onTakenOver.run();
        },
        async);
  }

  void takeOver(RecordRequest record) {
    sender.takeOver(record);
  }

  // ------------------------------------------------------------------------------- calls

  private Exchange<?, DecideResponse> ask(Asked asked) {
    return begin(RoutingServiceGrpc.getDecideMethod(), Wire.decideRequest(asked.request()));
  }

  private Decision whenDown(Asked asked, UnavailableException error) {
    WhenDown whenDown = options.whenDown();
    if (whenDown == null || !whenDown.mayProceed(asked.request(), error)) {
      throw error;
    }
    return Decision.withoutSidecar();
  }

  private Answer<List<Result<Decision>>> decideMany(List<DecideRequest> requests, boolean async) {
    if (requests.isEmpty()) {
      return nothingAsked();
    }
    List<Asked> asked =
        requests.stream().map(request -> Asked.of(request, request.redeem())).toList();
    return answer(
        begin(RoutingServiceGrpc.getBatchDecideMethod(), Wire.decideRequests(asked)),
        reading(response -> Wire.results(response, asked.size())),
        exchange -> sender.expect(exchange.thenAccept(response -> abandon(asked, response))),
        async);
  }

  private Answer<Explanation> explain(DecideRequest request, boolean async) {
    return answer(
        begin(RoutingServiceGrpc.getExplainMethod(), Wire.explainRequest(request)),
        reading(Wire::explanation),
        exchange -> exchange.cancel(true),
        async);
  }

  private Answer<List<Result<Recorded>>> recordMany(List<RecordRequest> records, boolean async) {
    if (records.isEmpty()) {
      return nothingAsked();
    }
    List<RecordRequest> sent = List.copyOf(records);
    return answer(
        begin(
            RoutingServiceGrpc.getBatchRecordMethod(),
            Wire.recordRequests(sent.stream().map(Wire::recordRequest).toList())),
        reading(response -> Wire.results(response, sent.size())),
        exchange -> {
          exchange.cancel(true);
          sent.forEach(sender::takeOver);
        },
        async);
  }

  private Answer<Secret> redeem(SealedHandle handle, boolean async) {
    return answer(
        connection.begin(
            RoutingServiceGrpc.getRedeemMethod(),
            RedeemRequest.newBuilder().setKeyHandle(handle.text()).build(),
            Retries.of(1),
            timeout),
        reading(response -> Secret.of(response.getSecret())),
        exchange -> exchange.cancel(true),
        async);
  }

  private <Q, R> Exchange<Q, R> begin(MethodDescriptor<Q, R> method, Q request) {
    return connection.begin(method, request, options.retries(), timeout);
  }

  /**
   * What the caller waits for.
   *
   * @param read makes the answer of the response, or of the error when there is none
   * @param onCancel what happens to the exchange when the caller cancels
   * @param async whether {@code read} and what depends on the answer run in a thread of their own
   */
  private static <R, T> Answer<T> answer(
      Exchange<?, R> exchange,
      BiFunction<R, RuntimeException, T> read,
      Consumer<Exchange<?, R>> onCancel,
      boolean async) {
    Answer<T> answer = new Answer<>(() -> onCancel.accept(exchange));
    BiConsumer<R, Throwable> conclude =
        (response, error) -> {
          if (answer.isDone()) {
            return;
          }
          try {
            answer.complete(read.apply(response, (RuntimeException) error));
          } catch (RuntimeException failed) {
            answer.completeExceptionally(failed);
          }
        };
    if (async) {
      exchange.whenCompleteAsync(conclude, answer.defaultExecutor());
    } else {
      exchange.whenComplete(conclude);
    }
    return answer;
  }

  private static <R, T> BiFunction<R, RuntimeException, T> reading(Function<R, T> read) {
    return (response, error) -> read.apply(orThrow(response, error));
  }

  private static <R> R orThrow(R response, RuntimeException error) {
    if (error != null) {
      throw error;
    }
    return response;
  }

  private static <T> Answer<List<Result<T>>> nothingAsked() {
    Answer<List<Result<T>>> answer = new Answer<>(() -> {});
    answer.complete(List.of());
    return answer;
  }

  // -------------------------------------------------------------------- cancelled decisions

  /** What becomes of a decision that its caller cancelled: with our own id, it leaves no hold. */
  private Consumer<Exchange<?, DecideResponse>> abandon(Asked asked) {
    return asked.ours()
        ? exchange -> sender.expect(exchange.thenAccept(this::abandon))
        : exchange -> exchange.cancel(true);
  }

  private void abandon(List<Asked> asked, BatchDecideResponse response) {
    for (int i = 0; i < Math.min(asked.size(), response.getResultsCount()); i++) {
      if (asked.get(i).ours()) {
        abandon(response.getResults(i).getResponse());
      }
    }
  }

  private void abandon(DecideResponse response) {
    if (response.hasTicket()) {
      sender.takeOver(RecordRequest.of(Wire.decision(response), Outcome.NEVER_SENT));
    }
  }
}
