package dev.keyturn.client;

import com.google.protobuf.Any;
import com.google.protobuf.Message;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import dev.keyturn.v1.BatchDecideRequest;
import dev.keyturn.v1.BatchDecideResponse;
import dev.keyturn.v1.BatchRecordRequest;
import dev.keyturn.v1.BatchRecordResponse;
import dev.keyturn.v1.BatchRecordResult;
import dev.keyturn.v1.DecideResponse;
import dev.keyturn.v1.ExplainRequest;
import dev.keyturn.v1.ExplainResponse;
import dev.keyturn.v1.RecordResponse;
import dev.keyturn.v1.RedeemRequest;
import dev.keyturn.v1.RedeemResponse;
import dev.keyturn.v1.RoutingServiceGrpc;
import io.grpc.Context;
import io.grpc.Contexts;
import io.grpc.InsecureServerCredentials;
import io.grpc.Metadata;
import io.grpc.Server;
import io.grpc.ServerCall;
import io.grpc.ServerCallHandler;
import io.grpc.ServerCredentials;
import io.grpc.ServerInterceptor;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.netty.shaded.io.grpc.netty.NettyServerBuilder;
import io.grpc.netty.shaded.io.netty.channel.ChannelOption;
import io.grpc.netty.shaded.io.netty.channel.EventLoopGroup;
import io.grpc.netty.shaded.io.netty.channel.MultiThreadIoEventLoopGroup;
import io.grpc.netty.shaded.io.netty.channel.nio.NioIoHandler;
import io.grpc.netty.shaded.io.netty.channel.socket.nio.NioServerDomainSocketChannel;
import io.grpc.netty.shaded.io.netty.channel.socket.nio.NioServerSocketChannel;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.StreamObserver;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.net.InetSocketAddress;
import java.net.SocketAddress;
import java.net.UnixDomainSocketAddress;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.List;
import java.util.Queue;
import java.util.concurrent.ConcurrentLinkedQueue;
import java.util.concurrent.CopyOnWriteArrayList;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.TimeUnit;
import java.util.function.Function;
import java.util.function.Supplier;

