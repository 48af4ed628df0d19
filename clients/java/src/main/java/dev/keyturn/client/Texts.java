package dev.keyturn.client;

/** How texts are cut. */
final class Texts {
  private static final int SHOWN = 8;
  // A text that is not clearly longer than what is shown of it is not shown at all.
  private static final int SHOWN_FROM = 32;

  private Texts() {}

  /** The beginning of a sealed text, enough to tell two of them apart in a log. */
  static String cut(String sealed) {
    return (sealed.length() >= SHOWN_FROM ? sealed.substring(0, SHOWN) : "") + "…";
  }

  /** At most {@code limit} Unicode code points of {@code text}. */
  static String atMost(int limit, String text) {
    return text.codePointCount(0, text.length()) <= limit
        ? text
        : text.substring(0, text.offsetByCodePoints(0, limit));
  }
}
