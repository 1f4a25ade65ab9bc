"""What a test cluster uses of the machine outside its folder: a number, after which a bridge, a user and, if it has
cgroups, a folder of the freezer are named.

Rules: one `mkdir` creates the folder, so two starters never share it. The claim is a symbolic link
`/run/hpcr-slurm/NUMBER -> FOLDER`. It is created in one step before anything else outside the folder, and removed last,
so the claim alone shows what a killed starter has left. `FOLDER/owner` names the process that must be alive for the
cluster to be wanted. A cluster started by hand has no owner once it is up, and stays until `down`. Claiming and
sweeping happen under a lock on the folder of claims.

Others may use the same names, for instance in a container with a /run of its own but this machine's network. A number
is therefore free only if its bridge does not exist, and a bridge, user or freezer folder is removed only if it shows
that it is of this cluster's folder: by its address, its home, its name. This module knows nothing of Slurm.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import pwd
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.slurm.host import SlurmClusterError, booted, command, power_off, unplug
from tests.support.waiting import eventually_sync

CLAIMS: Final = Path("/run/hpcr-slurm")
NUMBERS: Final = range(1, 251)
DEVICES: Final = Path("/sys/class/net")
SHARED: Final = Path("/var/tmp")
PREFIX: Final = "hpcr-slurm-"
PRIVATE: Final = (Path("/tmp"), Path("/dev/shm"))
MARK: Final = ".hpcr-slurm"
OWNER: Final = "owner"


def freezer() -> Path | None:
    """The mount point of cgroup v1's freezer on this machine; None if there is none."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup" and "freezer" in options.split(","):
            return Path(where)
    return None


def freezer_of(folder: Path) -> Path | None:
    root = freezer()
    return None if root is None else root / f"hpcr-{_digest(folder)}"


def make_freezer(folder: Path) -> Path:
    """Creates a freezer folder for a cluster, in which each of its hosts gets one."""
    frozen = freezer_of(folder)
    if frozen is None:
        raise SlurmClusterError("this machine has no freezer of cgroup v1")
    frozen.mkdir()
    return frozen


def _digest(folder: Path) -> str:
    return hashlib.sha256(os.fsencode(folder)).hexdigest()[:10]


def bridge_of(number: int) -> str:
    return f"hpcr{number}"


def user_of(number: int) -> str:
    return f"hpcr-user{number}"


def _address_of(folder: Path) -> str:
    """The hardware address of the cluster's bridge: 02 stands for one that is given by hand."""
    return ":".join(["02", *re.findall("..", _digest(folder))])


def _has_bridge(number: int) -> bool:
    return (DEVICES / bridge_of(number)).exists()


def _is_bridge_of(number: int, folder: Path) -> bool:
    try:
        return (DEVICES / bridge_of(number) / "address").read_text().strip() == _address_of(folder)
    except OSError:
        return False


def network_of(number: int) -> str:
    """The first three bytes of the cluster's addresses, from 198.18.0.0/15, which is reserved for tests."""
    return f"198.18.{number}"


@contextlib.contextmanager
def _locked() -> Iterator[int]:
    """Holds the lock and yields its descriptor. A child that inherits the descriptor keeps the lock if its parent is
    killed."""
    while True:
        CLAIMS.mkdir(exist_ok=True)
        folder = os.open(CLAIMS, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            if not (CLAIMS.exists() and os.path.samestat(os.fstat(folder), CLAIMS.stat())):
                continue  # another process removed it while we waited
            yield folder
            with contextlib.suppress(OSError):  # not empty
                CLAIMS.rmdir()
            return
        finally:
            os.close(folder)


def claims() -> dict[int, Path]:
    """The clusters of this machine: running, incomplete or left over."""
    found = {}
    for claim in CLAIMS.glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError):  # released meanwhile
            found[int(claim.name)] = claim.readlink()
    return found


def claim(folder: Path) -> int:
    """Claims a number and creates its bridge and user, for a folder made by `make_folder`."""
    with _locked() as lock:
        for number in NUMBERS:
            if number in claims() or _has_bridge(number) or _has_user_in_use(number):
                continue
            (CLAIMS / str(number)).symlink_to(folder)
            try:
                _make(number, folder, lock)
            except SlurmClusterError:
                _remove(number, folder)
                (CLAIMS / str(number)).unlink()
                if _has_bridge(number):
                    continue  # another starter was faster
                raise
            return number
    raise SlurmClusterError(f"no number of {NUMBERS} is free: {CLAIMS} lists the clusters that are up")


