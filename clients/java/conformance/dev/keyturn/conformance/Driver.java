package dev.keyturn.conformance;

import com.google.gson.Gson;
import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonNull;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import com.google.gson.JsonPrimitive;
import dev.keyturn.client.Call;
import dev.keyturn.client.Constraint;
import dev.keyturn.client.CreditTicket;
import dev.keyturn.client.DecideRequest;
import dev.keyturn.client.Decision;
import dev.keyturn.client.DeniedException;
import dev.keyturn.client.Explanation;
import dev.keyturn.client.Failure;
import dev.keyturn.client.KeyHandle;
import dev.keyturn.client.KeyturnClient;
import dev.keyturn.client.KeyturnException;
import dev.keyturn.client.Note;
import dev.keyturn.client.Options;
import dev.keyturn.client.Outcome;
import dev.keyturn.client.RecordRequest;
import dev.keyturn.client.Recorded;
import dev.keyturn.client.Result;
import dev.keyturn.client.Retries;
import dev.keyturn.client.SealedHandle;
import dev.keyturn.client.SealedTicket;
import dev.keyturn.client.Secret;
import dev.keyturn.client.Settles;
import dev.keyturn.client.Unsent;
import dev.keyturn.client.Usage;
import java.io.BufferedReader;
import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.ObjectOutputStream;
import java.io.PrintStream;
import java.io.PrintWriter;
import java.io.StringWriter;
import java.lang.reflect.Method;
import java.lang.reflect.Modifier;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CancellationException;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.CopyOnWriteArrayList;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.ScheduledFuture;
import java.util.concurrent.TimeUnit;
import java.util.function.Function;

/** The driver of the conformance suite: commands from standard input to the client and back. */
public final class Driver {
  private final Map<String, Opened> clients = new ConcurrentHashMap<>();
  private final Map<String, Object> kept = new ConcurrentHashMap<>();
  private final ExecutorService threads = Executors.newCachedThreadPool(Driver::daemon);
  private final ScheduledExecutorService clock =
      Executors.newSingleThreadScheduledExecutor(Driver::daemon);

  /** A client, and what its callbacks were called with. */
  private record Opened(KeyturnClient client, List<Unsent> unsent, JsonArray asked) {}

  private Driver() {}

  /** Answers each line with a line. */
  public static void main(String[] arguments) throws IOException {
    Driver driver = new Driver();
    BufferedReader commands =
        new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
    PrintStream answers = new PrintStream(System.out, true, StandardCharsets.UTF_8);
    for (String line; (line = commands.readLine()) != null; ) {
      answers.println(driver.answer(JsonParser.parseString(line).getAsJsonObject()));
    }
  }

  private JsonObject answer(JsonObject command) {
    JsonObject answer = new JsonObject();
    String as = text(command, "as");
    try {
      answer.add("ok", has(command, "cancel_after_ms") ? cancelled(command) : run(command));
    } catch (UnsupportedOperationException | NullPointerException | ClassCastException defect) {
      answer.addProperty("defect", stack(defect));
    } catch (RuntimeException raised) {
      keep(as, raised);
      answer.add("error", error(raised));
    }
    return answer;
  }

  /** Runs a command in a thread that is interrupted after a while. */
  private JsonElement cancelled(JsonObject command) {
    Future<JsonElement> running =
        threads.submit(
            () -> {
              Thread caller = Thread.currentThread();
              long after = command.get("cancel_after_ms").getAsLong();
              ScheduledFuture<?> interrupt =
                  clock.schedule(caller::interrupt, after, TimeUnit.MILLISECONDS);
              try {
                return run(command);
              } finally {
                interrupt.cancel(false);
              }
            });
    try {
      return running.get();
    } catch (ExecutionException failed) {
      throw (RuntimeException) failed.getCause();
    } catch (InterruptedException unasked) {
      throw new IllegalStateException(unasked);
    }
  }

