"""Who calls, and what that caller may do. Rules: DESIGN, "Access"."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What a caller is for."""

    GATEWAY = "gateway"
    """Decides, records and redeems: the only role that secrets are handed to."""
    OPERATOR = "operator"
    """Changes keys, flags, credits and users, and reads everything but secrets."""
    VIEWER = "viewer"
    """Reads everything but secrets."""


ALL_ROLES = frozenset(Role)


@dataclass(frozen=True, slots=True)
class Caller:
    """A caller as access control knows it. The name is no secret: it stands in logs and histories."""

    name: str
    roles: frozenset[Role]
