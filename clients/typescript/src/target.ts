import { BlockList, isIP } from "node:net";
import { homedir } from "node:os";

const LOOPBACK = new BlockList();
LOOPBACK.addSubnet("127.0.0.0", 8, "ipv4");
LOOPBACK.addAddress("::1", "ipv6");

/** Where a sidecar is. `address` is as gRPC reads it. */
export interface Target {
  readonly kind: "unix" | "loopback" | "remote";
  readonly address: string;
}

/**
 * Reads `unix:PATH`, `unix:///PATH` or `HOST:PORT` (`[HOST]:PORT` for IPv6). No name is looked up.
 *
 * Throws `TypeError` for anything else.
 */
export function targetOf(text: string): Target {
  if (text.startsWith("unix:")) {
    const path = text.slice("unix:".length).replace(/^\/\/(?=\/)/, "");
    if (path === "" || path.startsWith("//")) {
      throw new TypeError(`target ${text}: write unix:PATH, or unix:///PATH for an absolute one`);
    }
    return { kind: "unix", address: `unix:${path}` };
  }
  const parts = /^(\[[^[\]]+\]|[^[\]:/@\s]+):(\d{1,5})$/.exec(text);
  if (parts?.[1] === undefined || Number(parts[2]) > 65_535) {
    throw new TypeError("target: write unix:PATH or HOST:PORT ([HOST]:PORT for IPv6)");
  }
  return { kind: isLoopback(parts[1]) ? "loopback" : "remote", address: text };
}

/** Where a sidecar on this machine listens when nobody says otherwise. */
export function defaultTarget(): string {
  const given = process.env.KEYTURN_ADDRESS;
  if (given) {
    return given;
  }
  const runtime = process.env.XDG_RUNTIME_DIR;
  if (process.geteuid?.() === 0) {
    return "unix:/run/keyturn/keyturn.sock";
  }
  return `unix:${runtime ? `${runtime}/keyturn` : `${homedir()}/.keyturn/run`}/keyturn.sock`;
}

function isLoopback(host: string): boolean {
  const address = host.replace(/^\[|\]$/g, "");
  const version = isIP(address);
  return version === 0 ? address === "localhost" : LOOPBACK.check(address, version === 6 ? "ipv6" : "ipv4");
}
