"""This node's memory, outliving the process: files in /dev/shm, mapped by the writer.

The kernel keeps them when the process is killed, so that no keeper process is needed; the next start of the same job
finds them, and :func:`~moetion_lightning.storage.jobs.clean_stale` removes what nobody came back for.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from moetion_lightning.errors import HostMemoryError, MoEtionError, StoreError
from moetion_lightning.storage.buffers import BufferPool, BufferState, HostBuffer
from moetion_lightning.storage.folders import FILES, NOTES, WINDOWS, manifest_name, rank_dir, replica_dir
from moetion_lightning.storage.format import SnapshotLayout
from moetion_lightning.storage.job_note import write_job_note
from moetion_lightning.storage.jobs import default_base_dir, prepare_base_dir, who_holds_memory
from moetion_lightning.storage.local import LocalPlace
from moetion_lightning.storage.lock import JobLock
from moetion_lightning.storage.manifest import FileRecord, Manifest
from moetion_lightning.storage.mapping import hide_from_children
from moetion_lightning.storage.needed import NeededFiles
from moetion_lightning.storage.posix import explain_os_errors
from moetion_lightning.storage.room import free_bytes_at, no_room
from moetion_lightning.storage.tier import Tier
from moetion_lightning.units import bytes_text

__all__ = ["HostBuffer", "HostMemoryTier"]

_log = logging.getLogger(__name__)
_MAX_NOTE_BYTES = 16 << 20


class HostMemoryTier(Tier):
    """Committed windows of one rank in host memory, and the buffers of the window being captured.

    A buffer belongs to exactly one of: the pool (free), a capture, a sealed file that waits for its commit, the
    committed windows that name it, or the persister that pinned such a window. Only free ones are handed out.
    All methods may be called from any thread.

    What lies aside is given up when memory runs out.

    Args:
        base_dir: None for :func:`~.jobs.default_base_dir`.
        job: name of the job: letters, digits and ``._-``.
        rank: global rank.
        world_size: number of ranks of the job.
        holder: the rank that keeps the windows, when they are copies of another rank's (``rank`` is the owner).
    """

    name = "host memory"
    place: LocalPlace

    def __init__(
        self,
        base_dir: Path | str | None,
        job: str,
        rank: int = 0,
        world_size: int = 1,
        *,
        holder: int | None = None,
    ) -> None:
        self.base_dir = default_base_dir() if base_dir is None else Path(base_dir)
        self.path = self.base_dir / (rank_dir(job, rank) if holder is None else replica_dir(job, rank, holder))
        self._lock = JobLock(self.path)
        super().__init__(LocalPlace(self.path, self._lock.check), job, rank, world_size)
        self._pool = BufferPool(self.place.files_dir)
        self._needed = NeededFiles()
        #: The last iteration of which a predecessor had begun to capture something; -1 if none.
        self.reached = -1
        self._is_open = False

    def open(self, *, wait_seconds: float = 0.25) -> HostMemoryTier:
        """Take ownership of this job's and rank's state and remove what a dead predecessor left uncommitted.

        Args:
            wait_seconds: how long to wait for a predecessor that is just being killed.

        Raises:
            JobBusyError: a live process owns it.
            StoreError: the base directory is unsafe or cannot be written.
        """
        with self._mutex:
            if self._is_open:
                return self
            prepare_base_dir(self.base_dir)
            self._lock.acquire(wait_seconds=wait_seconds)
            try:
                self.place.create()
                self.place.clean()
                hide_from_children(self.place.files_dir)
                write_job_note(self.place, job=self.job, rank=self.rank, world_size=self.world_size)
                current, aside, is_safe = self.manifests()
                self._needed.learn(current, aside)
                unnamed = self._needed.unneeded(self.place.entries(FILES))
                self.reached = max(map(_iteration_of, unnamed), default=-1)
                for name in unnamed if is_safe else ():
                    self.place.remove(f"{FILES}/{name}")
            except BaseException:
                self._lock.release()
                raise
            self._is_open = True
        return self

    def __enter__(self) -> HostMemoryTier:
        return self.open()

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up ownership: committed windows stay, everything else is removed."""
        with self._mutex:
            if not self._is_open:
                return
            self._is_open = False
            for name in self._needed.unneeded(self._pool.forget_all()):
                self.place.remove(f"{FILES}/{name}")
            self._lock.release()

    def destroy(self) -> None:
        """Remove all state of this job and rank (the normal end of training), and close.

        Windows that lie aside stay if the current course has none of its own to show for them.
        """
        with self._mutex:
            self._lock.check()
            if self._needed.aside and not self._needed.current:
                self._forget(*NOTES)
            else:
                self.place.remove_all()
                self._pool.forget_all()
                self._needed = NeededFiles()
            self.close()

    # --- capture -------------------------------------------------------------------------------------------------

    def acquire(self, uid: str, nbytes: int) -> HostBuffer:
        """A buffer to capture into; its content is arbitrary.

        Args:
            uid: base of the file's name; if a file has that name already, a number is appended (``buffer.name`` is
                what counts).
            nbytes: exact size, at least 1.

        Raises:
            HostMemoryError: there is no room.
            StoreError: the name cannot be a file's, or the tier is not open.
        """
        with self._mutex:
            self._lock.check()
            return self._acquire(self._pool.free_path(uid), nbytes)

    def acquire_copy(self, record: FileRecord) -> HostBuffer:
        """A buffer for the copy of a file that exists elsewhere, under the name that it has there.

        Raises:
            HostMemoryError: there is no room.
            StoreError: a file of that name is in use here, or the tier is not open.
        """
        with self._mutex:
            self._lock.check()
            path = self.place.files_dir / record.name
            old = self._pool.get(record.name)
            if not self._needed.unneeded({record.name}) or (old is not None and old.state is not BufferState.FREE):
                raise StoreError(
                    f"{path}: the file is in use, a copy cannot take its name. Wait for the other copy to end, or drop "
                    "the window that needs the file."
                )
            if old is not None:
                self._pool.delete(old)
            else:
                self.place.remove(f"{FILES}/{record.name}")  # of no committed window
            return self._acquire(path, record.nbytes)

    def seal(self, buffer: HostBuffer, layout: SnapshotLayout | None = None) -> FileRecord:
        """Make a captured file immutable: write its header and compute its checksum.

        Args:
            buffer: from :meth:`acquire`, all of its tensors written.
            layout: what the buffer was laid out by; None when the header is written already.

        Returns:
            The record for the manifest.

        Raises:
            StoreError: the buffer is not being captured, or the layout is of another size.
        """
        with self._mutex:
            self._lock.check()
            self._pool.check_captured(buffer)
        # Outside the mutex: the digest takes as long as reading the memory, and pins must not wait for it.
        record = buffer.digest(layout)
        with self._mutex:
            buffer.state, buffer.record = BufferState.SEALED, record
        return record

    def release(self, buffer: HostBuffer) -> None:
        """Give back a buffer whose capture was abandoned, sealed or not; committed and pinned ones stay."""
        with self._mutex:
            if self._pool.get(buffer.name) is buffer and self._needed.unneeded({buffer.name}):
                self._pool.put_back(buffer)

    def discard(self, record: FileRecord) -> None:
        """Give back a sealed file that no manifest will name."""
        with self._mutex:
            buffer = self._pool.get(record.name)
            if buffer is not None:
                self.release(buffer)

    def take_over(self, manifest: Manifest, source: HostMemoryTier) -> HostMemoryTier:
        """Commit a verified window of this rank that lies in another directory of this memory; no byte is copied.

        Args:
            manifest: the window.
            source: the tier that has it. Whatever becomes of it, the window stays here.

        Returns:
            Where the window is: here, or still in the source if a file of this tier is in the way.
        """
        if source.path == self.path:
            return self
        with self._mutex:
            linked: list[str] = []
            try:
                for record in manifest.files:
                    os.link(source.local_path(record), self.place.files_dir / record.name)
                    linked.append(record.name)
                self.commit(manifest)
            except (OSError, MoEtionError) as error:
                _log.info("%s: window %d stays in %s: %s", self.path, manifest.iteration, source.path, error)
                for name in self._needed.unneeded(linked):
                    self.place.remove(f"{FILES}/{name}")
                return source
        return self

    # --- windows -------------------------------------------------------------------------------------------------

    def commit(self, manifest: Manifest, on_stage: Callable[[str], None] | None = None) -> None:
        """Make a window a restore point; its files are sealed, or of windows that are committed already."""
        with self._mutex:
            self._pool.check_sealed(manifest)
            replaced = self._needed.current.get(manifest.iteration, frozenset())

            def staged(stage: str) -> None:
                if stage == "committed":  # before the caller's function, which may raise: the files are in use now
                    self._needed.commit(manifest)
                if on_stage is not None:
                    on_stage(stage)

            super().commit(manifest, staged)
            self._settle(replaced)
            self._pool.trim()

    def drop(self, iteration: int) -> None:
        """Remove a window: its manifest first; files that no other window names and no pin holds are freed."""
        with self._mutex:
            self.place.remove(f"{WINDOWS}/{manifest_name(iteration)}")
            self._settle(self._needed.current.pop(iteration, frozenset()))

    def pin(self, iteration: int) -> Manifest:
        """Keep a committed window's files until :meth:`unpin`, also if the window is dropped. Returns its manifest.

        Raises:
            CorruptSnapshotError: there is no such window, or it cannot be read.
        """
        with self._mutex:
            self._lock.check()
            manifest = self.read_manifest(iteration)
            self._needed.pin(manifest)
            return manifest

    def unpin(self, iteration: int) -> None:
        """Undo one :meth:`pin`."""
        with self._mutex:
            self._settle(self._needed.unpin(iteration))

    @contextlib.contextmanager
    def pinned(self, iteration: int) -> Iterator[Manifest]:
        """:meth:`pin` for the length of a ``with`` block."""
        manifest = self.pin(iteration)
        try:
            yield manifest
        finally:
            self.unpin(iteration)

    # --- notes ---------------------------------------------------------------------------------------------------

    def keep_note(self, name: str, data: bytes) -> None:
        """Keep a small file beside the windows; a newer one of its name replaces it whole. Raises ``StoreError``."""
        if len(data) > _MAX_NOTE_BYTES:
            raise StoreError(f"note {name!r}: {len(data)} bytes, at most {_MAX_NOTE_BYTES} are kept.")
        self.place.write(f"note-{name}", data)

    def open_note(self, name: str, nbytes: int) -> mmap.mmap:
        """Map a small file beside the windows: what is written into it is there at once, and outlives this process.

        Raises:
            StoreError: It cannot be made.
        """
        self.place.may_change()
        path = self.path / f"note-{name}"
        with explain_os_errors("map", path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.ftruncate(descriptor, nbytes)
                return mmap.mmap(descriptor, nbytes)
            finally:
                os.close(descriptor)

    def note(self, name: str) -> bytes | None:
        """What :meth:`keep_note` kept, here or in a predecessor of this process; None for nothing."""
        return self.place.read(f"note-{name}", _MAX_NOTE_BYTES)

    # --- room ----------------------------------------------------------------------------------------------------

    def free_bytes(self) -> int:
        """Bytes that can still be acquired: free room there, plus this tier's own free buffers."""
        with self._mutex:
            return free_bytes_at(self.path) + self._pool.free_bytes()

    def used_bytes(self) -> int:
        """Bytes of all files of this job and rank, free buffers included."""
        return sum(self.place.entries(FILES).values())

    def pooled_bytes(self) -> int:
        """Bytes of this tier's own free buffers."""
        with self._mutex:
            return self._pool.free_bytes()

    def aside_bytes(self) -> int:
        """Bytes that only windows aside need: they are given up when memory runs out."""
        with self._mutex:
            names = self._needed.only_aside()
            return sum(n for name, n in self.place.entries(FILES).items() if name in names) if names else 0

    def check_capacity(self, needed_bytes: int) -> None:
        """Refuse before the first step what would fail in the middle of a window.

        Args:
            needed_bytes: of all windows that are held at once, without what is committed already.

        Raises:
            HostMemoryError: there is less room; the message has both numbers and the remedies.
        """
        if self.free_bytes() + self.aside_bytes() < needed_bytes:
            raise self._explained(no_room(self.path, needed_bytes))

    def who_holds_memory(self) -> str:
        """For messages about full memory; see :func:`~.jobs.who_holds_memory`."""
        return who_holds_memory(self.base_dir, self.job)

    # --- inside (the mutex is held) ------------------------------------------------------------------------------

    def _moved(self) -> None:
        current, aside, _ = self.manifests()
        self._needed.learn(current, aside)

    def _explained(self, error: HostMemoryError) -> HostMemoryError:
        return HostMemoryError(f"{error}{self.who_holds_memory()}")

    def _acquire(self, path: Path, nbytes: int) -> HostBuffer:
        try:
            return self._pool.acquire(path, nbytes)
        except HostMemoryError as error:
            if not self._needed.aside:
                raise self._explained(error) from error
            before = self.used_bytes()
            self.forget_aside()
            self._free_files()  # also where somebody else has removed the folders
            _log.warning(
                "%s: memory is full; windows that lay aside (of an earlier course of training, or older than the one "
                "restored) are removed, before this run has committed one (%s)",
                self.path, bytes_text(before - self.used_bytes() + self._pool.free_bytes()),
            )  # fmt: skip
            return self._acquire(path, nbytes)

    def _free_files(self, keep: Collection[str] = ()) -> None:
        """What lay aside is gone."""
        names, self._needed.aside = self._needed.aside, frozenset()
        self._settle(names)

    def _settle(self, names: Collection[str]) -> None:
        """Free the files among ``names`` that nothing needs any more."""
        for name in self._needed.unneeded(names):
            buffer = self._pool.get(name)
            if buffer is None:
                self.place.remove(f"{FILES}/{name}")
            else:
                self._pool.put_back(buffer)


def _iteration_of(file: str) -> int:
    """The iteration that a capture's file is named after."""
    match = re.match(r"(\d{12})-slot", file)
    return int(match[1]) if match else -1
