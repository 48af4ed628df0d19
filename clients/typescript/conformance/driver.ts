/** The driver of the conformance scenarios: its protocol is in clients/conformance/README.md. */

import { createInterface } from "node:readline";
import { format, inspect } from "node:util";
import { deserialize, serialize } from "node:v8";

import {
  type Call,
  type CallOptions,
  Client,
  type ClientOptions,
  Closed,
  type Constraint,
  type DecideRequest,
  type Decision,
  Denied,
  type KeyHandle,
  KeyturnError,
  Options,
  type Outcome,
  outcomeOf,
  QueueFull,
  type Recorded,
  type RecordRequest,
  SealedHandle,
  SealedTicket,
  Secret,
  type Settles,
  type Unsent,
  type Usage,
} from "@keyturn/client";

// biome-ignore lint/suspicious/noExplicitAny: commands are JSON, which the host vouches for.
type Json = any;

interface Opened {
  readonly client: Client;
  readonly options: Options;
  readonly unsent: Json[];
  readonly asked: Json[];
}

const clients = new Map<string, Opened>();
const calls = new Map<string, Call>();
const kept = new Map<string, unknown>();

function opened(command: Json): Opened {
  return known(clients, command.client);
}

function called(command: Json): Call {
  return known(calls, command.call);
}

function known<T>(values: Map<string, T>, name: string): T {
  const value = values.get(name);
  if (value === undefined) {
    throw new Defect(`nothing is called ${name}`);
  }
  return value;
}

class Defect extends Error {}

// ------------------------------------------------------------------------------- what is told

/** Without the fields that are absent or null: both mean not given. */
function present<T extends object>(fields: T): { [F in keyof T]: NonNullable<T[F]> } {
  return Object.fromEntries(
    Object.entries(fields).filter(([, value]) => value !== undefined && value !== null),
  ) as { [F in keyof T]: NonNullable<T[F]> };
}

function optionsOf(given: Json, about: Pick<Opened, "unsent" | "asked">): ClientOptions {
  const whenDown: ClientOptions["whenDown"] = (request, error) => {
    about.asked.push({ user_id: request.userId, code: error.code });
    return given.when_down === "pass";
  };
  return present({
    target: given.target,
    token: given.token,
    rootCertificates: given.root_certificates,
    certificateChain: given.certificate_chain,
    privateKey: given.private_key,
    tls: given.tls,
    timeoutMs: given.timeout_ms,
    retries:
      given.retries &&
      present({
        attempts: given.retries.attempts,
        firstDelayMs: given.retries.first_delay_ms,
        maxDelayMs: given.retries.max_delay_ms,
      }),
    queueSize: given.queue_size,
    closeTimeoutMs: given.close_timeout_ms,
    whenDown: given.when_down && whenDown,
    onUnsent: (unsent: Unsent) => {
      about.unsent.push(unsentOf(unsent));
    },
  });
}

function requestOf(given: Json): DecideRequest {
  return present({
    userId: given.user_id ?? "",
    provider: given.provider ?? "",
    requestId: given.request_id,
    model: given.model,
    serviceType: given.service_type,
    costMicros: given.cost_micros,
    inputTokens: given.input_tokens,
    maxOutputTokens: given.max_output_tokens,
    constraint: given.constraint as Constraint,
    failedKeys: given.failed_keys?.map((handle: string) => new SealedHandle(handle)),
    redeem: given.redeem,
    holdTtlMs: given.hold_ttl_ms,
  });
}

function usageOf(given: Json): Usage {
  return present({
    inputTokens: given.input_tokens,
    outputTokens: given.output_tokens,
    cacheReadTokens: given.cache_read_tokens,
    cacheWriteTokens: given.cache_write_tokens,
    totalTokens: given.total_tokens,
  });
}

function outcomeWord(given: string | number): Outcome {
  return typeof given === "number" ? `UNRECOGNIZED_${given}` : (given as Outcome);
}

function recordOf(given: Json): RecordRequest {
  return present({
    settles: settlesOf(given),
    outcome: outcomeWord(given.outcome),
    usage: given.usage && usageOf(given.usage),
    costMicros: given.cost_micros,
    model: given.model,
    endpoint: given.endpoint,
    responseTimeMs: given.response_time_ms,
    httpStatus: given.http_status,
    errorMessage: given.error_message,
    retryAfterMs: given.retry_after_ms,
  });
}

function settlesOf(given: Json): Settles {
  if (given.decision) {
    return known(kept, given.decision) as Decision;
  }
  return given.handle ? new SealedHandle(given.handle) : new SealedTicket(given.ticket ?? "");
}

function failureOf(given: Json) {
  return present({
    httpStatus: given.http_status,
    errorMessage: given.error_message,
    retryAfterMs: given.retry_after_ms,
  });
}

