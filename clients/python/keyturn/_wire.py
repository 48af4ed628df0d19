"""Values to messages and back: the only place that knows protobuf, shared by both clients."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, TypeVar

from google.protobuf import duration_pb2, message, timestamp_pb2

from keyturn import errors, model
from keyturn.secret import Secret
from keyturn.v1 import policy_pb2
from keyturn.v1 import routing_service_pb2 as pb

_MAX_ERROR_TEXT = 500
"""Characters of a provider's error to send: as many as the server keeps."""

_Word = TypeVar("_Word", bound=str)


class _Enum(Generic[_Word]):
    """One enum of the contract and its Python twin. Every number reads; see `model`."""

    def __init__(self, kind: type[_Word], wire: Any, prefix: str) -> None:
        self._kind = kind
        self._words = {number: kind(name.removeprefix(prefix)) for name, number in wire.items()}
        self._numbers = {word: number for number, word in self._words.items()}

    def read(self, number: int) -> _Word:
        word = self._words.get(number)
        return word if word is not None else self._kind(f"UNRECOGNIZED_{number}")

    def number(self, word: _Word) -> Any:
        """Raises `ValueError` for a word that the contract does not have.

        A number that only a newer contract knows goes back as it came.
        """
        number = self._numbers.get(word)
        if number is None and word.startswith("UNRECOGNIZED_"):
            return int(word.removeprefix("UNRECOGNIZED_"))
        if number is None:
            raise ValueError(f"{word} is no {self._kind.__name__} that this client can send")
        return number


_MODE = _Enum(model.Mode, policy_pb2.Mode, "MODE_")
_REASON = _Enum(model.Reason, policy_pb2.Reason, "REASON_")
_DENIAL_REASON = _Enum(model.DenialReason, policy_pb2.DenialReason, "DENIAL_REASON_")
_CONSTRAINT = _Enum(model.Constraint, policy_pb2.Constraint, "CONSTRAINT_")
_KEY_STATE = _Enum(model.KeyState, policy_pb2.KeyState, "KEY_STATE_")
_OUTCOME = _Enum(model.Outcome, pb.Outcome, "OUTCOME_")
_COST_SOURCE = _Enum(model.CostSource, pb.CostSource, "COST_SOURCE_")
_DURABILITY = _Enum(model.Durability, pb.Durability, "DURABILITY_")


# All encoders raise `TypeError` or `ValueError` for what protobuf cannot hold: a wrong type, a
# number beyond 64 bits, text that is not Unicode. Limits are the server's to check.


def decide_request(asked: model.DecideRequest) -> pb.DecideRequest:
    request = pb.DecideRequest(
        request_id=asked.request_id or "",
        user_id=asked.user_id,
        provider=asked.provider,
        model=asked.model,
        service_type=asked.service_type,
        constraint=_CONSTRAINT.number(asked.constraint),
        failed_key_handles=[str(handle) for handle in asked.failed_keys],
        key_delivery=pb.KEY_DELIVERY_REDEEM if asked.redeem else pb.KEY_DELIVERY_INLINE,
        hold_ttl=_duration(asked.hold_ttl),
    )
    if asked.cost_micros is not None:
        request.cost_micros = asked.cost_micros
    if asked.input_tokens is not None or asked.max_output_tokens is not None:
        request.tokens.input_tokens = asked.input_tokens or 0
        request.tokens.max_output_tokens = asked.max_output_tokens or 0
    return request


def record_request(record: model.RecordRequest) -> pb.RecordRequest:
    request = pb.RecordRequest(
        outcome=_OUTCOME.number(record.outcome),
        usage=_usage(record.usage),
        cost_micros=record.cost_micros,
        model=record.model,
        endpoint=record.endpoint,
        response_time=_duration(record.response_time),
        http_status=record.http_status or 0,
        error_message=record.error_message[:_MAX_ERROR_TEXT],
        retry_after=_duration(record.retry_after),
    )
    if isinstance(record.settles, model.SealedHandle):
        request.key_handle = record.settles
    elif isinstance(record.settles, model.SealedTicket):
        request.credit_ticket = record.settles
    return request


def redeem_request(handle: model.SealedHandle) -> pb.RedeemRequest:
    return pb.RedeemRequest(key_handle=handle)


