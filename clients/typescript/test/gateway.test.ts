import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { type AddressInfo, createServer } from "node:net";
import { createInterface } from "node:readline";
import { type TestContext, test } from "node:test";
import { fileURLToPath } from "node:url";

import { Outcome } from "#dist/gen/keyturn/v1/routing_service_pb.js";

import { ANSWER, json, type Provider, provider } from "./provider.js";
import {
  denial,
  eventually,
  fault,
  HANDLE,
  key,
  outOfReach,
  SECRET,
  type Sidecar,
  sidecar,
  ticket,
} from "./sidecar.js";

const PROGRAM = fileURLToPath(new URL("../../bin/gateway", import.meta.url));

interface Gateway {
  readonly url: string;
  readonly process: ChildProcess;
  readonly logged: () => string;
}

async function gateway(test: TestContext, there: Sidecar, openai: { url: string }): Promise<Gateway> {
  const started = spawn(PROGRAM, {
    env: {
      ...process.env,
      KEYTURN_ADDRESS: there.target,
      OPENAI_API_KEY: "ours",
      OPENAI_BASE_URL: openai.url,
      LISTEN: "",
    },
    stdio: ["ignore", "pipe", "pipe"],
  });
  test.after(() => started.kill("SIGKILL"));
  let logged = "";
  started.stderr.on("data", (chunk) => {
    logged += chunk;
  });
  const [line] = await once(createInterface({ input: started.stdout }), "line");
  const url = /^listening on (http:\/\/127\.0\.0\.1:\d+)$/.exec(line)?.[1];
  assert.ok(url, line);
  return { url, process: started, logged: () => logged };
}

/** The error in an answer of OpenAI's form. */
async function errorOf(answer: Response): Promise<Record<string, string>> {
  return ((await answer.json()) as { error: Record<string, string> }).error;
}

function ask(to: Gateway, body: object, signal?: AbortSignal): Promise<Response> {
  return fetch(`${to.url}/v1/chat/completions`, {
    method: "POST",
    headers: { authorization: "Bearer u1", "content-type": "application/json", "x-mine": "stays here" },
    body: JSON.stringify({ model: "gpt-4o", messages: [], ...body }),
    signal: signal ?? null,
  });
}

/** The records, once there are so many, as outcome, output tokens and HTTP status. */
async function recorded(there: Sidecar, count: number): Promise<unknown[][]> {
  await eventually(() => there.records().length >= count);
  return there.records().map((each) => [Outcome[each.outcome], each.usage?.outputTokens, each.httpStatus]);
}

const event = (data: unknown) => `data: ${typeof data === "string" ? data : JSON.stringify(data)}\n\n`;

test("credits pay: the answer goes back as it is, and its usage is recorded", async (test) => {
  const there = await sidecar(test);
  const openai = await provider(test);
  const running = await gateway(test, there, openai);
  const answer = await ask(running, { max_tokens: 100 });

  assert.deepEqual([answer.status, await answer.json()], [200, ANSWER]);
  assert.deepEqual(await recorded(there, 1), [["SUCCESS", 3n, 200]]);
  const [record] = there.records();
  assert.deepEqual(
    [record?.usage?.inputTokens, record?.usage?.cacheReadTokens, record?.usage?.totalTokens],
    [12n, 4n, 15n],
  );
  assert.equal(record?.model, ANSWER.model);
  const [asked] = there.seen("decide");
  const sent = openai.asked[0];
  assert.deepEqual(
    [asked?.userId, asked?.provider, asked?.model, asked?.serviceType],
    ["u1", "openai", "gpt-4o", "gateway"],
  );
  assert.ok(asked?.estimate.case === "tokens");
  assert.equal(asked.estimate.value.maxOutputTokens, 100n);
  assert.equal(asked.estimate.value.inputTokens, BigInt(Math.floor((sent?.body.length ?? 0) / 4)));
  assert.deepEqual(
    [sent?.url, sent?.headers.authorization, sent?.headers["x-mine"]],
    ["/v1/chat/completions", "Bearer ours", undefined],
  );
});

