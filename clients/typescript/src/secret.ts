import { timingSafeEqual } from "node:crypto";

import { inspected } from "./inspected.js";

const SHOWN = "Secret(***)";

/**
 * A text that shows itself as `Secret(***)`, also to `JSON.stringify`, `console.log` and templates;
 * `reveal` is the one way out. A structured clone of it is empty.
 */
export class Secret {
  readonly #value: string;

  constructor(value: string) {
    if (typeof value !== "string") {
      throw new TypeError(`a secret holds a string, not ${typeof value}`);
    }
    this.#value = value;
    Object.freeze(this);
  }

  /** The value itself. Search for `.reveal(` to find every place that sees it. */
  reveal(): string {
    return this.#value;
  }

  /** Whether both hold the same, in constant time in the contents (not in the length). */
  equals(other: Secret): boolean {
    const mine = Buffer.from(this.#value);
    const theirs = Buffer.from(other.#value);
    return mine.length === theirs.length && timingSafeEqual(mine, theirs);
  }

  toString(): string {
    return SHOWN;
  }

  toJSON(): string {
    return SHOWN;
  }

  [inspected](): string {
    return SHOWN;
  }
}
