"""The one place that makes users, keys and credits."""

from __future__ import annotations

import os
import secrets
from base64 import b64encode
from typing import Any, TypeAlias
from uuid import UUID

import asyncpg
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from keyturn.secret import Secret
from keyturn_server.ids import new_id
from keyturn_server.keys.envelope import seal
from keyturn_server.keys.keyring import Keyring
from tests.canaries import remember
from tests.support import MASTER_KEY

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

_KEYRING = Keyring.from_settings(MASTER_KEY, [])
assert _KEYRING is not None
KEYRING: Keyring = _KEYRING


def legacy_sealed(secret: str, *, master_key: str = MASTER_KEY) -> str:
    """A ciphertext as the Node gateways wrote it."""
    iv = os.urandom(16)
    sealed = AESGCM(bytes.fromhex(master_key)).encrypt(iv, secret.encode(), None)
    return b64encode(iv + sealed[-16:] + sealed[:-16]).decode()


class Factory:
    """Writes rows as a product's own back end would: in plain SQL."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    async def user(self, tier: str = "premium", *, name: str | None = None, micros: int = 0) -> str:
        """A user of `tier` with `micros` of credits; its id, `name` if given."""
        user_id = name or f"user-{secrets.token_hex(6)}"
        await self.connection.execute(
            "INSERT INTO users (id, email, subscription_tier) VALUES ($1, $2, $3)",
            user_id,
            f"{secrets.token_hex(4)}@example.com",
            tier,
        )
        if micros:
            await self.grant(user_id, micros)
        return user_id

    async def grant(self, user_id: str, micros: int, request_id: str | None = None) -> Any:
        """Credits for a user."""
        return await self.connection.fetchrow(
            "SELECT * FROM keyturn_grant_credits($1, $2, $3, $4, 'test')",
            new_id(),
            user_id,
            micros,
            request_id,
        )

    async def key(
        self,
        user_id: str,
        provider: str = "openai",
        *,
        secret: str | None = None,
        keyring: Keyring = KEYRING,
        **columns: Any,
    ) -> UUID:
        """A key of a user; its id."""
        key_id = new_id()
        text = secret or f"sk-test-{secrets.token_hex(16)}"
        remember("key", text)
        values = {
            "user_id": user_id,
            "id": key_id,
            "provider": provider,
            "label": secrets.token_hex(4),
            "encrypted_key": seal(keyring, Secret(text), user_id=user_id, provider=provider, row_id=key_id),
            "key_hint": text[-4:],
            **columns,
        }
        places = ", ".join(f"${number}" for number in range(1, len(values) + 1))
        await self.connection.execute(
            f"INSERT INTO user_api_keys ({', '.join(values)}) VALUES ({places})", *values.values()
        )
        return key_id

    async def flags(self, **enabled: bool) -> None:
        """Sets flags with a plain UPDATE."""
        for key, value in enabled.items():
            await self.connection.execute(
                "UPDATE feature_flags SET is_enabled = $2 WHERE key = $1", key, value
            )