function callOptions(command: Json): CallOptions {
  const options: { timeoutMs?: number; signal?: AbortSignal } = {};
  if (command.timeout_ms !== undefined && command.timeout_ms !== null) {
    options.timeoutMs = command.timeout_ms;
  }
  if (command.cancel_after_ms !== undefined && command.cancel_after_ms !== null) {
    const controller = new AbortController();
    setTimeout(() => controller.abort(), command.cancel_after_ms).unref();
    options.signal = controller.signal;
  }
  return options;
}

// ---------------------------------------------------------------------------- what is answered

function decisionOf(decision: Decision, requestId?: string): Json {
  const { key, ticket, denial } = decision;
  return {
    decision_id: decision.decisionId,
    mode: decision.mode,
    reason: decision.reason,
    message: decision.message,
    degraded: decision.degraded,
    replayed: decision.replayed,
    unmetered: decision.unmetered,
    allowed: decision.allowed,
    request_id: requestId ?? null,
    key: key ? keyOf(key) : null,
    ticket: ticket
      ? {
          ticket: ticket.ticket.reveal(),
          hold_micros: ticket.holdMicros,
          available_micros: ticket.availableMicros,
          expire_time: ticket.expireTime?.toISOString() ?? null,
        }
      : null,
    denial: denial
      ? {
          reason: denial.reason,
          retryable: denial.retryable,
          retry_after_ms: denial.retryAfterMs ?? null,
          suggestion: denial.suggestion,
        }
      : null,
  };
}

function keyOf(key: KeyHandle): Json {
  return {
    handle: key.handle.reveal(),
    key_id: key.keyId,
    provider: key.provider,
    hint: key.hint,
    secret: key.secret?.reveal() ?? null,
    auth_header: key.authHeader,
    auth_prefix: key.authPrefix,
    base_url: key.baseUrl,
    expire_time: key.expireTime?.toISOString() ?? null,
  };
}

function recordedOf(recorded: Recorded): Json {
  return {
    record_id: recorded.recordId,
    charged_micros: recorded.chargedMicros,
    released_micros: recorded.releasedMicros,
    balance_micros: recorded.balanceMicros ?? null,
    cost_source: recorded.costSource,
    replayed: recorded.replayed,
    durability: recorded.durability,
    key_state: recorded.keyState,
  };
}

function unsentOf({ record, error }: Unsent): Json {
  return { [record.settles.kind]: record.settles.reveal(), outcome: record.outcome, error: errorOf(error) };
}

function errorOf(error: unknown): Json {
  if (error instanceof Defect) {
    throw error;
  }
  const text = String(error);
  if (error instanceof KeyturnError) {
    return {
      kind: error.name,
      code: error.code,
      reason: error.reason,
      message: error.message,
      text,
      field_violations: error.fieldViolations,
      retry_after_ms: error.retryAfterMs ?? null,
      resource: error.resource ?? null,
      metadata: error.metadata,
    };
  }
  if (error instanceof Denied) {
    return { kind: "Denied", text, decision: decisionOf(error.decision) };
  }
  if (error instanceof Closed || error instanceof QueueFull) {
    return { kind: error.name, text };
  }
  if (error instanceof DOMException && error.name === "AbortError") {
    return { kind: "Cancelled", text };
  }
  if (error instanceof TypeError || error instanceof RangeError) {
    return { kind: "Invalid", text };
  }
  throw error;
}

/** Everything that the language has to print a value. */
function printed(value: unknown): string[] {
  const clone = (copy: () => unknown) => {
    try {
      return inspect(copy(), { depth: 9, showHidden: true });
    } catch (error) {
      return String(error);
    }
  };
  const texts = [
    String(value),
    `${value}`,
    JSON.stringify(value) ?? "",
    JSON.stringify({ value, list: [value] }),
    inspect(value),
    inspect(value, { depth: 9, showHidden: true, getters: true, showProxy: true }),
    inspect(value, { depth: 9, customInspect: false, getters: true, showHidden: true }),
    inspect({ value, list: [value] }, { depth: 9 }),
    format("%s %o %O %j", value, value, value, value),
    JSON.stringify(Object.entries(value ?? {})),
    clone(() => ({ ...(value as object) })),
    clone(() => structuredClone(value)),
    clone(() => deserialize(serialize(value))),
  ];
  try {
    texts.push(serialize(value).toString("latin1"));
  } catch {} // It refuses, as it may.
  if (value instanceof Error) {
    texts.push(value.stack ?? "", inspect(value.cause), inspect(new Error("outer", { cause: value })));
  }
  return texts;
}

