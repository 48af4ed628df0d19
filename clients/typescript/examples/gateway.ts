/**
 * A gateway for OpenAI's chat completions, to begin from. It listens on `LISTEN` (127.0.0.1:0), asks
 * the sidecar at `KEYTURN_ADDRESS` who pays, and sends requests on to the base URL of the user's own
 * key, or to `OPENAI_BASE_URL` with the platform's `OPENAI_API_KEY`.
 */

import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";

import { type Call, Client, Denied, KeyturnError, NotFound, outcomeOf, Unavailable } from "@keyturn/client";

const MAX_BODY_BYTES = 16 * 1024 * 1024;
const MAX_KEYS = 3;
/** How long the provider may be silent: before its answer, and within it. */
const SILENCE_MS = 60_000;

const OPENAI_BASE_URL = process.env.OPENAI_BASE_URL ?? "https://api.openai.com/v1";
const PLATFORM = { authorization: `Bearer ${process.env.OPENAI_API_KEY ?? ""}` };

const client = new Client();

/** An answer of the gateway itself. */
class Refusal extends Error {
  constructor(
    readonly status: number,
    readonly code: string,
    message: string,
    readonly headers: Record<string, string> = {},
  ) {
    super(message);
  }
}

/** What the provider answered, and has yet to say. */
interface Answer {
  readonly response: Response;
  /** Chunk by chunk. Rejects with `Broken` when it breaks off. */
  readonly chunks: AsyncIterable<Uint8Array>;
}

/** The provider did not answer, or not to the end. */
class Broken extends Error {
  constructor(readonly how: "unreachable" | "silent" | "broken off") {
    super(`the provider is ${how}`);
  }
}

// ---------------------------------------------------------------------------- one request

async function chat(request: IncomingMessage, response: ServerResponse): Promise<void> {
  const gone = new AbortController();
  response.on("close", () => gone.abort());
  const userId = userOf(request);
  const sent = await read(request);
  const body = bodyOf(sent);
  const limit = body.max_completion_tokens ?? body.max_tokens;
  await using call = await client.request(
    {
      userId,
      provider: "openai",
      model: body.model,
      serviceType: "gateway",
      ...(Number.isSafeInteger(limit)
        ? { maxOutputTokens: limit, inputTokens: Math.floor(sent.length / 4) }
        : {}),
    },
    { signal: gone.signal },
  );
  const outgoing = body.stream === true ? withUsage(body) : sent;
  try {
    const contentType = request.headers["content-type"] ?? "application/json";
    const answer = await answerOf(call, outgoing, contentType, response, gone.signal);
    if (answer !== undefined) {
      await pass(call, answer, response);
    }
  } catch (error) {
    if (gone.signal.aborted) {
      return; // The caller hung up: the call ends without a word, as CLIENT_CANCELLED.
    }
    if (!(error instanceof Broken)) {
      throw error;
    }
    const outcomes = {
      unreachable: "NEVER_SENT",
      silent: "TIMEOUT",
      "broken off": "PROVIDER_ERROR",
    } as const;
    call.failed(outcomes[error.how], { errorMessage: error.message });
    throw error.how === "silent"
      ? new Refusal(504, "provider_timeout", "The provider did not answer in time.")
      : new Refusal(502, "provider_unreachable", "The provider could not be reached, or broke off.");
  }
}

/** The provider's good answer; refused keys are tried past. Undefined: its refusal was passed on. */
async function answerOf(
  call: Call,
  body: Uint8Array,
  contentType: string,
  response: ServerResponse,
  signal: AbortSignal,
): Promise<Answer | undefined> {
  for (let keys = 1; ; keys += 1) {
    const answer = await send(call, body, contentType, signal);
    const { status, ok, headers } = answer.response;
    if (ok) {
      return answer;
    }
    const text = await whole(answer.chunks);
    const { code, message } = errorIn(text);
    const outcome = outcomeOf(status, code);
    const retryAfter = Number(headers.get("retry-after") ?? Number.NaN);
    const failure = {
      httpStatus: status,
      errorMessage: message,
      retryAfterMs: retryAfter >= 0 && retryAfter <= 86_400 ? retryAfter * 1_000 : undefined,
    };
    const ofKey = outcome === "AUTH_REJECTED" || outcome === "RATE_LIMITED" || outcome === "PROVIDER_BILLING";
    if (call.key === undefined || !ofKey || keys === MAX_KEYS) {
      call.failed(outcome, failure);
    } else {
      try {
        await call.keyRefused({ outcome, ...failure }, { signal });
        continue;
      } catch (error) {
        if (!(error instanceof Denied)) {
          throw error;
        }
      }
    }
    // Nobody else may pay, or it is not a matter of who pays: the provider's own answer.
    response.writeHead(status, { "content-type": headers.get("content-type") ?? "application/json" });
    response.end(text);
    return undefined;
  }
}

