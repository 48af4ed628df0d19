package dev.keyturn.client;

/**
 * The text of a credit ticket, opaque and sealed by the sidecar. It prints cut; {@link #text()} is
 * what to send and to store.
 */
public final class SealedTicket implements Settles {
  // `transient`: serializers that read fields by reflection pass over it.
  private final transient String text;

  private SealedTicket(String text) {
    this.text = text;
  }

  /**
   * The credit ticket whose text was stored.
   *
   * @throws IllegalArgumentException for an empty text
   */
  public static SealedTicket of(String text) {
    if (text.isEmpty()) {
      throw new IllegalArgumentException("the text of a credit ticket is not empty");
    }
    return new SealedTicket(text);
  }

  /** The whole text. Whoever has it can settle the hold. */
  public String text() {
    return text;
  }

  @Override
  public boolean equals(Object other) {
    return other instanceof SealedTicket sealed && text.equals(sealed.text);
  }

  @Override
  public int hashCode() {
    return text.hashCode();
  }

  @Override
  public String toString() {
    return "SealedTicket(" + Texts.cut(text) + ")";
  }
}
