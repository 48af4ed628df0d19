import assert from "node:assert/strict";
import { test } from "node:test";

import { type Call, Denied, Outcome } from "@keyturn/client";
import { Outcome as Number_ } from "#dist/gen/keyturn/v1/routing_service_pb.js";

import {
  ASKED,
  client,
  denial,
  eventually,
  fault,
  HANDLE,
  key,
  outOfReach,
  SECRET,
  sidecar,
  TICKET,
  ticket,
  UNAVAILABLE,
} from "./sidecar.js";

const PLATFORM = { authorization: "Bearer ours" };
const END = (call: Call) => call.end();

test("what is recorded is what was said of the call", async (test) => {
  const there = await sidecar(test);
  const asking = client(test, there);
  const told: [keyof typeof Outcome, (call: Call) => unknown][] = [
    ["NEVER_SENT", END],
    ["NEVER_SENT", (call) => call.note({ model: "gpt-4o" })],
    ["CLIENT_CANCELLED", (call) => call.sending()],
    ["CLIENT_CANCELLED", (call) => call.headers(PLATFORM)],
    ["CLIENT_CANCELLED", (call) => call.secret()],
    ["CLIENT_CANCELLED", (call) => call.used({ outputTokens: 1 })],
    ["CLIENT_CANCELLED", (call) => call.cost(1)],
    ["SUCCESS", (call) => call.succeeded()],
    ["TIMEOUT", (call) => call.failed(Outcome.TIMEOUT)],
    ["REFUSED", (call) => [call.succeeded(), call.failed(Outcome.REFUSED)]],
    ["REFUSED", (call) => [call.failed(Outcome.REFUSED), call.succeeded()]],
  ];
  for (const [, say] of told) {
    await using call = await asking.request(ASKED);
    say(call);
  }
  await asking.flush();
  assert.deepEqual(
    there.records().map(({ outcome }) => Number_[outcome]),
    told.map(([outcome]) => outcome),
  );
});

test("an exception ends the call, and goes on", async (test) => {
  const there = await sidecar(test);
  const asking = client(test, there);
  const failing = async () => {
    await using call = await asking.request(ASKED);
    call.used({ inputTokens: 7 });
    throw new Error("mine");
  };
  await assert.rejects(failing, /mine/);
  await asking.flush();
  const [record] = there.records();
  assert.equal(record?.outcome, Number_.CLIENT_CANCELLED);
  assert.equal(record?.usage?.inputTokens, 7n);
});

test("finish records in the foreground, as a success or as it was said", async (test) => {
  const there = await sidecar(test);
  const asking = client(test, there);
  const call = await asking.request(ASKED);
  call.used({ inputTokens: 10, outputTokens: 1 });
  call.used({ outputTokens: 5, totalTokens: 15 });
  call.cost(40);
  call.note({ model: "gpt-4o-mini", endpoint: "/v1/chat/completions", responseTimeMs: 250, httpStatus: 200 });
  const recorded = await call.finish();
  const failed = await asking.request(ASKED);
  failed.failed("PROVIDER_ERROR", { httpStatus: 500, errorMessage: "boom", retryAfterMs: 1_000 });
  await failed.finish();

  assert.equal(recorded?.chargedMicros, 40);
  const [good, bad] = there.seen("record");
  assert.equal(good?.outcome, Number_.SUCCESS);
  assert.equal(good?.settles.value, TICKET);
  assert.deepEqual(
    [good?.usage?.inputTokens, good?.usage?.outputTokens, good?.usage?.totalTokens, good?.costMicros],
    [10n, 5n, 15n, 40n],
  );
  assert.deepEqual(
    [good?.model, good?.endpoint, good?.httpStatus],
    ["gpt-4o-mini", "/v1/chat/completions", 200],
  );
  assert.deepEqual([bad?.outcome, bad?.httpStatus, bad?.errorMessage], [Number_.PROVIDER_ERROR, 500, "boom"]);
  assert.equal(bad?.retryAfter?.seconds, 1n);
});

