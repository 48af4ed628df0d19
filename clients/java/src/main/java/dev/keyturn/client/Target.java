package dev.keyturn.client;

import java.io.IOException;
import java.net.Inet6Address;
import java.net.InetAddress;
import java.net.UnknownHostException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.function.UnaryOperator;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/** Where the sidecar is: a Unix socket ({@code socket}), or a host and a port. */
record Target(String text, Path socket, String host, int port) {
  private static final Pattern HOST_PORT =
      Pattern.compile("(\\[[^\\[\\]]+]|[^\\[\\]:/\\s]+):(\\d{1,5})");
  private static final Pattern LOOPBACK = Pattern.compile("127(\\.(0|[1-9]\\d{0,2})){3}");

  /**
   * What {@code given} (null or empty: the environment, else the default socket) names.
   *
   * @throws IllegalArgumentException for anything but a Unix socket or HOST:PORT
   */
  static Target of(String given, UnaryOperator<String> environment) {
    String text = given;
    if (text == null || text.isEmpty()) {
      text = environment.apply("KEYTURN_ADDRESS");
    }
    if (text == null || text.isEmpty()) {
      text = "unix:" + defaultSocket(isRoot(), environment);
    }
    return text.startsWith("unix:") ? unix(text) : tcp(text);
  }

  /** Where a sidecar on this machine listens when nobody says otherwise. */
  static Path defaultSocket(boolean root, UnaryOperator<String> environment) {
    String runtime = environment.apply("XDG_RUNTIME_DIR");
    if (root) {
      return Path.of("/run/keyturn/keyturn.sock");
    }
    if (runtime != null && !runtime.isEmpty()) {
      return Path.of(runtime, "keyturn", "keyturn.sock");
    }
    String home = environment.apply("HOME");
    home = home == null || home.isEmpty() ? System.getProperty("user.home") : home;
    return Path.of(home, ".keyturn", "run", "keyturn.sock");
  }

  /** Whether it is this machine by its name or number; no name is looked up. */
  boolean isLoopback() {
    if (socket != null || host.equals("localhost")) {
      return true;
    }
    if (host.indexOf(':') < 0) {
      return LOOPBACK.matcher(host).matches();
    }
    try {
      // In brackets it is taken for a number or refused, never looked up.
      InetAddress address = InetAddress.getByName("[" + host + "]");
      return address instanceof Inet6Address && address.isLoopbackAddress();
    } catch (UnknownHostException noNumber) {
      return false;
    }
  }

  private static Target unix(String text) {
    String path = text.substring("unix:".length());
    if (path.startsWith("//")) {
      path = path.substring(2);
      if (!path.startsWith("/")) {
        throw new IllegalArgumentException(
            text + ": write unix:PATH, or unix:///PATH for an absolute one");
      }
    }
    if (path.isEmpty()) {
      throw new IllegalArgumentException(text + ": the path of the socket is missing");
    }
    return new Target(text, Path.of(path), null, 0);
  }

  private static Target tcp(String text) {
    Matcher parts = HOST_PORT.matcher(text);
    if (!parts.matches() || Integer.parseInt(parts.group(2)) > 65_535) {
      throw new IllegalArgumentException(
          text + ": write unix:PATH or HOST:PORT ([HOST]:PORT for IPv6)");
    }
    String host = parts.group(1);
    if (host.startsWith("[")) {
      host = host.substring(1, host.length() - 1);
    }
    return new Target(text, null, host, Integer.parseInt(parts.group(2)));
  }

  private static boolean isRoot() {
    try {
      return Integer.valueOf(0).equals(Files.getAttribute(Path.of("/proc/self"), "unix:uid"));
    } catch (IOException | UnsupportedOperationException | IllegalArgumentException elsewhere) {
      return "root".equals(System.getProperty("user.name"));
    }
  }
}
