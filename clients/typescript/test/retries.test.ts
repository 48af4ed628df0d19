import assert from "node:assert/strict";
import { test } from "node:test";

import {
  type Client,
  DeadlineExceeded,
  KeyturnError,
  SealedHandle,
  SealedTicket,
  Unavailable,
} from "@keyturn/client";
import { Attempts, retriesOf } from "#dist/retries.js";

import { ASKED, client, Fault, fault, HANDLE, outOfReach, sidecar, TICKET, UNAVAILABLE } from "./sidecar.js";

const CANCELLED = 1;

const unavailable = (retryAfterMs?: number) =>
  new Unavailable("It is said.", "UNAVAILABLE", retryAfterMs === undefined ? {} : { retryAfterMs });

test("the wait doubles up to its limit, and is random below it", () => {
  const attempts = new Attempts(
    retriesOf({ attempts: 8 }),
    8,
    60_000,
    () => 0,
    () => 1,
  );
  const waits = Array.from({ length: 8 }, () => attempts.waitAfter(unavailable()));
  assert.deepEqual(waits, [100, 200, 400, 800, 1_000, 1_000, 1_000, undefined]);

  const lucky = new Attempts(
    retriesOf(),
    5,
    60_000,
    () => 0,
    () => 0.25,
  );
  assert.equal(lucky.waitAfter(unavailable()), 25);
});

test("the wait that the sidecar asks for comes on top", () => {
  const attempts = new Attempts(
    retriesOf(),
    5,
    60_000,
    () => 0,
    () => 0.5,
  );
  assert.equal(attempts.waitAfter(unavailable(1_000)), 1_050);
});

test("a wait that does not fit in the deadline is not begun", () => {
  let now = 0;
  const attempts = new Attempts(
    retriesOf(),
    5,
    1_000,
    () => now,
    () => 1,
  );
  now = 950;
  assert.equal(attempts.leftMs(), 50);
  assert.equal(attempts.waitAfter(unavailable()), undefined);
  assert.equal(attempts.waitAfter(unavailable(49)), 49);
  assert.equal(attempts.waitAfter(unavailable(50)), undefined);
});

test("only UNAVAILABLE is tried again", () => {
  const attempts = new Attempts(retriesOf(), 5, 60_000);
  assert.equal(attempts.waitAfter(new DeadlineExceeded("", "DEADLINE_EXCEEDED")), undefined);
  assert.equal(attempts.waitAfter(new KeyturnError("", "ABORTED")), undefined);
});

test("retries that make no sense are refused", () => {
  for (const retries of [
    { attempts: 0 },
    { attempts: 1.5 },
    { firstDelayMs: -1 },
    { maxDelayMs: Number.NaN },
  ]) {
    assert.throws(() => retriesOf(retries), /^RangeError: retries\./);
  }
});

test("a decision is tried again with the same request id", async (test) => {
  const there = await sidecar(test, {
    decide: () => {
      if (there.seen("decide").length < 5) {
        throw fault(UNAVAILABLE, "STORE_UNAVAILABLE", { retryAfterMs: 1 });
      }
      return {};
    },
  });
  await client(test, there).decide(ASKED);

  const ids = there.seen("decide").map(({ requestId }) => requestId);
  assert.equal(ids.length, 5);
  assert.equal(new Set(ids).size, 1);
});

test("five attempts are all", async (test) => {
  const there = await sidecar(test, {
    record: () => {
      throw fault(UNAVAILABLE, "ROW_LOCKED");
    },
  });
  const record = { settles: new SealedTicket(TICKET), outcome: "SUCCESS" } as const;
  await assert.rejects(client(test, there).record(record), { reason: "ROW_LOCKED", name: "Unavailable" });
  assert.equal(there.seen("record").length, 5);
});

test("what is not unavailable is raised at once", async (test) => {
  const there = await sidecar(test, {
    explain: () => {
      throw new Fault(8, "overloaded");
    },
  });
  await assert.rejects(client(test, there).explain(ASKED), { name: "ResourceExhausted" });
  assert.equal(there.seen("explain").length, 1);
});

test("a call that the sidecar dropped as it ended is tried again", async (test) => {
  const there = await sidecar(test, {
    decide: () => {
      if (there.seen("decide").length === 1) {
        throw new Fault(CANCELLED, "");
      }
      return {};
    },
  });
  await client(test, there).decide(ASKED);
  assert.equal(there.seen("decide").length, 2);
});