  private JsonElement run(JsonObject command) {
    return switch (text(command, "op")) {
      case "open" -> open(command);
      case "close" -> {
        JsonObject left = new JsonObject();
        left.add("unsent", array(client(command).shutdown(), Driver::unsent));
        yield left;
      }
      case "decide" -> decision(keep(command, client(command).decide(request(command))));
      case "decide_many" ->
          array(
              client(command).decideMany(all(command, "requests", Driver::requestOf)),
              each -> result(each, Driver::decision));
      case "explain" -> explanation(client(command).explain(request(command)));
      case "record" -> recorded(client(command).record(recordOf(object(command, "record"))));
      case "record_many" ->
          array(
              client(command).recordMany(all(command, "records", this::recordOf)),
              each -> result(each, Driver::recorded));
      case "record_later" -> {
        client(command).recordLater(recordOf(object(command, "record")));
        yield new JsonObject();
      }
      case "flush" -> {
        client(command).flush();
        yield new JsonObject();
      }
      case "unsent" -> array(opened(command).unsent(), Driver::unsent);
      case "redeem" -> {
        SealedHandle handle = SealedHandle.of(text(command, "handle"));
        Secret secret = keep(command, client(command).redeem(handle));
        JsonObject revealed = new JsonObject();
        revealed.addProperty("secret", secret.reveal());
        yield revealed;
      }
      case "begin" -> decision(keep(command, client(command).request(request(command))).decision());
      case "headers" -> {
        Map<String, String> platform = new LinkedHashMap<>();
        object(command, "platform")
            .entrySet()
            .forEach(each -> platform.put(each.getKey(), each.getValue().getAsString()));
        JsonObject headers = new JsonObject();
        call(command).headers(platform).forEach(headers::addProperty);
        yield headers;
      }
      case "sending" -> done(call(command)::sending);
      case "succeeded" -> done(call(command)::succeeded);
      case "used" -> done(() -> call(command).used(usage(object(command, "usage"))));
      case "cost" -> done(() -> call(command).cost(command.get("micros").getAsLong()));
      case "note" -> done(() -> call(command).note(note(command)));
      case "failed" -> done(() -> call(command).failed(failure(command, null, null)));
      case "key_refused" ->
          decision(call(command).keyRefused(failure(command, Outcome.AUTH_REJECTED, 401)));
      case "finish" -> {
        Recorded recorded = call(command).finish();
        yield recorded == null ? JsonNull.INSTANCE : recorded(recorded);
      }
      case "end" -> done(call(command)::close);
      case "outcome_of" -> {
        Outcome outcome =
            Outcome.outcomeOf(command.get("status").getAsInt(), text(command, "error_code"));
        JsonObject word = new JsonObject();
        word.addProperty("outcome", outcome.name());
        yield word;
      }
      case "show" -> show(command);
      case "parallel" -> parallel(command);
      case "when_down_asked" -> opened(command).asked().deepCopy();
      default -> throw new UnsupportedOperationException(text(command, "op"));
    };
  }

