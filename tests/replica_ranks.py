"""Nodes that serve windows and keep copies, and a faulty network between them."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path
from typing import Any

import torch

from moetion_lightning.distributed.node_windows import NodeWindows
from moetion_lightning.distributed.replicate import WindowCopies
from moetion_lightning.distributed.window_server import WindowServer
from moetion_lightning.distributed.wire import job_key
from moetion_lightning.events import EventBus
from moetion_lightning.storage.format import TensorSpec
from moetion_lightning.storage.host_memory import HostMemoryTier
from moetion_lightning.storage.manifest import Manifest
from moetion_lightning.storage.posix import make_private_dir
from tests.command import until
from tests.store_windows import make_manifest, write_snapshot

SECRET = "the secret of this job"
KEY = job_key(SECRET, "job")
OWNER, HOLDER = 1, 0
FILE_SPECS = (TensorSpec("weight", torch.float32, (20_000,)),)
NUM_FILES = 3
TIMEOUT = 20.0


def commit(tier: HostMemoryTier, iteration: int, *, keep: bool = False, **fields: Any) -> Manifest:
    """A window as the writer makes it: same bytes in every test, and the one before it is dropped."""
    records = [write_snapshot(tier, f"{iteration:04d}-{i}", iteration + i / 10, FILE_SPECS) for i in range(NUM_FILES)]
    fields = {"rank": tier.rank, "world_size": tier.world_size, "created_at": iteration + 0.5, **fields}
    manifest = make_manifest(iteration, records, **fields)
    previous = [i for i in tier.windows() if i != iteration]
    tier.commit(manifest)
    for older in [] if keep else previous:
        tier.drop(older)
    return manifest


def open_tier(base: Path, rank: int, holder: int | None = None) -> HostMemoryTier:
    return HostMemoryTier(base, "job", rank, 4, holder=holder).open(wait_seconds=5.0)


class Rank:
    """One rank, alone on its node: its windows, the server, the copies, and what its bus said.

    Args:
        base: All nodes' memories; each is a folder in it.
        rank: The rank.
        secret: Of the job.
        timeout: How long the other end of a connection may be silent.
    """

    def __init__(self, base: Path, rank: int, *, secret: str = SECRET, timeout: float = TIMEOUT) -> None:
        make_private_dir(base)
        self.base = base / f"node{rank}"
        self.events: list[Any] = []
        self.tier = open_tier(self.base, rank)
        self.copies = WindowCopies(self.tier, EventBus((self.events.append,)), timeout_seconds=timeout)
        self.copies.key = job_key(secret, "job")
        self.server = WindowServer(NodeWindows(self.tier, [rank]), "127.0.0.1", timeout_seconds=timeout)
        self.address = ("127.0.0.1", self.server.port)
        self.server.start(self.copies.key)

    def take(self, address: Any, *, timeout: float = TIMEOUT) -> int:
        """Copy the owner's newest window, once, in this thread. Returns the bytes that came over the wire."""
        connection = self.copies.connect(address)
        connection._socket.settimeout(timeout)
        with contextlib.closing(connection):
            assert self.copies.take_next(connection, OWNER)
            return connection.bytes_received

    def until_held(self, last: int, owner: int = OWNER) -> None:
        """Wait until the newest copy is this one."""
        until(lambda: self.copies.tier(owner).windows()[:1] == [last], f"a copy of window {last} of rank {owner}")

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def close(self) -> None:
        self.copies.close()
        self.server.close()
        self.tier.close()


class Proxy:
    """Stands between a client and a server, and can stop, break, alter and record what the server sends.

    Args:
        target: The server.
        stop_after: Bytes from the server that go on; then ``stopped`` is set and nothing more does until ``gate`` is.
        break_after: Bytes from the server that go on; then both connections are closed.
        flip: Position of a byte from the server that is altered.
    """

    def __init__(
        self, target: Any, *, stop_after: int | None = None, break_after: int | None = None, flip: int | None = None
    ) -> None:
        self.stopped, self.gate = threading.Event(), threading.Event()
        self.received = 0
        self.asked = bytearray()
        self._is_closing = False
        self._target, self._stop_after, self._break_after, self._flip = target, stop_after, break_after, flip
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            try:
                server = socket.create_connection(self._target)
            except OSError:
                client.close()
                continue
            self._sockets += [client, server]
            for pump in (self._upward, self._downward):
                thread = threading.Thread(target=pump, args=(client, server))
                self._threads.append(thread)
                thread.start()

    def _downward(self, client: socket.socket, server: socket.socket) -> None:
        done = 0
        with contextlib.suppress(OSError):
            while data := bytearray(server.recv(4096)):
                if self._flip is not None and done <= self._flip < done + len(data):
                    data[self._flip - done] ^= 1
                for limit, act in ((self._stop_after, self._wait), (self._break_after, self._break)):
                    if limit is not None and done <= limit < done + len(data):
                        client.sendall(data[: limit - done])
                        data = data[limit - done :]
                        done = limit
                        act(client, server)
                client.sendall(data)
                done += len(data)
                self.received = done
            if self._break_after is not None and done == self._break_after:
                self._break(client, server)
        self._break(client, server)

    def _upward(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                self.asked += data
                server.sendall(data)
        self._break(client, server)

    def _wait(self, client: socket.socket, server: socket.socket) -> None:
        self.stopped.set()
        self.gate.wait()
        if self._is_closing:  # what the server had sent already goes no further
            self._break(client, server)
        self._stop_after = None

    def _break(self, client: socket.socket, server: socket.socket) -> None:
        for sock in (client, server):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_closing = True
        self.gate.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join()
        for sock in self._sockets:
            sock.close()


def assert_whole(tier: HostMemoryTier, iteration: int) -> None:
    """The window is there with exactly the bytes that :func:`commit` writes."""
    manifest = tier.read_manifest(iteration)
    tier.verify(manifest)
    assert [r.name for r in manifest.files] == [f"{iteration:04d}-{i}.safetensors" for i in range(NUM_FILES)]
    for index, record in enumerate(manifest.files):
        data = tier.local_path(record).read_bytes()
        values = torch.frombuffer(bytearray(data[-80_000:]), dtype=torch.float32)
        assert torch.equal(values, torch.full_like(values, iteration + index / 10))


def stream_bytes(base: Path) -> int:
    """Bytes that a server sends in a connection that carries window 2."""
    owner, holder = Rank(base / "measure", OWNER), Rank(base / "measure", HOLDER)
    commit(owner.tier, 2)
    with Proxy(owner.address) as proxy:
        holder.take(proxy.address)
        total = proxy.received
    holder.close()
    owner.close()
    return total
