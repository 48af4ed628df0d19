import { Closed, Denied } from "./errors.js";
import { inspected } from "./inspected.js";
import type { CreditTicket, Decision, KeyHandle, Recorded, RecordRequest, Usage } from "./model.js";
import type { Secret } from "./secret.js";
import { type IdentifiedRequest, outcomeNumber, recordFields } from "./wire.js";
import { Outcome } from "./words.js";

/** How long a call may take, and what cancels it: it then rejects with the signal's reason. */
export interface CallOptions {
  /** The deadline, retries included. Default: that of the client. */
  readonly timeoutMs?: number | undefined;
  readonly signal?: AbortSignal | undefined;
}

/** What is known of a request that the provider did not answer well. */
export interface Failure {
  readonly httpStatus?: number | undefined;
  readonly errorMessage?: string | undefined;
  readonly retryAfterMs?: number | undefined;
}

/** What is known of a request besides its outcome and usage. */
export interface Notes {
  /** The model that answered. */
  readonly model?: string | undefined;
  readonly endpoint?: string | undefined;
  readonly responseTimeMs?: number | undefined;
  readonly httpStatus?: number | undefined;
}

/** What a call needs of its client. */
export interface Sidecar {
  decide(request: IdentifiedRequest, options: CallOptions): Promise<Decision>;
  record(record: RecordRequest, options: CallOptions): Promise<Recorded>;
  recordOrReport(record: RecordRequest): void;
}

type Noted = Omit<RecordRequest, "settles" | "outcome">;

/**
 * One request from its decision to its record: what `Client.request` gives, to be held with
 * `await using`.
 *
 * When it ends, it records:
 *
 * - an outcome given with `failed`: that one, whatever else was said;
 * - `succeeded` was called, or `finish`: SUCCESS;
 * - it ends without a word, or by an exception, after the request had gone out: CLIENT_CANCELLED,
 *   with what was noted;
 * - the same before it had gone out: NEVER_SENT.
 *
 * The request counts as gone out once `headers` or `secret` was taken, `sending` was called, or
 * usage or a cost was noted. What ended throws `Closed` on everything but reading `decision`, `key`,
 * `ticket`, `requestId` and `unrecorded`. An unmetered call records nothing.
 */
export class Call implements AsyncDisposable {
  readonly #sidecar: Sidecar;
  #request: IdentifiedRequest;
  #decision: Decision;
  /** Whether anything can be said of it. Between two decisions it is neither open nor ended. */
  #open = true;
  #ended = false;
  #goneOut = false;
  #outcome: Outcome | undefined;
  #noted: Noted = {};
  #unrecorded: RecordRequest | undefined;

  /** Made by `Client.request`. Throws `Denied`. */
  constructor(sidecar: Sidecar, request: IdentifiedRequest, decision: Decision) {
    if (!decision.allowed) {
      throw new Denied(decision);
    }
    this.#sidecar = sidecar;
    this.#request = request;
    this.#decision = decision;
  }

  /** The id that makes a repeated decision find the first hold. */
  get requestId(): string {
    return this.#request.requestId;
  }

  /** The decision in force: the latest, after `keyRefused`. */
  get decision(): Decision {
    return this.#decision;
  }

  /** The user's own key, when that pays. */
  get key(): KeyHandle | undefined {
    return this.#decision.key;
  }

  /** The hold on the user's credits, when those pay. */
  get ticket(): CreditTicket | undefined {
    return this.#decision.ticket;
  }

  /** The record that `finish` could not get through; `Client.recordLater` takes it. */
  get unrecorded(): RecordRequest | undefined {
    return this.#unrecorded;
  }

  /**
   * The own key's secret, for libraries that sign by themselves; undefined when credits pay.
   * Taking it means that the request goes out.
   */
  secret(): Secret | undefined {
    this.sending();
    return this.#decision.key?.secret;
  }

  /**
   * The headers that sign the request: the own key's, or `platform` when credits pay. Taking them
   * means that the request goes out. They hold a secret: never log them.
   */
  headers(platform: Readonly<Record<string, string>>): Record<string, string> {
    this.sending();
    return this.#decision.key?.headers() ?? { ...platform };
  }

  /** The request goes out now; for callers that need neither `headers` nor `secret`. */
  sending(): void {
    this.#requireOpen();
    this.#goneOut = true;
  }

  /** Notes tokens used. A count given again replaces the earlier one; the others stay. */
  used(usage: Usage): void {
    this.sending();
    this.#take({ usage: { ...this.#noted.usage, ...given(usage) } });
  }

  /** Notes what the request cost, in micros. It wins over tokens. */
  cost(micros: number): void {
    this.sending();
    this.#take({ costMicros: micros });
  }

