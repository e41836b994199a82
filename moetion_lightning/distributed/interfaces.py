"""Which address of this machine to listen on, and by which address others reach it.

An interface is given as gloo and NCCL take it in ``GLOO_SOCKET_IFNAME`` and ``NCCL_SOCKET_IFNAME``: its name. A subnet
(``10.1.0.0/16``, ``fd00::/64``), an address, or a host name of this machine are possible, too, and several of them with
commas between: the first that this machine has is taken.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from moetion_lightning.errors import ConfigurationError

__all__ = ["LocalAddress", "choose_address", "is_loopback", "own_addresses"]

_LOOPBACK = "127.0.0.1"
_IP = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, kw_only=True)
class LocalAddress:
    """Where a service of this machine is.

    Args:
        bind: Numeric address of an interface, to listen on.
        advertise: Address or host name by which others reach it; the same unless a network translates addresses.
    """

    bind: str
    advertise: str


def choose_address(
    interface: str | None = None,
    *,
    advertise: str | None = None,
    towards: str | None = None,
    several_nodes: bool = True,
) -> LocalAddress:
    """Find the address of this machine for traffic with other nodes.

    Args:
        interface: Names, subnets or addresses, see the module; None: the interface from which ``towards`` is reached,
            else the first one that is up and no loopback.
        advertise: By what others reach this machine, where that is not the address to listen on (NAT, bridges,
            services of a cluster). If it is an address of this machine and no interface is given, it is listened on.
        towards: Host that all nodes reach. If it is a loopback address, all nodes are on this machine.
        several_nodes: Whether there are others. A job of one node is on 127.0.0.1 unless an interface is given.

    Raises:
        ConfigurationError: This machine has no such interface, or a loopback address would be told to other nodes.
    """
    on_one_machine = not several_nodes or (towards is not None and is_loopback(towards))
    found = _named(interface) if interface else _default(advertise, towards, on_one_machine=on_one_machine)
    told = advertise or found
    if not on_one_machine and (is_loopback(found) or is_loopback(told)):
        given = f"interface {interface!r}" if interface else f"address {told!r}"
        raise ConfigurationError(
            f"{given}: a loopback address cannot be reached by other nodes. Give the name or the subnet of an "
            f"interface of the network between them; this machine has {_described()}."
        )
    return LocalAddress(bind=found, advertise=told)


def is_loopback(host: str) -> bool:
    """Whether a host name or address stands for this machine alone; a name that is not known does not."""
    addresses = list(_resolve(host))
    return bool(addresses) and all(address.is_loopback for address in addresses)


def own_addresses() -> list[tuple[str, str]]:
    """The interfaces that are up: name and numeric address (``fe80::1%eth0`` for a link-local one), in system order."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    return [
        (name, str(found.address))
        for name, addresses in psutil.net_if_addrs().items()
        for found in addresses
        if name in up and found.family in (socket.AF_INET, socket.AF_INET6)
    ]


# --- inside ------------------------------------------------------------------------------------------------------


def _resolve(host: str) -> Iterator[_IP]:
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return
    for *_, address in found:
        yield ipaddress.ip_address(str(address[0]).partition("%")[0])


def _ip(address: str) -> _IP:
    return ipaddress.ip_address(address.partition("%")[0])


def _named(interface: str) -> str:
    have = own_addresses()
    for wanted in filter(None, map(str.strip, interface.split(","))):
        matching = [address for name, address in have if name == wanted] or _in_subnet(wanted, have)
        if matching:
            return _best(matching)
        own = {_ip(address) for _, address in have}
        for ip in _resolve(wanted):
            if ip in own or ip.is_loopback:
                return wanted if "%" in wanted else str(ip)
    raise ConfigurationError(
        f"interface {interface!r}: expected the name of an interface, a subnet or an address of this machine, which "
        f"has {_described()}"
    )


def _in_subnet(wanted: str, have: list[tuple[str, str]]) -> list[str]:
    if "/" not in wanted:
        return []
    try:
        subnet = ipaddress.ip_network(wanted, strict=False)
    except ValueError as error:
        raise ConfigurationError(f"interface {wanted!r}: {error}") from error
    return [address for _, address in have if _ip(address) in subnet]


def _default(advertise: str | None, towards: str | None, *, on_one_machine: bool) -> str:
    own = {_ip(address) for _, address in own_addresses()}
    for ip in _resolve(advertise) if advertise else ():
        if ip in own:
            return str(ip)
    if on_one_machine:
        return next(map(str, _resolve(towards)), _LOOPBACK) if towards and is_loopback(towards) else _LOOPBACK
    if towards:
        routed = _route(towards)
        if routed is not None and not _ip(routed).is_loopback:  # it is loopback towards this machine's own address
            return routed
        if any(ip in own for ip in _resolve(towards)):
            return str(next(ip for ip in _resolve(towards) if ip in own))
    return _best([a for _, a in own_addresses() if not _ip(a).is_loopback] or [_LOOPBACK])


def _best(addresses: list[str]) -> str:
    """IPv4 before IPv6, link-local addresses last."""
    return min(addresses, key=lambda a: (_ip(a).is_link_local, _ip(a).version))


def _route(host: str) -> str | None:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # of a datagram socket: nothing is sent
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _described() -> str:
    return ", ".join(f"{name} ({address})" for name, address in own_addresses()) or "no interface that is up"
