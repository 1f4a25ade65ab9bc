"""Builds the `ssh` command with which a laptop reaches a router inside the cluster.

The login host forwards a local port of the laptop to the router's address. If the router listens on the loopback of a
node, `ssh` goes to that node through the login host. The router must first prove its identity. This host cannot check a
router on the loopback of another node, so notes beside the command say that its identity is not proven. If `connect`
runs on this host, the port is forwarded to `connect` instead, and the command stays valid when another router leads.
"""

import getpass
import shlex
import socket
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from hpc_router.cluster.commands.router_access import prove_identity, recorded_router
from hpc_router.cluster.control_loop.desired_state import deployment_of, readable_deployment
from hpc_router.connect.listener import RunningForwarder, running_forwarder
from hpc_router.errors import ConfigError
from hpc_router.state.registry import Record
from hpc_router.state.run_directory import RunDir


@dataclass(frozen=True, slots=True)
class LocalHost:
    """The user and the host of this process."""

    user: str
    host: str  # with its domain
    names: frozenset[str]

    @property
    def login(self) -> str:
        return f"{self.user}@{self.host}"


@dataclass(frozen=True, slots=True)
class Tunnel:
    """An `ssh` tunnel. `argv`: the command, which runs on the laptop until it is interrupted. `url`: address at the
    other end, that of the router or of `connect`. `login`: the host that has the run directory. `guessed`: whether
    `login` is this host because the config names no login host. `unproven`: the node on whose loopback the router
    listens, if this host could not check the router's identity; else None."""

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
        """Returns notes for the user and further commands for the laptop, as shell comments."""
        scheme = "https" if self.url.startswith("https:") else "http"
        token = shlex.join(["ssh", self.login, shlex.join(["cat", str(self.run / "token")])])
        lines = [
            "run this on the laptop and leave it running; in another terminal there:",
            f"  export OPENAI_BASE_URL={scheme}://localhost:{self.port}/v1",
            f'  export OPENAI_API_KEY="$({token})"',
        ]
        if scheme == "https":
            lines.append(
                "the certificate must name localhost; a `hpc-router connect --detach` started before needs none"
            )
        if self.guessed:
            lines.append("the config does not set cluster.login, so the command names this host; if `ssh` from outside")
            lines.append("cannot reach it, put the right host in its place (and set cluster.login for the next run)")
        if self.unproven is not None:
            node = self.unproven
            lines.append(
                f"the router listens on the loopback of {node}, so its identity could not be proven from here;"
            )
            lines.append(f"`hpc-router url` on {node} proves it")
        return [f"# {line}" for line in lines]


def tunnel(record: Record, *, login: str | None, here: LocalHost, port: int, run: Path) -> Tunnel:
    """Returns the tunnel to the router in `record`. `login`: the config's `cluster.login`, which is `host`, `user@host`
    or None. `port`: the laptop's port."""
    host = urlsplit(record.url).hostname or ""
    node = record.node if _is_loopback(host) else None
    return _tunnel(record.url, _target(record.url), node=node, login=login, here=here, port=port, run=run)


def tunnel_to_forwarder(running: RunningForwarder, *, login: str | None, here: LocalHost, port: int) -> Tunnel:
    """Returns the tunnel to a `connect` process that runs on this host."""
    target = running.address if running.port is None else _target(running.address)
    run = Path(running.run)
    return _tunnel(running.address, target, node=here.host, login=login, here=here, port=port, run=run)


def _tunnel(
    url: str, target: str, *, node: str | None, login: str | None, here: LocalHost, port: int, run: Path
) -> Tunnel:
    """Returns a tunnel to `target`, the host and port (or socket) of `url`. `node`: the only host that can connect to
    the target; None if every host of the cluster can."""
    if not 0 < port < 65536:
        raise ConfigError(f"--port {port}: not a port (valid: 1 to 65535)")
    gateway, forward = login or here.login, f"{port}:{target}"
    words = ["ssh", "-N", "-L", forward, gateway]
    if not _is_at(gateway, node, here):
        words = ["ssh", "-N", "-J", gateway, "-L", forward, f"{_user_of(gateway) or here.user}@{node}"]
    return Tunnel(url, tuple(words), port, gateway, run, guessed=login is None)


def _target(url: str) -> str:
    """Returns the host and port of a URL, as `ssh -L` takes them."""
    address = urlsplit(url)
    host = address.hostname or ""
    return f"{f'[{host}]' if ':' in host else host}:{address.port or 80}"


def forwarder_tunnel(run: RunDir, *, port: int) -> Tunnel | None:
    """Returns the tunnel to the `connect` process of this run on this host; None if none runs. If several run, one that
    serves a socket is preferred, because other users of the host cannot connect to the socket."""
    running = running_forwarder(run, tcp=False) or running_forwarder(run, tcp=True)
    if running is None:
        return None
    login = readable_deployment(run).cluster.login
    return tunnel_to_forwarder(running, login=login, here=_local_host(), port=port)


def tunnel_to(run: RunDir, *, port: int, unproven: bool = False) -> Tunnel:
    """Returns the tunnel to the run's router. Raises LaunchError if no router serves, or if it does not prove its
    identity. `unproven`: whether to accept a router on another node's loopback, which cannot be checked from here."""
    record, here = recorded_router(run), _local_host()
    unreachable_node = record.node if unproven and _is_on_other_loopback(record, here) else None
    if unreachable_node is None:
        prove_identity(run, record)
    made = tunnel(record, login=deployment_of(run).cluster.login, here=here, port=port, run=run.path)
    return replace(made, unproven=unreachable_node)


def _is_on_other_loopback(record: Record, here: LocalHost) -> bool:
    """Returns whether the router listens on the loopback of another node."""
    loopback = _is_loopback(urlsplit(record.url).hostname or "")
    return loopback and record.node is not None and record.node not in here.names


def _local_host() -> LocalHost:
    """Returns this host with its full name, or with its short name if the full name is `localhost`."""
    host, full = socket.gethostname(), socket.getfqdn()
    best = host if full.partition(".")[0] == "localhost" else full
    return LocalHost(getpass.getuser(), best, frozenset({host, best, host.partition(".")[0]}))


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_at(login: str, node: str | None, here: LocalHost) -> bool:
    """Returns whether the login host `login` is the host `node`, or `node` is None. Compares names, so a name that
    stands for several hosts is not recognised."""
    host = login.rpartition("@")[2]
    names = here.names if node in here.names else frozenset({node, (node or "").partition(".")[0]})
    return node is None or host in names


def _user_of(login: str) -> str:
    return login.rpartition("@")[0]