  private JsonElement open(JsonObject command) {
    JsonObject given = has(command, "options") ? object(command, "options") : new JsonObject();
    Options.Builder options = Options.builder().target(text(given, "target"));
    options.token(text(given, "token"));
    options.rootCertificates(pem(given, "root_certificates"));
    options.certificateChain(pem(given, "certificate_chain"));
    options.privateKey(pem(given, "private_key"));
    if (has(given, "tls")) {
      options.tls(given.get("tls").getAsBoolean());
    }
    if (has(given, "timeout_ms")) {
      options.timeout(span(given, "timeout_ms"));
    }
    if (has(given, "retries")) {
      JsonObject retries = object(given, "retries");
      Retries usual = Retries.DEFAULT;
      options.retries(
          new Retries(
              has(retries, "attempts") ? retries.get("attempts").getAsInt() : usual.attempts(),
              has(retries, "first_delay_ms") ? span(retries, "first_delay_ms") : usual.firstDelay(),
              has(retries, "max_delay_ms") ? span(retries, "max_delay_ms") : usual.maxDelay()));
    }
    if (has(given, "queue_size")) {
      options.queueSize(given.get("queue_size").getAsInt());
    }
    if (has(given, "close_timeout_ms")) {
      options.closeTimeout(span(given, "close_timeout_ms"));
    }
    List<Unsent> unsent = new CopyOnWriteArrayList<>();
    options.onUnsent(unsent::add);
    JsonArray asked = new JsonArray();
    if (has(given, "when_down")) {
      boolean pass = text(given, "when_down").equals("pass");
      options.whenDown(
          (request, error) -> {
            JsonObject question = new JsonObject();
            question.addProperty("user_id", request.userId());
            question.addProperty("code", error.code().name());
            synchronized (asked) {
              asked.add(question);
            }
            return pass;
          });
    }
    KeyturnClient client = KeyturnClient.create(options.build());
    clients.put(text(command, "client"), new Opened(client, unsent, asked));
    return new JsonObject();
  }

  private JsonElement parallel(JsonObject command) {
    List<Future<JsonObject>> running =
        all(command, "commands", each -> threads.submit(() -> answer(each)));
    return array(
        running,
        each -> {
          try {
            return each.get();
          } catch (InterruptedException | ExecutionException defect) {
            throw new UnsupportedOperationException(defect);
          }
        });
  }

  // ---------------------------------------------------------------- every way to print

  private JsonElement show(JsonObject command) {
    String name = text(command, "of");
    Object value = clients.containsKey(name) ? clients.get(name).client() : kept.get(name);
    List<String> prints = new ArrayList<>();
    print(value, prints, 0);
    JsonObject shown = new JsonObject();
    shown.add("prints", array(prints, JsonPrimitive::new));
    Secret secret = secretOf(value);
    boolean revealed = secret != null && secret.reveal().equals(text(command, "secret"));
    shown.addProperty("revealed", revealed);
    return shown;
  }

  private static void print(Object value, List<String> prints, int depth) {
    prints.add(String.valueOf(value));
    prints.add(String.format("%s %S", value, value));
    prints.add(List.of(value) + " " + Map.of("value", value));
    prints.add(String.valueOf(value.hashCode()));
    if (value instanceof Throwable error) {
      prints.add(stack(error));
    }
    try {
      prints.add(new Gson().toJson(value)); // reads fields by reflection
    } catch (RuntimeException refused) {
      prints.add(stack(refused));
    }
    ByteArrayOutputStream bytes = new ByteArrayOutputStream();
    try (ObjectOutputStream out = new ObjectOutputStream(bytes)) {
      out.writeObject(value);
    } catch (IOException refused) {
      prints.add(stack(refused));
    }
    prints.add(bytes.toString(StandardCharsets.ISO_8859_1));
    if (depth < 3 && value.getClass().getName().startsWith("dev.keyturn.client.")) {
      printProperties(value, prints, depth);
    }
  }

  /** What bean and record serializers call. */
  private static void printProperties(Object value, List<String> prints, int depth) {
    for (Method method : value.getClass().getMethods()) {
      boolean property =
          method.getName().matches("(get|is)[A-Z].*")
              || value instanceof Record
                  && java.util.Arrays.stream(value.getClass().getRecordComponents())
                      .anyMatch(component -> component.getAccessor().equals(method));
      if (!property
          || method.getParameterCount() > 0
          || Modifier.isStatic(method.getModifiers())
          || method.getDeclaringClass() == Object.class) {
        continue;
      }
      try {
        Object read = method.invoke(value);
        if (read != null) {
          print(read, prints, depth + 1);
        }
      } catch (ReflectiveOperationException refused) {
        prints.add(stack(refused));
      }
    }
  }

