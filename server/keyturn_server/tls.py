"""The sidecar's certificate and key, and whose certificates it takes from callers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from keyturn_server.errors import KeyturnFault
from keyturn_server.watched import File, Watched


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
    chain = _certificates(certificate)
    try:
        key = load_pem_private_key(private_key.contents, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise TlsError(f"{private_key.path}: is no private key as PEM without a password.") from None
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if chain[0].public_key().public_bytes(*form) != key.public_key().public_bytes(*form):
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
    except ValueError:
        raise TlsError(f"{file.path}: has no certificates as PEM.") from None
