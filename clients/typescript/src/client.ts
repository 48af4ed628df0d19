import { randomUUID } from "node:crypto";

import { type DescMessage, type MessageShape, create as message, toBinary } from "@bufbuild/protobuf";

import { Background, type Encoded } from "./background.js";
import { Call, type CallOptions } from "./call.js";
import { Connection, type Sendable, sendable } from "./connection.js";
import { Closed, type KeyturnError, Unavailable } from "./errors.js";
import {
  type RecordRequest as RecordMessage,
  RecordRequestSchema,
  RoutingService,
} from "./gen/keyturn/v1/routing_service_pb.js";
import { inspected } from "./inspected.js";
import {
  type DecideRequest,
  type Decision,
  type Explanation,
  type KeyHandle,
  type Recorded,
  type RecordRequest,
  sealed,
  type Unsent,
} from "./model.js";
import { type ClientOptions, Options, timeout } from "./options.js";
import { Attempts, isAnswer, isOutOfReach } from "./retries.js";
import type { SealedHandle } from "./sealed.js";
import { Secret } from "./secret.js";
import { pause, Stopping, unlessAborted } from "./stopping.js";
import * as wire from "./wire.js";

type Asking = Sendable<typeof RoutingService.method.decide.output>;

/** The deadline of a batch of the background, whatever that of calls is. */
const BATCH_TIMEOUT_MS = 10_000;

/**
 * A connection to one sidecar, made once, shared by everything in the process, closed at the end.
 *
 * Every call has a deadline, and within it what ended with UNAVAILABLE is tried again (`Retries`).
 * All calls reject with `KeyturnError` for faults, with `Closed` after `close`, with the signal's
 * reason when they are cancelled, and with `TypeError` or `RangeError` for what cannot be sent.
 */
export class Client implements AsyncDisposable {
  readonly #options: Options;
  readonly #connection: Connection;
  readonly #background: Background<RecordMessage>;
  /** Aborted when nothing goes on any more. */
  readonly #ended = new AbortController();
  /** How many calls are on their way, which `close` waits for. */
  #running = 0;
  #whenIdle: () => void = () => undefined;
  #closing: Promise<Unsent[]> | undefined;
  /** The sidecar was out of reach for a whole call, and has answered nothing since. */
  #down = false;

