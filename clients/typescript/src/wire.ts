/** Values to messages and back: with errors' details, the only place that knows protobuf. */

import { create, fromBinary, type MessageInitShape } from "@bufbuild/protobuf";
import type { Any, Duration, DurationSchema, Timestamp } from "@bufbuild/protobuf/wkt";
import { timestampDate } from "@bufbuild/protobuf/wkt";
import type { Failed } from "./connection.js";
import { type Details, errorOf, InternalError, type KeyturnError, statusCode } from "./errors.js";
import * as details from "./gen/keyturn/details/details_pb.js";
import * as policy from "./gen/keyturn/v1/policy_pb.js";
import * as pb from "./gen/keyturn/v1/routing_service_pb.js";
import { type Status, StatusSchema } from "./gen/keyturn/v1/status_pb.js";
import {
  type CreditTicket,
  type DecideRequest,
  type Decision,
  type Denial,
  type Explanation,
  KeyHandle,
  type Recorded,
  type RecordRequest,
  type SealedRecord,
  type Usage,
} from "./model.js";
import { SealedHandle, SealedTicket } from "./sealed.js";
import { Secret } from "./secret.js";
import { numberOf, type Outcome, wordOf } from "./words.js";

/** Characters (Unicode code points) of a provider's error that are sent. */
const MAX_ERROR_TEXT = 500;

/** A request with its id. */
export type IdentifiedRequest = DecideRequest & { readonly requestId: string };

// All encoders throw `TypeError` or `RangeError`, by the field's name, for what protobuf cannot
// hold. Other limits are the sidecar's to check.

export function decideRequest(asked: IdentifiedRequest): pb.DecideRequest {
  const tokensGiven = asked.inputTokens !== undefined || asked.maxOutputTokens !== undefined;
  if (tokensGiven && asked.costMicros !== undefined) {
    throw new TypeError("estimate with costMicros or with tokens, not with both");
  }
  const request = create(pb.DecideRequestSchema, {
    requestId: text("requestId", asked.requestId),
    userId: text("userId", asked.userId),
    provider: text("provider", asked.provider),
    model: text("model", asked.model ?? ""),
    serviceType: text("serviceType", asked.serviceType ?? ""),
    constraint: numberOf("Constraint", policy.Constraint, asked.constraint ?? "ANY"),
    failedKeyHandles: (asked.failedKeys ?? []).map(handleText),
    keyDelivery: asked.redeem ? pb.KeyDelivery.REDEEM : pb.KeyDelivery.INLINE,
    ...span("holdTtl", "holdTtlMs", asked.holdTtlMs),
  });
  if (asked.costMicros !== undefined) {
    request.estimate = { case: "costMicros", value: int64("costMicros", asked.costMicros) };
  } else if (tokensGiven) {
    const value = create(pb.TokenEstimateSchema, {
      inputTokens: int64("inputTokens", asked.inputTokens ?? 0),
      maxOutputTokens: int64("maxOutputTokens", asked.maxOutputTokens ?? 0),
    });
    request.estimate = { case: "tokens", value };
  }
  return request;
}

export function recordRequest(record: SealedRecord): pb.RecordRequest {
  const { settles } = record;
  return create(pb.RecordRequestSchema, {
    settles: { case: settles.kind === "handle" ? "keyHandle" : "creditTicket", value: settles.reveal() },
    outcome: outcomeNumber(record.outcome),
    ...recordFields(record),
  });
}

export function outcomeNumber(outcome: Outcome): number {
  return numberOf("Outcome", pb.Outcome, outcome);
}

/** Everything of a record but what it settles and how that ended. */
export function recordFields(
  record: Omit<RecordRequest, "settles" | "outcome">,
): MessageInitShape<typeof pb.RecordRequestSchema> {
  return {
    model: text("model", record.model ?? ""),
    endpoint: text("endpoint", record.endpoint ?? ""),
    httpStatus: int32("httpStatus", record.httpStatus ?? 0),
    errorMessage: cut(text("errorMessage", record.errorMessage ?? "")),
    ...(record.usage === undefined ? {} : { usage: usage(record.usage) }),
    ...(record.costMicros === undefined ? {} : { costMicros: int64("costMicros", record.costMicros) }),
    ...span("responseTime", "responseTimeMs", record.responseTimeMs),
    ...span("retryAfter", "retryAfterMs", record.retryAfterMs),
  };
}

export function redeemRequest(key: KeyHandle | SealedHandle): pb.RedeemRequest {
  return create(pb.RedeemRequestSchema, { keyHandle: handleText(key) });
}

