"""A folder that each host of the test cluster, and this machine, sees through a client of its own with caches.

The kernel of a test machine need not have NFS. sshfs caches as an NFS client does: attributes, names that do not exist
and lists of folders are up to CACHED_S old, and what another host wrote is fresh only once a file is opened. As there,
`mkdir`, `link` and `rename` happen at the server, and locks hold on one host alone. The server is sftp-server, which
runs beside each client, without network.
"""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.slurm.cluster import SlurmCluster
from tests.support.needs import need

CACHED_S: Final = 5
SERVER: Final = Path("/usr/lib/openssh/sftp-server")
_TIMEOUTS: Final = (
    *("entry_timeout", "attr_timeout", "negative_timeout", "ac_attr_timeout"),
    *("dcache_timeout", "dcache_dir_timeout", "dcache_link_timeout"),
)


@contextmanager
def delayed_folder(cluster: SlurmCluster) -> Iterator[Path]:
    """The folder at its path on all hosts and on this machine. No host may be switched off meanwhile."""
    need(SERVER.exists() and Path("/dev/fuse").exists(), "sshfs, OpenSSH's sftp-server and /dev/fuse")
    hosts = [host.enter for host in cluster.hosts]
    with tempfile.TemporaryDirectory(prefix="hpcr-delayed-", dir="/var/tmp") as name:
        behind, seen, server = (Path(name) / part for part in ("behind", "seen", "server"))
        behind.mkdir()
        seen.mkdir()
        server.write_text(f"#!/bin/sh\nexec {SERVER}\n")
        server.chmod(0o755)
        options = [f"ssh_command={server}", *(f"{timeout}={CACHED_S}" for timeout in _TIMEOUTS)]
        mount = ["sshfs", f"nowhere:{behind}", str(seen), "-o", ",".join(options)]
        subprocess.run(mount, check=True)
        try:
            for host in hosts:
                host(mount)
            yield seen
        finally:
            subprocess.run(["umount", str(seen)], check=True)
            for host in hosts:
                host(["umount", str(seen)])