  private static Secret secretOf(Object value) {
    if (value instanceof Secret secret) {
      return secret;
    }
    Decision decision =
        value instanceof Call call ? call.decision() : value instanceof Decision held ? held : null;
    return decision != null && decision.key() != null ? decision.key().secret() : null;
  }

  // ------------------------------------------------------------------- JSON to values

  private static DecideRequest requestOf(JsonObject given) {
    DecideRequest.Builder request =
        DecideRequest.builder(orEmpty(given, "user_id"), orEmpty(given, "provider"))
            .model(orEmpty(given, "model"))
            .serviceType(orEmpty(given, "service_type"))
            .requestId(text(given, "request_id"));
    if (has(given, "cost_micros")) {
      request.costMicros(given.get("cost_micros").getAsLong());
    }
    if (has(given, "input_tokens")) {
      request.inputTokens(given.get("input_tokens").getAsLong());
    }
    if (has(given, "max_output_tokens")) {
      request.maxOutputTokens(given.get("max_output_tokens").getAsLong());
    }
    if (has(given, "constraint")) {
      request.constraint(Constraint.valueOf(text(given, "constraint")));
    }
    if (has(given, "failed_keys")) {
      given
          .getAsJsonArray("failed_keys")
          .forEach(handle -> request.failedKey(SealedHandle.of(handle.getAsString())));
    }
    if (has(given, "redeem")) {
      request.redeem(given.get("redeem").getAsBoolean());
    }
    if (has(given, "hold_ttl_ms")) {
      request.holdTtl(span(given, "hold_ttl_ms"));
    }
    return request.build();
  }

  private RecordRequest recordOf(JsonObject given) {
    JsonPrimitive outcome = given.getAsJsonPrimitive("outcome");
    Settles settles = settles(given);
    RecordRequest.Builder record =
        outcome.isNumber()
            ? RecordRequest.builder(settles, outcome.getAsInt())
            : RecordRequest.builder(settles, Outcome.valueOf(outcome.getAsString()));
    if (has(given, "usage")) {
      record.usage(usage(object(given, "usage")));
    }
    if (has(given, "cost_micros")) {
      record.costMicros(given.get("cost_micros").getAsLong());
    }
    return record
        .note(note(given))
        .errorMessage(text(given, "error_message"))
        .retryAfter(has(given, "retry_after_ms") ? span(given, "retry_after_ms") : null)
        .build();
  }

  private Settles settles(JsonObject given) {
    if (has(given, "handle")) {
      return SealedHandle.of(text(given, "handle"));
    }
    if (has(given, "ticket")) {
      return SealedTicket.of(text(given, "ticket"));
    }
    Object value = kept.get(text(given, "decision"));
    return value instanceof Call call ? call.decision() : (Decision) value;
  }

  private static Usage usage(JsonObject given) {
    return new Usage(
        count(given, "input_tokens"),
        count(given, "output_tokens"),
        count(given, "cache_read_tokens"),
        count(given, "cache_write_tokens"),
        count(given, "total_tokens"));
  }

  private static Note note(JsonObject given) {
    return new Note(
        text(given, "model"),
        text(given, "endpoint"),
        has(given, "response_time_ms") ? span(given, "response_time_ms") : null,
        has(given, "http_status") ? given.get("http_status").getAsInt() : null);
  }

  private static Failure failure(JsonObject given, Outcome usual, Integer usualStatus) {
    return new Failure(
        has(given, "outcome") ? Outcome.valueOf(text(given, "outcome")) : usual,
        has(given, "http_status")
            ? Integer.valueOf(given.get("http_status").getAsInt())
            : usualStatus,
        text(given, "error_message"),
        has(given, "retry_after_ms") ? span(given, "retry_after_ms") : null);
  }

  private KeyturnClient client(JsonObject command) {
    KeyturnClient client = opened(command).client();
    return has(command, "timeout_ms") ? client.withTimeout(span(command, "timeout_ms")) : client;
  }

  private Opened opened(JsonObject command) {
    return clients.get(text(command, "client"));
  }

