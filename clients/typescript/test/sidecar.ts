/** A sidecar that answers what a test wants, over real gRPC. */

import { randomUUID } from "node:crypto";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { TestContext } from "node:test";

import {
  create,
  type DescMessage,
  fromBinary,
  type MessageInitShape,
  type MessageShape,
  toBinary,
} from "@bufbuild/protobuf";
import { durationFromMs } from "@bufbuild/protobuf/wkt";
import {
  Metadata,
  Server,
  ServerCredentials,
  type ServerUnaryCall,
  type ServiceDefinition,
} from "@grpc/grpc-js";
import { Client, type ClientOptions } from "@keyturn/client";
import * as google from "#dist/gen/keyturn/details/details_pb.js";
import { Mode, Reason } from "#dist/gen/keyturn/v1/policy_pb.js";
import {
  CostSource,
  type DecideResponseSchema,
  Durability,
  type RecordRequest,
  type RecordResponseSchema,
  RoutingService,
} from "#dist/gen/keyturn/v1/routing_service_pb.js";
import { type Status, StatusSchema } from "#dist/gen/keyturn/v1/status_pb.js";

type Methods = typeof RoutingService.method;
export type Method = keyof Methods;
type Input<M extends Method> = MessageShape<Methods[M]["input"]>;
type Output<M extends Method> = MessageInitShape<Methods[M]["output"]>;
export type Incoming<M extends Method> = ServerUnaryCall<Input<M>, unknown>;
export type Handlers = {
  [M in Method]: (request: Input<M>, call: Incoming<M>) => Output<M> | Promise<Output<M>>;
};

/** Throw it in a handler. */
export class Fault {
  constructor(
    readonly code: number,
    readonly message: string,
    readonly details: Uint8Array | undefined = undefined,
  ) {}
}

export const UNAVAILABLE = 14;

/** The fault of a sidecar that cannot be reached: nothing but the code. */
export const outOfReach = () => new Fault(UNAVAILABLE, "no connection");

/** A status with details, as the sidecar makes them. */
export function status(
  code: number,
  reason: string,
  more: {
    message?: string;
    metadata?: Record<string, string>;
    retryAfterMs?: number;
    fields?: { field: string; description: string }[];
    resource?: { resourceType: string; resourceName: string; description: string };
  } = {},
): Status {
  const pack = <S extends DescMessage>(schema: S, value: MessageInitShape<S>) => ({
    typeUrl: `type.googleapis.com/google.rpc.${schema.name}`,
    value: toBinary(schema, create(schema, value)),
  });
  const { metadata = {}, retryAfterMs, fields, resource } = more;
  const details = [pack(google.ErrorInfoSchema, { reason, domain: "keyturn", metadata })];
  if (retryAfterMs !== undefined) {
    details.push(pack(google.RetryInfoSchema, { retryDelay: durationFromMs(retryAfterMs) }));
  }
  if (fields !== undefined) {
    details.push(pack(google.BadRequestSchema, { fieldViolations: fields }));
  }
  if (resource !== undefined) {
    details.push(pack(google.ResourceInfoSchema, resource));
  }
  return create(StatusSchema, { code, message: more.message ?? "It is said.", details });
}

export function fault(code: number, reason: string, more: Parameters<typeof status>[2] = {}): Fault {
  const made = status(code, reason, more);
  return new Fault(code, made.message, toBinary(StatusSchema, made));
}

/** 40 characters, so that it is long enough to be shown in part. */
export const HANDLE = "kth1_handle-canary-0123456789abcdefghijkl";
export const TICKET = "ktt1_ticket-canary-0123456789abcdefghijkl";
export const SECRET = "sk-secret-canary-0123456789";

export function ticket(text = TICKET): MessageInitShape<typeof DecideResponseSchema> {
  return {
    decisionId: randomUUID(),
    mode: Mode.BYOK_FIRST,
    reason: Reason.BYOK_FIRST_NO_KEY,
    message: "Credits pay.",
    route: { case: "ticket", value: { ticket: text, holdMicros: 1_000n, availableMicros: 5_000n } },
  };
}

export function key(
  handle = HANDLE,
  secret = SECRET,
  baseUrl = "",
): MessageInitShape<typeof DecideResponseSchema> {
  return {
    decisionId: randomUUID(),
    mode: Mode.BYOK_FIRST,
    reason: Reason.BYOK_FIRST_OWN_KEY,
    message: "The own key pays.",
    route: {
      case: "key",
      value: {
        handle,
        keyId: "k1",
        provider: "openai",
        hint: "6789",
        secret,
        auth: { header: "Authorization", prefix: "Bearer " },
        baseUrl,
        expireTime: { seconds: 1_800_000_000n, nanos: 0 },
      },
    },
  };
}

export function denial(retryable = false): MessageInitShape<typeof DecideResponseSchema> {
  return {
    decisionId: randomUUID(),
    mode: Mode.BYOK_ONLY,
    reason: Reason.DENIED,
    message: "Nobody pays.",
    route: {
      case: "denial",
      value: { reason: 2, retryable, suggestion: "Add a key.", retryAfter: durationFromMs(2_500) },
    },
  };
}

export function taken(record: RecordRequest): MessageInitShape<typeof RecordResponseSchema> {
  return {
    recordId: randomUUID(),
    chargedMicros: record.costMicros ?? 0n,
    balanceMicros: 4_000n,
    costSource: CostSource.REPORTED,
    durability: Durability.DATABASE,
  };
}

