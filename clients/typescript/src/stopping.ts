/** One signal of several, until the work that follows it is over. */
export class Stopping implements Disposable {
  readonly #controller = new AbortController();
  readonly #followed: readonly AbortSignal[];
  readonly #stop = (event: Event): void => {
    this.#controller.abort((event.target as AbortSignal).reason);
  };

  constructor(...signals: (AbortSignal | undefined)[]) {
    this.#followed = signals.filter((each) => each !== undefined);
    for (const each of this.#followed) {
      if (each.aborted) {
        this.#controller.abort(each.reason);
      }
      each.addEventListener("abort", this.#stop, { once: true });
    }
  }

  get signal(): AbortSignal {
    return this.#controller.signal;
  }

  [Symbol.dispose](): void {
    for (const each of this.#followed) {
      each.removeEventListener("abort", this.#stop);
    }
  }
}

/** Waits; ends early, without a word, when `signal` is aborted. */
export function pause(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer);
      signal.removeEventListener("abort", done);
      resolve();
    };
    const timer = setTimeout(done, ms);
    signal.addEventListener("abort", done, { once: true });
    if (signal.aborted) {
      done();
    }
  });
}

/** What `work` comes to, unless `signal` is aborted first: then its reason, and `work` goes on. */
export async function unlessAborted<T>(work: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (signal === undefined) {
    return await work;
  }
  using stopping = new Stopping(signal);
  const { signal: stopped } = stopping;
  const aborted = new Promise<never>((_, reject) => {
    stopped.addEventListener("abort", () => reject(stopped.reason), { once: true });
    if (stopped.aborted) {
      reject(stopped.reason);
    }
  });
  return await Promise.race([work, aborted]);
}
