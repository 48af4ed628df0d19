"""CreditService: grants and books. protos/keyturn/v1/credit_service.proto says what each method does."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Protocol
from uuid import UUID

from keyturn.v1 import credit_service_pb2
from keyturn_server.access import Caller
from keyturn_server.ids import new_id
from keyturn_server.ledger import Grant, TransactionType
from keyturn_server.rpc.encode import timestamp
from keyturn_server.rpc.fields import MAX_ID, Fields
from keyturn_server.rpc.guard import CHANGING, READING, Method
from keyturn_server.rpc.user_service import Changes

if TYPE_CHECKING:
    from keyturn_server.ledger import Balance, Granted, Transaction
    from keyturn_server.rpc.pages import Pages

NAME = credit_service_pb2.DESCRIPTOR.services_by_name["CreditService"].full_name
MAX_GRANT_MICROS: Final = 1_000_000_000_000
MAX_DESCRIPTION: Final = 500

_TYPES = {
    credit_service_pb2.TRANSACTION_TYPE_UNSPECIFIED: None,
    **{
        credit_service_pb2.TransactionType.Value(f"TRANSACTION_TYPE_{kind.name}"): kind
        for kind in TransactionType
    },
}


class Grants(Protocol):
    """Adds credits, whatever becomes of the caller. Raises `UserNotFound`, `GrantConflict`, and
    `InvalidFields` where the balance would not fit."""

    async def grant(self, grant: Grant) -> Granted: ...


class Books(Protocol):
    """Balances and transactions. Raises `UserNotFound`."""

    async def balance(self, user_id: str) -> Balance: ...
    async def transactions(
        self, user_id: str, *, kind: TransactionType | None, size: int, after: tuple[datetime, UUID] | None
    ) -> tuple[list[Transaction], bool]: ...


class CreditService:
    """Decodes, calls, encodes."""

    def __init__(self, *, grants: Grants, books: Books, pages: Pages, changes: Changes) -> None:
        self._grants = grants
        self._books = books
        self._pages = pages
        self._changes = changes

    @property
    def name(self) -> str:
        """The service's full name."""
        return NAME

    def methods(self) -> dict[str, Method[Any]]:
        """The methods by name."""
        v1 = credit_service_pb2
        return {
            "GrantCredits": Method(
                request_type=v1.GrantCreditsRequest, answer=self.grant_credits, roles=CHANGING
            ),
            "GetBalance": Method(request_type=v1.GetBalanceRequest, answer=self.get_balance, roles=READING),
            "ListTransactions": Method(
                request_type=v1.ListTransactionsRequest, answer=self.list_transactions, roles=READING
            ),
        }

    async def grant_credits(
        self, request: credit_service_pb2.GrantCreditsRequest, caller: Caller
    ) -> credit_service_pb2.GrantCreditsResponse:
        fields = Fields()
        grant = Grant(
            id=new_id(),
            user_id=fields.text("user_id", request.user_id, MAX_ID, required=True),
            amount_micros=fields.number("amount_micros", request.amount_micros, MAX_GRANT_MICROS, least=1),
            request_id=fields.text("request_id", request.request_id, MAX_ID) or None,
            description=fields.text("description", request.description, MAX_DESCRIPTION),
        )
        fields.check()
        granted = await self._grants.grant(grant)
        # A replay too: the first call may have ended before it came to this line.
        self._changes.changed(
            caller,
            "GrantCredits",
            user_id=grant.user_id,
            amount_micros=grant.amount_micros,
            transaction_id=str(granted.transaction_id),
            replayed=granted.replayed,
        )
        return credit_service_pb2.GrantCreditsResponse(
            transaction_id=str(granted.transaction_id),
            balance_micros=granted.balance_micros,
            replayed=granted.replayed,
        )

    async def get_balance(
        self, request: credit_service_pb2.GetBalanceRequest, caller: Caller
    ) -> credit_service_pb2.GetBalanceResponse:
        fields = Fields()
        user_id = fields.text("user_id", request.user_id, MAX_ID, required=True)
        fields.check()
        balance = await self._books.balance(user_id)
        return credit_service_pb2.GetBalanceResponse(
            balance_micros=balance.balance_micros,
            held_micros=balance.held_micros,
            available_micros=balance.available_micros,
        )

    async def list_transactions(
        self, request: credit_service_pb2.ListTransactionsRequest, caller: Caller
    ) -> credit_service_pb2.ListTransactionsResponse:
        fields = Fields()
        user_id = fields.text("user_id", request.user_id, MAX_ID, required=True)
        if request.type not in _TYPES:
            fields.violations.append(("type", f"Unknown value {request.type}."))
        page = self._pages.asked(fields, request)
        fields.check()
        after = None
        if page.after is not None:
            after = (datetime.fromisoformat(page.after[0]), UUID(page.after[1]))
        found, has_more = await self._books.transactions(
            user_id, kind=_TYPES[request.type], size=page.size, after=after
        )
        last = (found[-1].created_at.isoformat(), str(found[-1].id)) if has_more else None
        return credit_service_pb2.ListTransactionsResponse(
            transactions=[_transaction(one) for one in found],
            next_page_token=self._pages.token(request, last),
        )


def _transaction(transaction: Transaction) -> credit_service_pb2.Transaction:
    return credit_service_pb2.Transaction(
        transaction_id=str(transaction.id),
        type=credit_service_pb2.TransactionType.Value(f"TRANSACTION_TYPE_{transaction.type.name}"),
        amount_micros=transaction.amount_micros,
        balance_after_micros=transaction.balance_after_micros,
        request_id=transaction.request_id or "",
        description=transaction.description,
        service_type=transaction.service_type,
        provider=transaction.provider,
        model=transaction.model,
        outcome=transaction.outcome or "",
        cost_source=transaction.cost_source or "",
        mode=transaction.mode or "",
        reason=transaction.reason or "",
        total_tokens=transaction.total_tokens,
        is_late=transaction.is_late,
        create_time=timestamp(transaction.created_at),
    )
