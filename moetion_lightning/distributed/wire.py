"""Authenticated connections between the ranks of a job: the handshake, framed headers, raw payload.

Both ends prove that they know the job's secret before anything else is read; nothing that a stranger can choose is
parsed or allocated before that. From then on every header carries a MAC over its direction, its serial number and its
bytes, so that none can be altered, replayed or left out. Payload travels raw, straight from and into mapped files; its
checksums are in the manifest, which travels as a header does. Nothing is encrypted, and nothing is pickled.

::

    server -> client   MAGIC, server nonce
    client -> server   MAGIC, client nonce, HMAC(key, "client", both nonces)
    server -> client   HMAC(key, "server", both nonces)
    then frames        length (4 bytes), body, HMAC(session key, direction, serial number, body)
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import socket
import struct
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from moetion_lightning.errors import ConfigurationError, CorruptSnapshotError, ReplicationError
from moetion_lightning.storage.manifest import parse_json

__all__ = [
    "HANDSHAKE_SECONDS",
    "MAX_BLOB_BYTES",
    "MAX_HEADER_BYTES",
    "PROOF_BYTES",
    "Address",
    "Connection",
    "RefusedError",
    "accept",
    "connect",
    "job_key",
    "new_secret",
    "number",
]

Address: TypeAlias = tuple[str, int]

HANDSHAKE_SECONDS = 5.0
"""A connection that has not proved the secret by then is closed."""
MAX_HEADER_BYTES = 64 << 10
MAX_BLOB_BYTES = 64 << 20
"""Longest manifest that is sent."""

_MAGIC = b"MOETREP1"  # protocol and its version
_NONCE_BYTES = 32
_MAC_BYTES = 32
PROOF_BYTES = len(_MAGIC) + _NONCE_BYTES + _MAC_BYTES
_CHUNK_BYTES = 4 << 20  # a time limit applies to each chunk, not to a whole file
_LENGTH = struct.Struct(">I")
_SERIAL = struct.Struct(">Q")


class RefusedError(ReplicationError):
    """The other end is whole and reachable, and says no."""


def new_secret() -> str:
    """A secret for one job; the same on all of its ranks."""
    return secrets.token_hex(32)


def job_key(secret: str, job: str) -> bytes:
    """The key that the ranks of a job prove to each other.

    Args:
        secret: Shared by the ranks of the job.
        job: Name of the job: jobs that share a secret are still told apart.

    Raises:
        ConfigurationError: The secret is empty.
    """
    if not secret:
        raise ConfigurationError(
            "secret='': copies are only taken from ranks that know the job's secret. Set MOETION_SECRET to the same "
            "long random text on every node."
        )
    return _mac(secret.encode(), b"moetion replication", job.encode())


def number(header: dict[str, Any], field: str, limit: int) -> int:
    """An integer from 0 below ``limit`` from a header. Raises ``ReplicationError``."""
    value = header.get(field)
    if type(value) is not int or not 0 <= value < limit:
        raise ReplicationError(f"replication header field {field!r} is {value!r}; expected an integer below {limit}.")
    return value


def _mac(key: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, b"".join(_SERIAL.pack(len(part)) + part for part in parts), hashlib.sha256)


class Connection:
    """One end of a connection whose handshake is done. Not thread-safe, but for :meth:`abort`.

    Every method raises :class:`ReplicationError` when the connection breaks off, is silent for too long, or carries
    anything that was not sent by the other end in this place; it is closed then.

    Args:
        sock: The socket.
        session_key: Of this connection alone.
        is_client: Which of the two ends this is.
        timeout_seconds: How long the other end may be silent, or take nothing.
        peer: The other end, for messages.
    """

    def __init__(
        self, sock: socket.socket, session_key: bytes, *, is_client: bool, timeout_seconds: float, peer: str
    ) -> None:
        self.peer = peer
        self.is_open = True
        self.bytes_received = 0
        self._socket = sock
        self._key = session_key
        self._outward, self._inward = (b"C", b"S") if is_client else (b"S", b"C")
        self._num_sent = 0
        self._num_received = 0
        sock.settimeout(timeout_seconds)
        with contextlib.suppress(OSError):  # not a TCP socket
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def send(self, header: dict[str, Any]) -> None:
        """Send a header: a small JSON object."""
        self.send_blob(json.dumps(header, separators=(",", ":")).encode())

    def is_asked(self) -> bool:
        """Rest until the other end sends something, however long that takes. Returns False when it hangs up."""
        timeout = self._socket.gettimeout()
        try:
            self._socket.settimeout(None)
            return self._socket.recv(1, socket.MSG_PEEK) != b""
        except OSError:
            return False
        finally:
            with contextlib.suppress(OSError):
                self._socket.settimeout(timeout)

    def receive(self, max_bytes: int = MAX_HEADER_BYTES) -> dict[str, Any]:
        """Receive a header."""
        try:
            header: dict[str, Any] = parse_json(self.receive_blob(max_bytes), path=self.peer)
        except CorruptSnapshotError as error:
            raise self._broken(f"sent a header that is no JSON object ({error})") from error
        return header

    def receive_answer(self, max_bytes: int = MAX_HEADER_BYTES) -> dict[str, Any]:
        """Receive a header that answers a request. Raises :class:`RefusedError` when the answer is no."""
        answer = self.receive(max_bytes)
        if answer.get("ok") is not True:
            self.close()
            raise RefusedError(f"{self.peer} refused: {answer.get('error', 'no reason was given')}")
        return answer

    def send_blob(self, data: bytes) -> None:
        """Send bytes that are authenticated as a header is."""
        mac = _mac(self._key, self._outward, _SERIAL.pack(self._num_sent), data)
        self._num_sent += 1
        with self._explained("sending to"):
            self._socket.sendall(_LENGTH.pack(len(data)) + data + mac)

    def receive_blob(self, max_bytes: int) -> bytes:
        """Receive what :meth:`send_blob` sends.

        Args:
            max_bytes: More is refused before it is read.
        """
        with self._explained("receiving from"):
            prefix = bytearray(_LENGTH.size)
            self._receive_all(memoryview(prefix))
            (length,) = _LENGTH.unpack(prefix)
            if length > max_bytes:
                raise self._broken(f"announced {length} bytes where at most {max_bytes} are expected")
            body = bytearray(length + _MAC_BYTES)
            self._receive_all(memoryview(body))
        data = bytes(memoryview(body)[:length])
        expected = _mac(self._key, self._inward, _SERIAL.pack(self._num_received), data)
        if not hmac.compare_digest(expected, bytes(memoryview(body)[length:])):
            raise self._broken("sent a header whose authentication code is wrong: it was altered on its way")
        self._num_received += 1
        return data

    def send_file(self, path: Path, nbytes: int) -> None:
        """Send a file's bytes as they are; their number and checksum must be known to the other end."""
        with self._explained("sending to"), open(path, "rb") as file:
            # Not mapped: whoever owns the file may cut it meanwhile, which would kill a reader of its memory.
            if nbytes and self._socket.sendfile(file, 0, nbytes) != nbytes:
                raise self._broken(f"cannot have {path.name}: it was given up while it was sent")

    def receive_stream(self, into: memoryview) -> None:
        """Receive as many raw bytes as ``into`` has, directly into it."""
        with self._explained("receiving from"):
            self._receive_all(into)

    def abort(self) -> None:
        """Break the connection off from another thread: a call that waits on it fails at once."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket."""
        self.is_open = False
        self._socket.close()

    def _receive_all(self, into: memoryview) -> None:
        done = 0
        while done < len(into):
            with into[done : done + _CHUNK_BYTES] as chunk:
                count = self._socket.recv_into(chunk)
            if count == 0:
                raise ConnectionResetError("the other end closed the connection")
            done += count
            self.bytes_received += count

    def _broken(self, what: str) -> ReplicationError:
        self.close()
        return ReplicationError(f"{self.peer} {what}. The connection was closed.")

    @contextlib.contextmanager
    def _explained(self, doing: str) -> Any:
        try:
            yield
        except ReplicationError:
            raise
        except OSError as error:
            self.close()
            raise ReplicationError(
                f"{doing} {self.peer} failed: {error}. The process there died or hangs, or the network is down: see "
                "the log of that rank."
            ) from error


