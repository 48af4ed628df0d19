import assert from "node:assert/strict";
import { test } from "node:test";
import { create, toBinary } from "@bufbuild/protobuf";
import * as keyturn from "@keyturn/client";
import { StatusSchema } from "#dist/gen/keyturn/v1/status_pb.js";

import { ASKED, client, Fault, fault, type Sidecar, sidecar, status } from "./sidecar.js";

async function failure(there: Sidecar, asking: keyturn.Client, with_: Fault): Promise<keyturn.KeyturnError> {
  there.handlers.explain = () => {
    throw with_;
  };
  const error = await asking.explain(ASKED).then(
    () => undefined,
    (error: unknown) => error,
  );
  assert.ok(error instanceof keyturn.KeyturnError);
  return error;
}

test("every status has its class", async (test) => {
  const there = await sidecar(test);
  const asking = client(test, there, { retries: { attempts: 1 } });
  const kinds = {
    INVALID_ARGUMENT: [3, keyturn.InvalidArgument],
    UNAUTHENTICATED: [16, keyturn.Unauthenticated],
    PERMISSION_DENIED: [7, keyturn.PermissionDenied],
    NOT_FOUND: [5, keyturn.NotFound],
    ALREADY_EXISTS: [6, keyturn.AlreadyExists],
    FAILED_PRECONDITION: [9, keyturn.FailedPrecondition],
    RESOURCE_EXHAUSTED: [8, keyturn.ResourceExhausted],
    UNAVAILABLE: [14, keyturn.Unavailable],
    DEADLINE_EXCEEDED: [4, keyturn.DeadlineExceeded],
    INTERNAL: [13, keyturn.InternalError],
    UNKNOWN: [2, keyturn.InternalError],
    DATA_LOSS: [15, keyturn.InternalError],
    UNIMPLEMENTED: [12, keyturn.KeyturnError],
  } as const;
  for (const [code, [number, type]] of Object.entries(kinds)) {
    const error = await failure(there, asking, fault(number, "BECAUSE"));
    assert.equal(error.constructor, type);
    assert.equal(error.name, type.name);
    assert.equal(error.code, code);
    assert.equal(String(error), `${code} (BECAUSE): It is said.`);
  }
});

test("a missed deadline is unavailable too, and a denial is no fault", () => {
  const late = Object.create(keyturn.DeadlineExceeded.prototype);
  assert.ok(late instanceof keyturn.Unavailable);
  assert.ok(!(Object.create(keyturn.Denied.prototype) instanceof keyturn.KeyturnError));
});

test("an error has all details", async (test) => {
  const there = await sidecar(test);
  const asking = client(test, there);
  const invalid = await failure(
    there,
    asking,
    fault(3, "INVALID_FIELD", {
      fields: [
        { field: "user_id", description: "is missing" },
        { field: "provider", description: "is unknown" },
      ],
      metadata: { error_id: "9f2c" },
    }),
  );
  assert.equal(
    String(invalid),
    "INVALID_ARGUMENT (INVALID_FIELD): It is said. [user_id: is missing; provider: is unknown]",
  );
  assert.equal(invalid.message, "It is said.");
  assert.deepEqual(invalid.fieldViolations[1], { field: "provider", description: "is unknown" });
  assert.deepEqual({ ...invalid.metadata }, { error_id: "9f2c" });
  assert.equal(invalid.retryAfterMs, undefined);

  const resource = { resourceType: "user", resourceName: "u9", description: "no such user" };
  const missing = await failure(there, asking, fault(5, "USER_NOT_FOUND", { resource }));
  assert.deepEqual(missing.resource, { type: "user", name: "u9", description: "no such user" });

  const busy = await failure(there, asking, fault(8, "OVERLOADED", { retryAfterMs: 1_250 }));
  assert.equal(busy.retryAfterMs, 1_250);
});

test("garbled details never mask the status", async (test) => {
  const there = await sidecar(test);
  const asking = client(test, there);
  const whole = await failure(there, asking, new Fault(5, "It is said.", Buffer.from("no protobuf at all")));
  assert.equal(String(whole), "NOT_FOUND: It is said.");

  const { details } = status(5, "USER_NOT_FOUND");
  const garbled = create(StatusSchema, {
    code: 5,
    details: [
      { typeUrl: "type.googleapis.com/google.rpc.RetryInfo", value: Buffer.from([0x0a, 0xff]) },
      { typeUrl: "type.googleapis.com/google.rpc.Unheard", value: Buffer.from([1, 2, 3]) },
      ...details,
    ],
  });
  const part = await failure(there, asking, new Fault(5, "It is said.", toBinary(StatusSchema, garbled)));
  assert.equal(String(part), "NOT_FOUND (USER_NOT_FOUND): It is said.");
  assert.equal(part.retryAfterMs, undefined);
});