  /** Notes what else is known: the model that answered, the endpoint, how long it took. */
  note(notes: Notes): void {
    this.#requireOpen();
    this.#take(given(notes));
  }

  /** The provider answered. */
  succeeded(): void {
    this.sending();
    this.#outcome ??= Outcome.SUCCESS;
  }

  /**
   * Says how the request ended, when not well; it holds whatever else is said.
   *
   * Throws `TypeError` for SUCCESS.
   */
  failed(outcome: Outcome, failure: Failure = {}): void {
    this.#requireOpen();
    if (outcome === Outcome.SUCCESS) {
      throw new TypeError("SUCCESS is no failure: call succeeded()");
    }
    outcomeNumber(outcome);
    this.#take(given(failure));
    this.#outcome = outcome;
  }

  /**
   * The provider refused the own key: records that and decides again without it, with the same
   * `requestId`. A new decision is in force, with nothing noted, and it is returned.
   *
   * Throws `Denied` when nothing else may pay. Where the record fails, the call stays as it is, and
   * its end records the refusal. Throws `TypeError` when credits pay.
   */
  async keyRefused(
    refusal: Failure & { outcome?: Outcome } = {},
    options: CallOptions = {},
  ): Promise<Decision> {
    this.#requireOpen();
    const key = this.#decision.key;
    if (key === undefined) {
      throw new TypeError("no own key pays for this call: there is none to refuse");
    }
    const { outcome = Outcome.AUTH_REJECTED, ...failure } = refusal;
    this.failed(
      outcome,
      outcome === Outcome.AUTH_REJECTED ? { httpStatus: 401, ...given(failure) } : failure,
    );
    const refused = { ...this.#noted, settles: key, outcome };
    // Until a new decision is in force, nothing can be said of the call; but it can be ended.
    this.#open = false;
    try {
      await this.#sidecar.record(refused, options);
    } catch (error) {
      if (this.#ended) {
        this.#sidecar.recordOrReport(refused);
      }
      // A record that was cancelled is carried on already.
      this.#open = !this.#ended && error !== options.signal?.reason;
      throw error;
    }
    this.#request = { ...this.#request, failedKeys: [...(this.#request.failedKeys ?? []), key] };
    const decision = await this.#sidecar.decide(this.#request, options);
    if (!decision.allowed) {
      throw new Denied(decision);
    }
    if (this.#ended) {
      if (decision.ticket !== undefined) {
        this.#sidecar.recordOrReport({ settles: decision, outcome: Outcome.NEVER_SENT });
      }
      throw new Closed("this call has ended");
    }
    this.#decision = decision;
    this.#goneOut = false;
    this.#outcome = undefined;
    this.#noted = {};
    this.#open = true;
    return decision;
  }

  /**
   * Ends the call and records it in the foreground. Gives undefined for an unmetered call.
   *
   * A record that does not get through is in `unrecorded`; one that is cancelled is carried on in
   * the background.
   */
  async finish(options: CallOptions = {}): Promise<Recorded | undefined> {
    this.#requireOpen();
    const record = this.#close(Outcome.SUCCESS);
    if (record === undefined) {
      return undefined;
    }
    try {
      return await this.#sidecar.record(record, options);
    } catch (error) {
      if (options.signal === undefined || error !== options.signal.reason) {
        this.#unrecorded = record;
      }
      throw error;
    }
  }

  /** Ends the call, unless it has ended, and hands its record to the background. */
  end(): void {
    this.#ended = true;
    if (!this.#open) {
      return;
    }
    const record = this.#close(this.#goneOut ? Outcome.CLIENT_CANCELLED : Outcome.NEVER_SENT);
    if (record !== undefined) {
      this.#sidecar.recordOrReport(record);
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.end();
  }

  toString(): string {
    return `Call(${this.requestId})`;
  }

  toJSON(): object {
    return { requestId: this.requestId, decision: this.decision };
  }

  [inspected](): object {
    return this.toJSON();
  }

  /** Notes more. What cannot be sent is refused here, where it comes from, and not at the end. */
  #take(more: Noted): void {
    const noted = { ...this.#noted, ...more };
    recordFields(noted);
    this.#noted = noted;
  }

  #close(silent: Outcome): RecordRequest | undefined {
    this.#open = false;
    return this.#decision.unmetered
      ? undefined
      : { ...this.#noted, settles: this.#decision, outcome: this.#outcome ?? silent };
  }

  #requireOpen(): void {
    if (!this.#open) {
      throw new Closed("this call has ended");
    }
  }
}

/** The fields that were given: `undefined` replaces nothing. */
function given<T extends object>(fields: T): { [F in keyof T]: Exclude<T[F], undefined> } {
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined)) as {
    [F in keyof T]: Exclude<T[F], undefined>;
  };
}