test("CANCELLED with details is an answer, and not tried again", async (test) => {
  const there = await sidecar(test, {
    decide: () => {
      throw fault(CANCELLED, "BECAUSE");
    },
  });
  await assert.rejects(client(test, there).decide(ASKED), { name: "KeyturnError", code: "CANCELLED" });
  assert.equal(there.seen("decide").length, 1);
});

test("a secret is never asked for twice", async (test) => {
  const there = await sidecar(test, {
    redeem: () => {
      throw fault(UNAVAILABLE, "STORE_UNAVAILABLE");
    },
  });
  await assert.rejects(client(test, there).redeem(new SealedHandle(HANDLE)), { name: "Unavailable" });
  assert.equal(there.seen("redeem").length, 1);
});

test("a deadline covers everything, and is not tried again", async (test) => {
  const there = await sidecar(test, { decide: () => new Promise(() => undefined) });
  const late = client(test, there, { timeoutMs: 30 }).decide(ASKED);

  await assert.rejects(late, { name: "DeadlineExceeded", code: "DEADLINE_EXCEEDED" });
  // None where the machine was too slow to send even one in time.
  assert.ok(there.seen("decide").length <= 1);
});

test("the deadline of a call wins over that of the client", async (test) => {
  const there = await sidecar(test, { decide: () => new Promise(() => undefined) });
  const late = client(test, there, { timeoutMs: 600_000 }).decide(ASKED, { timeoutMs: 30 });
  await assert.rejects(late, { name: "DeadlineExceeded" });
});

test("a wait that the sidecar asks for and the deadline has no room for ends the call", async (test) => {
  const there = await sidecar(test, {
    decide: () => {
      throw fault(UNAVAILABLE, "STORE_UNAVAILABLE", { retryAfterMs: 3_600_000 });
    },
  });
  await assert.rejects(client(test, there).decide(ASKED), { retryAfterMs: 3_600_000 });
  assert.equal(there.seen("decide").length, 1);
});

async function attemptsOf(asking: Client, seen: () => number): Promise<number> {
  const before = seen();
  await asking.explain(ASKED).catch(() => undefined);
  return seen() - before;
}

test("a sidecar that is out of reach costs one attempt, until it answers by whatever status", async (test) => {
  let now = outOfReach;
  const there = await sidecar(test, {
    explain: () => {
      throw now();
    },
  });
  const asking = client(test, there);
  const attempts = () => attemptsOf(asking, () => there.seen("explain").length);

  assert.equal(await attempts(), 5);
  assert.equal(await attempts(), 1);
  now = () => fault(UNAVAILABLE, "STORE_UNAVAILABLE");
  assert.equal(await attempts(), 1);
  assert.equal(await attempts(), 5); // It answered: the store is down, not the sidecar.
  assert.equal(await attempts(), 5);
  now = outOfReach;
  assert.equal(await attempts(), 5);
  assert.equal(await attempts(), 1);
  now = () => fault(5, "USER_NOT_FOUND");
  assert.equal(await attempts(), 1);
  now = outOfReach;
  assert.equal(await attempts(), 5);
});

test("nobody listening fails an attempt at once", async (test) => {
  const asking = client(test, { target: "unix:/nowhere/at/all.sock" }, { timeoutMs: 600_000 });
  await assert.rejects(asking.decide(ASKED), { name: "Unavailable", reason: "" });
});

test("who is asked whether the request may pass, and what comes of it", async (test) => {
  const asked: unknown[] = [];
  let say: () => boolean | Promise<boolean> = () => true;
  const there = await sidecar(test, {
    decide: () => {
      throw outOfReach();
    },
  });
  const asking = client(test, there, {
    whenDown: (request, error) => {
      asked.push([request.userId, error.code]);
      return say();
    },
  });

  const decision = await asking.decide(ASKED);
  assert.deepEqual([decision.unmetered, decision.allowed], [true, true]);
  assert.deepEqual([decision.key, decision.ticket, decision.denial], [undefined, undefined, undefined]);
  await assert.rejects(asking.record({ settles: decision, outcome: "SUCCESS" }), /an unmetered decision/);

  say = async () => false;
  await assert.rejects(asking.decide(ASKED), { name: "Unavailable" });
  say = () => {
    throw new Error("mine");
  };
  await assert.rejects(asking.decide(ASKED), /mine/);
  assert.deepEqual(asked, [
    ["u1", "UNAVAILABLE"],
    ["u1", "UNAVAILABLE"],
    ["u1", "UNAVAILABLE"],
  ]);

  there.handlers.decide = () => {
    throw fault(5, "USER_NOT_FOUND");
  };
  await assert.rejects(asking.decide(ASKED), { name: "NotFound" });
  assert.equal(asked.length, 3);
});
