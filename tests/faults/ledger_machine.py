"""Random work on real sidecars, and a model beside it that says what each answer must be.

Two `keyturn serve`, each a process of its own, share one PostgreSQL. hypothesis draws what is done: calls
one after the other, in batches, and at the same time on both; calls that are given up and made again;
connections to the database that break; processes that are killed or told to end, and started again; changes
of flags, tiers and keys, by RPC and by plain SQL. What happens at the same time to one user must have
happened in some order: it is looked for until the model agrees.
"""

from __future__ import annotations

import asyncio
import copy
import json
import secrets
import signal
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration
from grpc_status import rpc_status
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from keyturn.secret import Secret
from keyturn.v1 import credit_service_pb2, flag_service_pb2, key_service_pb2, user_service_pb2
from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import routing_service_pb2 as pb
from keyturn.v1 import status_pb2 as keyturn_status_pb2
from keyturn_server.ids import new_id
from keyturn_server.keys.envelope import seal
from keyturn_server.keys.tokens import TokenSealer
from keyturn_server.ledger import Outcome
from keyturn_server.routing.model import Constraint, Mode, flags_of
from tests.cli.command import Served, serving
from tests.factories import KEYRING, Connection
from tests.faults.model import (
    PRICED,
    UNPRICED,
    Ask,
    Decided,
    Fault,
    Hold,
    Key,
    KeyUse,
    Ledger,
    Recorded,
    Report,
    User,
)
from tests.refusals import Refusal
from tests.sealing import sealer_of
from tests.support import MASTER_KEY, method_of

T = TypeVar("T")

SIDECARS = 2
_LIMIT_SECONDS = 60
_LONG_AGO = timedelta(days=8)
_OUTCOMES = [outcome.name for outcome in Outcome]
_FUTURE_OUTCOME = 99


# -- the sidecars --------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Process:
    """A `keyturn serve` that can be killed."""

    stack: AsyncExitStack
    served: Served
    channel: grpc.aio.Channel


@dataclass(kw_only=True)
class World:
    """The sidecars on one database, and what has been done with them."""

    dsn: str
    sql: Connection
    directory: Path
    loop: asyncio.AbstractEventLoop
    crash_every: int
    """How many operations lie between two crashes, at least."""
    checks_logs: bool = True
    """Whether no sidecar may have told of a defect."""
    processes: list[Process] = field(default_factory=list)
    past: list[grpc.aio.Channel] = field(default_factory=list)
    """Channels to processes that are no more."""
    operations: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    acknowledged: list[str] = field(default_factory=list)
    """The ids of the records that were."""
    next_crash: int = 0
    journal: list[str] = field(default_factory=list)
    """What was done in this run, and what it came to."""
    first_failure: str = ""
    """The same of the first run that failed. Where time decides, another need not fail in the same way."""
    sealer: TokenSealer = field(init=False)

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs it in the loop's thread, from another."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def count(self, what: str, times: int = 1) -> None:
        """That many operations are done."""
        self.counts[what] += times
        self.operations += times

    async def start(self, at: int) -> None:
        """Starts the sidecar of this number."""
        stack = AsyncExitStack()
        served = await stack.enter_async_context(
            serving(
                self.directory,
                *("--listen", f"unix:{self.directory}/run/{at}"),
                KEYTURN_DATABASE_URL=self.dsn,
                ENCRYPTION_KEY=MASTER_KEY,
                # So that a machine that is slow for a while is not taken for a fault.
                KEYTURN_STATEMENT_TIMEOUT="30",
                KEYTURN_CONNECT_TIMEOUT="30",
                KEYTURN_PUSH_TIMEOUT="30",
                KEYTURN_SWEEP_INTERVAL="1",
            )
        )
        process = Process(stack=stack, served=served, channel=served.channel())
        if at < len(self.processes):
            # Not closed yet: a call that is asked again may just be on it, and would be cancelled.
            self.past.append(self.processes[at].channel)
            self.processes[at] = process
        else:
            self.processes.append(process)

    async def restart(self, at: int, number: signal.Signals) -> None:
        """Kills it or has it end, and starts it again once nothing that it had begun runs any more."""
        served = self.processes[at].served
        served.signal(number)
        code = await served.end()
        assert code == (0 if number is signal.SIGTERM else -number), code
        if self.checks_logs:
            self.check_log(served)
        await self.quiet()
        await self.processes[at].stack.aclose()
        await self.start(at)

    async def quiet(self) -> None:
        """Back when the database has nothing to do for a sidecar: what a dead one had begun has ended."""
        for _ in range(100 * _LIMIT_SECONDS):
            if not await self.sql.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                " AND application_name LIKE 'keyturn%' AND state <> 'idle'"
            ):
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the database is never idle")

    async def cut(self) -> None:
        """Breaks all connections to the database but those that hear of changes."""
        await self.sql.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'keyturn'"
        )

    async def close(self) -> None:
        """Ends everything, in peace."""
        for process in self.processes:
            if process.served.process.returncode is None:
                process.served.signal(signal.SIGTERM)
        for channel in self.past:
            await channel.close()
        for process in self.processes:
            code = await process.served.end()
            await process.channel.close()
            await process.stack.aclose()
            if self.checks_logs:
                assert code == 0
                self.check_log(process.served)

    @staticmethod
    def check_log(served: Served) -> None:
        """Raises AssertionError for a defect that a sidecar has told of."""
        defects = [
            event
            for event in served.events
            if event["level"] == "error" or event["event"] in ("internal_error", "account_broken")
        ]
        assert not defects, json.dumps(defects[0], indent=1)
        assert not served.strays, served.strays[:20]

    async def settle_push(self, which: set[int]) -> None:
        """Back when these sidecars have heard of every change that is committed by now.

        Announcements come in the order of the commits and are handled in that order, so it is enough that a
        last one has arrived: of a user whom nobody has asked about before, and whom each now has cached."""
        watched = f"watched-{secrets.token_hex(6)}"
        await self.sql.execute("INSERT INTO users (id, subscription_tier) VALUES ($1, 'before')", watched)
        request = pb.ExplainRequest(decide=pb.DecideRequest(user_id=watched, provider="openai"))

        async def tiers(at: int) -> list[str]:
            answer, _ = await self.call(at, "Explain", request)
            return [step.detail for step in answer.steps if step.check == "tier"]

        for at in which:
            assert "'before'" in (await tiers(at))[0]
        await self.sql.execute("UPDATE users SET subscription_tier = 'after' WHERE id = $1", watched)
        for at in which:
            for _ in range(200 * _LIMIT_SECONDS):
                if "'after'" in (await tiers(at))[0]:
                    break
                await asyncio.sleep(0.005)
            else:
                raise AssertionError("a change never arrives")

    async def call(
        self, at: int, method: str, request: Any, *, hurry: float | None = None, safe: bool = True
    ) -> tuple[Any, bool]:
        """The answer, or the reason of the fault; and whether the same was asked before without an answer.

        Asks until it gets an answer. `hurry`: first gives up after so many seconds. `safe`: whether it may be
        asked again where the first may have been carried out.
        """
        again = False
        if hurry is not None:
            try:
                return await method_of(self.processes[at].channel, method)(request, timeout=hurry), False
            except grpc.aio.AioRpcError as error:
                # Where the sidecar sees first that the time is over, it is the latter.
                if error.code() not in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
                    return _reason_of(error), False
                again = True
        deadline = self.loop.time() + _LIMIT_SECONDS
        while True:
            try:
                call = method_of(self.processes[at].channel, method)
                return await call(request, timeout=_LIMIT_SECONDS), again
            except grpc.aio.AioRpcError as error:
                reason = _reason_of(error)
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    return reason, again
                if self.loop.time() > deadline or not (safe or reason == "ROW_LOCKED"):
                    raise AssertionError(f"{method} may have been carried out, or not") from error
                again = again or reason != "ROW_LOCKED"
            await asyncio.sleep(0.02)


