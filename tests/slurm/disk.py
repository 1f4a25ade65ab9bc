"""A small file system in a file, for a run directory that stalls while everything else goes on."""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 2**20


@contextmanager
def mounted_disk(*, size_mib: int = 256) -> Iterator[Path]:
    """Its folder, outside of /tmp. Hosts of the test cluster see it if they are booted afterwards."""
    with tempfile.TemporaryDirectory(prefix="hpcr-disk-", dir="/var/tmp") as name:
        image, folder = Path(name) / "image", Path(name) / "disk"
        folder.mkdir()
        with image.open("wb") as file:
            file.truncate(size_mib * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True)
        try:
            yield folder
        finally:
            subprocess.run(["umount", str(folder)], check=True)
