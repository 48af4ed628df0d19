"""TLS: files that do not fit, and files that change while calls go on."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding

from keyturn.v1 import routing_service_pb2 as pb
from keyturn_server.tls import TlsError, watched_tls
from keyturn_server.watched import UnreadableFile
from tests.certificates import Authority, Identity, serial_of
from tests.factories import Factory
from tests.support import Sidecar, eventually
from tests.test_access import (
    AUTHORITY,
    FOREIGN,
    SERVER,
    ending,
    events,
    files,
    mutual_tls,
    secure_channel,
    spiffe_id,
    told,
    write,
)

DECIDE = "/keyturn.v1.RoutingService/Decide"
CALLER = AUTHORITY.caller(spiffe_id("gateway"))


async def shown(address: str, directory: Path, identity: Identity = CALLER) -> int:
    """The serial number of the certificate that a new connection gets to see."""
    write(directory / "caller.cert", identity.certificate)
    write(directory / "caller.key", identity.key)

    def connect() -> int:
        context = ssl.create_default_context(cadata=AUTHORITY.certificate.decode())
        context.load_cert_chain(directory / "caller.cert", directory / "caller.key")
        context.set_alpn_protocols(["h2"])
        host, _, port = address.rpartition(":")
        with (
            socket.create_connection((host, int(port)), timeout=30) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secure,
        ):
            return serial_of(ssl.DER_cert_to_PEM_cert(secure.getpeercert(True) or b"").encode())

    return await asyncio.to_thread(connect)


async def is_shown(address: str, directory: Path, identity: Identity) -> None:
    async def so() -> bool:
        return await shown(address, directory) == serial_of(identity.certificate)

    await eventually(so)


async def test_certificates_are_replaced_under_load_without_a_failed_call(
    start_sidecar: Callable[..., Any], make: Factory
) -> None:
    user = await make.user()
    await make.key(user)
    request = pb.DecideRequest(user_id=user, provider="openai").SerializeToString()
    codes: list[grpc.StatusCode] = []
    over = asyncio.Event()
    async with files() as directory:
        sidecar = await start_sidecar(**mutual_tls(directory))
        address = sidecar.addresses[1]

        async def calls_on_one_connection() -> None:
            async with secure_channel(address, CALLER) as channel:
                while not over.is_set():
                    codes.append((await ending(channel, DECIDE, request)).code)

        async def calls_on_new_connections() -> None:
            while not over.is_set():
                async with secure_channel(address, CALLER) as channel:
                    codes.append((await ending(channel, DECIDE, request)).code)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(3):
                tasks.create_task(calls_on_one_connection())
                tasks.create_task(calls_on_new_connections())
            await is_shown(address, directory, SERVER)
            latest = SERVER
            for swap in range(3):
                before, latest = latest, AUTHORITY.server()
                # First the one and then the other, as most tools do: in between they do not fit.
                names = ["cert.pem", "key.pem"][:: 1 if swap % 2 else -1]
                parts = {"cert.pem": latest.certificate, "key.pem": latest.key}
                write(directory / names[0], parts[names[0]])

                async def is_refused(times: int = swap + 1) -> bool:
                    refused = [each for each in events(sidecar) if each["event"] == "reload_failed"]
                    return len(refused) == times

                await eventually(is_refused)
                assert await shown(address, directory) == serial_of(before.certificate)
                write(directory / names[1], parts[names[1]])
                await is_shown(address, directory, latest)
            write(directory / "cert.pem", latest.certificate[:300])
            write(directory / "cert.pem", latest.certificate)
            over.set()
    assert len(codes) > 10
    assert set(codes) == {grpc.StatusCode.OK}
    reasons = {each["reason"] for each in events(sidecar) if each["event"] == "reload_failed"}
    assert all("is not the key of the first certificate" in reason for reason in reasons)
    assert "PRIVATE" not in sidecar.log.getvalue()


async def test_client_authorities_are_replaced(start_sidecar: Callable[..., Any]) -> None:
    other = Authority("the next authority")
    theirs = other.caller(spiffe_id("viewer"))

    async def gets_in(identity: Identity) -> bool:
        async with secure_channel(sidecar.addresses[1], identity) as channel:
            return (await ending(channel, FOREIGN[0], b"")).code is grpc.StatusCode.OK

    async def only_they() -> bool:
        return not await gets_in(CALLER)

    async with files() as directory:
        sidecar = await start_sidecar(**mutual_tls(directory))
        assert await gets_in(CALLER)
        assert not await gets_in(theirs)
        async with secure_channel(sidecar.addresses[1], CALLER) as open_before:
            assert (await ending(open_before, FOREIGN[0], b"")).code is grpc.StatusCode.OK
            write(directory / "ca.pem", AUTHORITY.certificate + other.certificate)
            await eventually(lambda: gets_in(theirs))
            assert await gets_in(CALLER)
            write(directory / "ca.pem", other.certificate)
            await eventually(only_they)
            assert await gets_in(theirs)
            assert (await ending(open_before, FOREIGN[0], b"")).code is grpc.StatusCode.OK
        write(directory / "ca.pem", "nothing")
        (failed,) = await told(sidecar, "reload_failed")
        assert "has no certificates" in failed["reason"]
        assert await gets_in(theirs)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@pytest.mark.filterwarnings("ignore:.*TLSv1:DeprecationWarning")
async def test_versions_before_1_2_are_refused(
    start_sidecar: Callable[..., Any], version: ssl.TLSVersion
) -> None:
    async with files() as directory:
        sidecar: Sidecar = await start_sidecar(**{**mutual_tls(directory), "tls_client_ca": None})
        host, _, port = sidecar.addresses[1].rpartition(":")

        def connect(highest: ssl.TLSVersion) -> str | None:
            context = ssl.create_default_context(cadata=AUTHORITY.certificate.decode())
            context.set_ciphers("ALL:@SECLEVEL=0")
            context.minimum_version, context.maximum_version = version, highest
            context.set_alpn_protocols(["h2"])
            with (
                socket.create_connection((host, int(port)), timeout=30) as plain,
                context.wrap_socket(plain, server_hostname="localhost") as secure,
            ):
                return secure.version()

        assert await asyncio.to_thread(connect, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
        with pytest.raises(ssl.SSLError):
            await asyncio.to_thread(connect, version)


async def test_files_that_do_not_fit_are_refused_by_their_names() -> None:
    async with files() as directory:
        cert, key, ca = (directory / name for name in ("cert.pem", "key.pem", "ca.pem"))
        other = write(directory / "other.key", AUTHORITY.server().key)
        empty = write(directory / "empty", "")
        cut = write(directory / "cut", SERVER.key[:100])
        watched = watched_tls(cert, key, ca)
        assert watched is not None
        assert "PRIVATE" not in repr(watched.value)
        assert watched_tls(None, None, None) is None
        cases: tuple[tuple[Path | None, Path | None, Path | None, str], ...] = (
            (cert, None, None, "both --tls-cert and --tls-key"),
            (None, key, None, "both --tls-cert and --tls-key"),
            (None, None, ca, "both --tls-cert and --tls-key"),
            (cert, other, None, f"{other}: is not the key of the first certificate in {cert}"),
            (cert, cut, None, f"{cut}: is no private key"),
            (cert, cert, None, f"{cert}: is no private key"),
            (key, key, None, f"{key}: has no certificates"),
            (empty, key, None, f"{empty}: has no certificates"),
            (cert, key, empty, f"{empty}: has no certificates"),
            (cert, directory / "none", None, "cannot be read"),
        )
        for certificate, private_key, client_ca, reason in cases:
            with pytest.raises((TlsError, UnreadableFile)) as caught:
                watched_tls(certificate, private_key, client_ca)
            assert reason in str(caught.value)


async def test_a_pair_that_nobody_could_connect_with_leaves_the_old_one_in_force(
    start_sidecar: Callable[..., Any],
) -> None:
    now = datetime.now(UTC)
    # The last one is refused at first, and then its time comes.
    soon = AUTHORITY.server(valid_from=now + timedelta(seconds=15))
    cases = {
        "expired at": AUTHORITY.server(valid_from=now - timedelta(days=3)),
        "has to be RSA": AUTHORITY.server(key=ec.generate_private_key(ec.SECP256K1())),
        "is not valid before": soon,
    }
    async with files() as directory:
        sidecar = await start_sidecar(**mutual_tls(directory))
        for reason, identity in cases.items():
            write(directory / "key.pem", identity.key)
            write(directory / "cert.pem", identity.certificate)

            async def is_told(reason: str = reason) -> bool:
                return any(reason in each.get("reason", "") for each in events(sidecar))

            await eventually(is_told)
            if identity is not soon:
                assert await shown(sidecar.addresses[1], directory) == serial_of(SERVER.certificate)
        await is_shown(sidecar.addresses[1], directory, soon)


async def test_an_out_of_date_certificate_is_refused_at_the_start() -> None:
    now = datetime.now(UTC)
    async with files() as directory:
        cert, key = directory / "cert.pem", directory / "key.pem"
        for days, reason in ((-3, "the first certificate expired at 2"), (1, "is not valid before 2")):
            identity = AUTHORITY.server(valid_from=now + timedelta(days=days))
            write(cert, identity.certificate)
            write(key, identity.key)
            with pytest.raises(TlsError, match=f"{cert}: .*{reason}"):
                watched_tls(cert, key, None)


KEYS: dict[str, tuple[Callable[[], CertificateIssuerPrivateKeyTypes], bool]] = {
    "P-256": (lambda: ec.generate_private_key(ec.SECP256R1()), True),
    "P-384": (lambda: ec.generate_private_key(ec.SECP384R1()), True),
    "P-521": (lambda: ec.generate_private_key(ec.SECP521R1()), False),
    "secp256k1": (lambda: ec.generate_private_key(ec.SECP256K1()), False),
    "Ed25519": (ed25519.Ed25519PrivateKey.generate, False),
    "RSA 1024": (lambda: rsa.generate_private_key(65537, 1024), False),  # noqa: S505 - refused
    "RSA 2048": (lambda: rsa.generate_private_key(65537, 2048), True),
}


@pytest.mark.parametrize("kind", KEYS)
async def test_a_key_is_of_a_kind_that_grpc_gets_through_the_handshake(
    start_sidecar: Callable[..., Any], kind: str
) -> None:
    make, fits = KEYS[kind]
    identity = AUTHORITY.server(key=make())
    async with files() as directory:
        write(directory / "cert.pem", identity.certificate)
        write(directory / "key.pem", identity.key)
        if not fits:
            with pytest.raises(
                TlsError, match="has to be RSA of at least 2048 bits, or ECDSA on P-256 or P-384"
            ):
                watched_tls(directory / "cert.pem", directory / "key.pem", None)
            return
        sidecar = await start_sidecar(**mutual_tls(directory))
        async with secure_channel(sidecar.addresses[1], CALLER) as channel:
            assert (await ending(channel, FOREIGN[0], b"")).code is grpc.StatusCode.OK


async def test_a_key_of_a_kind_that_nobody_knows_is_refused() -> None:
    der = x509.load_pem_x509_certificate(SERVER.certificate).public_bytes(Encoding.DER)
    curve = bytes.fromhex("06082a8648ce3d0301")
    assert curve + b"\x07" in der
    unknown = ssl.DER_cert_to_PEM_cert(der.replace(curve + b"\x07", curve + b"\x7f"))
    async with files() as directory:
        write(directory / "cert.pem", unknown)
        with pytest.raises(TlsError, match="has to be RSA"):
            watched_tls(directory / "cert.pem", directory / "key.pem", None)


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o601, 0o644, 0o777])
async def test_a_key_that_is_open_to_everybody_is_refused(mode: int) -> None:
    async with files() as directory:
        key = directory / "key.pem"
        key.chmod(mode)
        with pytest.raises(TlsError, match=f"Run: chmod o-rwx {key}"):
            watched_tls(directory / "cert.pem", key, None)
        for fine in (0o400, 0o600, 0o640, 0o440):
            key.chmod(fine)
            assert watched_tls(directory / "cert.pem", key, None) is not None