export function decision(response: pb.DecideResponse): Decision {
  const { route } = response;
  return Object.freeze({
    decisionId: response.decisionId,
    mode: wordOf(policy.Mode, response.mode),
    reason: wordOf(policy.Reason, response.reason),
    message: response.message,
    degraded: response.degraded,
    replayed: response.replayed,
    unmetered: false,
    allowed: route.case === "key" || route.case === "ticket",
    key: route.case === "key" ? keyHandle(route.value) : undefined,
    ticket: route.case === "ticket" ? creditTicket(route.value) : undefined,
    denial: route.case === "denial" ? denial(route.value) : undefined,
  });
}

/** The decision for a request that goes ahead although the sidecar could not be asked. */
export function unmetered(error: KeyturnError): Decision {
  return Object.freeze({
    decisionId: "",
    mode: "UNSPECIFIED",
    reason: "UNSPECIFIED",
    message: `Unmetered: the sidecar could not be asked (${error.code}).`,
    degraded: false,
    replayed: false,
    unmetered: true,
    allowed: true,
    key: undefined,
    ticket: undefined,
    denial: undefined,
  });
}

export function recorded(response: pb.RecordResponse): Recorded {
  return Object.freeze({
    recordId: response.recordId,
    chargedMicros: number(response.chargedMicros),
    releasedMicros: number(response.releasedMicros),
    balanceMicros: response.balanceMicros === undefined ? undefined : number(response.balanceMicros),
    costSource: wordOf(pb.CostSource, response.costSource),
    replayed: response.replayed,
    durability: wordOf(pb.Durability, response.durability),
    keyState: wordOf(policy.KeyState, response.keyState),
  });
}

export function explanation(response: pb.ExplainResponse): Explanation {
  return Object.freeze({
    decision: decision(response.decision ?? create(pb.DecideResponseSchema)),
    steps: response.steps.map(({ check, result, detail }) => Object.freeze({ check, result, detail })),
  });
}

type BatchResult<R> =
  | { case: "response"; value: R }
  | { case: "status"; value: Status }
  | { case: undefined; value?: undefined };

/** An answer or an error for each of `count` items, also where the sidecar left some out. */
export function batchResults<R, V>(
  results: readonly { result: BatchResult<R> }[],
  count: number,
  read: (response: R) => V,
): (V | KeyturnError)[] {
  return Array.from({ length: count }, (_, index) => {
    const result = results[index]?.result;
    if (result?.case === "response") {
      return read(result.value);
    }
    if (result?.case === "status") {
      return errorOfStatus(result.value);
    }
    return new InternalError("The sidecar gave no answer to this item.", "INTERNAL");
  });
}

/**
 * The error of a failed call that nobody here cancelled, with the details that came in
 * `grpc-status-details-bin`.
 */
export function errorOfCall({ code: number, message, details: packed }: Failed): KeyturnError {
  let details: readonly Any[] = [];
  if (packed !== undefined) {
    // Details are an extra: garbled ones must never mask the status itself.
    try {
      details = fromBinary(StatusSchema, packed).details;
    } catch {}
  }
  let code = statusCode(number);
  if (code === "CANCELLED" && details.length === 0) {
    // Not by us: who cancels a call gets no error of gRPC's. It is what gRPC's core makes of calls
    // that a server which ends has not looked at yet (github.com/grpc/grpc/issues/41785).
    code = "UNAVAILABLE";
  }
  const error = errorOf(code, message, readDetails(details));
  // Ten frames are kept: the caller's are worth more than ours.
  Error.captureStackTrace(error, errorOfCall);
  return error;
}

function errorOfStatus(status: Status): KeyturnError {
  return errorOf(statusCode(status.code), status.message, readDetails(status.details));
}

function readDetails(packed: readonly Any[]): Details {
  let found: Details = {};
  for (const each of packed) {
    try {
      found = { ...found, ...readDetail(each) };
    } catch {} // See errorOfCall.
  }
  return found;
}

function readDetail({ typeUrl, value }: Any): Details {
  switch (typeUrl.slice(typeUrl.lastIndexOf("/") + 1)) {
    case "google.rpc.ErrorInfo": {
      const { reason, metadata } = fromBinary(details.ErrorInfoSchema, value);
      return { reason, metadata };
    }
    case "google.rpc.BadRequest": {
      const { fieldViolations } = fromBinary(details.BadRequestSchema, value);
      return { fieldViolations: fieldViolations.map(({ field, description }) => ({ field, description })) };
    }
    case "google.rpc.RetryInfo": {
      const { retryDelay } = fromBinary(details.RetryInfoSchema, value);
      return { retryAfterMs: Math.max(milliseconds(retryDelay) ?? 0, 0) };
    }
    case "google.rpc.ResourceInfo": {
      const { resourceType, resourceName, description } = fromBinary(details.ResourceInfoSchema, value);
      return { resource: { type: resourceType, name: resourceName, description } };
    }
    default:
      return {};
  }
}

