package dev.keyturn.client;

/**
 * A record of the background that did not get through.
 *
 * @param record what to record; {@link KeyturnClient#recordMany} takes it
 * @param error why it was not taken: a {@link KeyturnException} of its last try, a {@link
 *     QueueFullException}, or an {@code IllegalStateException} when the client was closed before
 *     the first
 */
public record Unsent(RecordRequest record, RuntimeException error) {}
