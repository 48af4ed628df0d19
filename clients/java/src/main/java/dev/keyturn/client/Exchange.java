package dev.keyturn.client;

import io.grpc.ClientCall;
import io.grpc.Context;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.Status;
import java.util.OptionalLong;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.TimeUnit;

/**
 * One call with all its attempts. Completes on the channel's thread; cancelling it ends the call.
 */
final class Exchange<Q, R> extends CompletableFuture<R> {
  private final Connection connection;
  private final MethodDescriptor<Q, R> method;
  private final Q request;
  private final Attempts attempts;
  private final boolean findsDown;
  private volatile ClientCall<Q, R> call;

  Exchange(
      Connection connection,
      MethodDescriptor<Q, R> method,
      Q request,
      Attempts attempts,
      boolean findsDown) {
    this.connection = connection;
    this.method = method;
    this.request = request;
    this.attempts = attempts;
    this.findsDown = findsDown;
    whenComplete((answer, error) -> stop());
  }

  void attempt() {
    if (isDone()) {
      return;
    }
    // Apart from the caller's own context: its deadline and end are not those of this call.
    Context caller = Context.ROOT.attach();
    try {
      ClientCall<Q, R> next = connection.call(method, attempts.left());
      call = next;
      next.start(new Listener(), connection.headers());
      next.request(2); // two, so that a second answer would be noticed
      next.sendMessage(request);
      next.halfClose();
    } catch (RuntimeException defect) {
      completeExceptionally(defect);
    } finally {
      Context.ROOT.detach(caller);
    }
    if (isDone()) {
      stop();
    }
  }

  private void stop() {
    ClientCall<Q, R> current = call;
    if (current != null) {
      current.cancel("nobody waits for the answer", null);
    }
  }

  private void ended(Status status, Metadata trailers, R answer) {
    if (isDone()) {
      return; // cancelled or closed: what the library says about that is no answer
    }
    if (status.isOk() && answer != null) {
      connection.setDown(false);
      complete(answer);
      return;
    }
    Fault fault =
        status.isOk()
            ? Fault.of(Status.Code.INTERNAL, "The call ended well without an answer.")
            : Fault.of(status, trailers);
    if (!fault.fromTransport()) {
      connection.setDown(false);
    }
    OptionalLong wait = attempts.waitAfter(fault, connection.isDown());
    if (wait.isPresent()) {
      CompletableFuture.delayedExecutor(wait.getAsLong(), TimeUnit.NANOSECONDS, Runnable::run)
          .execute(this::attempt);
      return;
    }
    if (findsDown && fault.fromTransport() && fault.code() == Status.Code.UNAVAILABLE) {
      connection.setDown(true);
    }
    completeExceptionally(fault.exception());
  }

  private final class Listener extends ClientCall.Listener<R> {
    private R answer;

    @Override
    public void onMessage(R message) {
      answer = message;
    }

    @Override
    public void onClose(Status status, Metadata trailers) {
      ended(status, trailers, answer);
    }
  }
}
