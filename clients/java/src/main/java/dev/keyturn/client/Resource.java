package dev.keyturn.client;

import java.io.Serializable;

/**
 * What was not found.
 *
 * @param type its kind, e.g. {@code user}
 * @param name its id
 * @param description more about it, may be empty
 */
public record Resource(String type, String name, String description) implements Serializable {}
