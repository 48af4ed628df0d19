"""The access file: who may call, by the hashes of their tokens and the names in their certificates.

[[callers]]
name = "web"
roles = ["gateway"]
token_sha256 = ["9f86d081…"]
certificates = ["spiffe://example.com/web", "web.example.com"]
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from keyturn.secret import Secret
from keyturn_server.access import Caller, Role
from keyturn_server.errors import KeyturnFault
from keyturn_server.watched import File

TOKEN_PREFIX = "kta_"  # noqa: S105 - what tokens begin with, and scanners of secrets look for
_TOKEN_BYTES = 32
_KEYS = ("name", "roles", "token_sha256", "certificates")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_SPIFFE_ID = re.compile(r"spiffe://[a-z0-9._-]{1,255}(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._-]+)+")
_DNS_NAME = re.compile(r"(?=.{1,253}$)(?!-)[a-z0-9-]{1,63}(?<!-)(?:\.(?!-)[a-z0-9-]{1,63}(?<!-))*")


class AccessFileError(KeyturnFault):
    """The access file is not usable; the message names the file, entry and field, and no value."""


@dataclass(frozen=True, slots=True)
class Callers:
    """Whom the access file knows.

    Tokens are looked up by their SHA-256. A look-up takes a time that depends on the digest, of
    which nobody can steer a single bit without knowing the token: so it needs no constant time.
    Nor a slow hash: a token has 256 random bits, which cannot be tried out.
    """

    by_token: Mapping[bytes, Caller] = field(default_factory=dict)
    by_spiffe_id: Mapping[str, Caller] = field(default_factory=dict)
    by_dns_name: Mapping[str, Caller] = field(default_factory=dict)


def new_token() -> Secret:
    """A new random token of 256 bits."""
    return Secret(TOKEN_PREFIX + base64.urlsafe_b64encode(os.urandom(_TOKEN_BYTES)).rstrip(b"=").decode())


def digest_of(token: str) -> bytes:
    """What is kept of a token: its SHA-256."""
    return hashlib.sha256(token.encode()).digest()


def entry_of(name: str, roles: list[Role], token: Secret) -> str:
    """The entry that lets in whoever has `token`. Raises `AccessFileError` for an unusable name."""
    if _NAME.fullmatch(name) is None:
        raise AccessFileError(f"name: {_NAME_RULE}")
    listed = ", ".join(f'"{role}"' for role in sorted(set(roles)))
    return (
        f'[[callers]]\nname = "{name}"\nroles = [{listed}]\n'
        f'token_sha256 = ["{digest_of(token.reveal()).hex()}"]\n'
    )


def parse_callers(file: File) -> Callers:
    """The callers of an access file. Raises `AccessFileError` with all that is wrong with it."""
    if file.mode & 0o022:
        raise AccessFileError(f"{file.path}: others can write it. Run: chmod go-w {file.path}")
    if file.owner not in (0, os.geteuid()):
        raise AccessFileError(
            f"{file.path}: is owned by another user, who can write it. "
            f"Run: chown {os.geteuid()} {file.path} (or root)"
        )
    try:
        document = tomllib.loads(file.contents.decode())
    except UnicodeDecodeError:
        raise AccessFileError(f"{file.path}: is not UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        raise AccessFileError(f"{file.path}: is not TOML: {error}.") from None
    except (ValueError, RecursionError):
        # A number of thousands of digits, lists in lists in lists: tomllib lets these through.
        raise AccessFileError(f"{file.path}: has a value that is too long or too deep.") from None
    reader = _Reader()
    callers = reader.read(document)
    if reader.problems:
        raise AccessFileError(f"{file.path}: {'; '.join(reader.problems)}.")
    return callers


_NAME_RULE = "1 to 64 letters, digits, dots, hyphens and underscores, a letter or digit first"


class _Reader:
    """Reads entries, and collects what is wrong with them."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._names: set[str] = set()
        self._by_token: dict[bytes, Caller] = {}
        self._by_spiffe_id: dict[str, Caller] = {}
        self._by_dns_name: dict[str, Caller] = {}

    def read(self, document: dict[str, Any]) -> Callers:
        self._refuse_unknown("", document, ("callers",))
        entries = document.get("callers")
        # An empty file is a file half written, not the wish to let nobody in.
        if not isinstance(entries, list) or not entries:
            self.problems.append("callers: at least one [[callers]] entry is due")
            entries = []
        for number, entry in enumerate(entries, 1):
            self._read_entry(f"callers[{number}]", entry)
        return Callers(self._by_token, self._by_spiffe_id, self._by_dns_name)

    def _read_entry(self, place: str, entry: object) -> None:
        if not isinstance(entry, dict):
            self.problems.append(f"{place}: has to be a table")
            return
        name = entry.get("name")
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            self.problems.append(f"{place}.name: {_NAME_RULE}")
            name = ""
        else:
            place = f"{place} ({name})"
            if name in self._names:
                self.problems.append(f"{place}.name: another entry has it")
            self._names.add(name)
        self._refuse_unknown(place, entry, _KEYS)
        roles = self._roles(place, entry.get("roles"))
        tokens = self._texts(f"{place}.token_sha256", entry.get("token_sha256", []))
        certificates = self._texts(f"{place}.certificates", entry.get("certificates", []))
        if not tokens and not certificates:
            self.problems.append(f"{place}: token_sha256 or certificates is due")
        for number, digest in enumerate(tokens, 1):
            self._add_token(f"{place}.token_sha256[{number}]", digest, Caller(f"token:{name}", roles))
        for number, certificate in enumerate(certificates, 1):
            self._add_certificate(
                f"{place}.certificates[{number}]", certificate, Caller(f"cert:{name}", roles)
            )

    def _refuse_unknown(self, place: str, table: dict[str, Any], known: tuple[str, ...]) -> None:
        for key in sorted(table.keys() - set(known)):
            # A key is quoted as far as it can be no secret.
            shown = repr(key) if _NAME.fullmatch(key) and len(key) <= 32 else "a key"
            self.problems.append(f"{place + ': ' if place else ''}{shown} is not known here")

    def _roles(self, place: str, given: object) -> frozenset[Role]:
        known = {role.value: role for role in Role}
        if not isinstance(given, list) or not given or not all(str(each) in known for each in given):
            self.problems.append(f"{place}.roles: a list of at least one of {', '.join(known)}")
            return frozenset()
        return frozenset(known[str(each)] for each in given)

    def _texts(self, place: str, given: object) -> list[str]:
        if isinstance(given, str):
            return [given]
        if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
            self.problems.append(f"{place}: has to be a string, or a list of strings")
            return []
        return given

    def _add_token(self, place: str, digest: str, caller: Caller) -> None:
        if _DIGEST.fullmatch(digest) is None:
            self.problems.append(f"{place}: has to be a SHA-256 of 64 hex characters, not the token itself")
        elif bytes.fromhex(digest) in self._by_token:
            self.problems.append(f"{place}: stands in the file before")
        else:
            self._by_token[bytes.fromhex(digest)] = caller

    def _add_certificate(self, place: str, certificate: str, caller: Caller) -> None:
        if certificate.startswith("spiffe:"):
            pattern, known = _SPIFFE_ID, self._by_spiffe_id
        else:
            pattern, known = _DNS_NAME, self._by_dns_name
        if pattern.fullmatch(certificate) is None:
            self.problems.append(
                f"{place}: has to be a SPIFFE ID (spiffe://domain/path) or a DNS name in lower case, "
                "without wildcards"
            )
        elif certificate in known:
            self.problems.append(f"{place}: stands in the file before")
        else:
            known[certificate] = caller