def _make(number: int, folder: Path, lock: int) -> None:
    bridge = bridge_of(number)
    command(["ip", "link", "add", bridge, "address", _address_of(folder), "type", "bridge"], inherit=(lock,))
    command(["ip", "address", "add", f"{network_of(number)}.254/24", "dev", bridge])
    command(["ip", "link", "set", bridge, "up"])
    if _user(number) is not None:  # /run is empty after a reboot, but /etc still has the user
        command(["userdel", user_of(number)])
    # fmt: off
    command(["useradd", "--system", "--user-group", "--no-create-home", "--home-dir", str(folder / "home"),
             "--shell", "/bin/bash", user_of(number)], inherit=(lock,))
    # fmt: on


def release(folder: Path) -> bool:
    """Removes every trace of the cluster in `folder`, in any state. Returns False if there was none."""
    with _locked():
        numbers = [number for number, claimed in claims().items() if claimed == folder]
        for number in numbers:
            _remove(number, folder)
            if folder.exists():
                shutil.rmtree(folder)
            (CLAIMS / str(number)).unlink()
    unclaimed = (folder / MARK).exists()  # its starter was killed before the claim, or the machine was rebooted
    if unclaimed:
        shutil.rmtree(folder)
    return bool(numbers) or unclaimed


def _remove(number: int, folder: Path) -> None:
    while hosts := booted(folder):  # repeated, because a running starter may boot another host meanwhile
        for pid in hosts.values():
            power_off(pid)
    frozen = freezer_of(folder)
    if frozen is not None and frozen.exists():
        for path in (*sorted((path for path in frozen.rglob("*") if path.is_dir()), reverse=True), frozen):
            eventually_sync(lambda: _is_removed(path), within_s=10)  # noqa: B023
    if _is_bridge_of(number, folder):
        for link in DEVICES.glob(f"{bridge_of(number)}[a-z]*"):
            unplug(link.name)
        command(["ip", "link", "delete", bridge_of(number)])
    if (user := _user(number)) is not None and Path(user.pw_dir) == folder / "home":
        command(["userdel", user_of(number)])


def _is_removed(folder: Path) -> bool:
    """Removes a folder of the freezer, unless a process that was killed is still in it."""
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def make_folder(given: Path | None) -> Path:
    """Creates a folder for a cluster that is wanted only while this process lives."""
    if given is None:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=SHARED))
    else:
        folder = given.resolve()
        if folder in claims().values():
            raise SlurmClusterError(f"a cluster is up in {folder} already: take it down first, or give another folder")
        if own := next((own for own in PRIVATE if folder.is_relative_to(own)), None):
            raise SlurmClusterError(f"{folder}: every host has an {own} of its own; give a folder elsewhere")
        try:
            folder.mkdir(parents=True)
        except FileExistsError as error:
            raise SlurmClusterError(f"{folder} exists, and down would remove it: give a new folder") from error
    folder.chmod(0o755)
    (folder / MARK).touch()
    (folder / OWNER).write_text(_identity(os.getpid()) or "")
    return folder


def keep(folder: Path) -> None:
    """Removes the owner: the cluster stays up until `down`."""
    (folder / OWNER).unlink()


def sweep() -> list[Path]:
    """Removes the clusters whose owner has ended without removing them, and returns their folders."""
    swept = []
    for folder in {*claims().values(), *(mark.parent for mark in SHARED.glob(f"{PREFIX}*/{MARK}"))}:
        try:
            owner = (folder / OWNER).read_text()
        except OSError:
            continue  # started by hand, or just removed
        if owner and _identity(int(owner.split()[0])) != owner and release(folder):
            swept.append(folder)
    return swept


def _identity(pid: int) -> str | None:
    """A pid with its start time, because another process may get the same pid later."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else f"{pid} {rest[18]}"


def _user(number: int) -> pwd.struct_passwd | None:
    return next((user for user in pwd.getpwall() if user.pw_name == user_of(number)), None)


def _has_user_in_use(number: int) -> bool:
    user = _user(number)
    return user is not None and Path(user.pw_dir).parent.exists()
