"""What is measured: real calls by users who are really there, and what must come of each."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import cycle, islice
from typing import Any

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import Message

from keyturn.v1 import policy_pb2, routing_service_pb2_grpc
from keyturn.v1 import routing_service_pb2 as pb
from tests.factories import Connection, Factory

_PROVIDER = "openai"
_MODEL = "gpt-4o"
_BALANCE_MICROS = 10**12  # a million dollars each: holds stay open for as long as the bench runs
_BATCH = 500
ITEMS = 50
"""In each batch that is measured: as many as fit into one frame."""
_DURATION = duration_pb2.Duration()
_DURATION.FromTimedelta(timedelta(seconds=1.8))


class Gateway:
    """Makes the users, and the requests for them."""

    def __init__(self, channel: grpc.aio.Channel, connection: Connection) -> None:
        self._stub: Any = routing_service_pb2_grpc.RoutingServiceStub(channel)
        self._connection = connection
        self._with_keys: list[str] = []
        self._with_credits: list[str] = []
        self._payers_constraint = policy_pb2.CONSTRAINT_UNSPECIFIED

    def serve(self, users: Sequence[str]) -> None:
        """Ask for these from now on, who have a key of their own and credits, each."""
        self._with_keys = self._with_credits = list(users)
        self._payers_constraint = policy_pb2.CONSTRAINT_CREDITS_ONLY

    async def make_users(self, count: int) -> None:
        """`count` users with a key of their own, as many with credits; no rate limit for either."""
        factory = Factory(self._connection)
        async with self._connection.transaction():
            await self._connection.execute(
                "INSERT INTO subscription_tiers (name, rank) SELECT 'bench', rank FROM subscription_tiers"
                " WHERE name = 'premium'"
            )
            for number in range(count):
                owner = await factory.user("bench", name=f"user-with-key-{number:06}")
                await factory.key(owner, _PROVIDER, secret=f"sk-proj-{secrets.token_urlsafe(48)}")
                self._with_keys.append(owner)
                payer = await factory.user(
                    "bench", name=f"user-with-credits-{number:06}", micros=_BALANCE_MICROS
                )
                self._with_credits.append(payer)
        await self._decided(_ask, self._with_keys, count)
        await self._decided(self._ask_for_credits, self._with_credits, count)

    async def call(self, measurement: Measurement) -> tuple[bytes, bytes]:
        """One real call: its request and its response."""
        (request,) = await measurement.bodies(self, 1)
        message = getattr(pb, f"{measurement.method}Request").FromString(request)
        answer = await getattr(self._stub, measurement.method)(message, timeout=10)
        return request, answer.SerializeToString()

    async def count(self, measurement: Measurement) -> int:
        """The rows so far."""
        return int(await self._connection.fetchval(measurement.rows)) if measurement.rows else 0

    async def asks_for_keys(self, count: int) -> list[bytes]:
        """Decides that are answered with a key."""
        users = self._with_keys[:count]
        return [_ask(user).SerializeToString() for user in users]

    async def asks_for_credits(self, count: int) -> list[bytes]:
        """Decides that are answered with a ticket."""
        users = islice(cycle(self._with_credits), count)
        return [self._ask_for_credits(user).SerializeToString() for user in users]

    async def tickets_to_settle(self, count: int) -> list[bytes]:
        """Records of as many open tickets."""
        return [
            _report(credit_ticket=decision.ticket.ticket)
            for decision in await self._decided(self._ask_for_credits, self._with_credits, count)
        ]

    async def batches_for_keys(self, count: int) -> list[bytes]:
        """BatchDecides that are answered with keys."""
        return _batches(pb.BatchDecideRequest, map(_ask, cycle(self._with_keys)), count)

    async def batches_for_credits(self, count: int) -> list[bytes]:
        """BatchDecides that are answered with tickets."""
        return _batches(pb.BatchDecideRequest, map(self._ask_for_credits, cycle(self._with_credits)), count)

    async def batches_of_tickets(self, count: int) -> list[bytes]:
        """BatchRecords of open tickets."""
        reports = map(pb.RecordRequest.FromString, await self.tickets_to_settle(count * ITEMS))
        return _batches(pb.BatchRecordRequest, reports, count)

    async def batches_of_uses(self, count: int) -> list[bytes]:
        """BatchRecords of uses of keys."""
        reports = map(pb.RecordRequest.FromString, await self.uses_of_keys(count * ITEMS))
        return _batches(pb.BatchRecordRequest, reports, count)

    async def uses_of_keys(self, count: int) -> list[bytes]:
        """Records of as many handles."""
        return [
            _report(key_handle=decision.key.handle)
            for decision in await self._decided(_ask, self._with_keys, count)
        ]

    def _ask_for_credits(self, user_id: str) -> pb.DecideRequest:
        request = _ask(user_id)
        request.constraint = self._payers_constraint
        return request

    async def _decided(
        self, ask: Callable[[str], pb.DecideRequest], users: Sequence[str], count: int
    ) -> list[pb.DecideResponse]:
        decisions: list[pb.DecideResponse] = []
        asking = cycle(users)
        while len(decisions) < count:
            asks = [ask(user) for user in islice(asking, min(_BATCH, count - len(decisions)))]
            answer = await self._stub.BatchDecide(pb.BatchDecideRequest(requests=asks), timeout=60)
            decisions += [result.response for result in answer.results]
        return decisions


def _ask(user_id: str) -> pb.DecideRequest:
    """As our clients ask: with a request id, so that it can be asked again."""
    return pb.DecideRequest(
        request_id=secrets.token_hex(16),
        user_id=user_id,
        provider=_PROVIDER,
        model=_MODEL,
        service_type="copilot",
        tokens=pb.TokenEstimate(input_tokens=1200, max_output_tokens=1024),
        key_delivery=pb.KEY_DELIVERY_INLINE,
    )


def _batches(request: Any, items: Iterator[Message], count: int) -> list[bytes]:
    return [request(requests=islice(items, ITEMS)).SerializeToString() for _ in range(count)]


def _report(**settles: str) -> bytes:
    report = pb.RecordRequest(
        outcome=pb.OUTCOME_SUCCESS,
        usage=pb.Usage(input_tokens=1180, output_tokens=412, cache_read_tokens=1024),
        model=_MODEL,
        endpoint="/v1/chat/completions",
        response_time=_DURATION,
        http_status=200,
        **settles,  # type: ignore[arg-type]
    )
    return report.SerializeToString()


def _has_secret(response: bytes) -> bool:
    return bool(pb.DecideResponse.FromString(response).key.secret)


def _has_ticket(response: bytes) -> bool:
    return bool(pb.DecideResponse.FromString(response).ticket.ticket)


def _all_have(what: str) -> Callable[[bytes], bool]:
    def check(response: bytes) -> bool:
        results = pb.BatchDecideResponse.FromString(response).results
        return len(results) == ITEMS and all(one.response.HasField(what) for one in results)  # type: ignore[arg-type]

    return check


def _all_are_durable(response: bytes) -> bool:
    results = pb.BatchRecordResponse.FromString(response).results
    durable = [one for one in results if one.response.durability == pb.DURABILITY_DATABASE]
    return len(durable) == ITEMS


def _is_durable(response: bytes) -> bool:
    answer = pb.RecordResponse.FromString(response)
    return answer.durability == pb.DURABILITY_DATABASE and not answer.replayed


def _is_charged(response: bytes) -> bool:
    return _is_durable(response) and pb.RecordResponse.FromString(response).charged_micros > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One kind of call, as a gateway makes it."""

    name: str
    what: str
    method: str
    bodies: Callable[[Gateway, int], Awaitable[list[bytes]]]
    """Requests for so many calls; where they may go round, one a user at the most."""
    is_right: Callable[[bytes], bool]
    """Whether an answer is the one that is to be measured."""
    once: bool = False
    """Each request is made once; else they go round."""
    rows: str | None = None
    """SQL that counts what the calls have left behind: one row each."""
    by_h2load: bool = False
    """Driven by h2load, with the first request alone."""
    unary: str | None = None
    """Of a batch: the measurement of its items, each in a call of its own."""

    @property
    def items(self) -> int:
        """In each call."""
        return 1 if self.unary is None else ITEMS

    @property
    def path(self) -> str:
        """The method's path in HTTP/2."""
        return f"/keyturn.v1.RoutingService/{self.method}"


