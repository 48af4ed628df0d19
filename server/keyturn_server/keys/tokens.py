"""Sealed tokens: the key handles and credit tickets that callers carry from Decide to Record, and the
page tokens that lead from one page of a list to the next.

``kth1_`` (handle), ``ktt1_`` (ticket) or ``ktp1_`` (page), then base64url without padding of
``root id (4) | nonce (12) | ciphertext | tag (16)``: AES-256-GCM under a key that HKDF-SHA256
derives from the root for this kind alone, with prefix and root id as associated data. The nonce is a
keyed hash of the claims, so the same claims make the same token on every replica, and no count of
tokens uses the nonces up. The digit in the prefix changes when the layout inside does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from hashlib import blake2b
from hmac import compare_digest
from struct import Struct
from typing import Any, Final
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from keyturn_server.keys.envelope import decode_base64url, encode_base64url
from keyturn_server.keys.keyring import derive
from keyturn_server.values import value

MAX_TOKEN_CHARACTERS: Final = 4096
"""A longer text is refused before any work. Ids at their limits make a token of some 2,900."""

_HANDLE_PREFIX: Final = "kth1_"
_TICKET_PREFIX: Final = "ktt1_"
_PAGE_PREFIX: Final = "ktp1_"
_QUERY_BYTES: Final = 16
_ROOT_ID_BYTES: Final = 4
_ROOT_SECRET_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_HEAD_BYTES: Final = _ROOT_ID_BYTES + _NONCE_BYTES
_TAG_BYTES: Final = 16
_MAX_TEXT_BYTES: Final = 2900

# Fixed fields first, the byte lengths of the texts last; the texts follow.
_HANDLE: Final = Struct(">16s16sqqqHHHHHH")
_TICKET: Final = Struct(">16sqqqHHHH")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


class InvalidTokenCause(StrEnum):
    """Why a token does not open."""

    MALFORMED = "malformed"
    """No token at all, or one cut short."""
    WRONG_KIND = "wrong_kind"
    """A ticket where a handle is due, or the other way round."""
    FOREIGN = "foreign"
    """Sealed by another Keyturn, or under a root that is no longer kept."""
    TAMPERED = "tampered"
    """Its root is known, and it was changed since it was sealed."""
    OTHER_QUERY = "other_query"
    """A page token of another list, or of this one with other filters."""


class InvalidToken(Exception):  # noqa: N818
    """A token does not open. Holds no part of the token."""

    def __init__(self, cause: InvalidTokenCause, message: str) -> None:
        super().__init__(message)
        self.cause = cause


@value
class HandleClaims:
    """What a key handle stands for: one decision for one revision of one of the user's keys."""

    decision_id: UUID
    user_id: str
    provider: str
    model: str
    service_type: str
    mode: str
    reason: str
    """The policy's mode and reason, for the record of the use."""
    key_id: UUID
    key_revision: int
    issued_at: datetime
    expires_at: datetime


@value
class TicketClaims:
    """What a credit ticket stands for: one hold, in micro-USD; the decision's id is the hold's."""

    decision_id: UUID
    user_id: str
    provider: str
    model: str
    service_type: str
    hold_micros: int
    issued_at: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True, eq=False)
class TokenRoot:
    """The secret behind every token, the same on every replica: an id of 4 bytes, 32 random bytes.

    Raises:
        ValueError: either has another length.
    """

    id: bytes
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.id) != _ROOT_ID_BYTES or len(self.secret) != _ROOT_SECRET_BYTES:
            raise ValueError(
                f"a token root is an id of {_ROOT_ID_BYTES} bytes and a secret of "
                f"{_ROOT_SECRET_BYTES}, not {len(self.id)} and {len(self.secret)}"
            )