  private Call call(JsonObject command) {
    return (Call) kept.get(text(command, "call"));
  }

  private static DecideRequest request(JsonObject command) {
    return requestOf(object(command, "request"));
  }

  private <T> T keep(JsonObject command, T value) {
    keep(text(command, "as"), value);
    return value;
  }

  private void keep(String as, Object value) {
    if (as != null) {
      kept.put(as, value);
    }
  }

  private static boolean has(JsonObject object, String name) {
    return object.has(name) && !object.get(name).isJsonNull();
  }

  private static String text(JsonObject object, String name) {
    return has(object, name) ? object.get(name).getAsString() : null;
  }

  private static String orEmpty(JsonObject object, String name) {
    return has(object, name) ? object.get(name).getAsString() : "";
  }

  private static Long count(JsonObject object, String name) {
    return has(object, name) ? object.get(name).getAsLong() : null;
  }

  private static Duration span(JsonObject object, String name) {
    return Duration.ofNanos(Math.round(object.get(name).getAsDouble() * 1_000_000));
  }

  private static byte[] pem(JsonObject object, String name) {
    return has(object, name) ? text(object, name).getBytes(StandardCharsets.US_ASCII) : null;
  }

  private static JsonObject object(JsonObject object, String name) {
    return object.getAsJsonObject(name);
  }

  private static <T> List<T> all(
      JsonObject command, String name, Function<JsonObject, T> translate) {
    List<T> values = new ArrayList<>();
    command
        .getAsJsonArray(name)
        .forEach(each -> values.add(translate.apply(each.getAsJsonObject())));
    return values;
  }

  // ------------------------------------------------------------------- values to JSON

  private static JsonObject decision(Decision decision) {
    JsonObject json = new JsonObject();
    json.addProperty("decision_id", decision.decisionId());
    json.addProperty("mode", decision.mode().name());
    json.addProperty("reason", decision.reason().name());
    json.addProperty("message", decision.message());
    json.addProperty("degraded", decision.degraded());
    json.addProperty("replayed", decision.replayed());
    json.addProperty("unmetered", decision.unmetered());
    json.addProperty("allowed", decision.allowed());
    KeyHandle key = decision.key();
    if (key != null) {
      JsonObject route = new JsonObject();
      route.addProperty("handle", key.handle() != null ? key.handle().text() : "");
      route.addProperty("key_id", key.keyId());
      route.addProperty("provider", key.provider());
      route.addProperty("hint", key.hint());
      route.addProperty("secret", key.secret() != null ? key.secret().reveal() : null);
      route.addProperty("auth_header", key.authHeader());
      route.addProperty("auth_prefix", key.authPrefix());
      route.addProperty("base_url", key.baseUrl());
      route.addProperty("expire_time", key.expireTime() != null ? key.expireTime() + "" : null);
      json.add("key", route);
    }
    CreditTicket ticket = decision.ticket();
    if (ticket != null) {
      JsonObject route = new JsonObject();
      route.addProperty("ticket", ticket.ticket() != null ? ticket.ticket().text() : "");
      route.addProperty("hold_micros", ticket.holdMicros());
      route.addProperty("available_micros", ticket.availableMicros());
      route.addProperty(
          "expire_time", ticket.expireTime() != null ? ticket.expireTime() + "" : null);
      json.add("ticket", route);
    }
    if (decision.denial() != null) {
      JsonObject route = new JsonObject();
      route.addProperty("reason", decision.denial().reason().name());
      route.addProperty("retryable", decision.denial().retryable());
      route.addProperty("retry_after_ms", millis(decision.denial().retryAfter()));
      route.addProperty("suggestion", decision.denial().suggestion());
      json.add("denial", route);
    }
    return json;
  }

