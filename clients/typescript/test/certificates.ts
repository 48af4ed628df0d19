/** An authority of our own that signs certificates: Node makes keys and signatures, but no X.509. */

import { generateKeyPairSync, type KeyObject, randomBytes, sign } from "node:crypto";

/** One value in DER: its tag, its length and its contents. */
function der(tag: number, ...contents: Uint8Array[]): Buffer {
  const body = Buffer.concat(contents);
  const length =
    body.length < 0x80
      ? [body.length]
      : body.length < 0x100
        ? [0x81, body.length]
        : [0x82, body.length >> 8, body.length & 0xff];
  return Buffer.concat([Buffer.from([tag, ...length]), body]);
}

const sequence = (...items: Uint8Array[]) => der(0x30, ...items);
const oid = (hex: string) => der(0x06, Buffer.from(hex, "hex"));
const time = (date: string) => der(0x18, Buffer.from(date));
const bits = (bytes: Uint8Array) => der(0x03, Buffer.from([0]), bytes);
const named = (name: string) => sequence(der(0x31, sequence(oid("550403"), der(0x0c, Buffer.from(name)))));
const extension = (id: string, value: Uint8Array) => sequence(oid(id), der(0x04, value));

const ECDSA_WITH_SHA256 = sequence(oid("2a8648ce3d040302"));
const IS_AUTHORITY = extension("551d13", sequence(der(0x01, Buffer.from([0xff]))));

/** PEM, both. */
export interface Identity {
  readonly certificate: string;
  readonly key: string;
}

export class Authority {
  readonly #name: string;
  readonly #keys = generateKeyPairSync("ec", { namedCurve: "P-256" });
  /** PEM. */
  readonly certificate: string;

  constructor(name: string) {
    this.#name = name;
    this.certificate = this.#sign(name, this.#keys.publicKey, IS_AUTHORITY);
  }

  /** A certificate for `localhost` and `uri`, with its key. */
  identity(uri: string): Identity {
    const { publicKey, privateKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
    const names = sequence(der(0x82, Buffer.from("localhost")), der(0x86, Buffer.from(uri)));
    return {
      certificate: this.#sign(uri, publicKey, extension("551d11", names)),
      key: privateKey.export({ type: "pkcs8", format: "pem" }).toString(),
    };
  }

  #sign(subject: string, key: KeyObject, about: Uint8Array): string {
    const serial = Buffer.concat([Buffer.from([0x01]), randomBytes(8)]);
    const signed = sequence(
      der(0xa0, der(0x02, Buffer.from([2]))),
      der(0x02, serial),
      ECDSA_WITH_SHA256,
      named(this.#name),
      sequence(time("20200101000000Z"), time("21200101000000Z")),
      named(subject),
      key.export({ type: "spki", format: "der" }),
      der(0xa3, sequence(about)),
    );
    const certificate = sequence(
      signed,
      ECDSA_WITH_SHA256,
      bits(sign("sha256", signed, this.#keys.privateKey)),
    );
    const lines = certificate.toString("base64").match(/.{1,64}/g) ?? [];
    return ["-----BEGIN CERTIFICATE-----", ...lines, "-----END CERTIFICATE-----", ""].join("\n");
  }
}
