package dev.keyturn.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNotEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.gson.Gson;
import com.google.gson.JsonParseException;
import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.io.ObjectOutputStream;
import java.io.PrintWriter;
import java.io.Serializable;
import java.io.StringWriter;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Test;

class RedactionTest {
  private static final DecideRequest U1 = DecideRequest.builder("u1", "openai").build();
  private static final String TOKEN = "the-token-of-the-gateway";
  private static final byte[] PRIVATE_KEY = "the-private-key".getBytes(StandardCharsets.US_ASCII);

  private final ScriptedSidecar sidecar = ScriptedSidecar.onSocket();
  private final KeyturnClient client =
      KeyturnClient.create(sidecar.options().token(TOKEN).retries(Retries.of(1)).build());

  @AfterEach
  void close() {
    client.close();
    sidecar.close();
  }

  /** The value in every way that Java prints it. */
  private static List<String> prints(Object value) {
    List<String> prints = new ArrayList<>();
    prints.add(value.toString());
    prints.add(String.format("%s %S", value, value));
    prints.add(List.of(value).toString() + Map.of("value", value));
    try {
      prints.add(new Gson().toJson(value));
    } catch (JsonParseException refused) {
      prints.add(stack(refused));
    }
    if (value instanceof Throwable error) {
      prints.add(stack(error));
    }
    ByteArrayOutputStream bytes = new ByteArrayOutputStream();
    try (ObjectOutputStream out = new ObjectOutputStream(bytes)) {
      out.writeObject(value);
    } catch (IOException refused) {
      prints.add(stack(refused));
    }
    prints.add(bytes.toString(StandardCharsets.ISO_8859_1));
    return prints;
  }

  private static String stack(Throwable error) {
    StringWriter text = new StringWriter();
    error.printStackTrace(new PrintWriter(text));
    return text.toString();
  }

  private static void assertSilent(Object value) {
    for (String print : prints(value)) {
      String folded = print.toLowerCase(java.util.Locale.ROOT);
      for (String secret :
          List.of(
              ScriptedSidecar.SECRET,
              TOKEN,
              "the-private-key",
              ScriptedSidecar.HANDLE.substring(0, 20),
              ScriptedSidecar.TICKET.substring(0, 20))) {
        assertFalse(folded.contains(secret.toLowerCase(java.util.Locale.ROOT)), print);
      }
    }
  }

  @Test
  void aSecretShowsNothing() {
    Secret secret = Secret.of(ScriptedSidecar.SECRET);
    assertEquals("Secret(***)", secret.toString());
    assertEquals("{}", new Gson().toJson(secret));
    assertFalse(Serializable.class.isInstance(secret));
    assertEquals(ScriptedSidecar.SECRET, secret.reveal());
    assertSilent(secret);
  }

  @Test
  void secretsAreEqualByTheirContentsAndTheirHashTellsNothing() {
    assertEquals(Secret.of("a"), Secret.of("a"));
    assertNotEquals(Secret.of("a"), Secret.of("b"));
    assertNotEquals((Object) Secret.of("a"), "a");
    assertEquals(Secret.of("a").hashCode(), Secret.of("b").hashCode());
  }

  @Test
  void handlesAndTicketsAreCut() {
    assertEquals("SealedHandle(kth1_012…)", SealedHandle.of(ScriptedSidecar.HANDLE).toString());
    assertEquals("SealedTicket(ktt1_012…)", SealedTicket.of(ScriptedSidecar.TICKET).toString());
    assertEquals("SealedTicket(…)", SealedTicket.of("short-one").toString());
    assertThrows(IllegalArgumentException.class, () -> SealedHandle.of(""));
  }

  @Test
  void decisionsCallsAndRecordsShowNoSecret() {
    sidecar.answers(ScriptedSidecar.key(), ScriptedSidecar.ticket());
    Call key = client.request(U1);
    Call ticket = client.request(U1);
    key.headers(Map.of());
    for (Call call : List.of(key, ticket)) {
      assertTrue(call.toString().contains("…)"), call::toString);
      assertSilent(call);
      assertSilent(call.decision());
      assertSilent(RecordRequest.of(call.decision(), Outcome.SUCCESS));
      call.close();
    }
    assertSilent(key.key());
    assertSilent(ticket.ticket());
    assertSilent(U1.toBuilder().failedKey(key.key().handle()).build());
  }

  @Test
  void clientsAndOptionsShowNeitherTokenNorKey() {
    Options options =
        Options.builder()
            .target("keyturn:1")
            .token(TOKEN)
            .privateKey(PRIVATE_KEY)
            .certificateChain(PRIVATE_KEY)
            .build();
    assertSilent(options);
    assertSilent(Options.builder().token(TOKEN).privateKey(PRIVATE_KEY));
    client.decide(U1);
    assertSilent(client);
    assertEquals("KeyturnClient[" + sidecar.target() + "]", client.toString());
  }

  @Test
  void errorsShowNeitherTheRequestNorTheToken() {
    sidecar.fails(2, ScriptedSidecar::storeDown);
    RecordRequest record =
        RecordRequest.of(SealedHandle.of(ScriptedSidecar.HANDLE), Outcome.SUCCESS);
    assertSilent(assertThrows(KeyturnException.class, () -> client.record(record)));
    assertSilent(
        assertThrows(
            KeyturnException.class, () -> client.redeem(SealedHandle.of(ScriptedSidecar.HANDLE))));
    sidecar.answers(ScriptedSidecar.denial());
    assertSilent(assertThrows(DeniedException.class, () -> client.request(U1)));
    assertSilent(new Unsent(record, new QueueFullException(1)));
  }

  @Test
  void theProvidersErrorTextIsNotPrinted() {
    String quoting = "Incorrect API key provided: " + ScriptedSidecar.SECRET;
    Failure failure = Failure.of(Outcome.AUTH_REJECTED).httpStatus(401).errorMessage(quoting);
    assertEquals("Failure[AUTH_REJECTED, HTTP 401]", failure.toString());
    RecordRequest record =
        RecordRequest.builder(SealedHandle.of(ScriptedSidecar.HANDLE), Outcome.AUTH_REJECTED)
            .errorMessage(quoting)
            .build();
    assertFalse(record.toString().contains(ScriptedSidecar.SECRET));
  }
}