  private static JsonObject explanation(Explanation explanation) {
    JsonObject json = new JsonObject();
    json.add("decision", decision(explanation.decision()));
    json.add(
        "steps",
        array(
            explanation.steps(),
            step -> {
              JsonObject each = new JsonObject();
              each.addProperty("check", step.check());
              each.addProperty("result", step.result());
              each.addProperty("detail", step.detail());
              return each;
            }));
    return json;
  }

  private static JsonObject recorded(Recorded recorded) {
    JsonObject json = new JsonObject();
    json.addProperty("record_id", recorded.recordId());
    json.addProperty("charged_micros", recorded.chargedMicros());
    json.addProperty("released_micros", recorded.releasedMicros());
    json.addProperty("balance_micros", recorded.balanceMicros());
    json.addProperty("cost_source", recorded.costSource().name());
    json.addProperty("replayed", recorded.replayed());
    json.addProperty("durability", recorded.durability().name());
    json.addProperty("key_state", recorded.keyState().name());
    return json;
  }

  private static JsonObject unsent(Unsent unsent) {
    JsonObject json = new JsonObject();
    if (unsent.record().settles() instanceof SealedHandle handle) {
      json.addProperty("handle", handle.text());
    } else if (unsent.record().settles() instanceof SealedTicket ticket) {
      json.addProperty("ticket", ticket.text());
    }
    json.addProperty("outcome", unsent.record().outcome().name());
    json.add("error", error(unsent.error()));
    return json;
  }

  private static <T> JsonObject result(Result<T> result, Function<T, JsonObject> translate) {
    JsonObject json = new JsonObject();
    if (result.error() != null) {
      json.add("error", error(result.error()));
    } else {
      json.add("ok", translate.apply(result.answer()));
    }
    return json;
  }

  private static JsonObject error(RuntimeException raised) {
    JsonObject json = new JsonObject();
    json.addProperty("kind", kind(raised));
    json.addProperty("text", raised.getMessage());
    if (raised instanceof DeniedException denied) {
      json.add("decision", decision(denied.decision()));
    }
    if (raised instanceof KeyturnException error) {
      json.addProperty("code", error.code().name());
      json.addProperty("reason", error.reason());
      json.addProperty("message", error.message());
      json.add(
          "field_violations",
          array(
              error.fieldViolations(),
              violation -> {
                JsonObject each = new JsonObject();
                each.addProperty("field", violation.field());
                each.addProperty("description", violation.description());
                return each;
              }));
      json.addProperty("retry_after_ms", millis(error.retryAfter()));
      if (error.resource() != null) {
        JsonObject resource = new JsonObject();
        resource.addProperty("type", error.resource().type());
        resource.addProperty("name", error.resource().name());
        resource.addProperty("description", error.resource().description());
        json.add("resource", resource);
      }
      JsonObject metadata = new JsonObject();
      error.metadata().forEach(metadata::addProperty);
      json.add("metadata", metadata);
    }
    return json;
  }

  private static String kind(RuntimeException raised) {
    if (raised.getClass() == KeyturnException.class) {
      return "KeyturnError";
    }
    if (raised.getClass().getPackage() == KeyturnException.class.getPackage()) {
      return raised.getClass().getSimpleName().replace("Exception", "");
    }
    if (raised instanceof CancellationException) {
      return "Cancelled";
    }
    return raised instanceof IllegalStateException ? "Closed" : "Invalid";
  }

  private static JsonElement done(Runnable command) {
    command.run();
    return new JsonObject();
  }

  private static <T> JsonArray array(
      Iterable<T> values, Function<T, ? extends JsonElement> translate) {
    JsonArray array = new JsonArray();
    values.forEach(each -> array.add(translate.apply(each)));
    return array;
  }

  private static Long millis(Duration span) {
    return span != null ? span.toMillis() : null;
  }

  private static String stack(Throwable error) {
    StringWriter text = new StringWriter();
    error.printStackTrace(new PrintWriter(text));
    return text.toString();
  }

  private static Thread daemon(Runnable work) {
    Thread thread = new Thread(work);
    thread.setDaemon(true);
    return thread;
  }
}