  /** Nothing connects before the first call. Throws what `Options` throws. */
  constructor(options: ClientOptions | Options = {}) {
    this.#options = options instanceof Options ? options : new Options(options);
    this.#connection = new Connection(this.#options);
    this.#background = new Background(
      this.#options,
      (requests) => this.#sendBatch(requests),
      this.#ended.signal,
    );
  }

  /**
   * Decides, and gives the `Call` to hold with `await using`. Throws `Denied` where the policy says
   * no. A cancelled one leaves no hold behind, as with `decide`.
   */
  async request(request: Omit<DecideRequest, "redeem">, options: CallOptions = {}): Promise<Call> {
    const asked = identified({ ...request, redeem: false });
    const owned = !request.requestId;
    const decide = (again: wire.IdentifiedRequest, its: CallOptions) => this.#decide(again, owned, its);
    const decision = await decide(asked, options);
    return new Call(
      {
        decide,
        record: (record, its) => this.record(record, its),
        recordOrReport: (record) => this.#background.addOrReport(encoded(record)),
      },
      asked,
      decision,
    );
  }

  /**
   * Whose credential pays for a request? A denial is an answer.
   *
   * A cancelled decision whose `requestId` was made here leaves no hold behind: it goes on in the
   * background, and what it placed is released. With an id of the caller's, the same request is
   * expected again, and finds its hold.
   */
  async decide(request: DecideRequest, options: CallOptions = {}): Promise<Decision> {
    return this.#decide(identified(request), !request.requestId, options);
  }

  /** Up to 500 decisions in one call: an answer or an error for each, in order. */
  async decideMany(
    requests: readonly DecideRequest[],
    options: CallOptions = {},
  ): Promise<(Decision | KeyturnError)[]> {
    this.#requireOpen();
    const items = requests.map((each) => wire.decideRequest(identified(each)));
    if (items.length === 0) {
      return [];
    }
    const method = RoutingService.method.batchDecide;
    const { results } = await this.#call(
      sendable(method, message(method.input, { requests: items })),
      options,
    );
    return wire.batchResults(results, items.length, wire.decision);
  }

  /** What would `decide` answer now, and why? Places no hold, tells no secret. */
  async explain(request: Omit<DecideRequest, "redeem">, options: CallOptions = {}): Promise<Explanation> {
    const { method } = RoutingService;
    const decide = wire.decideRequest(identified(request));
    return wire.explanation(
      await this.#call(sendable(method.explain, message(method.explain.input, { decide })), options),
    );
  }

  /**
   * What became of a request, once: the same record again gets the first answer. One that is
   * cancelled is carried on in the background.
   */
  async record(record: RecordRequest, options: CallOptions = {}): Promise<Recorded> {
    this.#requireOpen();
    const item = encoded(record);
    const sent = this.#call(sendable(RoutingService.method.record, item.message), options);
    return wire.recorded(await this.#carriedOn(sent, [item], options));
  }

  /** Up to 500 records in one call: an answer or an error for each, in order. As `record`. */
  async recordMany(
    records: readonly RecordRequest[],
    options: CallOptions = {},
  ): Promise<(Recorded | KeyturnError)[]> {
    this.#requireOpen();
    const items = records.map(encoded);
    if (items.length === 0) {
      return [];
    }
    const method = RoutingService.method.batchRecord;
    const requests = items.map((each) => each.message);
    const sent = this.#call(sendable(method, message(method.input, { requests })), options);
    const { results } = await this.#carriedOn(sent, items, options);
    return wire.batchResults(results, items.length, wire.recorded);
  }

  /**
   * Puts a record into the queue of the background and returns at once. `onUnsent` is told if it
   * can't be sent.
   *
   * Throws `QueueFull`, with the record still the caller's, and `Closed` after `close`.
   */
  recordLater(record: RecordRequest): void {
    this.#requireOpen();
    this.#background.add(encoded(record));
  }

  /** Waits until what was queued before it is sent or unsent, or until `signal` is aborted. */
  async flush(options: Pick<CallOptions, "signal"> = {}): Promise<void> {
    await unlessAborted(this.#background.flush(), options.signal);
  }

  /**
   * The secret behind a key handle, once per handle. Never retried, because it may have been
   * carried out: decide again for a fresh handle.
   */
  async redeem(key: KeyHandle | SealedHandle, options: CallOptions = {}): Promise<Secret> {
    const request = sendable(RoutingService.method.redeem, wire.redeemRequest(key));
    return new Secret((await this.#call(request, options, 1)).secret);
  }

  /**
   * Takes no more calls and records, lets those on their way end, for `closeTimeoutMs` at most, and
   * closes the connection. Gives the records that were still in the queue: they are unsent.
   */
  close(): Promise<Unsent[]> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  toString(): string {
    return `Client(${this.#options.target.address})`;
  }

  toJSON(): string {
    return this.toString();
  }

  [inspected](): string {
    return this.toString();
  }

  async #close(): Promise<Unsent[]> {
    const timeUp = new AbortController();
    const ended = this.#settled().finally(() => timeUp.abort());
    await Promise.race([ended, pause(this.#options.closeTimeoutMs, timeUp.signal)]);
    timeUp.abort();
    this.#ended.abort(new Closed("the client is closed"));
    const left = this.#background.giveUp();
    this.#connection.close();
    return left;
  }

  /** Everything on its way has ended, and what came of it is sent. */
  async #settled(): Promise<void> {
    while (this.#running > 0) {
      await new Promise<void>((idle) => {
        this.#whenIdle = idle;
      });
    }
    await this.#background.flush();
  }

  #requireOpen(): void {
    if (this.#closing !== undefined) {
      throw new Closed("the client is closed");
    }
  }

  async #decide(request: wire.IdentifiedRequest, owned: boolean, options: CallOptions): Promise<Decision> {
    const asking = sendable(RoutingService.method.decide, wire.decideRequest(request));
    try {
      return await (owned ? this.#askOrUndo(asking, options) : this.#ask(asking, options));
    } catch (error) {
      const { whenDown } = this.#options;
      if (!(error instanceof Unavailable) || whenDown === undefined || !(await whenDown(request, error))) {
        throw error;
      }
      return wire.unmetered(error);
    }
  }

  async #ask(asking: Asking, options: CallOptions): Promise<Decision> {
    return wire.decision(await this.#call(asking, options));
  }

  /** Nobody but us knows the request id, so a cancelled decision is undone. */
  async #askOrUndo(asking: Asking, { timeoutMs, signal }: CallOptions): Promise<Decision> {
    signal?.throwIfAborted();
    const deciding = this.#ask(asking, { timeoutMs });
    try {
      return await unlessAborted(deciding, signal);
    } catch (error) {
      if (signal?.aborted) {
        void this.#run(() => this.#undo(deciding));
      }
      throw error;
    }
  }

  async #undo(deciding: Promise<Decision>): Promise<void> {
    // A decision that fails is no worse than before: if it placed a hold, that expires.
    const decision = await deciding.catch(() => undefined);
    if (decision?.ticket !== undefined) {
      this.#background.addOrReport(encoded({ settles: decision.ticket, outcome: "NEVER_SENT" }));
    }
  }

  /** A record in the foreground that its caller cancels goes to the background. */
  async #carriedOn<T>(
    sent: Promise<T>,
    items: Encoded<RecordMessage>[],
    { signal }: CallOptions,
  ): Promise<T> {
    try {
      return await sent;
    } catch (error) {
      if (signal?.aborted && error === signal.reason) {
        for (const item of items) {
          this.#background.addOrReport(item);
        }
      }
      throw error;
    }
  }

  async #sendBatch(requests: RecordMessage[]): Promise<(Recorded | KeyturnError)[]> {
    const method = RoutingService.method.batchRecord;
    const request = sendable(method, message(method.input, { requests }));
    const reply = await this.#connection.send(request, BATCH_TIMEOUT_MS, this.#ended.signal);
    if ("answer" in reply) {
      this.#down = false;
      return wire.batchResults(reply.answer.results, requests.length, wire.recorded);
    }
    throw this.#heard(wire.errorOfCall(reply.failed));
  }

  #call<O extends DescMessage>(
    request: Sendable<O>,
    options: CallOptions,
    attempts = this.#options.retries.attempts,
  ): Promise<MessageShape<O>> {
    return this.#run(() => this.#attempt(request, options, attempts));
  }

  async #attempt<O extends DescMessage>(
    request: Sendable<O>,
    { timeoutMs, signal }: CallOptions,
    most: number,
  ): Promise<MessageShape<O>> {
    this.#requireOpen();
    const timeLimit = timeoutMs === undefined ? this.#options.timeoutMs : timeout("timeoutMs", timeoutMs);
    const attempts = new Attempts(this.#options.retries, this.#down ? 1 : most, timeLimit);
    using stopping = new Stopping(signal, this.#ended.signal);
    const { signal: stopped } = stopping;
    stopped.throwIfAborted();
    for (;;) {
      const reply = await this.#connection.send(request, attempts.leftMs(), stopped);
      stopped.throwIfAborted();
      if ("answer" in reply) {
        this.#down = false;
        return reply.answer;
      }
      const error = this.#heard(wire.errorOfCall(reply.failed));
      const wait = attempts.waitAfter(error);
      if (wait === undefined) {
        this.#down ||= isOutOfReach(error);
        throw error;
      }
      await pause(wait, stopped);
      stopped.throwIfAborted();
    }
  }

  #heard(error: KeyturnError): KeyturnError {
    if (isAnswer(error)) {
      this.#down = false;
    }
    return error;
  }

  async #run<T>(work: () => Promise<T>): Promise<T> {
    this.#running += 1;
    try {
      return await work();
    } finally {
      this.#running -= 1;
      if (this.#running === 0) {
        this.#whenIdle();
      }
    }
  }
}

function identified<R extends DecideRequest>(request: R): R & { readonly requestId: string } {
  return { ...request, requestId: request.requestId || randomUUID().replaceAll("-", "") };
}

function encoded(record: RecordRequest): Encoded<RecordMessage> {
  const snapshot = Object.freeze({ ...record, settles: sealed(record.settles) });
  const made = wire.recordRequest(snapshot);
  return { record: snapshot, message: made, bytes: toBinary(RecordRequestSchema, made).length };
}
