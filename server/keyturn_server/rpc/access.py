"""Which caller stands behind a call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keyturn_server.access import ALL_ROLES, Caller

if TYPE_CHECKING:
    from keyturn_server.rpc.guard import Context


class Access:
    """Tells callers apart."""

    def caller_of(self, context: Context) -> Caller:
        """The caller. Raises `Unauthenticated`."""
        return Caller("socket", ALL_ROLES)