def connect(address: Address, key: bytes, *, timeout_seconds: float) -> Connection:
    """Connect to a node's window server; both ends prove that they know the job's secret.

    Args:
        address: Host and port.
        key: From :func:`job_key`.
        timeout_seconds: How long the other end may be silent later on.

    Raises:
        ReplicationError: It cannot be reached, is no window server of this version, or has another secret.
    """
    peer = f"window server {address[0]}:{address[1]}"
    try:
        sock = socket.create_connection(address, timeout=min(timeout_seconds, HANDSHAKE_SECONDS))
    except OSError as error:
        raise ReplicationError(
            f"{peer} cannot be reached: {error}. See whether its process is alive and whether this host may connect "
            "to that address."
        ) from error
    own(sock)
    with _closed_on_error(sock, f"{peer} broke the handshake off: {{}}. {_SECRETS_DIFFER}"):
        deadline = time.monotonic() + HANDSHAKE_SECONDS
        if _receive_exactly(sock, len(_MAGIC), deadline) != _MAGIC:
            raise ReplicationError(f"{peer} does not speak this protocol. Check the address, and install one version.")
        theirs, ours = _receive_exactly(sock, _NONCE_BYTES, deadline), secrets.token_bytes(_NONCE_BYTES)
        sock.sendall(_MAGIC + ours + _mac(key, b"client", theirs, ours))
        if not hmac.compare_digest(_receive_exactly(sock, _MAC_BYTES, deadline), _mac(key, b"server", theirs, ours)):
            raise ReplicationError(f"{peer} could not prove that it knows the job's secret. {_SECRETS_DIFFER}")
        session = _mac(key, b"session", theirs, ours)
        return Connection(sock, session, is_client=True, timeout_seconds=timeout_seconds, peer=peer)


