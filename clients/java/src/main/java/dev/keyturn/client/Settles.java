package dev.keyturn.client;

/**
 * What a record may settle: a decision, its key or ticket, or the sealed text of one.
 *
 * <p>A decision that was denied, or made without the sidecar, has nothing to settle.
 */
public sealed interface Settles
    permits Decision, KeyHandle, CreditTicket, SealedHandle, SealedTicket {}
