/**
 * What the client takes and gives: plain values, with no generated message in them.
 *
 * Money is in micros (1 USD = 1,000,000), as `number`: exact up to 2^53, which is nine billion
 * dollars. A number that is not exact is refused; an answer beyond that reads as that limit. Spans
 * are in milliseconds and say so (`retryAfterMs`), times are `Date`.
 */

import { SealedHandle, SealedTicket } from "./sealed.js";
import type { Secret } from "./secret.js";
import type {
  Constraint,
  CostSource,
  DenialReason,
  Durability,
  KeyState,
  Mode,
  Outcome,
  Reason,
} from "./words.js";

/** The user's own key for one request. */
export class KeyHandle {
  readonly handle: SealedHandle;
  readonly keyId: string;
  readonly provider: string;
  /** The last four characters of the secret, to show to its owner. */
  readonly hint: string;
  /** Undefined when it was asked for with `redeem: true`: fetch it with `Client.redeem`. */
  readonly secret: Secret | undefined;
  readonly authHeader: string;
  readonly authPrefix: string;
  /** Where the provider's API is, e.g. `https://api.openai.com/v1`. */
  readonly baseUrl: string;
  /** Until when it may be redeemed; a record is taken 7 days longer. Undefined in an explanation. */
  readonly expireTime: Date | undefined;

  constructor(fields: Omit<KeyHandle, "headers">) {
    this.handle = fields.handle;
    this.keyId = fields.keyId;
    this.provider = fields.provider;
    this.hint = fields.hint;
    this.secret = fields.secret;
    this.authHeader = fields.authHeader;
    this.authPrefix = fields.authPrefix;
    this.baseUrl = fields.baseUrl;
    this.expireTime = fields.expireTime;
    Object.freeze(this);
  }

  /**
   * The one header that signs a request with this key. It holds the secret: never log it.
   *
   * Throws `TypeError` when the secret was not delivered with the decision, or cannot be sent.
   */
  headers(): Record<string, string> {
    if (this.secret === undefined) {
      throw new TypeError("the secret is not here: fetch it once with redeem()");
    }
    const value = this.authPrefix + this.secret.reveal();
    if (!/^[\t -~\u0080-\u00ff]*$/.test(value)) {
      // `fetch` and `node:http` would refuse it too, and some quote it.
      throw new TypeError("the secret has a character that no header may hold");
    }
    return { [this.authHeader]: value };
  }
}

/** A hold on the user's prepaid balance for one request. */
export interface CreditTicket {
  readonly ticket: SealedTicket;
  readonly holdMicros: number;
  /** What the user can still spend after this hold. */
  readonly availableMicros: number;
  /** When the hold is released by itself. Undefined in an explanation. */
  readonly expireTime: Date | undefined;
}

/** Why nobody's credential may pay. */
export interface Denial {
  readonly reason: DenialReason;
  readonly retryable: boolean;
  readonly retryAfterMs: number | undefined;
  /** What the user or an operator can do about it: one sentence. */
  readonly suggestion: string;
}

/**
 * Whose credential pays: one of `key`, `ticket` and `denial` is set.
 *
 * None of them is set when it is `unmetered`, or when a newer sidecar answers with a route that
 * this client does not know, which is not `allowed`.
 */
export interface Decision {
  readonly decisionId: string;
  readonly mode: Mode;
  readonly reason: Reason;
  /** One plain sentence for logs and support. */
  readonly message: string;
  /** Made from cached data, because the database could not be asked. */
  readonly degraded: boolean;
  /** `requestId` was seen before, and this is its first ticket again. */
  readonly replayed: boolean;
  /** The sidecar could not be asked, and `whenDown` let the request pass. Nothing is recorded. */
  readonly unmetered: boolean;
  /** Whether the request may go ahead. */
  readonly allowed: boolean;
  readonly key: KeyHandle | undefined;
  readonly ticket: CreditTicket | undefined;
  readonly denial: Denial | undefined;
}

/** A record as it was taken. */
export interface Recorded {
  readonly recordId: string;
  /** What the user's balance was charged; always 0 for an own key. */
  readonly chargedMicros: number;
  /** What was held and not charged. */
  readonly releasedMicros: number;
  /** The balance after the charge, which may be below zero; undefined for an own key. */
  readonly balanceMicros: number | undefined;
  readonly costSource: CostSource;
  /** It was taken before, and this is its first answer again. */
  readonly replayed: boolean;
  readonly durability: Durability;
  /** An own key's state after this record; UNSPECIFIED for a ticket. */
  readonly keyState: KeyState;
}

