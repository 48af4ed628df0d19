import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

import { ANSWER, json, provider } from "./provider.js";
import { key, sidecar, TICKET, ticket } from "./sidecar.js";

const run = promisify(execFile);
const ROOT = fileURLToPath(new URL("../..", import.meta.url));

test("the README's examples compile and run, one after the other", async (test) => {
  const blocks = [...readFileSync(`${ROOT}/README.md`, "utf8").matchAll(/^```ts\n(.*?)^```$/gms)].map(
    ([, code]) => code,
  );
  assert.ok(blocks.length >= 7);
  const directory = mkdtempSync(`${ROOT}/build/readme-`);
  test.after(() => rmSync(directory, { recursive: true, force: true }));
  writeFileSync(`${directory}/readme.ts`, blocks.join("\n"));
  const config = {
    extends: "../../tsconfig.json",
    compilerOptions: { rootDir: ".", outDir: ".", noUnusedLocals: false },
    files: ["readme.ts"],
    include: [],
  };
  writeFileSync(`${directory}/tsconfig.json`, JSON.stringify(config));
  await run(`${ROOT}/node_modules/.bin/tsc`, ["-p", directory]).catch(({ stdout }) => assert.fail(stdout));

  const there = await sidecar(test, {
    decide: ({ model, failedKeyHandles: failed }) => (model !== "" && failed.length === 0 ? key() : ticket()),
  });
  const openai = await provider(test, ({ headers, body }, response) => {
    const refused = !body.includes("messages") && headers.authorization !== "Bearer ours";
    json(
      response,
      refused ? 401 : 200,
      refused ? { error: { code: "invalid_api_key", message: "No." } } : ANSWER,
    );
  });
  const environment = { KEYTURN_ADDRESS: there.target, OPENAI_API_KEY: "ours", OPENAI_BASE_URL: openai.url };
  const { stdout, stderr } = await run(process.execPath, [`${directory}/readme.js`], {
    env: { ...process.env, ...environment },
    timeout: 60_000,
  });

  assert.equal(stderr, "");
  assert.match(stdout, /content: 'Hi'|choices:/);
  assert.match(stdout, /^0 4000$/m); // The record of the section without a call.
  assert.match(stdout, /^true$/m);
  assert.match(stdout, /^0$/m);
  const outcomes = there.records().map(({ outcome }) => outcome);
  assert.deepEqual(
    outcomes.sort((one, other) => one - other),
    [1, 1, 1, 1, 3, 4], // Four of SUCCESS, NEVER_SENT of the cache, AUTH_REJECTED of the refused key.
  );
  assert.ok(there.records().some(({ settles }) => settles.value === TICKET));
});
