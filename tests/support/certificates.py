"""Self-signed certificates, made as docs/users.md says."""

import shutil
import subprocess
from pathlib import Path

from tests.support.needs import need


def make_certificate(folder: Path, *, host: str = "127.0.0.1") -> tuple[Path, Path]:
    """Writes a certificate and its private key to `folder`; returns their paths. A second call renews them."""
    need(shutil.which("openssl") is not None, "openssl")
    cert, key = folder / "cert.pem", folder / "key.pem"
    new = [folder / f"new-{path.name}" for path in (cert, key)]
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "90", "-subj", "/CN=hpc-router", "-addext", f"subjectAltName=IP:{host}"),
            *("-out", str(new[0]), "-keyout", str(new[1])),
        ],
        check=True,
        capture_output=True,
    )
    new[0].replace(cert)
    new[1].replace(key)
    return cert, key