test("the own key pays, at its own address", async (test) => {
  const elsewhere = await provider(test);
  const there = await sidecar(test, { decide: () => key(HANDLE, SECRET, elsewhere.url) });
  const running = await gateway(test, there, { url: "http://127.0.0.1:1" });

  assert.equal((await ask(running, {})).status, 200);
  assert.equal(elsewhere.asked[0]?.headers.authorization, `Bearer ${SECRET}`);
});

test("a stream goes on chunk by chunk, with usage asked for", async (test) => {
  let finish: () => void = () => undefined;
  const there = await sidecar(test);
  const openai = await provider(test, (_, response) => {
    response.writeHead(200, { "content-type": "text/event-stream" });
    response.write(event({ model: "gpt-4o-x", choices: [{ delta: { content: "Hi" } }] }));
    finish = () => {
      const end = event({ choices: [], usage: ANSWER.usage }) + event("[DONE]");
      response.write(end.slice(0, 30)); // An event in two pieces.
      setTimeout(() => response.end(end.slice(30)), 20);
    };
  });
  const running = await gateway(test, there, openai);
  const answer = await ask(running, { stream: true, stream_options: { include_usage: false, other: 1 } });

  assert.equal(answer.headers.get("content-type"), "text/event-stream");
  let text = "";
  for await (const chunk of answer.body ?? []) {
    if (text === "") {
      finish(); // The first chunk came before the stream was at its end.
    }
    text += Buffer.from(chunk).toString();
  }
  assert.match(text, /Hi.*usage.*\[DONE\]\n\n$/s);
  assert.deepEqual(JSON.parse(openai.asked[0]?.body ?? "").stream_options, { include_usage: true, other: 1 });
  assert.deepEqual(await recorded(there, 1), [["SUCCESS", 3n, 200]]);
});

test("a stream that breaks off breaks off for the caller, and is a provider's error", async (test) => {
  const there = await sidecar(test);
  const openai = await provider(test, (_, response) => {
    response.writeHead(200, { "content-type": "text/event-stream" });
    response.write(event({ choices: [], usage: ANSWER.usage }), () => response.destroy());
  });
  const answer = await ask(await gateway(test, there, openai), { stream: true });
  await assert.rejects(answer.text());
  assert.deepEqual(await recorded(there, 1), [["PROVIDER_ERROR", 3n, 200]]);
});

test("a stream without its end is no success either", async (test) => {
  const there = await sidecar(test);
  const openai = await provider(test, (_, response) => {
    response.writeHead(200, { "content-type": "text/event-stream" });
    response.end(event({ choices: [] }));
  });
  const answer = await ask(await gateway(test, there, openai), { stream: true });
  await assert.rejects(answer.text());
  assert.deepEqual(await recorded(there, 1), [["PROVIDER_ERROR", undefined, 200]]);
});

test("a refused key is tried past, and no key more than thrice", async (test) => {
  const there = await sidecar(test, {
    decide: ({ failedKeyHandles: failed }) =>
      failed.length < 2 ? key(`${HANDLE}${failed.length}`) : ticket(),
  });
  const refusals = [
    { status: 401, error: { code: "invalid_api_key", message: "Incorrect API key." } },
    { status: 429, error: { type: "rate_limit_exceeded", message: "Slow down." } },
  ];
  const openai = await provider(test, (_, response) => {
    const refusal = refusals.shift();
    json(response, refusal?.status ?? 200, refusal === undefined ? ANSWER : { error: refusal.error }, {
      "retry-after": "7",
    });
  });
  const running = await gateway(test, there, openai);

  assert.equal((await ask(running, {})).status, 200);
  assert.deepEqual(await recorded(there, 3), [
    ["AUTH_REJECTED", undefined, 401],
    ["RATE_LIMITED", undefined, 429],
    ["SUCCESS", 3n, 200],
  ]);
  assert.equal(there.records()[0]?.errorMessage, "Incorrect API key.");
  assert.equal(there.records()[1]?.retryAfter?.seconds, 7n);

  there.handlers.decide = ({ failedKeyHandles: failed }) => key(`${HANDLE}${failed.length}`);
  refusals.push(
    ...Array.from({ length: 9 }, () => ({ status: 401, error: { code: "invalid_api_key", message: "No." } })),
  );
  const refused = await ask(running, {});
  assert.deepEqual(
    [refused.status, await refused.json()],
    [401, { error: { code: "invalid_api_key", message: "No." } }],
  );
  assert.equal((await recorded(there, 6)).length, 6);
});

