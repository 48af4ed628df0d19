"""Where the sidecar is and how to reach it: shared by both clients, which open the channel."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, field
from importlib import metadata
from urllib.parse import quote

import grpc

from keyturn.address import default_socket
from keyturn.secret import Secret


def _version() -> str:
    try:
        return metadata.version("keyturn")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "0+unknown"


VERSION = _version()

_ALWAYS: dict[str, str | int] = {
    "grpc.primary_user_agent": f"keyturn-python/{VERSION}",
    # One retry policy: ours. This switches off grpc's transparent and service-config retries.
    "grpc.enable_retries": 0,
    # A restarted sidecar is found again within the deadline of a call, not after grpc's 1 to 120 s.
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 1000,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """What a channel is opened with, and the metadata that every call carries."""

    target: str
    options: list[tuple[str, str | int]]
    credentials: grpc.ChannelCredentials | None = field(repr=False)
    """None: an insecure channel."""
    metadata: tuple[tuple[str, str], ...] = field(repr=False)


def connection(
    target: str | None,
    *,
    token: str | Secret | None,
    root_certificates: bytes | None,
    private_key: bytes | None,
    certificate_chain: bytes | None,
    tls: bool,
) -> Connection:
    """How to connect to `target` (None: `KEYTURN_ADDRESS`, else the default Unix socket).

    Raises `ValueError`: a target that is neither `unix:PATH` nor `HOST:PORT`, plain text to a host
    that is not this one, TLS on a Unix socket, half a client certificate, an unusable token.
    """
    target = target or os.environ.get("KEYTURN_ADDRESS") or f"unix:{default_socket()}"
    given = (root_certificates, private_key, certificate_chain)
    tls = tls or any(each is not None for each in given)
    if (private_key is None) != (certificate_chain is None):
        raise ValueError("a client certificate takes both private_key and certificate_chain")
    options = dict(_ALWAYS)
    if target.startswith("unix:"):
        if tls:
            raise ValueError(f"{target}: a Unix socket does not speak TLS")
        target = _unix(target)
        # grpc would send the escaped path, which other stacks refuse.
        options["grpc.default_authority"] = "localhost"
    elif _is_loopback(target):
        # An http_proxy in the environment is not for this machine's own sidecar.
        options["grpc.enable_http_proxy"] = 0
    elif not tls:
        raise ValueError(
            f"{target} is not this machine: give tls=True or root_certificates, so that keys and"
            " tokens do not cross the network in plain text"
        )
    else:
        # A peer that vanished without a word is noticed by pings, not by TCP after minutes; between
        # calls too, so that the next one finds a connection that works.
        options |= {
            "grpc.keepalive_time_ms": 30_000,
            "grpc.keepalive_timeout_ms": 5_000,
            "grpc.keepalive_permit_without_calls": 1,
            "grpc.http2.max_pings_without_data": 0,
        }
    return Connection(
        target=target,
        options=list(options.items()),
        credentials=grpc.ssl_channel_credentials(*given) if tls else None,
        metadata=_authorization(token),
    )


def _unix(target: str) -> str:
    """`unix:PATH` or `unix:///PATH`, escaped for grpc, which reads it as a URI."""
    path = target.removeprefix("unix:")
    if path.startswith("//"):
        path = path.removeprefix("//")
        if not path.startswith("/"):
            raise ValueError(f"{target}: write unix:PATH, or unix:///PATH for an absolute one")
    if not path:
        raise ValueError(f"{target}: the path of the socket is missing")
    return "unix:" + quote(path)


def _is_loopback(target: str) -> bool:
    """Whether `HOST:PORT` is this machine by its name or number; no name is looked up."""
    parts = re.fullmatch(r"(?:dns:///)?(\[[^\[\]]+\]|[^\[\]:/]+):(\d{1,5})", target)
    if parts is None:
        raise ValueError(f"{target}: write unix:PATH or HOST:PORT ([HOST]:PORT for IPv6)")
    host = parts[1].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _authorization(token: str | Secret | None) -> tuple[tuple[str, str], ...]:
    """The token as metadata: grpc refuses call credentials on a channel without TLS."""
    if token is None:
        return ()
    text = (token.reveal() if isinstance(token, Secret) else token).strip()
    if re.fullmatch(r"[!-~]+", text) is None:  # grpc would print it in its own error
        raise ValueError("a token is printable ASCII without spaces, and not empty")
    return (("authorization", f"Bearer {text}"),)
