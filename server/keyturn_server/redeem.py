"""Redeem: the secret behind a handle, once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from keyturn.secret import Secret
from keyturn_server.decide import Profiles, open_key
from keyturn_server.errors import HandleExpired, HandleRedeemed, KeyGone, UserNotFound
from keyturn_server.keys.envelope import Unreadable
from keyturn_server.keys.keyring import Keyring
from keyturn_server.keys.tokens import TokenSealer


class Claims(Protocol):
    """Where it is kept which handles have given up their secret."""

    async def claim(self, *, user_id: str, decision_id: UUID, expires_at: datetime) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Redeemed:
    """A secret, and which one it is."""

    secret: Secret
    user_id: str
    key_id: UUID
    decision_id: UUID


class Redeemer:
    """Gives out secrets for handles. Safe for any number of callers at once."""

    def __init__(
        self,
        *,
        profiles: Profiles,
        redemptions: Claims,
        keyring: Keyring | None,
        sealer: TokenSealer,
        clock: Callable[[], datetime],
    ) -> None:
        self._profiles = profiles
        self._redemptions = redemptions
        self._keyring = keyring
        self._sealer = sealer
        self._clock = clock

    async def redeem(self, handle: str) -> Redeemed:
        """The secret; the handle is spent. A handle whose key cannot be opened is not spent.

        Raises `InvalidToken`, `HandleExpired`, `HandleRedeemed`, `KeyGone` and `StoreUnavailable`.
        """
        claims = self._sealer.open_handle(handle)
        if claims.expires_at <= self._clock():
            raise HandleExpired
        try:
            profile = await self._profiles.get(claims.user_id)
        except UserNotFound:
            raise KeyGone from None
        key = next((key for key in profile.keys if key.id == claims.key_id), None)
        # Another secret than the one decided on is not given out: its outcome would be put down to
        # the wrong one.
        if key is None or key.revision != claims.key_revision or self._keyring is None:
            raise KeyGone
        if not key.is_active or not key.is_valid:
            raise KeyGone
        try:
            secret = open_key(self._keyring, claims.user_id, key)
        except Unreadable:
            raise KeyGone from None
        if not await self._redemptions.claim(
            user_id=claims.user_id, decision_id=claims.decision_id, expires_at=claims.expires_at
        ):
            raise HandleRedeemed
        return Redeemed(
            secret=secret, user_id=claims.user_id, key_id=claims.key_id, decision_id=claims.decision_id
        )
