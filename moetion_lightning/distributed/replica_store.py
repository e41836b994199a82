"""The copies of other ranks' windows that this rank keeps in its host memory."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

from moetion_lightning.distributed.wire import MAX_BLOB_BYTES, MAX_HEADER_BYTES, Connection, number
from moetion_lightning.errors import (
    CorruptSnapshotError,
    ForeignWindowError,
    JobBusyError,
    MoEtionError,
    ReplicationError,
    StoreError,
)
from moetion_lightning.storage.buffers import HostBuffer
from moetion_lightning.storage.host_memory import HostMemoryTier
from moetion_lightning.storage.manifest import FileRecord, Manifest
from moetion_lightning.storage.mapping import map_fd

__all__ = ["MAX_RANKS", "ReplicaStore", "receive_manifest", "receive_window", "send_files", "send_window"]

_log = logging.getLogger(__name__)

MAX_RANKS = 100_000
_MAX_NOTE_BYTES = 16 << 20
_REPLICA_DIR = re.compile(r"replica-(\d{5})-at-(\d{5})")
_LOCK_WAIT_SECONDS = 5.0


def receive_manifest(connection: Connection, header: dict[str, Any]) -> Manifest:
    """Receive the manifest that a request or an answer announces. Raises as :func:`receive_window`."""
    size = number(header, "manifest_bytes", MAX_BLOB_BYTES + 1)
    return Manifest.from_bytes(connection.receive_blob(size), path=f"manifest from {connection.peer}")


def send_window(connection: Connection, tier: HostMemoryTier, manifest: Manifest, header: dict[str, Any]) -> None:
    """Send a manifest, and of its files those that the other end asks for, straight from memory.

    Args:
        connection: Where to.
        tier: Where the window is, pinned.
        manifest: The window.
        header: The request, or the answer to one.

    Raises:
        ReplicationError: The manifest is too long, the answer makes no sense, or the connection broke off.
        RefusedError: The other end cannot or will not take it; what it held before is still there.
        CorruptSnapshotError: A file is missing.
    """
    data = manifest.to_bytes()
    if len(data) > MAX_BLOB_BYTES:
        raise ReplicationError(
            f"window {manifest.iteration}: its manifest has {len(data)} bytes, at most {MAX_BLOB_BYTES} are sent. Use "
            "a smaller window."
        )
    connection.send({**header, "manifest_bytes": len(data)})
    connection.send_blob(data)
    send_files(connection, tier, manifest, connection.receive_answer(MAX_HEADER_BYTES + 16 * len(manifest.files)))


def send_files(connection: Connection, tier: HostMemoryTier, manifest: Manifest, answer: dict[str, Any]) -> None:
    """Stream those files of a window whose indices are in ``answer["need"]``. Raises as :func:`send_window`."""
    need, indices = answer.get("need"), range(len(manifest.files))
    if not isinstance(need, list) or not all(type(i) is int and i in indices for i in need):
        raise ReplicationError(f"{connection.peer} asks for files {str(need)[:100]} of {len(indices)}: no such files.")
    for index in need:
        with open(tier.local_path(manifest.files[index]), "rb") as file:
            # It goes with the last view of it, also when an error still holds one.
            mapped = map_fd(file.fileno(), manifest.files[index].nbytes, shared=False)
        connection.send_stream(memoryview(mapped).cast("B"))


def receive_window(
    connection: Connection,
    manifest: Manifest,
    into: HostMemoryTier,
    known: set[FileRecord] | None = None,
    commit: Callable[[Manifest], None] | None = None,
) -> None:
    """Copy a window in: ask for the files that are not here yet, verify what comes, commit.

    Until the commit nothing that was committed before is touched, and whatever fails gives the buffers back.

    Args:
        connection: Where from; the manifest came over it.
        manifest: The window.
        into: The tier; nobody else copies into it meanwhile.
        known: Files on the tier whose content was verified already; afterwards those of this window.
        commit: Commits the window on the tier, or raises; None for the tier's own method.

    Raises:
        ForeignWindowError: The window is of another job or rank.
        HostMemoryError: There is no room.
        CorruptSnapshotError: What came is not what the manifest names.
        ReplicationError: The connection broke off.
        StoreError: The tier cannot be written.
    """
    if (manifest.job, manifest.rank) != (into.job, into.rank):
        raise ForeignWindowError(
            f"{into.path}: window of rank {manifest.rank} of job {manifest.job!r} does not belong here; expected rank "
            f"{into.rank} of job {into.job!r}. Connect the ranks of one job only."
        )
    known = set() if known is None else known
    with contextlib.ExitStack() as stack:
        held = _held(into, manifest, known, stack)
        missing = [index for index, record in enumerate(manifest.files) if record not in held]
        buffers: list[HostBuffer] = []
        try:
            into.check_capacity(sum(manifest.files[index].nbytes for index in missing))
            buffers.extend(into.acquire_copy(manifest.files[index]) for index in missing)
            connection.send({"ok": True, "need": missing})
            problems = [_receive_file(connection, into, b, manifest.files[i]) for i, b in zip(missing, buffers)]
            for problem in filter(None, problems):
                raise CorruptSnapshotError(problem)
            (commit or into.commit)(manifest)
        except BaseException:
            for buffer in buffers:
                into.release(buffer)
            raise
    known.clear()
    known.update(manifest.files)


def _receive_file(connection: Connection, into: HostMemoryTier, buffer: HostBuffer, wanted: FileRecord) -> str | None:
    """Receive one file; what is wrong with it is returned, so that the rest of the stream is still taken."""
    with buffer.memory as memory:
        connection.receive_stream(memory)
    found = into.seal(buffer)
    if found == wanted:
        return None
    return (
        f"{buffer.path}: what {connection.peer} sent has checksum {found.checksum}, its manifest says "
        f"{wanted.checksum}. The copy was dropped; it was altered on its way, or is damaged there: "
        "`moetion inspect` tells."
    )


def _held(
    tier: HostMemoryTier, manifest: Manifest, known: set[FileRecord], stack: contextlib.ExitStack
) -> set[FileRecord]:
    """Files of a window that the tier has whole; they are pinned on the stack. A damaged window goes."""
    wanted = set(manifest.files)
    held: set[FileRecord] = set()
    for iteration in tier.windows():
        try:
            shared = wanted.intersection(tier.read_manifest(iteration).files)
            if not shared:
                continue
            stack.enter_context(tier.pinned(iteration))
        except MoEtionError:
            continue
        try:
            for record in shared - known - held:
                tier.place.verify(record)
        except CorruptSnapshotError as error:
            _log.warning("dropping window %d: %s", iteration, error)
            tier.drop(iteration)
            stack.close()
            return _held(tier, manifest, known, stack)
        held |= shared
    return held


class ReplicaStore:
    """What one rank has for others: its own windows, and copies of theirs. All methods may be called by any thread.

    Args:
        own: This rank's tier, open; replicas are kept beside it.
        wait_seconds: How long a copy waits for another one of the same owner.
    """

    def __init__(self, own: HostMemoryTier, *, wait_seconds: float) -> None:
        self.own = own
        self._wait_seconds = wait_seconds
        self._mutex = threading.Lock()
        self._tiers: dict[int, HostMemoryTier] = {}
        self._known: dict[int, set[FileRecord]] = {}
        self._receiving: dict[int, threading.Lock] = {}
        self._course = 0
        self._commits = threading.Lock()
        self._is_closed = False

    def open(self) -> None:
        """Take over the replicas that a predecessor of this rank kept here."""
        for path in sorted(self.own.path.parent.glob("replica-*")):
            match = _REPLICA_DIR.fullmatch(path.name)
            if match is not None and int(match[2]) == self.own.rank:
                self.tier_for(int(match[1]))

    def tiers(self) -> dict[int, HostMemoryTier]:
        """Where other ranks' windows are here, by owner."""
        with self._mutex:
            return dict(sorted(self._tiers.items()))

    def put(self, connection: Connection, owner: int, manifest: Manifest) -> None:
        """Take a window of another rank; the one before it stays. Raises as :func:`receive_window`.

        It is the newest that *all* ranks have until each of them has this one.
        """
        course = self._course

        def commit(manifest: Manifest) -> None:
            with self._commits:
                if self._course != course:
                    raise ReplicationError(
                        f"window {manifest.iteration} of rank {owner} is not taken: ranks were lost while it came. The "
                        "newest window is sent again when all have agreed where to continue."
                    )
                tier.commit(manifest)

        with self._exclusive(owner):
            tier = self.tier_for(owner)
            for older in tier.windows()[2:]:  # left when this process's predecessor was killed between two steps
                tier.drop(older)
            receive_window(connection, manifest, tier, self._known.setdefault(owner, set()), commit)
            for older in tier.windows()[2:]:
                tier.drop(older)

    def next_course(self) -> None:
        """Commit no window whose transfer has begun before: training may continue from an earlier iteration."""
        with self._commits:
            self._course += 1

    def tier_of(self, owner: int) -> HostMemoryTier:
        """Where windows of a rank are here. Raises ``StoreError`` when there are none."""
        if owner == self.own.rank:
            return self.own
        with self._mutex:
            if owner not in self._tiers:
                raise StoreError(f"rank {self.own.rank} has no replica of rank {owner}. Ask another rank.")
            return self._tiers[owner]

    def keep_note(self, name: str, data: bytes) -> None:
        """Keep a small file of this rank; a newer one of the same name replaces it whole. Raises ``StoreError``."""
        if len(data) > _MAX_NOTE_BYTES:
            raise StoreError(f"note {name!r}: {len(data)} bytes, at most {_MAX_NOTE_BYTES} are kept.")
        self.own.place.write(f"note-{name}", data)

    def own_note(self, name: str) -> bytes | None:
        """What :meth:`keep_note` kept, here or in a predecessor of this process; None for nothing."""
        return self.own.place.read(f"note-{name}", _MAX_NOTE_BYTES)

    def forget(self) -> None:
        """Remove all replicas."""
        self._end(HostMemoryTier.destroy)

    def close(self, *, completed: bool) -> None:
        """Let go of the replicas; remove them if training is complete."""
        with self._mutex:
            self._is_closed = True
        self._end(HostMemoryTier.destroy if completed else HostMemoryTier.close)

    def _end(self, end: Callable[[HostMemoryTier], None]) -> None:
        with self._mutex:
            tiers, self._tiers = self._tiers, {}
            self._known.clear()
        for tier in tiers.values():
            end(tier)

    def drop(self, keep: Collection[int]) -> None:
        """Remove what is here of owners other than these."""
        with self._mutex:
            gone = [self._tiers.pop(owner) for owner in list(self._tiers) if owner not in keep]
        for tier in gone:
            self._known.pop(tier.rank, None)
            tier.destroy()

    def tier_for(self, owner: int) -> HostMemoryTier:
        """Where windows of another rank go here, opened if it is new. Raises as ``HostMemoryTier.open``."""
        own = self.own
        with self._mutex:
            if self._is_closed:
                raise StoreError(f"{own.path}: rank {own.rank} is ending and takes no more replicas.")
            if owner not in self._tiers:
                tier = HostMemoryTier(own.base_dir, own.job, owner, own.world_size, holder=own.rank)
                self._tiers[owner] = tier.open(wait_seconds=_LOCK_WAIT_SECONDS)
            return self._tiers[owner]

    @contextlib.contextmanager
    def _exclusive(self, owner: int) -> Iterator[None]:
        with self._mutex:
            lock = self._receiving.setdefault(owner, threading.Lock())
        if not lock.acquire(timeout=self._wait_seconds):
            raise JobBusyError(
                f"rank {self.own.rank} is receiving another window of rank {owner}. It is tried again after a while."
            )
        try:
            yield
        finally:
            lock.release()