MEASUREMENTS = (
    Measurement(
        name="decide-own-key",
        what="Decide: own key, secret INLINE, profile cached",
        method="Decide",
        bodies=Gateway.asks_for_keys,
        is_right=_has_secret,
    ),
    Measurement(
        name="decide-own-key-h2load",
        what="the same by h2load, for one user: is our generator in the way?",
        method="Decide",
        bodies=Gateway.asks_for_keys,
        is_right=_has_secret,
        by_h2load=True,
    ),
    Measurement(
        name="decide-credits",
        what="Decide: credits, a durable hold each",
        method="Decide",
        bodies=Gateway.asks_for_credits,
        is_right=_has_ticket,
        once=True,
        rows="SELECT count(*) FROM credit_holds",
    ),
    Measurement(
        name="record-ticket",
        what="Record: a ticket, a durable charge each",
        method="Record",
        bodies=Gateway.tickets_to_settle,
        is_right=_is_charged,
        once=True,
        rows="SELECT count(*) FROM credit_transactions WHERE transaction_type = 'deduction'",
    ),
    Measurement(
        name="record-own-key",
        what="Record: an own key's use, durable each",
        method="Record",
        bodies=Gateway.uses_of_keys,
        is_right=_is_durable,
        once=True,
        rows="SELECT count(*) FROM api_key_usage",
    ),
    Measurement(
        name="batch-own-key",
        what=f"BatchDecide: {ITEMS} items as in decide-own-key; rates are items a second",
        method="BatchDecide",
        bodies=Gateway.batches_for_keys,
        is_right=_all_have("key"),
        unary="decide-own-key",
    ),
    Measurement(
        name="batch-credits",
        what=f"BatchDecide: {ITEMS} items as in decide-credits",
        method="BatchDecide",
        bodies=Gateway.batches_for_credits,
        is_right=_all_have("ticket"),
        once=True,
        rows="SELECT count(*) FROM credit_holds",
        unary="decide-credits",
    ),
    Measurement(
        name="batch-tickets",
        what=f"BatchRecord: {ITEMS} items as in record-ticket",
        method="BatchRecord",
        bodies=Gateway.batches_of_tickets,
        is_right=_all_are_durable,
        once=True,
        rows="SELECT count(*) FROM credit_transactions WHERE transaction_type = 'deduction'",
        unary="record-ticket",
    ),
    Measurement(
        name="batch-own-key-uses",
        what=f"BatchRecord: {ITEMS} items as in record-own-key",
        method="BatchRecord",
        bodies=Gateway.batches_of_uses,
        is_right=_all_are_durable,
        once=True,
        rows="SELECT count(*) FROM api_key_usage",
        unary="record-own-key",
    ),
)
"""In the order of a request's life."""