def _reason_of(error: grpc.aio.AioRpcError) -> str:
    assert error.code() not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), error
    return error.code().name if rpc_status.from_call(error) is None else Refusal.of(error).info.reason


# -- what is done --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Action:
    """Something to ask of a sidecar for one user, and how the model looks at the answer."""

    user: User
    method: str
    request: Any
    check: Callable[[User, Any, bool], None]
    """Of the user, the answer or the fault's reason, and whether it was asked before without an answer.
    Raises AssertionError."""
    safe: bool = True
    key_state: bool = False
    """Whether it may change a key's state other than for the better, which its own sidecar sees at once."""


def linearise(user: User, done: Sequence[tuple[Action, Any, bool]]) -> User:
    """The user after all that was done at the same time, in an order in which every answer is right. Raises
    AssertionError where there is none.

    What was done decides how it ends, in whatever order, but for the holds that ran out: where the answers
    leave open whether they have been released, it stays open.
    """
    told: list[str] = []
    reached = {(frozenset[int](), len(user.limbo)): user}
    """After these were done, with so much in limbo."""
    for _ in done:
        before, reached = reached, {}
        for (past, _), state in before.items():
            for index, (action, answer, again) in enumerate(done):
                if index in past:
                    continue
                after = copy.deepcopy(state)
                try:
                    action.check(after, answer, again)
                except AssertionError as error:
                    told.append(str(error))
                else:
                    reached.setdefault((past | {index}, len(after.limbo)), after)
    assert reached, "There is no order in which this can have happened: " + "; ".join(
        [f"{action.method}({action.request!s}) -> {answer!s}" for action, answer, _ in done] + told[-3:]
    )
    return max(reached.values(), key=lambda state: len(state.limbo))


def _decided(answer: pb.DecideResponse | Fault) -> Decided | Fault:
    if isinstance(answer, str):
        return answer
    route = answer.WhichOneof("route")
    return Decided(
        id=answer.decision_id,
        mode=policy.Mode.Name(answer.mode).removeprefix("MODE_"),
        reason=policy.Reason.Name(answer.reason).removeprefix("REASON_"),
        replayed=answer.replayed,
        token=answer.key.handle or answer.ticket.ticket,
        ticket=(answer.ticket.hold_micros, answer.ticket.available_micros) if route == "ticket" else None,
        key_id=answer.key.key_id if route == "key" else None,
        denial=(
            policy.DenialReason.Name(answer.denial.reason).removeprefix("DENIAL_REASON_")
            if route == "denial"
            else None
        ),
    )


def _recorded(answer: pb.RecordResponse | Fault) -> Recorded | Fault:
    if isinstance(answer, str):
        return answer
    assert answer.durability == pb.DURABILITY_DATABASE
    state = policy.KeyState.Name(answer.key_state).removeprefix("KEY_STATE_")
    return Recorded(
        id=answer.record_id,
        charged=answer.charged_micros,
        released=answer.released_micros,
        balance=answer.balance_micros if answer.HasField("balance_micros") else None,
        cost_source=pb.CostSource.Name(answer.cost_source).removeprefix("COST_SOURCE_"),
        key_state=None if state == "UNSPECIFIED" else state,
        replayed=answer.replayed,
    )


