"""One window on its way from one node's memory to another's."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from moetion_lightning.distributed.wire import MAX_BLOB_BYTES, MAX_HEADER_BYTES, Connection, number
from moetion_lightning.errors import CorruptSnapshotError, ForeignWindowError, MoEtionError, ReplicationError
from moetion_lightning.storage.buffers import HostBuffer
from moetion_lightning.storage.host_memory import HostMemoryTier
from moetion_lightning.storage.manifest import FileRecord, Manifest

__all__ = ["receive_manifest", "receive_window", "send_window"]

_log = logging.getLogger(__name__)


def send_window(connection: Connection, tier: HostMemoryTier, manifest: Manifest) -> None:
    """Answer with a manifest, and with those of its files that the other end asks for then.

    Whoever owns the tier may drop the window meanwhile: the other end notices by the checksums, and asks again.

    Args:
        connection: Where to.
        tier: Where the window is; only read.
        manifest: The window.

    Raises:
        ReplicationError: The manifest is too long, the answer makes no sense, or the connection broke off.
        CorruptSnapshotError: A file is missing.
    """
    data = manifest.to_bytes()
    if len(data) > MAX_BLOB_BYTES:
        raise ReplicationError(
            f"window {manifest.iteration}: its manifest has {len(data)} bytes, at most {MAX_BLOB_BYTES} are sent. Use "
            "a smaller window."
        )
    connection.send({"ok": True, "manifest_bytes": len(data)})
    connection.send_blob(data)
    need = connection.receive_answer(MAX_HEADER_BYTES + 16 * len(manifest.files)).get("need")
    indices = range(len(manifest.files))
    if not isinstance(need, list) or not all(type(i) is int and i in indices for i in need):
        raise ReplicationError(f"{connection.peer} asks for files {str(need)[:100]} of {len(indices)}: no such files.")
    for record in (manifest.files[index] for index in need):
        connection.send_file(tier.local_path(record), record.nbytes)


def receive_manifest(connection: Connection, header: dict[str, Any]) -> Manifest:
    """Receive the manifest that an answer announces. Raises as :func:`receive_window`."""
    size = number(header, "manifest_bytes", MAX_BLOB_BYTES + 1)
    return Manifest.from_bytes(connection.receive_blob(size), path=f"manifest from {connection.peer}")


def receive_window(
    connection: Connection, manifest: Manifest, into: HostMemoryTier, known: set[FileRecord] | None = None
) -> None:
    """Copy a window in: ask for the files that are not here yet, verify what comes, commit.

    Until the commit nothing that was committed before is touched, and whatever fails gives the buffers back.

    Args:
        connection: Where from; the manifest came over it.
        manifest: The window.
        into: The tier; nobody else copies into it meanwhile.
        known: Files on the tier whose content was verified already; afterwards those of this window.

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
        missing = [record for record in manifest.files if record not in held]
        buffers: list[HostBuffer] = []
        try:
            into.check_capacity(sum(record.nbytes for record in missing))
            buffers.extend(map(into.acquire_copy, missing))
            connection.send({"ok": True, "need": [manifest.files.index(record) for record in missing]})
            # A file that is wrong is remembered, so that the rest of the stream is still taken.
            problems = [_receive_file(connection, into, *copy) for copy in zip(buffers, missing)]
            for problem in filter(None, problems):
                raise CorruptSnapshotError(problem)
            into.commit(manifest)
        except BaseException:
            for buffer in buffers:
                into.release(buffer)
            raise
    known.clear()
    known.update(manifest.files)


def _receive_file(connection: Connection, into: HostMemoryTier, buffer: HostBuffer, wanted: FileRecord) -> str:
    """Receive one file. Returns what is wrong with it, "" if nothing is."""
    with buffer.memory as memory:
        connection.receive_stream(memory)
    found = into.seal(buffer)
    if found == wanted:
        return ""
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
