"""Copies this rank's committed windows to other ranks' host memory in the background, and keeps copies of theirs."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping

from moetion_lightning.distributed.replica_server import ReplicaServer
from moetion_lightning.distributed.replica_store import ReplicaStore, receive_manifest, receive_window, send_window
from moetion_lightning.distributed.wire import Address, Connection, RefusedError, connect, job_key
from moetion_lightning.errors import (
    ConfigurationError,
    CorruptSnapshotError,
    MoEtionError,
    ReplicationError,
    VersionError,
)
from moetion_lightning.events import EventBus, ReplicationFailed, WindowReplicated
from moetion_lightning.storage.host_memory import HostMemoryTier
from moetion_lightning.storage.manifest import Manifest

__all__ = ["ReplicaService", "Replicator", "push_window"]

_log = logging.getLogger(__name__)

_FIRST_BACKOFF_SECONDS = 0.5
_LONGEST_BACKOFF_SECONDS = 30.0


class _Target:
    """One rank that is to hold copies."""

    def __init__(self, rank: int, address: Address) -> None:
        self.rank = rank
        self.address = address
        self.connection: Connection | None = None
        self.acknowledged: int | None = None
        self.retry_at = 0.0
        self.backoff = _FIRST_BACKOFF_SECONDS

    def failed(self) -> None:
        self.retry_at = time.monotonic() + self.backoff
        self.backoff = min(2 * self.backoff, _LONGEST_BACKOFF_SECONDS)

    def succeeded(self, iteration: int) -> None:
        self.acknowledged = iteration
        self.retry_at, self.backoff = 0.0, _FIRST_BACKOFF_SECONDS


class Replicator:
    """Sends the newest committed window to each target, one after the other, on a thread of its own.

    At most two windows are pinned: the one being sent and the newest one after it, which replaces an older one that
    waits. A target that fails is tried again after a while, until a newer window is there; it stops neither training
    nor the other targets.

    Args:
        tier: This rank's windows.
        key: From :func:`~moetion_lightning.distributed.wire.job_key`.
        bus: Gets :class:`WindowReplicated` and :class:`ReplicationFailed`, on the sending thread.
        timeout_seconds: How long a target may be silent.
    """

    def __init__(self, tier: HostMemoryTier, key: bytes, bus: EventBus, *, timeout_seconds: float) -> None:
        self._tier = tier
        self._key = key
        self._bus = bus
        self._timeout = timeout_seconds
        self._changed = threading.Condition()
        self._targets: dict[int, _Target] = {}
        self._newest: int | None = None
        self._pending: Manifest | None = None
        self._in_flight: Manifest | None = None
        self._closing = False
        self._thread: threading.Thread | None = None

    def holding(self, iteration: int) -> bool:
        """Whether every target that answers holds the window of this iteration.

        One that has failed and is to be tried again later does not count: the others must not wait for it.
        """
        with self._changed:
            return all(
                t.retry_at > 0 or (t.acknowledged is not None and t.acknowledged >= iteration)
                for t in self._targets.values()
            )

    def set_targets(self, targets: Mapping[int, Address]) -> None:
        """Say who holds copies from now on; new ones are sent the newest window that was offered, if it is still here.

        Args:
            targets: Address by rank. A rank whose address is another than before counts as a new one.

        Raises:
            ConfigurationError: This rank is among them.
        """
        if self._tier.rank in targets:
            raise ConfigurationError(
                f"targets={dict(targets)}: rank {self._tier.rank} cannot hold its own replica. Choose other ranks."
            )
        with self._changed:
            before, self._targets = self._targets, {}
            for rank, address in targets.items():
                old = before.get(rank)
                same = old is not None and old.address == tuple(address)
                self._targets[rank] = old if same and old is not None else _Target(rank, (address[0], address[1]))
            for old in before.values():
                if self._targets.get(old.rank) is not old and old.connection is not None:
                    old.connection.abort()
            is_new = any(target.acknowledged is None for target in self._targets.values())
            if is_new and self._newest is not None and self._pending is None and self._in_flight is None:
                self._queue(self._newest)
            self._changed.notify_all()

    def forget(self) -> None:
        """Ranks were lost: break off, and send nothing that was offered before; it may be of a course given up."""
        self.set_targets({})
        with self._changed:
            self._newest = self._in_flight = None
            if self._pending is not None:
                self._tier.unpin(self._pending.iteration)
                self._pending = None

    def offer(self, manifest: Manifest) -> None:
        """A window was committed: send it. Never waits for the network.

        Args:
            manifest: A committed window of the tier.
        """
        with self._changed:
            self._newest = manifest.iteration
            if self._targets and not self._closing:
                self._queue(manifest.iteration)

    def close(self) -> None:
        """Break off what is being sent, unpin everything, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            for target in self._targets.values():
                if target.connection is not None:
                    target.connection.abort()
            thread = self._thread
        if thread is not None:
            thread.join()
        with self._changed:
            if self._pending is not None:
                self._tier.unpin(self._pending.iteration)
                self._pending = None
            for target in self._targets.values():
                _hang_up(target)

    def _queue(self, iteration: int) -> None:
        try:
            pinned = self._tier.pin(iteration)
        except MoEtionError as error:
            _log.info("window %d is not replicated, it is gone already: %s", iteration, error)
            return
        if self._pending is not None:
            self._tier.unpin(self._pending.iteration)
        self._pending = pinned
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="moetion-replicate", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    # --- sending thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending is not None or self._closing)
                if self._closing or self._pending is None:
                    return
                manifest, self._pending = self._pending, None
                self._in_flight = manifest
            try:
                self._send_to_all(manifest)
            finally:
                with self._changed:
                    self._in_flight = None
                    self._tier.unpin(manifest.iteration)
                    self._changed.notify_all()

    def _send_to_all(self, manifest: Manifest) -> None:
        done: set[_Target] = set()
        while (target := self._next_target(manifest, done)) is not None:
            started = time.perf_counter()
            try:
                nbytes = self._send(target, manifest)
            except (MoEtionError, OSError) as error:
                target.failed()
                if not self._closing and self._targets.get(target.rank) is target:
                    self._report_failure(target, manifest, str(error))
                continue
            done.add(target)
            with self._changed:
                target.succeeded(manifest.iteration)
            self._bus.emit(
                WindowReplicated(
                    first_iteration=manifest.first_iteration,
                    last_iteration=manifest.last_iteration,
                    peer=target.rank,
                    nbytes=nbytes,
                    seconds=time.perf_counter() - started,
                )
            )

    def _next_target(self, manifest: Manifest, done: set[_Target]) -> _Target | None:
        """A target that lacks the window and may be tried; waits for one that failed until a newer window is there."""
        with self._changed:
            while not self._closing and self._in_flight is manifest:  # else it is forgotten
                missing = [target for target in self._targets.values() if target not in done]
                if not missing:
                    return None
                target = min(missing, key=lambda t: t.retry_at)
                wait = target.retry_at - time.monotonic()
                if wait <= 0:
                    return target
                if self._pending is not None:
                    return None
                self._changed.wait(wait)
            return None

    def _send(self, target: _Target, manifest: Manifest) -> int:
        """Send one window to one target, over a new connection if the old one turns out to be dead."""
        was_open = target.connection is not None
        try:
            return self._send_once(target, manifest)
        except RefusedError:
            raise
        except ReplicationError:
            if not was_open or self._closing:
                raise
        return self._send_once(target, manifest)

    def _send_once(self, target: _Target, manifest: Manifest) -> int:
        if target.connection is None:
            connection = connect(target.address, self._key, timeout_seconds=self._timeout)
            with self._changed:
                target.connection = connection
                if self._closing or self._targets.get(target.rank) is not target:
                    connection.abort()
        connection = target.connection
        before = connection.bytes_sent
        try:
            push_window(connection, self._tier, manifest, target.rank)
        except BaseException:
            _hang_up(target)
            raise
        return connection.bytes_sent - before

    def _report_failure(self, target: _Target, manifest: Manifest, reason: str) -> None:
        _log.warning(
            "window %d..%d could not be copied to rank %d: %s Training goes on; the copy is tried again.",
            manifest.first_iteration, manifest.last_iteration, target.rank, reason,
        )  # fmt: skip
        self._bus.emit(ReplicationFailed(last_iteration=manifest.last_iteration, peer=target.rank, reason=reason))


