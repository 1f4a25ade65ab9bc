"""The first process of a host of the test cluster: sets up the host's file system, then only reaps processes.

`unshare` starts it in new network, host name, mount, process and IPC namespaces. Every process of the host is its
descendant or was adopted by it, so one SIGKILL acts like a power cut and leaves no process, mount, device or network.
It runs as a file, with any Python, and uses only the standard library.

Mounts are private to the host: its own /proc, /tmp and /dev/shm, the cluster's /etc/slurm and /etc/hosts, null devices
that Slurm uses as GPUs and, if it has cgroups, its own part of the freezer. All else is the machine's file system, with
the cluster's shared folder and the clone that this file belongs to.
"""

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

CLONE = Path(__file__).resolve().parents[2]
OWN = ("/tmp", "/dev/shm")


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def furnish(folder: Path, name: str, gpus: int, *, freezer: bool) -> None:
    socket.sethostname(name)
    mount("-t", "proc", "proc", "/proc")
    hidden = any(CLONE.is_relative_to(own) for own in OWN)
    if hidden:
        mount("--bind", str(CLONE), str(folder / "clone"))
    for own in OWN:
        mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", own)
    if hidden:
        CLONE.mkdir(parents=True)
        mount("--bind", str(folder / "clone"), str(CLONE))
    if freezer:
        mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/sys/fs/cgroup")
        Path("/sys/fs/cgroup/freezer").mkdir()
        mount("-t", "cgroup", "-o", "freezer", "cgroup", "/sys/fs/cgroup/freezer")
    mount("--bind", str(folder / "etc"), "/etc/slurm")
    mount("--bind", str(folder / "etc" / "hosts"), "/etc/hosts")
    if gpus:
        devices = folder / "gpus"
        mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", str(devices))
        for index in range(gpus):
            os.mknod(devices / f"gpu{index}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
            (devices / f"gpu{index}").chmod(0o666)  # mknod's mode went through the umask


def reap_for_ever() -> None:
    while True:
        signal.sigwait({signal.SIGCHLD})
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            continue  # no child is left


def main() -> None:
    folder, name, gpus, cgroup = sys.argv[1:]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    furnish(Path(folder), name, int(gpus), freezer=cgroup == "freezer")
    os.write(1, b"ready\n")  # fails if the starter was killed, because nothing would end this host
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    reap_for_ever()


if __name__ == "__main__":
    main()
