"""A model of the ledger in plain integers: what each call must answer, and what must be in the tables after.

It knows nothing of groups, locks, caches or sidecars. The policy is that of tests/routing/oracle.py, which is
written apart from the server's; what the ledger does is written here a second time, from DESIGN, "Wire
contract" and "Money". Rate limits are not modelled: nobody here asks often enough to reach one.

Where time decides, the model allows what may be: a hold that has run out may have been released by a sweep,
or not yet. What an answer says of that is remembered, so that the next one has to agree.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from keyturn_server.routing.model import Constraint, Credits, Mode, Path, Verdict
from tests.routing.oracle import MODES, row_for

DEFAULT_HOLD_MICROS = 50_000
PRICED, UNPRICED = "model-with-a-price", "model-without-a-price"
"""A token of the first costs 1 micro as input and 2 as output."""

NEVER_CHARGED = {"NEVER_SENT", "AUTH_REJECTED", "RATE_LIMITED", "PROVIDER_BILLING", "REFUSED"}
COOLING = {"RATE_LIMITED", "PROVIDER_BILLING"}

KeyVersion: TypeAlias = tuple[str, int]
"""A key's id, and the number of its secret."""


# -- what is asked, and what was answered --------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A Decide. Amounts in micro-USD."""

    provider: str = "openai"
    request_id: str | None = None
    model: str = ""
    cost_micros: int | None = None
    tokens: tuple[int, int] | None = None
    """Input, and the limit on output."""
    constraint: Constraint = Constraint.ANY
    refused: frozenset[KeyVersion] = frozenset()
    """The keys of the handles that are said to have failed."""

    @property
    def hold_micros(self) -> int:
        """What it holds if credits pay."""
        if self.cost_micros is not None:
            return self.cost_micros
        if self.tokens is not None and any(self.tokens) and self.model == PRICED:
            return self.tokens[0] + 2 * self.tokens[1]
        return DEFAULT_HOLD_MICROS


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The contents of a Record. Amounts in micro-USD. Two that are equal are the same record."""

    outcome: str
    cost_micros: int | None = None
    usage: tuple[int, int, int, int | None] | None = None
    """Input, output and cached input tokens; and the total, if the provider gave one."""
    model: str = ""

    @property
    def total_tokens(self) -> int | None:
        """All tokens, as far as they are known."""
        if self.usage is None:
            return None
        read, written, cached, total = self.usage
        return total if total is not None else _all_input(read, cached) + written

    def cost(self, model: str) -> tuple[int | None, str]:
        """What is known of the cost, and whence, where the decision was for `model`."""
        if self.cost_micros is not None:
            return self.cost_micros, "REPORTED"
        if self.usage is not None and (self.model or model) == PRICED:
            read, written, cached, total = self.usage
            if read or written or cached or not total:
                return _all_input(read, cached) + 2 * written, "PRICED"
        return None, "NONE"

    def charge(self, hold: Hold) -> tuple[int, str]:
        """What a ticket is charged, and whence that comes."""
        if self.outcome in NEVER_CHARGED:
            return 0, "NONE"
        cost, source = self.cost(hold.model)
        if cost is not None:
            return cost, source
        if self.outcome == "SUCCESS" or self.total_tokens:
            return hold.amount, "ESTIMATED"
        return 0, "NONE"


def _all_input(read: int, cached: int) -> int:
    return read if cached <= read else read + cached


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """The answer to a Decide, as its caller sees it. One of the three routes."""

    id: str
    mode: str
    reason: str
    replayed: bool
    token: str = field(default="", repr=False)
    ticket: tuple[int, int] | None = None
    """Held, and available after it."""
    key_id: str | None = None
    denial: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """The answer to a Record, as its caller sees it."""

    id: str
    charged: int
    released: int
    balance: int | None
    cost_source: str
    key_state: str | None
    replayed: bool


Fault: TypeAlias = str
"""The reason of a status that is not OK."""


# -- what there is -------------------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class Key:
    """A user's key for `openai`."""

    id: str
    label: str
    priority: int
    secret: str = field(repr=False)
    revision: int = 1
    is_active: bool = True
    is_valid: bool = True
    is_cooling: bool = False
    is_verified: bool = False
    requests: int = 0
    tokens: int = 0

    @property
    def state(self) -> str:
        """As a Record tells it."""
        if not self.is_active:
            return "INACTIVE"
        if not self.is_valid:
            return "INVALID"
        if self.is_cooling:
            return "COOLING_DOWN"
        return "USABLE" if self.is_verified else "UNVERIFIED"

    def is_usable(self, refused: frozenset[KeyVersion]) -> bool:
        return self.state in ("USABLE", "UNVERIFIED") and (self.id, self.revision) not in refused


