"""Where a client connects to, and how safely."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from keyturn import Unavailable, _channel
from tests.client.conftest import PATIENCE, QUICK, Connect
from tests.client.scripted import Sidecar, serving

ASK: dict[str, Any] = {"user_id": "u1", "provider": "openai"}


def connection(target: str | None, **given: Any) -> _channel.Connection:
    nothing: dict[str, Any] = {
        "token": None,
        "root_certificates": None,
        "private_key": None,
        "certificate_chain": None,
        "tls": False,
    }
    return _channel.connection(target, **{**nothing, **given})


@pytest.mark.parametrize(
    ("target", "dialled"),
    [
        ("unix:/run/k.sock", "unix:/run/k.sock"),
        ("unix:///run/k.sock", "unix:/run/k.sock"),
        ("unix:run/k.sock", "unix:run/k.sock"),
        ("unix:/run/a b%20?#.sock", "unix:/run/a%20b%2520%3F%23.sock"),
    ],
)
def test_a_unix_socket_may_be_written_in_either_way(target: str, dialled: str) -> None:
    made = connection(target)
    assert made.target == dialled
    assert made.credentials is None
    assert dict(made.options)["grpc.default_authority"] == "localhost"


@pytest.mark.parametrize(
    "target",
    ["localhost:1", "127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "dns:///localhost:1"],
)
def test_this_machine_may_be_called_without_tls_and_past_any_proxy(target: str) -> None:
    made = connection(target)
    assert made.credentials is None
    assert dict(made.options)["grpc.enable_http_proxy"] == 0


@pytest.mark.parametrize(
    "target", ["10.0.0.1:1", "keyturn:50051", "0.0.0.0:1", "[::2]:1", "dns:///keyturn.svc:1"]
)
def test_another_machine_is_not_called_in_plain_text(target: str) -> None:
    with pytest.raises(ValueError, match="not this machine"):
        connection(target)
    assert connection(target, tls=True).credentials is not None
    assert connection(target, root_certificates=b"PEM").credentials is not None


@pytest.mark.parametrize(
    "target",
    ["nonsense", "host", "host:", ":1", "http://localhost:1", "::1:1", "a:b", "unix:", "unix://x"],
)
def test_a_target_that_is_neither_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match=r"unix:PATH|path of the socket is missing"):
        connection(target, tls=not target.startswith("unix:"))


def test_a_unix_socket_does_not_speak_tls() -> None:
    with pytest.raises(ValueError, match="does not speak TLS"):
        connection("unix:/run/k.sock", tls=True)


def test_half_a_client_certificate_is_refused() -> None:
    for half in ("private_key", "certificate_chain"):
        with pytest.raises(ValueError, match="both private_key and certificate_chain"):
            connection("localhost:1", **{half: b"PEM"})


def test_the_target_comes_from_the_argument_the_environment_or_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("KEYTURN_ADDRESS", raising=False)
    assert connection(None).target == "unix:/run/keyturn/keyturn.sock"
    monkeypatch.setenv("KEYTURN_ADDRESS", "")
    assert connection(None).target == "unix:/run/keyturn/keyturn.sock"
    monkeypatch.setenv("KEYTURN_ADDRESS", "localhost:7")
    assert connection(None).target == "localhost:7"
    assert connection("localhost:8").target == "localhost:8"


def test_grpc_has_no_retries_of_its_own() -> None:
    assert dict(connection("localhost:1").options)["grpc.enable_retries"] == 0


async def test_a_socket_with_odd_characters_in_its_path_is_reached(
    connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a b%20"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with serving("unix:k.sock"):
        for target in (f"unix:{folder}/k.sock", f"unix://{folder}/k.sock", "unix:k.sock"):
            assert (await connect(target, timeout=PATIENCE)("decide", **ASK)).allowed


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_loopback_is_reached_past_the_proxy_of_the_environment(
    connect: Connect, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with serving("127.0.0.1:0") as running:
        target = running.target.replace("127.0.0.1", host)
        assert (await connect(target, timeout=PATIENCE)("decide", **ASK)).allowed


@dataclass
class Certificates:
    authority: bytes
    key: bytes
    chain: bytes


@pytest.fixture(scope="module")
def certificates() -> Certificates:
    """An authority, and one certificate for localhost that both sides use."""
    now = datetime.now(UTC)

    def build(subject: str, issuer: str, key: Any, signer: Any, *, ca: bool) -> x509.Certificate:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName(
                    [
                        x509.DNSName("localhost"),
                        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
                    ]
                ),
                critical=False,
            )
            .sign(signer, hashes.SHA256())
        )

    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = build("authority", "authority", authority_key, authority_key, ca=True)
    leaf = build("localhost", "authority", key, authority_key, ca=False)
    pem = serialization.Encoding.PEM
    return Certificates(
        authority.public_bytes(pem),
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        leaf.public_bytes(pem),
    )


@pytest.fixture
def guarded(certificates: Certificates) -> Iterator[Sidecar]:
    """A sidecar that asks for a client certificate."""
    credentials = grpc.ssl_server_credentials(
        [(certificates.key, certificates.chain)],
        root_certificates=certificates.authority,
        require_client_auth=True,
    )
    with serving("127.0.0.1:0", credentials) as running:
        yield running


async def test_mutual_tls_reaches_a_sidecar_that_asks_for_it(
    connect: Connect, guarded: Sidecar, certificates: Certificates
) -> None:
    either = connect(
        guarded.target,
        root_certificates=certificates.authority,
        private_key=certificates.key,
        certificate_chain=certificates.chain,
        token="t0ken",
        timeout=PATIENCE,
    )
    assert (await either("decide", **ASK)).allowed
    assert guarded.received[0].metadata["authorization"] == "Bearer t0ken"


async def test_without_its_certificate_the_client_is_not_let_in(
    connect: Connect, guarded: Sidecar, certificates: Certificates
) -> None:
    for given in ({"root_certificates": certificates.authority}, {"tls": True}, {}):
        either = connect(guarded.target, timeout=PATIENCE, retries=QUICK, **given)
        with pytest.raises(Unavailable):
            await either("decide", **ASK)
    assert guarded.received == []
