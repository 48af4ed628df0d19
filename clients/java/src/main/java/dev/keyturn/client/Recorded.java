package dev.keyturn.client;

/**
 * A record as it was taken. Amounts in micros.
 *
 * @param recordId the id of the record: that of its decision
 * @param chargedMicros what the user's balance was charged; always 0 for an own key
 * @param releasedMicros what was held and not charged
 * @param balanceMicros the balance after the charge, which may be below zero; null for an own key
 * @param costSource where the cost comes from
 * @param replayed it was taken before, and this is its first answer again
 * @param durability where it is durable
 * @param keyState an own key's state after this record; UNSPECIFIED for a ticket
 */
public record Recorded(
    String recordId,
    long chargedMicros,
    long releasedMicros,
    Long balanceMicros,
    CostSource costSource,
    boolean replayed,
    Durability durability,
    KeyState keyState) {}