test("when nobody else may pay, the provider's own answer goes back", async (test) => {
  const there = await sidecar(test, {
    decide: ({ failedKeyHandles: failed }) => (failed.length === 0 ? key() : denial()),
  });
  const openai = await provider(test, (_, response) =>
    json(response, 401, { error: { code: "invalid_api_key", message: "No." } }),
  );
  const answer = await ask(await gateway(test, there, openai), {});
  assert.deepEqual([answer.status, (await errorOf(answer)).code], [401, "invalid_api_key"]);
  assert.deepEqual(await recorded(there, 1), [["AUTH_REJECTED", undefined, 401]]);
});

test("the gateway's own answers have OpenAI's form", async (test) => {
  const there = await sidecar(test);
  const running = await gateway(test, there, await provider(test));
  const answers: [() => never | ReturnType<typeof ticket>, number, string, string | null][] = [
    [() => denial(), 402, "byok_required", null],
    [() => denial(true), 429, "byok_required", "3"],
    [
      () => {
        throw fault(5, "USER_NOT_FOUND");
      },
      401,
      "unknown_user",
      null,
    ],
    [
      () => {
        throw fault(3, "INVALID_FIELD");
      },
      500,
      "invalid_field",
      null,
    ],
    [
      () => {
        throw outOfReach();
      },
      503,
      "sidecar_unavailable",
      "1",
    ],
  ];
  for (const [decide, status, code, retryAfter] of answers) {
    there.handlers.decide = decide;
    const answer = await ask(running, {});
    const error = await errorOf(answer);
    assert.deepEqual([answer.status, error.code, error.type], [status, code, "keyturn"]);
    assert.equal(answer.headers.get("retry-after"), retryAfter);
    assert.ok(error.message);
  }
  const nobody = await fetch(`${running.url}/v1/chat/completions`, { method: "POST", body: "{}" });
  assert.deepEqual([nobody.status, (await errorOf(nobody)).type], [401, "keyturn"]);
  assert.equal((await fetch(`${running.url}/healthz`)).status, 200);
  assert.equal((await fetch(`${running.url}/elsewhere`)).status, 404);
});

test("a provider that cannot be reached was never sent anything", async (test) => {
  const there = await sidecar(test);
  const nobody = createServer().listen(0, "127.0.0.1");
  await once(nobody, "listening");
  const { port } = nobody.address() as AddressInfo;
  await new Promise((closed) => nobody.close(closed));
  const running = await gateway(test, there, { url: `http://127.0.0.1:${port}` });
  const answer = await ask(running, {});
  assert.deepEqual([answer.status, (await errorOf(answer)).code], [502, "provider_unreachable"]);
  assert.deepEqual(await recorded(there, 1), [["NEVER_SENT", undefined, 0]]);
});

test("a caller who hangs up ends the request to the provider, and is recorded as gone", async (test) => {
  let ended = false;
  const there = await sidecar(test);
  const openai: Provider = await provider(test, (_, response) => {
    response.on("close", () => {
      ended = true;
    });
  });
  const running = await gateway(test, there, openai);
  const caller = new AbortController();
  const asking = ask(running, {}, caller.signal);
  await eventually(() => openai.asked.length === 1);
  caller.abort();
  await assert.rejects(asking);
  await eventually(() => ended);
  assert.deepEqual(await recorded(there, 1), [["CLIENT_CANCELLED", undefined, 0]]);
});

test("SIGTERM ends it with all records sent, exit code 0, and nothing in the log", async (test) => {
  const there = await sidecar(test);
  const openai = await provider(test, () => undefined); // It never answers.
  const running = await gateway(test, there, openai);
  const asking = ask(running, {}).catch(() => undefined);
  await eventually(() => openai.asked.length === 1);
  running.process.kill("SIGTERM");
  const [code] = await once(running.process, "exit");
  await asking;

  assert.equal(code, 0);
  assert.deepEqual(await recorded(there, 1), [["CLIENT_CANCELLED", undefined, 0]]);
  assert.equal(running.logged(), "");
});
