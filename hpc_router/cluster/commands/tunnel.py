"""The way from a laptop to a router that only the cluster's own machines can reach: one `ssh` line.

The login host forwards a local port to the router's address. A router on a node's loopback is reached on that node,
through the login host where the two differ. Only a router that proves itself is told; one on another node's loopback
cannot be asked from here, and the line to it says so.
"""

import getpass
import shlex
import socket
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from hpc_router.cluster.commands.router_access import prove_identity, recorded_router
from hpc_router.cluster.control_loop.desired_state import deployment_of
from hpc_router.errors import ConfigError
from hpc_router.state.registry import Record
from hpc_router.state.run_directory import RunDir


@dataclass(frozen=True, slots=True)
class LocalHost:
    """Who asks, and on which host."""

    user: str
    host: str  # with its domain, as others know it
    names: frozenset[str]

    @property
    def login(self) -> str:
        return f"{self.user}@{self.host}"


@dataclass(frozen=True, slots=True)
class Tunnel:
    """`argv` runs on the laptop until it is interrupted; `login` is the host that has the run directory.

    `unproven`: the node on whose loopback the router could not be asked.
    """

    url: str
    argv: tuple[str, ...]
    port: int
    login: str
    run: Path
    guessed: bool = False
    unproven: str | None = None

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
        if self.unproven is not None:
            node = self.unproven
            lines.append(
                f"the router listens on the loopback of {node}, so from here it could not be proven that it is"
            )
            lines.append(f"the one that answers there; `hpc-router url` on {node} can")
        return [f"# {line}" for line in lines]


def tunnel(record: Record, *, login: str | None, here: LocalHost, port: int, run: Path) -> Tunnel:
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


def tunnel_to(run: RunDir, *, port: int, unproven: bool = False) -> Tunnel:
    """To the run's router. Raises LaunchError when none serves or proves itself; `unproven`: one that cannot be asked
    from here will do."""
    record, here = recorded_router(run), _local_host()
    hidden = record.node if unproven and _is_on_other_loopback(record, here) else None
    if hidden is None:
        prove_identity(run, record)
    made = tunnel(record, login=deployment_of(run).cluster.login, here=here, port=port, run=run.path)
    return replace(made, unproven=hidden)


def _is_on_other_loopback(record: Record, here: LocalHost) -> bool:
    """On the loopback of a node that is not this one."""
    loopback = _is_loopback(urlsplit(record.url).hostname or "")
    return loopback and record.node is not None and record.node not in here.names


def _local_host() -> LocalHost:
    """A host whose own name resolves to its loopback knows its short name only."""
    host, full = socket.gethostname(), socket.getfqdn()
    best = host if full.partition(".")[0] == "localhost" else full
    return LocalHost(getpass.getuser(), best, frozenset({host, best, host.partition(".")[0]}))


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_at(login: str, node: str | None, here: LocalHost) -> bool:
    """Whether one who has come to `login` is on `node`. A name that may stand for several hosts is not trusted."""
    host = login.rpartition("@")[2]
    names = here.names if node in here.names else frozenset({node, (node or "").partition(".")[0]})
    return node is None or host in names


def _user_of(login: str) -> str:
    return login.rpartition("@")[0]