@dataclass(kw_only=True, eq=False)
class Hold:
    """A ticket's hold. `run_out` is one whose time is over and which no Record has settled."""

    id: str
    provider: str
    model: str
    amount: int
    token: str = field(repr=False)
    state: str = "open"
    has_run_out: bool = False
    report: Report | None = None
    answer: Recorded | None = None


@dataclass(kw_only=True, eq=False)
class KeyUse:
    """A handle, and what was recorded of it."""

    id: str
    key_id: str
    revision: int
    model: str
    secret: str = field(repr=False)
    token: str = field(repr=False)
    redeemed: bool = False
    report: Report | None = None
    answer: Recorded | None = None


@dataclass(kw_only=True, eq=False)
class User:
    """A user with money and keys."""

    id: str
    tier: str
    balance: int = 0
    keys: list[Key] = field(default_factory=list)
    holds: dict[str, Hold] = field(default_factory=dict)
    uses: dict[str, KeyUse] = field(default_factory=dict)
    by_request: dict[str, str] = field(default_factory=dict)
    limbo: list[Hold] = field(default_factory=list)
    """Holds that ran out and may not have been released yet, in the order in which they ran out. A sweep
    takes all that there are, so those still held are always the last ones."""
    grants: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    """By request id: the transaction's id, the amount, the balance after it."""
    books: list[tuple[str, int]] = field(default_factory=list)
    """Id and amount of each transaction, in order."""

    @property
    def open_micros(self) -> int:
        """What open holds take up."""
        return sum(hold.amount for hold in self.holds.values() if hold.state == "open")

    @property
    def held_may_be(self) -> list[int]:
        """What may be held: with all that is in limbo, with the last ones of it, ..., with none."""
        sums = [self.open_micros]
        for hold in reversed(self.limbo):
            sums.insert(0, sums[0] + hold.amount)
        return sums

    def seen_held(self, held: int) -> None:
        """An answer says that so much is held. AssertionError where that cannot be."""
        may_be = self.held_may_be
        assert held in may_be, f"{self.id}: {held} is held, where it may be {may_be}"
        # All that must have been released by now; of holds over nothing there is no telling.
        first = may_be.index(held)
        self.limbo = self.limbo[first:]

    def key(self, key_id: str) -> Key | None:
        """The key, if it is still there."""
        return next((key for key in self.keys if key.id == key_id), None)

    @property
    def decisions(self) -> list[Hold | KeyUse]:
        """All that something can be recorded of."""
        return [*self.holds.values(), *self.uses.values()]

    def decision(self, decision_id: str) -> Hold | KeyUse:
        """That of an id."""
        return self.holds.get(decision_id) or self.uses[decision_id]

    def write(self, transaction_id: str, amount: int) -> int:
        """A transaction; the balance after it."""
        self.balance += amount
        self.books.append((transaction_id, amount))
        return self.balance


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a Decide must come to, and what that rests on."""

    mode: Mode
    verdict: Verdict | None = None
    fault: Fault | None = None
    key: Key | None = None
    replay_of: Hold | None = None
    asks_credits: bool = False
    """Whether the balance was looked at on the way."""


class Ledger:
    """All users, and the flags."""

    def __init__(self) -> None:
        self.users: list[User] = []
        self.flags = {"byok_enabled": True, "byok_only_mode": False, "byok_uses_internal_credits": False}

    @property
    def mode(self) -> Mode:
        """The mode that the flags make."""
        return MODES[
            self.flags["byok_enabled"],
            self.flags["byok_only_mode"],
            self.flags["byok_uses_internal_credits"],
        ]

    # -- Decide ----------------------------------------------------------------------------------------

    def expected(self, user: User, ask: Ask) -> Expected:
        """What the answer must be."""
        keys = sorted(user.keys, key=lambda key: key.priority) if ask.provider == "openai" else []
        usable = [key for key in keys if key.is_usable(ask.refused)]
        row = row_for(
            self.mode,
            user.tier,
            "premium",
            ask.constraint,
            keys="usable" if usable else "broken" if any(key.is_active for key in keys) else "none",
            encryption_configured=True,
            provider_enabled=True,
        )
        if row.paths[:1] != (Path.CREDITS,):
            return Expected(
                mode=self.mode, verdict=row.verdicts[Credits.HELD], key=usable[0] if usable else None
            )
        first_id = user.by_request.get(ask.request_id) if ask.request_id is not None else None
        if first_id is not None:
            first = user.holds[first_id]
            if first.provider != ask.provider:
                return Expected(mode=self.mode, fault="REQUEST_ID_REUSED")
            return Expected(mode=self.mode, verdict=row.verdicts[Credits.HELD], replay_of=first)
        # Holds that have run out stand in nobody's way, released or not.
        if user.balance - user.open_micros >= ask.hold_micros:
            answer = Credits.HELD
        else:
            answer = Credits.IN_FLIGHT if user.balance >= ask.hold_micros else Credits.INSUFFICIENT
        return Expected(
            mode=self.mode,
            verdict=row.verdicts[answer],
            key=usable[0] if usable else None,
            asks_credits=True,
        )

    def decide(self, user: User, ask: Ask, seen: Decided | Fault, *, again: bool) -> Hold | KeyUse | None:
        """Compares an answer with what it must be, and takes it in. `again`: the same was asked before, and
        nobody knows whether it was heard. The hold or handle that it gave."""
        expected = self.expected(user, ask)
        context = f"{user.id} asked {ask}, was answered {seen}, where it must be {expected}"
        if expected.fault is not None or isinstance(seen, str):
            assert seen == expected.fault, context
            return None
        verdict = expected.verdict
        assert verdict is not None, context
        assert (seen.mode, seen.reason) == (expected.mode.value, verdict.reason.value), context
        if expected.asks_credits and verdict.path is not Path.CREDITS:
            user.limbo.clear()  # too little was left, so whatever had run out was released first
        if verdict.path is None:
            assert verdict.denial is not None, context
            assert seen.denial == verdict.denial.value, context
            return None
        if verdict.path is Path.OWN_KEY:
            key = expected.key
            assert key is not None, context
            assert (seen.key_id, seen.replayed) == (key.id, False), context
            assert seen.id not in user.uses, context
            use = user.uses[seen.id] = KeyUse(
                id=seen.id,
                key_id=key.id,
                revision=key.revision,
                model=ask.model,
                secret=key.secret,
                token=seen.token,
            )
            return use
        assert seen.ticket is not None, context
        held_micros, available = seen.ticket
        if (first := expected.replay_of) is not None:
            assert (seen.id, held_micros, seen.replayed) == (first.id, first.amount, True), context
            assert seen.token == first.token or first.has_run_out, context
            user.seen_held(user.balance - available)
            return first
        assert held_micros == ask.hold_micros, context
        assert again or not seen.replayed, context
        assert seen.id not in user.holds, context
        while user.limbo and user.balance - user.held_may_be[0] < ask.hold_micros:
            user.limbo.pop(0)  # only its release made room
        hold = user.holds[seen.id] = Hold(
            id=seen.id, provider=ask.provider, model=ask.model, amount=held_micros, token=seen.token
        )
        if ask.request_id is not None:
            user.by_request[ask.request_id] = hold.id
        user.seen_held(user.balance - available)
        return hold

    # -- Record ----------------------------------------------------------------------------------------

    def record(
        self,
        user: User,
        decision: Hold | KeyUse,
        report: Report,
        seen: Recorded | Fault,
        *,
        again: bool = False,
        too_late: bool = False,
    ) -> None:
        """Compares an answer with what it must be, and takes it in. `too_late`: the token expired more than 7
        days ago."""
        context = f"{user.id} recorded {report} of {decision}, was answered {seen}"
        if decision.report is not None:
            if decision.report != report:
                assert seen == "RECORD_CONFLICT", context
                return
            assert isinstance(seen, Recorded), context
            assert seen.replayed, context
            assert decision.answer == seen, context
            return
        if too_late:
            assert seen == "RECORD_TOO_LATE", context
            return
        assert isinstance(seen, Recorded), context
        assert again or not seen.replayed, context
        assert seen.id == decision.id, context
        if isinstance(decision, Hold):
            self._settled(user, decision, report, seen, context)
        else:
            self._used(user, decision, report, seen, context)
        decision.report = report
        decision.answer = Recorded(
            id=seen.id,
            charged=seen.charged,
            released=seen.released,
            balance=seen.balance,
            cost_source=seen.cost_source,
            key_state=seen.key_state,
            replayed=True,
        )

    def _settled(self, user: User, hold: Hold, report: Report, seen: Recorded, context: str) -> None:
        charge, source = report.charge(hold)
        rest = max(hold.amount - charge, 0)
        may_release = {rest} if hold.state == "open" else {0}
        if hold in user.limbo:
            may_release.add(rest)
        assert (seen.charged, seen.cost_source, seen.key_state) == (charge, source, None), context
        assert seen.released in may_release, f"{context}; it may release {may_release}"
        if hold in user.limbo:
            at = user.limbo.index(hold)
            if rest and not seen.released:
                user.limbo = user.limbo[at + 1 :]  # released by a sweep, and all before it as well
            else:
                user.limbo.pop(at)
        hold.state = "settled"
        if charge or report.outcome == "SUCCESS":
            user.write(hold.id, -charge)
        assert seen.balance == user.balance, f"{context}; the balance is {user.balance}"

    def _used(self, user: User, use: KeyUse, report: Report, seen: Recorded, context: str) -> None:
        key = user.key(use.key_id)
        if key is None:
            state = "DELETED"
        else:
            key.requests += report.outcome != "NEVER_SENT"
            key.tokens += report.total_tokens or 0
            if key.revision == use.revision:
                if report.outcome == "AUTH_REJECTED":
                    key.is_valid = False
                elif report.outcome in COOLING:
                    key.is_cooling = True
                elif report.outcome == "SUCCESS":
                    key.is_cooling, key.is_verified = False, True
            state = key.state
        _, source = report.cost(use.model)
        told = (seen.charged, seen.released, seen.balance, seen.cost_source, seen.key_state)
        assert told == (0, 0, None, source, state), f"{context}; the key is {state}, the source {source}"

    # -- the rest --------------------------------------------------------------------------------------

    def redeem(self, user: User, use: KeyUse, seen: str, *, again: bool) -> None:
        """Compares the secret or the fault that a Redeem came to."""
        key = user.key(use.key_id)
        if key is None or key.revision != use.revision or not (key.is_active and key.is_valid):
            must_be = {"KEY_UNUSABLE"}
        elif use.redeemed:
            must_be = {"HANDLE_REDEEMED"}
        else:
            # A repeat of one whose answer was lost finds the handle spent.
            must_be = {use.secret, "HANDLE_REDEEMED"} if again else {use.secret}
            use.redeemed = True
        assert seen in must_be, f"{user.id} redeemed {use} of {key}: {seen if seen.isupper() else 'a secret'}"

    def grant(
        self,
        user: User,
        amount: int,
        request_id: str | None,
        seen: tuple[str, int, bool] | Fault,
        *,
        again: bool = False,
    ) -> None:
        """Compares what a grant came to: the transaction, the balance, whether it was a replay."""
        context = f"{user.id} was granted {amount} for {request_id}: {seen}, after {user.grants}"
        first = user.grants.get(request_id) if request_id is not None else None
        if first is not None and first[1] != amount:
            assert seen == "GRANT_CONFLICT", context
            return
        assert not isinstance(seen, str), context
        transaction_id, balance, replayed = seen
        if first is not None:
            assert (transaction_id, balance, replayed) == (first[0], first[2], True), context
            return
        assert again or not replayed, context
        assert balance == user.write(transaction_id, amount), context
        if request_id is not None:
            user.grants[request_id] = (transaction_id, amount, balance)

    def run_out(self, user: User, holds: list[Hold]) -> None:
        """The time of these open holds is over."""
        for hold in holds:
            assert hold.state == "open"
            hold.state, hold.has_run_out = "run_out", True
            user.limbo.append(hold)

    def swept(self) -> None:
        """Whatever has run out is released."""
        for user in self.users:
            user.limbo.clear()
