"""Addresses by interface name, subnet or address; what other nodes cannot reach is refused."""

from __future__ import annotations

import socket

import psutil
import pytest

from moetion_lightning.distributed import interfaces
from moetion_lightning.distributed.interfaces import LocalAddress, choose_address, is_loopback, own_addresses
from moetion_lightning.errors import ConfigurationError

NODES = [("lo", "127.0.0.1"), ("mgmt0", "192.168.7.4"), ("ib0", "10.4.0.9"), ("ib0", "fd00:4::9"), ("lo", "::1")]


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a network for management and one between the nodes."""
    monkeypatch.setattr(interfaces, "own_addresses", lambda: NODES)
    monkeypatch.setattr(interfaces, "_route", lambda host: {"head": "192.168.7.4", "10.4.0.9": "10.4.0.9"}.get(host))


def test_system_and_psutil_know_the_same_addresses() -> None:
    families = (socket.AF_INET, socket.AF_INET6)
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    expected = {
        (name, a.address) for name, given in psutil.net_if_addrs().items() for a in given
        if a.family in families and name in up
    }  # fmt: skip
    assert set(own_addresses()) == expected
    assert ("lo", "127.0.0.1") in expected


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("ib0", "10.4.0.9"),
        ("eth9,ib0", "10.4.0.9"),
        ("10.4.0.0/16", "10.4.0.9"),
        ("fd00:4::/64", "fd00:4::9"),
        ("192.168.7.4", "192.168.7.4"),
        ("fd00:4::9", "fd00:4::9"),
    ],
)
def test_interface_by_name_subnet_or_address(wanted: str, expected: str) -> None:
    assert choose_address(wanted, towards="head") == LocalAddress(bind=expected, advertise=expected)


@pytest.mark.usefixtures("nodes")
def test_default_is_the_way_to_the_others() -> None:
    assert choose_address(towards="head").bind == "192.168.7.4"
    assert choose_address(towards="10.4.0.9").bind == "10.4.0.9"
    assert choose_address().bind == "192.168.7.4"
    assert choose_address(several_nodes=False).bind == "127.0.0.1"
    assert choose_address(towards="127.0.0.1").bind == "127.0.0.1"
    assert choose_address(towards="::1").bind == "::1"


@pytest.mark.usefixtures("nodes")
def test_advertised_address_may_differ() -> None:
    assert choose_address("ib0", advertise="203.0.113.5") == LocalAddress(bind="10.4.0.9", advertise="203.0.113.5")
    assert choose_address(advertise="10.4.0.9", towards="head") == LocalAddress(bind="10.4.0.9", advertise="10.4.0.9")


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize("wanted", ["lo", "127.0.0.0/8", "::1", "127.0.1.1"])
def test_loopback_is_refused_with_several_nodes(wanted: str) -> None:
    assert is_loopback(choose_address(wanted, several_nodes=False).bind)
    with pytest.raises(ConfigurationError, match=r"loopback.*this machine has lo \(127.0.0.1\), mgmt0"):
        choose_address(wanted, towards="head")


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize("wanted", ["eth9", "10.9.0.0/16", "192.168.7.5", "10.4.0.0/99"])
def test_what_this_machine_lacks_is_refused(wanted: str) -> None:
    with pytest.raises(ConfigurationError, match="interface"):
        choose_address(wanted)


def test_own_host_name_that_means_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian: the own host name is 127.0.1.1 in /etc/hosts."""
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *args, **kw: real("127.0.1.1" if host == "me" else host, *args, **kw)
    )
    monkeypatch.setattr(interfaces, "own_addresses", lambda: NODES)
    assert is_loopback("me")
    with pytest.raises(ConfigurationError, match="loopback"):
        choose_address(advertise="me", towards="10.4.0.9")
