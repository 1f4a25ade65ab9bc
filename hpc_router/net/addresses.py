"""Finds the address of this node at which its services listen, and which they publish. `cluster.fabric` selects it.

A node has several networks: management, the fabric, containers. `cluster.fabric` names the one that experts and routers
use, as an interface, a network or an address. Without it, the address of the host's name is used, else that of the
default route.
"""

import ipaddress
import socket
from collections.abc import Mapping, Sequence
from typing import Final

import psutil

from hpc_router.errors import ConfigError

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
Interfaces = Mapping[str, Sequence[IpAddress]]

KEY: Final = "cluster.fabric"
LOOPBACK: Final = "127.0.0.1"
_FAR: Final = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
"""Addresses reserved for documentation (RFC 5737, 3849). They lie behind the default route; nothing is sent to them."""


def address(fabric: str | None, *, kind: str) -> str:
    """Returns this node's address according to `fabric` (see `select_address`). With None: loopback if `kind`
    (`cluster.kind`) is `local`, else by host name or default route. Raises ConfigError if the node has none."""
    if fabric is not None:
        return str(select_address(fabric, interfaces()))
    if kind == "local":
        return LOOPBACK
    found = _of_own_name() or _of_default_route()
    if found is None:
        raise ConfigError(f"{KEY}: no address that other nodes can reach {_list_of(interfaces())}", key=KEY)
    return found


def select_address(fabric: str, have: Interfaces) -> IpAddress:
    """Returns the address in `have` that `fabric` selects, which is the name of an interface, a network or an address.
    Prefers IPv4. Raises ConfigError if there is none."""
    if fabric in have:
        found = list(have[fabric])
    else:
        network = _network(fabric, have)
        found = [address for addresses in have.values() for address in addresses if address in network]
    if not found:
        raise ConfigError(f"{KEY}={fabric}: this node is not on it {_list_of(have)}", key=KEY)
    return min(found, key=lambda address: address.version)


def interface_of(of: str, have: Interfaces | None = None) -> str | None:
    """Returns the name of the interface that has the address `of`; None if no interface has it. `have`: the node's
    interfaces; None: look them up."""
    wanted = ipaddress.ip_address(of)
    known = interfaces() if have is None else have
    return next((name for name, addresses in known.items() if wanted in addresses), None)


def free_port(address: str = LOOPBACK) -> int:
    """Returns a TCP port that is free now. Another process may take it before the caller does."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
        sock.bind((address, 0))
        return int(sock.getsockname()[1])


def interfaces() -> dict[str, list[IpAddress]]:
    """Returns the addresses of each interface that is up. Leaves out link-local IPv6 addresses, which work on one link
    only."""
    up = {name for name, status in psutil.net_if_stats().items() if status.isup}
    found = {}
    for name, entries in psutil.net_if_addrs().items():
        texts = [entry.address for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)]
        known = [ipaddress.ip_address(text) for text in texts if "%" not in text]
        if known and name in up:
            found[name] = known
    return found


def _network(fabric: str, have: Interfaces) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """Parses `fabric` as a network; a single address gives a network of one. Raises ConfigError for other text."""
    try:
        return ipaddress.ip_network(fabric, strict=False)
    except ValueError as error:
        raise ConfigError(f"{KEY}={fabric}: no interface, network or address {_list_of(have)}", key=KEY) from error


def _of_own_name() -> str | None:
    """Returns the address to which this node's host name resolves, since other nodes most likely resolve it to the same
    one. Returns None if that address is not one of the node's, or a loopback address, as some distributions configure
    it."""
    try:
        entries = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    here = {one for addresses in interfaces().values() for one in addresses}
    for *_, place in entries:
        one = ipaddress.ip_address(str(place[0]).partition("%")[0])
        if not one.is_loopback and one in here:
            return str(one)
    return None


def _of_default_route() -> str | None:
    """Returns the source address that the kernel chooses for the default route, if there is one. Sends no packet."""
    for family, far in _FAR.items():
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((far, 9))
                source = ipaddress.ip_address(probe.getsockname()[0])
        except OSError:
            continue
        if not source.is_loopback:
            return str(source)
    return None


def _list_of(have: Interfaces) -> str:
    listed = "; ".join(f"{name}: {', '.join(map(str, addresses))}" for name, addresses in have.items())
    return f"(this node has: {listed or 'nothing'})"
