"""Which handles have given up their secret."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

if TYPE_CHECKING:
    from keyturn_server.store.database import Database

_REDEEM = """
INSERT INTO handle_redemptions (user_id, decision_id, expires_at) VALUES ($1, $2, $3)
ON CONFLICT DO NOTHING RETURNING true
"""


class Redemptions:
    """The table `handle_redemptions`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def claim(self, *, user_id: str, decision_id: UUID, expires_at: datetime) -> bool:
        """True for the first caller, False for every later one. Raises `StoreUnavailable`."""
        return bool(await self._database.fetchval(_REDEEM, user_id, decision_id, expires_at))
