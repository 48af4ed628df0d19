import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { readFileSync } from "node:fs";
import { createServer } from "node:net";
import { homedir } from "node:os";
import { test } from "node:test";
import { promisify } from "node:util";

import { ServerCredentials } from "@grpc/grpc-js";
import { Client, Options, SealedTicket, Secret, VERSION } from "@keyturn/client";
import { defaultTarget, targetOf } from "#dist/target.js";

import { Authority } from "./certificates.js";
import { ASKED, client, directory, Sidecar, sidecar, TICKET } from "./sidecar.js";

const PEM = "-----BEGIN CERTIFICATE-----";

test("a target is a Unix socket or HOST:PORT, and its host this machine or another", () => {
  assert.deepEqual(targetOf("unix:/run/k.sock"), { kind: "unix", address: "unix:/run/k.sock" });
  assert.deepEqual(targetOf("unix:///run/k.sock"), { kind: "unix", address: "unix:/run/k.sock" });
  assert.deepEqual(targetOf("unix:run/k.sock"), { kind: "unix", address: "unix:run/k.sock" });
  const kinds = {
    "localhost:1": "loopback",
    "127.0.0.1:65535": "loopback",
    "127.9.9.9:1": "loopback",
    "[::1]:1": "loopback",
    "[0:0:0:0:0:0:0:1]:1": "loopback",
    "localhost.example.com:1": "remote",
    "127.0.0.1.example.com:1": "remote",
    "10.0.0.1:1": "remote",
    "[::2]:1": "remote",
    "0.0.0.0:1": "remote",
  };
  for (const [target, kind] of Object.entries(kinds)) {
    assert.equal(targetOf(target).kind, kind, target);
  }
  for (const target of [
    "unix:",
    "unix://run/k.sock",
    "localhost",
    "::1:1",
    "a:b",
    "http://localhost:1",
    "localhost:65536",
  ]) {
    assert.throws(() => targetOf(target), /^TypeError: target/, target);
  }
});

test("where the sidecar is when nobody says", (test) => {
  const { KEYTURN_ADDRESS, XDG_RUNTIME_DIR } = process.env;
  const user = test.mock.method(process as Required<typeof process>, "geteuid", () => 1000);
  test.after(() => {
    for (const [name, value] of Object.entries({ KEYTURN_ADDRESS, XDG_RUNTIME_DIR })) {
      delete process.env[name];
      Object.assign(process.env, value === undefined ? {} : { [name]: value });
    }
  });
  process.env.KEYTURN_ADDRESS = "127.0.0.1:7";
  assert.equal(new Options().target.address, "127.0.0.1:7");
  process.env.KEYTURN_ADDRESS = "";
  process.env.XDG_RUNTIME_DIR = "/run/user/1000";
  assert.equal(defaultTarget(), "unix:/run/user/1000/keyturn/keyturn.sock");
  delete process.env.XDG_RUNTIME_DIR;
  assert.equal(defaultTarget(), `unix:${homedir()}/.keyturn/run/keyturn.sock`);
  user.mock.mockImplementation(() => 0);
  assert.equal(defaultTarget(), "unix:/run/keyturn/keyturn.sock");
});

test("what cannot be is refused when the client is made, by the name of the option", () => {
  const refusals: [ConstructorParameters<typeof Client>[0], RegExp][] = [
    [{ target: "10.0.0.1:1" }, /give tls or rootCertificates/],
    [{ target: "unix:/k.sock", tls: true }, /takes no tls/],
    [{ target: "unix:/k.sock", rootCertificates: PEM }, /takes no rootCertificates/],
    [{ target: "h:1", privateKey: PEM }, /both certificateChain and privateKey/],
    [{ target: "h:1", certificateChain: PEM }, /both certificateChain and privateKey/],
    [{ target: "h:1", rootCertificates: "nothing" }, /^TypeError: rootCertificates is not PEM/],
    [
      { target: "h:1", certificateChain: PEM, privateKey: PEM },
      /rootCertificates, certificateChain or privateKey/,
    ],
    [{ target: "unix:/k.sock", token: "" }, /^TypeError: token/],
    [{ target: "unix:/k.sock", token: new Secret("two words") }, /^TypeError: token/],
    [{ target: "unix:/k.sock", timeoutMs: 0 }, /^RangeError: timeoutMs/],
    [{ target: "unix:/k.sock", timeoutMs: 2 ** 31 }, /^RangeError: timeoutMs/],
    [{ target: "unix:/k.sock", closeTimeoutMs: -1 }, /^RangeError: closeTimeoutMs/],
    [{ target: "unix:/k.sock", queueSize: 0 }, /^RangeError: queueSize/],
    [{ target: "unix:/k.sock", retries: { attempts: 0 } }, /^RangeError: retries.attempts/],
  ];
  for (const [options, why] of refusals) {
    assert.throws(() => new Client(options), why);
  }
});

test("a call over a Unix socket says who is calling, and asks localhost", async (test) => {
  const there = await sidecar(test);
  await client(test, there, { token: " kta_token\n" }).decide(ASKED);

  assert.equal(there.last.getHost(), "localhost");
  assert.equal(there.last.metadata.get("authorization")[0], "Bearer kta_token");
  assert.match(
    String(there.last.metadata.get("user-agent")[0]),
    new RegExp(`^keyturn-typescript/${VERSION} `),
  );
});

