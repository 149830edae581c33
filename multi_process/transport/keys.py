"""What the processes of a run know and nobody else: its keys, its token. Imports nothing heavy.

With keys everything between server and workers is encrypted, and each side knows the other; a token keeps others out.

The server has a key and the workers have one, which they share. Each side takes nothing but the other's very
certificate, so names, addresses and dates in it do not matter, and nobody else's signature does either.
"""

from __future__ import annotations

import os
import ssl
import sys
from datetime import datetime, timezone
from pathlib import Path

from perfedavg.terminal.console import command_line

SERVER_NAME, WORKER_NAME = "server", "worker"
OF_WORKERS = (f"{WORKER_NAME}.key", f"{WORKER_NAME}.crt", f"{SERVER_NAME}.crt")
"""What a worker's machine needs. With no more than that, nobody can pose as the server."""
TOKEN_VARIABLE = "PERFEDAVG_TOKEN"
_MIN_TOKEN_CHARACTERS = 16


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


def read_token(token_file: Path | None) -> bytes | None:
    """The token in a file, else in the environment's PERFEDAVG_TOKEN; None where there is neither.

    Raises ValueError where the file cannot be read or the token is too short to be a secret.
    """
    if token_file is not None:
        source = f"--token_file {token_file}"
        try:
            token = token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{source} cannot be read ({getattr(error, 'strerror', 'not text')})") from error
    elif TOKEN_VARIABLE in os.environ:
        source, token = TOKEN_VARIABLE, os.environ[TOKEN_VARIABLE].strip()
    else:
        return None
    if len(token) < _MIN_TOKEN_CHARACTERS:
        raise ValueError(
            f"the token in {source} has {len(token)} characters, fewer than {_MIN_TOKEN_CHARACTERS}; make one with: "
            f"{command_line([sys.executable, '-c', 'import secrets; print(secrets.token_hex(32))'])}"
        )
    return token.encode()


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
