package dev.keyturn.client;

import dev.keyturn.v1.BatchRecordRequest;
import dev.keyturn.v1.BatchRecordResponse;
import dev.keyturn.v1.RoutingServiceGrpc;
import io.grpc.Status;
import java.lang.System.Logger.Level;
import java.time.Duration;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Deque;
import java.util.HashSet;
import java.util.Iterator;
import java.util.List;
import java.util.Set;
import java.util.concurrent.CancellationException;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;
import java.util.function.Consumer;

/** Records in the background: a queue, and the one thread that works on it. */
final class Sender {
  private static final int BATCH = 100;

  /** What the sidecar takes in one batch, less what stands around the records. */
  private static final int BATCH_BYTES = 1_000_000;

  private static final Duration BATCH_TIMEOUT = Duration.ofSeconds(10);
  private static final System.Logger LOG = System.getLogger("dev.keyturn.client");

  private final Connection connection;
  private final Retries retries;
  private final int size;
  private final Consumer<Unsent> onUnsent;
  private final Set<CompletableFuture<?>> expected = ConcurrentHashMap.newKeySet();

  // All guarded by `this`. Records stay in the queue until they are sent or unsent.
  private final Deque<Queued> queue = new ArrayDeque<>();
  private final List<Flush> flushes = new ArrayList<>();
  private long queued;
  private boolean closing;
  private boolean over;
  private List<Unsent> left = List.of();
  private Thread thread;

  Sender(Connection connection, Options options) {
    this.connection = connection;
    this.retries = options.retries();
    this.size = options.queueSize();
    this.onUnsent = options.onUnsent() != null ? options.onUnsent() : Sender::log;
  }

  /**
   * Takes a record of the caller's.
   *
   * @throws QueueFullException when there is no room
   * @throws IllegalStateException when the client is closed
   * @throws IllegalArgumentException for a record that no batch can hold
   */
  synchronized void add(RecordRequest record) {
    if (closing) {
      throw Connection.closed();
    }
    put(record);
  }

  /** Takes a record that is nobody's any more: what cannot be sent is unsent. */
  void takeOver(RecordRequest record) {
    try {
      synchronized (this) {
        if (over) {
          throw Connection.closed();
        }
        put(record);
      }
    } catch (IllegalArgumentException | IllegalStateException | QueueFullException error) {
      report(new Unsent(record, error));
    }
  }

  /** Something that goes on in the background, and may add a record when it ends. */
  void expect(CompletableFuture<?> running) {
    expected.add(running);
    running.whenComplete((done, error) -> expected.remove(running));
  }

  /** Completes when what is queued and expected now is sent or unsent. */
  CompletableFuture<Void> flush() {
    CompletableFuture<?>[] before =
        expected.stream()
            .map(each -> each.handle((done, error) -> null))
            .toArray(CompletableFuture<?>[]::new);
    return CompletableFuture.allOf(before).thenCompose(done -> flushQueue());
  }

  /**
   * Takes no more from callers, goes on for up to {@code timeout}, and then gives up.
   *
   * @return what was left, the same for whoever closes again
   */
  List<Unsent> close(Duration timeout) {
    synchronized (this) {
      closing = true;
    }
    try {
      flush().get(Attempts.nanos(timeout), TimeUnit.NANOSECONDS);
    } catch (InterruptedException interrupted) {
      Thread.currentThread().interrupt();
    } catch (TimeoutException | ExecutionException notAll) {
      // What is left is told below.
    }
    return giveUp();
  }

  private List<Unsent> giveUp() {
    List<Unsent> unsent = new ArrayList<>();
    synchronized (this) {
      closing = true;
      if (over) {
        return left;
      }
      over = true;
      for (Queued each : queue) {
        if (!each.taken) {
          RuntimeException error = each.error != null ? each.error : Connection.closed();
          unsent.add(new Unsent(each.record, error));
        }
      }
      left = List.copyOf(unsent);
      queue.clear();
      completeFlushes();
      notifyAll();
    }
    unsent.forEach(this::report);
    return left;
  }

  private synchronized CompletableFuture<Void> flushQueue() {
    Flush flush = new Flush(queued, new CompletableFuture<>());
    flushes.add(flush);
    completeFlushes();
    return flush.done;
  }

  private void put(RecordRequest record) {
    if (queue.size() >= size) {
      throw new QueueFullException(size);
    }
    Queued entry = new Queued(++queued, record, Wire.recordRequest(record));
    if (entry.bytes() > BATCH_BYTES) {
      throw new IllegalArgumentException("a record has at most " + BATCH_BYTES + " bytes");
    }
    queue.addLast(entry);
    if (thread == null) {
      thread = new Thread(this::run, "keyturn-sender");
      thread.setDaemon(true);
      thread.start();
    }
    notifyAll();
  }

