"""Certificates for tests: an authority, and what it signs."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


class Identity(NamedTuple):
    """A certificate and its key, as PEM."""

    certificate: bytes
    key: bytes


class Authority:
    """Signs certificates that live for a day."""

    def __init__(self, name: str = "test authority") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _common_name(name)
        self.certificate = _pem(
            _builder(self._name, self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    def server(
        self, *, key: CertificateIssuerPrivateKeyTypes | None = None, valid_from: datetime | None = None
    ) -> Identity:
        """For a sidecar on this machine; valid for two days."""
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        return self._sign("sidecar", [x509.DNSName("localhost"), address], key=key, valid_from=valid_from)

    def caller(self, *names: str, common_name: str = "caller", email: str = "") -> Identity:
        """With those SPIFFE IDs (or other URIs) and DNS names."""
        sans: list[x509.GeneralName] = [
            x509.UniformResourceIdentifier(name) if ":" in name else x509.DNSName(name) for name in names
        ]
        return self._sign(common_name, [*sans, *([x509.RFC822Name(email)] if email else [])])

    def _sign(
        self,
        name: str,
        sans: list[x509.GeneralName],
        *,
        key: CertificateIssuerPrivateKeyTypes | None = None,
        valid_from: datetime | None = None,
    ) -> Identity:
        key = key or ec.generate_private_key(ec.SECP256R1())
        builder = _builder(_common_name(name), self._name, key, valid_from=valid_from)
        if sans:
            builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
        form = (Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return Identity(_pem(builder.sign(self._key, hashes.SHA256())), key.private_bytes(*form))


def serial_of(pem: bytes) -> int:
    """The serial number of a certificate."""
    return x509.load_pem_x509_certificate(pem).serial_number


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: CertificateIssuerPrivateKeyTypes,
    *,
    valid_from: datetime | None = None,
) -> x509.CertificateBuilder:
    start = valid_from or datetime.now(UTC) - timedelta(days=1)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=2))
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)