async function send(call: Call, body: Uint8Array, contentType: string, gone: AbortSignal): Promise<Answer> {
  const base = call.key?.baseUrl || OPENAI_BASE_URL;
  const silence = new AbortController();
  const listen = () => setTimeout(() => silence.abort(), SILENCE_MS).unref();
  let timer = listen();
  const broken = (how: Broken["how"]) => new Broken(silence.signal.aborted ? "silent" : how);
  let response: Response;
  try {
    response = await fetch(`${base}/chat/completions`, {
      method: "POST",
      headers: { "content-type": contentType, ...call.headers(PLATFORM) },
      body,
      redirect: "manual",
      signal: AbortSignal.any([gone, silence.signal]),
    });
  } catch (error) {
    throw broken(neverConnected(error) ? "unreachable" : "broken off");
  } finally {
    clearTimeout(timer);
  }
  async function* chunks(): AsyncGenerator<Uint8Array> {
    timer = listen();
    try {
      for await (const chunk of response.body ?? []) {
        clearTimeout(timer); // A caller who is slow to read is no silence of the provider's.
        yield chunk;
        timer = listen();
      }
    } catch {
      throw broken("broken off");
    } finally {
      clearTimeout(timer);
    }
  }
  return { response, chunks: chunks() };
}

/** Passes a good answer on as it comes, and notes what it says. */
async function pass(call: Call, { response: from, chunks }: Answer, to: ServerResponse): Promise<void> {
  const headers = { "content-type": from.headers.get("content-type") ?? "application/json" };
  call.note({ httpStatus: from.status });
  if (!headers["content-type"].startsWith("text/event-stream")) {
    const text = await whole(chunks);
    note(call, text.toString());
    call.succeeded();
    to.writeHead(from.status, headers);
    to.end(text);
    return;
  }
  to.writeHead(from.status, headers);
  to.flushHeaders();
  let done = false;
  let rest = "";
  const decoder = new TextDecoder();
  for await (const chunk of chunks) {
    const lines = (rest + decoder.decode(chunk, { stream: true })).split("\n");
    rest = lines.pop() ?? "";
    for (const line of lines.filter((each) => each.startsWith("data:"))) {
      const data = line.slice("data:".length).trim();
      done ||= data === "[DONE]";
      note(call, data);
    }
    if (!to.write(chunk) && !to.destroyed) {
      await new Promise((next) => to.once("drain", next).once("close", next));
    }
  }
  if (!done) {
    throw new Broken("broken off");
  }
  call.succeeded();
  to.end();
}

// ------------------------------------------------------------------------- what bodies say

// biome-ignore lint/suspicious/noExplicitAny: what the caller and the provider send may be anything.
type Json = any;

/** An object, or an empty one where `text` is none. */
function objectIn(text: string): Json {
  try {
    const value = JSON.parse(text);
    return typeof value === "object" && value !== null ? value : {};
  } catch {
    return {};
  }
}

/** Notes the usage and the model in an answer, or in a chunk of one. */
function note(call: Call, text: string): void {
  const { usage, model } = objectIn(text);
  const count = (value: Json) => (Number.isSafeInteger(value) && value >= 0 ? (value as number) : undefined);
  if (typeof model === "string") {
    call.note({ model });
  }
  if (usage) {
    call.used({
      inputTokens: count(usage.prompt_tokens),
      outputTokens: count(usage.completion_tokens),
      totalTokens: count(usage.total_tokens),
      cacheReadTokens: count(usage.prompt_tokens_details?.cached_tokens),
    });
  }
}

function errorIn(body: Uint8Array): { code: string | undefined; message: string } {
  const error = objectIn(Buffer.from(body).toString()).error ?? {};
  const code = error.code ?? error.type;
  return {
    code: typeof code === "string" ? code : undefined,
    message: typeof error.message === "string" ? error.message : "",
  };
}

function bodyOf(sent: Buffer): Json {
  const body = objectIn(sent.toString());
  if (typeof body.model !== "string") {
    throw new Refusal(400, "invalid_body", "The body is a JSON object with a model.");
  }
  return body;
}

/** The body of a stream, with usage asked for: it is what is charged. */
function withUsage(body: Json): Buffer {
  return Buffer.from(
    JSON.stringify({ ...body, stream_options: { ...body.stream_options, include_usage: true } }),
  );
}

