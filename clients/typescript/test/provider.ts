/** A provider, as far as a gateway sees it. */

import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import type { TestContext } from "node:test";

export interface Asked {
  readonly url: string | undefined;
  readonly headers: IncomingMessage["headers"];
  readonly body: string;
}

export interface Provider {
  readonly url: string;
  readonly asked: Asked[];
}

export const ANSWER = {
  model: "gpt-4o-2024-11-20",
  choices: [{ message: { role: "assistant", content: "Hi" } }],
  usage: {
    prompt_tokens: 12,
    completion_tokens: 3,
    total_tokens: 15,
    prompt_tokens_details: { cached_tokens: 4 },
  },
};

export function json(response: ServerResponse, status: number, body: unknown, headers = {}): void {
  response.writeHead(status, { "content-type": "application/json", ...headers });
  response.end(JSON.stringify(body));
}

export async function provider(
  test: TestContext,
  answer: (asked: Asked, response: ServerResponse) => void = (_, response) => json(response, 200, ANSWER),
): Promise<Provider> {
  const asked: Asked[] = [];
  const server = createServer(async (request, response) => {
    let body = "";
    for await (const chunk of request) {
      body += chunk;
    }
    const one = { url: request.url, headers: request.headers, body };
    asked.push(one);
    answer(one, response);
  });
  await new Promise<void>((listening) => server.listen(0, "127.0.0.1", listening));
  test.after(() => {
    server.close();
    server.closeAllConnections();
  });
  return { url: `http://127.0.0.1:${(server.address() as AddressInfo).port}/v1`, asked };
}
