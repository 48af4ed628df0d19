import assert from "node:assert/strict";
import { test } from "node:test";

import { type Outcome, SealedTicket, type Unsent } from "@keyturn/client";

import {
  ASKED,
  client,
  eventually,
  fault,
  outOfReach,
  sidecar,
  status,
  TICKET,
  taken,
  UNAVAILABLE,
} from "./sidecar.js";

const record = (number: number, outcome: Outcome = "SUCCESS") => ({
  settles: new SealedTicket(`${TICKET}${number}`),
  outcome,
  costMicros: number,
});

test("records go out in batches of at most 100, in order", async (test) => {
  const there = await sidecar(test);
  const asking = client(test, there);
  for (let number = 0; number < 250; number += 1) {
    asking.recordLater(record(number));
  }
  await asking.flush();

  assert.deepEqual(
    there.records().map(({ costMicros }) => Number(costMicros)),
    Array.from({ length: 250 }, (_, number) => number),
  );
  const sizes = there.seen("batchRecord").map(({ requests }) => requests.length);
  assert.ok(Math.max(...sizes) <= 100 && sizes.length <= 4, String(sizes));
});

test("what failed for now is tried again, the oldest first, and the rest is not sent twice", async (test) => {
  const faults = [4, 8, 14];
  const there = await sidecar(test, {
    batchRecord: ({ requests }) => ({
      results: requests.map((each) => {
        const code = each.costMicros === 1n ? faults.shift() : undefined;
        return code === undefined
          ? { result: { case: "response", value: taken(each) } }
          : { result: { case: "status", value: status(code, "FOR_NOW") } };
      }),
    }),
  });
  const unsent: Unsent[] = [];
  const asking = client(test, there, { onUnsent: (each) => void unsent.push(each) });
  for (const number of [1, 2, 3]) {
    asking.recordLater(record(number));
  }
  await asking.flush();

  const counts = there.records().map(({ costMicros }) => Number(costMicros));
  assert.deepEqual(
    counts.filter((each) => each === 1),
    [1, 1, 1, 1],
  );
  assert.deepEqual(
    counts.filter((each) => each !== 1),
    [2, 3],
  );
  for (const { requests } of there.seen("batchRecord").slice(0, 4)) {
    assert.equal(requests[0]?.costMicros, 1n);
  }
  assert.deepEqual(unsent, []);
});

test("a batch that failed is tried again without an end", async (test) => {
  const there = await sidecar(test, {
    batchRecord: ({ requests }) => {
      if (there.seen("batchRecord").length < 12) {
        throw outOfReach();
      }
      return { results: requests.map((each) => ({ result: { case: "response", value: taken(each) } })) };
    },
  });
  const asking = client(test, there);
  asking.recordLater(record(1));
  await asking.flush();
  assert.equal(there.records().length, 12);
});

test("any other error makes a record unsent, once, and tells of it", async (test) => {
  const there = await sidecar(test, {
    batchRecord: ({ requests }) => ({
      results: requests.map((each) =>
        each.costMicros === 2n
          ? { result: { case: "status", value: status(6, "RECORD_CONFLICT") } }
          : { result: { case: "response", value: taken(each) } },
      ),
    }),
  });
  const unsent: Unsent[] = [];
  const asking = client(test, there, { onUnsent: (each) => void unsent.push(each) });
  for (const number of [1, 2, 3]) {
    asking.recordLater(record(number));
  }
  await asking.flush();

  assert.equal(there.records().length, 3);
  assert.deepEqual(
    unsent.map(({ record, error }) => [record.settles.reveal(), record.outcome, error.name]),
    [[`${TICKET}2`, "SUCCESS", "AlreadyExists"]],
  );
  assert.deepEqual(await asking.close(), []);
});

test("a full queue refuses a record, and leaves it to the caller", async (test) => {
  const there = await sidecar(test, {
    batchRecord: () => {
      throw outOfReach();
    },
  });
  const unsent: Unsent[] = [];
  const asking = client(test, there, {
    queueSize: 2,
    closeTimeoutMs: 10,
    onUnsent: (each) => void unsent.push(each),
  });
  asking.recordLater(record(1));
  asking.recordLater(record(2));
  assert.throws(() => asking.recordLater(record(3)), { name: "QueueFull" });
  assert.equal(unsent.length, 0);

  const call = await asking.request(ASKED);
  call.end();
  assert.deepEqual(
    unsent.map(({ record, error }) => [record.outcome, error.name]),
    [["NEVER_SENT", "QueueFull"]],
  );
});

