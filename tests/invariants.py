"""The four money invariants of DESIGN, "Money", as queries. Checked after every test on a database."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.factories import Connection

_BALANCE = """
SELECT a.user_id, a.balance_micros, coalesce(sum(t.amount_micros), 0) AS sum
  FROM credit_accounts a LEFT JOIN credit_transactions t USING (user_id)
 GROUP BY a.user_id, a.balance_micros
HAVING a.balance_micros <> coalesce(sum(t.amount_micros), 0)
"""
_HELD = """
SELECT a.user_id, a.held_micros, coalesce(sum(h.amount_micros), 0) AS sum
  FROM credit_accounts a LEFT JOIN credit_holds h ON h.user_id = a.user_id AND h.state = 'open'
 GROUP BY a.user_id, a.held_micros
HAVING a.held_micros <> coalesce(sum(h.amount_micros), 0)
"""
# A settled hold has one deduction of what it says it charged (none where nothing was charged and
# nothing succeeded), and every deduction has its settled hold.
_SETTLED = """
SELECT coalesce(h.id, t.id) AS id, h.state, h.charged_micros, t.amount_micros
  FROM credit_holds h
  FULL JOIN (SELECT * FROM credit_transactions WHERE transaction_type = 'deduction') t
    ON t.user_id = h.user_id AND t.id = h.id
 WHERE (t.id IS NOT NULL AND h.state IS DISTINCT FROM 'settled')
    OR (h.state = 'settled' AND h.charged_micros <> coalesce(-t.amount_micros, 0))
    OR (h.state = 'settled' AND h.outcome = 'SUCCESS' AND t.id IS NULL)
"""
_RECORDED = """
SELECT id, count(*) AS times FROM (
    SELECT id FROM api_key_usage UNION ALL SELECT id FROM credit_holds WHERE state = 'settled') records
 WHERE id = ANY ($1) GROUP BY id
"""


async def check_invariants(connection: Connection, acknowledged: Sequence[str] = ()) -> None:
    """Raises AssertionError with the rows that break one. `acknowledged` are ids of records."""
    assert not (rows := await connection.fetch(_BALANCE)), f"balance = sum(transactions): {rows}"
    assert not (rows := await connection.fetch(_HELD)), f"held = sum(open holds): {rows}"
    assert not (rows := await connection.fetch(_SETTLED)), f"a ticket settles at most once: {rows}"
    found = {
        str(row["id"]): row["times"] for row in await connection.fetch(_RECORDED, list(set(acknowledged)))
    }
    expected = dict.fromkeys(acknowledged, 1)
    assert found == expected, "every acknowledged record appears exactly once"