/** A real gRPC server that answers what a test says, in turn, and keeps what it was asked. */
final class ScriptedSidecar extends RoutingServiceGrpc.RoutingServiceImplBase
    implements AutoCloseable {
  static final String HANDLE = "kth1_0123456789abcdefghijklmnopqrstuvwxyz";
  static final String TICKET = "ktt1_0123456789abcdefghijklmnopqrstuvwxyz";
  static final String SECRET = "sk-the-secret-of-the-user-1234";

  final List<Message> asked = new CopyOnWriteArrayList<>();
  final List<Metadata> headers = new CopyOnWriteArrayList<>();
  final List<String> authorities = new CopyOnWriteArrayList<>();
  final List<Context> contexts = new CopyOnWriteArrayList<>();
  private final Queue<Function<Message, Message>> script = new ConcurrentLinkedQueue<>();
  private final EventLoopGroup group =
      new MultiThreadIoEventLoopGroup(1, NioIoHandler.newFactory());
  private final ExecutorService handlers = Executors.newCachedThreadPool();
  private final Path directory;
  private final Path socket;
  private volatile Supplier<DecideResponse> decisions = ScriptedSidecar::ticket;
  private Server server;
  private int port;

  private ScriptedSidecar(Path directory) {
    this.directory = directory;
    this.socket = directory.resolve("k.sock");
  }

  /** On a Unix socket in a directory of its own. */
  static ScriptedSidecar onSocket() {
    ScriptedSidecar sidecar = notYet();
    sidecar.listen();
    return sidecar;
  }

  /** On a Unix socket, after {@link #listen()}. */
  static ScriptedSidecar notYet() {
    try {
      return new ScriptedSidecar(Files.createTempDirectory("kt"));
    } catch (IOException error) {
      throw new UncheckedIOException(error);
    }
  }

  static ScriptedSidecar onLoopback() {
    return onLoopback(InsecureServerCredentials.create());
  }

  static ScriptedSidecar onLoopback(ServerCredentials credentials) {
    ScriptedSidecar sidecar = notYet();
    sidecar.server =
        sidecar.start(
            new InetSocketAddress("127.0.0.1", 0), NioServerSocketChannel.class, credentials);
    sidecar.port = sidecar.server.getPort();
    return sidecar;
  }

  void listen() {
    server =
        start(
            UnixDomainSocketAddress.of(socket),
            NioServerDomainSocketChannel.class,
            InsecureServerCredentials.create());
  }

  void stopListening() {
    try {
      server.shutdownNow().awaitTermination(10, TimeUnit.SECONDS);
      Files.deleteIfExists(socket);
    } catch (InterruptedException | IOException error) {
      throw new IllegalStateException(error);
    }
  }

  String target() {
    return port > 0 ? "127.0.0.1:" + port : "unix:" + socket;
  }

  KeyturnClient client() {
    return KeyturnClient.create(options().build());
  }

  /** Options that reach this sidecar, and that a slow machine does not break. */
  Options.Builder options() {
    return Options.builder()
        .target(target())
        .timeout(Duration.ofSeconds(30))
        .retries(new Retries(5, Duration.ofMillis(1), Duration.ofMillis(5)));
  }

  /** What the next call is answered, of whatever method. */
  ScriptedSidecar answers(Message... answers) {
    for (Message answer : answers) {
      script.add(asked -> answer);
    }
    return this;
  }

  /** What the next calls end with. */
  ScriptedSidecar fails(int times, Supplier<StatusRuntimeException> status) {
    for (int i = 0; i < times; i++) {
      does(
          asked -> {
            throw status.get();
          });
    }
    return this;
  }

  /** What decisions are answered where the script says nothing; without this, a ticket. */
  void decides(Supplier<DecideResponse> each) {
    decisions = each;
  }

  ScriptedSidecar does(Function<Message, Message> next) {
    script.add(next);
    return this;
  }

  @SuppressWarnings("unchecked")
  <M extends Message> List<M> asked(Class<M> kind) {
    return (List<M>) asked.stream().filter(kind::isInstance).toList();
  }

  /** The records that came in batches, in order. */
  List<dev.keyturn.v1.RecordRequest> batched() {
    return asked(BatchRecordRequest.class).stream()
        .flatMap(batch -> batch.getRequestsList().stream())
        .toList();
  }

  // ------------------------------------------------------------------------- answers

  static DecideResponse key() {
    return DecideResponse.newBuilder()
        .setDecisionId("d1")
        .setMode(dev.keyturn.v1.Mode.MODE_BYOK_FIRST)
        .setReason(dev.keyturn.v1.Reason.REASON_BYOK_FIRST_OWN_KEY)
        .setKey(
            dev.keyturn.v1.KeyHandle.newBuilder()
                .setHandle(HANDLE)
                .setSecret(SECRET)
                .setHint("1234")
                .setProvider("openai")
                .setBaseUrl("https://api.openai.com/v1")
                .setAuth(
                    dev.keyturn.v1.KeyHandle.Auth.newBuilder()
                        .setHeader("Authorization")
                        .setPrefix("Bearer ")))
        .build();
  }

  static DecideResponse ticket() {
    return DecideResponse.newBuilder()
        .setDecisionId("d2")
        .setTicket(dev.keyturn.v1.CreditTicket.newBuilder().setTicket(TICKET).setHoldMicros(50_000))
        .build();
  }

  static DecideResponse denial() {
    return DecideResponse.newBuilder()
        .setDecisionId("d3")
        .setMessage("Nobody pays.")
        .setReason(dev.keyturn.v1.Reason.REASON_DENIED)
        .setDenial(
            dev.keyturn.v1.Denial.newBuilder()
                .setReason(dev.keyturn.v1.DenialReason.DENIAL_REASON_INSUFFICIENT_CREDITS))
        .build();
  }

  static RecordResponse recorded() {
    return RecordResponse.newBuilder().setRecordId("d2").setChargedMicros(7).build();
  }

  /** UNAVAILABLE as a sidecar says it. */
  static StatusRuntimeException storeDown() {
    return status(
        Status.Code.UNAVAILABLE,
        "The database cannot be reached.",
        Any.pack(ErrorInfo.newBuilder().setReason("STORE_UNAVAILABLE").build()));
  }

  /** UNAVAILABLE as a transport says it. */
  static StatusRuntimeException gone() {
    return Status.UNAVAILABLE.withDescription("gone").asRuntimeException();
  }

  static Any retryAfter(Duration wait) {
    return Any.pack(
        RetryInfo.newBuilder()
            .setRetryDelay(
                com.google.protobuf.Duration.newBuilder()
                    .setSeconds(wait.getSeconds())
                    .setNanos(wait.getNano()))
            .build());
  }

  static StatusRuntimeException status(Status.Code code, String message, Any... details) {
    return StatusProto.toStatusRuntimeException(
        com.google.rpc.Status.newBuilder()
            .setCode(code.value())
            .setMessage(message)
            .addAllDetails(List.of(details))
            .build());
  }

  // ------------------------------------------------------------------------- the service

  @Override
  public void decide(dev.keyturn.v1.DecideRequest request, StreamObserver<DecideResponse> to) {
    answer(request, to, DecideResponse.class, decisions.get());
  }

  @Override
  public void record(dev.keyturn.v1.RecordRequest request, StreamObserver<RecordResponse> to) {
    answer(request, to, RecordResponse.class, recorded());
  }

  @Override
  public void redeem(RedeemRequest request, StreamObserver<RedeemResponse> to) {
    RedeemResponse usual = RedeemResponse.newBuilder().setSecret(SECRET).build();
    answer(request, to, RedeemResponse.class, usual);
  }

  @Override
  public void explain(ExplainRequest request, StreamObserver<ExplainResponse> to) {
    answer(request, to, ExplainResponse.class, ExplainResponse.getDefaultInstance());
  }

  @Override
  public void batchDecide(BatchDecideRequest request, StreamObserver<BatchDecideResponse> to) {
    answer(request, to, BatchDecideResponse.class, BatchDecideResponse.getDefaultInstance());
  }

  @Override
  public void batchRecord(BatchRecordRequest request, StreamObserver<BatchRecordResponse> to) {
    BatchRecordResponse.Builder usual = BatchRecordResponse.newBuilder();
    for (int i = 0; i < request.getRequestsCount(); i++) {
      usual.addResults(BatchRecordResult.newBuilder().setResponse(recorded()));
    }
    answer(request, to, BatchRecordResponse.class, usual.build());
  }

  private <R extends Message> void answer(
      Message request, StreamObserver<R> to, Class<R> kind, R usual) {
    asked.add(request);
    contexts.add(Context.current());
    Function<Message, Message> next = script.poll();
    try {
      to.onNext(next == null ? usual : kind.cast(next.apply(request)));
      to.onCompleted();
    } catch (StatusRuntimeException status) {
      to.onError(status);
    }
  }

  private Server start(
      SocketAddress address,
      Class<? extends io.grpc.netty.shaded.io.netty.channel.ServerChannel> kind,
      ServerCredentials credentials) {
    try {
      return NettyServerBuilder.forAddress(address, credentials)
          .channelType(kind)
          .withChildOption(ChannelOption.SO_KEEPALIVE, null)
          .bossEventLoopGroup(group)
          .workerEventLoopGroup(group)
          .executor(handlers)
          .intercept(new Listening())
          .addService(this)
          .build()
          .start();
    } catch (IOException error) {
      throw new UncheckedIOException(error);
    }
  }

  private final class Listening implements ServerInterceptor {
    @Override
    public <Q, R> ServerCall.Listener<Q> interceptCall(
        ServerCall<Q, R> call, Metadata metadata, ServerCallHandler<Q, R> next) {
      headers.add(metadata);
      authorities.add(String.valueOf(call.getAuthority()));
      return Contexts.interceptCall(Context.current(), call, metadata, next);
    }
  }

  @Override
  public void close() {
    if (server != null) {
      stopListening();
    }
    handlers.shutdownNow();
    try {
      handlers.awaitTermination(10, TimeUnit.SECONDS);
      group.shutdownGracefully(0, 0, TimeUnit.SECONDS);
      Files.delete(directory);
    } catch (InterruptedException | IOException error) {
      throw new IllegalStateException(error);
    }
  }
}
