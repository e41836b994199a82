"""Ranks with replica services, and a faulty network between them."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path

import torch

from moetion_lightning.distributed.replicate import ReplicaService, Replicator, push_window
from moetion_lightning.distributed.wire import connect, job_key
from moetion_lightning.events import EventBus
from moetion_lightning.storage.format import TensorSpec
from moetion_lightning.storage.host_memory import HostMemoryTier
from tests.store_windows import make_manifest, write_snapshot

SECRET = "the secret of this job"
KEY = job_key(SECRET, "job")
OWNER, HOLDER = 1, 0
FILE_SPECS = (TensorSpec("weight", torch.float32, (20_000,)),)
NUM_FILES = 3
TIMEOUT = 20.0


def commit(tier: HostMemoryTier, iteration: int, *, keep: bool = False):
    """A window as the writer makes it: same bytes in every test, and the one before it is dropped."""
    records = [write_snapshot(tier, f"{iteration:04d}-{i}", iteration + i / 10, FILE_SPECS) for i in range(NUM_FILES)]
    manifest = make_manifest(iteration, records, rank=tier.rank, world_size=tier.world_size, created_at=1.5)
    previous = [i for i in tier.windows() if i != iteration]
    tier.commit(manifest)
    for older in [] if keep else previous:
        tier.drop(older)
    return manifest


def flush(replicator: Replicator, timeout: float) -> bool:
    """Wait until all that was offered is sent; returns whether every target holds the newest window."""
    with replicator._changed:
        replicator._changed.wait_for(lambda: replicator._pending is None and replicator._in_flight is None, timeout)
        return all(target.acknowledged == replicator._newest for target in replicator._targets.values())


def listed(tier: HostMemoryTier) -> list[tuple[int, int]]:
    """First and last iterations of its windows, newest first."""
    manifests = [tier.read_manifest(iteration) for iteration in tier.windows()]
    return [(manifest.first_iteration, manifest.last_iteration) for manifest in manifests]


def open_tier(base: Path, rank: int, holder: int | None = None) -> HostMemoryTier:
    return HostMemoryTier(base, "job", rank, 4, holder=holder).open(wait_seconds=5.0)


class Rank:
    """One rank: its tier, its service, and what its bus said."""

    def __init__(self, base: Path, rank: int, *, secret: str = SECRET, timeout: float = TIMEOUT) -> None:
        self.events: list = []
        self.tier = open_tier(base, rank)
        self.service = ReplicaService(
            self.tier, secret=secret, bus=EventBus((self.events.append,)), timeout_seconds=timeout
        )
        self.replicator, self.store = self.service.replicator, self.service.store
        self.address = self.service.start()

    def flush(self, timeout: float = TIMEOUT) -> bool:
        return flush(self.replicator, timeout)

    @property
    def acknowledged(self) -> dict[int, int]:
        targets = self.replicator._targets.values()
        return {target.rank: target.acknowledged for target in targets if target.acknowledged is not None}

    def replicas(self) -> dict[int, list[tuple[int, int]]]:
        return {owner: listed(tier) for owner, tier in self.store.tiers().items()}

    def replica_of(self, owner: int) -> HostMemoryTier:
        return self.store.tier_of(owner)

    def close(self, *, completed: bool = False) -> None:
        self.service.close(completed=completed)
        self.tier.close()

    def of(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]


class Proxy:
    """Stands between a client and a server, and can stop, break, alter and record what the client sends.

    Args:
        target: the server.
        stop_after: bytes from the client that go on; then ``stopped`` is set and nothing more does until ``gate`` is.
        break_after: bytes from the client that go on; then both connections are closed.
        flip: position of a byte from the client that is altered.
    """

    def __init__(
        self, target, *, stop_after: int | None = None, break_after: int | None = None, flip: int | None = None
    ) -> None:
        self.stopped, self.gate = threading.Event(), threading.Event()
        self.recorded = bytearray()
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

    def _upward(self, client: socket.socket, server: socket.socket) -> None:
        done = 0
        with contextlib.suppress(OSError):
            while data := bytearray(client.recv(4096)):
                if self._flip is not None and done <= self._flip < done + len(data):
                    data[self._flip - done] ^= 1
                for limit, act in ((self._stop_after, self._wait), (self._break_after, self._break)):
                    if limit is not None and done <= limit < done + len(data):
                        server.sendall(data[: limit - done])
                        self.recorded += data[: limit - done]
                        data = data[limit - done :]
                        done = limit
                        act(client, server)
                server.sendall(data)
                self.recorded += data
                done += len(data)
            if self._break_after is not None and done == self._break_after:
                self._break(client, server)
        self._break(client, server)

    def _downward(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                client.sendall(data)
        self._break(client, server)

    def _wait(self, client: socket.socket, server: socket.socket) -> None:
        self.stopped.set()
        self.gate.wait()
        if self._is_closing:  # what the client had sent already goes no further
            self._break(client, server)
        self._stop_after = None

    def _break(self, client: socket.socket, server: socket.socket) -> None:
        for sock in (client, server):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exc_info) -> None:
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


def push(address, tier: HostMemoryTier, iteration: int, *, timeout: float = TIMEOUT) -> int:
    """Send one window in this thread, once; returns the bytes that went over the wire."""
    connection = connect(address, KEY, timeout_seconds=timeout)
    try:
        with tier.pinned(iteration) as manifest:
            push_window(connection, tier, manifest, HOLDER)
        return connection.bytes_sent
    finally:
        connection.close()


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
    """Bytes that a client sends in a connection that carries window 2."""
    with open_tier(base / "measure", OWNER) as tier:
        holder = Rank(base / "measure", HOLDER)
        commit(tier, 2)
        with Proxy(holder.address) as proxy:
            push(proxy.address, tier, 2)
        holder.close()
    return len(proxy.recorded)
