"""Values to messages."""

from __future__ import annotations

from datetime import datetime, timedelta

from google.protobuf import duration_pb2, timestamp_pb2

from keyturn.v1 import policy_pb2, routing_service_pb2
from keyturn_server.decide import Decision, Denied, KeyRoute, TicketRoute
from keyturn_server.explain import Step
from keyturn_server.ledger import CostSource, KeyState
from keyturn_server.record import Recorded
from keyturn_server.routing.model import DenialReason, Mode, Reason

MODES = {mode: policy_pb2.Mode.Value(f"MODE_{mode.name}") for mode in Mode}
_REASONS = {reason: policy_pb2.Reason.Value(f"REASON_{reason.name}") for reason in Reason}
DENIALS = {reason: policy_pb2.DenialReason.Value(f"DENIAL_REASON_{reason.name}") for reason in DenialReason}
KEY_STATES = {state: policy_pb2.KeyState.Value(f"KEY_STATE_{state.name}") for state in KeyState}
_COST_SOURCES = {
    source: routing_service_pb2.CostSource.Value(f"COST_SOURCE_{source.name}") for source in CostSource
}
_EPOCH = datetime.fromisoformat("1970-01-01T00:00:00+00:00")
_SECOND = timedelta(seconds=1)


def decision_message(decision: Decision) -> routing_service_pb2.DecideResponse:
    """A DecideResponse."""
    message = routing_service_pb2.DecideResponse(
        decision_id=str(decision.id),
        mode=MODES[decision.mode],
        reason=_REASONS[decision.reason],
        message=decision.message,
        replayed=decision.replayed,
    )
    match decision.route:
        case KeyRoute() as route:
            message.key.CopyFrom(_key(route))
        case TicketRoute() as route:
            message.ticket.CopyFrom(
                routing_service_pb2.CreditTicket(
                    ticket=route.ticket,
                    hold_micros=route.hold_micros,
                    available_micros=route.available_micros,
                    expire_time=timestamp(route.expires_at),
                )
            )
        case Denied() as denied:
            message.denial.CopyFrom(
                routing_service_pb2.Denial(
                    reason=DENIALS[denied.reason],
                    retryable=denied.retryable,
                    retry_after=_duration(denied.retry_after),
                    suggestion=denied.suggestion,
                )
            )
    return message


def _key(route: KeyRoute) -> routing_service_pb2.KeyHandle:
    provider = route.provider
    return routing_service_pb2.KeyHandle(
        handle=route.handle,
        key_id=str(route.key_id),
        provider=provider.id,
        hint=route.hint,
        secret=route.secret.reveal() if route.secret is not None else "",
        auth=routing_service_pb2.KeyHandle.Auth(header=provider.auth_header, prefix=provider.auth_prefix),
        base_url=provider.base_url,
        expire_time=timestamp(route.expires_at),
    )


def explanation_message(decision: Decision, steps: list[Step]) -> routing_service_pb2.ExplainResponse:
    """An ExplainResponse: the decision without its id and times, which it never had."""
    message = decision_message(decision)
    message.ClearField("decision_id")
    if message.WhichOneof("route") == "key":
        message.key.ClearField("expire_time")
    elif message.WhichOneof("route") == "ticket":
        message.ticket.ClearField("expire_time")
    return routing_service_pb2.ExplainResponse(
        decision=message,
        steps=[
            routing_service_pb2.ExplainStep(check=step.check, result=step.result, detail=step.detail)
            for step in steps
        ],
    )


def record_message(recorded: Recorded) -> routing_service_pb2.RecordResponse:
    """A RecordResponse."""
    return routing_service_pb2.RecordResponse(
        record_id=str(recorded.id),
        charged_micros=recorded.charged_micros,
        released_micros=recorded.released_micros,
        balance_micros=recorded.balance_micros,
        cost_source=_COST_SOURCES[recorded.cost_source],
        replayed=recorded.replayed,
        durability=routing_service_pb2.DURABILITY_DATABASE,
        key_state=(
            policy_pb2.KEY_STATE_UNSPECIFIED if recorded.key_state is None else KEY_STATES[recorded.key_state]
        ),
    )


def timestamp(moment: datetime) -> timestamp_pb2.Timestamp:
    """A moment, as messages hold one."""
    span = moment - _EPOCH
    return timestamp_pb2.Timestamp(seconds=span // _SECOND, nanos=span.microseconds * 1000)


def _duration(span: timedelta | None) -> duration_pb2.Duration | None:
    if span is None:
        return None
    return duration_pb2.Duration(seconds=span // _SECOND, nanos=(span % _SECOND).microseconds * 1000)
