"""The sockets of this process, as the kernel lists them (Linux; elsewhere there are none)."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

__all__ = ["Recorder", "list_sockets", "peer_port", "shut_down", "with_socket"]

_DESCRIPTORS = Path("/proc/self/fd")


def list_sockets() -> dict[int, str]:
    """Descriptors of all open sockets, each with what the kernel calls it: a descriptor's number is used again."""
    found = {}
    for name in os.listdir(_DESCRIPTORS) if _DESCRIPTORS.is_dir() else []:
        with contextlib.suppress(OSError):  # closed meanwhile
            target = os.readlink(_DESCRIPTORS / name)
            if target.startswith("socket:"):
                found[int(name)] = target
    return found


@contextlib.contextmanager
def with_socket(descriptor: int) -> Iterator[socket.socket]:
    """The socket behind a descriptor that something else owns. Raises ``OSError`` if there is none."""
    with socket.socket(fileno=os.dup(descriptor)) as borrowed:
        yield borrowed


def shut_down(descriptor: int) -> None:
    """End the connection, whoever else holds descriptors of it: both sides notice, also threads that are blocked."""
    with contextlib.suppress(OSError), with_socket(descriptor) as borrowed:
        borrowed.shutdown(socket.SHUT_RDWR)


def peer_port(descriptor: int) -> int | None:
    """Port of the other side of a TCP connection; None if it is none."""
    ports = _ports(descriptor)
    return None if ports is None else ports[1]


class Recorder:
    """Finds the TCP connections that C++ code opens while a block of code runs, so that they can be ended later.

    Not counted: sockets of Python objects (another thread's, whatever they are), connections to one of
    ``other_ports``, and connections to a server of this process that listened before.

    Args:
        other_ports: Ports of servers (the store's) to which other threads may connect at any time.
    """

    def __init__(self, other_ports: Collection[int] = ()) -> None:
        self._other_ports = frozenset(other_ports)
        self._guard = threading.Lock()
        self._found: dict[int, str] = {}
        self._before: dict[int, str] | None = None  # while a block runs
        self._listening: frozenset[int] = frozenset()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Around the code."""
        with self._guard:
            outer, self._before = self._before, list_sockets() if self._before is None else self._before
            self._listening = self._listening if outer is not None else _listening_ports(self._before)
        try:
            yield
        finally:
            with self._guard:
                if outer is None:
                    self._look()
                    self._before = None

    def shut_down(self) -> int:
        """From any thread: end all connections that were found. Returns how many there were."""
        with self._guard:
            if self._before is not None:
                self._look()
            found, self._found = self._found, {}
        now = list_sockets()
        ended = [descriptor for descriptor, name in found.items() if now.get(descriptor) == name]
        for descriptor in ended:
            shut_down(descriptor)
        return len(ended)

    def _look(self) -> None:
        before, owned = self._before or {}, _python_sockets()
        for descriptor, name in list_sockets().items():
            if before.get(descriptor) == name or descriptor in owned:
                continue
            ports = _ports(descriptor)
            if ports is not None and ports[0] not in self._listening and ports[1] not in self._other_ports:
                self._found[descriptor] = name


def _ports(descriptor: int) -> tuple[int, int] | None:
    with contextlib.suppress(OSError), with_socket(descriptor) as borrowed:
        if borrowed.family in (socket.AF_INET, socket.AF_INET6) and borrowed.type == socket.SOCK_STREAM:
            return borrowed.getsockname()[1], borrowed.getpeername()[1]
    return None


def _listening_ports(descriptors: Collection[int]) -> frozenset[int]:
    found = set()
    for descriptor in descriptors:
        with contextlib.suppress(OSError), with_socket(descriptor) as borrowed:
            if borrowed.family != socket.AF_UNIX and borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                found.add(borrowed.getsockname()[1])
    return frozenset(found)


def _python_sockets() -> set[int]:
    # By type: isinstance() would run code of objects that pretend to be others.
    return {thing.fileno() for thing in gc.get_objects() if issubclass(type(thing), socket.socket)}