test("a call that ended refuses everything but reading", async (test) => {
  const there = await sidecar(test);
  const asking = client(test, there);
  const call = await asking.request({ ...ASKED, requestId: "r1" });
  await call.finish();
  call.end();

  const closed = { name: "Closed" };
  assert.throws(() => call.headers(PLATFORM), closed);
  assert.throws(() => call.secret(), closed);
  assert.throws(() => call.sending(), closed);
  assert.throws(() => call.used({}), closed);
  assert.throws(() => call.cost(1), closed);
  assert.throws(() => call.note({}), closed);
  assert.throws(() => call.succeeded(), closed);
  assert.throws(() => call.failed("TIMEOUT"), closed);
  await assert.rejects(call.keyRefused(), closed);
  await assert.rejects(call.finish(), closed);
  assert.equal(call.requestId, "r1");
  assert.equal(call.ticket?.ticket.reveal(), TICKET);
  assert.equal(call.decision.allowed, true);
  assert.equal(there.records().length, 1);
});

test("the headers are the own key's, or the platform's when credits pay", async (test) => {
  const there = await sidecar(test, { decide: ({ userId }) => (userId === "u1" ? key() : ticket()) });
  const asking = client(test, there);
  await using own = await asking.request(ASKED);
  await using credits = await asking.request({ ...ASKED, userId: "u2" });

  assert.deepEqual(own.headers(PLATFORM), { Authorization: `Bearer ${SECRET}` });
  assert.equal(own.secret()?.reveal(), SECRET);
  assert.deepEqual(credits.headers(PLATFORM), PLATFORM);
  assert.equal(credits.secret(), undefined);
});

test("a denial is thrown, with its decision, and nothing is recorded", async (test) => {
  const there = await sidecar(test, { decide: () => denial() });
  const asking = client(test, there);
  await assert.rejects(asking.request(ASKED), (error) => {
    assert.ok(error instanceof Denied);
    assert.equal(error.message, "BYOK_REQUIRED: Nobody pays.");
    return error.decision.denial?.suggestion === "Add a key.";
  });
  await asking.flush();
  assert.deepEqual(there.records(), []);
});

test("SUCCESS is no failure, and what cannot be sent is refused where it is said", async (test) => {
  const there = await sidecar(test);
  const asking = client(test, there);
  await using call = await asking.request(ASKED);

  assert.throws(() => call.failed("SUCCESS"), /call succeeded\(\)/);
  assert.throws(() => call.failed("NO_SUCH" as never), /no such Outcome/);
  assert.throws(() => call.used({ inputTokens: Number.NaN }), /inputTokens/);
  assert.throws(() => call.cost(0.5), /costMicros/);
  assert.throws(() => call.note({ httpStatus: 1.5 }), /httpStatus/);
  call.end();
  await asking.flush();
  assert.equal(there.records()[0]?.usage, undefined);
});

test("a refused key is recorded, and left out of the next decision", async (test) => {
  const there = await sidecar(test, {
    decide: ({ failedKeyHandles: failed }) =>
      failed.length === 0 ? key() : failed.length === 1 ? key(`${HANDLE}2`) : ticket(),
  });
  const asking = client(test, there);
  const call = await asking.request(ASKED);
  call.used({ inputTokens: 3 });
  const second = await call.keyRefused({ errorMessage: "Incorrect API key." });
  assert.equal(second.key?.handle.reveal(), `${HANDLE}2`);
  assert.equal(call.key, second.key);
  await call.keyRefused({ outcome: "RATE_LIMITED", httpStatus: 429, retryAfterMs: 2_000 });
  await assert.rejects(call.keyRefused(), /no own key pays/);
  await call.finish();

  assert.deepEqual(
    there
      .records()
      .map(({ settles, outcome, httpStatus, usage }) => [
        settles.value,
        Number_[outcome],
        httpStatus,
        usage?.inputTokens,
      ]),
    [
      [HANDLE, "AUTH_REJECTED", 401, 3n],
      [`${HANDLE}2`, "RATE_LIMITED", 429, undefined],
      [TICKET, "SUCCESS", 0, undefined],
    ],
  );
  const asked = there.seen("decide");
  assert.deepEqual(
    asked.map(({ failedKeyHandles }) => failedKeyHandles.length),
    [0, 1, 2],
  );
  assert.equal(new Set(asked.map(({ requestId }) => requestId)).size, 1);
});