test("close goes on sending", async (test) => {
  const there = await sidecar(test);
  const asking = client(test, there, { closeTimeoutMs: 20_000 });
  for (let number = 0; number < 120; number += 1) {
    asking.recordLater(record(number));
  }
  assert.deepEqual(await asking.close(), []);
  assert.equal(there.records().length, 120);
});

test("close gives back what was left, with what it failed with, and tells of it too", async (test) => {
  const there = await sidecar(test, {
    batchRecord: () => {
      throw fault(UNAVAILABLE, "STORE_UNAVAILABLE");
    },
  });
  const told: Unsent[] = [];
  const asking = client(test, there, { closeTimeoutMs: 0, onUnsent: (each) => void told.push(each) });
  asking.recordLater(record(1, "REFUSED"));
  await eventually(() => there.seen("batchRecord").length > 1);
  const flushed = asking.flush();
  const left = await asking.close();

  assert.deepEqual(
    left.map(({ record, error }) => [record.settles.reveal(), record.outcome, error.name]),
    [[`${TICKET}1`, "REFUSED", "Unavailable"]],
  );
  assert.deepEqual(told, left);
  await flushed;
});

test("a batch that hangs is given up at the close", async (test) => {
  const there = await sidecar(test, { batchRecord: () => new Promise(() => undefined) });
  const asking = client(test, there, { closeTimeoutMs: 10, onUnsent: () => undefined });
  asking.recordLater(record(1));
  const left = await asking.close();
  assert.deepEqual(
    left.map(({ error }) => error.name),
    ["Closed"],
  );
});

test("without a callback an unsent record is a line of the log, with neither handle nor ticket", async (test) => {
  const logged = test.mock.method(console, "error", () => undefined);
  const there = await sidecar(test, {
    batchRecord: ({ requests }) => ({
      results: requests.map(() => ({ result: { case: "status", value: status(6, "RECORD_CONFLICT") } })),
    }),
  });
  const asking = client(test, there);
  asking.recordLater(record(1, "TIMEOUT"));
  await asking.flush();

  assert.deepEqual(
    logged.mock.calls.map(({ arguments: line }) => line),
    [["keyturn: a record was not sent: TIMEOUT: ALREADY_EXISTS (RECORD_CONFLICT): It is said."]],
  );
});

test("what the callback throws is logged and stops nothing", async (test) => {
  const logged = test.mock.method(console, "error", () => undefined);
  const there = await sidecar(test, {
    batchRecord: ({ requests }) => ({
      results: requests.map(() => ({ result: { case: "status", value: status(6, "RECORD_CONFLICT") } })),
    }),
  });
  const callbacks = [
    () => {
      throw new Error("thrown");
    },
    async () => {
      throw new Error("rejected");
    },
  ];
  const asking = client(test, there, { onUnsent: () => callbacks.shift()?.() });
  for (const number of [1, 2, 3]) {
    asking.recordLater(record(number));
  }
  await asking.flush();
  await eventually(() => logged.mock.callCount() === 2);
  assert.deepEqual(
    logged.mock.calls.map(({ arguments: [, error] }) => error.message),
    ["thrown", "rejected"],
  );
  assert.equal(there.records().length, 3);
});

test("a flush can be given up", async (test) => {
  const there = await sidecar(test, { batchRecord: () => new Promise(() => undefined) });
  const asking = client(test, there, { closeTimeoutMs: 0, onUnsent: () => undefined });
  asking.recordLater(record(1));
  await assert.rejects(asking.flush({ signal: AbortSignal.timeout(10) }), { name: "TimeoutError" });
});

test("a record that no sidecar takes is refused, and holds up no others", async (test) => {
  const there = await sidecar(test);
  const asking = client(test, there);
  const huge = { ...record(1), endpoint: "/".repeat(70_000) };
  assert.throws(() => asking.recordLater(huge), /at most 64 KiB/);
  for (let number = 0; number < 100; number += 1) {
    asking.recordLater({ ...record(number), endpoint: "/".repeat(60_000) });
  }
  await asking.flush();
  const sizes = there.seen("batchRecord").map(({ requests }) => requests.length);
  assert.equal(there.records().length, 100);
  assert.ok(Math.max(...sizes) * 60_000 <= 1_048_576, String(sizes));
});
