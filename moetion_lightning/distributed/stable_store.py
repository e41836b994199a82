"""The stable store: a TCPStore outside the training ranks, which outlives them.

torch's own server binds to all interfaces; here it is given a socket that is already bound to one.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from moetion_lightning.distributed.interfaces import is_loopback
from moetion_lightning.errors import ConfigurationError, LaunchError

__all__ = [
    "MAX_PORT",
    "STORE_ERRORS",
    "connect_store",
    "find_store",
    "format_endpoint",
    "host_store",
    "parse_endpoint",
]

#: What torch raises when the server is gone or silent: DistStoreError, DistNetworkError, or their base.
STORE_ERRORS = (RuntimeError,)
#: TCP has no port above: torch takes it modulo 65536.
MAX_PORT = 65535
_DEFAULT_PORT = 29400  # torchrun's


def parse_endpoint(text: str) -> tuple[str, int]:
    """Host and port of ``HOST[:PORT]`` or ``[IPV6]:PORT``, as torchrun takes them.

    Raises:
        ConfigurationError: It is none.
    """
    try:
        host, port = parse_rendezvous_endpoint(text.replace("[", "").replace("]", ""), _DEFAULT_PORT)
    except ValueError:
        host, port = "", 0
    if not text or not host or not 0 < port <= MAX_PORT:
        raise ConfigurationError(
            f"{text!r}: expected HOST:PORT with a port of 1 to {MAX_PORT}, for example 10.0.0.5:29400"
        )
    return host, port


def format_endpoint(host: str, port: int) -> str:
    """``HOST:PORT``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_store(host: str, port: int = 0) -> TCPStore:
    """Serve a store on the interface of ``host``; the server lives as long as the object.

    Args:
        host: Address or name of an interface of this machine.
        port: Port; 0 takes a free one (see ``TCPStore.port``).

    Raises:
        OSError: The address is not one of this machine, or the port is taken.
        OverflowError: There is no such port.
    """
    if not 0 <= port <= MAX_PORT:
        raise OverflowError(f"there is no port {port}: ports are 0 to {MAX_PORT}")
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
        bound = listener.getsockname()[1]
    except OSError:
        listener.close()
        raise
    return TCPStore(
        host,
        bound,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=60),
        master_listen_fd=listener.detach(),  # the server closes it
    )


def connect_store(host: str, port: int, timeout_seconds: float = 60.0) -> TCPStore:
    """A new client connection; use it from one thread only (a wait blocks everybody else's requests).

    Args:
        host: Host of the server.
        port: Its port.
        timeout_seconds: Limit for connecting, and for keys to appear; not for a server that is silent.
    """
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_seconds))


def _is_listening(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=2.0):
            return True
    except OSError:
        return False


def find_store(
    host: str, port: int, timeout_seconds: float, pause: Callable[[float], object], *, bind: str, is_host: bool | None
) -> tuple[str, TCPStore | None]:
    """Find the store at an endpoint; serve it if none answers there and it is this machine's.

    Args:
        host: Host of the store, as all nodes name it.
        port: Its port.
        timeout_seconds: How long to look for it.
        pause: Called with seconds between attempts; raises to stop waiting.
        bind: Where to serve, if this node's own name for itself is a loopback address (Debian: 127.0.1.1), or with
            ``is_host``, where the network translates addresses.
        is_host: Whether this machine serves it; None: if the endpoint is one of its addresses.

    Returns:
        The host by which this node reaches it, and the server, or None when another process serves it.

    Raises:
        LaunchError: Nobody answered in time.
    """
    deadline = time.monotonic() + timeout_seconds
    own_name = host in (socket.gethostname(), socket.getfqdn())
    place = bind if is_host or (own_name and is_loopback(host)) else host
    while True:
        for reached in dict.fromkeys((host, place)):
            if _is_listening(reached, port):
                return reached, None
        try:
            if is_host is not False:
                return place, host_store(place, port)
        except OSError as error:  # another machine's address, or another process was faster
            reason: object = error
        else:
            reason = "this node is not to serve it"
        if time.monotonic() > deadline:
            raise LaunchError(
                f"no store answered at {format_endpoint(host, port)} for {timeout_seconds:.0f} s ({reason}). Start "
                f"`moetion rendezvous --host {host} --port {port}` on that host, or correct --rdzv-endpoint."
            )
        pause(0.25)
