package dev.keyturn.client;

/**
 * The policy said no. Thrown by {@link KeyturnClient#request} and {@link Call#keyRefused} only.
 *
 * <p>Not a {@link KeyturnException}: whoever lets requests pass on a fault must not let a denial
 * pass.
 */
public final class DeniedException extends RuntimeException {
  private static final long serialVersionUID = 1L;

  private final transient Decision decision;

  DeniedException(Decision decision) {
    super(
        decision.denial() != null
            ? decision.denial().reason() + ": " + decision.message()
            : decision.message());
    this.decision = decision;
  }

  /** The decision, whose {@code denial} says why. Not serialized: null after that. */
  public Decision decision() {
    return decision;
  }
}