def _item(result: Any) -> Any:
    """The answer or the reason in one result of a batch."""
    if result.HasField("response"):
        return result.response
    status: keyturn_status_pb2.Status = result.status
    reason = Refusal.of(status).info.reason
    assert reason != "INTERNAL", status
    return reason


# -- what is drawn -------------------------------------------------------------------------------------

WHO = st.integers(0, 7)
"""Which user, of as many as there are; likewise which decision, or key."""
AT = st.integers(0, SIDECARS - 1)
AMOUNTS = st.one_of(st.integers(0, 40), st.integers(0, 1500), st.sampled_from([0, 1, 100, 1000, 60_000]))
TOKENS = st.one_of(st.integers(0, 30), st.integers(0, 1000))
REQUEST_IDS = st.sampled_from([None, None, "a", "b", "c", "d", "\N{GRINNING FACE}"])
MODELS = st.sampled_from(["", PRICED, UNPRICED])
HURRY = st.sampled_from([None, None, None, 0.001, 0.003, 0.006])
FLAGS = st.fixed_dictionaries(
    {},
    optional={key: st.booleans() for key in ("byok_enabled", "byok_only_mode", "byok_uses_internal_credits")},
)
ASKS = st.builds(
    Ask,
    provider=st.sampled_from(["openai", "openai", "openai", "openai", "anthropic"]),
    request_id=REQUEST_IDS,
    model=MODELS,
    cost_micros=st.one_of(st.none(), AMOUNTS),
    tokens=st.one_of(st.none(), st.tuples(TOKENS, TOKENS)),
    constraint=st.sampled_from([Constraint.ANY, Constraint.ANY, Constraint.CREDITS_ONLY, *Constraint]),
).map(lambda ask: ask if ask.cost_micros is None else replace(ask, tokens=None))
ON_CREDITS = st.builds(
    Ask,
    request_id=REQUEST_IDS,
    cost_micros=AMOUNTS,
    constraint=st.just(Constraint.CREDITS_ONLY),
)
REPORTS = st.builds(
    Report,
    outcome=st.sampled_from(["SUCCESS", "SUCCESS", "SUCCESS", *_OUTCOMES]),
    cost_micros=st.one_of(st.none(), AMOUNTS),
    usage=st.one_of(st.none(), st.tuples(TOKENS, TOKENS, TOKENS, st.one_of(st.none(), st.integers(1, 2000)))),
    model=MODELS,
)
USERS = st.lists(
    st.tuples(
        st.sampled_from(["premium", "premium", "lifetime", "free"]),
        st.sampled_from([0, 1, 100, 1000, 60_000, 200_000]),
        st.lists(st.integers(-2, 2), max_size=2),
    ),
    min_size=1,
    max_size=6,
)


def _decisions(user: User) -> list[Hold | KeyUse]:
    return user.decisions


def _unrecorded(user: User) -> list[Hold | KeyUse]:
    return [decision for decision in user.decisions if decision.report is None]


def _done(user: User) -> list[Hold | KeyUse]:
    return [decision for decision in user.decisions if decision.report is not None]


def _open(user: User) -> list[Hold]:
    return [hold for hold in user.holds.values() if hold.state == "open"]


def _uses(user: User) -> list[KeyUse]:
    return list(user.uses.values())


def _keys(user: User) -> list[Key]:
    return user.keys


WORK = st.one_of(
    st.tuples(st.just("decide"), ASKS),
    st.tuples(st.just("record"), WHO, REPORTS),
    st.tuples(st.just("grant"), AMOUNTS, REQUEST_IDS),
)
"""One thing to do for a user."""


