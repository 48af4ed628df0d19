/** The channel to one sidecar: the only place that knows gRPC. */

import {
  type DescMessage,
  type DescMethodUnary,
  fromBinary,
  type MessageShape,
  toBinary,
} from "@bufbuild/protobuf";
import {
  Client as Channel,
  type ChannelOptions,
  credentials,
  Metadata,
  type ServiceError,
} from "@grpc/grpc-js";

import type { Options } from "./options.js";
import { VERSION } from "./version.js";

const ALWAYS: ChannelOptions = {
  "grpc.primary_user_agent": `keyturn-typescript/${VERSION}`,
  // One retry policy: ours. This switches off gRPC's, and the look-up of one in DNS.
  "grpc.enable_retries": 0,
  "grpc.service_config_disable_resolution": 1,
  // A restarted sidecar is found again within a second, not after gRPC's 1 to 120.
  "grpc.initial_reconnect_backoff_ms": 100,
  "grpc.max_reconnect_backoff_ms": 1_000,
  // A closed client closes its connection, whatever others there are in the process.
  "grpc.use_local_subchannel_pool": 1,
  "grpc.enable_channelz": 0,
};

const BY_KIND = {
  unix: { "grpc.default_authority": "localhost" },
  // An http_proxy in the environment is not for this machine's own sidecar.
  loopback: { "grpc.enable_http_proxy": 0 },
  // A peer that vanished without a word is noticed by pings, not by TCP after minutes.
  remote: {
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 5_000,
    "grpc.keepalive_permit_without_calls": 1,
  },
} as const;

/** A method and its request, encoded: what is sent once, or again. */
export interface Sendable<O extends DescMessage> {
  readonly path: string;
  readonly request: Buffer;
  readonly output: O;
}

export function sendable<I extends DescMessage, O extends DescMessage>(
  method: DescMethodUnary<I, O>,
  request: MessageShape<I>,
): Sendable<O> {
  return {
    path: `/${method.parent.typeName}/${method.name}`,
    request: Buffer.from(toBinary(method.input, request)),
    output: method.output,
  };
}

/** A status that is not OK, and what is packed with it. Only this is kept of gRPC's own error. */
export interface Failed {
  readonly code: number;
  readonly message: string;
  readonly details: Uint8Array | undefined;
}

export type Reply<T> = { readonly answer: T } | { readonly failed: Failed };

export class Connection {
  readonly #channel: Channel;
  readonly #metadata = new Metadata();

  /** Nothing connects before the first call. Throws `TypeError` for certificates that TLS refuses. */
  constructor(options: Options) {
    const { target, token } = options;
    this.#channel = new Channel(target.address, channelCredentials(options), {
      ...ALWAYS,
      ...BY_KIND[target.kind],
    });
    if (token !== undefined) {
      // gRPC takes call credentials only with TLS.
      this.#metadata.set("authorization", `Bearer ${token.reveal()}`);
    }
  }

  /** One attempt. Never rejects; an aborted one ends with CANCELLED. */
  send<O extends DescMessage>(
    { path, request, output }: Sendable<O>,
    timeoutMs: number,
    signal: AbortSignal,
  ): Promise<Reply<MessageShape<O>>> {
    return new Promise((resolve) => {
      const call = this.#channel.makeUnaryRequest<Buffer, MessageShape<O>>(
        path,
        (bytes) => bytes,
        (bytes) => fromBinary(output, bytes),
        request,
        this.#metadata.clone(),
        { deadline: Date.now() + timeoutMs },
        (failure, answer) => {
          signal.removeEventListener("abort", cancel);
          resolve(answer === undefined ? { failed: failedBy(failure) } : { answer });
        },
      );
      const cancel = () => call.cancel();
      signal.addEventListener("abort", cancel, { once: true });
    });
  }

  close(): void {
    this.#channel.close();
  }
}

function failedBy(error: ServiceError | null): Failed {
  const details = error?.metadata?.get("grpc-status-details-bin")[0];
  return {
    code: error?.code ?? -1,
    message: error?.details ?? "no answer",
    details: details instanceof Uint8Array ? details : undefined,
  };
}

function channelCredentials({ tls, rootCertificates, privateKey, certificateChain }: Options) {
  if (!tls) {
    return credentials.createInsecure();
  }
  const bytes = (pem: string | undefined) => (pem === undefined ? null : Buffer.from(pem, "latin1"));
  try {
    return credentials.createSsl(
      bytes(rootCertificates),
      bytes(privateKey?.reveal()),
      bytes(certificateChain),
    );
  } catch (error) {
    // Only OpenSSL's sentence: nothing that could hold on to the key.
    const said = error instanceof Error ? error.message : "";
    throw new TypeError(`rootCertificates, certificateChain or privateKey cannot be used: ${said}`);
  }
}
