"""Asks a provider whether a key is good: one GET that costs nothing, over HTTP.

A key goes to its provider alone: no redirect is followed, no proxy is taken from the environment, no
cookie is kept. What the provider says against it comes back as one sentence without secrets.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Final, Protocol
from urllib.parse import unquote

import httpx

from keyturn.secret import Secret
from keyturn_server.scrub import STRUCK, scrub

_MOST_AT_ONCE: Final = 64
_MOST_READ_BYTES: Final = 16 * 1024
_MOST_CLEANED: Final = 2000
_MOST_SAID: Final = 300
_MOST_NESTED: Final = 4

# How long a run is that is struck out. Four characters are shown to the key's owner anyway, and no more
# than a quarter of a short key.
_SHORTEST_PART: Final = 5
# Of letters and digits alone, from anywhere in a text: shorter ones stand there by chance.
_SHORTEST_DISGUISED: Final = 8

_SENDABLE: Final = re.compile(r"[\x21-\x7e]+")
_HEADER: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+: [\x20-\x7e]*")
# A word that is masked in the middle, as providers quote keys: sk-***gA, ****3f2b, xai-...b14o.
_MASKED: Final = re.compile(r"[\w.-]*\*{2,}(?:[\w.*-]*[\w*-])?|\w[\w-]*(?:\.{3}|…)\w[\w-]*")
# Where an error's text stands in JSON, in the order in which to look.
_TEXTS: Final = ("error", "message", "detail", "errors", "fault", "faultstring", "error_description", "title")


class KeyCheck(Enum):
    """What came of asking about a key."""

    VALID = "VALID"
    """The provider took it, or knows it and asks for patience."""
    INVALID = "INVALID"
    """The provider refused it."""
    UNVERIFIED = "UNVERIFIED"
    """The provider could not be asked, or gave no answer that says anything of the key."""
    UNREADABLE = "UNREADABLE"
    """The stored key does not open, so nobody was asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """The answer about a key."""

    result: KeyCheck
    message: str
    """One sentence in English, without anything secret."""


class UnusableRow(Exception):  # noqa: N818 - nothing went wrong but the row
    """No request can be made of what stands in `api_providers`."""


class CheckedProvider(Protocol):
    """What has to be known of a provider. Meanings: `configuration.Provider`."""

    @property
    def id(self) -> str: ...
    @property
    def base_url(self) -> str: ...
    @property
    def auth_header(self) -> str: ...
    @property
    def auth_prefix(self) -> str: ...
    @property
    def check_path(self) -> str | None: ...
    @property
    def check_headers(self) -> Mapping[str, str]: ...
    @property
    def check_refusal(self) -> str | None: ...


CANNOT_BE_CHECKED: Final = Checked(
    result=KeyCheck.UNVERIFIED, message="Keys of this provider cannot be checked."
)


def is_sendable(secret: str) -> bool:
    """Whether a key can stand in a header: printable ASCII without spaces, and not empty."""
    return _SENDABLE.fullmatch(secret) is not None


class ProviderChecks:
    """Checks keys. Made with `open_provider_checks`. Safe for any number of callers at once.

    `on_check` hears of everyone that was asked: the provider, the result, and what it rests on, which is
    the status of the answer or the name of an error.
    """

    def __init__(
        self, client: httpx.AsyncClient, *, timeout: timedelta, on_check: Callable[[str, KeyCheck, str], None]
    ) -> None:
        self._client = client
        self._timeout_seconds = timeout.total_seconds()
        self._on_check = on_check
        self._slots = asyncio.Semaphore(_MOST_AT_ONCE)

    async def check(self, provider: CheckedProvider, secret: Secret) -> Checked:
        """What the provider says of the key. Raises nothing: whoever cannot be asked says nothing."""
        if provider.check_path is None:
            return CANNOT_BE_CHECKED
        if not is_sendable(secret.reveal()):
            return _unverified("The key has characters that cannot stand in an HTTP header")
        try:
            async with asyncio.timeout(self._timeout_seconds), self._slots:
                status, body = await self._ask(provider, provider.check_path, secret)
        except TimeoutError:
            checked, cause = _unverified("The provider did not answer in time"), "timeout"
        except Exception as error:
            # Of any kind, and never its text: a client that complains of a header quotes it.
            checked, cause = _unverified("The provider cannot be reached"), type(error).__name__
        else:
            checked, cause = _verdict(status, body, provider.check_refusal, secret), str(status)
        self._on_check(provider.id, checked.result, cause)
        return checked

    async def _ask(self, provider: CheckedProvider, path: str, secret: Secret) -> tuple[int, bytes]:
        """The status, and the beginning of an answer that is an error."""
        # Here, since the client would quote the whole header in a trace.
        if _HEADER.fullmatch(f"{provider.auth_header}: {provider.auth_prefix}") is None:
            raise UnusableRow
        url = httpx.URL(provider.base_url.rstrip("/") + "/").join(path)
        # Not compressed: a little of it can be a lot.
        headers = httpx.Headers(
            {"user-agent": "keyturn", "accept": "application/json", "accept-encoding": "identity"}
        )
        headers.update(provider.check_headers)
        headers[provider.auth_header] = provider.auth_prefix + secret.reveal()
        body = bytearray()
        async with self._client.stream("GET", url, headers=headers) as response:
            if response.is_client_error or response.is_server_error:
                async for part in response.aiter_raw():
                    body += part
                    if len(body) >= _MOST_READ_BYTES:
                        break
            return response.status_code, bytes(body[:_MOST_READ_BYTES])


