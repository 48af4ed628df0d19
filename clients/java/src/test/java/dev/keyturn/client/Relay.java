package dev.keyturn.client;

import java.io.IOException;
import java.io.InputStream;
import java.io.OutputStream;
import java.io.UncheckedIOException;
import java.net.InetAddress;
import java.net.ServerSocket;
import java.net.Socket;
import java.util.List;
import java.util.concurrent.CopyOnWriteArrayList;

/** Stands between a client and a sidecar on loopback, and cuts all connections when told to. */
final class Relay implements AutoCloseable {
  private final ServerSocket listening;
  private final int sidecar;
  private final List<Socket> ends = new CopyOnWriteArrayList<>();

  Relay(String target) {
    try {
      sidecar = Integer.parseInt(target.substring(target.lastIndexOf(':') + 1));
      listening = new ServerSocket(0, 50, InetAddress.getLoopbackAddress());
    } catch (IOException error) {
      throw new UncheckedIOException(error);
    }
    start(this::accept);
  }

  String target() {
    return "127.0.0.1:" + listening.getLocalPort();
  }

  /** Ends every connection: by a reset, or as if the peer had gone in peace. */
  void cut(boolean reset) {
    ends.forEach(end -> close(end, reset));
    ends.clear();
  }

  private void accept() {
    while (!listening.isClosed()) {
      try {
        Socket client = listening.accept();
        Socket server = new Socket(InetAddress.getLoopbackAddress(), sidecar);
        ends.add(client);
        ends.add(server);
        start(() -> pass(client, server));
        start(() -> pass(server, client));
      } catch (IOException closed) {
        return;
      }
    }
  }

  private static void pass(Socket from, Socket to) {
    try (InputStream in = from.getInputStream();
        OutputStream out = to.getOutputStream()) {
      in.transferTo(out);
    } catch (IOException cut) {
      close(to, true);
    }
  }

  private static void close(Socket socket, boolean reset) {
    try {
      socket.setSoLinger(reset, 0);
      socket.close();
    } catch (IOException already) {
      return;
    }
  }

  private static void start(Runnable work) {
    Thread thread = new Thread(work, "relay");
    thread.setDaemon(true);
    thread.start();
  }

  @Override
  public void close() {
    close(listening);
    cut(true);
  }

  private static void close(ServerSocket socket) {
    try {
      socket.close();
    } catch (IOException error) {
      throw new UncheckedIOException(error);
    }
  }
}
