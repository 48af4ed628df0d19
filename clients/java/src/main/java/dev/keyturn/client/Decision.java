package dev.keyturn.client;

/**
 * Whose credential pays: one of {@code key}, {@code ticket} and {@code denial} is set, the others
 * are null.
 *
 * <p>None of them is set when a newer sidecar answers with a route that this client does not know
 * ({@link #allowed()} is false then), and when the decision is {@code unmetered}.
 *
 * @param decisionId the id of this decision; that of its record later
 * @param mode the mode in force
 * @param reason why this route
 * @param message one plain sentence for logs and support
 * @param degraded made from cached data, because the database could not be asked
 * @param replayed the request id was seen before, and this is its first ticket again
 * @param unmetered made without the sidecar, by {@link WhenDown}: the request goes ahead on the
 *     platform's own credential, and nothing is recorded for it
 * @param key the user's own key, when that pays
 * @param ticket the hold on the user's credits, when those pay
 * @param denial why nobody's credential may pay
 */
public record Decision(
    String decisionId,
    Mode mode,
    Reason reason,
    String message,
    boolean degraded,
    boolean replayed,
    boolean unmetered,
    KeyHandle key,
    CreditTicket ticket,
    Denial denial)
    implements Settles {

  /** Whether the request may go ahead. */
  public boolean allowed() {
    return key != null || ticket != null || unmetered;
  }

  static Decision withoutSidecar() {
    return new Decision(
        "",
        Mode.UNSPECIFIED,
        Reason.UNSPECIFIED,
        "The sidecar is out of reach: this request goes ahead unmetered.",
        false,
        false,
        true,
        null,
        null,
        null);
  }
}
