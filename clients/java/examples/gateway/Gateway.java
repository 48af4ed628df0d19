import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParseException;
import com.google.gson.JsonParser;
import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import dev.keyturn.client.Call;
import dev.keyturn.client.DecideRequest;
import dev.keyturn.client.DeniedException;
import dev.keyturn.client.Failure;
import dev.keyturn.client.KeyturnClient;
import dev.keyturn.client.KeyturnException;
import dev.keyturn.client.NotFoundException;
import dev.keyturn.client.Note;
import dev.keyturn.client.Outcome;
import dev.keyturn.client.UnavailableException;
import dev.keyturn.client.Usage;
import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.io.OutputStream;
import java.net.ConnectException;
import java.net.InetSocketAddress;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpConnectTimeoutException;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.CancellationException;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CompletionStage;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Flow;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;

/**
 * A gateway to OpenAI's chat completions, to begin from: the user's own key pays, or the
 * platform's.
 *
 * <p>Configured by the environment: {@code KEYTURN_ADDRESS}, {@code LISTEN} (127.0.0.1:0), {@code
 * OPENAI_API_KEY}, {@code OPENAI_BASE_URL}.
 */
public final class Gateway {
  private static final String ENDPOINT = "/v1/chat/completions";
  private static final Duration PATIENCE = Duration.ofSeconds(60);
  private static final Duration HEARTBEAT = Duration.ofSeconds(1);
  private static final int MOST_KEYS = 3;
  private static final List<Outcome> KEY_IS_OUT =
      List.of(Outcome.AUTH_REJECTED, Outcome.RATE_LIMITED, Outcome.PROVIDER_BILLING);

  private final KeyturnClient keyturn = KeyturnClient.create();
  private final HttpClient http =
      HttpClient.newBuilder()
          .version(HttpClient.Version.HTTP_1_1)
          .connectTimeout(Duration.ofSeconds(10))
          .build();
  private final String platformUrl = environment("OPENAI_BASE_URL", "https://api.openai.com/v1");
  private final Map<String, String> platformKey =
      Map.of("Authorization", "Bearer " + environment("OPENAI_API_KEY", ""));

  private Gateway() {}

  /** Listens until SIGTERM. */
  public static void main(String[] arguments) throws IOException {
    System.setProperty("sun.net.httpserver.nodelay", "true");
    String listen = environment("LISTEN", "127.0.0.1:0");
    int colon = listen.lastIndexOf(':');
    String host = listen.substring(0, colon);
    InetSocketAddress address =
        new InetSocketAddress(host, Integer.parseInt(listen.substring(colon + 1)));

    Gateway gateway = new Gateway();
    ExecutorService handlers = Executors.newCachedThreadPool();
    HttpServer server = HttpServer.create(address, 0);
    server.setExecutor(handlers);
    server.createContext(ENDPOINT, gateway::chatCompletions);
    server.createContext("/healthz", exchange -> reply(exchange, 200, "text/plain", bytes("ok\n")));
    server.start();
    Runtime.getRuntime().addShutdownHook(new Thread(() -> gateway.stop(server, handlers)));
    System.out.println("listening on http://" + host + ":" + server.getAddress().getPort());
  }

  private void stop(HttpServer server, ExecutorService handlers) {
    handlers.shutdownNow(); // calls that still run end as cancelled
    try {
      handlers.awaitTermination(2, TimeUnit.SECONDS);
    } catch (InterruptedException unasked) {
      Thread.currentThread().interrupt();
    }
    keyturn.close();
    server.stop(0);
    Runtime.getRuntime().halt(0);
  }

  /** One request. An {@code IOException} makes the server cut the caller's connection. */
  private void chatCompletions(HttpExchange exchange) throws IOException {
    try {
      String user = bearerToken(exchange);
      if (user == null) {
        fail(exchange, 401, "Send your user id as the bearer token.", "unauthenticated");
      } else if (!exchange.getRequestMethod().equals("POST")) {
        fail(exchange, 405, "Use POST.", "method_not_allowed");
      } else {
        serve(exchange, user);
      }
    } catch (DeniedException denied) {
      deny(exchange, denied);
    } catch (UnavailableException down) {
      exchange.getResponseHeaders().set("retry-after", "1");
      fail(exchange, 503, "The sidecar is out of reach.", "sidecar_unavailable");
    } catch (NotFoundException unknown) {
      fail(exchange, 401, "There is no such user.", "unknown_user");
    } catch (KeyturnException fault) {
      fail(exchange, 500, fault.message(), fault.reason().toLowerCase(Locale.ROOT));
    } catch (InterruptedException | CancellationException ending) {
      throw new BrokenOffException();
    }
  }

