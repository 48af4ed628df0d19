package dev.keyturn.client;

/**
 * Tokens used. A count that is null was not given.
 *
 * @param inputTokens all input tokens, cached ones included
 * @param outputTokens all output tokens, reasoning included
 * @param cacheReadTokens of the input: read from the provider's cache
 * @param cacheWriteTokens of the input: written to the provider's cache
 * @param totalTokens the total as the provider counts it
 */
public record Usage(
    Long inputTokens,
    Long outputTokens,
    Long cacheReadTokens,
    Long cacheWriteTokens,
    Long totalTokens) {

  /** No count given. */
  public static final Usage NONE = new Usage(null, null, null, null, null);

  /** Tokens in and out. */
  public static Usage of(long inputTokens, long outputTokens) {
    return new Usage(inputTokens, outputTokens, null, null, null);
  }

  /** This, with that many input tokens. */
  public Usage inputTokens(long count) {
    return new Usage(count, outputTokens, cacheReadTokens, cacheWriteTokens, totalTokens);
  }

  /** This, with that many output tokens. */
  public Usage outputTokens(long count) {
    return new Usage(inputTokens, count, cacheReadTokens, cacheWriteTokens, totalTokens);
  }

  /** This, with that many tokens read from the cache. */
  public Usage cacheReadTokens(long count) {
    return new Usage(inputTokens, outputTokens, count, cacheWriteTokens, totalTokens);
  }

  /** This, with that many tokens written to the cache. */
  public Usage cacheWriteTokens(long count) {
    return new Usage(inputTokens, outputTokens, cacheReadTokens, count, totalTokens);
  }

  /** This, with that total. */
  public Usage totalTokens(long count) {
    return new Usage(inputTokens, outputTokens, cacheReadTokens, cacheWriteTokens, count);
  }

  /** This, with the counts that {@code later} has in place of its own. */
  Usage updatedBy(Usage later) {
    return new Usage(
        given(later.inputTokens, inputTokens),
        given(later.outputTokens, outputTokens),
        given(later.cacheReadTokens, cacheReadTokens),
        given(later.cacheWriteTokens, cacheWriteTokens),
        given(later.totalTokens, totalTokens));
  }

  private static Long given(Long later, Long earlier) {
    return later != null ? later : earlier;
  }
}
