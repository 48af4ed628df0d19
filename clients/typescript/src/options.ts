import type { Unavailable } from "./errors.js";
import type { DecideRequest, Unsent } from "./model.js";
import { type Backoff, type Retries, retriesOf } from "./retries.js";
import { Secret } from "./secret.js";
import { defaultTarget, type Target, targetOf } from "./target.js";

/** What a `Client` is made with; everything has a default. */
export interface ClientOptions {
  /**
   * `unix:PATH` or `HOST:PORT`. Default: the environment's `KEYTURN_ADDRESS`, else the socket where
   * the sidecar of this machine listens by itself.
   */
  readonly target?: string | undefined;
  /** Sent with every call as `authorization: Bearer`. */
  readonly token?: string | Secret | undefined;
  /** PEM: who may sign the sidecar's certificate. Given: TLS is on. */
  readonly rootCertificates?: string | Uint8Array | undefined;
  /** PEM: the certificate that the client shows, with its `privateKey`. Given: TLS is on. */
  readonly certificateChain?: string | Uint8Array | undefined;
  readonly privateKey?: string | Uint8Array | Secret | undefined;
  /** True: TLS with the authorities that Node trusts. */
  readonly tls?: boolean | undefined;
  /** The deadline of a call, retries included, where the call names none. Default: 2000. */
  readonly timeoutMs?: number | undefined;
  readonly retries?: Retries | undefined;
  /** How many records the background holds. Default: 10,000. */
  readonly queueSize?: number | undefined;
  /** How long `close` goes on sending. Default: 5000. */
  readonly closeTimeoutMs?: number | undefined;
  /**
   * Asked when the sidecar cannot be, and whether the request may go ahead all the same, unmetered
   * and on the platform's credential. Not given: it may not, and the error is thrown.
   */
  readonly whenDown?:
    | ((request: DecideRequest, error: Unavailable) => boolean | Promise<boolean>)
    | undefined;
  /** Told of every record that could not be sent. Default: a line of `console.error`. */
  readonly onUnsent?: ((unsent: Unsent) => void | Promise<void>) | undefined;
}

/**
 * Checked options, which print without the token and the private key. `Client` makes them of
 * `ClientOptions` by itself; a program that keeps or logs its options makes them at once.
 *
 * Throws `TypeError` or `RangeError`, by the name of the option, for what cannot be.
 */
export class Options {
  readonly target: Target;
  readonly token: Secret | undefined;
  readonly rootCertificates: string | undefined;
  readonly certificateChain: string | undefined;
  readonly privateKey: Secret | undefined;
  readonly tls: boolean;
  readonly timeoutMs: number;
  readonly retries: Backoff;
  readonly queueSize: number;
  readonly closeTimeoutMs: number;
  readonly whenDown: ClientOptions["whenDown"];
  readonly onUnsent: ClientOptions["onUnsent"];

  constructor(given: ClientOptions = {}) {
    this.target = targetOf(given.target || defaultTarget());
    this.token = tokenOf(given.token);
    this.rootCertificates = pem("rootCertificates", given.rootCertificates);
    this.certificateChain = pem("certificateChain", given.certificateChain);
    const key = given.privateKey instanceof Secret ? given.privateKey.reveal() : given.privateKey;
    const privateKey = pem("privateKey", key);
    this.privateKey = privateKey === undefined ? undefined : new Secret(privateKey);
    if ((this.privateKey === undefined) !== (this.certificateChain === undefined)) {
      throw new TypeError("a client certificate takes both certificateChain and privateKey");
    }
    const certified = this.rootCertificates !== undefined || this.certificateChain !== undefined;
    this.tls = (given.tls ?? false) || certified;
    if (this.tls && this.target.kind === "unix") {
      const by = certified ? "rootCertificates, certificateChain and privateKey" : "tls";
      throw new TypeError(`target ${this.target.address}: a Unix socket speaks no TLS, so it takes no ${by}`);
    }
    if (!this.tls && this.target.kind === "remote") {
      throw new TypeError(
        `target ${this.target.address} is not this machine: give tls or rootCertificates, so that` +
          " keys and tokens do not cross the network in plain text",
      );
    }
    this.timeoutMs = timeout("timeoutMs", given.timeoutMs ?? 2_000);
    this.retries = retriesOf(given.retries);
    this.queueSize = given.queueSize ?? 10_000;
    if (!Number.isInteger(this.queueSize) || this.queueSize < 1) {
      throw new RangeError("queueSize is a whole number of at least 1");
    }
    this.closeTimeoutMs = given.closeTimeoutMs ?? 5_000;
    if (this.closeTimeoutMs !== 0) {
      timeout("closeTimeoutMs", this.closeTimeoutMs);
    }
    this.whenDown = given.whenDown;
    this.onUnsent = given.onUnsent;
    Object.freeze(this);
  }
}

/** A timeout that timers can hold. Throws `RangeError` for another, by `name`. */
export function timeout(name: string, ms: number): number {
  if (!(ms > 0 && ms <= 2 ** 31 - 1)) {
    throw new RangeError(`${name} is a time in milliseconds, above 0 and below 2^31`);
  }
  return ms;
}

function tokenOf(given: string | Secret | undefined): Secret | undefined {
  if (given === undefined) {
    return undefined;
  }
  const text = (given instanceof Secret ? given.reveal() : String(given)).trim();
  if (!/^[!-~]+$/.test(text)) {
    throw new TypeError("token is printable ASCII without spaces, and not empty");
  }
  return new Secret(text);
}

function pem(name: string, given: string | Uint8Array | undefined): string | undefined {
  if (given === undefined) {
    return undefined;
  }
  const text = typeof given === "string" ? given : Buffer.from(given).toString("latin1");
  if (!text.includes("-----BEGIN ")) {
    throw new TypeError(`${name} is not PEM`);
  }
  return text;
}
