"""A real Slurm on one machine, for tests and for manual use: `python -m tests.slurm.cluster up|down|status`.

A controller, three GPU nodes and a CPU node, each a host of its own (host.py) on one bridge. Needs root and either
Debian's Slurm or, for the Slurm of a newer Debian (`release`), debootstrap (releases.py). On the machine it uses one
claim, one bridge, one user, one folder and, with proctrack=cgroup, one folder of the freezer (claim.py); `down` removes
all of them.

All hosts share the machine's file system, except /tmp and /dev/shm. Files that jobs must see therefore lie outside
these, for instance in `shared`. This clone and its environment are visible wherever they lie.

With a release, this machine's processes use Slurm's commands of that release, in the first folder of `PATH` of
`environment`: each enters the mounts of one more host.
"""

import argparse
import os
import secrets
import shlex
import shutil
import socket
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.slurm import claim, releases
from tests.slurm.accounting import start_accounting
from tests.slurm.configuration import CONTROLLER, LAST_BYTES, NODES, PARTITIONS, PROCTRACKS, Proctrack, Shape, gpus_of
from tests.slurm.host import NAMESPACES, Host, SlurmClusterError, answers, booted, command
from tests.slurm.init import LOGIN
from tests.slurm.node import Node
from tests.support.waiting import eventually_sync

PROGRAMS: Final = ("ip", "nsenter", "unshare", "setpriv", "setsid", "useradd")
OF_SLURM: Final = ("slurmctld", "slurmd", "slurmdbd", "sbatch", "munged", "mariadbd", "mariadb-install-db")
BY_HAND: Final = Path("/var/tmp/hpcr-slurm")
FOLDERS: Final = (
    "etc",
    "log",
    "run",
    "state",
    "spool",
    "munge",
    "database",
    "gpus",
    "home",
    "shared",
    "clone",
    "root",
    "bin",
)
ENTER_LOGIN: Final = """\
#!/bin/sh
exec nsenter --mount=/proc/{pid}/ns/mnt --wdns="$PWD" -- /usr/bin/{name} "$@"
"""


