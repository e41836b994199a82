"""Serves this rank's windows, and keeps those of others: one thread listens, a few answer.

A stranger costs one socket and 72 bytes for five seconds: handshakes are read by the listening thread without ever
waiting for one. Connections that rest between two requests cost a socket, too; only a request takes a thread.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from moetion_lightning.distributed.replica_store import MAX_RANKS, ReplicaStore, receive_manifest, send_window
from moetion_lightning.distributed.wire import (
    HANDSHAKE_SECONDS,
    PROOF_BYTES,
    Address,
    Challenge,
    Connection,
    number,
    own,
)
from moetion_lightning.errors import ConfigurationError, MoEtionError, ReplicationError

__all__ = ["ReplicaServer"]

_log = logging.getLogger(__name__)

_MAX_THREADS = 8
_MAX_HANDSHAKES = 64
_MAX_RESTING = 1024
_MAX_COMPLAINTS = 256
_TICK_SECONDS = 0.25
_JOIN_SECONDS = 10.0


class _Handshake:
    """A connection that has not proved the secret yet."""

    def __init__(self, sock: socket.socket, peer: str, key: bytes) -> None:
        self.socket = sock
        self.peer = peer
        self.deadline = time.monotonic() + HANDSHAKE_SECONDS
        self._challenge = Challenge(key)
        self._received = b""
        sock.setblocking(False)
        sock.send(self._challenge.greeting)  # into the empty buffer of a new connection

    def advance(self) -> bytes | None:
        """Read what has come.

        Returns:
            The session key when the client has proved the secret, None when there is more to come.

        Raises:
            ReplicationError: It will not.
        """
        part = self.socket.recv(PROOF_BYTES - len(self._received))
        self._received += part
        if not part:
            raise ReplicationError("closed the connection in the middle of the handshake")
        if not self._challenge.is_plausible(self._received):
            raise ReplicationError("does not speak this protocol (another service's client, or another version)")
        if len(self._received) < PROOF_BYTES:
            return None
        answer = self._challenge.check(self._received)
        if answer is None:
            raise ReplicationError("does not know this job's secret (MOETION_SECRET or job_id differ)")
        proof, session_key = answer
        self.socket.send(proof)
        return session_key


class ReplicaServer:
    """Answers the other ranks of the job.

    Args:
        store: What it serves.
        key: From :func:`~moetion_lightning.distributed.wire.job_key`.
        host: Address or name of the interface to bind to.
        port: 0 for a free one.
        timeout_seconds: How long a rank may be silent in the middle of a request.
    """

    def __init__(self, store: ReplicaStore, key: bytes, *, host: str, port: int = 0, timeout_seconds: float) -> None:
        self._store = store
        self._key = key
        self._timeout = timeout_seconds
        self._listener = _listen(host, port)
        self._wake_out, self._wake_in = socket.socketpair()
        for sock in (self._listener, self._wake_out, self._wake_in):
            sock.setblocking(False)
            own(sock)
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._listen_loop, name="moetion-replica-listen", daemon=True)
        self._complaints: set[str] = set()
        self._handshakes: dict[_Handshake, None] = {}  # oldest first, as the next
        self._resting: dict[Connection, None] = {}
        self._mutex = threading.Lock()
        self._closing = False
        self._working: dict[Connection, threading.Thread] = {}
        self._waiting: deque[Connection] = deque()
        self._returned: list[Connection] = []
        self._requests: dict[str, Callable[[Connection, dict[str, Any]], None]] = {"put": self._put, "get": self._get}

    @property
    def address(self) -> Address:
        """Host and port that others connect to."""
        host, port = self._listener.getsockname()[:2]
        return host, port

    def start(self) -> None:
        """Begin to serve."""
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake_out, selectors.EVENT_READ)
        self._thread.start()

    def close(self) -> None:
        """Break all connections off and end the threads."""
        with self._mutex:
            self._closing = True
            working = dict(self._working)
        for connection in working:
            connection.abort()
        self._wake()
        if self._thread.ident is not None:
            self._thread.join()
        for thread in working.values():
            thread.join(_JOIN_SECONDS)
        for waiting in [*self._waiting, *self._returned, *self._resting]:
            waiting.close()
        for handshake in self._handshakes:
            handshake.socket.close()
        self._selector.close()
        for sock in (self._listener, self._wake_in, self._wake_out):
            sock.close()

    # --- listening thread ----------------------------------------------------------------------------------------

    def _listen_loop(self) -> None:
        while not self._closing:
            ready = self._selector.select(_TICK_SECONDS if self._handshakes else None)
            for key, _ in ready:
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._wake_out:
                    self._take_back()
                elif isinstance(key.data, _Handshake):
                    self._advance(key.data)
                else:
                    self._begin(key.data)
            now = time.monotonic()
            for handshake in [h for h in self._handshakes if h.deadline < now]:
                self._reject(handshake, f"said nothing that proves the secret within {HANDSHAKE_SECONDS:.0f} s")

    def _accept(self) -> None:
        try:
            sock, address = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # out of descriptors, for example: the connection stays in the queue
            self._complain("anybody", f"cannot be served: {error}")
            time.sleep(_TICK_SECONDS)
            return
        own(sock)
        if len(self._handshakes) >= _MAX_HANDSHAKES:
            self._reject(next(iter(self._handshakes)), "was pushed out: too many connections without a handshake")
        try:
            handshake = _Handshake(sock, address[0], self._key)
        except OSError:
            sock.close()
            return
        self._handshakes[handshake] = None
        self._selector.register(sock, selectors.EVENT_READ, handshake)

    def _advance(self, handshake: _Handshake) -> None:
        if handshake not in self._handshakes:
            return  # rejected after the selector had reported it
        try:
            session_key = handshake.advance()
        except BlockingIOError:
            return
        except (ReplicationError, OSError) as error:
            self._reject(handshake, str(error))
            return
        if session_key is None:
            return
        del self._handshakes[handshake]
        self._selector.unregister(handshake.socket)
        connection = Connection(
            handshake.socket,
            session_key,
            is_client=False,
            timeout_seconds=self._timeout,
            peer=f"the rank at {handshake.peer}",
        )
        self._rest(connection)

    def _reject(self, handshake: _Handshake, reason: str) -> None:
        del self._handshakes[handshake]
        self._selector.unregister(handshake.socket)
        self._complain(handshake.peer, reason)
        handshake.socket.close()

    def _rest(self, connection: Connection) -> None:
        if len(self._resting) >= _MAX_RESTING:
            self._unrest(oldest := next(iter(self._resting)))
            oldest.close()
        self._resting[connection] = None
        self._selector.register(connection, selectors.EVENT_READ, connection)

    def _unrest(self, connection: Connection) -> None:
        del self._resting[connection]
        self._selector.unregister(connection)

    def _begin(self, connection: Connection) -> None:
        """A request has come (or the end): hand the connection to a thread."""
        if connection not in self._resting:
            return
        self._unrest(connection)
        if connection.has_ended():
            connection.close()
            return
        with self._mutex:
            if self._closing or len(self._working) >= _MAX_THREADS:
                self._waiting.append(connection)
            else:
                self._start_thread(connection)

    def _start_thread(self, connection: Connection) -> None:
        thread = threading.Thread(target=self._serve, args=(connection,), name="moetion-replica-serve", daemon=True)
        self._working[connection] = thread
        thread.start()

    def _take_back(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_out.recv(4096)
        with self._mutex:
            returned, self._returned = self._returned, []
        for connection in returned:
            self._rest(connection)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_in.send(b"w")

    def _complain(self, peer: str, reason: str) -> None:
        is_first = peer not in self._complaints and len(self._complaints) < _MAX_COMPLAINTS
        if is_first:
            self._complaints.add(peer)
        _log.log(
            logging.WARNING if is_first else logging.DEBUG,
            "replica server %s:%d: a connection from %s %s. It was closed; nothing was taken from it.",
            *self.address, peer, reason,
        )  # fmt: skip

    # --- serving threads -----------------------------------------------------------------------------------------

    def _serve(self, connection: Connection) -> None:
        keep = False
        try:
            keep = self._answer(connection)
        finally:
            if not keep:
                connection.close()
            with self._mutex:
                del self._working[connection]
                if not self._closing:
                    if self._waiting:
                        self._start_thread(self._waiting.popleft())
                    if keep:
                        self._returned.append(connection)
                elif keep:
                    connection.close()
            self._wake()

    def _answer(self, connection: Connection) -> bool:
        """Serve one request. Returns whether the connection can carry another one."""
        try:
            request = connection.receive()
            answer = self._requests.get(str(request.get("op")))
            if answer is None:
                raise ReplicationError(
                    f"unknown request {str(request.get('op'))[:40]!r}; install one version everywhere."
                )
            answer(connection, request)
            return True
        except (MoEtionError, OSError) as error:
            if not self._closing:
                _log.warning("replica server of rank %d: %s", self._store.own.rank, error)
            reason = str(error)
        except Exception as error:
            _log.exception("replica server of rank %d failed", self._store.own.rank)
            reason = f"internal error ({type(error).__name__}: {error}); see the log of that rank."
        if connection.is_open:
            with contextlib.suppress(ReplicationError):
                connection.send({"ok": False, "error": reason[:1000]})
        return False

    def _put(self, connection: Connection, request: dict[str, Any]) -> None:
        owner, own_rank = number(request, "owner", MAX_RANKS), self._store.own.rank
        if request.get("holder") != own_rank or owner == own_rank:
            raise ReplicationError(
                f"a window of rank {owner} for rank {str(request.get('holder'))[:20]} came to rank {own_rank}. "
                "The addresses of the ranks are outdated."
            )
        self._store.put(connection, owner, receive_manifest(connection, request))
        connection.send({"ok": True})

    def _get(self, connection: Connection, request: dict[str, Any]) -> None:
        tier = self._store.tier_of(number(request, "owner", MAX_RANKS))
        with tier.pinned(number(request, "last", 10**12)) as manifest:
            send_window(connection, tier, manifest, {"ok": True})


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0]
        if ipaddress.ip_address(str(address[0]).partition("%")[0]).is_unspecified:
            raise ConfigurationError(
                f"host={host!r}: peers cannot connect to it, and it would listen on every interface. Give the address "
                "or name of this machine in the network that joins the ranks."
            )
        return socket.create_server((str(address[0]), int(address[1])), family=family, backlog=128)
    except OSError as error:
        raise ReplicationError(
            f"host={host!r}, port={port}: the replica server cannot listen there: {error}. Give an address or name of "
            "this machine, and port 0 for a free port."
        ) from error
