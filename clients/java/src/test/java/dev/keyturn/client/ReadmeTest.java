package dev.keyturn.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.sun.net.httpserver.HttpServer;
import java.io.IOException;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import java.util.stream.Stream;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

/** README.md: its gateway is compiled and run, and so are its other snippets, as methods of it. */
class ReadmeTest {
  @TempDir Path directory;

  @Test
  void itsExamplesRun() throws Exception {
    List<String> snippets =
        Pattern.compile("```java\n(.*?)```", Pattern.DOTALL)
            .matcher(Files.readString(Path.of("README.md")))
            .results()
            .map(snippet -> snippet.group(1))
            .toList();
    assertEquals(6, snippets.size());
    String gateway = snippets.get(0);
    String others = String.join("\n", snippets.subList(1, snippets.size()));
    String all =
        gateway
            .replace("import java.util.Map;", "import java.time.Duration;\nimport java.util.Map;")
            .replace(
                "    KEYTURN.close();",
                "    chatWithAnotherKey();\n    apart();\n    errors();\n    patient();\n"
                    + "    lenient().close();\n    KEYTURN.close();")
            .replaceFirst("}\\s*$", Matcher.quoteReplacement(others + "}\n"));
    Files.writeString(directory.resolve("Chat.java"), gateway);
    run(
        "javac",
        "-encoding",
        "UTF-8",
        "-Xlint:all",
        "-Werror",
        "-d",
        directory.resolve("alone").toString(),
        "Chat.java");
    Files.writeString(directory.resolve("Chat.java"), all);
    run("javac", "-encoding", "UTF-8", "-Xlint:all", "-Werror", "-d", ".", "Chat.java");

    List<String> credentials = new ArrayList<>();
    HttpServer provider =
        HttpServer.create(new InetSocketAddress(InetAddress.getLoopbackAddress(), 0), 0);
    provider.createContext(
        "/v1/chat/completions",
        exchange -> {
          String credential = exchange.getRequestHeaders().getFirst("Authorization");
          credentials.add(credential);
          boolean refused = credential.contains(ScriptedSidecar.SECRET) && credentials.size() > 1;
          byte[] answer = "{\"usage\": {}}".getBytes(StandardCharsets.UTF_8);
          exchange.sendResponseHeaders(refused ? 401 : 200, answer.length);
          exchange.getResponseBody().write(answer);
          exchange.close();
        });
    provider.start();
    try (ScriptedSidecar sidecar = ScriptedSidecar.onSocket()) {
      // An own key for the first two requests; credits pay for what comes after.
      AtomicInteger decisions = new AtomicInteger();
      sidecar.decides(
          () ->
              decisions.incrementAndGet() <= 2 ? ScriptedSidecar.key() : ScriptedSidecar.ticket());
      String said =
          run(
              List.of(
                  "KEYTURN_ADDRESS=" + sidecar.target(),
                  "OPENAI_API_KEY=sk-platform",
                  "OPENAI_BASE_URL=http://127.0.0.1:" + provider.getAddress().getPort() + "/v1"),
              "java",
              "Chat");
      assertEquals("{\"usage\": {}}\n7 null\ntrue\n", said);
      assertEquals("Bearer " + ScriptedSidecar.SECRET, credentials.get(0));
      assertEquals("Bearer sk-platform", credentials.get(credentials.size() - 1));
      List<dev.keyturn.v1.Outcome> recorded =
          Stream.concat(
                  sidecar.batched().stream(),
                  sidecar.asked(dev.keyturn.v1.RecordRequest.class).stream())
              .map(dev.keyturn.v1.RecordRequest::getOutcome)
              .toList();
      assertTrue(recorded.contains(dev.keyturn.v1.Outcome.OUTCOME_SUCCESS), recorded::toString);
      assertTrue(recorded.contains(dev.keyturn.v1.Outcome.OUTCOME_NEVER_SENT), recorded::toString);
    } finally {
      provider.stop(0);
    }
  }

  private String run(String... command) throws IOException, InterruptedException {
    return run(List.of(), command);
  }

  private String run(List<String> environment, String... command)
      throws IOException, InterruptedException {
    List<String> line = new ArrayList<>(List.of(command));
    line.set(0, Path.of(System.getProperty("java.home"), "bin", command[0]).toString());
    line.addAll(1, List.of("-cp", System.getProperty("java.class.path") + ":" + directory));
    ProcessBuilder process =
        new ProcessBuilder(line).directory(directory.toFile()).redirectErrorStream(true);
    environment.forEach(
        each -> process.environment().put(each.split("=", 2)[0], each.split("=", 2)[1]));
    Process started = process.start();
    String said = new String(started.getInputStream().readAllBytes(), StandardCharsets.UTF_8);
    assertEquals(0, started.waitFor(), said);
    return said;
  }
}
