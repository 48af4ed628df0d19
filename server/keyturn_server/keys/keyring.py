"""Master keys: read from text, known by a fingerprint, gathered in a keyring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from string import hexdigits
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

CURRENT_NAME: Final = "ENCRYPTION_KEY"
RETIRED_NAME: Final = "ENCRYPTION_KEYS_RETIRED"

_KEY_BYTES: Final = 32
_ID_BYTES: Final = 8


class KeyringError(ValueError):
    """The master keys cannot be used as they are set. Its text never holds a part of a key."""


class MalformedMasterKey(KeyringError):  # noqa: N818
    """One setting is no master key. The message names the setting and what is wrong with it."""


class DuplicateMasterKey(KeyringError):  # noqa: N818
    """The same master key is set twice. The message names both places."""


class MissingCurrentKey(KeyringError):  # noqa: N818
    """Retired master keys are set, and no current one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MasterKey:
    """One master key, ready for use. The key itself lives only inside the cipher objects.

    ``id`` is its fingerprint: 64 bits in 16 lower-case hex digits, from HKDF-SHA256 under a label
    of its own, so it tells nothing of the key and differs for any other key. Two are equal when
    their ids are.
    """

    id: str
    envelope: AESGCM = field(repr=False, compare=False)
    """Seals and opens ``v1`` rows, under a subkey: what v1 seals is nothing to legacy, and back."""
    legacy: AESGCM = field(repr=False, compare=False)
    """Opens rows of the Node gateways, under the raw key."""
    is_weak: bool = field(repr=False, compare=False)
    """Whether its bytes follow a pattern, so that nobody drew them at random: worth a warning."""

    @classmethod
    def from_bytes(cls, key: bytes) -> MasterKey:
        """The master key of these 32 bytes. Derives its subkeys here, once."""
        if len(key) != _KEY_BYTES:
            raise ValueError(f"a master key is {_KEY_BYTES} bytes, not {len(key)}")
        return cls(
            id=derive(key, b"keyturn/master-key-id/v1", length=_ID_BYTES).hex(),
            envelope=AESGCM(derive(key, b"keyturn/envelope/v1")),
            legacy=AESGCM(key),
            is_weak=_is_weak(key),
        )


class Keyring:
    """The master key that seals, and the retired ones that still open. Iterates current first.

    Raises:
        DuplicateMasterKey: a key is in it twice.
    """

    __slots__ = ("_by_id", "_current")

    def __init__(self, current: MasterKey, retired: Sequence[MasterKey] = ()) -> None:
        names: dict[str, str] = {}
        for index, key in enumerate((current, *retired)):
            name = CURRENT_NAME if index == 0 else _retired_name(index - 1)
            if key.id in names:
                raise DuplicateMasterKey(f"{name} is the same key as {names[key.id]} ({key.id})")
            names[key.id] = name
        self._current = current
        self._by_id = {key.id: key for key in (current, *retired)}

    @classmethod
    def from_settings(cls, current: str | None, retired: Sequence[str]) -> Keyring | None:
        """The keyring of ENCRYPTION_KEY and ENCRYPTION_KEYS_RETIRED; None when neither is set.

        An empty ENCRYPTION_KEY is an error and not "unset": a secret that failed to mount would
        otherwise turn users' own keys off and spend their credits without a word.

        Raises:
            MalformedMasterKey: a setting is no master key.
            MissingCurrentKey: there are retired keys and no current one.
            DuplicateMasterKey: a key is set twice.
        """
        if current is None:
            if retired:
                raise MissingCurrentKey(
                    f"{RETIRED_NAME} is set and {CURRENT_NAME} is not: set {CURRENT_NAME} to the "
                    f"key that seals new rows, or unset both"
                )
            return None
        return cls(
            parse_master_key(current, name=CURRENT_NAME),
            [parse_master_key(text, name=_retired_name(index)) for index, text in enumerate(retired)],
        )

    @property
    def current(self) -> MasterKey:
        """The key that seals."""
        return self._current

    @property
    def ids(self) -> tuple[str, ...]:
        """The fingerprints, current first."""
        return tuple(self._by_id)

    def by_id(self, key_id: str) -> MasterKey | None:
        """The key with this fingerprint, or None."""
        return self._by_id.get(key_id)

    def __iter__(self) -> Iterator[MasterKey]:
        return iter(self._by_id.values())

    def __repr__(self) -> str:
        return f"Keyring(ids={list(self._by_id)})"


def parse_master_key(text: str, *, name: str) -> MasterKey:
    """The master key written as 64 hexadecimal characters, in either case.

    Raises:
        MalformedMasterKey: names the setting ``name`` and what is wrong, never a part of the key.
    """
    problem = _problem_with(text)
    if problem is not None:
        raise MalformedMasterKey(
            f"{name} {problem}. It must be {2 * _KEY_BYTES} hexadecimal characters "
            f"({_KEY_BYTES} random bytes), as `openssl rand -hex {_KEY_BYTES}` prints them"
        )
    return MasterKey.from_bytes(bytes.fromhex(text))


def derive(secret: bytes, purpose: bytes, *, length: int = 32) -> bytes:
    """``length`` bytes for one purpose, by HKDF-SHA256. Nothing of ``secret`` shows in them."""
    return HKDF(algorithm=SHA256(), length=length, salt=None, info=purpose).derive(secret)


def _problem_with(text: str) -> str | None:
    if not text.strip():
        return "is empty"
    if text != text.strip():
        return "has whitespace around it"
    if text[0] in "'\"`" or text[-1] in "'\"`":
        return "has a quotation mark around it"
    if text[:2] in ("0x", "0X"):
        return "begins with 0x, which is no part of a key"
    if len(text) != 2 * _KEY_BYTES:
        return f"has {len(text)} characters"
    for position, character in enumerate(text, start=1):
        if character not in hexdigits:
            return f"has something else than a hexadecimal digit as character {position}"
    return None


def _is_weak(key: bytes) -> bool:
    # One block of bytes over and over (00…, 0123456789abcdef four times), or bytes in even steps.
    repeats = any(key == key[:size] * (len(key) // size) for size in (1, 2, 4, 8, 16))
    even_steps = len({(after - before) % 256 for before, after in pairwise(key)}) == 1
    return repeats or even_steps


def _retired_name(index: int) -> str:
    # Counted from 0.
    return f"{RETIRED_NAME}[{index}]"