const ANSWERS: Handlers = {
  decide: () => ticket(),
  record: taken,
  redeem: () => ({ secret: SECRET }),
  explain: () => ({
    decision: ticket(""),
    steps: [{ check: "tier", result: "eligible", detail: "premium" }],
  }),
  batchDecide: ({ requests }) => ({
    results: requests.map(() => ({ result: { case: "response" as const, value: ticket() } })),
  }),
  batchRecord: ({ requests }) => ({
    results: requests.map((each) => ({ result: { case: "response" as const, value: taken(each) } })),
  }),
};

export class Sidecar {
  readonly handlers: Handlers = { ...ANSWERS };
  readonly #seen: { method: Method; request: unknown; call: Incoming<Method> }[] = [];
  readonly #server = new Server();
  /** Closed before it stops: hooks of a test run in the order in which they were made. */
  readonly clients: Client[] = [];
  target = "";

  constructor() {
    const methods = Object.entries(RoutingService.method) as [Method, Methods[Method]][];
    const definition = Object.fromEntries(
      methods.map(([name, { input, output, name: wire }]) => [
        name,
        {
          path: `/${RoutingService.typeName}/${wire}`,
          requestStream: false,
          responseStream: false,
          requestSerialize: (value: never) => Buffer.from(toBinary(input, value)),
          requestDeserialize: (bytes: Buffer) => fromBinary(input, bytes),
          responseSerialize: (value: never) => Buffer.from(toBinary(output, create(output, value) as never)),
          responseDeserialize: (bytes: Buffer) => fromBinary(output, bytes),
        },
      ]),
    ) as ServiceDefinition;
    const implementation = Object.fromEntries(
      methods.map(([name]) => [
        name,
        async (call: Incoming<Method>, answer: (fault: unknown, value?: unknown) => void) => {
          this.#seen.push({ method: name, request: call.request, call });
          try {
            answer(
              null,
              await (this.handlers[name] as (request: unknown, call: unknown) => unknown)(call.request, call),
            );
          } catch (error) {
            if (!(error instanceof Fault)) {
              answer({ code: 2, details: `a defect of the test: ${error}` });
              return;
            }
            const metadata = new Metadata();
            if (error.details !== undefined) {
              metadata.set("grpc-status-details-bin", Buffer.from(error.details));
            }
            answer({ code: error.code, details: error.message, metadata });
          }
        },
      ]),
    );
    this.#server.addService(definition, implementation as never);
  }

  async listen(address: string, credentials = ServerCredentials.createInsecure()): Promise<void> {
    const port = await new Promise<number>((resolve, reject) => {
      this.#server.bindAsync(address, credentials, (error, bound) =>
        error ? reject(error) : resolve(bound),
      );
    });
    this.target = address.startsWith("unix:") ? address : address.replace(/:0$/, `:${port}`);
  }

  async stop(): Promise<void> {
    await Promise.all(this.clients.map((each) => each.close()));
    this.#server.forceShutdown();
  }

  /** What was asked of a method, in order. */
  seen<M extends Method>(method: M): Input<M>[] {
    return this.#seen.filter((each) => each.method === method).map((each) => each.request as Input<M>);
  }

  /** All records that arrived, one by one and in batches. */
  records(): RecordRequest[] {
    return this.#seen.flatMap(({ method, request }) => {
      if (method === "record") {
        return [request as RecordRequest];
      }
      return method === "batchRecord" ? (request as Input<"batchRecord">).requests : [];
    });
  }

  /** How the last call came. */
  get last(): Incoming<Method> {
    const last = this.#seen.at(-1);
    if (last === undefined) {
      throw new Error("nothing was asked");
    }
    return last.call;
  }
}

/** A directory that is gone after the test. */
export function directory(test: TestContext): string {
  const path = mkdtempSync(join(tmpdir(), "kt-"));
  test.after(() => rmSync(path, { recursive: true, force: true }));
  return path;
}

/** A sidecar on a Unix socket, for one test. */
export async function sidecar(test: TestContext, handlers: Partial<Handlers> = {}): Promise<Sidecar> {
  const made = new Sidecar();
  Object.assign(made.handlers, handlers);
  await made.listen(`unix:${directory(test)}/k.sock`);
  test.after(() => made.stop());
  return made;
}

/** A client for one test. Retries do not dawdle, and deadlines leave time to a slow machine. */
export function client(
  test: TestContext,
  to: Sidecar | { target: string },
  options: ClientOptions = {},
): Client {
  const quick = { timeoutMs: 20_000, retries: { firstDelayMs: 1, maxDelayMs: 2 }, closeTimeoutMs: 200 };
  const made = new Client({ target: to.target, ...quick, ...options });
  if (to instanceof Sidecar) {
    to.clients.push(made);
  } else {
    test.after(() => made.close());
  }
  return made;
}

/** Waits until `so` holds. */
export async function eventually(so: () => boolean): Promise<void> {
  for (const ends = performance.now() + 20_000; !so(); ) {
    if (performance.now() > ends) {
      throw new Error(`never so: ${so}`);
    }
    await new Promise((next) => setTimeout(next, 5));
  }
}

export const ASKED = { userId: "u1", provider: "openai" } as const;
