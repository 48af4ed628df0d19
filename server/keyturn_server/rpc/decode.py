"""Messages to values. Every limit of the wire contract is checked here, and all at once."""

from __future__ import annotations

from datetime import timedelta

from keyturn.v1 import policy_pb2, routing_service_pb2
from keyturn_server.decide import Ask
from keyturn_server.errors import InvalidFields
from keyturn_server.ledger import Outcome, Report
from keyturn_server.prices import Usage
from keyturn_server.routing.model import Constraint
from keyturn_server.rpc.fields import CONTROL, MAX_ID, MAX_PROVIDER, Fields
from keyturn_server.scrub import scrub

MAX_MODEL = 256
MAX_LABEL = 64
MAX_ENDPOINT = 256
MAX_ERROR_TEXT = 4000
MAX_FAILED_HANDLES = 16
MAX_TOKENS = 1_000_000_000
MAX_COST_MICROS = 1_000_000_000_000
MAX_BATCH = 500
MIN_TTL = timedelta(seconds=1)

_CONSTRAINTS = {
    policy_pb2.CONSTRAINT_UNSPECIFIED: Constraint.ANY,
    policy_pb2.CONSTRAINT_ANY: Constraint.ANY,
    policy_pb2.CONSTRAINT_OWN_KEY_ONLY: Constraint.OWN_KEY_ONLY,
    policy_pb2.CONSTRAINT_CREDITS_ONLY: Constraint.CREDITS_ONLY,
}
_INLINE = {
    routing_service_pb2.KEY_DELIVERY_UNSPECIFIED: False,
    routing_service_pb2.KEY_DELIVERY_REDEEM: False,
    routing_service_pb2.KEY_DELIVERY_INLINE: True,
}
_OUTCOMES = {routing_service_pb2.Outcome.Value(f"OUTCOME_{outcome.name}"): outcome for outcome in Outcome}


def ask_from(request: routing_service_pb2.DecideRequest) -> Ask:
    """The question in a DecideRequest. Raises `InvalidFields`."""
    fields = Fields()
    user_id = fields.text("user_id", request.user_id, MAX_ID, required=True)
    provider = fields.text("provider", request.provider, MAX_PROVIDER, required=True)
    request_id = fields.text("request_id", request.request_id, MAX_ID)
    model = fields.text("model", request.model, MAX_MODEL)
    service_type = fields.text("service_type", request.service_type, MAX_LABEL)
    cost_micros = None
    tokens = None
    match request.WhichOneof("estimate"):
        case "cost_micros":
            cost_micros = fields.number("cost_micros", request.cost_micros, MAX_COST_MICROS)
        case "tokens":
            estimate = request.tokens
            tokens = Usage(
                input_tokens=fields.number("tokens.input_tokens", estimate.input_tokens, MAX_TOKENS),
                output_tokens=fields.number(
                    "tokens.max_output_tokens", estimate.max_output_tokens, MAX_TOKENS
                ),
            )
            if tokens.total == 0:  # an empty estimate says nothing
                tokens = None
    constraint = _CONSTRAINTS.get(request.constraint)
    if constraint is None:
        fields.violations.append(("constraint", f"Unknown value {request.constraint}."))
    inline = _INLINE.get(request.key_delivery)
    if inline is None:
        fields.violations.append(("key_delivery", f"Unknown value {request.key_delivery}."))
    failed = tuple(request.failed_key_handles)
    if len(failed) > MAX_FAILED_HANDLES:
        fields.violations.append(
            ("failed_key_handles", f"At most {MAX_FAILED_HANDLES} handles; this has {len(failed)}.")
        )
    hold_ttl = None
    if request.HasField("hold_ttl"):
        hold_ttl = fields.span("hold_ttl", request.hold_ttl, least=MIN_TTL)
    fields.check()
    return Ask(
        user_id=user_id,
        provider=provider,
        request_id=request_id or None,
        model=model,
        service_type=service_type,
        cost_micros=cost_micros,
        tokens=tokens,
        constraint=constraint or Constraint.ANY,
        failed_key_handles=failed,
        inline=bool(inline),
        hold_ttl=hold_ttl,
    )


def report_from(request: routing_service_pb2.RecordRequest) -> Report:
    """The report in a RecordRequest. Raises `InvalidFields`."""
    fields = Fields()
    if request.WhichOneof("settles") is None:
        fields.violations.append(("settles", "Required: key_handle or credit_ticket."))
    if request.outcome == routing_service_pb2.OUTCOME_UNSPECIFIED:
        fields.violations.append(("outcome", "Required: say how the request ended."))
    usage = None
    if request.HasField("usage"):
        sent = request.usage
        usage = Usage(
            input_tokens=fields.number("usage.input_tokens", sent.input_tokens, MAX_TOKENS),
            output_tokens=fields.number("usage.output_tokens", sent.output_tokens, MAX_TOKENS),
            cache_read_tokens=fields.number("usage.cache_read_tokens", sent.cache_read_tokens, MAX_TOKENS),
            cache_write_tokens=fields.number("usage.cache_write_tokens", sent.cache_write_tokens, MAX_TOKENS),
            total_tokens=(
                fields.number("usage.total_tokens", sent.total_tokens, MAX_TOKENS)
                if sent.HasField("total_tokens")
                else None
            ),
        )
    cost_micros = None
    if request.HasField("cost_micros"):
        cost_micros = fields.number("cost_micros", request.cost_micros, MAX_COST_MICROS)
    model = fields.text("model", request.model, MAX_MODEL)
    endpoint = fields.text("endpoint", request.endpoint, MAX_ENDPOINT)
    http_status = None
    if request.http_status:
        http_status = fields.number("http_status", request.http_status, 599, least=100)
    response_time = None
    if request.HasField("response_time"):
        response_time = fields.span("response_time", request.response_time)
    retry_after = None
    if request.HasField("retry_after"):
        retry_after = fields.span("retry_after", request.retry_after)
    fields.check()
    return Report(
        # An outcome from a newer client still counts: losing the call would lose money.
        outcome=_OUTCOMES.get(request.outcome, Outcome.UNKNOWN),
        usage=usage,
        cost_micros=cost_micros,
        model=model,
        endpoint=endpoint,
        response_time=response_time,
        http_status=http_status,
        # Cut after the secrets are struck out, so that none is cut in two; and before, so that a
        # text of any length costs the same.
        error_message=scrub(CONTROL.sub(" ", request.error_message[:MAX_ERROR_TEXT])),
        retry_after=retry_after,
    )


def check_batch(size: int) -> None:
    """Raises `InvalidFields` unless a batch has 1 to 500 items."""
    if not 1 <= size <= MAX_BATCH:
        raise InvalidFields(("requests", f"From 1 to {MAX_BATCH} items; this has {size}."))


def check_handle(handle: str) -> None:
    """Raises `InvalidFields` when a handle is missing."""
    if not handle:
        raise InvalidFields(("key_handle", "Required."))
