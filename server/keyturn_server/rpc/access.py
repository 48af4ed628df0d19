"""Which caller stands behind a call. Rules: DESIGN, "Access"."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from keyturn_server.access import Caller, Role
from keyturn_server.access_file import Callers, digest_of
from keyturn_server.errors import InvalidFields, Unauthenticated
from keyturn_server.scrub import scrub

if TYPE_CHECKING:
    from keyturn_server.rpc.guard import Context

ACTOR = "keyturn-actor"
"""Metadata of callers on a socket or insecure loopback: who they say that they are."""

_ACTOR = re.compile(r"[!-~](?:[ -~]{0,62}[!-~])?")
_MOST_REMEMBERED = 1000


class Access:
    """Tells callers apart: by token, by certificate, or by where they call from.

    A token that is presented decides alone: a wrong one lets nobody in through another door.
    """

    def __init__(
        self,
        *,
        callers: Callable[[], Callers],
        socket_roles: frozenset[Role],
        loopback_roles: frozenset[Role],
        mutual_tls: bool,
    ) -> None:
        """`callers` gives those in force now. Without `loopback_roles`, TCP alone identifies nobody."""
        self._callers = callers
        self._mutual_tls = mutual_tls
        self._socket = _Unnamed("socket", socket_roles)
        self._loopback = _Unnamed("loopback", loopback_roles)

    def caller_of(self, context: Context) -> Caller:
        """The caller. Raises `Unauthenticated`, and `InvalidFields` for an unusable actor."""
        authorization = actor = None
        for key, value in context.invocation_metadata() or ():
            if key == "authorization":
                if authorization is not None:
                    raise Unauthenticated
                authorization = value
            elif key == ACTOR:
                actor = value if actor is None else ""
        if authorization is not None:
            return self._by_token(authorization)
        if transport_of(context) == "socket":
            return self._socket.caller(actor)
        if self._mutual_tls:
            return self._by_certificate(context.auth_context())
        if self._loopback.roles:
            return self._loopback.caller(actor)
        raise Unauthenticated

    def _by_token(self, authorization: str | bytes) -> Caller:
        scheme, _, token = str(authorization).partition(" ")
        caller = self._callers().by_token.get(digest_of(token)) if scheme.lower() == "bearer" else None
        if caller is None:
            raise Unauthenticated
        return caller

    def _by_certificate(self, facts: Mapping[str, Iterable[bytes]]) -> Caller:
        """gRPC has verified the certificate against the client authorities by now."""
        callers = self._callers()
        found = {
            caller
            for key, known in (("peer_uri", callers.by_spiffe_id), ("peer_dns", callers.by_dns_name))
            for name in facts.get(key, ())
            if (caller := known.get(name.decode(errors="replace"))) is not None
        }
        # A certificate of two callers could be either's.
        if len(found) != 1:
            raise Unauthenticated
        return found.pop()


def transport_of(context: Context) -> str:
    """`socket` or `tcp`."""
    return "socket" if context.peer().startswith("unix:") else "tcp"


class _Unnamed:
    """Callers who are known by where they call from, and by a name that they claim."""

    def __init__(self, name: str, roles: frozenset[Role]) -> None:
        self.roles = roles
        self._caller = Caller(name, roles)
        self._named: dict[str, Caller] = {}

    def caller(self, actor: str | bytes | None) -> Caller:
        if actor is None:
            return self._caller
        claimed = str(actor)
        caller = self._named.get(claimed)
        if caller is None:
            if _ACTOR.fullmatch(claimed) is None:
                raise InvalidFields((ACTOR, "Once, with 1 to 64 printable ASCII characters."))
            caller = Caller(f"{self._caller.name}:{scrub(claimed)}", self.roles)
            if len(self._named) >= _MOST_REMEMBERED:
                self._named.clear()
            self._named[claimed] = caller
        return caller
