"""A host of the test cluster, as the machine sees it: boot, power cut, network cut, commands on it.

Rules: the process table is the only record. A host is the process with the command line `init.py FOLDER NAME GPUS
CGROUP ROOT` that is number 1 of its namespace. No pid is written to a file, so no file can name another process by
mistake, and `down` finds the hosts of a starter that was killed at any moment. All processes run inside a host, also
munge and MariaDB, so only hosts and one bridge must be removed. This module knows nothing of Slurm.
"""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.slurm import init
from tests.support.waiting import eventually_sync

INIT: Final = str(Path(init.__file__).resolve())
_ANY_INIT: Final = b"/tests/slurm/init.py"
"""Of any clone: clusters that another one has left are swept too."""
NAMESPACES: Final = ("--mount", "--uts", "--ipc", "--net", "--pid")
HALT_S: Final = 10.0


class SlurmClusterError(RuntimeError):
    """The test cluster cannot do this; the message says what to do about it."""


def command(
    argv: Sequence[str],
    *,
    timeout_s: float = 60.0,
    environment: Mapping[str, str] | None = None,
    inherit: tuple[int, ...] = (),
) -> str:
    """Returns the stdout of `argv`. Raises with its stderr if it failed."""
    # fmt: off
    try:
        done = subprocess.run(list(argv), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s,
                              env=environment, pass_fds=inherit)
    # fmt: on
    except subprocess.TimeoutExpired as error:
        raise SlurmClusterError(f"{' '.join(argv)} did not end within {timeout_s} s") from error
    if done.returncode:
        raise SlurmClusterError(f"{' '.join(argv)} ended with {done.returncode}: {done.stderr or done.stdout}")
    return done.stdout


def booted(folder: Path) -> dict[str, int]:
    """The pid of each host that is up, by name."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            argv = (process / "cmdline").read_bytes().split(b"\0")
            status = (process / "status").read_text()
        except OSError:
            continue  # it has ended meanwhile
        if len(argv) == 8 and argv[1].endswith(_ANY_INIT) and argv[2] == os.fsencode(folder):
            spaces = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()
            if spaces[-1] == "1" and "\nState:\tZ" not in status:
                found[os.fsdecode(argv[3])] = int(process.name)
    return found


def power_off(pid: int) -> None:
    """Kills all processes of the host, and waits until they have ended."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(process, signal.SIGKILL)
        if not select.select([process], [], [], HALT_S)[0]:
            raise SlurmClusterError(f"host {pid} did not end within {HALT_S} s of SIGKILL")
    except ProcessLookupError:
        return
    finally:
        os.close(process)


def unplug(link: str) -> None:
    """Removes a host's link. The kernel does so, too, but only when the last connection of the dead host has given up
    its retries, which takes minutes."""

    def gone() -> bool:
        if Path("/sys/class/net", link).exists():
            with contextlib.suppress(SlurmClusterError):  # the kernel may have removed it
                command(["ip", "link", "delete", link])
        return not Path("/sys/class/net", link).exists()

    eventually_sync(gone)


@dataclass(kw_only=True)
class Host:
    """One host. `bridge` names the switch that it is connected to; its link there is `bridge` + `name`. `freezer`: the
    folder of cgroup v1's freezer that is the root of the host's own; None if it has no cgroups. `root`: the root of
    another release of Debian; None if it is the machine's."""

    folder: Path
    name: str
    address: str
    bridge: str
    gpus: int = 0
    freezer: Path | None = None
    root: Path | None = None
    _starter: subprocess.Popen[bytes] | None = None

    @property
    def link(self) -> str:
        return f"{self.bridge}{self.name}"

    @property
    def _namespaces(self) -> tuple[str, ...]:
        return NAMESPACES if self.freezer is None else (*NAMESPACES, "--cgroup")

    @property
    def pid(self) -> int | None:
        return booted(self.folder).get(self.name)

    def boot(self) -> None:
        """Starts the host with its network. No daemon runs yet."""
        if self.name in booted(self.folder):
            raise SlurmClusterError(f"{self.name} is up already")
        # fmt: off
        argv = ["unshare", *self._namespaces, "--fork", "--kill-child=SIGKILL", "--",
                sys.executable, INIT, str(self.folder), self.name, str(self.gpus), "freezer" if self.freezer else "-",
                str(self.root or "-")]
        # fmt: on
        if self.freezer is not None:  # the root of a new cgroup namespace is the cgroup of its creator
            self.freezer.mkdir(exist_ok=True)
            argv = ["sh", "-c", 'echo $$ >"$0" && exec "$@"', str(self.freezer / "cgroup.procs"), *argv]
        with (self.folder / "log" / f"{self.name}-init.log").open("ab") as log:
            self._starter = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True, cwd="/"
            )
        assert self._starter.stdout is not None
        with self._starter.stdout as said:
            ready, pid = said.readline(), self.pid
        if not ready or pid is None:
            raise SlurmClusterError(f"{self.name} did not boot: {(self.folder / 'log' / log.name).read_text()}")
        command(["ip", "link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", str(pid)])
        command(["ip", "link", "set", self.link, "master", self.bridge, "up"])
        inside = ["nsenter", f"--net=/proc/{pid}/ns/net", "ip"]
        command([*inside, "address", "add", f"{self.address}/24", "dev", "eth0"])
        for device in ("lo", "eth0"):
            command([*inside, "link", "set", device, "up"])

    def halt(self) -> None:
        """Cuts the power: SIGKILL to all processes of the host. Waits until these and the network link are gone."""
        if (pid := self.pid) is not None:
            power_off(pid)
        if self._starter is not None:
            self._starter.wait(HALT_S)
            self._starter = None
        unplug(self.link)

    def cut_off(self) -> None:
        """Cuts the network: all processes on the host continue, and still see the shared file system."""
        command(["ip", "link", "set", self.link, "down"])

    def reconnect(self) -> None:
        command(["ip", "link", "set", self.link, "up"])

    def inside(self, argv: Sequence[str], *, user: str | None = None, folder: Path | None = None) -> list[str]:
        """The command that runs `argv` on this host, for callers that need a process of their own."""
        if (pid := self.pid) is None:
            raise SlurmClusterError(f"{self.name} is down")
        become = [] if user is None else ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--"]
        where = f"--wdns={folder or self.folder / 'shared'}"
        return ["nsenter", f"--target={pid}", *self._namespaces, where, "--", *become, *argv]

    def enter(
        self, argv: Sequence[str], *, user: str | None = None, folder: Path | None = None, timeout_s: float = 60.0
    ) -> str:
        """Returns the stdout of `argv` on this host, outside any job and without SLURM_* of this process. Raises if it
        failed."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        return command(self.inside(argv, user=user, folder=folder), timeout_s=timeout_s, environment=environment)

    def daemon(self, argv: Sequence[str], *, environment: Mapping[str, str] | None = None) -> None:
        """Leaves `argv` running on this host. The host's first process adopts it, and it ends with the host."""
        with (self.folder / "log" / f"{self.name}-{Path(argv[0]).name}.out").open("ab") as log:
            subprocess.run(
                self.inside(["setsid", "--fork", *argv], folder=Path("/")),
                check=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(environment or {})},
            )


def answers(address: Path | tuple[str, int]) -> bool:
    """Whether a process accepts connections at the address."""
    family = socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET
    with socket.socket(family) as probe, contextlib.suppress(OSError):
        probe.settimeout(1.0)
        probe.connect(str(address) if isinstance(address, Path) else address)
        return True
    return False
