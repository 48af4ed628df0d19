"""How commands reach a sidecar, and as whom: by socket, by token, and over TLS with a certificate."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keyturn_server.access import Role
from tests.certificates import Authority
from tests.cli.command import check_fault, keyturn
from tests.support import Sidecar
from tests.test_access import AUTHORITY, files, mutual_tls, spiffe_id, token_of, write

WHOLE = ("flags", "list")
CHANGE = ("flags", "refresh")


async def test_a_token_from_a_variable_or_a_file_says_who_calls(
    start_sidecar: Callable[..., Any],
) -> None:
    async with files() as directory:
        sidecar: Sidecar = await start_sidecar(
            also=["127.0.0.1:0"], access_file=directory / "access.toml", socket_roles={Role.GATEWAY}
        )
        tcp, viewer = sidecar.addresses[1], token_of(Role.VIEWER)
        held = write(directory / "token", f"{viewer}\n")
        by_variable, by_file, forbidden, stranger, nobody, by_socket = await asyncio.gather(
            keyturn(*WHOLE, KEYTURN_ADDRESS=tcp, KEYTURN_TOKEN=viewer),
            keyturn(*WHOLE, "--address", tcp, "--token-file", str(held)),
            keyturn(*CHANGE, KEYTURN_ADDRESS=tcp, KEYTURN_TOKEN=viewer),
            keyturn(*WHOLE, KEYTURN_ADDRESS=tcp, KEYTURN_TOKEN="kta_canary-of-a-stranger"),
            keyturn(*WHOLE, KEYTURN_ADDRESS=tcp),
            keyturn(*WHOLE, KEYTURN_ADDRESS=sidecar.address),
        )
    for finished in (by_variable, by_file):
        assert (finished.code, finished.err) == (0, "")
        assert finished.out.startswith("Mode  BYOK_FIRST\n")
    check_fault(forbidden, 5, "[PERMISSION_DENIED]")
    check_fault(stranger, 5, "[UNAUTHENTICATED]", "--token-file")
    check_fault(nobody, 5, "[UNAUTHENTICATED]", "KEYTURN_TOKEN")
    check_fault(by_socket, 5, "[PERMISSION_DENIED]")
    assert "canary" not in stranger.err
    assert viewer not in forbidden.err


def identity_of(directory: Path, authority: Authority) -> tuple[str, ...]:
    """The options for an operator's certificate."""
    operator = authority.caller(spiffe_id(Role.OPERATOR))
    cert = write(directory / "operator.cert", operator.certificate)
    key = write(directory / "operator.key", operator.key)
    return ("--ca", str(directory / "ca.pem"), "--cert", str(cert), "--key", str(key))


async def test_a_certificate_says_who_calls(start_sidecar: Callable[..., Any]) -> None:
    async with files() as directory:
        sidecar: Sidecar = await start_sidecar(**mutual_tls(directory))
        options = identity_of(directory, AUTHORITY)
        address = ("--address", sidecar.addresses[1].replace("127.0.0.1", "localhost"))
        known, half, without = await asyncio.gather(
            keyturn(*CHANGE, *address, *options),
            keyturn(*CHANGE, *address, *options[:4]),
            keyturn(*CHANGE, *address, "--timeout", "20s"),
        )
    assert (known.code, known.err) == (0, "")
    check_fault(half, 2, "private_key and certificate_chain")
    check_fault(without, 6, "[UNAVAILABLE]")
