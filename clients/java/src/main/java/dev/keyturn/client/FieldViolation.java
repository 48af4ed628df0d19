package dev.keyturn.client;

import java.io.Serializable;

/**
 * A field that the sidecar refused.
 *
 * @param field its path, e.g. {@code user_id}
 * @param description what its limit is
 */
public record FieldViolation(String field, String description) implements Serializable {}
