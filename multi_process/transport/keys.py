"""Keys of a run: with them everything between server and workers is encrypted, and each side knows the other.

The server has a key and the workers have one, which they share. Each side takes nothing but the other's very
certificate, so names, addresses and dates in it do not matter, and nobody else's signature does either.
"""

from __future__ import annotations

import os
import ssl
from datetime import datetime, timezone
from pathlib import Path

SERVER_NAME, WORKER_NAME = "server", "worker"
OF_WORKERS = (f"{WORKER_NAME}.key", f"{WORKER_NAME}.crt", f"{SERVER_NAME}.crt")
"""What a worker's machine needs. With no more than that, nobody can pose as the server."""


def make_keys(folder: Path) -> list[Path]:
    """Make a key and a certificate for the server, and for the workers. Returns the files.

    Raises ValueError where the folder has some already, OSError where they cannot be written.
    """
    files = [folder / f"{name}.{kind}" for name in (SERVER_NAME, WORKER_NAME) for kind in ("key", "crt")]
    found = [file for file in files if file.exists()]
    if found:
        raise ValueError(f"{found[0]} is there already; name another folder, or remove its keys first")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    contents = [content for name in (SERVER_NAME, WORKER_NAME) for content in _key_and_certificate(name)]
    for file, content in zip(files, contents, strict=True):
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as written:
            written.write(content)
    return files


def tls_context(folder: Path, is_server: bool) -> ssl.SSLContext:
    """For one side's connections: TLS 1.3 only, with its own key, and with the other side's alone let through.

    Raises ValueError where the folder's keys cannot be used.
    """
    own, other = (SERVER_NAME, WORKER_NAME) if is_server else (WORKER_NAME, SERVER_NAME)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the certificate itself is known
    context.verify_mode = ssl.CERT_REQUIRED
    if is_server:
        context.num_tickets = 0  # each connection proves the keys anew
    for name in (f"{own}.key", f"{own}.crt", f"{other}.crt"):
        if not (folder / name).is_file():
            raise ValueError(f"--keys {folder} has no {name}; make_keys.py makes keys, which each machine needs")
    try:
        context.load_cert_chain(folder / f"{own}.crt", folder / f"{own}.key", password="")  # and never ask for one
        context.load_verify_locations(folder / f"{other}.crt")
    except OSError as error:  # ssl's errors are some
        reason = getattr(error, "reason", None) or error.strerror or "not in PEM"
        raise ValueError(f"--keys {folder} cannot be used ({reason}); make new ones with make_keys.py") from error
    return context


def _key_and_certificate(name: str) -> tuple[bytes, bytes]:
    """A key of one's own on P-256, and the certificate that it signs itself, as PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"perfedavg {name}")])
    usage = ExtendedKeyUsageOID.SERVER_AUTH if name == SERVER_NAME else ExtendedKeyUsageOID.CLIENT_AUTH
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime(2000, 1, 1, tzinfo=timezone.utc))  # machines' clocks differ
        .not_valid_after(datetime(9999, 12, 31, 23, 59, 59, tzinfo=timezone.utc))  # RFC 5280's "does not expire"
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
        .sign(key, SHA256())
    )
    key_bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return key_bytes, certificate.public_bytes(Encoding.PEM)
