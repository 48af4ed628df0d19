import assert from "node:assert/strict";
import { test } from "node:test";
import { format, inspect } from "node:util";
import { deserialize, serialize } from "node:v8";

import { Client, Denied, KeyturnError, Options, SealedHandle, SealedTicket, Secret } from "@keyturn/client";

import { ASKED, client, denial, fault, HANDLE, key, SECRET, sidecar, TICKET, ticket } from "./sidecar.js";

const TOKEN = "kta_token-canary-0123456789";
const PRIVATE_KEY = "-----BEGIN PRIVATE KEY-----\nprivate-key-canary\n-----END PRIVATE KEY-----\n";
const CANARIES = [SECRET, HANDLE, TICKET, TOKEN, "private-key-canary"];

/** Every way that the language has to print a value. */
function prints(value: unknown): string[] {
  const attempt = (print: () => string) => {
    try {
      return print();
    } catch (error) {
      return String(error);
    }
  };
  const written: string[] = [];
  const write = process.stderr.write;
  process.stderr.write = ((text: string) => written.push(String(text)) > 0) as never;
  try {
    console.error(value);
    console.error("%s %o %O %j", value, value, value, value);
    console.error({ value });
  } finally {
    process.stderr.write = write;
  }
  return [
    ...written,
    `${value}`,
    String(value),
    `${[value]}`,
    attempt(() => JSON.stringify({ value })),
    attempt(() => JSON.stringify(Object.entries(value as object))),
    inspect(value, { depth: null, showHidden: true, getters: true, showProxy: true }),
    inspect(value, { depth: null, customInspect: false, showHidden: true, getters: true }),
    inspect({ ...(value as object) }, { depth: null }),
    format("%o", new Proxy(value as object, {})),
    inspect(new Proxy(value as object, {}), { showProxy: true, depth: null }),
    attempt(() => inspect(structuredClone(value), { depth: null })),
    attempt(() => inspect(deserialize(serialize(value)), { depth: null })),
    attempt(() => serialize(value).toString("latin1")),
    inspect(new Error("outer", { cause: value }), { depth: null }),
    String((value as Error).stack),
    inspect((value as Error).cause),
  ];
}

function assertPrintsNothing(value: unknown): void {
  for (const print of prints(value)) {
    for (const canary of CANARIES) {
      assert.ok(!print.includes(canary), print);
    }
  }
}

test("a secret prints as stars and comes out of reveal alone", () => {
  const secret = new Secret(SECRET);
  assert.equal(
    `${secret} ${JSON.stringify([secret])} ${inspect(secret)}`,
    'Secret(***) ["Secret(***)"] Secret(***)',
  );
  assert.equal(secret.reveal(), SECRET);
  assertPrintsNothing(secret);
});

test("secrets are equal by their contents", () => {
  assert.ok(new Secret("é1").equals(new Secret("é1")));
  assert.ok(!new Secret("é1").equals(new Secret("é2")));
  assert.ok(!new Secret("a").equals(new Secret("aa")));
  assert.throws(() => new Secret(7 as never), /holds a string, not number/);
});

test("handles and tickets print as their first characters", () => {
  assert.equal(String(new SealedHandle(HANDLE)), "SealedHandle(kth1_han…)");
  assert.equal(JSON.stringify(new SealedTicket(TICKET)), '"SealedTicket(ktt1_tic…)"');
  assert.equal(inspect(new SealedTicket("short")), "SealedTicket(…)");
  assert.equal(new SealedTicket(TICKET).reveal(), TICKET);
  assertPrintsNothing(new SealedHandle(HANDLE));
});

test("decisions, calls and records print no secret, handle or ticket", async (test) => {
  const there = await sidecar(test, { decide: ({ userId }) => (userId === "u1" ? key() : ticket()) });
  const asking = client(test, there);
  for (const userId of ["u1", "u2"]) {
    const call = await asking.request({ ...ASKED, userId });
    call.headers({});
    for (const value of [call, call.decision, call.key ?? call.ticket, call.secret() ?? call]) {
      assertPrintsNothing(value);
    }
    call.end();
    assertPrintsNothing(call);
  }
  assert.match(inspect(await asking.decide(ASKED)), /Secret\(\*\*\*\)/);
});

test("a secret that no header may hold is refused before fetch can quote it", async (test) => {
  const there = await sidecar(test, { decide: () => key(HANDLE, `${SECRET}\n1`) });
  const { key: own } = await client(test, there).decide(ASKED);
  assert.throws(
    () => own?.headers(),
    (error) => {
      assertPrintsNothing(error);
      return error instanceof TypeError;
    },
  );
});

test("clients and their options print no token and no private key", () => {
  const given = {
    target: "sidecar.example.com:50051",
    token: TOKEN,
    certificateChain: "-----BEGIN CERTIFICATE-----",
    privateKey: PRIVATE_KEY,
  };
  const options = new Options(given);
  assert.match(inspect(options), /token: Secret\(\*\*\*\)/);
  assertPrintsNothing(options);

  const asking = new Client({ target: "127.0.0.1:1", token: TOKEN });
  assert.equal(inspect(asking), "Client(127.0.0.1:1)");
  assertPrintsNothing(asking);
});

test("options that are refused are not quoted", () => {
  const refusals = [
    { token: `${TOKEN} with spaces` },
    { token: `${TOKEN}\u00e9` },
    { target: `user:${TOKEN}@host:1` },
    { privateKey: PRIVATE_KEY },
    {
      target: "localhost:1",
      privateKey: PRIVATE_KEY,
      certificateChain: "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----",
    },
  ];
  for (const given of refusals) {
    assert.throws(
      () => new Client({ target: "unix:/k.sock", ...given }),
      (error) => {
        assertPrintsNothing(error);
        return error instanceof TypeError;
      },
    );
  }
});

test("errors print no token, and hold neither the request nor gRPC's error", async (test) => {
  const there = await sidecar(test, {
    record: () => {
      throw fault(6, "RECORD_CONFLICT", { metadata: { error_id: "e1" } });
    },
    decide: () => denial(),
  });
  const asking = client(test, there, { token: TOKEN });
  const failed = asking.record({ settles: new SealedTicket(TICKET), outcome: "SUCCESS" });
  const error = await failed.then(
    () => undefined,
    (caught: unknown) => caught,
  );
  assert.ok(error instanceof KeyturnError);
  assertPrintsNothing(error);
  assert.equal(there.last.metadata.get("authorization")[0], `Bearer ${TOKEN}`);
  assert.deepEqual(Object.keys(error).sort(), [
    "code",
    "fieldViolations",
    "metadata",
    "reason",
    "resource",
    "retryAfterMs",
  ]);

  const denied = await asking.request(ASKED).then(
    () => undefined,
    (caught: unknown) => caught,
  );
  assert.ok(denied instanceof Denied);
  assertPrintsNothing(denied);
});
