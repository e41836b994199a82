"""This node's memory, outliving the process: files in /dev/shm, mapped by the writer.

The kernel keeps them when the process is killed, so that no keeper process is needed; the next start of the same job
finds them, and :func:`~moetion_lightning.storage.jobs.clean_stale` removes what nobody came back for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from moetion_lightning.errors import HostMemoryError, StoreError
from moetion_lightning.storage.buffers import BufferPool, BufferState, HostBuffer
from moetion_lightning.storage.folders import NOTES, RESUMED, TRAINED
from moetion_lightning.storage.format import SnapshotLayout
from moetion_lightning.storage.jobs import (
    JobInfo,
    JobLock,
    clean_stale,
    default_base_dir,
    find_jobs,
    is_of_this_process,
    job_note,
    prepare_base_dir,
    read_job_note,
    remove_rank_dir,
    who_holds_memory,
)
from moetion_lightning.storage.local import LocalRoot
from moetion_lightning.storage.manifest import FILE_NAME, FileRecord, Manifest, bytes_checksum
from moetion_lightning.storage.mapping import hide_from_children
from moetion_lightning.storage.retention import files_to_drop
from moetion_lightning.storage.room import free_bytes_at, no_room
from moetion_lightning.storage.windows import WindowSet, rank_dir, replica_dir
from moetion_lightning.units import bytes_text

__all__ = ["HostBuffer", "HostMemoryTier", "JobInfo", "clean_stale", "find_jobs"]

_log = logging.getLogger(__name__)
_LOOK_AGAIN_SECONDS = 30.0


class HostMemoryTier:
    """Committed windows of one rank in host memory, and the buffers of the window being captured.

    A buffer belongs to exactly one of: the pool (free), a capture, a sealed file that waits for its commit, the
    committed windows that name it, or the persister that pinned such a window. Only free ones are handed out.
    All methods may be called from any thread.

    Windows of an earlier course of training lie aside until the current course has one of its own
    (:meth:`forget_aside`), or until memory runs out.

    Args:
        base_dir: None for ``/dev/shm/moetion-<uid>``, or the temporary directory where there is no /dev/shm.
        job: name of the job: letters, digits and ``._-``.
        rank: global rank.
        world_size: number of ranks of the job.
        holder: the rank that keeps the windows, when they are copies of another rank's (``rank`` is the owner).
    """

    name = "host memory"

    def __init__(
        self,
        base_dir: Path | str | None,
        job: str,
        rank: int = 0,
        world_size: int = 1,
        *,
        holder: int | None = None,
    ) -> None:
        default, is_default_fallback = default_base_dir()
        self.base_dir = default if base_dir is None else Path(base_dir)
        self.is_fallback = base_dir is None and is_default_fallback
        self.path = self.base_dir / (rank_dir(job, rank) if holder is None else replica_dir(job, rank, holder))
        self.job, self.rank, self.world_size = job, rank, world_size
        self._root = LocalRoot(self.path)
        self._set = WindowSet(self._root, job=job, rank=rank)
        self._lock = JobLock(self.path)
        self._mutex = threading.RLock()
        self._pool = BufferPool()
        self._named: dict[int, frozenset[str]] = {}
        self._named_aside: frozenset[str] = frozenset()
        self._pins: Counter[int] = Counter()
        self._pinned: dict[int, frozenset[str]] = {}
        #: The last iteration of which a predecessor had begun to capture something; -1 if none.
        self.reached = -1
        self._holders = (-math.inf, "")
        self._is_open = False

    def open(self, *, wait_seconds: float = 0.25) -> HostMemoryTier:
        """Take ownership of this job's and rank's state and remove what a dead predecessor left uncommitted.

        Args:
            wait_seconds: how long to wait for a predecessor that is just being killed.

        Returns:
            The tier itself.

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
                self._root.create()
                self._root.clean()
                hide_from_children(self._root.files_dir)
                note = job_note(job=self.job, rank=self.rank, world_size=self.world_size)
                self._root.write_note("job.json", json.dumps(note, indent=1).encode())
                manifests, is_safe = self._read_names()
                unnamed = files_to_drop(manifests, self._root.files())
                self.reached = max(map(_iteration_of, unnamed), default=-1)
                for name in unnamed if is_safe else ():
                    self._root.remove_file(name)
            except BaseException:
                self._lock.release()
                raise
            self._is_open = True
        return self

    def __enter__(self) -> HostMemoryTier:
        return self.open()

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # -- capture ---------------------------------------------------------------------------------------------------

    def acquire(self, uid: str, nbytes: int) -> HostBuffer:
        """A buffer to capture into.

        Args:
            uid: base of the file's name; if a file has that name already, a number is appended (``buffer.name`` is
                what counts).
            nbytes: exact size, at least 1.

        Returns:
            The buffer. Its content is arbitrary.

        Raises:
            HostMemoryError: there is no room.
            StoreError: the name cannot be a file's, or the tier is not open.
        """
        if nbytes < 1:
            raise StoreError(f"{self.path}: acquire({uid!r}, {nbytes}): a buffer has at least one byte.")
        with self._mutex:
            self._require_open()
            return self._acquire(self._free_path(uid), nbytes)

    def acquire_copy(self, record: FileRecord) -> HostBuffer:
        """A buffer for the copy of a file that exists elsewhere, under the name that it has there.

        Args:
            record: the file.

        Returns:
            The buffer. Its content is arbitrary.

        Raises:
            HostMemoryError: there is no room.
            StoreError: a file of that name is in use here, or the tier is not open.
        """
        with self._mutex:
            self._require_open()
            path = self._root.files_dir / record.name
            old = self._pool.get(record.name)
            if record.name in self._in_use() or (old is not None and old.state is not BufferState.FREE):
                raise StoreError(
                    f"{path}: the file is in use, a copy cannot take its name. Wait for the other copy to end, or drop "
                    "the window that needs the file."
                )
            if old is not None:
                self._pool.delete(old)
            else:
                self._root.remove_file(record.name)  # of no committed window
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
            self._require_open()
            self._require(buffer, BufferState.CAPTURING)
        if layout is not None:
            if layout.nbytes != buffer.nbytes:
                raise StoreError(
                    f"{buffer.path}: the layout takes {layout.nbytes} bytes, the buffer has {buffer.nbytes}. "
                    "Acquire a buffer of layout.nbytes."
                )
            layout.write_header(buffer.tensor)
        # Outside the mutex: the digest takes as long as reading the memory, and pins must not wait for it.
        with buffer.memory as memory:
            record = FileRecord(buffer.name, buffer.nbytes, bytes_checksum(memory))
        with self._mutex:
            buffer.state = BufferState.SEALED
            buffer.record = record
        return record

    def release(self, buffer: HostBuffer) -> None:
        """Give back a buffer whose capture was abandoned, sealed or not; committed and pinned ones stay."""
        with self._mutex:
            if self._pool.get(buffer.name) is buffer and buffer.name not in self._in_use():
                self._pool.put_back(buffer)

    def discard(self, record: FileRecord) -> None:
        """Give back a sealed file that no manifest will name."""
        with self._mutex:
            buffer = self._pool.get(record.name)
            if buffer is not None:
                self.release(buffer)

    # -- windows ---------------------------------------------------------------------------------------------------

    def commit(self, manifest: Manifest, on_stage: Callable[[str], None] | None = None) -> None:
        """Make a window a restore point.

        Windows of later iterations go: they belong to a course of training that was given up (a restore from an older
        window), and would otherwise win the next restore.

        Args:
            manifest: names sealed files, or files of windows that are committed already.
            on_stage: called with ``"temporary"`` when the manifest is written under a temporary name, and with
                ``"committed"`` after the rename.

        Raises:
            ForeignWindowError: the manifest is of another job or rank.
            StoreError: a file is missing or not sealed, or writing fails.
        """
        with self._mutex:
            self._require_open()
            for record in manifest.files:
                buffer = self._pool.get(record.name)
                if buffer is not None and (buffer.record != record or buffer.state is not BufferState.SEALED):
                    raise StoreError(
                        f"{buffer.path}: cannot commit window {manifest.iteration}, the file is {buffer.state.value} "
                        f"as {buffer.record}, the manifest has {record}. Seal all files before the commit."
                    )
            replaced = self._named.get(manifest.iteration, frozenset())

            def staged(stage: str) -> None:
                if stage == "committed":  # before the caller's function, which may raise: the files are in use now
                    self._named[manifest.iteration] = frozenset(record.name for record in manifest.files)
                if on_stage is not None:
                    on_stage(stage)

            self._set.commit(manifest, staged)
            for later in [i for i in self._set.windows() if i > manifest.iteration]:
                self.drop(later)
            self._settle(replaced)
            self._pool.trim()

    def drop(self, iteration: int) -> None:
        """Remove a window: its manifest first; files that no other window names and no pin holds are freed."""
        with self._mutex:
            self._require_open()
            self._root.remove_manifest(iteration)
            self._settle(self._named.pop(iteration, frozenset()))

    def pin(self, iteration: int) -> Manifest:
        """Keep a committed window's files until :meth:`unpin`, also if the window is dropped meanwhile.

        Returns:
            The window's manifest.

        Raises:
            CorruptSnapshotError: there is no such window, or it cannot be read.
        """
        with self._mutex:
            self._require_open()
            manifest = self._set.read_manifest(iteration)
            self._pins[iteration] += 1
            self._pinned[iteration] = self._pinned.get(iteration, frozenset()) | {r.name for r in manifest.files}
            return manifest

    def unpin(self, iteration: int) -> None:
        """Undo one :meth:`pin`."""
        with self._mutex:
            if self._pins[iteration] <= 0:
                raise StoreError(f"{self.path}: window {iteration} is not pinned. Unpin once for each pin.")
            self._pins[iteration] -= 1
            if self._pins[iteration] == 0:
                del self._pins[iteration]
                self._settle(self._pinned.pop(iteration))

    @contextlib.contextmanager
    def pinned(self, iteration: int) -> Iterator[Manifest]:
        """:meth:`pin` for the length of a ``with`` block."""
        manifest = self.pin(iteration)
        try:
            yield manifest
        finally:
            self.unpin(iteration)

    def windows(self, aside: str = "") -> list[int]:
        """Iterations of committed windows, newest first; of a course that lies aside when one is named."""
        return self._set.windows(aside)

    def courses_aside(self) -> list[str]:
        """Courses of training whose windows lie aside, the latest first."""
        return self._set.courses_aside()

    def read_manifest(self, iteration: int, aside: str = "") -> Manifest:
        """Read and check a manifest. Raises ``CorruptSnapshotError``, ``VersionError``, ``ForeignWindowError``."""
        return self._set.read_manifest(iteration, aside)

    def verify(self, manifest: Manifest) -> None:
        """Check sizes and checksums of all files of a window. Raises ``CorruptSnapshotError``."""
        self._set.verify(manifest)

    def local_path(self, record: FileRecord) -> Path:
        """Where to read or map a file from. Raises ``CorruptSnapshotError`` when it is missing or of another size."""
        return self._root.file_path(record)

    # -- courses of training ---------------------------------------------------------------------------------------

    def set_aside(self, iterations: Iterable[int] | None = None) -> str:
        """Another course of training begins: move windows aside, where no restart takes them by itself.

        Args:
            iterations: the windows; None for all, with what was noted of their course.

        Returns:
            Name of the course that lies aside now, "" when there was no such window.
        """
        with self._mutex:
            self._require_open()
            course = self._set.set_aside(iterations)
            self._read_names()
            return course

    def take_back(self, course: str) -> None:
        """Make the windows of a course that lies aside the current ones; the current ones go aside."""
        with self._mutex:
            self._require_open()
            self._set.take_back(course)
            self._read_names()

    def forget_aside(self) -> None:
        """The current course has a window of its own: free what lies aside."""
        with self._mutex:
            if not self._named_aside and not self._set.root.courses_aside():
                return
            self._require_open()
            self._set.forget_aside()
            names, self._named_aside = self._named_aside, frozenset()
            self._settle(names)

    def mark_trained(self) -> None:
        """Note that training came to its end. The windows stay until the process has ended well, too."""
        with self._mutex:
            self._require_open()
            self._set.mark(TRAINED)

    def mark_resumed(self, iteration: int) -> None:
        """Note which iteration the user asked for when this course began."""
        with self._mutex:
            self._require_open()
            self._set.mark(RESUMED, {"iteration": iteration})

    def count_restore(self, iteration: int, *, asked_for: bool = False) -> int:
        """A window is restored. Returns how often in a row; 0 for one that was asked for, although there are others."""
        with self._mutex:
            self._require_open()
            return self._set.count_restore(iteration, asked_for=asked_for)

    def mark_completed(self) -> None:
        """The process ends well: remove everything, which nothing needs any more, and close."""
        self.destroy()

    def mark_continued(self) -> None:
        """The course of the current windows goes on: it is neither at its end nor completed."""
        self._set.mark_continued()

    def is_trained(self, aside: str = "") -> bool:
        """Whether a course came to its end (:meth:`mark_trained`): the current one, or one that lies aside."""
        return self._set.is_trained(aside)

    @property
    def completed(self) -> bool:
        """Whether the process that trained the current windows ended well, too."""
        return self._set.completed

    @property
    def resumed(self) -> int | None:
        """The iteration that the user asked for when this course began (:meth:`mark_resumed`)."""
        return self._set.resumed

    def is_of_this_process(self) -> bool:
        """Whether this process was the last one to open it."""
        return is_of_this_process(read_job_note(self.path))

    # -- room and end ----------------------------------------------------------------------------------------------

    def free_bytes(self) -> int:
        """Bytes that can still be acquired: free room there, plus this tier's own free buffers."""
        with self._mutex:
            return free_bytes_at(_existing_parent(self.path)) + self._pool.free_bytes()

    def used_bytes(self) -> int:
        """Bytes of all files of this job and rank, free buffers included."""
        return sum(self._root.files().values())

    def pooled_bytes(self) -> int:
        """Bytes of this tier's own free buffers."""
        with self._mutex:
            return self._pool.free_bytes()

    def aside_bytes(self) -> int:
        """Bytes that only windows aside need: they are given up when memory runs out."""
        with self._mutex:
            if not self._named_aside:
                return 0
            needed = set().union(*self._named.values(), *self._pinned.values())
            return sum(n for name, n in self._root.files().items() if name in self._named_aside and name not in needed)

    def check_capacity(self, needed_bytes: int) -> None:
        """Refuse before the first step what would fail in the middle of a window.

        Args:
            needed_bytes: of all windows that are held at once, without what is committed already.

        Raises:
            HostMemoryError: there is less room; the message has both numbers and the remedies.
        """
        if self.free_bytes() + self.aside_bytes() < needed_bytes:
            raise self._explained(no_room(_existing_parent(self.path), needed_bytes))

    def who_holds_memory(self) -> str:
        """For messages about full memory; see :func:`~.jobs.who_holds_memory`. Looked up at most twice a minute."""
        looked, text = self._holders
        if time.monotonic() - looked > _LOOK_AGAIN_SECONDS:
            text = who_holds_memory(self.base_dir, self.job)
            self._holders = (time.monotonic(), text)
        return text

    def close(self) -> None:
        """Give up ownership: committed windows stay, everything else is removed."""
        with self._mutex:
            if not self._is_open:
                return
            self._is_open = False
            in_use = self._in_use()
            for name in self._pool.forget_all():
                if name not in in_use:
                    self._root.remove_file(name)
            self._lock.release()

    def destroy(self) -> None:
        """Remove all state of this job and rank (the normal end of training), and close.

        Windows that lie aside stay if the current course has none of its own to show for them.
        """
        with self._mutex:
            self._require_open()
            if self._named_aside and not self._named:
                for note in NOTES:
                    self._root.write_note(note, None)
                self.close()
                return
            remove_rank_dir(self.path)
            self._named.clear()
            self._named_aside = frozenset()
            self._pins.clear()
            self._pinned.clear()
            self._pool.forget_all()
            self._is_open = False
            self._lock.release()

    # -- inside (the mutex is held) ----------------------------------------------------------------------------------

    def _require_open(self) -> None:
        if not self._is_open:
            raise StoreError(f"{self.path}: the tier is not open. Call open() first.")

    def _require(self, buffer: HostBuffer, state: BufferState) -> None:
        if self._pool.get(buffer.name) is not buffer or buffer.state is not state:
            raise StoreError(f"{buffer.path}: the buffer is {buffer.state.value}, expected {state.value}.")

    def _in_use(self) -> set[str]:
        return set(self._named_aside).union(*self._named.values(), *self._pinned.values())

    def _read_names(self) -> tuple[list[Manifest], bool]:
        """Learn which files committed windows need; see :meth:`WindowSet.named_files`."""
        readable, is_safe = self._set.named_files()
        aside, is_aside_safe = self._set.manifests_aside()
        self._named = {i: frozenset(r.name for r in m.files) for i, m in readable.items()}
        self._named_aside = frozenset(record.name for manifest in aside for record in manifest.files)
        return [*readable.values(), *aside], is_safe and is_aside_safe

    def _explained(self, error: HostMemoryError) -> HostMemoryError:
        return HostMemoryError(f"{error}{self.who_holds_memory()}")

    def _acquire(self, path: Path, nbytes: int) -> HostBuffer:
        try:
            return self._pool.acquire(path, nbytes)
        except HostMemoryError as error:
            if not self._named_aside:
                raise self._explained(error) from error
            before = self.used_bytes()
            self.forget_aside()
            _log.warning(
                "%s: memory is full; windows that lay aside (of an earlier course of training, or older than the one "
                "restored) are removed, before this run has committed one (%s)",
                self.path, bytes_text(before - self.used_bytes() + self._pool.free_bytes()),
            )  # fmt: skip
            return self._acquire(path, nbytes)

    def _free_path(self, uid: str) -> Path:
        for number in range(1, 1_000_000):
            name = f"{uid}.safetensors" if number == 1 else f"{uid}-{number}.safetensors"
            if not FILE_NAME.fullmatch(name):
                raise StoreError(f"{self.path}: {uid!r} cannot name a file: use at most 100 letters, digits and ._-")
            path = self._root.files_dir / name
            if not os.path.lexists(path):
                return path
        raise StoreError(f"{self.path}: too many files are named after {uid!r}. Use another uid.")

    def _settle(self, names: Iterable[str]) -> None:
        """Free the files among ``names`` that nothing needs any more."""
        in_use = self._in_use()
        for name in names:
            if name in in_use:
                continue
            buffer = self._pool.get(name)
            if buffer is None:
                self._root.remove_file(name)
            else:
                self._pool.put_back(buffer)


def _existing_parent(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _iteration_of(file: str) -> int:
    """The iteration that a capture's file is named after."""
    match = re.match(r"(\d{12})-slot", file)
    return int(match[1]) if match else -1
