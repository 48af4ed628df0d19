"""`keyturn credits`: users' prepaid balances. People write and read dollars; JSON has micros."""

from __future__ import annotations

from enum import StrEnum

import cyclopts

from keyturn.v1 import credit_service_pb2 as pb
from keyturn.v1.credit_service_pb2_grpc import CreditServiceStub
from keyturn_server.cli.calls import DEFAULTS, Options, note_more
from keyturn_server.cli.printing import dollars, fields, moment, note, phrase, show, table
from keyturn_server.cli.values import Count, Dollars
from keyturn_server.ids import new_id

app = cyclopts.App(name="credits", help="Users' prepaid credits, in US dollars.")


class Kind(StrEnum):
    """What a transaction does."""

    GRANT = "GRANT"
    DEDUCTION = "DEDUCTION"


@app.command
def grant(
    user: str,
    amount: Dollars,
    /,
    *,
    request_id: str = "",
    description: str = "",
    options: Options = DEFAULTS,
) -> None:
    """Add credits to a user's balance, once for each request id.

    Without --request-id one is made up and told on stderr: after a failure, give it again to be sure that
    the credits are granted once.

    Parameters
    ----------
    user
        The user's id.
    amount
        In US dollars, exact: 5 or 0.25, with at most 6 decimals, up to 1000000.
    request_id
        The same id of the same user grants once, for example an invoice's number.
    description
        What it is for, to be read by people.
    """
    if not request_id:
        request_id = str(new_id())
        note(f"request id {request_id}: a retry with --request-id {request_id} cannot grant twice")
    request = pb.GrantCreditsRequest(
        user_id=user, amount_micros=amount, request_id=request_id, description=description
    )
    answer = options.call(lambda channel: CreditServiceStub(channel).GrantCredits, request)
    show(answer, lambda answer: _granted(answer, request), as_json=options.json)


@app.command
def balance(user: str, /, *, options: Options = DEFAULTS) -> None:
    """Show what a user has, holds and can spend.

    Parameters
    ----------
    user
        The user's id.
    """
    request = pb.GetBalanceRequest(user_id=user)
    answer = options.call(lambda channel: CreditServiceStub(channel).GetBalance, request)
    show(answer, _balance, as_json=options.json)


@app.command
def transactions(
    user: str,
    /,
    *,
    type: Kind | None = None,  # noqa: A002 - the name of the option
    limit: Count | None = None,
    options: Options = DEFAULTS,
) -> None:
    """List a user's grants and deductions, the newest first.

    Parameters
    ----------
    user
        The user's id.
    type
        Only those of this type.
    limit
        How many. Default: 100, and all of them with --json.
    """
    request = pb.ListTransactionsRequest(user_id=user)
    if type is not None:
        request.type = pb.TransactionType.Value(f"TRANSACTION_TYPE_{type}")
    answer = options.call_pages(
        lambda channel: CreditServiceStub(channel).ListTransactions,
        request,
        items="transactions",
        limit=options.most(limit),
    )
    show(answer, _transactions, as_json=options.json)
    if not options.json:
        note_more(answer.next_page_token, shown=len(answer.transactions))


def _granted(answer: pb.GrantCreditsResponse, request: pb.GrantCreditsRequest) -> str:
    amount = dollars(request.amount_micros)
    said = f"{amount} had been granted before; nothing changed." if answer.replayed else f"Granted {amount}."
    details = fields(
        ("User", request.user_id),
        ("Balance then" if answer.replayed else "Balance", dollars(answer.balance_micros)),
        ("Transaction", answer.transaction_id),
        ("Request id", request.request_id),
    )
    return f"{said}\n{details}"


def _balance(answer: pb.GetBalanceResponse) -> str:
    return fields(
        ("Balance", dollars(answer.balance_micros)),
        ("Held", dollars(answer.held_micros)),
        ("Available", dollars(answer.available_micros)),
    )


def _transactions(answer: pb.ListTransactionsResponse) -> str:
    return table(
        ("when", "type", "amount", "balance", "tokens", "what", "transaction"),
        (
            (
                moment(one.create_time),
                phrase(pb.TransactionType, one.type),
                dollars(one.amount_micros),
                dollars(one.balance_after_micros),
                f"{one.total_tokens:,}" if one.HasField("total_tokens") else "",
                _what(one),
                one.transaction_id,
            )
            for one in answer.transactions
        ),
        numbers={"amount", "balance", "tokens"},
        prose={"what"},
        empty="No transactions.",
    )


def _what(one: pb.Transaction) -> str:
    """A grant: what it is for. A deduction: who answered, for what, how it ended, how it was priced."""
    if one.type == pb.TRANSACTION_TYPE_GRANT:
        return " ".join(filter(None, (one.description, one.request_id and f"[{one.request_id}]")))
    said = (
        " ".join(filter(None, (one.provider, one.model))),
        one.service_type,
        one.outcome,
        one.cost_source,
        one.reason,
        "late" if one.is_late else "",
    )
    return ", ".join(filter(None, said))
