package dev.keyturn.client;

import java.util.List;

/**
 * What {@code decide} would answer now, and the way to it.
 *
 * @param decision the decision, with no id, handle, ticket or secret
 * @param steps the way to it, in order
 */
public record Explanation(Decision decision, List<ExplainStep> steps) {
  /** Keeps a copy of {@code steps}. */
  public Explanation {
    steps = List.copyOf(steps);
  }
}