def explain_request(asked: model.DecideRequest) -> pb.ExplainRequest:
    return pb.ExplainRequest(decide=decide_request(asked))


def batch_decide_request(asked: Iterable[model.DecideRequest]) -> pb.BatchDecideRequest:
    return pb.BatchDecideRequest(requests=map(decide_request, asked))


def batch_record_request(records: Iterable[model.RecordRequest]) -> pb.BatchRecordRequest:
    return batch_of(map(record_request, records))


def batch_of(records: Iterable[pb.RecordRequest]) -> pb.BatchRecordRequest:
    return pb.BatchRecordRequest(requests=records)


def decision(response: pb.DecideResponse) -> model.Decision:
    route = response.WhichOneof("route")
    return model.Decision(
        decision_id=response.decision_id,
        mode=_MODE.read(response.mode),
        reason=_REASON.read(response.reason),
        message=response.message,
        degraded=response.degraded,
        replayed=response.replayed,
        key=_key(response.key) if route == "key" else None,
        ticket=_ticket(response.ticket) if route == "ticket" else None,
        denial=_denial(response.denial) if route == "denial" else None,
    )


def recorded(response: pb.RecordResponse) -> model.Recorded:
    return model.Recorded(
        record_id=response.record_id,
        charged_micros=response.charged_micros,
        released_micros=response.released_micros,
        balance_micros=response.balance_micros if response.HasField("balance_micros") else None,
        cost_source=_COST_SOURCE.read(response.cost_source),
        replayed=response.replayed,
        durability=_DURABILITY.read(response.durability),
        key_state=_KEY_STATE.read(response.key_state),
    )


def secret(response: pb.RedeemResponse) -> Secret:
    return Secret(response.secret)


def explanation(response: pb.ExplainResponse) -> model.Explanation:
    return model.Explanation(
        decision=decision(response.decision),
        steps=tuple(
            model.ExplainStep(check=step.check, result=step.result, detail=step.detail)
            for step in response.steps
        ),
    )


def decisions(response: pb.BatchDecideResponse) -> list[model.Decision | errors.KeyturnError]:
    return [
        errors.from_status(each.status) if each.HasField("status") else decision(each.response)
        for each in response.results
    ]


def records(response: pb.BatchRecordResponse) -> list[model.Recorded | errors.KeyturnError]:
    return [
        errors.from_status(each.status) if each.HasField("status") else recorded(each.response)
        for each in response.results
    ]


def _key(key: pb.KeyHandle) -> model.KeyHandle:
    return model.KeyHandle(
        handle=model.SealedHandle(key.handle),
        key_id=key.key_id,
        provider=key.provider,
        hint=key.hint,
        secret=Secret(key.secret) if key.secret else None,
        auth_header=key.auth.header,
        auth_prefix=key.auth.prefix,
        base_url=key.base_url,
        expires_at=_time(key, "expire_time"),
    )


def _ticket(ticket: pb.CreditTicket) -> model.CreditTicket:
    return model.CreditTicket(
        ticket=model.SealedTicket(ticket.ticket),
        hold_micros=ticket.hold_micros,
        available_micros=ticket.available_micros,
        expires_at=_time(ticket, "expire_time"),
    )


def _denial(denial: pb.Denial) -> model.Denial:
    return model.Denial(
        reason=_DENIAL_REASON.read(denial.reason),
        retryable=denial.retryable,
        retry_after=denial.retry_after.ToTimedelta() if denial.HasField("retry_after") else None,
        suggestion=denial.suggestion,
    )


def _usage(usage: model.Usage | None) -> pb.Usage | None:
    if usage is None:
        return None
    return pb.Usage(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cache_read_tokens=usage.cache_read_tokens,
        cache_write_tokens=usage.cache_write_tokens,
        total_tokens=usage.total_tokens,
    )


def _duration(span: timedelta | None) -> duration_pb2.Duration | None:
    if span is None:
        return None
    duration = duration_pb2.Duration()
    duration.FromTimedelta(span)
    return duration


def _time(holder: message.Message, field: str) -> datetime | None:
    if not holder.HasField(field):
        return None
    stamp: timestamp_pb2.Timestamp = getattr(holder, field)
    return stamp.ToDatetime(tzinfo=UTC)
