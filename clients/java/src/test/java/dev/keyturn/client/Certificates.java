package dev.keyturn.client;

import java.io.IOException;
import java.io.InputStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.GeneralSecurityException;
import java.security.KeyStore;
import java.util.Base64;

/** A self-signed identity, made by the JDK's own keytool, as PEM. */
record Certificates(byte[] certificate, byte[] privateKey) {
  private static final char[] PASSWORD = "changeit".toCharArray();

  static Certificates selfSigned(String name) {
    try {
      Path directory = Files.createTempDirectory("kt");
      Path store = directory.resolve("store.p12");
      Process keytool =
          new ProcessBuilder(
                  Path.of(System.getProperty("java.home"), "bin", "keytool").toString(),
                  "-genkeypair",
                  "-alias",
                  "it",
                  "-keyalg",
                  "EC",
                  "-groupname",
                  "secp256r1",
                  "-dname",
                  "CN=" + name,
                  "-ext",
                  "san=dns:localhost,ip:127.0.0.1",
                  "-validity",
                  "1",
                  "-storetype",
                  "PKCS12",
                  "-keystore",
                  store.toString(),
                  "-storepass",
                  new String(PASSWORD))
              .redirectErrorStream(true)
              .start();
      String said = new String(keytool.getInputStream().readAllBytes(), StandardCharsets.UTF_8);
      if (keytool.waitFor() != 0) {
        throw new IllegalStateException(said);
      }
      KeyStore keys = KeyStore.getInstance("PKCS12");
      try (InputStream in = Files.newInputStream(store)) {
        keys.load(in, PASSWORD);
      }
      Files.delete(store);
      Files.delete(directory);
      return new Certificates(
          pem("CERTIFICATE", keys.getCertificate("it").getEncoded()),
          pem("PRIVATE KEY", keys.getKey("it", PASSWORD).getEncoded()));
    } catch (IOException | GeneralSecurityException | InterruptedException error) {
      throw new IllegalStateException(error);
    }
  }

  private static byte[] pem(String kind, byte[] der) {
    String lines = Base64.getMimeEncoder().encodeToString(der);
    String pem = "-----BEGIN " + kind + "-----\n" + lines + "\n-----END " + kind + "-----\n";
    return pem.getBytes(StandardCharsets.US_ASCII);
  }
}
