package dev.keyturn.client;

import java.util.Set;

/** How the request to the provider ended. What each one charges is for when credits pay. */
public enum Outcome {
  /** The provider answered. Charged: the cost or usage given; with neither, the whole hold. */
  SUCCESS,
  /** The caller's client went away. Charged: the cost or usage given, else nothing. */
  CLIENT_CANCELLED,
  /** The request never left the gateway. Nothing is charged. */
  NEVER_SENT,
  /** The provider refused the credential. Nothing is charged; an own key becomes invalid. */
  AUTH_REJECTED,
  /** Too many requests. Nothing is charged; an own key cools down for a while. */
  RATE_LIMITED,
  /** The provider wants to be paid first. Nothing is charged; an own key cools down for longer. */
  PROVIDER_BILLING,
  /** The provider failed. Charged: the cost or usage given, else nothing. */
  PROVIDER_ERROR,
  /** The provider did not answer in time. Charged: the cost or usage given, else nothing. */
  TIMEOUT,
  /** The provider refused the request itself. Nothing is charged. */
  REFUSED,
  /** Anything else. Charged: the cost or usage given, else nothing. */
  UNKNOWN;

  private static final Set<String> UNPAID =
      Set.of(
          "insufficient_quota",
          "billing_hard_limit_reached",
          "billing_not_active",
          "billing_error");

  /**
   * What to record for a provider's HTTP status.
   *
   * @param status the HTTP status
   * @param errorCode the {@code code}, else the {@code type}, of the {@code error} object in the
   *     provider's answer; or null
   */
  public static Outcome outcomeOf(int status, String errorCode) {
    if (status >= 200 && status < 300) {
      return SUCCESS;
    }
    boolean refused = status >= 400 && status < 500;
    if (status == 402 || refused && "billing_error".equals(errorCode)) {
      return PROVIDER_BILLING;
    }
    if (status == 429) {
      return errorCode != null && UNPAID.contains(errorCode) ? PROVIDER_BILLING : RATE_LIMITED;
    }
    if (status == 401 || status == 403) {
      return AUTH_REJECTED;
    }
    if (status == 408 || status == 504) {
      return TIMEOUT;
    }
    return refused ? REFUSED : PROVIDER_ERROR;
  }
}
