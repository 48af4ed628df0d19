import assert from "node:assert/strict";
import { test } from "node:test";

import { Outcome } from "#dist/gen/keyturn/v1/routing_service_pb.js";

import {
  ASKED,
  client,
  eventually,
  fault,
  key,
  type Sidecar,
  sidecar,
  TICKET,
  taken,
  ticket,
  UNAVAILABLE,
} from "./sidecar.js";

/** A gate that handlers wait at. */
function gate() {
  let open: () => void = () => undefined;
  const opened = new Promise<void>((resolve) => {
    open = resolve;
  });
  return { open, opened };
}

const outcomes = (there: Sidecar) =>
  there.records().map(({ settles, outcome }) => [settles.value, Outcome[outcome]]);

test("a call that is cancelled before it began sends nothing", async (test) => {
  const there = await sidecar(test);
  const asking = client(test, there);
  const reason = new Error("mine");
  const signal = AbortSignal.abort(reason);

  await assert.rejects(asking.decide(ASKED, { signal }), reason);
  await assert.rejects(asking.decide({ ...ASKED, requestId: "r1" }, { signal }), reason);
  await assert.rejects(asking.explain(ASKED, { signal }), { message: "mine" });
  assert.deepEqual([there.seen("decide"), there.seen("explain")], [[], []]);
});

test("a cancelled decision of our own request id leaves no hold behind", async (test) => {
  const { open, opened } = gate();
  const there = await sidecar(test, { decide: () => opened.then(() => ticket()) });
  const asking = client(test, there);
  const caller = new AbortController();
  const deciding = asking.decide(ASKED, { signal: caller.signal });
  const requesting = asking.request(ASKED, { signal: caller.signal });
  await eventually(() => there.seen("decide").length === 2);
  caller.abort();

  await assert.rejects(deciding, { name: "AbortError" });
  await assert.rejects(requesting, { name: "AbortError" });
  open();
  await eventually(() => there.records().length === 2);
  assert.deepEqual(outcomes(there), [
    [TICKET, "NEVER_SENT"],
    [TICKET, "NEVER_SENT"],
  ]);
});

test("close waits for what a cancelled decision leaves", async (test) => {
  const { open, opened } = gate();
  const there = await sidecar(test, { decide: () => opened.then(() => ticket()) });
  const asking = client(test, there, { closeTimeoutMs: 20_000 });
  const caller = new AbortController();
  const deciding = asking.decide(ASKED, { signal: caller.signal });
  await eventually(() => there.seen("decide").length === 1);
  caller.abort();
  await assert.rejects(deciding);
  const closing = asking.close();
  open();
  assert.deepEqual(await closing, []);
  assert.deepEqual(outcomes(there), [[TICKET, "NEVER_SENT"]]);
});

test("a cancelled decision for an own key has nothing to undo", async (test) => {
  const { open, opened } = gate();
  const there = await sidecar(test, { decide: () => opened.then(() => key()) });
  const asking = client(test, there, { closeTimeoutMs: 20_000 });
  const caller = new AbortController();
  const deciding = asking.decide(ASKED, { signal: caller.signal });
  await eventually(() => there.seen("decide").length === 1);
  caller.abort();
  await assert.rejects(deciding);
  open();
  assert.deepEqual(await asking.close(), []);
  assert.deepEqual(there.records(), []);
});

test("a cancelled decision of the caller's request id is cancelled at the sidecar, and not undone", async (test) => {
  const there = await sidecar(test, { decide: () => new Promise(() => undefined) });
  const asking = client(test, there);
  const caller = new AbortController();
  const deciding = asking.decide({ ...ASKED, requestId: "r1" }, { signal: caller.signal });
  await eventually(() => there.seen("decide").length === 1);
  caller.abort();

  await assert.rejects(deciding, { name: "AbortError" });
  await eventually(() => there.last.cancelled);
  await asking.close();
  assert.deepEqual(there.records(), []);
});

test("a cancelled call is not tried again", async (test) => {
  const there = await sidecar(test, { explain: () => new Promise(() => undefined) });
  const asking = client(test, there);
  const caller = new AbortController();
  const explaining = asking.explain(ASKED, { signal: caller.signal });
  await eventually(() => there.seen("explain").length === 1);
  caller.abort();

  await assert.rejects(explaining, { name: "AbortError" });
  await eventually(() => there.last.cancelled);
  await asking.decide(ASKED);
  assert.equal(there.seen("explain").length, 1);
});

test("a cancelled wait between attempts ends at once", async (test) => {
  const there = await sidecar(test, {
    explain: () => {
      throw fault(UNAVAILABLE, "STORE_UNAVAILABLE", { retryAfterMs: 3_600_000 });
    },
  });
  const asking = client(test, there, { timeoutMs: 2 ** 31 - 1 });
  const caller = new AbortController();
  const explaining = asking.explain(ASKED, { signal: caller.signal });
  await eventually(() => there.seen("explain").length === 1);
  caller.abort();
  await assert.rejects(explaining, { name: "AbortError" });
});

test("a cancelled record is carried on in the background", async (test) => {
  const there = await sidecar(test, { record: () => new Promise(() => undefined) });
  const asking = client(test, there);
  const caller = new AbortController();
  const call = await asking.request(ASKED);
  call.cost(5);
  const finishing = call.finish({ signal: caller.signal });
  await eventually(() => there.seen("record").length === 1);
  caller.abort();

  await assert.rejects(finishing, { name: "AbortError" });
  assert.equal(call.unrecorded, undefined);
  await asking.flush();
  assert.deepEqual(
    there.seen("batchRecord").flatMap(({ requests }) => requests.map(({ costMicros }) => costMicros)),
    [5n],
  );
});

test("a record whose caller is gone already goes to the background at once", async (test) => {
  const there = await sidecar(test);
  const asking = client(test, there);
  const call = await asking.request(ASKED);
  await assert.rejects(call.finish({ signal: AbortSignal.abort() }), { name: "AbortError" });
  await asking.flush();
  assert.deepEqual([there.seen("record").length, there.seen("batchRecord").length], [0, 1]);
});

test("a key that is refused while the caller goes away is recorded all the same", async (test) => {
  const { open, opened } = gate();
  const there = await sidecar(test, {
    decide: ({ failedKeyHandles: failed }) => (failed.length === 0 ? key() : opened.then(() => ticket())),
    record: taken,
  });
  const asking = client(test, there);
  const caller = new AbortController();
  const call = await asking.request(ASKED, { signal: caller.signal });
  const refusing = call.keyRefused({}, { signal: caller.signal });
  await eventually(() => there.seen("decide").length === 2);
  caller.abort();
  await assert.rejects(refusing, { name: "AbortError" });
  call.end();
  open();
  await eventually(() => there.records().length === 2);
  assert.deepEqual(
    outcomes(there).map(([, outcome]) => outcome),
    ["AUTH_REJECTED", "NEVER_SENT"],
  );
});
