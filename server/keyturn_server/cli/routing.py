"""`keyturn decide`, `record` and `explain`: what gateways ask, asked by hand. None prints a secret."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Annotated, TypeAlias

from cyclopts import Parameter

from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import routing_service_pb2 as pb
from keyturn.v1.routing_service_pb2_grpc import RoutingServiceStub
from keyturn_server.cli.calls import DEFAULTS, Options
from keyturn_server.cli.exit_codes import ExitCode, wrong_usage
from keyturn_server.cli.printing import (
    dollars,
    fields,
    moment,
    phrase,
    seconds,
    show,
    table,
    word,
    yes_no,
)
from keyturn_server.cli.values import Dollars, PositiveSpan, Span, Tokens, read_by, whole_of
from keyturn_server.ledger import Outcome
from keyturn_server.routing.model import Constraint

_HANDLE, _TICKET = "kth", "ktt"
_MOST_TOKEN_BYTES = 8192

HttpStatus: TypeAlias = Annotated[int, read_by(whole_of(100, 599))]


def decide(
    user: str,
    /,
    *,
    provider: str,
    model: str = "",
    service_type: str = "",
    request_id: str = "",
    cost: Dollars | None = None,
    input_tokens: Tokens | None = None,
    max_output_tokens: Tokens | None = None,
    constraint: Constraint = Constraint.ANY,
    hold_ttl: PositiveSpan | None = None,
    options: Options = DEFAULTS,
) -> ExitCode:
    """Decide who pays for one request, as a gateway would. Places a hold where credits pay.

    Prints the key handle or credit ticket that `keyturn record` takes; never a secret. Exit code 3: the
    policy says no; the denial is the answer on stdout.

    Parameters
    ----------
    user
        The user's id.
    provider
        The provider's id, e.g. openai.
    model
        The provider's name of the model; prices the estimate.
    service_type
        A label for reports, e.g. copilot.
    request_id
        The same id of the same user gets the same ticket, never a second hold.
    cost
        What to hold at most, in US dollars: 0.25, with at most 6 decimals. Default: the sidecar's.
    input_tokens
        Instead of --cost: tokens, priced by --model.
    max_output_tokens
        Instead of --cost: the limit on output tokens, priced by --model.
    constraint
        Tighten the policy for this request. Default: any.
    hold_ttl
        How long the hold or handle lives: 1s to 24h. Default: the sidecar's, 10m.
    """
    request = _request(user, provider, model, service_type, cost, constraint)
    request.request_id = request_id
    request.key_delivery = pb.KEY_DELIVERY_REDEEM
    if input_tokens is not None or max_output_tokens is not None:
        if cost is not None:
            raise wrong_usage("Give either --cost or tokens.")
        request.tokens.input_tokens = input_tokens or 0
        request.tokens.max_output_tokens = max_output_tokens or 0
    if hold_ttl is not None:
        request.hold_ttl.FromTimedelta(hold_ttl)
    answer = options.call(lambda channel: RoutingServiceStub(channel).Decide, request)
    show(answer, _decided, as_json=options.json)
    return ExitCode.REFUSED if answer.HasField("denial") else ExitCode.DONE


def record(
    token: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    outcome: Outcome,
    input_tokens: Tokens | None = None,
    output_tokens: Tokens | None = None,
    cache_read_tokens: Tokens | None = None,
    cache_write_tokens: Tokens | None = None,
    total_tokens: Tokens | None = None,
    cost: Dollars | None = None,
    model: str = "",
    endpoint: str = "",
    response_time: Span | None = None,
    http_status: HttpStatus = 0,
    error_message: str = "",
    retry_after: Span | None = None,
    options: Options = DEFAULTS,
) -> None:
    """Record what became of a decided request: charges the ticket, or counts the own key's usage, once.

    The same record again is answered as the first; with other contents it is refused (exit code 3).

    Parameters
    ----------
    token
        The key handle or credit ticket from `keyturn decide`, or - to read it from stdin.
    outcome
        How the request to the provider ended.
    input_tokens
        All input tokens, cached ones included.
    output_tokens
        All output tokens, reasoning included.
    cache_read_tokens
        Of the input: read from the provider's cache.
    cache_write_tokens
        Of the input: written to the provider's cache.
    total_tokens
        The total as the provider counts it. Default: input and output.
    cost
        What it cost, in US dollars, with at most 6 decimals; wins over tokens. Without either, success is
        charged the hold.
    model
        The model that answered, when it is not the one of the decision.
    endpoint
        The provider's endpoint, e.g. /v1/chat/completions.
    response_time
        How long the provider took: 1.5s.
    http_status
        The provider's HTTP status.
    error_message
        The provider's error text; anything like a key is struck out.
    retry_after
        How long the provider asked to wait: 30s.
    """
    request = pb.RecordRequest(
        outcome=pb.Outcome.Value(f"OUTCOME_{outcome.name}"),
        cost_micros=cost,
        model=model,
        endpoint=endpoint,
        http_status=http_status,
        error_message=error_message,
    )
    _settle(request, token)
    counts = {
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "cache_read_tokens": cache_read_tokens,
        "cache_write_tokens": cache_write_tokens,
        "total_tokens": total_tokens,
    }
    if given := {name: count for name, count in counts.items() if count is not None}:
        request.usage.CopyFrom(pb.Usage(**given))
    if response_time is not None:
        request.response_time.FromTimedelta(response_time)
    if retry_after is not None:
        request.retry_after.FromTimedelta(retry_after)
    answer = options.call(lambda channel: RoutingServiceStub(channel).Record, request)
    show(answer, _recorded, as_json=options.json)


def _settle(request: pb.RecordRequest, token: str) -> None:
    """Raises `Ended` for what is neither a handle nor a ticket, without quoting it."""
    if token == "-":  # noqa: S105 - the sign for stdin
        token = sys.stdin.buffer.readline(_MOST_TOKEN_BYTES).decode("ascii", "replace").strip()
    if token.startswith(_HANDLE):
        request.key_handle = token
    elif token.startswith(_TICKET):
        request.credit_ticket = token
    else:
        raise wrong_usage(f"TOKEN is a key handle ({_HANDLE}…) or a credit ticket ({_TICKET}…).")


def explain(
    user: str,
    /,
    *,
    provider: str,
    model: str = "",
    service_type: str = "",
    cost: Dollars | None = None,
    constraint: Constraint = Constraint.ANY,
    options: Options = DEFAULTS,
) -> None:
    """Explain who would pay for a request now and why, in steps, to be pasted into a ticket.

    Changes nothing: no hold, no rate-limit hit. Prints no secret, no handle and no ticket. Exit code 0
    also where the answer is a denial: the question was answered.

    Parameters
    ----------
    user
        The user's id.
    provider
        The provider's id, e.g. openai.
    model
        The provider's name of the model.
    service_type
        The label for reports.
    cost
        What the request would hold, in US dollars: 0.25, with at most 6 decimals. Default: the sidecar's.
    constraint
        The caller's constraint on the policy. Default: any.
    """
    request = _request(user, provider, model, service_type, cost, constraint)
    answer = options.call(
        lambda channel: RoutingServiceStub(channel).Explain, pb.ExplainRequest(decide=request)
    )
    show(answer, lambda answer: _explained(request, answer), as_json=options.json)


def _request(
    user: str, provider: str, model: str, service_type: str, cost: int | None, constraint: Constraint
) -> pb.DecideRequest:
    request = pb.DecideRequest(
        user_id=user,
        provider=provider,
        model=model,
        service_type=service_type,
        constraint=policy.Constraint.Value(f"CONSTRAINT_{constraint.name}"),
    )
    if cost is not None:
        request.cost_micros = cost
    return request


def _decided(answer: pb.DecideResponse) -> str:
    lines = fields(
        ("Decision", answer.decision_id),
        *_conclusion(answer, holds="held"),
        ("Expires", moment((answer.ticket if answer.HasField("ticket") else answer.key).expire_time)),
        ("Degraded", "yes: the database could not be asked" if answer.degraded else ""),
        ("Replayed", "yes: this request id has this ticket already" if answer.replayed else ""),
    )
    match answer.WhichOneof("route"):
        case "key":
            return f"{lines}\n\nHandle for `keyturn record`:\n{answer.key.handle}"
        case "ticket":
            return f"{lines}\n\nTicket for `keyturn record`:\n{answer.ticket.ticket}"
        case _:
            return lines


def _conclusion(answer: pb.DecideResponse, *, holds: str) -> tuple[tuple[str, str], ...]:
    """Mode, verdict, reason and what can be done, for people."""
    denial = answer.denial
    denied = answer.HasField("denial")
    return (
        ("Mode", word(policy.Mode, answer.mode)),
        ("Who pays", _payer(answer, holds=holds)),
        (
            "Reason",
            word(policy.DenialReason, denial.reason) if denied else word(policy.Reason, answer.reason),
        ),
        ("In words", answer.message),
        ("Suggestion", denial.suggestion),
        ("Retry", f"later, after {seconds(denial.retry_after) or 'a while'}" if denial.retryable else ""),
    )


def _payer(answer: pb.DecideResponse, *, holds: str) -> str:
    match answer.WhichOneof("route"):
        case "key":
            return f"the user's own key {answer.key.key_id} (ends in {answer.key.hint})"
        case "ticket":
            held, left = dollars(answer.ticket.hold_micros), dollars(answer.ticket.available_micros)
            return f"credits: {held} {holds}, {left} still available"
        case _:
            return "nobody: DENIED"


def _recorded(answer: pb.RecordResponse) -> str:
    by_ticket = answer.HasField("balance_micros")
    state = answer.key_state
    return fields(
        ("Record", answer.record_id),
        ("Charged", dollars(answer.charged_micros)),
        ("Released", dollars(answer.released_micros) if by_ticket else ""),
        ("Balance", dollars(answer.balance_micros) if by_ticket else ""),
        ("Cost is", phrase(pb.CostSource, answer.cost_source)),
        ("Key", phrase(policy.KeyState, state) if state else ""),
        ("Replayed", yes_no(answer.replayed)),
        ("Durable in", phrase(pb.Durability, answer.durability)),
    )


def _explained(request: pb.DecideRequest, answer: pb.ExplainResponse) -> str:
    decision = answer.decision
    mode = word(policy.Mode, decision.mode)
    head = f"{mode}: {_payer(decision, holds='would be held')}"
    constraint = word(policy.Constraint, request.constraint)
    asked = fields(
        ("User", request.user_id),
        ("Provider", request.provider),
        ("Model", request.model),
        ("Service type", request.service_type),
        ("Cost", dollars(request.cost_micros) if request.HasField("cost_micros") else ""),
        ("Constraint", "" if constraint == Constraint.ANY.name else constraint),
        ("Asked at", moment(datetime.now(UTC))),
        *_conclusion(decision, holds="would be held"),
    )
    steps = table(
        ("#", "check", "result", "detail"),
        (
            (str(number), step.check, step.result, step.detail)
            for number, step in enumerate(answer.steps, start=1)
        ),
        numbers={"#"},
        prose={"detail"},
    )
    return f"{head}\n\n{asked}\n\n{steps}"
