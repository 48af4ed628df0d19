/// <reference lib="esnext.disposable" preserve="true" />

// Node 20 has these symbols from 20.5.1 on; `await using` needs them in every 20.
const symbols = Symbol as { dispose?: symbol; asyncDispose?: symbol };
symbols.dispose ??= Symbol.for("nodejs.dispose");
symbols.asyncDispose ??= Symbol.for("nodejs.asyncDispose");

export {};