  private void serve(HttpExchange exchange, String user) throws IOException, InterruptedException {
    byte[] body = exchange.getRequestBody().readAllBytes();
    JsonObject asked = object(body);
    if (asked == null || !asked.has("model")) {
      fail(exchange, 400, "The body is no chat completion request.", "invalid_request");
      return;
    }
    int size = body.length;
    if (flag(asked, "stream")) {
      JsonObject options = child(asked, "stream_options");
      options = options == null ? new JsonObject() : options;
      options.addProperty("include_usage", true);
      asked.add("stream_options", options);
      body = bytes(asked.toString());
    }
    try (Call call = keyturn.request(question(user, asked, size))) {
      proxy(exchange, call, body);
    }
  }

  private static DecideRequest question(String user, JsonObject asked, int size) {
    DecideRequest.Builder request =
        DecideRequest.builder(user, "openai")
            .model(asked.get("model").getAsString())
            .serviceType("gateway");
    Long limit = number(asked, "max_completion_tokens");
    limit = limit == null ? number(asked, "max_tokens") : limit;
    if (limit != null) {
      request.maxOutputTokens(limit).inputTokens(size / 4);
    }
    return request.build();
  }

  /**
   * Sends the body with the credential that pays, and again with the next when a key is refused.
   */
  private void proxy(HttpExchange exchange, Call call, byte[] body)
      throws IOException, InterruptedException {
    for (int keys = 1; ; keys++) {
      Answer answer = send(exchange, call, body);
      if (answer == null) {
        return;
      }
      if (answer.status() < 300 && answer.isStream()) {
        stream(exchange, call, answer);
        return;
      }
      byte[] whole;
      try {
        whole = answer.chunks().all(answer.deadline());
      } catch (TimeoutException silent) {
        timedOut(exchange, call);
        return;
      } catch (IOException broken) {
        call.failed(Failure.of(Outcome.PROVIDER_ERROR).httpStatus(answer.status()));
        fail(exchange, 502, "The provider's answer broke off.", "provider_error");
        return;
      }
      JsonObject said = object(whole);
      if (answer.status() < 300) {
        noteUsage(call, said);
        call.succeeded();
      } else if (tryNextKey(call, refusal(answer, said), keys)) {
        continue;
      }
      reply(exchange, answer.status(), answer.contentType(), whole);
      return;
    }
  }

  /** The provider's answer; null when there was none and the caller was told. */
  private Answer send(HttpExchange exchange, Call call, byte[] body)
      throws IOException, InterruptedException {
    String base = call.key() != null ? call.key().baseUrl() : platformUrl;
    String contentType = exchange.getRequestHeaders().getFirst("content-type");
    HttpRequest.Builder request =
        HttpRequest.newBuilder(URI.create(base.replaceFirst("/+$", "") + "/chat/completions"))
            .header("content-type", contentType != null ? contentType : "application/json")
            .POST(HttpRequest.BodyPublishers.ofByteArray(body));
    call.headers(platformKey).forEach(request::header);
    call.note(Note.NONE.endpoint(ENDPOINT));
    long began = System.nanoTime();
    CompletableFuture<HttpResponse<Chunks>> sent =
        http.sendAsync(request.build(), info -> new Chunks());
    try {
      HttpResponse<Chunks> response = sent.get(PATIENCE.toNanos(), TimeUnit.NANOSECONDS);
      call.note(
          Note.NONE
              .httpStatus(response.statusCode())
              .responseTime(Duration.ofNanos(System.nanoTime() - began)));
      return new Answer(response, began + PATIENCE.toNanos());
    } catch (TimeoutException silent) {
      timedOut(exchange, call);
    } catch (ExecutionException failed) {
      boolean neverSent =
          failed.getCause() instanceof ConnectException
              || failed.getCause() instanceof HttpConnectTimeoutException;
      call.failed(neverSent ? Outcome.NEVER_SENT : Outcome.PROVIDER_ERROR);
      fail(exchange, 502, "The provider cannot be reached.", "provider_unreachable");
    } finally {
      sent.cancel(true); // no more to do where it was answered
    }
    return null;
  }

  /** Whether there is another credential to try. Otherwise the refusal is what gets recorded. */
  private static boolean tryNextKey(Call call, Failure refusal, int keys) {
    if (call.key() == null || !KEY_IS_OUT.contains(refusal.outcome()) || keys == MOST_KEYS) {
      call.failed(refusal);
      return false;
    }
    try {
      call.keyRefused(refusal);
      return true;
    } catch (DeniedException nobodyElse) {
      return false; // the provider's own answer says more
    }
  }

