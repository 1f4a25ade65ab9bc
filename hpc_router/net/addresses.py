"""The address of this node that services bind and publish, from `cluster.fabric`.

A node has several networks: management, the fabric, containers. The config names the one that experts and routers
talk over, as an interface, a network or an address; without it the host's own name decides, then the default route.
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
"""Addresses reserved for documentation: the default route leads there, and nothing is ever sent."""


def address(fabric: str | None, *, kind: str) -> str:
    """This node's address on the fabric; `kind` is the cluster's. Raises ConfigError where it has none."""
    if fabric is not None:
        return str(chosen(fabric, interfaces()))
    if kind == "local":
        return LOOPBACK
    found = _of_own_name() or _of_default_route()
    if found is None:
        raise ConfigError(f"{KEY}: no address that other nodes can reach {_has(interfaces())}", key=KEY)
    return found


def chosen(fabric: str, have: Interfaces) -> IpAddress:
    """The address among `have` that `fabric` means; IPv4 first where an interface has both."""
    if fabric in have:
        found = list(have[fabric])
    else:
        network = _network(fabric, have)
        found = [one for addresses in have.values() for one in addresses if one in network]
    if not found:
        raise ConfigError(f"{KEY}={fabric}: this node is not on it {_has(have)}", key=KEY)
    return min(found, key=lambda one: one.version)


def interface(of: str, have: Interfaces | None = None) -> str | None:
    """The interface that carries this address."""
    wanted = ipaddress.ip_address(of)
    known = interfaces() if have is None else have
    return next((name for name, addresses in known.items() if wanted in addresses), None)


def interfaces() -> dict[str, list[IpAddress]]:
    """This node's interfaces that are up, and their addresses, without IPv6's link-local ones: those mean nothing to
    another node."""
    up = {name for name, status in psutil.net_if_stats().items() if status.isup}
    found = {}
    for name, entries in psutil.net_if_addrs().items():
        texts = [entry.address for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)]
        known = [ipaddress.ip_address(text) for text in texts if "%" not in text]
        if known and name in up:
            found[name] = known
    return found


def _network(fabric: str, have: Interfaces) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """An address is a network of one."""
    try:
        return ipaddress.ip_network(fabric, strict=False)
    except ValueError as error:
        raise ConfigError(f"{KEY}={fabric}: no interface, network or address {_has(have)}", key=KEY) from error


def _of_own_name() -> str | None:
    """What other nodes most likely find under this node's name; distributions like to give it a loopback address."""
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
    """A datagram socket that is connected has chosen its source address; no packet leaves."""
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


def _has(have: Interfaces) -> str:
    listed = "; ".join(f"{name}: {', '.join(map(str, addresses))}" for name, addresses in have.items())
    return f"(this node has: {listed or 'nothing'})"
