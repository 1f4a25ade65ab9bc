"""Selection of the address that a node publishes."""

import ipaddress
import socket

import pytest

from hpc_router.errors import ConfigError
from hpc_router.net import addresses as fabric
from hpc_router.net.addresses import Interfaces

NODE: Interfaces = {
    name: [ipaddress.ip_address(text) for text in texts]
    for name, texts in {
        "lo": ["127.0.0.1", "::1"],
        "eth0": ["172.16.3.4"],
        "ib0": ["2001:db8:1::7", "10.1.2.3"],
        "ib1": ["2001:db8:2::7"],
    }.items()
}


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("ib0", "10.1.2.3"),
        ("ib1", "2001:db8:2::7"),
        ("10.1.0.0/16", "10.1.2.3"),
        ("10.1.2.9/16", "10.1.2.3"),  # in the form that `ip address` shows
        ("10.1.2.3", "10.1.2.3"),
        ("2001:db8:1::/48", "2001:db8:1::7"),
        ("2001:db8:1:0:0:0:0:7", "2001:db8:1::7"),
        ("lo", "127.0.0.1"),
    ],
)
def test_an_interface_a_network_or_an_address(named: str, expected: str) -> None:
    assert str(fabric.select_address(named, NODE)) == expected


@pytest.mark.parametrize("named", ["ib7", "10.2.0.0/16", "10.1.2.4", "10.1.2.3/99"])
def test_a_fabric_that_the_node_lacks_is_refused_with_its_addresses(named: str) -> None:
    with pytest.raises(ConfigError, match=r"this node has: lo: 127\.0\.0\.1, ::1; eth0: 172\.16\.3\.4") as caught:
        fabric.select_address(named, NODE)
    assert caught.value.key == "cluster.fabric"
    assert f"cluster.fabric={named}: " in str(caught.value)


def test_an_interface_is_found_by_its_address() -> None:
    assert fabric.interface_of("10.1.2.3", NODE) == "ib0"
    assert fabric.interface_of("2001:db8:2:0::7", NODE) == "ib1"
    assert fabric.interface_of("10.9.9.9", NODE) is None


def test_a_local_cluster_uses_the_loopback() -> None:
    assert fabric.address(None, kind="local") == "127.0.0.1"


def test_a_named_fabric_counts_on_one_machine_too() -> None:
    assert fabric.address("127.0.0.0/8", kind="local") == "127.0.0.1"
    assert fabric.interface_of("127.0.0.1") == "lo"


def _named(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Makes this host's name resolve to the addresses, which an interface has."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (text, 0)) for text in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(fabric, "interfaces", lambda: NODE)


def test_elsewhere_the_hosts_name_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    _named(monkeypatch, "127.0.1.1", "10.1.2.3")
    assert fabric.address(None, kind="slurm") == "10.1.2.3"


def test_then_the_default_route(monkeypatch: pytest.MonkeyPatch) -> None:
    _named(monkeypatch, "127.0.1.1", "10.9.9.9")  # a stale entry: no interface has this address
    monkeypatch.setattr(fabric, "_of_default_route", lambda: "172.16.3.4")
    assert fabric.address(None, kind="slurm") == "172.16.3.4"


def test_a_node_without_a_reachable_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _named(monkeypatch, "127.0.1.1")
    monkeypatch.setattr(fabric, "_of_default_route", lambda: None)
    with pytest.raises(ConfigError, match=r"cluster\.fabric: no address that other nodes can reach"):
        fabric.address(None, kind="slurm")