def accept(sock: socket.socket, key: bytes, *, timeout_seconds: float, peer: str) -> Connection:
    """The server's half of :func:`connect`: nothing but the proof is read before the client has given it.

    Args:
        sock: An accepted connection; closed when this fails.
        key: From :func:`job_key`.
        timeout_seconds: How long the other end may be silent later on.
        peer: Where it comes from, for messages.

    Raises:
        ReplicationError: The client does not prove within ``HANDSHAKE_SECONDS`` that it knows the secret.
    """
    with _closed_on_error(sock, f"said nothing that proves the secret within {HANDSHAKE_SECONDS:.0f} s ({{}})"):
        deadline, ours = time.monotonic() + HANDSHAKE_SECONDS, secrets.token_bytes(_NONCE_BYTES)
        sock.settimeout(HANDSHAKE_SECONDS)
        sock.sendall(_MAGIC + ours)
        if _receive_exactly(sock, len(_MAGIC), deadline) != _MAGIC:
            raise ReplicationError("does not speak this protocol (another service's client, or another version)")
        theirs = _receive_exactly(sock, _NONCE_BYTES, deadline)
        if not hmac.compare_digest(_receive_exactly(sock, _MAC_BYTES, deadline), _mac(key, b"client", ours, theirs)):
            raise ReplicationError("does not know this job's secret (MOETION_SECRET or job_id differ)")
        sock.sendall(_mac(key, b"server", ours, theirs))
        session = _mac(key, b"session", ours, theirs)
        return Connection(sock, session, is_client=False, timeout_seconds=timeout_seconds, peer=f"the rank at {peer}")


_SECRETS_DIFFER = (
    "It runs another job, or has another secret: give every rank of the job the same MOETION_SECRET (and job_id=)."
)


@contextlib.contextmanager
def _closed_on_error(sock: socket.socket, otherwise: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # ReplicationError is one, too
        sock.close()
        if isinstance(error, ReplicationError):
            raise
        raise ReplicationError(otherwise.format(error)) from error


def _receive_exactly(sock: socket.socket, count: int, deadline: float) -> bytes:
    data = b""
    while len(data) < count:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        part = sock.recv(count - len(data))
        if not part:
            raise ConnectionResetError("the other end closed the connection")
        data += part
    return data


_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def own(sock: socket.socket) -> None:
    """Close this socket in forked children, which may outlive their killed parent and would keep connections open."""
    _sockets.add(sock)


def _forget_in_child() -> None:
    for sock in list(_sockets):
        sock.close()


os.register_at_fork(after_in_child=_forget_in_child)