  private void run() {
    int failures = 0;
    List<Queued> batch;
    try {
      while ((batch = next()) != null) {
        Duration asked = send(batch);
        if (asked == null) {
          failures = 0;
        } else {
          failures++;
          long jitter = Attempts.upTo(Attempts.backoff(retries, failures));
          pause(Attempts.nanos(asked) + jitter);
        }
      }
    } catch (InterruptedException unasked) {
      // Nobody interrupts this thread but whoever tears down all of them.
      giveUp();
    }
  }

  /** The oldest records, as many as fit in a batch; null when there is nothing more to do. */
  private synchronized List<Queued> next() throws InterruptedException {
    while (queue.isEmpty() && !over) {
      wait();
    }
    if (over) {
      return null;
    }
    List<Queued> batch = new ArrayList<>();
    int bytes = 0;
    for (Queued each : queue) {
      bytes += each.bytes();
      if (batch.size() == BATCH || !batch.isEmpty() && bytes > BATCH_BYTES) {
        break;
      }
      batch.add(each);
    }
    return batch;
  }

  /**
   * Sends once.
   *
   * @return null when all are sent or unsent; else how long the sidecar asks to wait
   */
  private Duration send(List<Queued> batch) {
    BatchRecordRequest request =
        Wire.recordRequests(batch.stream().map(each -> each.message).toList());
    List<Result<Recorded>> results;
    try {
      BatchRecordResponse response =
          Answer.await(
              connection.beginOnce(
                  RoutingServiceGrpc.getBatchRecordMethod(), request, BATCH_TIMEOUT));
      results = Wire.results(response, batch.size());
    } catch (KeyturnException error) {
      results = batch.stream().map(each -> Result.<Recorded>failed(error)).toList();
    } catch (CancellationException interrupted) {
      return Duration.ZERO; // the pause that follows finds the interrupt
    } catch (IllegalStateException closed) {
      return null; // giveUp() has them
    } catch (RuntimeException defect) {
      // By its class alone, as ever. A thread that died of it would leave all the others.
      Fault fault = Fault.of(Status.Code.INTERNAL, "A defect: " + defect.getClass().getName());
      results = batch.stream().map(each -> Result.<Recorded>failed(fault.exception())).toList();
    }
    Duration wait = null;
    Set<Queued> done = new HashSet<>();
    for (int i = 0; i < batch.size(); i++) {
      Queued each = batch.get(i);
      KeyturnException error = results.get(i).error();
      if (error == null) {
        done.add(each);
      } else if (isWorthTrying(error)) {
        each.error = error;
        Duration asked = error.retryAfter() != null ? error.retryAfter() : Duration.ZERO;
        wait = wait == null || asked.compareTo(wait) > 0 ? asked : wait;
      } else if (take(each)) {
        report(new Unsent(each.record, error));
        done.add(each);
      }
    }
    settled(done);
    return wait;
  }

  private static boolean isWorthTrying(KeyturnException error) {
    return error instanceof UnavailableException || error.code() == Status.Code.RESOURCE_EXHAUSTED;
  }

  /** Whether to report it here: {@link #giveUp} has not. */
  private synchronized boolean take(Queued entry) {
    entry.taken = !over;
    return entry.taken;
  }

  private synchronized void settled(Set<Queued> done) {
    Iterator<Queued> oldest = queue.iterator();
    for (int left = done.size(); left > 0 && oldest.hasNext(); ) {
      if (done.contains(oldest.next())) {
        oldest.remove();
        left--;
      }
    }
    completeFlushes();
  }

  private synchronized void completeFlushes() {
    flushes.removeIf(
        flush -> (queue.isEmpty() || queue.peekFirst().number > flush.last) && complete(flush));
  }

  private static boolean complete(Flush flush) {
    // Elsewhere: what depends on it is the caller's own code, and may call back.
    flush.done.completeAsync(() -> null);
    return true;
  }

  private synchronized void pause(long nanos) throws InterruptedException {
    long ends = System.nanoTime() + nanos;
    for (long left = nanos; left > 0 && !over; left = ends - System.nanoTime()) {
      TimeUnit.NANOSECONDS.timedWait(this, left);
    }
  }

  private void report(Unsent unsent) {
    try {
      onUnsent.accept(unsent);
    } catch (RuntimeException | Error defect) {
      // By its class alone: its text may have the record's own.
      LOG.log(Level.WARNING, "onUnsent threw {0}", defect.getClass().getName());
    }
  }

  private static void log(Unsent unsent) {
    LOG.log(
        Level.WARNING,
        "a record was not sent: outcome {0}: {1}",
        unsent.record().outcome(),
        unsent.error().getMessage());
  }

  private static final class Queued {
    private final long number;
    private final RecordRequest record;
    private final dev.keyturn.v1.RecordRequest message;
    private KeyturnException error; // of the last try
    private boolean taken;

    private Queued(long number, RecordRequest record, dev.keyturn.v1.RecordRequest message) {
      this.number = number;
      this.record = record;
      this.message = message;
    }

    private int bytes() {
      return message.getSerializedSize();
    }
  }

  private record Flush(long last, CompletableFuture<Void> done) {}
}