test("a call over loopback goes by no proxy", async (test) => {
  const proxies = { http_proxy: "http://127.0.0.1:1", grpc_proxy: "http://127.0.0.1:1" };
  const before = { ...process.env };
  Object.assign(process.env, proxies);
  test.after(() => {
    for (const name of Object.keys(proxies)) {
      delete process.env[name];
    }
    Object.assign(process.env, before);
  });
  const there = new Sidecar();
  await there.listen("127.0.0.1:0");
  test.after(() => there.stop());
  assert.ok((await client(test, there).decide(ASKED)).allowed);
});

test("messages are read by generated code, and nothing that reads .proto files is loaded", async () => {
  const program = `
    import { Client } from "@keyturn/client";
    import { Module } from "node:module";
    const client = new Client({ target: "unix:/nowhere.sock" });
    await client.decide({ userId: "u1", provider: "openai" }).catch(() => undefined);
    await client.close();
    const loaded = Object.keys(Module._cache);
    console.log(loaded.some((path) => path.includes("grpc-js")), loaded.filter((path) => /proto-loader|protobufjs/.test(path)).length);
  `;
  const { stdout } = await promisify(execFile)(process.execPath, ["--input-type=module", "--eval", program]);
  assert.equal(stdout, "true 0\n");
});

test("the version is that of the package and of the server", () => {
  const read = (path: string) => readFileSync(new URL(path, import.meta.url), "utf8");
  assert.equal(JSON.parse(read("../../package.json")).version, VERSION);
  assert.equal(/^version = "(.*)"$/m.exec(read("../../../../pyproject.toml"))?.[1], VERSION);
});

test("TLS: only a sidecar whose authority is known is spoken to", async (test) => {
  const authority = new Authority("ours");
  const { certificate, key } = authority.identity("spiffe://test/sidecar");
  const there = new Sidecar();
  const pair = { cert_chain: Buffer.from(certificate), private_key: Buffer.from(key) };
  await there.listen("localhost:0", ServerCredentials.createSsl(null, [pair], false));
  test.after(() => there.stop());

  const known = client(test, there, { rootCertificates: Buffer.from(authority.certificate), token: "kta_1" });
  assert.ok((await known.decide(ASKED)).allowed);
  assert.equal(there.last.metadata.get("authorization")[0], "Bearer kta_1");

  const foreign = client(test, there, { rootCertificates: new Authority("theirs").certificate });
  await assert.rejects(foreign.decide(ASKED), { name: "Unavailable" });
  await assert.rejects(client(test, there, { tls: true }).decide(ASKED), { name: "Unavailable" });
});

test("mutual TLS: the client shows its certificate", async (test) => {
  const authority = new Authority("ours");
  const server = authority.identity("spiffe://test/sidecar");
  const there = new Sidecar();
  const pair = { cert_chain: Buffer.from(server.certificate), private_key: Buffer.from(server.key) };
  const ours = Buffer.from(authority.certificate);
  await there.listen("localhost:0", ServerCredentials.createSsl(ours, [pair], true));
  test.after(() => there.stop());

  const gateway = authority.identity("spiffe://test/gateway");
  const known = client(test, there, {
    rootCertificates: authority.certificate,
    certificateChain: gateway.certificate,
    privateKey: new Secret(gateway.key),
  });
  assert.ok((await known.decide(ASKED)).allowed);

  const nameless = client(test, there, { rootCertificates: authority.certificate });
  await assert.rejects(nameless.decide(ASKED), { name: "Unavailable" });
});

test("nothing connects before the first call", async (test) => {
  let connections = 0;
  const server = createServer((socket) => {
    connections += 1;
    socket.destroy();
  });
  const path = `${directory(test)}/k.sock`;
  await new Promise<void>((listening) => server.listen(path, listening));
  test.after(() => server.close());

  const asking = client(test, { target: `unix:${path}` }, { retries: { attempts: 1 } });
  asking.toString();
  await new Promise((soon) => setTimeout(soon, 20));
  assert.equal(connections, 0);
  await assert.rejects(asking.decide(ASKED), { name: "Unavailable" });
  assert.ok(connections > 0);
});

test("a sidecar that comes back is found again within the deadline of a call", async (test) => {
  const address = `unix:${directory(test)}/k.sock`;
  const first = new Sidecar();
  await first.listen(address);
  const asking = client(
    test,
    { target: address },
    { timeoutMs: 60_000, retries: { attempts: 1_000, maxDelayMs: 50 } },
  );
  await asking.decide(ASKED);
  await first.stop();

  const deciding = asking.decide(ASKED);
  await new Promise((soon) => setTimeout(soon, 100));
  const second = new Sidecar();
  await second.listen(address);
  test.after(() => second.stop());
  assert.ok((await deciding).allowed);
  await asking.close();
});

test("an open client does not keep a process alive, and records on their way do", async (test) => {
  const there = await sidecar(test);
  const program = `
    import { Client, SealedTicket } from "@keyturn/client";
    const client = new Client({ target: ${JSON.stringify(there.target)}, timeoutMs: 20_000 });
    await client.decide({ userId: "u1", provider: "openai" });
    client.recordLater({ settles: new SealedTicket("${TICKET}"), outcome: "SUCCESS" });
  `;
  const arguments_ = ["--input-type=module", "--eval", program];
  const { stderr } = await promisify(execFile)(process.execPath, arguments_, { timeout: 60_000 });
  assert.equal(stderr, "");
  assert.deepEqual(
    there.records().map(({ settles }) => settles.value),
    [new SealedTicket(TICKET).reveal()],
  );
});
