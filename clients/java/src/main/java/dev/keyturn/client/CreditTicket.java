package dev.keyturn.client;

import java.time.Instant;

/**
 * A hold on the user's prepaid balance for one request.
 *
 * @param ticket what to send back in a record; prints cut
 * @param holdMicros how much is held
 * @param availableMicros what the user can still spend after this hold
 * @param expireTime when the hold is released by itself. Null in an explanation
 */
public record CreditTicket(
    SealedTicket ticket, long holdMicros, long availableMicros, Instant expireTime)
    implements Settles {}