class LedgerMachine(RuleBasedStateMachine):
    """Users of its own for each run, on the sidecars and the database of `world`.

    No rule has a precondition: what there is depends on who came first, and hypothesis has to draw the same
    whatever there is. A rule that finds nothing to work on makes it, or does something else.
    """

    world: ClassVar[World]

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.stale: set[int] = set()
        """The sidecars that need not have heard of every change."""

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.world.do(work)

    # -- beginning and end -----------------------------------------------------------------------------

    @initialize(users=USERS)
    def begin(self, users: list[tuple[str, int, list[int]]]) -> None:
        self.do(self._begin(users))

    async def _begin(self, users: list[tuple[str, int, list[int]]]) -> None:
        sql = self.world.sql
        async with sql.transaction():
            # Not a user of a run before, whose end may not have been seen.
            for key, value in self.ledger.flags.items():
                await sql.execute("UPDATE feature_flags SET is_enabled = $2 WHERE key = $1", key, value)
            for tier, micros, priorities in users:
                user = User(id=f"u-{secrets.token_hex(8)}", tier=tier)
                await sql.execute("INSERT INTO users (id, subscription_tier) VALUES ($1, $2)", user.id, tier)
                if micros:
                    row = await sql.fetchrow(
                        "SELECT * FROM keyturn_grant_credits($1, $2, $3, NULL, '')", new_id(), user.id, micros
                    )
                    assert row is not None
                    user.write(str(row["transaction_id"]), micros)
                for priority in priorities:
                    await self._insert_key(user, priority)
                self.ledger.users.append(user)
        self.stale = set(range(SIDECARS))
        self.world.counts["runs"] += 1
        self.world.journal.clear()

    async def _insert_key(self, user: User, priority: int) -> None:
        key_id, secret = new_id(), f"sk-test-{secrets.token_hex(16)}"
        label = secrets.token_hex(4)
        await self.world.sql.execute(
            "INSERT INTO user_api_keys (user_id, id, provider, label, priority, encrypted_key, created_at)"
            # Of two with the same priority the older one comes first.
            " VALUES ($1, $2, 'openai', $3, $4, $5, clock_timestamp())",
            *(user.id, key_id, label, priority),
            seal(KEYRING, Secret(secret), user_id=user.id, provider="openai", row_id=key_id),
        )
        user.keys.append(Key(id=str(key_id), label=label, priority=priority, secret=secret))
        self.stale = set(range(SIDECARS))

    def teardown(self) -> None:
        """Every table says what the model says."""
        error = sys.exception()
        try:
            if error is None:
                self.do(self._check_tables())
        except AssertionError as found:
            error = found
            raise
        finally:
            # hypothesis ends a run by exceptions of its own as well.
            if isinstance(error, AssertionError) and not self.world.first_failure:
                self.world.first_failure = "\n".join([*self.world.journal, "", str(error)])

    async def _check_tables(self) -> None:
        sql = self.world.sql
        for user in self.ledger.users:
            account = await sql.fetchrow("SELECT * FROM credit_accounts WHERE user_id = $1", user.id)
            assert account is not None
            assert account["balance_micros"] == user.balance
            user.seen_held(account["held_micros"])
            books = await sql.fetch(
                "SELECT id, amount_micros FROM credit_transactions WHERE user_id = $1", user.id
            )
            assert sorted((str(row["id"]), row["amount_micros"]) for row in books) == sorted(user.books)
            holds = await sql.fetch("SELECT * FROM credit_holds WHERE user_id = $1", user.id)
            assert {str(row["id"]) for row in holds} == set(user.holds), f"holds of {user.id}"
            for row in holds:
                self._check_hold(user, user.holds[str(row["id"])], row)
            uses = await sql.fetch("SELECT * FROM api_key_usage WHERE user_id = $1", user.id)
            recorded = {use.id: use for use in user.uses.values() if use.report is not None}
            assert sorted(str(row["id"]) for row in uses) == sorted(recorded), f"uses of {user.id}"
            for row in uses:
                use = recorded[str(row["id"])]
                assert use.report is not None
                assert use.answer is not None
                assert row["outcome"] == use.report.outcome
                assert row["key_state"] == use.answer.key_state
                assert row["cost_micros"] == use.report.cost(use.model)[0]
                assert row["total_tokens"] == use.report.total_tokens
            for row in await sql.fetch("SELECT * FROM user_api_keys WHERE user_id = $1", user.id):
                key = user.key(str(row["id"]))
                assert key is not None
                assert (row["total_requests"], row["total_tokens"]) == (key.requests, key.tokens)
                assert (row["is_active"], row["is_valid"]) == (key.is_active, key.is_valid)

    @staticmethod
    def _check_hold(user: User, hold: Hold, row: Any) -> None:
        states = {"open": ["open"], "run_out": ["open", "expired"], "settled": ["settled"]}
        assert row["state"] in states[hold.state], f"{hold}: {row}"
        assert row["amount_micros"] == hold.amount
        if hold.report is not None:
            assert row["outcome"] == hold.report.outcome
            assert row["charged_micros"] == hold.report.charge(hold)[0]

    # -- actions ---------------------------------------------------------------------------------------

    def user(self, who: int, has: Callable[[User], object] = lambda user: True) -> User:
        """One of the users who have that, or of all where nobody does."""
        users = [user for user in self.ledger.users if has(user)] or self.ledger.users
        return users[who % len(users)]

    def some(
        self, who: int, which: int, at: int, wanted: Callable[[User], Sequence[T]]
    ) -> tuple[User, T | None]:
        """A user and one of what is wanted. Where nobody has any, a request is decided first: it may help."""
        user = self.user(who, wanted)
        if not wanted(user):
            self.do(self.one(self.decide_action(user, Ask(cost_micros=1)), at))
        found = wanted(user)
        return user, found[which % len(found)] if found else None

    def replace_user(self, user: User) -> None:
        """Another state of a user takes the place of the present one."""
        at = next(index for index, one in enumerate(self.ledger.users) if one.id == user.id)
        self.ledger.users[at] = user

    def decide_action(self, user: User, ask: Ask, failed: int = 0) -> Action:
        handles = _uses(user)[-failed:] if failed else []
        ask = replace(ask, refused=frozenset((use.key_id, use.revision) for use in handles))
        request = pb.DecideRequest(
            user_id=user.id,
            provider=ask.provider,
            request_id=ask.request_id or "",
            model=ask.model,
            constraint=policy.Constraint.Value(f"CONSTRAINT_{ask.constraint.name}"),
            failed_key_handles=[use.token for use in handles],
        )
        if ask.cost_micros is not None:
            request.cost_micros = ask.cost_micros
        elif ask.tokens is not None:
            request.tokens.input_tokens, request.tokens.max_output_tokens = ask.tokens

        def check(user: User, answer: Any, again: bool) -> None:
            self.ledger.decide(user, ask, _decided(answer), again=again)

        return Action(
            user=user, method="Decide", request=request, check=check, safe=ask.request_id is not None
        )

    def record_action(
        self, user: User, decision: Hold | KeyUse, report: Report, *, too_late: bool = False
    ) -> Action:
        decision_id, token = decision.id, decision.token
        if too_late:
            token = self._aged(decision)
        request = pb.RecordRequest(
            outcome=pb.Outcome.Value(f"OUTCOME_{report.outcome}"),
            model=report.model,
            cost_micros=report.cost_micros,
            # Long enough not to end by itself meanwhile.
            retry_after=Duration(seconds=3600),
        )
        if report.outcome == "UNKNOWN":
            request.outcome = _FUTURE_OUTCOME  # type: ignore[assignment]  # as a newer client has it
        if isinstance(decision, Hold):
            request.credit_ticket = token
        else:
            request.key_handle = token
        if report.usage is not None:
            read, written, cached, total = report.usage
            request.usage.CopyFrom(
                pb.Usage(
                    input_tokens=read, output_tokens=written, cache_read_tokens=cached, total_tokens=total
                )
            )

        def check(user: User, answer: Any, again: bool) -> None:
            self.ledger.record(
                user, user.decision(decision_id), report, _recorded(answer), again=again, too_late=too_late
            )

        return Action(
            user=user,
            method="Record",
            request=request,
            check=check,
            key_state=isinstance(decision, KeyUse) and report.outcome != "SUCCESS",
        )

    def _aged(self, decision: Hold | KeyUse) -> str:
        """The token as it would be if it had expired long ago."""
        sealer, then = self.world.sealer, datetime.now(UTC) - _LONG_AGO
        if isinstance(decision, Hold):
            return sealer.seal_ticket(replace(sealer.open_ticket(decision.token), expires_at=then))
        return sealer.seal_handle(replace(sealer.open_handle(decision.token), expires_at=then))

    def grant_action(self, user: User, amount: int, request_id: str | None) -> Action:
        amount = max(amount, 1)
        request = credit_service_pb2.GrantCreditsRequest(
            user_id=user.id, amount_micros=amount, request_id=request_id or ""
        )

        def check(user: User, answer: Any, again: bool) -> None:
            seen = answer
            if not isinstance(answer, str):
                seen = (answer.transaction_id, answer.balance_micros, answer.replayed)
            self.ledger.grant(user, amount, request_id, seen, again=again)

        return Action(
            user=user, method="GrantCredits", request=request, check=check, safe=request_id is not None
        )

    def action(self, user: User, work: tuple[Any, ...], *, safe: bool = False) -> Action:
        """What a drawn piece of work comes to. With `safe`, one that may be asked twice."""
        match work:
            case ("decide", ask):
                ask = replace(ask, request_id=ask.request_id or "x") if safe else ask
                return self.decide_action(user, ask)
            case ("record", which, report):
                if not user.decisions:
                    return self.decide_action(user, Ask(request_id="first"))
                return self.record_action(user, user.decisions[which % len(user.decisions)], report)
            case ("grant", amount, request_id):
                return self.grant_action(user, amount, (request_id or "x") if safe else request_id)
        raise AssertionError(work)

    # -- doing them ------------------------------------------------------------------------------------

    async def _ready(self, at: set[int]) -> None:
        """These sidecars decide with what is in force."""
        if stale := self.stale & at:
            await self.world.settle_push(stale)
            self.stale -= stale

    def _saw(self, action: Action, at: int, answer: Any) -> None:
        self.world.count(action.method)
        self.world.journal.append(f"{at}: {action.method}({action.request!s}) -> {answer!s}")
        if action.method == "Record":
            if not isinstance(answer, str):
                self.world.acknowledged.append(answer.record_id)
            # The sidecar that took it knows at once that a key is worse; that it is better, by the push.
            self.stale |= set(range(SIDECARS)) - ({at} if action.key_state else set())

    async def one(self, action: Action, at: int, hurry: float | None = None) -> None:
        """Does it, and compares."""
        await self._ready({at})
        if not action.safe:
            hurry = None
        answer, again = await self.world.call(
            at, action.method, action.request, hurry=hurry, safe=action.safe
        )
        if again:
            self.world.counts["given up and asked again"] += 1
        self._saw(action, at, answer)
        action.check(action.user, answer, again)

    async def together(
        self,
        actions: Sequence[Action],
        first_at: int,
        meanwhile: Callable[[], Awaitable[None]] | None = None,
        delay: float = 0,
    ) -> list[tuple[Action, Any, bool]]:
        """Does all at the same time, on one sidecar and the other in turn; what each came to."""
        await self._ready(set(range(SIDECARS)))

        async def disturb() -> None:
            if meanwhile is not None:
                await asyncio.sleep(delay)
                await meanwhile()

        places = [(first_at + index) % SIDECARS for index in range(len(actions))]
        try:
            async with asyncio.TaskGroup() as tasks:
                asked = [
                    tasks.create_task(self.world.call(at, action.method, action.request, safe=action.safe))
                    for action, at in zip(actions, places, strict=True)
                ]
                tasks.create_task(disturb())
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        answers = [task.result() for task in asked]
        for action, at, (answer, _) in zip(actions, places, answers, strict=True):
            self._saw(action, at, answer)
        return [(action, *answer) for action, answer in zip(actions, answers, strict=True)]

    # -- one after the other ---------------------------------------------------------------------------

    @rule(who=WHO, at=AT, ask=ASKS, failed=st.integers(0, 2), hurry=HURRY)
    def decide(self, who: int, at: int, ask: Ask, failed: int, hurry: float | None) -> None:
        user = self.user(who)
        action = self.decide_action(user, ask, failed)
        # One that is denied leaves nothing to find again, so nothing would show what became of the first.
        expected = self.ledger.expected(user, ask)
        given = expected.verdict is not None and expected.verdict.path is not None
        self.do(self.one(action, at, hurry if given and not failed else None))

    @rule(who=WHO, at=AT, ask=ASKS, report=REPORTS)
    def request(self, who: int, at: int, ask: Ask, report: Report) -> None:
        """A request's ordinary life: decided, then recorded."""
        user = self.user(who)
        self.do(self.one(self.decide_action(user, ask), at))
        if left := _unrecorded(user):
            self.do(self.one(self.record_action(user, left[-1], report), at))

    @rule(
        who=WHO, which=WHO, at=AT, report=REPORTS, too_late=st.sampled_from([False] * 9 + [True]), hurry=HURRY
    )
    def record(
        self, who: int, which: int, at: int, report: Report, too_late: bool, hurry: float | None
    ) -> None:
        user, decision = self.some(who, which, at, _decisions)
        if decision is not None:
            self.do(self.one(self.record_action(user, decision, report, too_late=too_late), at, hurry))

    @rule(who=WHO, which=WHO, at=AT, report=REPORTS, hurry=HURRY)
    def record_what_is_left(self, who: int, which: int, at: int, report: Report, hurry: float | None) -> None:
        user, decision = self.some(who, which, at, _unrecorded)
        if decision is not None:
            self.do(self.one(self.record_action(user, decision, report), at, hurry))

    @rule(who=WHO, which=WHO, at=AT, too_late=st.booleans())
    def repeat_a_record(self, who: int, which: int, at: int, too_late: bool) -> None:
        user, decision = self.some(who, which, at, _done)
        if decision is not None and decision.report is not None:
            self.do(self.one(self.record_action(user, decision, decision.report, too_late=too_late), at))

    @rule(who=WHO, which=WHO, at=AT, hurry=HURRY)
    def redeem(self, who: int, which: int, at: int, hurry: float | None) -> None:
        user, found = self.some(who, which, at, _uses)
        if found is None:
            return
        use = found

        def check(user: User, answer: Any, again: bool) -> None:
            seen = answer if isinstance(answer, str) else answer.secret
            self.ledger.redeem(user, use, seen, again=again)

        request = pb.RedeemRequest(key_handle=use.token)
        self.do(self.one(Action(user=user, method="Redeem", request=request, check=check), at, hurry))

    @rule(who=WHO, at=AT, amount=AMOUNTS, request_id=REQUEST_IDS, hurry=HURRY)
    def grant(self, who: int, at: int, amount: int, request_id: str | None, hurry: float | None) -> None:
        self.do(self.one(self.grant_action(self.user(who), amount, request_id), at, hurry))

    @rule(who=WHO, at=AT)
    def look_at_the_balance(self, who: int, at: int) -> None:
        user = self.user(who)

        def check(user: User, answer: Any, again: bool) -> None:
            assert answer.balance_micros == user.balance
            assert answer.available_micros == answer.balance_micros - answer.held_micros
            user.seen_held(answer.held_micros)

        request = credit_service_pb2.GetBalanceRequest(user_id=user.id)
        self.do(self.one(Action(user=user, method="GetBalance", request=request, check=check), at))

    # -- many at once ----------------------------------------------------------------------------------

    @rule(who=WHO, at=AT, asks=st.lists(ON_CREDITS, min_size=2, max_size=6), same=st.booleans())
    def race_for_a_balance(self, who: int, at: int, asks: list[Ask], same: bool) -> None:
        """Many holds of one user at once, on both sidecars; `same`, all for one amount."""
        if same:
            asks = [replace(ask, cost_micros=asks[0].cost_micros) for ask in asks]
        self._race(who, at, [("decide", ask) for ask in asks])

    @rule(who=WHO, at=AT, which=WHO, report=REPORTS, other=REPORTS, same=st.integers(2, 4))
    def race_for_a_record(
        self, who: int, at: int, which: int, report: Report, other: Report, same: int
    ) -> None:
        """The same record several times at once, and another one of the same decision."""
        user, decision = self.some(who, which, at, _unrecorded)
        if decision is None:
            return
        reports = [report] * same + [other]
        self._linearised(user, at, [self.record_action(user, decision, each) for each in reports])

    @rule(
        who=WHO,
        at=AT,
        asks=st.lists(ON_CREDITS, min_size=1, max_size=3),
        reports=st.lists(REPORTS, min_size=1, max_size=3),
        grant=st.tuples(AMOUNTS, REQUEST_IDS),
    )
    def race_of_everything(
        self, who: int, at: int, asks: list[Ask], reports: list[Report], grant: tuple[int, str | None]
    ) -> None:
        """Holds, records of different tickets and a grant of one user, all at once."""
        user = self.user(who)
        tickets = [hold for hold in user.holds.values() if hold.report is None][-len(reports) :]
        actions = [
            *(self.decide_action(user, ask) for ask in asks),
            *(self.record_action(user, hold, report) for hold, report in zip(tickets, reports, strict=False)),
            self.grant_action(user, *grant),
        ]
        self._linearised(user, at, actions)

    def _race(self, who: int, at: int, works: Sequence[tuple[Any, ...]]) -> None:
        user = self.user(who)
        self._linearised(user, at, [self.action(user, work) for work in works])

    def _linearised(self, user: User, at: int, actions: Sequence[Action]) -> None:
        done = self.do(self.together(actions, at))
        self.replace_user(linearise(user, done))

    @rule(
        at=AT,
        works=st.lists(WORK, min_size=2, max_size=8),
        disturbance=st.sampled_from(["none", "cut", "kill", "kill", "term"]),
        victim=AT,
        delay=st.sampled_from([0, 0.001, 0.002, 0.004, 0.008, 0.015]),
    )
    def burst(
        self, at: int, works: list[tuple[Any, ...]], disturbance: str, victim: int, delay: float
    ) -> None:
        """Something for each user at once; meanwhile connections break, or a sidecar dies or ends. Whoever
        gets no answer asks again."""
        world = self.world
        if disturbance in ("kill", "term"):
            if world.operations < world.next_crash:
                disturbance = "cut"
            else:
                world.next_crash = world.operations + world.crash_every
        actions = [
            self.action(user, work, safe=True) for user, work in zip(self.ledger.users, works, strict=False)
        ]

        async def meanwhile() -> None:
            match disturbance:
                case "cut":
                    await world.cut()
                case "kill":
                    await world.restart(victim, signal.SIGKILL)
                case "term":
                    await world.restart(victim, signal.SIGTERM)
            self.stale = set(range(SIDECARS))

        done = self.do(self.together(actions, at, meanwhile, delay))
        world.counts[f"disturbed: {disturbance}"] += 1
        world.journal.append(f"meanwhile {disturbance}")
        for action, answer, again in done:
            if again:
                world.counts["lost and asked again"] += 1
            action.check(action.user, answer, again)

    @rule(at=AT, asks=st.lists(ASKS, min_size=1, max_size=6))
    def batch_of_decisions(self, at: int, asks: list[Ask]) -> None:
        """One for each user. Whole answers only: what may not be asked twice has an id here."""
        works = [("decide", ask) for ask in asks]
        self._batch(at, works, "BatchDecide", pb.BatchDecideRequest)

    @rule(at=AT, which=WHO, reports=st.lists(REPORTS, min_size=1, max_size=6))
    def batch_of_records(self, at: int, which: int, reports: list[Report]) -> None:
        """One for each user who has something to record."""
        works = [("record", which, report) for report in reports]
        self._batch(at, works, "BatchRecord", pb.BatchRecordRequest)

    def _batch(self, at: int, works: Sequence[tuple[Any, ...]], method: str, request_type: Any) -> None:
        of_batch = method.removeprefix("Batch")
        actions = [
            self.action(user, work, safe=True) for user, work in zip(self.ledger.users, works, strict=False)
        ]
        actions = [action for action in actions if action.method == of_batch]
        if not actions:
            return

        async def run() -> Any:
            await self._ready({at})
            request = request_type(requests=[action.request for action in actions])
            return await self.world.call(at, method, request)

        answer, again = self.do(run())
        assert not isinstance(answer, str), answer
        assert len(answer.results) == len(actions)
        for action, result in zip(actions, answer.results, strict=True):
            found = _item(result)
            if found == "ROW_LOCKED":  # nothing was done
                self.do(self.one(action, at))
                continue
            self._saw(action, at, found)
            action.check(action.user, found, again)
        self.world.counts[f"in a {method}"] += len(actions)

    # -- what changes meanwhile ------------------------------------------------------------------------

    @rule(who=WHO, which=WHO, how_many=st.integers(1, 3))
    def time_passes(self, who: int, which: int, how_many: int) -> None:
        """Holds run out."""
        user = self.user(who, _open)
        open_ones = _open(user)
        chosen = open_ones[which % (len(open_ones) or 1) :][:how_many]
        for hold in chosen:
            self._sql(
                # It makes another ticket of the same hold, since the ticket says when it expires.
                "UPDATE credit_holds SET expires_at = clock_timestamp() - interval '1 second'"
                " WHERE user_id = $1 AND id = $2::uuid",
                *(user.id, hold.id),
            )
            self.ledger.run_out(user, [hold])

    @rule()
    def sweep(self) -> None:
        """As each sidecar does it, every so often."""
        self._sql("SELECT * FROM keyturn_expire_holds(1000)")
        self.ledger.swept()

    @rule(flags=FLAGS)
    def flags_by_sql(self, flags: dict[str, bool]) -> None:
        for key, value in flags.items():
            self._sql("UPDATE feature_flags SET is_enabled = $2 WHERE key = $1", key, value)
        self.ledger.flags.update(flags)
        self.stale = set(range(SIDECARS))

    @rule(at=AT, flags=FLAGS)
    def flags_by_rpc(self, at: int, flags: dict[str, bool]) -> None:
        if flags:
            request = flag_service_pb2.SetFlagsRequest(flags=flags, reason="a test", acknowledge_lockout=True)
            answer = self._operator(at, "SetFlags", request)
            self.ledger.flags.update(flags)
            assert answer.mode == policy.Mode.Value(f"MODE_{self.ledger.mode.name}")

    @rule(at=AT, mode=st.sampled_from(Mode))
    def mode_by_rpc(self, at: int, mode: Mode) -> None:
        request = flag_service_pb2.SetModeRequest(
            mode=policy.Mode.Value(f"MODE_{mode.name}"), reason="a test", acknowledge_lockout=True
        )
        self._operator(at, "SetMode", request)
        self.ledger.flags.update(flags_of(mode))
        assert self.ledger.mode is mode

    @rule(who=WHO, tier=st.sampled_from(["premium", "lifetime", "free", "nobody-knows"]), at=st.none() | AT)
    def tier_changes(self, who: int, tier: str, at: int | None) -> None:
        user = self.user(who)
        if at is None:
            self._sql("UPDATE users SET subscription_tier = $2 WHERE id = $1", user.id, tier)
            self.stale = set(range(SIDECARS))
        else:
            self._operator(at, "PutUser", user_service_pb2.PutUserRequest(user_id=user.id, tier=tier))
        user.tier = tier

    @rule(who=WHO, priority=st.integers(-2, 2))
    def a_key_comes(self, who: int, priority: int) -> None:
        user = self.user(who)
        if len(user.keys) < 4:
            self.do(self._insert_key(user, priority))
            self.world.count("SQL")

    def a_key(self, who: int, which: int) -> tuple[User, Key]:
        """One of somebody's keys, which is made if need be."""
        user = self.user(who, _keys)
        if not user.keys:
            self.do(self._insert_key(user, 0))
        return user, user.keys[which % len(user.keys)]

    @rule(who=WHO, which=WHO, at=AT)
    def a_key_goes(self, who: int, which: int, at: int) -> None:
        user, key = self.a_key(who, which)
        user.keys.remove(key)
        request = key_service_pb2.DeleteKeyRequest(user_id=user.id, key_id=key.id)
        self._operator(at, "DeleteKey", request)

    @rule(who=WHO, which=WHO, at=AT, active=st.booleans())
    def a_key_is_switched(self, who: int, which: int, at: int, active: bool) -> None:
        user, key = self.a_key(who, which)
        request = key_service_pb2.UpdateKeyRequest(user_id=user.id, key_id=key.id, is_active=active)
        self._operator(at, "UpdateKey", request)
        key.is_active = active

    @rule(who=WHO, which=WHO, at=AT)
    def a_key_is_replaced(self, who: int, which: int, at: int) -> None:
        """Its outcomes so far say nothing about the new secret. Nobody plays the provider: it stays
        unverified."""
        user, key = self.a_key(who, which)
        if user.tier in ("premium", "lifetime") and self.ledger.flags["byok_enabled"]:
            secret = f"sk-test-{secrets.token_hex(16)}"
            # It asks for what is in force, as a decision does.
            self.do(self._ready({at}))
            request = key_service_pb2.SaveKeyRequest(
                user_id=user.id, provider="openai", secret=secret, label=key.label
            )
            answer = self._operator(at, "SaveKey", request)
            assert answer.replaced
            key.secret, key.revision = secret, key.revision + 1
            key.is_active = key.is_valid = True
            key.is_cooling = key.is_verified = False

    @rule(who=WHO, which=WHO)
    def a_key_may_try_again(self, who: int, which: int) -> None:
        user, key = self.a_key(who, which)
        self._sql(
            "UPDATE user_api_keys SET is_valid = true, cooldown_until = NULL"
            " WHERE user_id = $1 AND id = $2::uuid",
            *(user.id, key.id),
        )
        key.is_valid, key.is_cooling = True, False
        self.stale = set(range(SIDECARS))

    def _sql(self, statement: str, *values: Any) -> None:
        self.do(self.world.sql.fetch(statement, *values))
        self.world.count("SQL")
        self.world.journal.append(f"{statement} {values}")

    def _operator(self, at: int, method: str, request: Any) -> Any:
        """The answer to an operator's call, which its own sidecar acts upon at once."""
        answer, _ = self.do(self.world.call(at, method, request))
        assert not isinstance(answer, str), f"{method} {request}: {answer}"
        self.world.count(method)
        self.world.journal.append(f"{at}: {method}({request!s})")
        self.stale |= set(range(SIDECARS)) - {at}
        return answer


