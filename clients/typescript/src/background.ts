/** Records on their way in the background: one queue, one sender. */

import { Closed, KeyturnError, QueueFull, ResourceExhausted, Unavailable } from "./errors.js";
import type { Recorded, SealedRecord, Unsent } from "./model.js";
import type { Options } from "./options.js";
import { pause } from "./stopping.js";

/** How many records go into one batch, and how many bytes: the contract allows 1 MiB. */
const BATCH_SIZE = 100;
const BATCH_BYTES = 1_000_000;
/** What the contract allows for one record. */
const RECORD_BYTES = 65_536;

/** A record as it is sent, and how large that is. */
export interface Encoded<M> {
  readonly record: SealedRecord;
  readonly message: M;
  readonly bytes: number;
}

interface Entry<M> extends Encoded<M> {
  readonly number: number;
  /** What it failed with last. */
  error?: Error;
}

/** Sends one batch, once: an answer or an error for each. Rejects with what befell the whole. */
export type SendBatch<M> = (messages: M[]) => Promise<(Recorded | KeyturnError)[]>;

export class Background<M> {
  readonly #options: Options;
  readonly #send: SendBatch<M>;
  readonly #stop: AbortSignal;
  /** Not yet sent or unsent, oldest first; those in flight too. */
  #entries: Entry<M>[] = [];
  #added = 0;
  #sending = false;
  #waiting: { readonly upTo: number; readonly done: () => void }[] = [];

  constructor(options: Options, send: SendBatch<M>, stop: AbortSignal) {
    this.#options = options;
    this.#send = send;
    this.#stop = stop;
  }

  /** Throws `QueueFull`, or `RangeError` for a record that no sidecar takes. */
  add(encoded: Encoded<M>): void {
    if (encoded.bytes > RECORD_BYTES) {
      throw new RangeError("a record is at most 64 KiB");
    }
    if (this.#entries.length >= this.#options.queueSize) {
      throw new QueueFull(`${this.#entries.length} records wait to be sent: no more fit`);
    }
    this.#added += 1;
    this.#entries.push({ ...encoded, number: this.#added });
    if (!this.#sending) {
      void this.#work();
    }
  }

  /** Like `add`, for a record that nobody else keeps: what cannot be taken is reported as unsent. */
  addOrReport(encoded: Encoded<M>): void {
    try {
      this.#stop.throwIfAborted();
      this.add(encoded);
    } catch (error) {
      this.report({ record: encoded.record, error: error as Error });
    }
  }

  /** Settles when everything that is queued now is sent or unsent. */
  flush(): Promise<void> {
    return new Promise((done) => {
      this.#waiting.push({ upTo: this.#added, done });
      this.#tellFlushed();
    });
  }

  /** Everything that is left becomes unsent. The sender ends by the signal. */
  giveUp(): Unsent[] {
    const left = this.#entries.map(({ record, error }) => ({
      record,
      error: error ?? new Closed("the client was closed before it was sent"),
    }));
    this.#entries = [];
    for (const unsent of left) {
      this.report(unsent);
    }
    this.#tellFlushed();
    return left;
  }

  /** Tells of an unsent record. What the callback throws is logged, and stops nothing. */
  report(unsent: Unsent): void {
    const failed = (error: unknown) => console.error("keyturn: onUnsent failed:", error);
    try {
      const told = (this.#options.onUnsent ?? logUnsent)(unsent);
      void Promise.resolve(told).catch(failed);
    } catch (error) {
      failed(error);
    }
  }

  async #work(): Promise<void> {
    this.#sending = true;
    let failures = 0;
    while (this.#entries.length > 0 && !this.#stop.aborted) {
      const batch = this.#nextBatch();
      const results = await this.#send(batch.map(({ message }) => message)).catch((error: unknown) =>
        batch.map(() => error as Error),
      );
      if (this.#stop.aborted) {
        break;
      }
      const again = this.#settle(batch, results);
      failures = again.length === 0 ? 0 : failures + 1;
      if (again.length > 0) {
        const asked = again.map((error) => (error instanceof KeyturnError ? (error.retryAfterMs ?? 0) : 0));
        await pause(Math.max(...asked) + this.#options.retries.jitterMs(failures), this.#stop);
      }
    }
    // No `await` after the loop's last look: a record added from here on starts another sender.
    this.#sending = false;
  }

  #nextBatch(): Entry<M>[] {
    const batch: Entry<M>[] = [];
    let bytes = 0;
    for (const entry of this.#entries.slice(0, BATCH_SIZE)) {
      bytes += entry.bytes;
      if (bytes > BATCH_BYTES) {
        break;
      }
      batch.push(entry);
    }
    return batch;
  }

  /** Takes out what is done with; gives the errors of what is tried again. */
  #settle(batch: Entry<M>[], results: (Recorded | Error)[]): Error[] {
    const done = new Set<Entry<M>>();
    const unsent: Unsent[] = [];
    const again: Error[] = [];
    for (const [index, entry] of batch.entries()) {
      const result = results[index];
      if (result instanceof Unavailable || result instanceof ResourceExhausted) {
        entry.error = result;
        again.push(result);
        continue;
      }
      done.add(entry);
      if (result instanceof Error) {
        unsent.push({ record: entry.record, error: result });
      }
    }
    this.#entries = this.#entries.filter((entry) => !done.has(entry));
    for (const each of unsent) {
      this.report(each);
    }
    this.#tellFlushed();
    return again;
  }

  #tellFlushed(): void {
    const oldest = this.#entries[0]?.number ?? Number.POSITIVE_INFINITY;
    const flushed = this.#waiting.filter(({ upTo }) => upTo < oldest);
    this.#waiting = this.#waiting.filter(({ upTo }) => upTo >= oldest);
    for (const { done } of flushed) {
      done();
    }
  }
}

function logUnsent({ record, error }: Unsent): void {
  const said = error instanceof KeyturnError ? error.toString() : `${error.name}: ${error.message}`;
  console.error(`keyturn: a record was not sent: ${record.outcome}: ${said}`);
}
