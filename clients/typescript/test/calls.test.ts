import assert from "node:assert/strict";
import { test } from "node:test";

import {
  type CreditTicket,
  type Decision,
  KeyHandle,
  Outcome,
  SealedHandle,
  SealedTicket,
} from "@keyturn/client";
import { KeyDelivery } from "#dist/gen/keyturn/v1/routing_service_pb.js";

import { ASKED, client, denial, fault, HANDLE, key, SECRET, sidecar, status, TICKET } from "./sidecar.js";

test("a decision for an own key has all that the sidecar said", async (test) => {
  const there = await sidecar(test, { decide: () => key(HANDLE, SECRET, "https://api.openai.com/v1") });
  const decision = await client(test, there).decide(ASKED);

  assert.ok(decision.key instanceof KeyHandle);
  assert.equal(decision.allowed, true);
  assert.equal(decision.mode, "BYOK_FIRST");
  assert.equal(decision.reason, "BYOK_FIRST_OWN_KEY");
  assert.equal(decision.key.handle.reveal(), HANDLE);
  assert.equal(decision.key.secret?.reveal(), SECRET);
  assert.equal(decision.key.baseUrl, "https://api.openai.com/v1");
  assert.deepEqual(decision.key.expireTime, new Date(1_800_000_000_000));
  assert.deepEqual(decision.key.headers(), { Authorization: `Bearer ${SECRET}` });
  assert.equal(decision.ticket, undefined);
});

test("a decision for credits has the ticket and its amounts", async (test) => {
  const there = await sidecar(test);
  const { ticket, key } = await client(test, there).decide(ASKED);

  assert.equal(ticket?.ticket.reveal(), TICKET);
  assert.equal(ticket?.holdMicros, 1_000);
  assert.equal(ticket?.availableMicros, 5_000);
  assert.equal(key, undefined);
});

test("a denial is an answer", async (test) => {
  const there = await sidecar(test, { decide: () => denial(true) });
  const decision = await client(test, there).decide(ASKED);

  assert.equal(decision.allowed, false);
  assert.deepEqual(decision.denial, {
    reason: "BYOK_REQUIRED",
    retryable: true,
    retryAfterMs: 2_500,
    suggestion: "Add a key.",
  });
});

test("a request carries what was given, its own id, and asks for the secret", async (test) => {
  const there = await sidecar(test);
  const asking = client(test, there);
  await asking.decide({
    ...ASKED,
    model: "gpt-4o",
    maxOutputTokens: 500,
    constraint: "CREDITS_ONLY",
    holdTtlMs: 1_500.5,
  });
  await asking.decide({
    ...ASKED,
    requestId: "r1",
    costMicros: 12,
    redeem: true,
    failedKeys: [new SealedHandle(HANDLE)],
  });

  const [first, second] = there.seen("decide");
  assert.match(first?.requestId ?? "", /^[0-9a-f]{12}4[0-9a-f]{3}[89ab][0-9a-f]{15}$/);
  assert.equal(first?.keyDelivery, KeyDelivery.INLINE);
  assert.equal(first?.estimate.case, "tokens");
  assert.equal(first?.constraint, 3);
  assert.deepEqual([first?.holdTtl?.seconds, first?.holdTtl?.nanos], [1n, 500_500_000]);
  assert.equal(second?.requestId, "r1");
  assert.deepEqual([second?.estimate.case, second?.estimate.value], ["costMicros", 12n]);
  assert.equal(second?.keyDelivery, KeyDelivery.REDEEM);
  assert.deepEqual(second?.failedKeyHandles, [HANDLE]);
});

