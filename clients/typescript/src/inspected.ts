/** The method of a value that `console.log` and `util.inspect` show it by. */
export const inspected: unique symbol = Symbol.for("nodejs.util.inspect.custom");
