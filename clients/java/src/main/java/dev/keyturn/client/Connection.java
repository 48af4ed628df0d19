package dev.keyturn.client;

import io.grpc.CallOptions;
import io.grpc.ChannelCredentials;
import io.grpc.ClientCall;
import io.grpc.ConnectivityState;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.TlsChannelCredentials;
import io.grpc.netty.shaded.io.grpc.netty.NettyChannelBuilder;
import io.grpc.netty.shaded.io.netty.channel.ChannelOption;
import io.grpc.netty.shaded.io.netty.channel.EventLoopGroup;
import io.grpc.netty.shaded.io.netty.channel.MultiThreadIoEventLoopGroup;
import io.grpc.netty.shaded.io.netty.channel.nio.NioIoHandler;
import io.grpc.netty.shaded.io.netty.channel.socket.nio.NioDomainSocketChannel;
import io.grpc.netty.shaded.io.netty.channel.socket.nio.NioSocketChannel;
import io.grpc.netty.shaded.io.netty.util.concurrent.DefaultThreadFactory;
import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.net.SocketAddress;
import java.net.UnixDomainSocketAddress;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.Set;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.TimeUnit;
import java.util.regex.Pattern;

/** The channel to the sidecar, the metadata of every call, and whether the sidecar is down. */
final class Connection {
  /** That of pom.xml. */
  static final String VERSION = "0.1.0";