# -- running it ----------------------------------------------------------------------------------------


async def open_world(
    stack: AsyncExitStack, dsn: str, sql: Connection, directory: Path, *, crash_every: int
) -> World:
    """Two sidecars on a database, until the end of the stack."""
    await sql.execute(
        "INSERT INTO model_prices (provider, model, input_micros_per_mtok, output_micros_per_mtok)"
        " SELECT id, $1, 1000000, 2000000 FROM api_providers",
        PRICED,
    )
    world = World(
        dsn=dsn,
        sql=sql,
        directory=directory,
        loop=asyncio.get_running_loop(),
        crash_every=crash_every,
    )
    stack.push_async_callback(world.close)
    for at in range(SIDECARS):
        await world.start(at)
    # The first sidecar on a database has made it.
    world.sealer = await sealer_of(sql)
    return world


async def run_machine(world: World, *, number: int, runs: int, steps: int, shrink: bool = True) -> None:
    """So many runs of so many steps, drawn from the seed `number`. Raises what the model says, with the
    shortest way to it that was found if `shrink`."""

    class Machine(LedgerMachine):
        pass

    Machine.world = world
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    try:
        await asyncio.to_thread(
            run_state_machine_as_test,
            seed(number)(Machine),
            settings=settings(
                max_examples=runs,
                stateful_step_count=steps,
                deadline=None,
                database=None,
                phases=phases,
                print_blob=True,
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
    except Exception as error:
        if world.first_failure:
            error.add_note(f"Seed {number}. What was seen first:\n{world.first_failure}")
        raise