function secretOf(value: unknown): Secret | undefined {
  if (value instanceof Secret) {
    return value;
  }
  const held = value as { key?: KeyHandle | undefined } | undefined;
  return value instanceof Object && "key" in value ? held?.key?.secret : undefined;
}

// ------------------------------------------------------------------------------------ commands

function keep<T>(command: Json, value: T): T {
  if (command.as) {
    kept.set(command.as, value);
  }
  return value;
}

function oneByOne<T>(items: readonly (T | KeyturnError)[], show: (item: T) => Json): Json[] {
  return items.map((item) => (item instanceof KeyturnError ? { error: errorOf(item) } : { ok: show(item) }));
}

const commands: Record<string, (command: Json) => Json | Promise<Json>> = {
  open(command) {
    const about = { unsent: [], asked: [] };
    const options = new Options(optionsOf(command.options ?? {}, about));
    clients.set(command.client, { client: new Client(options), options, ...about });
    return {};
  },
  async close(command) {
    return { unsent: (await opened(command).client.close()).map(unsentOf) };
  },
  async decide(command) {
    const decided = opened(command).client.decide(requestOf(command.request), callOptions(command));
    return decisionOf(keep(command, await decided));
  },
  async decide_many(command) {
    const requests = command.requests.map(requestOf);
    return oneByOne(await opened(command).client.decideMany(requests, callOptions(command)), (decision) =>
      decisionOf(decision),
    );
  },
  async explain(command) {
    const explained = await opened(command).client.explain(requestOf(command.request), callOptions(command));
    return { decision: decisionOf(explained.decision), steps: explained.steps };
  },
  async record(command) {
    return recordedOf(await opened(command).client.record(recordOf(command.record), callOptions(command)));
  },
  async record_many(command) {
    const records = command.records.map(recordOf);
    return oneByOne(await opened(command).client.recordMany(records, callOptions(command)), recordedOf);
  },
  record_later(command) {
    opened(command).client.recordLater(recordOf(command.record));
    return {};
  },
  async flush(command) {
    await opened(command).client.flush(callOptions(command));
    return {};
  },
  unsent: (command) => opened(command).unsent,
  when_down_asked: (command) => opened(command).asked,
  async redeem(command) {
    const handle = new SealedHandle(command.handle);
    const secret = await opened(command).client.redeem(handle, callOptions(command));
    return { secret: keep(command, secret).reveal() };
  },
  async begin(command) {
    const call = await opened(command).client.request(requestOf(command.request), callOptions(command));
    calls.set(command.as, keep(command, call));
    return decisionOf(call.decision, call.requestId);
  },
  headers: (command) => called(command).headers(command.platform ?? {}),
  sending(command) {
    called(command).sending();
    return {};
  },
  succeeded(command) {
    called(command).succeeded();
    return {};
  },
  used(command) {
    called(command).used(usageOf(command.usage));
    return {};
  },
  cost(command) {
    called(command).cost(command.micros);
    return {};
  },
  note(command) {
    called(command).note(
      present({
        model: command.model,
        endpoint: command.endpoint,
        responseTimeMs: command.response_time_ms,
        httpStatus: command.http_status,
      }),
    );
    return {};
  },
  failed(command) {
    called(command).failed(outcomeWord(command.outcome), failureOf(command));
    return {};
  },
  async key_refused(command) {
    const call = called(command);
    const outcome = command.outcome ? { outcome: outcomeWord(command.outcome) } : {};
    const decided = call.keyRefused({ ...failureOf(command), ...outcome }, callOptions(command));
    return decisionOf(keep(command, await decided), call.requestId);
  },
  async finish(command) {
    const recorded = await called(command).finish(callOptions(command));
    return recorded === undefined ? null : recordedOf(recorded);
  },
  async end(command) {
    await called(command)[Symbol.asyncDispose]();
    return {};
  },
  outcome_of: ({ status, error_code }) => ({ outcome: outcomeOf(status, error_code) }),
  show(command) {
    const client = clients.get(command.of);
    if (client !== undefined) {
      return { prints: [...printed(client.client), ...printed(client.options)], revealed: false };
    }
    const value = known(kept, command.of);
    return { prints: printed(value), revealed: secretOf(value)?.reveal() === command.secret };
  },
  parallel: (command) => Promise.all(command.commands.map(answer)),
};

async function answer(command: Json): Promise<Json> {
  try {
    const run = Object.hasOwn(commands, command.op) ? commands[command.op] : undefined;
    if (run === undefined) {
      throw new Defect(`no such op: ${command.op}`);
    }
    try {
      return { ok: await run(command) };
    } catch (error) {
      return { error: errorOf(keep(command, error)) };
    }
  } catch (error) {
    return { defect: String(error) };
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  console.log(JSON.stringify(await answer(JSON.parse(line))));
}
