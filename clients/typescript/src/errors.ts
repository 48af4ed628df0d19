/**
 * What goes wrong, as one tree:
 *
 *     KeyturnError                 a fault: the sidecar did not answer, or refused the call
 *     ├── InvalidArgument          a field is wrong (`fieldViolations`), or a token is garbled
 *     ├── Unauthenticated          no token or certificate, or one that the sidecar does not know
 *     ├── PermissionDenied         the caller's role may not do this
 *     ├── NotFound                 no such user, or a hold settled and forgotten (`resource`)
 *     ├── AlreadyExists            the same request or record was seen with other contents
 *     ├── FailedPrecondition       too late, redeemed already, no longer usable
 *     ├── ResourceExhausted        the sidecar is overloaded, or the message too large
 *     ├── Unavailable              the sidecar or its store is out of reach
 *     │   └── DeadlineExceeded     no answer in time; the call may have been carried out
 *     └── InternalError            a defect of the sidecar; `metadata` may hold its error id
 *
 *     Denied                       the policy said no. An answer, not a fault, so it stands outside:
 *                                  who lets requests pass on a `KeyturnError` must not let a denial pass
 *     Closed                       the client was closed, or the call has ended
 *     QueueFull                    no more records fit in the background
 *
 * A status that has no class here (UNIMPLEMENTED, …) is a plain `KeyturnError`. CANCELLED by the
 * other side is `Unavailable`: a sidecar that ends drops so what it has not looked at yet. What the
 * client refuses before it sends anything is a `TypeError` or `RangeError`, and a call that its
 * caller cancels rejects with the reason of the signal.
 */

import type { Decision } from "./model.js";

/** The names of the gRPC statuses, by number. */
const CODES = [
  "OK",
  "CANCELLED",
  "UNKNOWN",
  "INVALID_ARGUMENT",
  "DEADLINE_EXCEEDED",
  "NOT_FOUND",
  "ALREADY_EXISTS",
  "PERMISSION_DENIED",
  "RESOURCE_EXHAUSTED",
  "FAILED_PRECONDITION",
  "ABORTED",
  "OUT_OF_RANGE",
  "UNIMPLEMENTED",
  "INTERNAL",
  "UNAVAILABLE",
  "DATA_LOSS",
  "UNAUTHENTICATED",
] as const;

export type StatusCode = (typeof CODES)[number];

/** The name of a status; UNKNOWN for a number that gRPC does not have. */
export function statusCode(number: number): StatusCode {
  return CODES[number] ?? "UNKNOWN";
}

/** A field that the sidecar refused, e.g. `user_id`, and why. */
export interface FieldViolation {
  readonly field: string;
  readonly description: string;
}

/** What a `NotFound` did not find, e.g. `user` and its id. */
export interface Resource {
  readonly type: string;
  readonly name: string;
  readonly description: string;
}

/** What a status says besides its code and sentence. */
export interface Details {
  readonly reason?: string;
  readonly fieldViolations?: readonly FieldViolation[];
  readonly retryAfterMs?: number;
  readonly resource?: Resource;
  readonly metadata?: Readonly<Record<string, string>>;
}

/** Errors are found by name in logs, and minifiers rename classes. */
function named(type: { prototype: Error }, name: string): void {
  Object.defineProperty(type.prototype, "name", { value: name, configurable: true, writable: true });
}

/** A call that got no answer. It is fit for logs: it never holds a secret, nor gRPC's own error. */
export class KeyturnError extends Error {
  readonly code: StatusCode;
  /** The stable name for programs (`ErrorInfo.reason`), e.g. `STORE_UNAVAILABLE`; may be empty. */
  readonly reason: string;
  readonly fieldViolations: readonly FieldViolation[];
  /** How long the sidecar asks to wait (`RetryInfo`). */
  readonly retryAfterMs: number | undefined;
  readonly resource: Resource | undefined;
  /** What `ErrorInfo` says besides, e.g. an error id to quote to the operators. */
  readonly metadata: Readonly<Record<string, string>>;

  constructor(message: string, code: StatusCode, details: Details = {}) {
    super(message);
    this.code = code;
    this.reason = details.reason ?? "";
    this.fieldViolations = details.fieldViolations ?? [];
    this.retryAfterMs = details.retryAfterMs;
    this.resource = details.resource;
    this.metadata = details.metadata ?? {};
  }

  /** `CODE (REASON): message [field: description; …]` */
  override toString(): string {
    const said = this.reason === "" ? this.code : `${this.code} (${this.reason})`;
    const fields = this.fieldViolations.map((each) => `${each.field}: ${each.description}`).join("; ");
    return `${said}: ${this.message}${fields === "" ? "" : ` [${fields}]`}`;
  }
}

/** A field is wrong, or a handle or ticket is garbled, truncated or foreign. */
export class InvalidArgument extends KeyturnError {}

/** No token or certificate, or one that the sidecar does not know. */
export class Unauthenticated extends KeyturnError {}

/** The caller's role may not do this. */
export class PermissionDenied extends KeyturnError {}

/** No such user, or a hold that was settled and forgotten long ago. */
export class NotFound extends KeyturnError {}

/** The same request id or record was seen before, with other contents. */
export class AlreadyExists extends KeyturnError {}

/** Too late, redeemed already, or no longer usable. */
export class FailedPrecondition extends KeyturnError {}

/** The sidecar is overloaded, or the message is too large. A call is never retried for it. */
export class ResourceExhausted extends KeyturnError {}

/** The sidecar or its store is out of reach, after all retries that the deadline allowed. */
export class Unavailable extends KeyturnError {}

/** No answer in time. The call may have been carried out. */
export class DeadlineExceeded extends Unavailable {}

/** A defect of the sidecar. */
export class InternalError extends KeyturnError {}

/** The policy said no; `decision.denial` says why. Thrown by `request` and its calls only. */
export class Denied extends Error {
  readonly decision: Decision;

  constructor(decision: Decision) {
    const said = decision.message;
    super(decision.denial === undefined ? said : `${decision.denial.reason}: ${said}`);
    this.decision = decision;
  }
}

/** The client was closed, or the call has ended. */
export class Closed extends Error {}

/** The queue of the background is full. The record is still the caller's. */
export class QueueFull extends Error {}

const KINDS: { readonly [C in StatusCode]?: typeof KeyturnError } = {
  INVALID_ARGUMENT: InvalidArgument,
  UNAUTHENTICATED: Unauthenticated,
  PERMISSION_DENIED: PermissionDenied,
  NOT_FOUND: NotFound,
  ALREADY_EXISTS: AlreadyExists,
  FAILED_PRECONDITION: FailedPrecondition,
  RESOURCE_EXHAUSTED: ResourceExhausted,
  UNAVAILABLE: Unavailable,
  DEADLINE_EXCEEDED: DeadlineExceeded,
  INTERNAL: InternalError,
  UNKNOWN: InternalError,
  DATA_LOSS: InternalError,
};

for (const [name, type] of Object.entries({
  KeyturnError,
  InvalidArgument,
  Unauthenticated,
  PermissionDenied,
  NotFound,
  AlreadyExists,
  FailedPrecondition,
  ResourceExhausted,
  Unavailable,
  DeadlineExceeded,
  InternalError,
  Denied,
  Closed,
  QueueFull,
})) {
  named(type, name);
}

/** The error of a status. */
export function errorOf(code: StatusCode, message: string, details: Details): KeyturnError {
  return new (KINDS[code] ?? KeyturnError)(message, code, details);
}