test("what cannot be sent is refused by its name, and nothing is sent", async (test) => {
  const there = await sidecar(test);
  const asking = client(test, there);
  const settles = new SealedTicket(TICKET);
  const refusals: [Promise<unknown>, RegExp][] = [
    [asking.decide({ ...ASKED, costMicros: 1, maxOutputTokens: 1 }), /costMicros or with tokens/],
    [asking.decide({ ...ASKED, costMicros: 2 ** 53 }), /^RangeError: costMicros/],
    [asking.decide({ ...ASKED, inputTokens: 1.5 }), /^RangeError: inputTokens/],
    [asking.decide({ ...ASKED, holdTtlMs: Number.NaN }), /^RangeError: holdTtlMs/],
    [asking.decide({ provider: "openai" } as never), /^TypeError: userId/],
    [asking.decide({ ...ASKED, constraint: "NO_SUCH" as never }), /^TypeError: no such Constraint/],
    [asking.decide({ ...ASKED, failedKeys: [HANDLE as never] }), /^TypeError: a key is given as/],
    [asking.decide(ASKED, { timeoutMs: 0 }), /^RangeError: timeoutMs/],
    [asking.record({ settles: TICKET as never, outcome: "SUCCESS" }), /^TypeError: settles/],
    [asking.record({ settles, outcome: "toString" as never }), /^TypeError: no such Outcome/],
    [asking.record({ settles, outcome: "SUCCESS", costMicros: Number.NaN }), /^RangeError: costMicros/],
    [asking.record({ settles, outcome: "SUCCESS", httpStatus: 2 ** 31 }), /^RangeError: httpStatus/],
    [
      asking.record({ settles, outcome: "SUCCESS", usage: { totalTokens: 2 ** 60 } }),
      /^RangeError: totalTokens/,
    ],
  ];
  for (const [refused, why] of refusals) {
    await assert.rejects(refused, why);
  }
  assert.deepEqual([there.seen("decide"), there.seen("record")], [[], []]);
});

test("a record settles a decision, its key or ticket, or their sealed text", async (test) => {
  const there = await sidecar(test, {
    decide: ({ userId }) => (userId === "u1" ? key() : undefined) as never,
  });
  const asking = client(test, there);
  const decision = await asking.decide(ASKED);
  const ticket: CreditTicket = {
    ticket: new SealedTicket(TICKET),
    holdMicros: 1,
    availableMicros: 1,
    expireTime: undefined,
  };
  for (const settles of [
    decision,
    decision.key as KeyHandle,
    new SealedHandle(HANDLE),
    ticket,
    ticket.ticket,
  ]) {
    await asking.record({ settles, outcome: Outcome.SUCCESS });
  }
  const settled = there.seen("record").map(({ settles }) => settles.value);
  assert.deepEqual(settled, [HANDLE, HANDLE, HANDLE, TICKET, TICKET]);
});

test("a denied decision has nothing to record", async (test) => {
  const there = await sidecar(test, { decide: () => denial() });
  const asking = client(test, there);
  const settles: Decision = await asking.decide(ASKED);

  await assert.rejects(
    asking.record({ settles, outcome: "SUCCESS" }),
    /a denied decision has nothing to record/,
  );
  assert.throws(() => asking.recordLater({ settles, outcome: "SUCCESS" }), TypeError);
  assert.deepEqual(there.records(), []);
});

test("a record carries what was given and nothing else", async (test) => {
  const there = await sidecar(test);
  const asking = client(test, there);
  const settles = new SealedTicket(TICKET);
  const recorded = await asking.record({ settles, outcome: "SUCCESS", costMicros: 0 });
  await asking.record({
    settles,
    outcome: "UNRECOGNIZED_77",
    usage: { inputTokens: 3 },
    errorMessage: "🔑".repeat(501),
    responseTimeMs: 12,
    retryAfterMs: 2_000,
  });

  assert.equal(recorded.balanceMicros, 4_000);
  assert.equal(recorded.durability, "DATABASE");
  const [bare, full] = there.seen("record");
  assert.deepEqual([bare?.usage, bare?.costMicros, bare?.httpStatus], [undefined, 0n, 0]);
  assert.equal(full?.outcome, 77);
  assert.deepEqual(
    [full?.usage?.inputTokens, full?.usage?.totalTokens, full?.costMicros],
    [3n, undefined, undefined],
  );
  assert.equal(full?.errorMessage, "🔑".repeat(500));
  assert.equal(full?.retryAfter?.seconds, 2n);
});

test("words and amounts that only a newer sidecar knows never fail a call", async (test) => {
  const there = await sidecar(test, {
    decide: () => ({ mode: 99 as never, reason: 98 as never }),
    record: () => ({ keyState: 97 as never, balanceMicros: 2n ** 62n, chargedMicros: -(2n ** 62n) }),
  });
  const asking = client(test, there);
  const decision = await asking.decide(ASKED);
  const recorded = await asking.record({ settles: new SealedTicket(TICKET), outcome: "SUCCESS" });

  assert.deepEqual(
    [decision.mode, decision.reason, decision.allowed],
    ["UNRECOGNIZED_99", "UNRECOGNIZED_98", false],
  );
  assert.equal(recorded.keyState, "UNRECOGNIZED_97");
  assert.equal(recorded.balanceMicros, Number.MAX_SAFE_INTEGER);
  assert.equal(recorded.chargedMicros, Number.MIN_SAFE_INTEGER);
});

