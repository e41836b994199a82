"""Serves this rank's windows, and keeps those of others: one thread listens, a few answer.

A stranger costs one socket and 72 bytes for five seconds: handshakes are read by the listening thread, an event loop.
Connections that rest between two requests cost a socket, too; only a request takes a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import threading
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
_PAUSE_SECONDS = 0.25
_JOIN_SECONDS = 10.0


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
        self._listener.setblocking(False)
        own(self._listener)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="moetion-replica-listen", daemon=True)
        self._complaints: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._handshakes: dict[asyncio.Task[None], str] = {}  # oldest first, as the next
        self._resting: dict[asyncio.Task[None], None] = {}
        self._closing = False
        self._working: dict[Connection, threading.Thread] = {}
        self._free = asyncio.Semaphore(_MAX_THREADS)
        self._requests: dict[str, Callable[[Connection, dict[str, Any]], None]] = {"put": self._put, "get": self._get}

    @property
    def address(self) -> Address:
        """Host and port that others connect to."""
        host, port = self._listener.getsockname()[:2]
        return host, port

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def close(self) -> None:
        """Break all connections off and end the threads."""
        self._closing = True
        if self._thread.ident is not None:
            working = dict(self._working)
            for connection in working:
                connection.abort()
            for thread in working.values():
                if thread.ident is not None:
                    thread.join(_JOIN_SECONDS)
            self._loop.call_soon_threadsafe(lambda: self._main.cancel())
            self._thread.join()
        self._loop.close()
        self._listener.close()

    # --- listening thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._main = self._loop.create_task(self._accept())
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._main)

    async def _accept(self) -> None:
        try:
            while True:
                try:
                    sock, address = await self._loop.sock_accept(self._listener)
                except OSError as error:  # out of descriptors, for example: the connection stays in the queue
                    self._complain("anybody", f"cannot be served: {error}")
                    await asyncio.sleep(_PAUSE_SECONDS)
                    continue
                own(sock)
                if len(self._handshakes) >= _MAX_HANDSHAKES:
                    oldest = next(iter(self._handshakes))
                    peer = self._handshakes.pop(oldest)
                    self._complain(peer, "was pushed out: too many connections without a handshake")
                    oldest.cancel()
                task = self._loop.create_task(self._serve(sock, address[0]))
                self._handshakes[task] = address[0]
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, sock: socket.socket, peer: str) -> None:
        """One connection, from its first byte to its end."""
        task: Any = asyncio.current_task()
        try:
            session_key = await asyncio.wait_for(self._shake_hands(sock), HANDSHAKE_SECONDS)
            self._handshakes.pop(task, None)
            timeout, name = self._timeout, f"the rank at {peer}"
            connection = Connection(sock, session_key, is_client=False, timeout_seconds=timeout, peer=name)
            while await self._is_asked(connection, task) and await self._answer_in_thread(connection):
                pass
        except asyncio.TimeoutError:
            self._complain(peer, f"said nothing that proves the secret within {HANDSHAKE_SECONDS:.0f} s")
        except (ReplicationError, OSError) as error:
            self._complain(peer, str(error))
        finally:
            self._handshakes.pop(task, None)
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # a thread that still reads it notices
            sock.close()

    async def _shake_hands(self, sock: socket.socket) -> bytes:
        """The session key, once the client has proved the secret. Raises ``ReplicationError`` if it will not."""
        challenge, received = Challenge(self._key), b""
        await self._loop.sock_sendall(sock, challenge.greeting)
        while len(received) < PROOF_BYTES:
            part = await self._loop.sock_recv(sock, PROOF_BYTES - len(received))
            received += part
            if not part:
                raise ReplicationError("closed the connection in the middle of the handshake")
            if not challenge.is_plausible(received):
                raise ReplicationError("does not speak this protocol (another service's client, or another version)")
        answer = challenge.check(received)
        if answer is None:
            raise ReplicationError("does not know this job's secret (MOETION_SECRET or job_id differ)")
        await self._loop.sock_sendall(sock, answer[0])
        return answer[1]

    async def _is_asked(self, connection: Connection, task: asyncio.Task[None]) -> bool:
        """Rest until a request comes, or the end."""
        if len(self._resting) >= _MAX_RESTING:
            next(iter(self._resting)).cancel()
        self._resting[task] = None
        readable = asyncio.Event()
        self._loop.add_reader(connection.fileno(), readable.set)
        try:
            await readable.wait()
        finally:
            self._loop.remove_reader(connection.fileno())
            del self._resting[task]
        return not connection.has_ended()

    async def _answer_in_thread(self, connection: Connection) -> bool:
        """Serve one request. Returns whether the connection can carry another one."""
        async with self._free:
            answered: asyncio.Future[bool] = self._loop.create_future()

            def work() -> None:
                keep = self._answer(connection)
                with contextlib.suppress(RuntimeError):  # the server is closed
                    self._loop.call_soon_threadsafe(_settle, answered, keep)

            thread = threading.Thread(target=work, name="moetion-replica-serve", daemon=True)
            self._working[connection] = thread
            try:
                if not self._closing:
                    thread.start()
                    return await answered
                return False
            finally:
                del self._working[connection]

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


def _settle(answered: asyncio.Future[bool], keep: bool) -> None:
    if not answered.done():  # it is cancelled when the server closes
        answered.set_result(keep)


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
