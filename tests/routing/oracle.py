"""What the policy must answer, written a second time as a table.

From the mode table and the prose of DESIGN, "The policy", and the comments of
protos/keyturn/v1/policy.proto, without a look at `routing/policy.py`: two authors, two styles, one
meaning. Here a person can read off any answer; there a machine computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache

from keyturn_server.routing.model import (
    Constraint,
    Credits,
    DenialReason,
    Mode,
    Path,
    Reason,
    Verdict,
)

MODES = {
    # byok_enabled, byok_only_mode, byok_uses_internal_credits
    (False, False, False): Mode.INTERNAL_ONLY,
    (False, False, True): Mode.INTERNAL_ONLY,
    (False, True, False): Mode.INTERNAL_ONLY,
    (False, True, True): Mode.INTERNAL_ONLY,
    (True, True, False): Mode.BYOK_ONLY,
    (True, True, True): Mode.BYOK_ONLY,
    (True, False, True): Mode.CREDIT_FIRST,
    (True, False, False): Mode.BYOK_FIRST,
}

MAY_BRING_KEYS = {
    # min_tier: the tiers at or above it. A name that nobody knows is below everything as a tier,
    # and above everything as a minimum.
    "community": {"community", "free", "subscriber", "premium", "lifetime"},
    "subscriber": {"subscriber", "premium", "lifetime"},
    "premium": {"premium", "lifetime"},
    "lifetime": {"lifetime"},
    "platinum": set[str](),
}


class KeyIs(Enum):
    """The states a stored key can be in, as a test names them."""

    USABLE = "usable"
    COOLED = "cooled down a minute ago"
    COOLED_NOW = "cooled down exactly now"
    COOLING = "cooling down"
    INVALID = "invalid"
    UNREADABLE = "unreadable"
    REFUSED = "refused for this request"
    INACTIVE = "inactive"


OPENS_THE_DOOR = {KeyIs.USABLE, KeyIs.COOLED, KeyIs.COOLED_NOW}
COUNTS_AS_NO_KEY = {KeyIs.INACTIVE}

# One line a situation; in each mode the first line that fits is the answer, and `*` fits all.
#
#   tier     ok: at or above min_tier; low: below it, or unknown
#   asks     the caller's constraint: ANY, OWN (key only), CREDITS (only)
#   cipher   yes: this sidecar has an ENCRYPTION_KEY
#   keys     none: no active one; broken: active ones, none usable; usable: at least one is
#   paths    the paths tried, in order: k own key, c credits
#   then what comes of it, by the answer of the balance: HELD, INSUFFICIENT, IN_FLIGHT, RATE_LIMITED
#            k:REASON own key pays, c:REASON credits pay, !DENIAL nobody pays, " as on the left
#
# A provider that is switched off is denied before any of this: PROVIDER_DISABLED.
TABLE = """
INTERNAL_ONLY
*   OWN     *   *      -  !BYOK_REQUIRED " " "
*   *       *   *      c  c:BYOK_DISABLED !INSUFFICIENT_CREDITS !HOLDS_IN_FLIGHT !RATE_LIMITED

BYOK_ONLY
low *       *   *      -  !TIER_NOT_ELIGIBLE " " "
ok  CREDITS *   *      -  !BYOK_REQUIRED " " "
ok  *       no  *      -  !ENCRYPTION_NOT_CONFIGURED " " "
ok  *       yes none   -  !BYOK_REQUIRED " " "
ok  *       yes broken -  !KEY_UNUSABLE " " "
ok  *       yes usable k  k:BYOK_ONLY_OWN_KEY " " "

CREDIT_FIRST
low OWN     *   *      -  !TIER_NOT_ELIGIBLE " " "
low *       *   *      c  c:TIER_NOT_ELIGIBLE !INSUFFICIENT_CREDITS !HOLDS_IN_FLIGHT !RATE_LIMITED
ok  OWN     no  *      -  !ENCRYPTION_NOT_CONFIGURED " " "
ok  OWN     yes none   -  !BYOK_REQUIRED " " "
ok  OWN     yes broken -  !KEY_UNUSABLE " " "
ok  OWN     yes usable k  k:CALLER_CONSTRAINT " " "
ok  CREDITS *   *      c  c:CREDIT_FIRST_CREDITS !INSUFFICIENT_CREDITS !HOLDS_IN_FLIGHT !RATE_LIMITED
ok  ANY     no  *      c  c:CREDIT_FIRST_CREDITS !NO_KEY_AND_NO_CREDITS !HOLDS_IN_FLIGHT !RATE_LIMITED
ok  ANY     yes none   c  c:CREDIT_FIRST_CREDITS !NO_KEY_AND_NO_CREDITS !HOLDS_IN_FLIGHT !RATE_LIMITED
ok  ANY     yes broken c  c:CREDIT_FIRST_CREDITS !KEY_UNUSABLE !HOLDS_IN_FLIGHT !RATE_LIMITED
ok  ANY     yes usable ck c:CREDIT_FIRST_CREDITS k:CREDIT_FIRST_EXHAUSTED " !RATE_LIMITED

