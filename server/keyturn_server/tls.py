"""The sidecar's certificate and key, and whose certificates it takes from callers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import PublicKeyAlgorithmOID

from keyturn_server.errors import KeyturnFault
from keyturn_server.watched import File, Watched

_MIN_RSA_BITS = 2048
# Callers made with gRPC's core refuse the handshake for P-521 and Ed25519; with secp256k1 it does not serve.
_CURVES = (ec.SECP256R1, ec.SECP384R1)


class TlsError(KeyturnFault):
    """The files for TLS are not usable; the message names the file, and nothing of what is in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """What TLS is spoken with, as PEM; certificate and key belong together."""

    certificate_chain: bytes
    private_key: bytes = field(repr=False)
    client_ca: bytes | None
    """Who signs callers' certificates. None: callers are asked for none."""


def watched_tls(
    certificate: Path | None, private_key: Path | None, client_ca: Path | None
) -> Watched[TlsFiles] | None:
    """What TLS is spoken with; None without a certificate. Raises `TlsError` and `UnreadableFile`."""
    if certificate is None and private_key is None and client_ca is None:
        return None
    if certificate is None or private_key is None:
        raise TlsError("TLS takes both --tls-cert and --tls-key.")
    paths = (certificate, private_key, *(() if client_ca is None else (client_ca,)))
    return Watched(paths, _parse)


def _parse(files: Sequence[File]) -> TlsFiles:
    certificate, private_key, *client_ca = files
    if private_key.mode & 0o007:
        raise TlsError(
            f"{private_key.path}: everybody on this machine can get at the key. "
            f"Run: chmod o-rwx {private_key.path}"
        )
    shown = _certificates(certificate)[0]
    _refuse_unservable(shown, certificate.path)
    _refuse_out_of_date(shown, certificate.path, now=datetime.now(UTC))
    try:
        key = load_pem_private_key(private_key.contents, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise TlsError(f"{private_key.path}: is no private key as PEM without a password.") from None
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if shown.public_key().public_bytes(*form) != key.public_key().public_bytes(*form):
        raise TlsError(f"{private_key.path}: is not the key of the first certificate in {certificate.path}.")
    for each in client_ca:
        _certificates(each)
    return TlsFiles(
        certificate_chain=certificate.contents,
        private_key=private_key.contents,
        client_ca=client_ca[0].contents if client_ca else None,
    )


def _certificates(file: File) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(file.contents)
    except (ValueError, x509.InvalidVersion):
        raise TlsError(f"{file.path}: has no certificates as PEM.") from None


def _refuse_unservable(shown: x509.Certificate, path: Path) -> None:
    """Raises `TlsError` for a kind of key with which callers made with gRPC's core cannot connect."""
    if not _servable(shown):
        raise TlsError(
            f"{path}: the key of the first certificate has to be RSA of at least {_MIN_RSA_BITS} bits, "
            "or ECDSA on P-256 or P-384."
        )


def _servable(shown: x509.Certificate) -> bool:
    try:
        key = shown.public_key()
    except (ValueError, UnsupportedAlgorithm):
        return False
    match key:
        case rsa.RSAPublicKey():
            # Not the kind that is for RSA-PSS alone.
            plain = shown.public_key_algorithm_oid == PublicKeyAlgorithmOID.RSAES_PKCS1_v1_5
            return plain and key.key_size >= _MIN_RSA_BITS
        case ec.EllipticCurvePublicKey():
            return isinstance(key.curve, _CURVES)
        case _:
            return False


def _refuse_out_of_date(shown: x509.Certificate, path: Path, *, now: datetime) -> None:
    """Raises `TlsError` for a certificate that callers do not take now."""
    first, last = shown.not_valid_before_utc, shown.not_valid_after_utc
    if now > last:
        raise TlsError(f"{path}: the first certificate expired at {last:%Y-%m-%dT%H:%M:%SZ}.")
    if now < first:
        raise TlsError(f"{path}: the first certificate is not valid before {first:%Y-%m-%dT%H:%M:%SZ}.")
