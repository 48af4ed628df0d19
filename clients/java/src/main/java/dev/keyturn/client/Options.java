package dev.keyturn.client;

import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.Objects;
import java.util.function.Consumer;

/** How to reach the sidecar, and the defaults of calls. */
public final class Options {
  /** What nobody said otherwise: the sidecar of this machine. */
  public static final Options DEFAULT = builder().build();

  // `transient`, down to the builder: serializers that read fields by reflection pass over them.
  private final transient Builder given;

  private Options(Builder given) {
    this.given = given;
  }

  /** Options to say. */
  public static Builder builder() {
    return new Builder();
  }

  String target() {
    return given.target;
  }

  Secret token() {
    return given.token;
  }

  Secret rootCertificates() {
    return given.rootCertificates;
  }

  Secret certificateChain() {
    return given.certificateChain;
  }

  Secret privateKey() {
    return given.privateKey;
  }

  boolean tls() {
    return given.tls
        || given.rootCertificates != null
        || given.certificateChain != null
        || given.privateKey != null;
  }

  Duration timeout() {
    return given.timeout;
  }

  Retries retries() {
    return given.retries;
  }

  int queueSize() {
    return given.queueSize;
  }

  Duration closeTimeout() {
    return given.closeTimeout;
  }

  Consumer<Unsent> onUnsent() {
    return given.onUnsent;
  }

  WhenDown whenDown() {
    return given.whenDown;
  }

  /** The target and the timeout: neither token nor key. */
  @Override
  public String toString() {
    return "Options[target=" + given.target + ", timeout=" + given.timeout + "]";
  }

  /** Collects options. */
  public static final class Builder implements Cloneable {
    private String target;
    private transient Secret token;
    private transient Secret rootCertificates;
    private transient Secret certificateChain;
    private transient Secret privateKey;
    private boolean tls;
    private Duration timeout = Duration.ofSeconds(2);
    private Retries retries = Retries.DEFAULT;
    private int queueSize = 10_000;
    private Duration closeTimeout = Duration.ofSeconds(5);
    private transient Consumer<Unsent> onUnsent;
    private transient WhenDown whenDown;

    private Builder() {}

    /**
     * {@code unix:PATH}, {@code unix:///PATH} or {@code HOST:PORT}. Not given: the environment
     * variable {@code KEYTURN_ADDRESS}, else the sidecar's own default.
     */
    public Builder target(String value) {
      target = value;
      return this;
    }

    /** A bearer token; null: none. */
    public Builder token(String value) {
      return token(value == null ? null : Secret.of(value));
    }

    /** A bearer token; null: none. */
    public Builder token(Secret value) {
      token = value;
      return this;
    }

    /** The authorities to trust, as PEM; turns TLS on. */
    public Builder rootCertificates(byte[] pem) {
      rootCertificates = pem(pem);
      return this;
    }

    /** The client certificate of mutual TLS, as PEM; turns TLS on. */
    public Builder certificateChain(byte[] pem) {
      certificateChain = pem(pem);
      return this;
    }

    /** The client certificate's key, as PEM (PKCS #8); turns TLS on. */
    public Builder privateKey(byte[] pem) {
      privateKey = pem(pem);
      return this;
    }

    /** TLS with the authorities that Java trusts. A host that is not this one needs TLS. */
    public Builder tls(boolean value) {
      tls = value;
      return this;
    }

    /** The deadline of every call, retries included. */
    public Builder timeout(Duration value) {
      timeout = positive("timeout", value);
      return this;
    }

    /** See {@link Retries}. */
    public Builder retries(Retries value) {
      retries = Objects.requireNonNull(value, "retries");
      return this;
    }

    /** How many records the background holds. */
    public Builder queueSize(int value) {
      if (value < 1) {
        throw new IllegalArgumentException("queueSize is at least 1");
      }
      queueSize = value;
      return this;
    }

    /** How long closing goes on sending what the background holds. */
    public Builder closeTimeout(Duration value) {
      if (value.isNegative()) {
        throw new IllegalArgumentException("closeTimeout cannot be negative");
      }
      closeTimeout = value;
      return this;
    }

    /**
     * What is called with every record that did not get through; by default it is logged. It must
     * not wait for the client: neither flush nor close it.
     */
    public Builder onUnsent(Consumer<Unsent> value) {
      onUnsent = value;
      return this;
    }

    /** Whether requests may go ahead while the sidecar is down; by default they may not. */
    public Builder whenDown(WhenDown value) {
      whenDown = value;
      return this;
    }

    /** The options. What does not go together is refused when the client is made. */
    public Options build() {
      return new Options(clone());
    }

    /** Prints as the options do. */
    @Override
    public String toString() {
      return build().toString();
    }

    @Override
    protected Builder clone() {
      try {
        return (Builder) super.clone();
      } catch (CloneNotSupportedException impossible) {
        throw new AssertionError(impossible);
      }
    }

    private static Secret pem(byte[] pem) {
      return pem == null ? null : Secret.of(new String(pem, StandardCharsets.ISO_8859_1));
    }

    static Duration positive(String name, Duration value) {
      if (value.isZero() || value.isNegative()) {
        throw new IllegalArgumentException(name + " is more than zero");
      }
      return value;
    }
  }
}
