"""How a user's key is stored: sealed under a master key, for one row, user and provider.

``v1.<key id>.<base64url nonce|ciphertext|tag>``, without padding: AES-256-GCM under the master
key's envelope subkey, a random 96-bit nonce, and as associated data the five lengths (4 bytes each,
big-endian) of the version, key id, user id, provider and row id, then these five in that order, the
row id as its 16 bytes. The lengths stand in front, so no character moves from one field to another.
Random nonces are good for 2^32 seals under one master key.

The Node gateways wrote ``base64(iv16 | tag16 | ciphertext)``: AES-256-GCM under the raw key, a
16-byte IV, no associated data, so such a row opens in any place until rotation has rewritten it.
"""

from __future__ import annotations

import os
import re
from binascii import a2b_base64, b2a_base64
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from struct import Struct
from typing import Final
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from keyturn.secret import Secret
from keyturn_server.keys.keyring import Keyring

_VERSION: Final = b"v1"
_PREFIX: Final = "v1."
_KEY_ID: Final = re.compile(r"[0-9a-f]{16}")
_LENGTHS: Final = Struct(">5I")
_NONCE_BYTES: Final = 12
_LEGACY_IV_BYTES: Final = 16
_TAG_BYTES: Final = 16
_TO_URL: Final = bytes.maketrans(b"+/", b"-_")
_FROM_URL: Final = bytes.maketrans(b"-_", b"+/")


class UnreadableCause(StrEnum):
    """Why a stored key does not open, and who can help."""

    UNKNOWN_KEY = "unknown_key"
    """Sealed under a master key that is not on the keyring: add it to ENCRYPTION_KEYS_RETIRED."""
    TAMPERED = "tampered"
    """Changed, or moved from another row, user or provider. A legacy row says no more than that no
    key opens it: its master key may be missing as well."""
    MALFORMED = "malformed"
    """Neither format, or its contents are no UTF-8: something else was written to the column."""


class Unreadable(Exception):  # noqa: N818
    """A stored key does not open. Holds neither the ciphertext nor a part of it.

    ``key_id`` is the master key it was sealed under, where the row names one.
    """

    def __init__(self, cause: UnreadableCause, message: str, *, key_id: str | None = None) -> None:
        super().__init__(message)
        self.cause = cause
        self.key_id = key_id


def seal(keyring: Keyring, secret: Secret, *, user_id: str, provider: str, row_id: UUID) -> str:
    """The text to store for ``secret`` in this row, sealed under the current master key."""
    key = keyring.current
    nonce = os.urandom(_NONCE_BYTES)
    place = _place(key.id, user_id, provider, row_id)
    sealed = key.envelope.encrypt(nonce, secret.reveal().encode(), place)
    return f"{_PREFIX}{key.id}.{encode_base64url(nonce + sealed)}"


def open_sealed(keyring: Keyring, text: str, *, user_id: str, provider: str, row_id: UUID) -> Secret:
    """The secret stored in this row, in the v1 or the legacy format.

    Raises:
        Unreadable: with the cause; see :class:`UnreadableCause`.
    """
    return opener(keyring, text, user_id=user_id, provider=provider, row_id=row_id)()


def opener(keyring: Keyring, text: str, *, user_id: str, provider: str, row_id: UUID) -> Callable[[], Secret]:
    """What opens the secret stored in this row, over and over: as `open_sealed` does, with the row made
    out once. It holds the row's own bytes and never the secret.

    Raises:
        Unreadable: the row cannot be made out; or, by the opener, it does not open.
    """
    if not text.startswith(_PREFIX):
        return partial(_open_legacy, keyring, text)
    key_id, _, body = text[len(_PREFIX) :].partition(".")
    key = keyring.by_id(key_id)
    if key is None:
        if not _KEY_ID.fullmatch(key_id):
            raise Unreadable(UnreadableCause.MALFORMED, "the stored key names no master key")
        raise Unreadable(
            UnreadableCause.UNKNOWN_KEY,
            f"the stored key was sealed under master key {key_id}, which is not on the keyring",
            key_id=key_id,
        )
    raw = decode_base64url(body)
    if raw is None or len(raw) < _NONCE_BYTES + _TAG_BYTES:
        raise Unreadable(
            UnreadableCause.MALFORMED,
            "the stored key is cut short, or is not canonical base64url",
            key_id=key_id,
        )
    place = _place(key_id, user_id, provider, row_id)
    return partial(_open_current, key.envelope, raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], place, key_id)


