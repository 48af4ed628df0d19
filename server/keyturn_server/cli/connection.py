"""How commands reach a running sidecar: the options that they share, and an open channel."""

from __future__ import annotations

import getpass
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
from cyclopts import Parameter

from keyturn import _channel
from keyturn.secret import Secret
from keyturn_server.errors import KeyturnFault
from keyturn_server.settings import ConnectionSettings, read_connection_settings

_MAX_ACTOR = 64
_TIMEOUT = timedelta(seconds=30)
# Reports of a year are over grpc's 4 MiB where there are many groups.
_MOST_ANSWER_BYTES = 64 * 1024 * 1024


class ConnectionRefused(KeyturnFault):
    """The sidecar cannot be called as was said; the message names what is wrong, and no secret."""


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """Where the sidecar is, and as whom it is called.

    Parameters
    ----------
    address
        Where the sidecar is: unix:PATH or host:port. Default: where `keyturn serve` listens by default
        on this machine. [KEYTURN_ADDRESS]
    token_file
        A file with the bearer token. The token itself can be in KEYTURN_TOKEN; it is never an
        argument. [KEYTURN_TOKEN_FILE]
    ca
        The authorities to trust, as PEM; turns TLS on. [KEYTURN_CA]
    cert
        The caller's own certificate for mutual TLS, as PEM. [KEYTURN_CLIENT_CERT]
    key
        The private key of that certificate, as PEM. [KEYTURN_CLIENT_KEY]
    """

    address: str | None = None
    token_file: Path | None = None
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None


DEFAULT = Connection()
"""What a command takes when no option is given: the environment, and then the default socket."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Channel:
    """An open channel to a sidecar; `metadata` goes with every call."""

    grpc: grpc.aio.Channel
    metadata: tuple[tuple[str, str], ...] = field(repr=False)

    async def call(self, method: Callable[..., Any], request: Any, *, timeout: timedelta = _TIMEOUT) -> Any:
        """The answer of `method`, a unary one of a stub on `grpc`. Raises `grpc.aio.AioRpcError`."""
        return await method(request, metadata=self.metadata, timeout=timeout.total_seconds())


@asynccontextmanager
async def connected(connection: Connection = DEFAULT) -> AsyncIterator[Channel]:
    """A channel for the length of the block; nothing connects before the first call.

    Raises `ConnectionRefused` and `SettingsError`.
    """
    settings = read_connection_settings(
        address=connection.address,
        token_file=connection.token_file,
        ca=connection.ca,
        client_cert=connection.cert,
        client_key=connection.key,
    )
    try:
        reach = _channel.connection(
            settings.address,
            token=_token(settings),
            root_certificates=_read(settings.ca) if settings.ca else None,
            private_key=_read(settings.client_key) if settings.client_key else None,
            certificate_chain=_read(settings.client_cert) if settings.client_cert else None,
            tls=False,
        )
    except ValueError as error:
        raise ConnectionRefused(f"{error}.") from None
    options = [*reach.options, ("grpc.max_receive_message_length", _MOST_ANSWER_BYTES)]
    opened = (
        grpc.aio.insecure_channel(reach.target, options)
        if reach.credentials is None
        else grpc.aio.secure_channel(reach.target, reach.credentials, options)
    )
    async with opened as channel:
        yield Channel(grpc=channel, metadata=(*reach.metadata, *_actor()))


def _token(settings: ConnectionSettings) -> Secret | None:
    if settings.token_file is not None:
        return Secret(_read(settings.token_file).decode("ascii", "replace"))
    return Secret(settings.token.get_secret_value()) if settings.token is not None else None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConnectionRefused(f"{path}: cannot be read: {error.strerror}.") from None


def _actor() -> tuple[tuple[str, str], ...]:
    """Who sits here, for histories: the sidecar notes it where the caller is known by nothing better."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        return ()
    actor = re.sub(r"[^!-~]", "_", name)[:_MAX_ACTOR]
    return (("keyturn-actor", actor),) if actor else ()
