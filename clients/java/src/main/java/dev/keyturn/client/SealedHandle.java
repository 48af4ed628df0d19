package dev.keyturn.client;

/**
 * The text of a key handle, opaque and sealed by the sidecar. It prints cut; {@link #text()} is
 * what to send and to store.
 */
public final class SealedHandle implements Settles {
  // `transient`: serializers that read fields by reflection pass over it.
  private final transient String text;

  private SealedHandle(String text) {
    this.text = text;
  }

  /**
   * The key handle whose text was stored.
   *
   * @throws IllegalArgumentException for an empty text
   */
  public static SealedHandle of(String text) {
    if (text.isEmpty()) {
      throw new IllegalArgumentException("the text of a key handle is not empty");
    }
    return new SealedHandle(text);
  }

  /** The whole text. Whoever has it can record against the key. */
  public String text() {
    return text;
  }

  @Override
  public boolean equals(Object other) {
    return other instanceof SealedHandle sealed && text.equals(sealed.text);
  }

  @Override
  public int hashCode() {
    return text.hashCode();
  }

  @Override
  public String toString() {
    return "SealedHandle(" + Texts.cut(text) + ")";
  }
}
