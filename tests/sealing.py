"""Handles and tickets as the sidecars on a database seal them."""

from __future__ import annotations

from keyturn_server.keys.tokens import TokenRoot, TokenSealer
from tests.factories import Connection


async def sealer_of(sql: Connection) -> TokenSealer:
    """Seals as the sidecars on this database do."""
    rows = await sql.fetch("SELECT id, secret FROM token_roots ORDER BY created_at DESC")
    return TokenSealer([TokenRoot(row["id"], row["secret"]) for row in rows])
