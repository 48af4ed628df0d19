package dev.keyturn.client;

/** How a caller tightens the policy for one request; it can never relax it. */
public enum Constraint {
  /** Whatever the policy allows. */
  ANY,
  /** Only the user's own key may pay. */
  OWN_KEY_ONLY,
  /** Only credits may pay. */
  CREDITS_ONLY
}
