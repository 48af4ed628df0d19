/**
 * Keyturn: whose credential pays for this LLM request? The client for Node.
 *
 * `Client` is where to begin; `errors.ts` draws the tree of errors.
 */

import "./dispose.js";

export type { Call, CallOptions, Failure, Notes } from "./call.js";
export { Client } from "./client.js";
export {
  AlreadyExists,
  Closed,
  DeadlineExceeded,
  Denied,
  FailedPrecondition,
  type FieldViolation,
  InternalError,
  InvalidArgument,
  KeyturnError,
  NotFound,
  PermissionDenied,
  QueueFull,
  type Resource,
  ResourceExhausted,
  type StatusCode,
  Unauthenticated,
  Unavailable,
} from "./errors.js";
export {
  type CreditTicket,
  type DecideRequest,
  type Decision,
  type Denial,
  type ExplainStep,
  type Explanation,
  KeyHandle,
  type Recorded,
  type RecordRequest,
  type SealedRecord,
  type Settles,
  type Unsent,
  type Usage,
} from "./model.js";
export { type ClientOptions, Options } from "./options.js";
export { outcomeOf } from "./outcomes.js";
export type { Retries } from "./retries.js";
export { SealedHandle, SealedTicket } from "./sealed.js";
export { Secret } from "./secret.js";
export { VERSION } from "./version.js";
export {
  Constraint,
  CostSource,
  DenialReason,
  Durability,
  KeyState,
  Mode,
  Outcome,
  Reason,
  type Unrecognized,
} from "./words.js";