class TokenSealer:
    """Seals and opens tokens. The first root seals, every one opens. Threads may share it.

    Whether a token has expired is NOT checked here: callers compare ``expires_at`` with their own
    ``now``. Times keep their microseconds and come back in UTC; a naive one is a TypeError.

    The same claims make the same token: a caller who asks again compares equal. Two different ones
    share a nonce with a chance of 2^-96 a pair, as if it were random.

    Raises:
        ValueError: there is no root, or two have the same id.
    """

    __slots__ = ("_handles", "_pages", "_signing", "_tickets")

    def __init__(self, roots: Sequence[TokenRoot]) -> None:
        if not roots:
            raise ValueError("a token sealer needs a root")
        if len({root.id for root in roots}) != len(roots):
            raise ValueError("two token roots have the same id")
        self._handles = _Box(_HANDLE_PREFIX, roots)
        self._tickets = _Box(_TICKET_PREFIX, roots)
        self._pages = _Box(_PAGE_PREFIX, roots)
        # root id -> the key that records are signed with; the first one signs
        self._signing = {root.id: derive(root.secret, b"keyturn/spool") for root in roots}

    def seal_handle(self, claims: HandleClaims) -> str:
        """A ``kth1_`` token with these claims.

        Raises:
            ValueError: the texts are so long that the token would be refused.
        """
        texts = _encode(
            claims.user_id, claims.provider, claims.model, claims.service_type, claims.mode, claims.reason
        )
        fixed = _HANDLE.pack(
            claims.decision_id.bytes,
            claims.key_id.bytes,
            claims.key_revision,
            _to_micros(claims.issued_at),
            _to_micros(claims.expires_at),
            *map(len, texts),
        )
        return self._handles.seal(fixed + b"".join(texts))

    def open_handle(self, text: str) -> HandleClaims:
        """The claims of a ``kth1_`` token, expired or not.

        Raises:
            InvalidToken: with the cause; see :class:`InvalidTokenCause`.
        """
        payload = self._handles.open(text)
        decision_id, key_id, key_revision, issued_at, expires_at, *lengths = _HANDLE.unpack_from(payload)
        user_id, provider, model, service_type, mode, reason = _decode(payload, _HANDLE.size, lengths)
        return HandleClaims(
            decision_id=UUID(bytes=decision_id),
            user_id=user_id,
            provider=provider,
            model=model,
            service_type=service_type,
            mode=mode,
            reason=reason,
            key_id=UUID(bytes=key_id),
            key_revision=key_revision,
            issued_at=_from_micros(issued_at),
            expires_at=_from_micros(expires_at),
        )

    def seal_ticket(self, claims: TicketClaims) -> str:
        """A ``ktt1_`` token with these claims.

        Raises:
            ValueError: the texts are so long that the token would be refused.
        """
        texts = _encode(claims.user_id, claims.provider, claims.model, claims.service_type)
        fixed = _TICKET.pack(
            claims.decision_id.bytes,
            claims.hold_micros,
            _to_micros(claims.issued_at),
            _to_micros(claims.expires_at),
            *map(len, texts),
        )
        return self._tickets.seal(fixed + b"".join(texts))

    def open_ticket(self, text: str) -> TicketClaims:
        """The claims of a ``ktt1_`` token, expired or not.

        Raises:
            InvalidToken: with the cause; see :class:`InvalidTokenCause`.
        """
        payload = self._tickets.open(text)
        decision_id, hold_micros, issued_at, expires_at, *lengths = _TICKET.unpack_from(payload)
        user_id, provider, model, service_type = _decode(payload, _TICKET.size, lengths)
        return TicketClaims(
            decision_id=UUID(bytes=decision_id),
            user_id=user_id,
            provider=provider,
            model=model,
            service_type=service_type,
            hold_micros=hold_micros,
            issued_at=_from_micros(issued_at),
            expires_at=_from_micros(expires_at),
        )

    def seal_page(self, query: bytes, cursor: Sequence[str | int]) -> str:
        """A ``ktp1_`` token for where the next page of a list begins; ``query`` is what was asked.

        Raises:
            ValueError: the cursor is so long that the token would be refused.
        """
        (payload,) = _encode(json.dumps(cursor, ensure_ascii=False))
        return self._pages.seal(_fingerprint(query) + payload)

    def open_page(self, query: bytes, text: str) -> list[Any]:
        """The cursor of a ``ktp1_`` token that was sealed for the same query.

        Raises:
            InvalidToken: with the cause; see :class:`InvalidTokenCause`.
        """
        payload = self._pages.open(text)
        if payload[:_QUERY_BYTES] != _fingerprint(query):
            raise InvalidToken(
                InvalidTokenCause.OTHER_QUERY,
                "this page token is of another list, or of this one with other filters",
            )
        cursor: list[Any] = json.loads(payload[_QUERY_BYTES:])
        return cursor

    def sign_record(self, body: bytes) -> bytes:
        """The signature of a record that leaves this process, for `is_signed`: 20 bytes."""
        root_id = next(iter(self._signing))
        return root_id + _signature(body, self._signing[root_id])

    def is_signed(self, body: bytes, signature: bytes) -> bool:
        """Whether a record was signed, as it is, on this database."""
        key = self._signing.get(signature[:_ROOT_ID_BYTES])
        return key is not None and compare_digest(signature[_ROOT_ID_BYTES:], _signature(body, key))