  private static final Pattern TOKEN = Pattern.compile("[!-~]+");
  private static final Metadata.Key<String> AUTHORIZATION =
      Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);
  private static final String USER_AGENT = "keyturn-java/" + VERSION;
  private static final int MAX_METADATA_BYTES = 64 * 1024;
  private static final long FIRST_RECONNECT = TimeUnit.MILLISECONDS.toNanos(100);
  private static final long LAST_RECONNECT = TimeUnit.SECONDS.toNanos(1);

  private final Target target;
  private final Secret authorization;
  private final EventLoopGroup group;
  private final ManagedChannel channel;
  private final Set<Exchange<?, ?>> running = ConcurrentHashMap.newKeySet();
  private volatile boolean closing;
  private volatile boolean closed;
  private volatile boolean down;
  private volatile long reconnectDelay = FIRST_RECONNECT;
  private long reconnectAt = System.nanoTime();

  /**
   * Opens nothing yet.
   *
   * @throws IllegalArgumentException for options that cannot work, by their name
   */
  Connection(Options options) {
    target = Target.of(options.target(), System::getenv);
    if ((options.privateKey() == null) != (options.certificateChain() == null)) {
      throw new IllegalArgumentException(
          "a client certificate takes both privateKey and certificateChain");
    }
    if (target.socket() != null && options.tls()) {
      throw new IllegalArgumentException(
          target.text() + ": a Unix socket does not speak TLS: leave out tls and certificates");
    }
    if (!target.isLoopback() && !options.tls()) {
      throw new IllegalArgumentException(
          target.text()
              + " is not this machine: give tls or rootCertificates, so that keys and tokens do"
              + " not cross the network in plain text");
    }
    authorization = authorization(options.token());
    ChannelCredentials credentials = credentials(options);
    group =
        new MultiThreadIoEventLoopGroup(
            1, new DefaultThreadFactory("keyturn", true), NioIoHandler.newFactory());
    try {
      channel = channel(credentials);
    } catch (IllegalArgumentException unreadable) {
      // The library's error may show what it read.
      group.shutdownGracefully(0, 0, TimeUnit.SECONDS);
      throw new IllegalArgumentException(
          "rootCertificates, certificateChain or privateKey does not go with the others");
    }
  }

  Target target() {
    return target;
  }

  /** Begins a call. */
  <Q, R> Exchange<Q, R> begin(
      MethodDescriptor<Q, R> method, Q request, Retries retries, Duration timeout) {
    Attempts attempts = new Attempts(retries, timeout);
    return begin(new Exchange<>(this, method, request, attempts, true), closing);
  }

  /**
   * Begins one attempt of something that the background tries without end. It is taken while
   * closing, and never finds out that the sidecar is down.
   */
  <Q, R> Exchange<Q, R> beginOnce(MethodDescriptor<Q, R> method, Q request, Duration timeout) {
    Attempts once = new Attempts(Retries.of(1), timeout);
    return begin(new Exchange<>(this, method, request, once, false), false);
  }

  private <Q, R> Exchange<Q, R> begin(Exchange<Q, R> exchange, boolean refused) {
    running.add(exchange);
    exchange.whenComplete((answer, error) -> running.remove(exchange));
    if (refused || closed) {
      exchange.completeExceptionally(closed());
    } else {
      exchange.attempt();
    }
    return exchange;
  }

  <Q, R> ClientCall<Q, R> call(MethodDescriptor<Q, R> method, long nanosLeft) {
    reconnect();
    return channel.newCall(
        method,
        CallOptions.DEFAULT
            .withDeadlineAfter(nanosLeft, TimeUnit.NANOSECONDS)
            .withExecutor(Runnable::run)); // what follows an answer is short, and never blocks
  }

  Metadata headers() {
    Metadata headers = new Metadata();
    if (authorization != null) {
      headers.put(AUTHORIZATION, authorization.reveal());
    }
    return headers;
  }

  boolean isDown() {
    return down;
  }

  void setDown(boolean value) {
    down = value;
    if (!value) {
      reconnectDelay = FIRST_RECONNECT;
    }
  }

  boolean isClosing() {
    return closing;
  }

  /** Takes no new calls but those of the background. */
  void closing() {
    closing = true;
  }

  /** Ends all calls, as closed, and lets go of the channel and its thread. */
  void close() {
    closed = true;
    running.forEach(exchange -> exchange.completeExceptionally(closed()));
    channel.shutdownNow();
    try {
      channel.awaitTermination(1, TimeUnit.SECONDS);
    } catch (InterruptedException interrupted) {
      Thread.currentThread().interrupt();
    }
    group.shutdownGracefully(0, 1, TimeUnit.SECONDS);
  }

  static IllegalStateException closed() {
    return new IllegalStateException("the client is closed");
  }

  // The library waits up to two minutes between connections. Whoever calls in the meantime begins
  // a new one here, and waits for it.
  private void reconnect() {
    if (channel.getState(false) != ConnectivityState.TRANSIENT_FAILURE) {
      return;
    }
    synchronized (this) {
      long now = System.nanoTime();
      if (now - reconnectAt < 0) {
        return;
      }
      reconnectAt = now + reconnectDelay;
      reconnectDelay = Math.min(2 * reconnectDelay, LAST_RECONNECT);
    }
    channel.enterIdle();
  }

  private ManagedChannel channel(ChannelCredentials credentials) {
    NettyChannelBuilder builder;
    if (target.socket() != null) {
      builder =
          NettyChannelBuilder.forAddress(UnixDomainSocketAddress.of(target.socket()), credentials)
              .channelType(NioDomainSocketChannel.class, UnixDomainSocketAddress.class)
              .withOption(ChannelOption.SO_KEEPALIVE, null) // unknown there, and warned about
              .overrideAuthority("localhost");
    } else {
      builder =
          NettyChannelBuilder.forAddress(target.host(), target.port(), credentials)
              .channelType(NioSocketChannel.class);
    }
    if (target.isLoopback()) {
      builder.proxyDetector((SocketAddress address) -> null);
    } else {
      // A peer that vanished without a word is noticed by pings, not by TCP after minutes.
      builder
          .keepAliveTime(30, TimeUnit.SECONDS)
          .keepAliveTimeout(5, TimeUnit.SECONDS)
          .keepAliveWithoutCalls(true);
    }
    return builder
        .eventLoopGroup(group)
        .userAgent(USER_AGENT)
        .maxInboundMetadataSize(MAX_METADATA_BYTES)
        .disableRetry() // one retry policy: ours
        .disableServiceConfigLookUp()
        .build();
  }

  private static ChannelCredentials credentials(Options options) {
    if (!options.tls()) {
      return InsecureChannelCredentials.create();
    }
    TlsChannelCredentials.Builder tls = TlsChannelCredentials.newBuilder();
    try {
      if (options.rootCertificates() != null) {
        tls.trustManager(pem(options.rootCertificates()));
      }
      if (options.privateKey() != null) {
        tls.keyManager(pem(options.certificateChain()), pem(options.privateKey()));
      }
    } catch (IOException impossible) {
      throw new AssertionError("a stream of bytes in memory does not fail");
    }
    return tls.build();
  }

  private static InputStream pem(Secret pem) {
    return new ByteArrayInputStream(pem.reveal().getBytes(StandardCharsets.ISO_8859_1));
  }

  private static Secret authorization(Secret token) {
    if (token == null) {
      return null;
    }
    String text = token.reveal().strip();
    if (!TOKEN.matcher(text).matches()) {
      throw new IllegalArgumentException("token is printable ASCII without spaces, and not empty");
    }
    return Secret.of("Bearer " + text);
  }
}
