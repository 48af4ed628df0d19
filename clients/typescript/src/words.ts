/**
 * The words of the contract, without the prefix of their type: `Outcome.SUCCESS` is `"SUCCESS"`.
 * They are made from the generated enums, where each has its meaning. A number that only a newer
 * sidecar knows reads as `UNRECOGNIZED_<number>`, and is sent as that number.
 */

import * as policy from "./gen/keyturn/v1/policy_pb.js";
import * as routing from "./gen/keyturn/v1/routing_service_pb.js";

export type Unrecognized = `UNRECOGNIZED_${number}`;

type Numbers = Record<string, string | number>;
type Words<E> = { readonly [W in keyof E & string]: W };

function words<E extends Numbers>(numbers: E): Words<E> {
  const names = Object.keys(numbers).filter((name) => typeof numbers[name] === "number");
  return Object.freeze(Object.fromEntries(names.map((name) => [name, name]))) as Words<E>;
}

/** The word of a number of the wire. */
export function wordOf<E extends Numbers>(numbers: E, value: number): (keyof E & string) | Unrecognized {
  const word = numbers[value];
  return typeof word === "string" ? word : `UNRECOGNIZED_${value}`;
}

/** The number of a word. Throws `TypeError` for a word that the contract does not have. */
export function numberOf(type: string, numbers: Numbers, word: string): number {
  const known = Object.hasOwn(numbers, word) ? numbers[word] : undefined;
  if (typeof known === "number") {
    return known;
  }
  const unrecognized = Number(/^UNRECOGNIZED_(-?\d{1,10})$/.exec(word)?.[1] ?? Number.NaN);
  if (unrecognized !== (unrecognized | 0)) {
    throw new TypeError(`no such ${type}`);
  }
  return unrecognized;
}

/** Which of the four configurations of the feature flags is in force. */
export const Mode = words(policy.Mode);
export type Mode = keyof typeof policy.Mode | Unrecognized;

/** Why the route of a decision was chosen. */
export const Reason = words(policy.Reason);
export type Reason = keyof typeof policy.Reason | Unrecognized;

/** Why nobody's credential may pay. */
export const DenialReason = words(policy.DenialReason);
export type DenialReason = keyof typeof policy.DenialReason | Unrecognized;

/** How a caller tightens the policy for one request; it can never relax it. */
export const Constraint = words(policy.Constraint);
export type Constraint = keyof typeof policy.Constraint | Unrecognized;

/** Whether a stored key can be used, and if not, why. */
export const KeyState = words(policy.KeyState);
export type KeyState = keyof typeof policy.KeyState | Unrecognized;

/** How the request to the provider ended. The contract says what each one charges. */
export const Outcome = words(routing.Outcome);
export type Outcome = keyof typeof routing.Outcome | Unrecognized;

/** Where a charge comes from. */
export const CostSource = words(routing.CostSource);
export type CostSource = keyof typeof routing.CostSource | Unrecognized;

/** Where an acknowledged record is durable. */
export const Durability = words(routing.Durability);
export type Durability = keyof typeof routing.Durability | Unrecognized;
