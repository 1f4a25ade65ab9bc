"""HTTPS between the router and its clients.

The router's record holds its certificate, and our own clients accept exactly this one: only the holder of the private
key can complete the handshake. So they need no certificate authority, and do not compare the name in the certificate
with the address, which is that of a node and seldom a name in it. Other clients check both as usual.
"""

import re
import ssl
from functools import lru_cache
from pathlib import Path
from typing import Final

from hpc_router.errors import ConfigError

_CERTIFICATE: Final = re.compile(r"-----BEGIN CERTIFICATE-----\s[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----")


def read_certificate(path: Path) -> str:
    """Returns the first certificate of a PEM file, which is the server's own. Raises ConfigError if it has none."""
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"router.tls_cert={path}: {_why(error)} (valid: a PEM file)", key="router.tls_cert"
        ) from error
    found = _CERTIFICATE.search(text)
    if found is None:
        raise ConfigError(f"router.tls_cert={path}: has no certificate (valid: a PEM file)", key="router.tls_cert")
    return found[0] + "\n"


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """Returns the context of a server with this certificate chain and private key. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    load_pair(context, certificate, key)
    return context


def load_pair(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """Loads certificate chain and private key into `context`, for later handshakes. Raises ConfigError if they do not
    fit together; `context` then cannot be used any more."""
    names = f"router.tls_cert={certificate} router.tls_key={key}"
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except ssl.SSLError as error:
        why = "the key does not belong to the certificate" if "MISMATCH" in str(error.reason) else _why(error)
        valid = "valid: PEM files of a certificate and its private key, which has no password"
        raise ConfigError(f"{names}: {why} ({valid})", key="router.tls_cert") from error
    except OSError as error:
        raise ConfigError(f"{names}: cannot be read: {_why(error)}", key="router.tls_cert") from error
    except ValueError as error:  # of `_no_password`
        raise ConfigError(
            f"{names}: the private key has a password (valid: a key without one)", key="router.tls_key"
        ) from error


@lru_cache(maxsize=16)
def client_context(certificate: str) -> ssl.SSLContext:
    """Returns the context of a client that accepts only this certificate. Raises ValueError if `certificate` is not one
    in PEM."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it need not be self-signed
    try:
        context.load_verify_locations(cadata=certificate)
    except ssl.SSLError as error:
        raise ValueError(f"not a certificate: {error.reason}") from error
    return context


def _no_password() -> str:
    raise ValueError("a private key with a password")


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
