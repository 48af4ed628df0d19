"""RoutingService: the data plane. protos/keyturn/v1/routing_service.proto says what each method does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.message import Message

from keyturn.v1 import routing_service_pb2
from keyturn_server.access import Caller
from keyturn_server.decide import Ask, Decision, KeyRoute
from keyturn_server.errors import InvalidFields
from keyturn_server.keys.tokens import InvalidToken
from keyturn_server.rpc.decode import ask_from, check_batch, check_handle, report_from
from keyturn_server.rpc.encode import decision_message, explanation_message, record_message
from keyturn_server.rpc.guard import ANYBODY, DATA_PLANE, MAX_BATCH_BYTES, Guard, Method, Urgency
from keyturn_server.rpc.status import BadToken, item_status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from keyturn_server.audit import Audit
    from keyturn_server.decide import Decider
    from keyturn_server.explain import Explainer
    from keyturn_server.record import Recorder
    from keyturn_server.redeem import Redeemer

NAME = routing_service_pb2.DESCRIPTOR.services_by_name["RoutingService"].full_name

# An item costs a quarter of what it would as a call of its own, or a third.
_ITEMS_OF_A_CALL = 4

Item = TypeVar("Item")


class RoutingService:
    """Decodes, calls, encodes."""

    def __init__(
        self,
        *,
        decider: Decider,
        explainer: Explainer,
        recorder: Recorder,
        redeemer: Redeemer,
        audit: Audit,
        guard: Guard,
    ) -> None:
        self._decider = decider
        self._explainer = explainer
        self._recorder = recorder
        self._redeemer = redeemer
        self._audit = audit
        self._guard = guard

    @property
    def name(self) -> str:
        """The service's full name."""
        return NAME

    def methods(self) -> dict[str, Method[Any]]:
        """The methods by name."""
        v1 = routing_service_pb2
        return {
            "Decide": Method(
                request_type=v1.DecideRequest, answer=self.decide, roles=DATA_PLANE, urgency=Urgency.BEGINS
            ),
            "Record": Method(
                request_type=v1.RecordRequest, answer=self.record, roles=DATA_PLANE, urgency=Urgency.ENDS
            ),
            "Redeem": Method(
                request_type=v1.RedeemRequest, answer=self.redeem, roles=DATA_PLANE, urgency=Urgency.ENDS
            ),
            # It says nothing that an operator may not know, and support needs it.
            "Explain": Method(
                request_type=v1.ExplainRequest, answer=self.explain, roles=ANYBODY, urgency=Urgency.BEGINS
            ),
            "BatchDecide": Method(
                request_type=v1.BatchDecideRequest,
                answer=self.batch_decide,
                roles=DATA_PLANE,
                urgency=Urgency.BEGINS,
                weight=_weight,
                max_bytes=MAX_BATCH_BYTES,
            ),
            "BatchRecord": Method(
                request_type=v1.BatchRecordRequest,
                answer=self.batch_record,
                roles=DATA_PLANE,
                urgency=Urgency.ENDS,
                weight=_weight,
                max_bytes=MAX_BATCH_BYTES,
            ),
        }

    async def decide(
        self, request: routing_service_pb2.DecideRequest, caller: Caller
    ) -> routing_service_pb2.DecideResponse:
        begun = self._begin(request, caller, "Decide")
        return begun if isinstance(begun, routing_service_pb2.DecideResponse) else await begun

    def _begin(
        self, request: routing_service_pb2.DecideRequest, caller: Caller, by: str
    ) -> routing_service_pb2.DecideResponse | Coroutine[Any, Any, routing_service_pb2.DecideResponse]:
        """The answer at once, where nothing has to be waited for, or else what to wait for."""
        ask = ask_from(request)
        try:
            begun = self._decider.decide(ask)
        except InvalidToken as error:
            raise BadToken("failed_key_handles", error) from None
        if isinstance(begun, Decision):
            return self._decided(begun, ask, caller, by)
        return self._decided_later(begun, ask, caller, by)

    async def _decided_later(
        self, begun: Coroutine[Any, Any, Decision], ask: Ask, caller: Caller, by: str
    ) -> routing_service_pb2.DecideResponse:
        with _tokens_in("failed_key_handles"):
            decision = await begun
        return self._decided(decision, ask, caller, by)

    def _decided(
        self, decision: Decision, ask: Ask, caller: Caller, by: str
    ) -> routing_service_pb2.DecideResponse:
        message = decision_message(decision)
        if isinstance(decision.route, KeyRoute) and decision.route.secret is not None:
            self._audit.secret_handed_out(
                caller,
                user_id=ask.user_id,
                key_id=message.key.key_id,
                decision_id=message.decision_id,
                by=by,
            )
        return message

    async def record(
        self, request: routing_service_pb2.RecordRequest, caller: Caller
    ) -> routing_service_pb2.RecordResponse:
        report = report_from(request)
        settles = request.WhichOneof("settles")
        try:
            if settles == "credit_ticket":
                recorded = await self._recorder.settle_ticket(request.credit_ticket, report)
            else:
                recorded = await self._recorder.record_key(request.key_handle, report)
        except InvalidToken as error:
            raise BadToken(settles or "key_handle", error) from None
        return record_message(recorded)

    async def redeem(
        self, request: routing_service_pb2.RedeemRequest, caller: Caller
    ) -> routing_service_pb2.RedeemResponse:
        check_handle(request.key_handle)
        with _tokens_in("key_handle"):
            redeemed = await self._redeemer.redeem(request.key_handle)
        self._audit.secret_handed_out(
            caller,
            user_id=redeemed.user_id,
            key_id=str(redeemed.key_id),
            decision_id=str(redeemed.decision_id),
            by="Redeem",
        )
        return routing_service_pb2.RedeemResponse(secret=redeemed.secret.reveal())

    async def explain(
        self, request: routing_service_pb2.ExplainRequest, caller: Caller
    ) -> routing_service_pb2.ExplainResponse:
        with _fields_in("decide"), _tokens_in("decide.failed_key_handles"):
            return explanation_message(*await self._explainer.explain(ask_from(request.decide)))

    async def batch_decide(
        self, request: routing_service_pb2.BatchDecideRequest, caller: Caller
    ) -> routing_service_pb2.BatchDecideResponse:
        response = routing_service_pb2.BatchDecideResponse()
        await self._each(
            "BatchDecide",
            request.requests,
            lambda item: self._begin(item, caller, "BatchDecide"),
            response.results,
        )
        return response

    async def batch_record(
        self, request: routing_service_pb2.BatchRecordRequest, caller: Caller
    ) -> routing_service_pb2.BatchRecordResponse:
        response = routing_service_pb2.BatchRecordResponse()
        await self._each(
            "BatchRecord", request.requests, lambda item: self.record(item, caller), response.results
        )
        return response

    async def _each(
        self,
        method: str,
        items: Sequence[Item],
        begin: Callable[[Item], Message | Coroutine[Any, Any, Message]],
        results: Any,
    ) -> None:
        """Each item's answer or status, into `results`.

        What has to be waited for is waited for all at once, so that the items share the ledger's
        statements.
        """
        check_batch(len(items))

        def refuse(result: Any, error: Exception) -> None:
            result.status.CopyFrom(item_status(self._guard.status(method, error)))

        async def later(work: Coroutine[Any, Any, Message], result: Any) -> None:
            try:
                result.response.CopyFrom(await work)
            except Exception as error:
                refuse(result, error)

        waiting = []
        for item in items:
            result = results.add()
            try:
                begun = begin(item)
                if isinstance(begun, Message):
                    result.response.CopyFrom(begun)
                else:
                    waiting.append(later(begun, result))
            except Exception as error:
                refuse(result, error)
        await asyncio.gather(*waiting)


def _weight(batch: routing_service_pb2.BatchDecideRequest | routing_service_pb2.BatchRecordRequest) -> int:
    return 1 + len(batch.requests) // _ITEMS_OF_A_CALL


@contextmanager
def _tokens_in(field: str) -> Iterator[None]:
    """Names the field of a token that does not open."""
    try:
        yield
    except InvalidToken as error:
        raise BadToken(field, error) from None


@contextmanager
def _fields_in(message: str) -> Iterator[None]:
    """Names the message that the wrong fields stand in."""
    try:
        yield
    except InvalidFields as error:
        raise InvalidFields(*((f"{message}.{field}", why) for field, why in error.violations)) from None
