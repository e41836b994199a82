"""Copies of other ranks' windows in this rank's host memory: fetched in the background, or for a restore."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Collection, Mapping
from typing import Any

from moetion_lightning.distributed.window_server import NOTHING_SECONDS
from moetion_lightning.distributed.window_transfer import receive_manifest, receive_window
from moetion_lightning.distributed.wire import Address, Connection, RefusedError, connect
from moetion_lightning.errors import CorruptSnapshotError, MoEtionError, ReplicationError, VersionError
from moetion_lightning.events import EventBus, ReplicationFailed, WindowReplicated
from moetion_lightning.storage.host_memory import HostMemoryTier
from moetion_lightning.storage.manifest import FileRecord, Manifest

__all__ = ["WindowCopies"]

_log = logging.getLogger(__name__)

_KEPT, _KEPT_OF_LOGS = 2, 3
_LOCK_WAIT_SECONDS = 5.0
_FIRST_BACKOFF_SECONDS, _LONGEST_BACKOFF_SECONDS = 0.5, 30.0
_TRIES = 5


class WindowCopies:
    """Keeps copies of other ranks' windows; all that moves them is asked for from here.

    The one before the newest stays, too: it is the newest that *all* ranks have until each of them has the newest. Of a
    gradient log, which has one for each iteration, two stay: copies may be one behind.

    Args:
        own: This rank's tier, open; copies are kept beside it.
        bus: Gets :class:`WindowReplicated` and :class:`ReplicationFailed`, on the threads that copy.
        timeout_seconds: How long a node may be silent.

    Attributes:
        key: From :func:`~moetion_lightning.distributed.wire.job_key`.
    """

    def __init__(self, own: HostMemoryTier, bus: EventBus, *, timeout_seconds: float = 30.0) -> None:
        self._own = own
        self.key = b""
        self._bus = bus
        self._timeout = max(timeout_seconds, 2 * NOTHING_SECONDS)
        self._changed = threading.Condition()
        self._tiers: dict[int, HostMemoryTier] = {}
        self._known: dict[int, set[FileRecord]] = {}
        self._followers: list[_Follower] = []

    # --- in the background -----------------------------------------------------------------------------------------

    def follow(self, owners: Mapping[int, Address]) -> None:
        """Keep copies of what these ranks commit from now on, and of the newest that they have.

        Args:
            owners: Ranks, and the server of the node of each.
        """
        self._followers = [_Follower(self, owner, address) for owner, address in owners.items()]
        for follower in self._followers:
            follower.start()

    def stop(self) -> None:
        """Break off what is being copied, and follow nobody: the job may go back to an earlier iteration."""
        for follower in self._followers:
            follower.end()
        for follower in self._followers:
            follower.join()
        self._followers = []
        with self._changed:
            self._changed.notify_all()

    def held(self) -> dict[int, list[int] | None]:
        """The windows kept of each rank that is followed; None of one whose node gives none at the moment."""
        return {f.owner: None if f.is_failing else self.tier(f.owner).windows() for f in self._followers}

    def wait_held(self, last: int, timeout_seconds: float) -> bool:
        """Wait until every rank that is followed and gives windows has given the one of this iteration, or a later."""

        def is_held() -> bool:
            return all(windows is None or max(windows, default=-1) >= last for windows in self.held().values())

        with self._changed:
            return self._changed.wait_for(is_held, timeout_seconds)

    def has_changed(self) -> None:
        """A copy has arrived, or cannot."""
        with self._changed:
            self._changed.notify_all()

    # --- copies ------------------------------------------------------------------------------------------------------

    def tier(self, owner: int) -> HostMemoryTier:
        """Where windows of another rank go here, opened if it is new. Raises as ``HostMemoryTier.open``."""
        own = self._own
        with self._changed:
            if owner not in self._tiers:
                tier = HostMemoryTier(own.base_dir, own.job, owner, own.world_size, holder=own.rank)
                self._tiers[owner] = tier.open(wait_seconds=_LOCK_WAIT_SECONDS)
            return self._tiers[owner]

    def drop(self, keep: Collection[int] = ()) -> None:
        """Remove the copies of ranks other than these."""
        with self._changed:
            gone = [self._tiers.pop(owner) for owner in list(self._tiers) if owner not in keep]
        for tier in gone:
            self._known.pop(tier.rank, None)
            tier.destroy()

    def drop_later(self, last: int) -> None:
        """Windows after this iteration belong to a course that is given up."""
        for tier in list(self._tiers.values()):
            for iteration in tier.windows():
                if iteration > last:
                    tier.drop(iteration)

    def close(self) -> None:
        """Stop; the copies stay."""
        self.stop()
        for tier in self._tiers.values():
            tier.close()
        self._tiers.clear()

    # --- over the wire -----------------------------------------------------------------------------------------------

    def connect(self, address: Address) -> Connection:
        """To the server of a node. Raises ``ReplicationError``."""
        return connect(address, self.key, timeout_seconds=self._timeout)

    def take_next(self, connection: Connection, owner: int) -> bool:
        """Wait for a newer window of a rank than the copies have, for a while, and copy it.

        Returns:
            False when the server there is closed: the job ends, or ranks were lost.

        Raises:
            ReplicationError: The connection broke off, or the answer makes no sense.
            CorruptSnapshotError: What came is damaged.
            HostMemoryError: There is no room.
            StoreError: It cannot be written.
        """
        tier = self.tier(owner)
        have: list[Any] | None = None
        with contextlib.suppress(CorruptSnapshotError):
            for newest in tier.windows()[:1]:
                have = [newest, tier.read_manifest(newest).created_at]
        connection.send({"op": "next", "owner": owner, "have": have})
        answer = connection.receive_answer()
        if answer.get("nothing") or answer.get("closing"):
            return not answer.get("closing")
        started, before = time.perf_counter(), connection.bytes_received
        manifest = receive_manifest(connection, answer)
        kept = _KEPT_OF_LOGS if manifest.policy == "gradient_log" else _KEPT
        for older in tier.windows()[kept:]:  # left when this process's predecessor was killed between two steps
            tier.drop(older)
        receive_window(connection, manifest, tier, self._known.setdefault(owner, set()))
        for older in tier.windows()[kept:]:
            tier.drop(older)
        self._bus.emit(
            WindowReplicated(
                first_iteration=manifest.first_iteration,
                last_iteration=manifest.last_iteration,
                owner=owner,
                nbytes=connection.bytes_received - before,
                seconds=time.perf_counter() - started,
            )
        )
        return True

    def report_failure(self, owner: int, reason: str) -> None:
        """A rank's windows cannot be copied now."""
        _log.warning(
            "the windows of rank %d cannot be copied to rank %d: %s Training goes on; it is tried again.",
            owner, self._own.rank, reason,
        )  # fmt: skip
        self._bus.emit(ReplicationFailed(owner=owner, reason=reason))

    def fetch(self, address: Address, owner: int, last: int, into: HostMemoryTier) -> Manifest:
        """Copy one window for a restore; files that are there already are not sent.

        A node that is busy, or that cannot be reached for a moment, is tried again a few times.

        Args:
            address: Server of a node that has it.
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
        backoff = _FIRST_BACKOFF_SECONDS
        for _ in range(_TRIES - 1):
            try:
                return self._fetch(address, owner, last, into)
            except RefusedError:
                raise
            except ReplicationError as error:
                if isinstance(error.__cause__, ConnectionRefusedError):  # nobody serves there any more
                    raise
                _log.info("window %d of rank %d: %s It is tried again.", last, owner, error)
                time.sleep(backoff * random.uniform(0.5, 1.5))  # others wait for the same node
                backoff *= 2
        return self._fetch(address, owner, last, into)

    def _fetch(self, address: Address, owner: int, last: int, into: HostMemoryTier) -> Manifest:
        with contextlib.closing(self.connect(address)) as connection:
            try:
                connection.send({"op": "get", "owner": owner, "last": last})
                manifest = receive_manifest(connection, connection.receive_answer())
                if (manifest.rank, manifest.iteration) != (owner, last):
                    raise RefusedError(
                        f"{connection.peer} sent window {manifest.iteration} of rank {manifest.rank}, asked for window "
                        f"{last} of rank {owner}. Install one version everywhere."
                    )
                receive_window(connection, manifest, into)
            except (CorruptSnapshotError, VersionError) as error:
                raise ReplicationError(
                    f"window {last} of rank {owner} is not usable: {error} Try another holder."
                ) from error
        return manifest


class _Follower(threading.Thread):
    """Copies the windows of one rank as they are committed; tries again for ever, and more rarely."""

    def __init__(self, copies: WindowCopies, owner: int, address: Address) -> None:
        super().__init__(name=f"moetion-copies-{owner}", daemon=True)
        self.owner = owner
        self.is_failing = False
        self._copies = copies
        self._address = address
        self._ended = threading.Event()
        self._connection: Connection | None = None
        self._mutex = threading.Lock()

    def end(self) -> None:
        """Break off (any thread)."""
        self._ended.set()
        with self._mutex:
            if self._connection is not None:
                self._connection.abort()

    def run(self) -> None:
        """Until :meth:`end`."""
        backoff, failures, was_connected = _FIRST_BACKOFF_SECONDS, 0, False
        while not self._ended.is_set():
            reason = ""
            try:
                with contextlib.closing(self._connect()) as connection:
                    while self._copies.take_next(connection, self.owner):
                        backoff, failures, was_connected = _FIRST_BACKOFF_SECONDS, 0, True
                        self.is_failing = False
                        self._copies.has_changed()
            except (MoEtionError, OSError) as error:
                failures += 1
                if failures == 1:  # a window that its owner dropped meanwhile, or a connection that had died
                    continue
                # A server that is gone ended with the job, or with a process that is missed by all.
                if not (was_connected and isinstance(error.__cause__, ConnectionRefusedError)):
                    reason = str(error)
            if not self._ended.is_set():
                self.is_failing = True
                self._copies.has_changed()
                if reason:
                    self._copies.report_failure(self.owner, reason)
            self._ended.wait(backoff)
            backoff = min(2 * backoff, _LONGEST_BACKOFF_SECONDS)

    def _connect(self) -> Connection:
        connection = self._copies.connect(self._address)
        with self._mutex:
            self._connection = connection
            if self._ended.is_set():
                connection.abort()
        return connection
