"""Values to messages."""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import lru_cache

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
_SECONDS_A_DAY = 24 * 60 * 60


def decision_message(decision: Decision) -> routing_service_pb2.DecideResponse:
    """A DecideResponse."""
    route = decision.route
    match route:
        case KeyRoute():
            message = _with_key(decision, route)
        case TicketRoute():
            message = _beginning(decision)
            ticket = message.ticket
            ticket.ticket = route.ticket
            ticket.hold_micros = route.hold_micros
            ticket.available_micros = route.available_micros
            _set_time(ticket.expire_time, route.expires_at)
        case Denied():
            message = _beginning(decision)
            message.denial.CopyFrom(
                routing_service_pb2.Denial(
                    reason=DENIALS[route.reason],
                    retryable=route.retryable,
                    retry_after=_duration(route.retry_after),
                    suggestion=route.suggestion,
                )
            )
    return message


def _beginning(decision: Decision) -> routing_service_pb2.DecideResponse:
    return routing_service_pb2.DecideResponse(
        decision_id=str(decision.id),
        mode=MODES[decision.mode],
        reason=_REASONS[decision.reason],
        message=decision.message,
        replayed=decision.replayed,
        degraded=decision.degraded,
    )


def _with_key(decision: Decision, route: KeyRoute) -> routing_service_pb2.DecideResponse:
    provider = route.provider
    message = routing_service_pb2.DecideResponse.FromString(
        _answer_with_key(
            decision.mode,
            decision.reason,
            decision.message,
            decision.degraded,
            provider.id,
            provider.auth_header,
            provider.auth_prefix,
            provider.base_url,
        )
    )
    message.decision_id = str(decision.id)
    key = message.key
    key.handle = route.handle
    key.key_id = str(route.key_id)
    key.hint = route.hint
    if route.secret is not None:
        key.secret = route.secret.reveal()
    _set_time(key.expire_time, route.expires_at)
    return message


@lru_cache(maxsize=1024)
def _answer_with_key(
    mode: Mode,
    reason: Reason,
    message: str,
    degraded: bool,
    provider: str,
    auth_header: str,
    auth_prefix: str,
    base_url: str,
) -> bytes:
    """What answers have in common. To parse it costs a tenth of what it costs to make it, field by field."""
    key = routing_service_pb2.KeyHandle(
        provider=provider,
        auth=routing_service_pb2.KeyHandle.Auth(header=auth_header, prefix=auth_prefix),
        base_url=base_url,
        expire_time=timestamp_pb2.Timestamp(),
    )
    return routing_service_pb2.DecideResponse(
        mode=MODES[mode], reason=_REASONS[reason], message=message, degraded=degraded, key=key
    ).SerializeToString()


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
        durability=(
            routing_service_pb2.DURABILITY_SPOOLED
            if recorded.is_spooled
            else routing_service_pb2.DURABILITY_DATABASE
        ),
        key_state=(
            policy_pb2.KEY_STATE_UNSPECIFIED if recorded.key_state is None else KEY_STATES[recorded.key_state]
        ),
    )


def timestamp(moment: datetime) -> timestamp_pb2.Timestamp:
    """A moment, as messages hold one."""
    message = timestamp_pb2.Timestamp()
    _set_time(message, moment)
    return message


def _set_time(message: timestamp_pb2.Timestamp, moment: datetime) -> None:
    span = moment - _EPOCH
    message.seconds = span.days * _SECONDS_A_DAY + span.seconds
    message.nanos = span.microseconds * 1000


def _duration(span: timedelta | None) -> duration_pb2.Duration | None:
    if span is None:
        return None
    return duration_pb2.Duration(seconds=span // _SECOND, nanos=(span % _SECOND).microseconds * 1000)
