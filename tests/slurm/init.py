"""The first process of a host of the test cluster: makes the machine its own, then only reaps.

`unshare` starts it in new network, host name, mount, process and IPC namespaces; whatever runs on the host is its
descendant or was adopted by it, so one SIGKILL is a power cut and leaves nothing behind: no process, no mount, no
device, no network. Run as a file, by any Python, with nothing but the standard library.
Mounts are private to the host: its own /proc, /tmp and /dev/shm, the cluster's /etc/slurm and /etc/hosts, null devices
that Slurm takes for GPUs and, where it has cgroups, its own part of the freezer. Everything else is the machine's file
system: the cluster's shared one, and on it the clone that this file belongs to, which is seen wherever it lies.
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
            continue  # none left at all


def main() -> None:
    folder, name, gpus, cgroup = sys.argv[1:]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    furnish(Path(folder), name, int(gpus), freezer=cgroup == "freezer")
    os.write(1, b"ready\n")  # raises where the starter has been killed: nobody would ever take this host down
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    reap_for_ever()


if __name__ == "__main__":
    main()
