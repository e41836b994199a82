"""The stable store: a TCPStore outside the training ranks, which outlives them.

torch's own server binds to all interfaces; here it is given a socket that is already bound to one.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from moetion_lightning.errors import ConfigurationError, LaunchError

__all__ = [
    "STORE_ERRORS",
    "connect_store",
    "format_endpoint",
    "host_store",
    "join_or_host",
    "parse_endpoint",
]

#: What torch raises when the server is gone or silent: DistStoreError, DistNetworkError, or their base.
STORE_ERRORS = (RuntimeError,)


def parse_endpoint(text: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT`` or ``[IPV6]:PORT``.

    Raises:
        ConfigurationError: It is none.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigurationError(f"{text!r}: expected HOST:PORT, for example 10.0.0.5:29400")
    return host.strip("[]"), int(port)


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
    """
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
        timeout_seconds: Limit for connecting and for each later request.
    """
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_seconds))


def _is_listening(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=2.0):
            return True
    except OSError:
        return False


def join_or_host(host: str, port: int, timeout_seconds: float, pause: Callable[[float], None]) -> TCPStore | None:
    """Find the store at an endpoint; serve it if none answers and the address is this machine's.

    Args:
        host: Host of the store.
        port: Its port.
        timeout_seconds: How long to look for it.
        pause: Called with seconds between attempts; raises to stop waiting.

    Returns:
        The server, or None when another process serves it.

    Raises:
        LaunchError: Nobody answered in time.
    """
    deadline = time.monotonic() + timeout_seconds
    while not _is_listening(host, port):
        try:
            return host_store(host, port)
        except OSError as error:  # another machine's address, or another process was faster
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"no store answered at {format_endpoint(host, port)} for {timeout_seconds:.0f} s ({error}). Start "
                    f"`moetion rendezvous --host {host} --port {port}` on that host, or correct --rdzv-endpoint."
                ) from error
        pause(0.25)
    return None
