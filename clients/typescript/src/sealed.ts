import { inspected } from "./inspected.js";

/** Shorter ones are not the server's, and show nothing. */
const SHORTEST = 32;

abstract class Sealed {
  readonly #text: string;

  constructor(text: string) {
    if (typeof text !== "string") {
      throw new TypeError(`sealed text is a string, not ${typeof text}`);
    }
    this.#text = text;
    Object.freeze(this);
  }

  abstract get kind(): "handle" | "ticket";

  /** The whole text, to send and to store. No getter: some printers read those. */
  reveal(): string {
    return this.#text;
  }

  toString(): string {
    // A copy made by a library has no text: it must still print.
    const shown = #text in this && this.#text.length >= SHORTEST ? this.#text.slice(0, 8) : "";
    return `${this.kind === "handle" ? "SealedHandle" : "SealedTicket"}(${shown}…)`;
  }

  toJSON(): string {
    return this.toString();
  }

  [inspected](): string {
    return this.toString();
  }
}

/** The opaque text of a key handle. `new SealedHandle(text)` makes one again from a stored text. */
export class SealedHandle extends Sealed {
  override get kind(): "handle" {
    return "handle";
  }
}

/** The opaque text of a credit ticket. `new SealedTicket(text)` makes one again from a stored text. */
export class SealedTicket extends Sealed {
  override get kind(): "ticket" {
    return "ticket";
  }
}
