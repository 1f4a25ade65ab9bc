"""The first process of a host of the test cluster: sets up the host's file system, then only reaps processes.

`unshare` starts it in new network, host name, mount, process and IPC namespaces. Every process of the host is its
descendant or was adopted by it, so one SIGKILL acts like a power cut and leaves no process, mount, device or network.
It runs as a file, with any Python, and uses only the standard library.

Mounts are private to the host: its own /proc, /tmp and /dev/shm, the cluster's /etc/slurm and /etc/hosts, null devices
that Slurm uses as GPUs and, if it has cgroups, its own part of the freezer. All else is the machine's file system, with
the cluster's shared folder and the clone that this file belongs to.

With another release of Debian, ROOT is the host's root. What the host writes to it stays in its memory. The machine's
folders that a Debian does not have of itself are at their places in it, and so are the clone, this interpreter and its
environment. The host LOGIN only lends its mounts to commands of the machine, so it keeps the machine's /tmp and /proc.
"""

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

CLONE = Path(__file__).resolve().parents[2]
OWN = ("/tmp", "/dev/shm")
LOGIN = "login"
OF_A_RELEASE = {
    "bin",
    "boot",
    "etc",
    "lib",
    "lib32",
    "lib64",
    "libx32",
    "lost+found",
    "proc",
    "run",
    "sbin",
    "usr",
    "var",
}
OF_THE_MACHINE = ("/usr/local", "/var/tmp", "/etc/ssl")
USERS = ("passwd", "group", "shadow")


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def bind(path: str, root: Path) -> None:
    """Makes a file or folder of this machine, with all that is mounted below it, visible below `root`."""
    place = root / path.lstrip("/")
    if Path(path).is_dir():
        place.mkdir(parents=True, exist_ok=True)
    else:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    mount("--rbind", path, str(place))


def python_folders() -> list[str]:
    """Where this interpreter is, beside its environment. One of Debian's own lies in /usr, which a release has, too."""
    if sys.base_prefix != "/usr":
        return [sys.prefix, sys.base_prefix]
    return [sys.prefix, sysconfig.get_path("stdlib"), os.path.realpath(sys.executable)]


def copy_links(path: Path, root: Path) -> None:
    """Makes the links on the way from `path` to its file those of this machine: /usr/bin/python3 may be another one."""
    while path.is_symlink():
        if path.is_relative_to("/usr"):
            place = root / path.relative_to("/")
            place.unlink(missing_ok=True)
            place.symlink_to(path.readlink())
        path = path.parent / path.readlink()


def enter_release(root: Path, folder: Path, *, login: bool) -> None:
    """Makes `root`, under a layer in memory, the root of this process and of all that it starts."""
    layer = folder / "root"
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", str(layer))
    upper, work, merged, left = (layer / name for name in ("upper", "work", "merged", "merged/mnt-of-the-machine"))
    for made in (upper, work, merged):
        made.mkdir()
    upper.chmod(0o755)
    mount("-t", "overlay", "-o", f"lowerdir={root},upperdir={upper},workdir={work}", "overlay", str(merged))
    bound = [f"/{entry.name}" for entry in os.scandir("/") if entry.is_dir(follow_symlinks=False)]
    bound = [path for path in bound if path[1:] not in OF_A_RELEASE] + [*OF_THE_MACHINE, *(["/proc"] if login else [])]
    for path in (*bound, str(CLONE), *python_folders()):
        if path in bound or not any(Path(path).is_relative_to(other) for other in bound):
            bind(path, merged)
    copy_links(Path(sys.executable), merged)
    for name in USERS:
        shutil.copy2(f"/etc/{name}", merged / "etc" / name)
    left.mkdir()
    os.chdir(merged)
    subprocess.run(["pivot_root", ".", left.name], check=True)
    os.chdir("/")
    if not login:
        mount("-t", "proc", "proc", "/proc")
    subprocess.run(["umount", "--lazy", f"/{left.name}"], check=True)
    mount("-t", "tmpfs", "tmpfs", str(folder / "bin"))  # the commands with which the machine enters the login host


def furnish(folder: Path, name: str, gpus: int, *, freezer: bool) -> None:
    socket.sethostname(name)
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
    mount_configuration(folder)
    if gpus:
        devices = folder / "gpus"
        mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", str(devices))
        for index in range(gpus):
            os.mknod(devices / f"gpu{index}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
            (devices / f"gpu{index}").chmod(0o666)  # mknod's mode went through the umask


def mount_configuration(folder: Path) -> None:
    mount("--bind", str(folder / "etc"), "/etc/slurm")
    mount("--bind", str(folder / "etc" / "hosts"), "/etc/hosts")


def reap_for_ever() -> None:
    while True:
        signal.sigwait({signal.SIGCHLD})
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            continue  # no child is left


def main() -> None:
    folder, name, gpus, cgroup, root = sys.argv[1:]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    if root != "-":
        enter_release(Path(root), Path(folder), login=name == LOGIN)
    else:
        mount("-t", "proc", "proc", "/proc")
    if name == LOGIN:
        mount_configuration(Path(folder))
    else:
        furnish(Path(folder), name, int(gpus), freezer=cgroup == "freezer")
    os.write(1, b"ready\n")  # fails if the starter was killed, because nothing would end this host
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    reap_for_ever()


if __name__ == "__main__":
    main()