@asynccontextmanager
async def open_provider_checks(
    *,
    timeout: timedelta,
    proxy: str | None,
    on_check: Callable[[str, KeyCheck, str], None] = lambda provider, result, cause: None,
) -> AsyncIterator[ProviderChecks]:
    """Checks, for the length of the block. `timeout` is for all of one check; `proxy` an URL."""
    certificates = httpx.create_ssl_context(trust_env=False)
    # Besides the public ones those that the machine trusts: a provider may be the operator's own.
    certificates.load_default_certs()
    async with httpx.AsyncClient(
        verify=certificates,
        proxy=proxy,
        trust_env=False,
        follow_redirects=False,
        timeout=None,  # noqa: S113 - `check` has one for the whole
        # Checks are rare, and a connection that died idle would look like a provider that did.
        limits=httpx.Limits(max_keepalive_connections=0),
    ) as client:
        client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=()))
        yield ProviderChecks(client, timeout=timeout, on_check=on_check)


def _verdict(status: int, body: bytes, refusal: str | None, secret: Secret) -> Checked:
    if 200 <= status < 300:
        return Checked(result=KeyCheck.VALID, message="The provider took the key.")
    if status == 429:
        return Checked(
            result=KeyCheck.VALID, message="The provider knows the key, and asks for patience (429)."
        )
    text = body.decode("utf-8", errors="replace")
    refused = status in (401, 403) or (
        400 <= status < 500 and refusal is not None and refusal.casefold() in text.casefold()
    )
    said = _without_secrets(_said(text), secret)
    if refused:
        return Checked(
            result=KeyCheck.INVALID, message=_sentence(f"The provider refused the key ({status})", said)
        )
    return _unverified(f"The provider answered with {status}, which says nothing of the key", said)


def _unverified(what: str, said: str = "") -> Checked:
    return Checked(result=KeyCheck.UNVERIFIED, message=_sentence(what, said))


def _sentence(what: str, said: str) -> str:
    if not said:
        return f"{what}."
    return f"{what}: {said}" if said[-1] in ".!?…" else f"{what}: {said}."


def _said(text: str) -> str:
    """What an error in JSON says, in whichever of the usual places; empty for anything else."""
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    for _ in range(_MOST_NESTED):
        match found:
            case str():
                return found
            case [first, *_]:
                found = first
            case dict():
                texts = (found[key] for key in _TEXTS if isinstance(found.get(key), str | dict | list))
                found = next((text for text in texts if text), None)
    return found if isinstance(found, str) else ""


def _without_secrets(text: str, secret: Secret) -> str:
    """One line of `text`, without the key, any part of it, and anything else that looks like a secret."""
    struck = _strike_parts(text[:_MOST_CLEANED], secret.reveal())
    if _is_disguised_in(struck, secret.reveal()):
        return ""
    line = " ".join(_MASKED.sub(STRUCK, scrub(_printable(struck))).split())
    return line if len(line) <= _MOST_SAID else f"{line[:_MOST_SAID].rstrip()}…"


def _is_disguised_in(text: str, secret: str) -> bool:
    """Whether a part of the key stands there spaced out, in groups, percent-encoded or backwards: as nobody
    quotes a key who does not mean to slip it through."""
    letters = _letters(secret)
    size = min(_SHORTEST_DISGUISED, len(letters))
    if not size:
        return False
    parts = {
        run[start : start + size] for run in (letters, letters[::-1]) for start in range(len(run) - size + 1)
    }
    return any(
        form[start : start + size] in parts
        for form in (_letters(text), _letters(unquote(text)))
        for start in range(len(form) - size + 1)
    )


def _letters(text: str) -> str:
    return "".join(character for character in text.lower() if character.isalnum())


def _printable(text: str) -> str:
    """Spaces for controls, lone surrogates, and what changes the direction of writing."""
    return "".join(character if character.isprintable() else " " for character in text)


def _strike_parts(text: str, secret: str) -> str:
    """`text` with every run that stands in `secret` too struck out, in whatever case."""
    size = min(_SHORTEST_PART, len(secret) // 4 + 1)
    lower, whole = text.lower(), secret.lower()
    if len(lower) != len(text):  # a few letters are longer in lower case: then as it is written
        lower, whole = text, secret
    parts = {whole[start : start + size] for start in range(len(whole) - size + 1)}
    kept: list[str] = []
    end = 0
    """Where the last run ends that was struck out."""
    for index, character in enumerate(text):
        if lower[index : index + size] in parts:
            if index >= end:
                kept.append(STRUCK)
            end = index + size
        elif index >= end:
            kept.append(character)
    return "".join(kept)