class _Box:
    """One kind of token: its prefix, and under each root a key of its own."""

    __slots__ = ("_ciphers", "_nonce_key", "_prefix", "_sealing_id")

    def __init__(self, prefix: str, roots: Sequence[TokenRoot]) -> None:
        label = prefix.encode()
        self._prefix = prefix
        self._sealing_id = roots[0].id
        self._nonce_key = derive(roots[0].secret, b"keyturn/nonce/" + label)
        # root id -> (cipher, associated data)
        self._ciphers = {
            root.id: (AESGCM(derive(root.secret, b"keyturn/token/" + label)), label + root.id)
            for root in roots
        }

    def seal(self, payload: bytes) -> str:
        cipher, associated = self._ciphers[self._sealing_id]
        nonce = blake2b(payload, digest_size=_NONCE_BYTES, key=self._nonce_key).digest()
        sealed = cipher.encrypt(nonce, payload, associated)
        return self._prefix + encode_base64url(self._sealing_id + nonce + sealed)

    def open(self, text: str) -> bytes:
        if len(text) > MAX_TOKEN_CHARACTERS or not text.startswith(self._prefix):
            raise self._refusal_at_sight(text)
        raw = decode_base64url(text[len(self._prefix) :])
        if raw is None or len(raw) < _HEAD_BYTES + _TAG_BYTES:
            raise self._malformed()
        known = self._ciphers.get(raw[:_ROOT_ID_BYTES])
        if known is None:
            raise InvalidToken(
                InvalidTokenCause.FOREIGN,
                f"this {_NAMES[self._prefix]} was sealed by another Keyturn, "
                "or so long ago that its root is no longer kept",
            )
        cipher, associated = known
        try:
            return cipher.decrypt(raw[_ROOT_ID_BYTES:_HEAD_BYTES], raw[_HEAD_BYTES:], associated)
        except InvalidTag:
            pass
        raise InvalidToken(
            InvalidTokenCause.TAMPERED,
            f"this {_NAMES[self._prefix]} was changed after it was sealed",
        )

    def _refusal_at_sight(self, text: str) -> InvalidToken:
        if len(text) > MAX_TOKEN_CHARACTERS:
            return self._malformed()
        for prefix, name in _NAMES.items():
            if text.startswith(prefix):
                return InvalidToken(
                    InvalidTokenCause.WRONG_KIND,
                    f"a {name} was given where a {_NAMES[self._prefix]} is due",
                )
        return self._malformed()

    def _malformed(self) -> InvalidToken:
        return InvalidToken(
            InvalidTokenCause.MALFORMED, f"this is no {_NAMES[self._prefix]}, or not a whole one"
        )


_NAMES: Final = {_HANDLE_PREFIX: "key handle", _TICKET_PREFIX: "credit ticket", _PAGE_PREFIX: "page token"}


def _fingerprint(query: bytes) -> bytes:
    return blake2b(query, digest_size=_QUERY_BYTES).digest()


def _signature(body: bytes, key: bytes) -> bytes:
    return blake2b(body, digest_size=_TAG_BYTES, key=key).digest()


def _encode(*texts: str) -> list[bytes]:
    encoded = [text.encode() for text in texts]
    if sum(map(len, encoded)) > _MAX_TEXT_BYTES:
        raise ValueError(f"the texts in a token take at most {_MAX_TEXT_BYTES} bytes together")
    return encoded


def _decode(payload: bytes, offset: int, lengths: Sequence[int]) -> list[str]:
    texts = []
    for length in lengths:
        texts.append(payload[offset : offset + length].decode())
        offset += length
    return texts


def _to_micros(time: datetime) -> int:
    return (time - _EPOCH) // _MICROSECOND


def _from_micros(micros: int) -> datetime:
    return _EPOCH + timedelta(0, 0, micros)
