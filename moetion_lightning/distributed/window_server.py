"""Serves the windows in one node's memory to the other nodes: one process of the node does, for all of its ranks.

A request is a header, see :mod:`~moetion_lightning.distributed.wire`; what answers it, too:

==========================================  =========================================================================
``{"op": "get", "owner", "last"}``          the window of a rank that ends with an iteration, wherever it is here
``{"op": "next", "owner", "have"}``         the rank's newest window as soon as it is not ``have`` (``[last,
                                            created_at]`` or null); ``{"nothing": true}`` after a while without one
==========================================  =========================================================================

The answer is a manifest; the client names the files that it lacks, and gets them. A server that is closed tells whoever
waits (``{"closing": true}``). A stranger costs a thread and a socket for five seconds; when there are too many, the
oldest is pushed out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from typing import Any

from moetion_lightning.distributed.node_windows import NodeWindows
from moetion_lightning.distributed.window_transfer import send_window
from moetion_lightning.distributed.wire import Connection, accept, number, own
from moetion_lightning.errors import CorruptSnapshotError, MoEtionError, ReplicationError
from moetion_lightning.storage.folders import WINDOWS
from moetion_lightning.storage.host_memory import HostMemoryTier
from moetion_lightning.storage.manifest import Manifest

__all__ = ["MAX_RANKS", "NOTHING_SECONDS", "WindowServer"]

_log = logging.getLogger(__name__)

MAX_RANKS = 100_000
NOTHING_SECONDS = 5.0
"""A client that waits for a window hears this often that there is none yet."""
_LOOK_SECONDS = 0.02
_JUMP_NANOSECONDS = 100_000_000
_MAX_SENDING = 8
_MAX_STRANGERS = 512
_MAX_COMPLAINTS = 256


class WindowServer:
    """Answers the other nodes of the job.

    Args:
        windows: What it serves.
        bind: Numeric address of the interface to listen on.
        timeout_seconds: How long a client may be silent in the middle of a request.

    Raises:
        ReplicationError: The interface cannot be listened on.
    """

    def __init__(self, windows: NodeWindows, bind: str, *, timeout_seconds: float) -> None:
        self._windows = windows
        self._timeout = timeout_seconds
        self._key = b""
        try:
            family, *_, address = socket.getaddrinfo(bind, 0, type=socket.SOCK_STREAM)[0]
            self._listener = socket.create_server((str(address[0]), 0), family=family, backlog=4096)
        except OSError as error:
            raise ReplicationError(
                f"interface={bind!r}: the window server cannot listen there: {error}. Give the name, the subnet or an "
                "address of an interface of this machine."
            ) from error
        own(self._listener)
        self.port: int = self._listener.getsockname()[1]
        self._sending = threading.BoundedSemaphore(_MAX_SENDING)
        self._mutex = threading.Lock()
        self._strangers: dict[socket.socket, str] = {}  # oldest first
        self._connections: dict[Connection, threading.Thread] = {}
        self._waiting: set[Connection] = set()  # for a window
        self._complaints: set[str] = set()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._accept, name="moetion-windows-listen", daemon=True)

    def start(self, key: bytes) -> None:
        """Begin to serve those who know the key; others that have connected meanwhile wait."""
        self._key = key
        self._thread.start()

    def close(self) -> None:
        """Break all connections off and end the threads."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        if self._thread.ident is not None:
            self._thread.join()
        self._listener.close()
        with self._mutex:
            strangers, connections = list(self._strangers), dict(self._connections)
        for sock in strangers:
            _hang_up(sock)
        for connection, thread in connections.items():
            if connection not in self._waiting:  # else it is told
                connection.abort()
            thread.join()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, address = self._listener.accept()
            except OSError as error:  # out of descriptors, for example: the connection stays in the queue
                if not self._closing.wait(0.25):
                    self._complain("anybody", f"cannot be served: {error}")
                continue
            own(sock)
            with self._mutex:
                self._strangers[sock] = address[0]
                oldest = next(iter(self._strangers)) if len(self._strangers) > _MAX_STRANGERS else None
            if oldest is not None:
                _hang_up(oldest)
            threading.Thread(target=self._serve, args=(sock, address[0]), name="moetion-windows", daemon=True).start()

    def _serve(self, sock: socket.socket, peer: str) -> None:
        """One connection, from its first byte to its end."""
        try:
            connection = accept(sock, self._key, timeout_seconds=self._timeout, peer=peer)
        except ReplicationError as error:
            if not self._closing.is_set():
                self._complain(peer, str(error))
            return
        finally:
            with self._mutex:
                self._strangers.pop(sock, None)
        with self._mutex:
            self._connections[connection] = threading.current_thread()
        try:
            while not self._closing.is_set() and connection.is_asked() and self._answer(connection):
                pass
        finally:
            with self._mutex:
                del self._connections[connection]
            connection.close()

    def _complain(self, peer: str, reason: str) -> None:
        is_first = peer not in self._complaints and len(self._complaints) < _MAX_COMPLAINTS
        if is_first:
            self._complaints.add(peer)
        _log.log(
            logging.WARNING if is_first else logging.DEBUG,
            "window server at port %d: a connection from %s %s. It was closed; nothing was taken from it.",
            self.port, peer, reason,
        )  # fmt: skip

    def _answer(self, connection: Connection) -> bool:
        """Serve one request. Returns whether the connection can carry another one."""
        try:
            request = connection.receive()
            found = self._find(connection, request)
            if found is None:
                connection.send(
                    {"ok": True, "closing": True} if self._closing.is_set() else {"ok": True, "nothing": True}
                )
            else:
                with self._sending:
                    send_window(connection, *found)
            return True
        except (MoEtionError, OSError) as error:
            if not self._closing.is_set():
                _log.info("window server at port %d: %s", self.port, error)
            reason = str(error)
        except Exception as error:
            _log.exception("the window server at port %d failed", self.port)
            reason = f"internal error ({type(error).__name__}: {error}); see the log of that rank."
        if connection.is_open:
            with contextlib.suppress(ReplicationError):
                connection.send({"ok": False, "error": reason[:1000]})
        return False

    def _find(self, connection: Connection, request: dict[str, Any]) -> tuple[HostMemoryTier, Manifest] | None:
        if request.get("op") == "get":
            owner, last = number(request, "owner", MAX_RANKS), number(request, "last", 10**12)
            for found in self._windows.find(owner, last):
                return found
            raise CorruptSnapshotError(f"window {last} of rank {owner} is missing on this node. Ask another one.")
        if request.get("op") == "next":
            self._waiting.add(connection)
            try:
                return self._next(number(request, "owner", MAX_RANKS), request.get("have"))
            finally:
                self._waiting.discard(connection)
        raise ReplicationError(f"unknown request {str(request.get('op'))[:40]!r}; install one version everywhere.")

    def _next(self, owner: int, have: object) -> tuple[HostMemoryTier, Manifest] | None:
        """Wait until the owner's newest window is another one than the client has."""
        tier = self._windows.of_rank(owner)
        seen, deadline = -1, time.monotonic() + NOTHING_SECONDS
        while not self._closing.is_set() and time.monotonic() < deadline:
            with contextlib.suppress(OSError, CorruptSnapshotError):  # nothing there yet, or dropped in between
                mark = os.stat(tier.path / WINDOWS).st_mtime_ns
                if mark != seen:
                    for newest in tier.windows()[:1]:
                        manifest = tier.read_manifest(newest)
                        if [manifest.iteration, manifest.created_at] != have:
                            return tier, manifest
                    # Times of files advance in jumps: two commits may have the same one.
                    seen = mark if time.time_ns() - mark > _JUMP_NANOSECONDS else -1
            self._closing.wait(_LOOK_SECONDS)
        return None


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