def _open_current(cipher: AESGCM, nonce: bytes, sealed: bytes, place: bytes, key_id: str) -> Secret:
    secret = _open(cipher, nonce, sealed, place, key_id)
    if secret is None:
        raise Unreadable(
            UnreadableCause.TAMPERED,
            f"the stored key does not open in this place under master key {key_id}: "
            "it was changed, or moved from another row, user or provider",
            key_id=key_id,
        )
    return secret


def is_current(keyring: Keyring, text: str) -> bool:
    """Whether the row is sealed under the current master key; if not, rotation has to rewrite it.

    Reads the key id only: a damaged row counts as current, and a legacy one never does.
    """
    return ciphertext_key_id(text) == keyring.current.id


def ciphertext_key_id(text: str) -> str | None:
    """The master key this row names; None for a legacy row and for what is no row at all."""
    if not text.startswith(_PREFIX):
        return None
    key_id, dot, _ = text[len(_PREFIX) :].partition(".")
    return key_id if dot and _KEY_ID.fullmatch(key_id) else None


def encode_base64url(raw: bytes) -> str:
    """Base64url without padding."""
    return b2a_base64(raw, newline=False).rstrip(b"=").translate(_TO_URL).decode("ascii")


def decode_base64url(text: str) -> bytes | None:
    """The bytes that :func:`encode_base64url` writes as exactly this text; None for any other."""
    try:
        raw = a2b_base64(text.encode("ascii").translate(_FROM_URL) + b"=" * (-len(text) % 4))
    except ValueError:
        return None
    # The decoder skips what it does not know; only the one canonical spelling comes back equal.
    return raw if encode_base64url(raw) == text else None


def _open_legacy(keyring: Keyring, text: str) -> Secret:
    raw = _decode_base64(text)
    if raw is None or len(raw) < _LEGACY_IV_BYTES + _TAG_BYTES:
        raise Unreadable(
            UnreadableCause.MALFORMED,
            "the stored key is neither in the v1 format nor in that of the Node gateways",
        )
    iv, tag = raw[:_LEGACY_IV_BYTES], raw[_LEGACY_IV_BYTES : _LEGACY_IV_BYTES + _TAG_BYTES]
    sealed = raw[_LEGACY_IV_BYTES + _TAG_BYTES :] + tag
    for key in keyring:
        secret = _open(key.legacy, iv, sealed, None, key.id)
        if secret is not None:
            return secret
    raise Unreadable(
        UnreadableCause.TAMPERED,
        f"the stored key, in the format of the Node gateways, opens under none of the master keys "
        f"{', '.join(keyring.ids)}: it was changed, or its master key is not on the keyring",
    )


def _open(cipher: AESGCM, nonce: bytes, sealed: bytes, place: bytes | None, key_id: str) -> Secret | None:
    # None: the tag does not match. The plaintext never has a name here, and no exception that
    # holds it is chained, so neither a traceback with locals nor an error tracker can show it.
    try:
        return Secret(cipher.decrypt(nonce, sealed, place).decode())
    except InvalidTag:
        return None
    except UnicodeDecodeError:
        pass
    raise Unreadable(
        UnreadableCause.MALFORMED,
        f"the stored key opens under master key {key_id}, but its contents are no UTF-8 text",
        key_id=key_id,
    )


def _place(key_id: str, user_id: str, provider: str, row_id: UUID) -> bytes:
    fields = (_VERSION, key_id.encode(), user_id.encode(), provider.encode(), row_id.bytes)
    return _LENGTHS.pack(*map(len, fields)) + b"".join(fields)


def _decode_base64(text: str) -> bytes | None:
    try:
        raw = a2b_base64(text.encode("ascii"))
    except ValueError:
        return None
    return raw if b2a_base64(raw, newline=False).decode("ascii") == text else None
