import { DeadlineExceeded, type KeyturnError, type StatusCode, Unavailable } from "./errors.js";

/**
 * Exponential backoff with full jitter, for UNAVAILABLE only, within the call's deadline.
 *
 * Before attempt n+1 the client waits a random time up to `firstDelayMs * 2^(n-1)`, at most
 * `maxDelayMs`, on top of the time that the sidecar asked to wait. `attempts: 1` never retries.
 */
export interface Retries {
  /** How often a call is tried in all. Default: 5. */
  readonly attempts?: number | undefined;
  /** Default: 100. */
  readonly firstDelayMs?: number | undefined;
  /** Default: 1000. */
  readonly maxDelayMs?: number | undefined;
}

/** Retries with nothing left out. Throws `RangeError` for numbers that make no sense. */
export function retriesOf(retries: Retries = {}): Backoff {
  const { attempts = 5, firstDelayMs = 100, maxDelayMs = 1_000 } = retries;
  if (!Number.isInteger(attempts) || attempts < 1) {
    throw new RangeError("retries.attempts is a whole number of at least 1");
  }
  for (const [name, value] of Object.entries({ firstDelayMs, maxDelayMs })) {
    if (!(Number.isFinite(value) && value >= 0)) {
      throw new RangeError(`retries.${name} is a time in milliseconds, not below 0`);
    }
  }
  return new Backoff(attempts, firstDelayMs, maxDelayMs);
}

export class Backoff {
  readonly attempts: number;
  readonly firstDelayMs: number;
  readonly maxDelayMs: number;

  constructor(attempts: number, firstDelayMs: number, maxDelayMs: number) {
    this.attempts = attempts;
    this.firstDelayMs = firstDelayMs;
    this.maxDelayMs = maxDelayMs;
  }

  /** A random time to wait after so many failures in a row. */
  jitterMs(failures: number, random: () => number = Math.random): number {
    return random() * Math.min(this.firstDelayMs * 2 ** (failures - 1), this.maxDelayMs);
  }
}

/** The attempts of one call: how long each may take, and whether there is another. */
export class Attempts {
  readonly #backoff: Backoff;
  readonly #most: number;
  readonly #clock: () => number;
  readonly #random: () => number;
  readonly #ends: number;
  #made = 0;

  constructor(
    backoff: Backoff,
    most: number,
    timeoutMs: number,
    clock: () => number = () => performance.now(),
    random: () => number = Math.random,
  ) {
    this.#backoff = backoff;
    this.#most = most;
    this.#clock = clock;
    this.#random = random;
    this.#ends = clock() + timeoutMs;
  }

  /** Until the deadline, for the attempt that begins now. */
  leftMs(): number {
    return this.#ends - this.#clock();
  }

  /** How long to wait before the next attempt; undefined: there is none, throw `error`. */
  waitAfter(error: KeyturnError): number | undefined {
    this.#made += 1;
    if (!(error instanceof Unavailable) || error instanceof DeadlineExceeded || this.#made >= this.#most) {
      return undefined;
    }
    const asked = error.retryAfterMs ?? 0;
    const wait = asked + this.#backoff.jitterMs(this.#made, this.#random);
    const left = this.leftMs();
    if (wait < left) {
      return wait;
    }
    // Jitter gives way to the deadline; what the sidecar asked for does not.
    return asked > 0 && asked < left ? asked : undefined;
  }
}

/** What gRPC says by itself when it hears nothing. */
const OF_THE_TRANSPORT: readonly StatusCode[] = ["UNAVAILABLE", "DEADLINE_EXCEEDED"];

/** Whether an error says UNAVAILABLE in the transport's name: the sidecar's own has a reason. */
export function isOutOfReach(error: KeyturnError): boolean {
  return error.code === "UNAVAILABLE" && error.reason === "";
}

/** Whether the sidecar itself gave this status. */
export function isAnswer(error: KeyturnError): boolean {
  return error.reason !== "" || !OF_THE_TRANSPORT.includes(error.code);
}