function keyHandle(key: pb.KeyHandle): KeyHandle {
  return new KeyHandle({
    handle: new SealedHandle(key.handle),
    keyId: key.keyId,
    provider: key.provider,
    hint: key.hint,
    secret: key.secret === "" ? undefined : new Secret(key.secret),
    authHeader: key.auth?.header ?? "",
    authPrefix: key.auth?.prefix ?? "",
    baseUrl: key.baseUrl,
    expireTime: date(key.expireTime),
  });
}

function creditTicket(ticket: pb.CreditTicket): CreditTicket {
  return Object.freeze({
    ticket: new SealedTicket(ticket.ticket),
    holdMicros: number(ticket.holdMicros),
    availableMicros: number(ticket.availableMicros),
    expireTime: date(ticket.expireTime),
  });
}

function denial(denied: pb.Denial): Denial {
  return Object.freeze({
    reason: wordOf(policy.DenialReason, denied.reason),
    retryable: denied.retryable,
    retryAfterMs: milliseconds(denied.retryAfter),
    suggestion: denied.suggestion,
  });
}

function usage(used: Usage): pb.Usage {
  return create(pb.UsageSchema, {
    inputTokens: int64("inputTokens", used.inputTokens ?? 0),
    outputTokens: int64("outputTokens", used.outputTokens ?? 0),
    cacheReadTokens: int64("cacheReadTokens", used.cacheReadTokens ?? 0),
    cacheWriteTokens: int64("cacheWriteTokens", used.cacheWriteTokens ?? 0),
    ...(used.totalTokens === undefined ? {} : { totalTokens: int64("totalTokens", used.totalTokens) }),
  });
}

function handleText(key: KeyHandle | SealedHandle): string {
  const handle = key instanceof KeyHandle ? key.handle : key;
  if (!(handle instanceof SealedHandle)) {
    throw new TypeError("a key is given as a KeyHandle, or a SealedHandle made from a stored text");
  }
  return handle.reveal();
}

function text(name: string, value: string): string {
  if (typeof value !== "string") {
    throw new TypeError(`${name} is a string, not ${typeof value}`);
  }
  return value;
}

function cut(message: string): string {
  // No character takes more than two units, so that a huge text is not split up as a whole.
  return [...message.slice(0, 2 * MAX_ERROR_TEXT)].slice(0, MAX_ERROR_TEXT).join("");
}

function int64(name: string, value: number): bigint {
  if (!Number.isSafeInteger(value)) {
    throw new RangeError(`${name} is a whole number that a JavaScript number holds exactly`);
  }
  return BigInt(value);
}

function int32(name: string, value: number): number {
  if (!Number.isInteger(value) || value !== (value | 0)) {
    throw new RangeError(`${name} is a whole number of 32 bits`);
  }
  return value;
}

/** A 64-bit number of the wire; one that `number` does not hold exactly reads as the nearest limit. */
function number(value: bigint): number {
  if (value > Number.MAX_SAFE_INTEGER) {
    return Number.MAX_SAFE_INTEGER;
  }
  return value < Number.MIN_SAFE_INTEGER ? Number.MIN_SAFE_INTEGER : Number(value);
}

function span<F extends string>(
  field: F,
  name: string,
  ms: number | undefined,
): { [K in F]?: MessageInitShape<typeof DurationSchema> } {
  if (ms === undefined) {
    return {};
  }
  if (!(Number.isFinite(ms) && Math.abs(ms) <= Number.MAX_SAFE_INTEGER / 1_000)) {
    throw new RangeError(`${name} is a time in milliseconds`);
  }
  const micros = Math.round(ms * 1_000);
  const seconds = Math.trunc(micros / 1_000_000);
  const duration = { seconds: BigInt(seconds), nanos: (micros - seconds * 1_000_000) * 1_000 };
  return { [field]: duration } as { [K in F]: typeof duration };
}

function milliseconds(duration: Duration | undefined): number | undefined {
  return duration === undefined ? undefined : Number(duration.seconds) * 1_000 + duration.nanos / 1_000_000;
}

function date(stamp: Timestamp | undefined): Date | undefined {
  return stamp === undefined ? undefined : timestampDate(stamp);
}