BYOK_FIRST
low OWN     *   *      -  !TIER_NOT_ELIGIBLE " " "
low *       *   *      c  c:TIER_NOT_ELIGIBLE !INSUFFICIENT_CREDITS !HOLDS_IN_FLIGHT !RATE_LIMITED
ok  OWN     no  *      -  !ENCRYPTION_NOT_CONFIGURED " " "
ok  OWN     yes none   -  !BYOK_REQUIRED " " "
ok  OWN     yes broken -  !KEY_UNUSABLE " " "
ok  OWN     yes usable k  k:BYOK_FIRST_OWN_KEY " " "
ok  CREDITS *   *      c  c:CALLER_CONSTRAINT !INSUFFICIENT_CREDITS !HOLDS_IN_FLIGHT !RATE_LIMITED
ok  ANY     no  none   c  c:BYOK_FIRST_NO_KEY !NO_KEY_AND_NO_CREDITS !HOLDS_IN_FLIGHT !RATE_LIMITED
ok  ANY     no  *      c  c:BYOK_FIRST_KEY_FAILED !NO_KEY_AND_NO_CREDITS !HOLDS_IN_FLIGHT !RATE_LIMITED
ok  ANY     yes none   c  c:BYOK_FIRST_NO_KEY !NO_KEY_AND_NO_CREDITS !HOLDS_IN_FLIGHT !RATE_LIMITED
ok  ANY     yes broken c  c:BYOK_FIRST_KEY_FAILED !KEY_UNUSABLE !HOLDS_IN_FLIGHT !RATE_LIMITED
ok  ANY     yes usable kc k:BYOK_FIRST_OWN_KEY " " "
"""

ANSWERS_OF_THE_BALANCE = (
    Credits.HELD,
    Credits.INSUFFICIENT,
    Credits.IN_FLIGHT,
    Credits.RATE_LIMITED,
)
ASKS = {
    Constraint.ANY: "ANY",
    Constraint.OWN_KEY_ONLY: "OWN",
    Constraint.CREDITS_ONLY: "CREDITS",
}
PATHS = {"k": Path.OWN_KEY, "c": Path.CREDITS}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """One line of `TABLE`."""

    mode: Mode
    situation: tuple[str, str, str, str]
    paths: tuple[Path, ...]
    verdicts: dict[Credits, Verdict]

    def fits(self, mode: Mode, situation: tuple[str, str, str, str]) -> bool:
        """Whether every cell of the line is `*` or says the same."""
        return mode is self.mode and all(
            cell in ("*", fact) for cell, fact in zip(self.situation, situation, strict=True)
        )


def _verdict(cell: str) -> Verdict:
    if cell.startswith("!"):
        return Verdict(reason=Reason.DENIED, denial=DenialReason(cell[1:]))
    path, reason = cell.split(":")
    return Verdict(reason=Reason(reason), path=PATHS[path])


def _rows() -> list[Row]:
    rows = []
    for block in TABLE.strip().split("\n\n"):
        name, *lines = block.splitlines()
        for line in lines:
            tier, asks, cipher, keys, paths, *cells = line.split()
            for at, cell in enumerate(cells):
                cells[at] = cells[at - 1] if cell == '"' else cell
            rows.append(
                Row(
                    mode=Mode(name),
                    situation=(tier, asks, cipher, keys),
                    paths=tuple(PATHS[path] for path in paths.strip("-")),
                    verdicts=dict(
                        zip(ANSWERS_OF_THE_BALANCE, map(_verdict, cells), strict=True),
                    ),
                )
            )
    return rows


ROWS = _rows()
SWITCHED_OFF = {
    mode: Row(
        mode=mode,
        situation=("*", "*", "*", "*"),
        paths=(),
        verdicts=dict.fromkeys(ANSWERS_OF_THE_BALANCE, _verdict("!PROVIDER_DISABLED")),
    )
    for mode in Mode
}


@cache
def row_for(
    mode: Mode,
    tier: str,
    min_tier: str,
    constraint: Constraint,
    *,
    keys: str,
    encryption_configured: bool,
    provider_enabled: bool,
) -> Row:
    """The line that decides; `keys` is none, broken or usable."""
    if not provider_enabled:
        return SWITCHED_OFF[mode]
    situation = (
        "ok" if tier in MAY_BRING_KEYS[min_tier] else "low",
        ASKS[constraint],
        "yes" if encryption_configured else "no",
        keys,
    )
    return next(row for row in ROWS if row.fits(mode, situation))


def first_usable(keys: Sequence[KeyIs]) -> int | None:
    """The place of the key that an own-key path uses; None where there is none."""
    return next((at for at, key in enumerate(keys) if key in OPENS_THE_DOOR), None)


def keys_are(keys: Sequence[KeyIs]) -> str:
    """The word of the column `keys`."""
    if first_usable(keys) is not None:
        return "usable"
    return "none" if set(keys) <= COUNTS_AS_NO_KEY else "broken"
