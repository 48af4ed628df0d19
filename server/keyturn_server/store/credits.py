"""The books of credits, to be read: balances and transactions. store/ledger.py writes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keyturn_server.errors import UserNotFound
from keyturn_server.ledger import Balance, Transaction, TransactionType

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

    import asyncpg

    from keyturn_server.store.database import Database

# The books of a user who was deleted stay, and can be read.
_BALANCE = """
SELECT coalesce(a.balance_micros, 0) AS balance_micros, coalesce(a.held_micros, 0) AS held_micros
  FROM (SELECT $1::text AS id) asked
  LEFT JOIN users u ON u.id = asked.id
  LEFT JOIN credit_accounts a ON a.user_id = asked.id
 WHERE u.id IS NOT NULL OR a.user_id IS NOT NULL
"""
# By the time of the change, and not by the id: a deduction's id is as old as its decision.
_TRANSACTIONS = """
SELECT id, transaction_type, amount_micros, balance_after_micros, request_id, description, service_type,
       provider, model, outcome, cost_source, mode, reason, total_tokens, is_late, created_at
  FROM credit_transactions
 WHERE user_id = $1
   AND ($2::text IS NULL OR transaction_type = $2)
   AND ($3::timestamptz IS NULL OR (created_at, id) < ($3, $4::uuid))
 ORDER BY created_at DESC, id DESC
 LIMIT $5
"""


class Books:
    """Balances and transactions, as they stand. Methods raise `UserNotFound` and `StoreUnavailable`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def balance(self, user_id: str) -> Balance:
        """The user's credits now; zero for a user without an account."""
        row = await self._database.fetchrow(_BALANCE, user_id)
        if row is None:
            raise UserNotFound(user_id)
        return Balance(balance_micros=row["balance_micros"], held_micros=row["held_micros"])

    async def transactions(
        self, user_id: str, *, kind: TransactionType | None, size: int, after: tuple[datetime, UUID] | None
    ) -> tuple[list[Transaction], bool]:
        """Up to `size` of the user's transactions, the newest first, and whether there are more.

        `after` is when the last one of the page before was made, and its id.
        """
        rows = await self._database.fetch(
            _TRANSACTIONS, user_id, kind.value if kind else None, *(after or (None, None)), size + 1
        )
        if not rows:
            await self.balance(user_id)
        return [_transaction(row) for row in rows[:size]], len(rows) > size


def _transaction(row: asyncpg.Record) -> Transaction:
    columns = dict(row)
    return Transaction(type=TransactionType(columns.pop("transaction_type")), **columns)
