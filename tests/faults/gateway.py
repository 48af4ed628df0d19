"""A gateway under load that asks again until it is answered, whatever breaks."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

from keyturn.v1 import routing_service_pb2 as pb
from tests.support import Caller, Fault

CHARGE_MICROS = 3
_SEVERAL = 8
_PAUSE_SECONDS = 0.05


class Gateway:
    """Decides and records without end, several requests at once, and repeats what was not answered.

    `callers` are those of the sidecars as they are now: each call is made on one of them, a repeat on the
    next.
    """

    def __init__(self, callers: Callable[[], Sequence[Caller]], users: Sequence[str]) -> None:
        self.codes: Counter[grpc.StatusCode] = Counter()
        """How often it was not answered, by status."""
        self.durabilities: Counter[int] = Counter()
        self.tickets = 0
        self.known: set[str] = set()
        """Users that were decided on from the database."""
        self.unanswered: list[str] = []
        """The decisions whose record the end came before."""
        self._callers = callers
        self._users = users
        self._is_over = False
        self._tries = 0

    async def run(self) -> None:
        """Serve until told to stop."""
        async with asyncio.TaskGroup() as tasks:
            for number in range(_SEVERAL):
                tasks.create_task(self._serve(number))

    def stop(self) -> None:
        """Take no new request; those under way are tried once more."""
        self._is_over = True

    @property
    def answered(self) -> int:
        """How many requests went through from the decision to the record."""
        return sum(self.durabilities.values())

    async def _serve(self, number: int) -> None:
        # Always of the same user, so that those with own keys go on while the database is away.
        user, count = self._users[number % len(self._users)], 0
        while not self._is_over:
            ask: dict[str, Any] = {"request_id": f"{number}-{count}", "cost_micros": 10}
            count += 1
            decision = await self._insist(lambda caller, ask=ask: caller.decide(user, **ask))
            if decision is None:
                continue
            if not decision.degraded:
                self.known.add(user)
            recorded = await self._insist(
                lambda caller, decision=decision: caller.record(
                    decision, pb.OUTCOME_SUCCESS, cost_micros=CHARGE_MICROS
                )
            )
            if recorded is None:
                self.unanswered.append(decision.decision_id)
            else:
                self.durabilities[recorded.durability] += 1
                self.tickets += decision.HasField("ticket")

    async def _insist(self, call: Callable[..., Awaitable[Any]]) -> Any:
        """The answer of a call, which may have to be repeated; None where the end comes first."""
        while True:
            callers = self._callers()
            self._tries += 1
            try:
                return await call(callers[self._tries % len(callers)])
            except Fault as fault:
                self.codes[fault.code] += 1
                if fault.code is not grpc.StatusCode.UNAVAILABLE:
                    raise
                if self._is_over:
                    return None
                await asyncio.sleep(_PAUSE_SECONDS)