test("a batch has an answer or an error for each item, in order", async (test) => {
  const refused = { result: { case: "status" as const, value: status(5, "USER_NOT_FOUND") } };
  const there = await sidecar(test, {
    batchDecide: () => ({ results: [refused, { result: { case: "response", value: key() } }] }),
    batchRecord: () => ({ results: [{ result: { case: "response", value: { recordId: "r" } } }, refused] }),
  });
  const asking = client(test, there);
  const decided = await asking.decideMany([ASKED, { ...ASKED, requestId: "r2" }, ASKED]);
  const settles = new SealedTicket(TICKET);
  const recorded = await asking.recordMany([
    { settles, outcome: "SUCCESS" },
    { settles, outcome: "REFUSED" },
  ]);

  assert.deepEqual(
    decided.map((each) => (each instanceof Error ? each.name : each.reason)),
    ["NotFound", "BYOK_FIRST_OWN_KEY", "InternalError"],
  );
  assert.deepEqual(
    recorded.map((each) => (each instanceof Error ? each.reason : each.recordId)),
    ["r", "USER_NOT_FOUND"],
  );
  const ids = there.seen("batchDecide")[0]?.requests.map(({ requestId }) => requestId) ?? [];
  assert.deepEqual([new Set(ids).size, ids[1]], [3, "r2"]);
});

test("nothing is sent for no items", async (test) => {
  const there = await sidecar(test);
  const asking = client(test, there);

  assert.deepEqual(await asking.decideMany([]), []);
  assert.deepEqual(await asking.recordMany([]), []);
  assert.deepEqual([there.seen("batchDecide"), there.seen("batchRecord")], [[], []]);
});

test("an explanation tells the way to a decision", async (test) => {
  const there = await sidecar(test);
  const { decision, steps } = await client(test, there).explain(ASKED);

  assert.equal(decision.allowed, true);
  assert.deepEqual(steps, [{ check: "tier", result: "eligible", detail: "premium" }]);
});

test("a secret is redeemed by its key or the key's sealed text", async (test) => {
  const there = await sidecar(test, { decide: () => key(HANDLE, "") });
  const asking = client(test, there);
  const { key: own } = await asking.decide({ ...ASKED, redeem: true });

  assert.ok(own);
  assert.equal(own.secret, undefined);
  assert.throws(() => own.headers(), /fetch it once with redeem/);
  assert.equal((await asking.redeem(own)).reveal(), SECRET);
  assert.equal((await asking.redeem(own.handle)).reveal(), SECRET);
  assert.deepEqual(
    there.seen("redeem").map(({ keyHandle }) => keyHandle),
    [HANDLE, HANDLE],
  );
});

test("a closed client refuses everything", async (test) => {
  const there = await sidecar(test);
  const asking = client(test, there);
  const settles = await asking.decide(ASKED);
  assert.deepEqual(await asking.close(), []);

  const closed = { name: "Closed" };
  await assert.rejects(asking.decide(ASKED), closed);
  await assert.rejects(asking.request(ASKED), closed);
  await assert.rejects(asking.decideMany([]), closed);
  await assert.rejects(asking.record({ settles, outcome: "SUCCESS" }), closed);
  await assert.rejects(asking.recordMany([]), closed);
  await assert.rejects(asking.redeem(new SealedHandle(HANDLE)), closed);
  assert.throws(() => asking.recordLater({ settles, outcome: "SUCCESS" }), closed);
  assert.deepEqual(await asking.close(), []);
});

test("a call that is under way when the client closes ends as closed", async (test) => {
  const there = await sidecar(test, { explain: () => new Promise(() => undefined) });
  const asking = client(test, there, { closeTimeoutMs: 20 });
  const explaining = asking.explain(ASKED);
  const ended = assert.rejects(explaining, { name: "Closed" });
  await asking.close();
  await ended;
});

test("a fault is thrown with the frames of its caller", async (test) => {
  const there = await sidecar(test, {
    decide: () => {
      throw fault(5, "USER_NOT_FOUND");
    },
  });
  const asking = client(test, there);
  const gatewayOfMine = async () => await asking.decide(ASKED);

  await assert.rejects(gatewayOfMine(), (error: Error) => /gatewayOfMine/.test(error.stack ?? ""));
});