def _hang_up(target: _Target) -> None:
    connection, target.connection = target.connection, None
    if connection is not None:
        connection.close()


def push_window(connection: Connection, tier: HostMemoryTier, manifest: Manifest, holder: int) -> None:
    """Copy a window to another rank; files that are there already are not sent. Raises as :func:`send_window`.

    Args:
        connection: To the holder's server.
        tier: Where the window is, pinned.
        manifest: The window.
        holder: The rank that must be there.
    """
    send_window(connection, tier, manifest, {"op": "put", "owner": manifest.rank, "holder": holder})
    connection.receive_answer()


class ReplicaService:
    """Everything that one rank does with replicas: serve, keep, send, fetch.

    Args:
        tier: This rank's tier, open; it stays the caller's to close, after this one.
        secret: Known to the ranks of the job only.
        bus: Gets the events.
        host: Address or name of the interface to serve on.
        port: 0 for a free one.
        timeout_seconds: How long a rank may be silent in the middle of a request.

    Attributes:
        store: What is kept here of other ranks.
        replicator: Sends this rank's windows.

    Raises:
        ConfigurationError: The secret is empty, or the host names every interface.
    """

    def __init__(
        self,
        tier: HostMemoryTier,
        *,
        secret: str,
        bus: EventBus,
        host: str = "127.0.0.1",
        port: int = 0,
        timeout_seconds: float = 30.0,
    ) -> None:
        self._key = job_key(secret, tier.job)
        self._host, self._port, self._timeout = host, port, timeout_seconds
        self._server: ReplicaServer | None = None
        self.store = ReplicaStore(tier, wait_seconds=timeout_seconds / 2)
        self.replicator = Replicator(tier, self._key, bus, timeout_seconds=timeout_seconds)

    def start(self) -> Address:
        """Take over replicas that a predecessor kept here, and serve.

        Returns:
            Host and port that others connect to.

        Raises:
            ReplicationError: The interface cannot be listened on.
            StoreError: Replicas cannot be opened.
        """
        server = ReplicaServer(self.store, self._key, host=self._host, port=self._port, timeout_seconds=self._timeout)
        try:
            self.store.open()
        except BaseException:
            server.close()
            raise
        server.start()
        self._server = server
        return server.address

    def fetch(self, address: Address, owner: int, last: int, into: HostMemoryTier) -> Manifest:
        """Copy a window of a rank, its own or a replica, into a tier; files that are there already are not sent.

        Args:
            address: Of a rank that has it.
            owner: The rank that captured it.
            last: Its last iteration, the window's name.
            into: Tier of that owner. Windows of later iterations go, as with every commit.

        Returns:
            The manifest, committed on ``into``, whose files were verified.

        Raises:
            ReplicationError: The connection broke off, what came is damaged, or the window is not there.
            HostMemoryError: There is no room.
            ForeignWindowError: ``into`` is of another job or rank.
            StoreError: ``into`` cannot be written.
        """
        with contextlib.closing(connect(address, self._key, timeout_seconds=self._timeout)) as connection:
            try:
                connection.send({"op": "get", "owner": owner, "last": last})
                manifest = receive_manifest(connection, connection.receive_answer())
                if (manifest.rank, manifest.iteration) != (owner, last):
                    raise ReplicationError(
                        f"{connection.peer} sent window {manifest.iteration} of rank {manifest.rank}, asked for window "
                        f"{last} of rank {owner}. Install one version everywhere."
                    )
                receive_window(connection, manifest, into)
            except (CorruptSnapshotError, VersionError) as error:
                raise ReplicationError(
                    f"window {last} of rank {owner} is not usable: {error} Try another holder."
                ) from error
        return manifest

    def close(self, *, completed: bool) -> None:
        """Stop sending and serving; keep the replicas, or remove them if training is complete."""
        self.replicator.close()
        if self._server is not None:
            self._server.close()
            self._server = None
        self.store.close(completed=completed)