/** One step on the way to a decision. */
export interface ExplainStep {
  readonly check: string;
  readonly result: string;
  readonly detail: string;
}

/** What `decide` would answer now (with no id, handle, ticket or secret), and the way to it. */
export interface Explanation {
  readonly decision: Decision;
  readonly steps: readonly ExplainStep[];
}

/** One request that a gateway is about to make for a user. A cost and tokens exclude each other. */
export interface DecideRequest {
  readonly userId: string;
  /** An id in `api_providers`, e.g. `openai`. */
  readonly provider: string;
  /** The provider's name of the model; prices the estimate. */
  readonly model?: string | undefined;
  /** A label for reports, e.g. `copilot`. */
  readonly serviceType?: string | undefined;
  /** The same id by the same user never places a second hold. Not given: a new one is made. */
  readonly requestId?: string | undefined;
  /** The estimate as a cost. With neither a cost nor tokens: the sidecar's default hold. */
  readonly costMicros?: number | undefined;
  /** The estimate as tokens, priced by `model`. */
  readonly inputTokens?: number | undefined;
  readonly maxOutputTokens?: number | undefined;
  readonly constraint?: Constraint | undefined;
  /** Keys of earlier decisions of this request that the provider refused: they are left out. */
  readonly failedKeys?: readonly (KeyHandle | SealedHandle)[] | undefined;
  /** True: the answer has no secret; fetch it once with `redeem`. */
  readonly redeem?: boolean | undefined;
  /** How long the hold or the handle lives, 1 s to 24 h. Not given: the sidecar's 10 minutes. */
  readonly holdTtlMs?: number | undefined;
}

/** Tokens used. `inputTokens` counts cached ones in; `totalTokens` is the provider's count. */
export interface Usage {
  readonly inputTokens?: number | undefined;
  readonly outputTokens?: number | undefined;
  readonly cacheReadTokens?: number | undefined;
  readonly cacheWriteTokens?: number | undefined;
  readonly totalTokens?: number | undefined;
}

/** What a record may settle: a decision, what it gave, or that one's sealed text. */
export type Settles = Decision | KeyHandle | CreditTicket | SealedHandle | SealedTicket;

/** What became of one request. */
export interface RecordRequest {
  readonly settles: Settles;
  readonly outcome: Outcome;
  /** Not given is not zero: it means that the caller does not know. */
  readonly usage?: Usage | undefined;
  /** What the request cost, when the caller knows; wins over `usage`. */
  readonly costMicros?: number | undefined;
  /** The model that answered, when it is not the one of the decision. */
  readonly model?: string | undefined;
  /** The provider's endpoint, e.g. `/v1/chat/completions`. */
  readonly endpoint?: string | undefined;
  readonly responseTimeMs?: number | undefined;
  readonly httpStatus?: number | undefined;
  /** The provider's error text; 500 characters are sent, and the sidecar strikes out keys. */
  readonly errorMessage?: string | undefined;
  /** How long the provider asked to wait. */
  readonly retryAfterMs?: number | undefined;
}

/** A record whose handle or ticket is out of its decision, so that it can be stored. */
export type SealedRecord = RecordRequest & { readonly settles: SealedHandle | SealedTicket };

/** A record that was not sent, and why. */
export interface Unsent {
  readonly record: SealedRecord;
  readonly error: Error;
}

/**
 * The sealed text of what a record settles.
 *
 * Throws `TypeError` when there is none, as in a denied decision.
 */
export function sealed(settles: Settles): SealedHandle | SealedTicket {
  if (settles instanceof SealedHandle || settles instanceof SealedTicket) {
    return settles;
  }
  if (settles instanceof KeyHandle) {
    return settles.handle;
  }
  if (typeof settles === "object" && settles !== null) {
    if ("denial" in settles) {
      const paid = settles.key?.handle ?? settles.ticket?.ticket;
      if (paid === undefined) {
        const what = settles.unmetered ? "an unmetered" : "a denied";
        throw new TypeError(`${what} decision has nothing to record`);
      }
      return paid;
    }
    if (settles.ticket instanceof SealedTicket) {
      return settles.ticket;
    }
  }
  throw new TypeError(
    "settles is the decision, its key or ticket, or a SealedHandle or SealedTicket made from a stored text",
  );
}