test("a refused key that nobody else can stand in for is a denial, and ends the call", async (test) => {
  const there = await sidecar(test, {
    decide: ({ failedKeyHandles: failed }) => (failed.length === 0 ? key() : denial()),
  });
  const asking = client(test, there);
  const call = await asking.request(ASKED);
  await assert.rejects(call.keyRefused(), Denied);
  call.end();
  await asking.flush();
  assert.deepEqual(
    there.records().map(({ outcome }) => Number_[outcome]),
    ["AUTH_REJECTED"],
  );
});

test("a refusal that could not be recorded is what the call's end records", async (test) => {
  const there = await sidecar(test, {
    decide: () => key(),
    record: () => {
      throw fault(UNAVAILABLE, "STORE_UNAVAILABLE");
    },
  });
  const asking = client(test, there);
  const call = await asking.request(ASKED);
  await assert.rejects(call.keyRefused(), { name: "Unavailable" });
  call.end();
  await asking.flush();
  assert.deepEqual(
    there.seen("batchRecord").flatMap(({ requests }) => requests.map(({ outcome }) => Number_[outcome])),
    ["AUTH_REJECTED"],
  );
});

test("a call that is ended while it decides again leaves no hold behind", async (test) => {
  let decide: () => void = () => undefined;
  const there = await sidecar(test, {
    decide: ({ failedKeyHandles: failed }) =>
      failed.length === 0
        ? key()
        : new Promise((resolve) => {
            decide = () => resolve(ticket());
          }),
  });
  const asking = client(test, there);
  const call = await asking.request(ASKED);
  const refusing = call.keyRefused();
  await eventually(() => there.seen("decide").length === 2);
  assert.throws(() => call.headers(PLATFORM), { name: "Closed" });
  call.end();
  decide();

  await assert.rejects(refusing, { name: "Closed" });
  await asking.flush();
  assert.deepEqual(
    there.records().map(({ outcome }) => Number_[outcome]),
    ["AUTH_REJECTED", "NEVER_SENT"],
  );
});

test("a record that finish could not get through is kept for later", async (test) => {
  const there = await sidecar(test, {
    record: () => {
      throw fault(UNAVAILABLE, "STORE_UNAVAILABLE");
    },
  });
  const asking = client(test, there);
  const call = await asking.request(ASKED);
  await assert.rejects(call.finish(), { name: "Unavailable" });
  assert.ok(call.unrecorded);
  asking.recordLater(call.unrecorded);
  await asking.flush();
  assert.equal(there.seen("batchRecord")[0]?.requests[0]?.outcome, Number_.SUCCESS);
});

test("an unmetered call signs with the platform's headers, and records nothing", async (test) => {
  const there = await sidecar(test, {
    decide: () => {
      throw outOfReach();
    },
  });
  const asking = client(test, there, { whenDown: () => true });
  const call = await asking.request(ASKED);
  assert.deepEqual(call.headers(PLATFORM), PLATFORM);
  call.used({ inputTokens: 1 });
  assert.equal(await call.finish(), undefined);
  (await asking.request(ASKED)).end();
  await asking.flush();
  assert.deepEqual(there.records(), []);
});

test("a call that ends after its client closed is unsent", async (test) => {
  const there = await sidecar(test);
  const unsent: string[] = [];
  const asking = client(test, there, {
    onUnsent: ({ record, error }) => void unsent.push(`${record.outcome} ${error.name}`),
  });
  const call = await asking.request(ASKED);
  await asking.close();
  call.end();
  await eventually(() => unsent.length > 0);
  assert.deepEqual(unsent, ["NEVER_SENT Closed"]);
});
