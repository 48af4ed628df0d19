package dev.keyturn.client;

import java.time.Duration;

/**
 * Why nobody's credential may pay.
 *
 * @param reason the reason, for programs
 * @param retryable whether the same request may well succeed later with nothing else changed
 * @param retryAfter how long to wait at least, or null
 * @param suggestion what the user or an operator can do about it: one sentence
 */
public record Denial(
    DenialReason reason, boolean retryable, Duration retryAfter, String suggestion) {}