  private static Failure refusal(Answer answer, JsonObject said) {
    JsonObject error = child(said, "error");
    String code = string(error, "code");
    code = code == null ? string(error, "type") : code;
    Failure failure =
        Failure.of(Outcome.outcomeOf(answer.status(), code))
            .httpStatus(answer.status())
            .errorMessage(string(error, "message"));
    String retryAfter = answer.header("retry-after", "");
    return retryAfter.matches("\\d{1,6}")
        ? failure.retryAfter(Duration.ofSeconds(Long.parseLong(retryAfter)))
        : failure;
  }

  /** Passes a stream on as it arrives. One that breaks off does so for the caller too. */
  private static void stream(HttpExchange exchange, Call call, Answer answer)
      throws IOException, InterruptedException {
    Events events = new Events(call);
    try {
      exchange.getResponseHeaders().set("content-type", answer.contentType());
      exchange.sendResponseHeaders(answer.status(), 0);
      OutputStream caller = exchange.getResponseBody();
      Duration silence = Duration.ZERO;
      for (boolean over = false; !over; ) {
        byte[] chunk = bytes(":\n\n"); // a comment, which readers of events pass over
        try {
          byte[] next = answer.chunks().next(HEARTBEAT);
          silence = Duration.ZERO;
          over = next == null;
          chunk = over ? new byte[0] : next;
          events.read(chunk);
        } catch (TimeoutException silent) {
          silence = silence.plus(HEARTBEAT);
          if (silence.compareTo(PATIENCE) >= 0) {
            call.failed(Outcome.TIMEOUT);
            throw new BrokenOffException();
          }
          if (!events.atBoundary()) {
            continue;
          }
        } catch (BrokenOffException broken) {
          if (!events.done()) {
            call.failed(Outcome.PROVIDER_ERROR);
          }
          throw broken;
        }
        // In silence too: a caller who hung up is noticed by nothing else. The call ends cancelled.
        caller.write(chunk);
        caller.flush();
      }
      if (!events.done()) {
        call.failed(Outcome.PROVIDER_ERROR);
      }
      caller.close();
    } finally {
      answer.chunks().cancel();
    }
  }

  private static void timedOut(HttpExchange exchange, Call call) throws IOException {
    call.failed(Outcome.TIMEOUT);
    fail(exchange, 504, "The provider did not answer in time.", "provider_timeout");
  }

  private static void noteUsage(Call call, JsonObject said) {
    String model = string(said, "model");
    if (model != null) {
      call.note(Note.NONE.model(model));
    }
    JsonObject usage = child(said, "usage");
    if (usage == null) {
      return;
    }
    call.used(
        new Usage(
            number(usage, "prompt_tokens"),
            number(usage, "completion_tokens"),
            number(child(usage, "prompt_tokens_details"), "cached_tokens"),
            null,
            number(usage, "total_tokens")));
  }

  // ------------------------------------------------------------------- what the caller gets

  private static void deny(HttpExchange exchange, DeniedException denied) throws IOException {
    String code = "denied";
    int status = 402;
    if (denied.decision().denial() != null) {
      code = denied.decision().denial().reason().name().toLowerCase(Locale.ROOT);
      if (denied.decision().denial().retryable()) {
        Duration wait = denied.decision().denial().retryAfter();
        long seconds = wait == null ? 1 : Math.max(1, wait.plusMillis(999).toSeconds());
        exchange.getResponseHeaders().set("retry-after", Long.toString(seconds));
        status = 429;
      }
    }
    fail(exchange, status, denied.decision().message(), code);
  }

  private static void fail(HttpExchange exchange, int status, String message, String code)
      throws IOException {
    JsonObject error = new JsonObject();
    error.addProperty("message", message);
    error.addProperty("type", "keyturn");
    error.addProperty("code", code);
    JsonObject body = new JsonObject();
    body.add("error", error);
    reply(exchange, status, "application/json", bytes(body.toString()));
  }

  private static void reply(HttpExchange exchange, int status, String contentType, byte[] body)
      throws IOException {
    try (exchange) {
      exchange.getRequestBody().readAllBytes();
      exchange.getResponseHeaders().set("content-type", contentType);
      exchange.sendResponseHeaders(status, body.length == 0 ? -1 : body.length);
      exchange.getResponseBody().write(body);
    }
  }

  // ------------------------------------------------------------------- what the provider says

  private record Answer(HttpResponse<Chunks> response, long deadline) {
    int status() {
      return response.statusCode();
    }

    Chunks chunks() {
      return response.body();
    }

    String contentType() {
      return header("content-type", "application/json");
    }

    boolean isStream() {
      return contentType().startsWith("text/event-stream");
    }

    String header(String name, String otherwise) {
      return response.headers().firstValue(name).orElse(otherwise);
    }
  }

  /** The stream has to break off. */
  private static final class BrokenOffException extends IOException {
    private static final long serialVersionUID = 1L;
  }

