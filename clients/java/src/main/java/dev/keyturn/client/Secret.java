package dev.keyturn.client;

import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.util.Objects;

/**
 * A string that shows itself as {@code Secret(***)}; {@link #reveal()} is the one way out.
 *
 * <p>Equality is in constant time in the contents (not in the length). It is not {@code
 * Serializable}, and has no getter and no field that serializers look at.
 */
public final class Secret {
  // `transient`: serializers that read fields by reflection pass over it.
  private final transient String value;

  private Secret(String value) {
    this.value = Objects.requireNonNull(value, "value");
  }

  /** A secret that holds {@code value}. */
  public static Secret of(String value) {
    return new Secret(value);
  }

  /** The value itself. Search for {@code .reveal(} to find every place that sees it. */
  public String reveal() {
    return value;
  }

  @Override
  public boolean equals(Object other) {
    return other instanceof Secret secret && MessageDigest.isEqual(bytes(), secret.bytes());
  }

  /** The same for every secret: a hash of the contents would tell of them. */
  @Override
  public int hashCode() {
    return 0;
  }

  @Override
  public String toString() {
    return "Secret(***)";
  }

  private byte[] bytes() {
    return value.getBytes(StandardCharsets.UTF_8);
  }
}
