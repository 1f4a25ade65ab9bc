"""The way from a laptop to a router that only the cluster's own machines can reach: one `ssh` line.

The login host forwards a local port to the router's address. A router on a node's loopback is reached on that node,
through the login host where the two differ.
"""

import getpass
import shlex
import socket
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from hpc_router.cluster.desired import deployment_of
from hpc_router.cluster.router_access import live_router, router_access
from hpc_router.errors import ConfigError, LaunchError
from hpc_router.registry import Record
from hpc_router.rundir import RunDir

LOCAL_PORT: Final = 8000


@dataclass(frozen=True, slots=True)
class Here:
    """Who asks, and on which host."""

    user: str
    host: str  # with its domain, as others know it
    names: frozenset[str]

    @property
    def login(self) -> str:
        return f"{self.user}@{self.host}"


@dataclass(frozen=True, slots=True)
class Tunnel:
    """`argv` runs on the laptop until it is interrupted; `login` is the host that has the run directory."""

    url: str
    argv: tuple[str, ...]
    port: int
    login: str
    run: Path
    guessed: bool = False

    @property
    def line(self) -> str:
        return shlex.join(self.argv)

    def notes(self) -> list[str]:
        """What to type on the laptop beside it, as comments for a shell."""
        token = shlex.join(["ssh", self.login, shlex.join(["cat", str(self.run / "token")])])
        lines = [
            "run this on the laptop and leave it running; in another terminal there:",
            f"  export OPENAI_BASE_URL=http://localhost:{self.port}/v1",
            f'  export OPENAI_API_KEY="$({token})"',
        ]
        if self.guessed:
            lines.append("the config names no host that `ssh` from outside reaches, so this one stands there; else set")
            lines.append("cluster.login for the next run, or put the right host in its place")
        return [f"# {line}" for line in lines]


def tunnel(record: Record, *, login: str | None, here: Here, port: int, run: Path) -> Tunnel:
    """`login`: as the config says it, with or without a user."""
    if not 0 < port < 65536:
        raise ConfigError(f"--port {port}: valid are 1 to 65535")
    gate = login or here.login
    address = urlsplit(record.url)
    host, router_port = address.hostname or "", address.port or 80
    forward = f"{port}:{f'[{host}]' if ':' in host else host}:{router_port}"
    words = ["ssh", "-N", "-L", forward, gate]
    if _is_loopback(host) and not _is_at(gate, record.node, here):
        words = ["ssh", "-N", "-J", gate, "-L", forward, f"{_user_of(gate) or here.user}@{record.node}"]
    return Tunnel(record.url, tuple(words), port, gate, run, guessed=login is None)


def tunnel_to(run: RunDir, *, port: int) -> Tunnel:
    """To the run's router. Raises LaunchError when none serves."""
    record = live_router(run)
    if record is None:
        router_access(run)  # says so
        raise LaunchError(f"the router of {run.path} has just gone; try again")
    return tunnel(record, login=deployment_of(run).cluster.login, here=_here(), port=port, run=run.path)


def _here() -> Here:
    """A host whose own name resolves to its loopback knows its short name only."""
    host, full = socket.gethostname(), socket.getfqdn()
    best = host if full.partition(".")[0] == "localhost" else full
    return Here(getpass.getuser(), best, frozenset({host, best, host.partition(".")[0]}))


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_at(login: str, node: str | None, here: Here) -> bool:
    """Whether one who has come to `login` is on `node`. A name that may stand for several hosts is not trusted."""
    host = login.rpartition("@")[2]
    names = here.names if node in here.names else frozenset({node, (node or "").partition(".")[0]})
    return node is None or host in names


def _user_of(login: str) -> str:
    return login.rpartition("@")[0]
