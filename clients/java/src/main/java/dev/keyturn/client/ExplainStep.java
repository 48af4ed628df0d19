package dev.keyturn.client;

/**
 * One step on the way to a decision.
 *
 * @param check what was looked at, e.g. {@code flag byok_enabled}
 * @param result what was found, in a word or two
 * @param detail where it comes from and what it means here
 */
public record ExplainStep(String check, String result, String detail) {}
