package dev.keyturn.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.grpc.Metadata;
import io.grpc.TlsServerCredentials;
import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.net.InetAddress;
import java.net.ServerSocket;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.stream.Collectors;
import org.junit.jupiter.api.Test;

class ConnectionTest {
  private static final DecideRequest U1 = DecideRequest.builder("u1", "openai").build();
  private static final Metadata.Key<String> AUTHORIZATION =
      Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);
  private static final Metadata.Key<String> USER_AGENT =
      Metadata.Key.of("user-agent", Metadata.ASCII_STRING_MARSHALLER);

  private static Target target(String given) {
    return Target.of(given, name -> null);
  }

  private static String refused(Options.Builder options) {
    return assertThrows(
            IllegalArgumentException.class, () -> KeyturnClient.create(options.build()).close())
        .getMessage();
  }

  @Test
  void aTargetIsASocketOrAHostAndAPort() {
    assertEquals(Path.of("/run/k.sock"), target("unix:/run/k.sock").socket());
    assertEquals(Path.of("/run/k.sock"), target("unix:///run/k.sock").socket());
    assertEquals(Path.of("k.sock"), target("unix:k.sock").socket());
    assertEquals("keyturn", target("keyturn:50051").host());
    assertEquals(50051, target("keyturn:50051").port());
    assertEquals("::1", target("[::1]:7").host());
    for (String wrong :
        List.of(
            "unix:",
            "unix://k.sock",
            "keyturn",
            "keyturn:",
            ":7",
            "keyturn:70000",
            "::1:7",
            "http://keyturn:7",
            "keyturn:7x",
            "a b:7")) {
      assertThrows(IllegalArgumentException.class, () -> target(wrong), wrong);
    }
  }

  @Test
  void theEnvironmentNamesTheTargetThatNobodyGave() {
    Map<String, String> environment = Map.of("KEYTURN_ADDRESS", "unix:/e.sock");
    assertEquals(Path.of("/e.sock"), Target.of(null, environment::get).socket());
    assertEquals(Path.of("/e.sock"), Target.of("", environment::get).socket());
    assertEquals("h", Target.of("h:1", environment::get).host());
  }

  @Test
  void theDefaultSocketIsThatOfTheUser() {
    Map<String, String> both = Map.of("XDG_RUNTIME_DIR", "/run/user/7", "HOME", "/home/u");
    assertEquals(Path.of("/run/keyturn/keyturn.sock"), Target.defaultSocket(true, both::get));
    assertEquals(
        Path.of("/run/user/7/keyturn/keyturn.sock"), Target.defaultSocket(false, both::get));
    Map<String, String> home = Map.of("XDG_RUNTIME_DIR", "", "HOME", "/home/u");
    assertEquals(
        Path.of("/home/u/.keyturn/run/keyturn.sock"), Target.defaultSocket(false, home::get));
  }

  @Test
  void loopbackIsKnownWithoutLookingUpAName() {
    for (String here :
        List.of("localhost:1", "127.0.0.1:1", "127.8.9.10:1", "[::1]:1", "[0:0:0:0:0:0:0:1]:1")) {
      assertTrue(target(here).isLoopback(), here);
    }
    for (String elsewhere :
        List.of(
            "keyturn:1",
            "10.0.0.1:1",
            "127.0.0.1.example.com:1",
            "localhost.example.com:1",
            "[::2]:1",
            "[::ffff:127.0.0.1]:1",
            "0.0.0.0:1",
            "127.1:1")) {
      assertFalse(target(elsewhere).isLoopback(), elsewhere);
    }
  }

  @Test
  void whatDoesNotGoTogetherIsRefusedByItsName() {
    Options.Builder plain = Options.builder().target("keyturn:50051");
    assertTrue(refused(plain).contains("tls or rootCertificates"));
    Options.Builder half = Options.builder().target("keyturn:50051");
    assertTrue(refused(half.privateKey(new byte[] {1})).contains("certificateChain"));
    Options.Builder socket = Options.builder().target("unix:/k.sock").tls(true);
    assertTrue(refused(socket).contains("tls"));
    KeyturnClient.create(plain.tls(true).build()).close();
  }

  @Test
  void certificatesThatAreNoneAreRefusedWithoutBeingQuoted() {
    byte[] garbage =
        "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n"
            .getBytes(StandardCharsets.US_ASCII);
    IllegalArgumentException error =
        assertThrows(
            IllegalArgumentException.class,
            () ->
                KeyturnClient.create(
                    Options.builder()
                        .target("127.0.0.1:1")
                        .rootCertificates("no".getBytes(StandardCharsets.US_ASCII))
                        .certificateChain(garbage)
                        .privateKey(garbage)
                        .build()));
    assertFalse(error.getMessage().contains("c2VjcmV0"));
    assertNull(error.getCause());
  }

  @Test
  void aTokenThatIsNoneIsRefusedWithoutBeingQuoted() {
    for (String wrong : List.of("", "  ", "to ken-x", "tökén-x", "token-x\nx: y")) {
      String message = refused(Options.builder().target("unix:/k").token(wrong));
      assertTrue(message.startsWith("token "), message);
      assertFalse(message.contains("-x"), message);
    }
  }

  @Test
  void aTokenGoesWithEveryCallOnASocketAndOnLoopback() {
    for (ScriptedSidecar each : List.of(ScriptedSidecar.onSocket(), ScriptedSidecar.onLoopback())) {
      try (ScriptedSidecar sidecar = each;
          KeyturnClient client =
              KeyturnClient.create(sidecar.options().token(" the-token\n").build())) {
        client.decide(U1);
        client.recordLater(RecordRequest.of(SealedTicket.of("t"), Outcome.SUCCESS));
        client.flush();
        assertEquals(2, sidecar.headers.size());
        for (Metadata headers : sidecar.headers) {
          assertEquals("Bearer the-token", headers.get(AUTHORIZATION));
          assertTrue(headers.get(USER_AGENT).startsWith("keyturn-java/0.1.0 "));
        }
      }
    }
  }

  @Test
  void theAuthorityOfASocketIsLocalhost() {
    try (ScriptedSidecar sidecar = ScriptedSidecar.onSocket();
        KeyturnClient client = sidecar.client()) {
      client.decide(U1);
      assertEquals(List.of("localhost"), sidecar.authorities);
      assertNull(sidecar.headers.get(0).get(AUTHORIZATION));
    }
  }

  @Test
  void tlsTrustsTheGivenAuthoritiesAlone() {
    Certificates ours = Certificates.selfSigned("ours");
    Certificates others = Certificates.selfSigned("others");
    try (ScriptedSidecar sidecar = ScriptedSidecar.onLoopback(server(ours, null));
        KeyturnClient client =
            KeyturnClient.create(
                sidecar.options().rootCertificates(ours.certificate()).token("t").build());
        KeyturnClient wary =
            KeyturnClient.create(
                sidecar
                    .options()
                    .retries(Retries.of(1))
                    .rootCertificates(others.certificate())
                    .build());
        KeyturnClient plain =
            KeyturnClient.create(sidecar.options().retries(Retries.of(1)).build())) {
      assertTrue(client.decide(U1).allowed());
      assertEquals("Bearer t", sidecar.headers.get(0).get(AUTHORIZATION));
      assertThrows(UnavailableException.class, () -> wary.decide(U1));
      assertThrows(UnavailableException.class, () -> plain.decide(U1));
      assertEquals(1, sidecar.asked.size());
    }
  }

  @Test
  void aClientCertificateIsShown() {
    Certificates sidecars = Certificates.selfSigned("sidecar");
    Certificates gateways = Certificates.selfSigned("gateway");
    try (ScriptedSidecar sidecar = ScriptedSidecar.onLoopback(server(sidecars, gateways));
        KeyturnClient known =
            KeyturnClient.create(
                sidecar
                    .options()
                    .rootCertificates(sidecars.certificate())
                    .certificateChain(gateways.certificate())
                    .privateKey(gateways.privateKey())
                    .build());
        KeyturnClient nobody =
            KeyturnClient.create(
                sidecar
                    .options()
                    .retries(Retries.of(1))
                    .rootCertificates(sidecars.certificate())
                    .build())) {
      assertTrue(known.decide(U1).allowed());
      assertThrows(UnavailableException.class, () -> nobody.decide(U1));
    }
  }

  private static io.grpc.ServerCredentials server(Certificates own, Certificates asked) {
    try {
      TlsServerCredentials.Builder credentials =
          TlsServerCredentials.newBuilder()
              .keyManager(
                  new ByteArrayInputStream(own.certificate()),
                  new ByteArrayInputStream(own.privateKey()));
      if (asked != null) {
        credentials
            .trustManager(new ByteArrayInputStream(asked.certificate()))
            .clientAuth(TlsServerCredentials.ClientAuth.REQUIRE);
      }
      return credentials.build();
    } catch (IOException error) {
      throw new IllegalStateException(error);
    }
  }

  @Test
  void aProxyIsNotUsedForLoopback() throws IOException {
    try (ServerSocket proxy = new ServerSocket(0, 1, InetAddress.getLoopbackAddress());
        ScriptedSidecar sidecar = ScriptedSidecar.onLoopback()) {
      Map<String, String> proxied =
          Map.of(
              "https.proxyHost", "127.0.0.1",
              "https.proxyPort", Integer.toString(proxy.getLocalPort()),
              "http.nonProxyHosts", "");
      Map<String, String> before =
          proxied.keySet().stream()
              .filter(name -> System.getProperty(name) != null)
              .collect(Collectors.toMap(name -> name, System::getProperty));
      proxied.forEach(System::setProperty);
      try (KeyturnClient client = sidecar.client()) {
        assertTrue(client.decide(U1).allowed());
      } finally {
        proxied.keySet().forEach(System::clearProperty);
        before.forEach(System::setProperty);
      }
    }
  }

  @Test
  void nothingConnectsBeforeTheFirstCall() {
    try (ScriptedSidecar sidecar = ScriptedSidecar.notYet();
        KeyturnClient client = KeyturnClient.create(sidecar.options().build())) {
      sidecar.listen();
      assertTrue(client.decide(U1).allowed());
    }
  }

  @Test
  void closingLeavesNoThreadOfTheClients() throws InterruptedException {
    Set<Thread> before = ours();
    try (ScriptedSidecar sidecar = ScriptedSidecar.onSocket()) {
      KeyturnClient client = sidecar.client();
      client.recordLater(RecordRequest.of(SealedTicket.of("t"), Outcome.SUCCESS));
      client.flush();
      Set<Thread> during = ours();
      during.removeAll(before);
      assertEquals(2, during.size());
      assertTrue(during.stream().allMatch(Thread::isDaemon));
      client.close();
      for (Thread each : during) {
        each.join(10_000);
        assertFalse(each.isAlive(), each::getName);
      }
    }
  }

  private static Set<Thread> ours() {
    return Thread.getAllStackTraces().keySet().stream()
        .filter(thread -> thread.getName().startsWith("keyturn"))
        .collect(Collectors.toSet());
  }

  @Test
  void aClientIsSharedByManyThreads() throws InterruptedException {
    try (ScriptedSidecar sidecar = ScriptedSidecar.onSocket();
        KeyturnClient client = sidecar.client()) {
      List<Thread> threads =
          java.util.stream.IntStream.range(0, 8)
              .mapToObj(
                  number ->
                      new Thread(
                          () -> {
                            for (int i = 0; i < 50; i++) {
                              try (Call call = client.request(U1)) {
                                call.succeeded();
                              }
                            }
                          }))
              .toList();
      threads.forEach(Thread::start);
      for (Thread thread : threads) {
        thread.join();
      }
      client.flush();
      assertEquals(400, sidecar.batched().size());
    }
  }
}