def lacking(proctrack: Proctrack = "linuxproc", *, release: str | None = None) -> str:
    """What this machine lacks for a cluster, as text; empty if it lacks nothing. Says nothing of whether the release
    can be had."""
    if os.geteuid() != 0:
        return "root, for a Slurm test cluster"
    needed = PROGRAMS if release or releases.chosen() else (*OF_SLURM, *PROGRAMS)
    absent = [name for name in needed if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)}, for a Slurm test cluster"
    try:
        command(["unshare", *NAMESPACES, "--fork", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"])
    except SlurmClusterError as error:  # root in a container without the necessary rights
        return f"namespaces and mounts, for a Slurm test cluster: {error}"
    if proctrack == "cgroup" and claim.freezer() is None:
        return "the freezer of cgroup v1, for a Slurm test cluster with proctrack=cgroup"
    return ""


class SlurmCluster:
    """A cluster for the time of `with SlurmCluster() as cluster:`. `folder`, if given, is new or empty and outside
    /tmp. `release`: `trixie` or `sid`, whose Slurm it has; None: what the environment names (releases.VARIABLE), else
    the machine's."""

    def __init__(
        self,
        folder: Path | None = None,
        *,
        accounting: bool = True,
        node_cpus: int = 8,
        proctrack: Proctrack = "linuxproc",
        release: str | None = None,
    ) -> None:
        self._given = folder
        self.release = release or releases.chosen()
        self._root: releases.Root | None = None
        self.proctrack = proctrack
        self._accounting = accounting
        self._node_cpus = node_cpus
        self._hosts: dict[str, Host] = {}
        self.partitions = PARTITIONS

    def __enter__(self) -> Self:
        self.up(owned=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which any process of the machine can use the cluster."""
        return environment_of(self.folder)

    @cached_property
    def version(self) -> tuple[int, int]:
        """(24, 11) of Slurm 24.11.5."""
        return releases.version_of(self.run(["sbatch", "--version"]))

    @property
    def shared(self) -> Path:
        """A folder that every host sees and every user may write."""
        return self.folder / "shared"

    @property
    def hosts(self) -> list[Host]:
        """The controller, the nodes, and for another release the host through which this machine uses its commands."""
        return list(self._hosts.values())

    @property
    def controller(self) -> Host:
        return self._hosts[CONTROLLER]

    def node(self, name: str) -> Node:
        if name not in NODES:
            raise SlurmClusterError(f"no node {name!r}: there are {', '.join(NODES)}")
        return Node(self._hosts[name])

    def run(
        self, argv: Sequence[str], *, user: str | None = None, folder: Path | None = None, timeout_s: float = 60.0
    ) -> str:
        """Runs `argv` on the controller's host in `folder` (default: `shared`) and returns its stdout. Raises if it
        failed."""
        return self.controller.enter(argv, user=user, folder=folder, timeout_s=timeout_s)

    def states(self) -> dict[str, str]:
        """Slurm's state of each node: `idle`, `mixed`, `down*`, ..."""
        lines = self.run(["sinfo", "--Node", "--noheader", "--format=%N %T"]).splitlines()
        return {name: state for name, _, state in (line.partition(" ") for line in lines)}

    def wait_idle(self, *, within_s: float = 30.0) -> None:
        eventually_sync(lambda: set(self.states().values()) == {"idle"}, within_s=within_s)

    def up(self, *, owned: bool) -> None:
        """Starts the cluster and waits until every node is idle. An owned cluster is swept once this process has ended
        without `down`."""
        if lack := lacking(self.proctrack, release=self.release):
            raise SlurmClusterError(f"needs {lack}")
        self._root = None if self.release is None else releases.root_of(self.release)
        claim.sweep()
        self.folder = claim.make_folder(self._given)
        try:
            self.number = claim.claim(self.folder)
            self._furnish()
            self._start()
            if self._root is not None:
                self._let_machine_in(self._root)
            if not owned:
                claim.keep(self.folder)
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        claim.release(self.folder)
        for host in self._hosts.values():
            host.halt()  # the hosts are off by now; this reaps their processes
        self._hosts.clear()

    def _furnish(self) -> None:
        self.user = claim.user_of(self.number)
        for name in FOLDERS:
            (self.folder / name).mkdir()
        (self.folder / "database").chmod(0o700)
        self.shared.chmod(0o1777)
        shutil.chown(self.folder / "home", self.user, self.user)
        key = self.folder / "etc" / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        self._shape = Shape(
            folder=self.folder,
            network=claim.network_of(self.number),
            accounting=self._accounting,
            node_cpus=self._node_cpus,
            proctrack=self.proctrack,
            outside=socket.gethostname(),
        )
        self._shape.write()
        frozen = claim.make_freezer(self.folder) if self.proctrack == "cgroup" else None
        for name in LAST_BYTES:
            if name == LOGIN and self._root is None:
                continue
            self._hosts[name] = Host(
                folder=self.folder,
                name=name,
                address=self._shape.address(name),
                bridge=claim.bridge_of(self.number),
                gpus=gpus_of(name),
                freezer=frozen and frozen / name,
                root=None if self._root is None else self._root.folder,
            )

    def _start(self) -> None:
        controller, folder = self.controller, self.folder
        controller.boot()
        # fmt: off
        controller.daemon(["munged", "--foreground", f"--key-file={folder}/etc/munge.key",
                           f"--socket={self._shape.munge_socket}", f"--pid-file={folder}/munge/pid",
                           f"--log-file={folder}/munge/log", f"--seed-file={folder}/munge/seed"])
        # fmt: on
        if self._accounting:
            start_accounting(controller, self._shape, users=("root", self.user))
        eventually_sync(lambda: answers(self._shape.munge_socket))
        controller.daemon(["slurmctld", "-D"])
        for name in NODES:
            self.node(name).restart()
        eventually_sync(lambda: answers((controller.address, 6817)))
        self.wait_idle()

    def _let_machine_in(self, root: releases.Root) -> None:
        """Gives this machine the commands of the release."""
        login = self._hosts[LOGIN]
        login.boot()
        for name in root.clients:
            script = self.folder / "bin" / name
            script.write_text(ENTER_LOGIN.format(pid=login.pid, name=name))
            script.chmod(0o755)


def environment_of(folder: Path) -> dict[str, str]:
    found = {"SLURM_CONF": str(folder / "etc" / "slurm.conf")}
    if any((folder / "bin").iterdir()):
        found["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
    return found


def _up(cluster: SlurmCluster) -> None:
    cluster.up(owned=False)
    folder = cluster.folder
    pids = booted(folder)
    enter = shlex.join(cluster.controller.inside(["bash"]))
    print(f"# {cluster.run(['sbatch', '--version']).strip()}")
    print(f"# up: nodes {', '.join(NODES)}, partitions {', '.join(PARTITIONS)}, second user {cluster.user}")
    print(f"# all nodes see {cluster.shared}; /tmp and /dev/shm are each node's own")
    print(f"# a shell on the controller's host, where names resolve: {enter}")
    print(f"# first processes: {', '.join(f'{name}={pid}' for name, pid in sorted(pids.items()))}")
    for name, value in cluster.environment.items():
        print(f"export {name}={shlex.quote(value)}")


def _status() -> None:
    claims = claim.claims()
    for number, folder in sorted(claims.items()):
        hosts = booted(folder)
        print(f"{folder}: number {number}, hosts up: {', '.join(sorted(hosts)) or 'none'}")
        if CONTROLLER in hosts:
            print(command(["sinfo"], environment={**os.environ, **environment_of(folder)}), end="")
    if not claims:
        print("no cluster is up")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.cluster", description=__doc__.partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    up = verbs.add_parser("up", help="bring a cluster up and print what to export: eval it")
    up.add_argument("--no-accounting", action="store_true", help="without slurmdbd: sacct says nothing")
    up.add_argument("--node-cpus", type=int, default=8, help="what each node claims to have (%(default)s)")
    up.add_argument(
        "--proctrack", choices=PROCTRACKS, default="linuxproc", help="how Slurm tracks a job's processes (%(default)s)"
    )
    up.add_argument(
        "--release", choices=releases.RELEASES, help="of Debian, whose Slurm it has (default: the machine's)"
    )
    down = verbs.add_parser("down", help="remove it without a trace, in whatever state it is")
    verbs.add_parser("status", help="all clusters of this machine")
    for verb in (up, down):
        verb.add_argument("--dir", type=Path, default=BY_HAND, help="the cluster's folder (%(default)s)")
    chosen = parser.parse_args(argv)
    try:
        match chosen.verb:
            case "up":
                _up(
                    SlurmCluster(
                        chosen.dir.resolve(),
                        accounting=not chosen.no_accounting,
                        node_cpus=chosen.node_cpus,
                        proctrack=chosen.proctrack,
                        release=chosen.release,
                    )
                )
            case "down":
                print("# gone" if claim.release(chosen.dir.resolve()) else f"# nothing is up in {chosen.dir}")
            case "status":
                _status()
    except SlurmClusterError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