  /** The provider's body, chunk by chunk: the next is asked for when the last was taken. */
  private static final class Chunks implements HttpResponse.BodySubscriber<Chunks> {
    private static final byte[] END = new byte[0];
    private static final byte[] BROKEN = new byte[0];

    private final BlockingQueue<byte[]> arrived = new LinkedBlockingQueue<>();
    private volatile Flow.Subscription subscription;

    /** The next chunk, or null at the end. */
    byte[] next(Duration within) throws BrokenOffException, InterruptedException, TimeoutException {
      byte[] chunk = arrived.poll(within.toNanos(), TimeUnit.NANOSECONDS);
      if (chunk == null) {
        throw new TimeoutException();
      }
      if (chunk == BROKEN) {
        throw new BrokenOffException();
      }
      subscription.request(1);
      return chunk == END ? null : chunk;
    }

    byte[] all(long deadline) throws IOException, InterruptedException, TimeoutException {
      ByteArrayOutputStream whole = new ByteArrayOutputStream();
      try {
        while (true) {
          byte[] chunk = next(Duration.ofNanos(Math.max(0, deadline - System.nanoTime())));
          if (chunk == null) {
            return whole.toByteArray();
          }
          whole.write(chunk);
        }
      } finally {
        cancel();
      }
    }

    void cancel() {
      subscription.cancel();
    }

    @Override
    public CompletionStage<Chunks> getBody() {
      return CompletableFuture.completedFuture(this);
    }

    @Override
    public void onSubscribe(Flow.Subscription given) {
      subscription = given;
      given.request(1);
    }

    @Override
    public void onNext(List<ByteBuffer> buffers) {
      ByteArrayOutputStream chunk = new ByteArrayOutputStream();
      for (ByteBuffer buffer : buffers) {
        byte[] bytes = new byte[buffer.remaining()];
        buffer.get(bytes);
        chunk.writeBytes(bytes);
      }
      arrived.add(chunk.toByteArray());
    }

    @Override
    public void onError(Throwable broken) {
      arrived.add(BROKEN);
    }

    @Override
    public void onComplete() {
      arrived.add(END);
    }
  }

  /** Reads the events that go by, and tells the call. */
  private static final class Events {
    private final Call call;
    private final ByteArrayOutputStream line = new ByteArrayOutputStream();
    private boolean done;
    private boolean boundary = true;

    Events(Call call) {
      this.call = call;
    }

    boolean done() {
      return done;
    }

    /** Whether the last event is whole, so that something can stand between it and the next. */
    boolean atBoundary() {
      return boundary;
    }

    void read(byte[] chunk) {
      for (byte each : chunk) {
        if (each != '\n') {
          line.write(each);
          continue;
        }
        String text = line.toString(StandardCharsets.UTF_8).strip();
        line.reset();
        boundary = text.isEmpty();
        if (text.equals("data: [DONE]") || text.equals("data:[DONE]")) {
          done = true;
          call.succeeded();
        } else if (text.startsWith("data:")) {
          noteUsage(call, object(bytes(text.substring("data:".length()))));
        }
      }
      boundary &= line.size() == 0;
    }
  }

  // ------------------------------------------------------------------- reading

  private static String bearerToken(HttpExchange exchange) {
    String header = exchange.getRequestHeaders().getFirst("authorization");
    if (header == null || !header.regionMatches(true, 0, "Bearer ", 0, "Bearer ".length())) {
      return null;
    }
    String token = header.substring("Bearer ".length()).strip();
    return token.isEmpty() ? null : token;
  }

  private static JsonObject object(byte[] json) {
    try {
      JsonElement value = JsonParser.parseString(new String(json, StandardCharsets.UTF_8));
      return value.isJsonObject() ? value.getAsJsonObject() : null;
    } catch (JsonParseException other) {
      return null;
    }
  }

  private static JsonObject child(JsonObject object, String name) {
    return object != null && object.get(name) instanceof JsonObject found ? found : null;
  }

  private static String string(JsonObject object, String name) {
    JsonElement value = object != null ? object.get(name) : null;
    return value != null && value.isJsonPrimitive() ? value.getAsString() : null;
  }

  private static Long number(JsonObject object, String name) {
    JsonElement value = object != null ? object.get(name) : null;
    boolean isNumber =
        value != null && value.isJsonPrimitive() && value.getAsJsonPrimitive().isNumber();
    return isNumber ? value.getAsLong() : null;
  }

  private static boolean flag(JsonObject object, String name) {
    return "true".equals(string(object, name));
  }

  private static byte[] bytes(String text) {
    return text.getBytes(StandardCharsets.UTF_8);
  }

  private static String environment(String name, String otherwise) {
    String value = System.getenv(name);
    return value == null || value.isEmpty() ? otherwise : value;
  }
}