async function whole(chunks: AsyncIterable<Uint8Array>): Promise<Buffer> {
  const all: Uint8Array[] = [];
  for await (const chunk of chunks) {
    all.push(chunk);
  }
  return Buffer.concat(all);
}

async function read(request: IncomingMessage): Promise<Buffer> {
  const chunks: Buffer[] = [];
  let bytes = 0;
  for await (const chunk of request) {
    bytes += chunk.length;
    if (bytes > MAX_BODY_BYTES) {
      throw new Refusal(413, "body_too_large", "The body is larger than 16 MiB.", { connection: "close" });
    }
    chunks.push(chunk);
  }
  return Buffer.concat(chunks);
}

/** The bearer token of the caller is the user's id: put your own authentication here. */
function userOf(request: IncomingMessage): string {
  const user = /^Bearer\s+(\S+)\s*$/i.exec(request.headers.authorization ?? "")?.[1];
  if (user === undefined) {
    throw new Refusal(401, "unauthenticated", "Give a bearer token.");
  }
  return user;
}

/** Whether `fetch` failed before anything was sent. */
function neverConnected(error: unknown): boolean {
  const { code = "", syscall } = ((error as Error).cause ?? {}) as { code?: string; syscall?: string };
  const before = [
    "ECONNREFUSED",
    "ENOTFOUND",
    "EAI_AGAIN",
    "EHOSTUNREACH",
    "ENETUNREACH",
    "UND_ERR_CONNECT_TIMEOUT",
  ];
  return before.includes(code) || syscall === "connect" || /CERT|^ERR_TLS|^ERR_SSL/.test(code);
}

// ----------------------------------------------------------------------------- the server

/** What a failure is to the caller, in OpenAI's form. */
function refusalOf(error: unknown): Refusal {
  if (error instanceof Refusal) {
    return error;
  }
  if (error instanceof Denied) {
    const { denial } = error.decision;
    const code = (denial?.reason ?? "denied").toLowerCase();
    const message = `${error.decision.message} ${denial?.suggestion ?? ""}`.trim();
    const wait = String(Math.max(Math.ceil((denial?.retryAfterMs ?? 0) / 1_000), 1));
    return denial?.retryable
      ? new Refusal(429, code, message, { "retry-after": wait })
      : new Refusal(402, code, message);
  }
  if (error instanceof Unavailable) {
    const message = "The sidecar that decides who pays cannot be asked.";
    return new Refusal(503, "sidecar_unavailable", message, { "retry-after": "1" });
  }
  if (error instanceof NotFound) {
    return new Refusal(401, "unknown_user", error.message);
  }
  if (error instanceof KeyturnError) {
    return new Refusal(500, (error.reason || error.code).toLowerCase(), error.message);
  }
  console.error("gateway:", error);
  return new Refusal(500, "internal", "Something went wrong here.");
}

async function route(request: IncomingMessage, response: ServerResponse): Promise<void> {
  try {
    const path = request.url?.split("?")[0];
    if (request.method === "GET" && path === "/healthz") {
      response.end("ok\n");
    } else if (request.method === "POST" && path === "/v1/chat/completions") {
      await chat(request, response);
    } else {
      throw new Refusal(404, "not_found", "There is POST /v1/chat/completions and GET /healthz.");
    }
  } catch (error) {
    if (response.destroyed) {
      return; // Nobody listens any more.
    }
    const { status, code, message, headers } = refusalOf(error);
    if (response.headersSent) {
      response.destroy(); // Within a stream: the caller sees that it broke off.
      return;
    }
    response.writeHead(status, { "content-type": "application/json", ...headers });
    response.end(JSON.stringify({ error: { message, type: "keyturn", code } }));
  }
}

const running = new Set<Promise<void>>();
const server = createServer((request, response) => {
  const work = route(request, response).finally(() => running.delete(work));
  running.add(work);
});

/** Lets requests end for two seconds, cuts off the others, and sends all records. */
async function stop(): Promise<void> {
  const closed = new Promise((done) => server.close(done));
  server.closeIdleConnections();
  const patience = setTimeout(() => server.closeAllConnections(), 2_000);
  await closed;
  clearTimeout(patience);
  await Promise.allSettled(running);
  await client.close();
  process.exit(0);
}

process.once("SIGTERM", stop);
process.once("SIGINT", stop);

const [, host = "127.0.0.1", port = "0"] =
  /^\[?(.*?)\]?:(\d+)$/.exec(process.env.LISTEN || "127.0.0.1:0") ?? [];
server.listen(Number(port), host, () => {
  const { address, family, port: bound } = server.address() as AddressInfo;
  console.log(`listening on http://${family === "IPv6" ? `[${address}]` : address}:${bound}`);
});
