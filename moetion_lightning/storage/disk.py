"""Storage: a local directory or any fsspec URL, fed from host memory in the background at its own pace."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from moetion_lightning.errors import CorruptSnapshotError, StoreError
from moetion_lightning.storage.folders import COMPLETED, RESUMED, TRAINED
from moetion_lightning.storage.jobs import check_storage_dir, is_of_this_process, job_note
from moetion_lightning.storage.local import LocalRoot
from moetion_lightning.storage.manifest import FileRecord, Manifest, parse_json
from moetion_lightning.storage.owner import Ownership
from moetion_lightning.storage.remote import RemoteRoot
from moetion_lightning.storage.retention import files_to_drop, windows_to_keep
from moetion_lightning.storage.tier import Tier
from moetion_lightning.storage.windows import Root, WindowSet, rank_dir

__all__ = ["DirectoryTier", "is_local_url", "local_path_of"]

_log = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_local_url(url: str) -> bool:
    """Whether a URL or path is of this machine's file system."""
    return "://" not in url or url.startswith(("file://", "local://"))


def local_path_of(url: str) -> Path:
    """Path of a local URL or of a plain path, with ``~`` expanded."""
    return Path(url.split("://", 1)[-1]).expanduser()


class DirectoryTier:
    """Committed windows of one rank on storage.

    Not thread-safe: one thread (the persister) writes; reads happen before it starts.

    Args:
        url: directory, or fsspec URL; the job's directory is made under it.
        job: name of the job: letters, digits and ``._-``.
        rank: global rank.
        world_size: number of ranks of the job.
        keep: committed windows to keep, at least 1; the newest one that is finite is kept in any case.
        run: launch that this process belongs to and which start of it this is; see :class:`~.owner.Ownership`.
        storage_options: for the fsspec file system's constructor.

    Raises:
        ConfigurationError: the job's name or the URL's protocol cannot be used.
    """

    def __init__(
        self,
        url: str | Path,
        job: str,
        rank: int = 0,
        world_size: int = 1,
        *,
        keep: int = 2,
        run: tuple[str, int] = ("", 0),
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        windows_to_keep((), keep)
        url = os.fspath(url)
        self.url = url
        self.job, self.rank, self.world_size, self.keep = job, rank, world_size, keep
        self._storage_options = storage_options
        self._root: Root
        if is_local_url(url):
            self.name = "disk"
            self._root = LocalRoot(local_path_of(url) / rank_dir(job, rank))
        else:
            self.name = "storage"
            self._root = RemoteRoot(f"{url.rstrip('/')}/{rank_dir(job, rank)}", storage_options)
        self._set = WindowSet(self._root, job=job, rank=rank)
        self._owner = Ownership(self._root, run)
        self._known: set[FileRecord] = set()  # written or read whole by this process
        self._is_open = False

    def of_rank(self, rank: int) -> DirectoryTier:
        """The tier of another rank of the same job, to read from."""
        return DirectoryTier(
            self.url, self.job, rank, self.world_size, keep=self.keep, storage_options=self._storage_options
        )

    @property
    def location(self) -> str:
        """Path or URL of this rank's windows."""
        return self._root.location

    def open(self) -> DirectoryTier:
        """Become the owner of the directory, now, to learn before the first step that it is impossible.

        Raises:
            JobBusyError: a live process, on this machine or another one, persists there.
            StoreError: it cannot be created or written, or others may write there.
        """
        if not self._is_open:
            self._root.create()
            self._owner.claim()
            self._is_open = True
            try:
                self._root.clean()
                if isinstance(self._root, LocalRoot):
                    check_storage_dir(local_path_of(self.url), self._root.path)
                note = job_note(job=self.job, rank=self.rank, world_size=self.world_size)
                self._root.write_note("job.json", json.dumps(note, indent=1).encode())
            except BaseException:
                self.close()
                raise
        return self

    def renew(self) -> None:
        """Say that this process lives, so that no other one takes its place (any thread).

        Raises:
            OwnerLostError: another one has.
        """
        self._owner.renew()

    def check_owner(self) -> None:
        """Before anything is written or removed. Raises ``OwnerLostError`` when another process is the owner now."""
        self.open()
        self._owner.check()

    def persist(
        self,
        manifest: Manifest,
        source: Tier,
        on_file: Callable[[str], None] | None = None,
        on_stage: Callable[[str], None] | None = None,
    ) -> None:
        """Copy a committed window here, then drop the windows beyond ``keep``.

        Args:
            manifest: a window of ``source``, which must keep it until this returns (``HostMemoryTier.pinned``).
            source: tier to read from.
            on_file: called with the file's name after each file.
            on_stage: as in :meth:`commit`.

        Raises:
            OwnerLostError: another process owns the directory now; nothing is committed or removed.
            CorruptSnapshotError: a file of the source is not what was committed; nothing is committed here.
            StoreError: writing fails (full, no permission); the windows committed before are untouched.
        """
        self.check_owner()
        readable, _ = self._set.named_files()
        sizes = self._root.files()
        for record in manifest.files:
            if not self._is_present(record, sizes):
                self._make_way(record, manifest, readable)
                self._put(record, source.local_path(record), manifest)
            self._known.add(record)
            if on_file is not None:
                on_file(record.name)
        self.commit(manifest, on_stage)
        self._retain()

    def commit(self, manifest: Manifest, on_stage: Callable[[str], None] | None = None) -> None:
        """Write a manifest whose files are here. Windows of later iterations go, as in the host-memory tier.

        Args:
            manifest: the window.
            on_stage: called with ``"temporary"`` before the manifest takes its name and ``"committed"`` after.

        Raises:
            ForeignWindowError: of another job or rank.
            StoreError: a file is missing, or writing fails.
        """
        # Listed before the owner is asked: this process may be frozen at any point, and what is there when it comes
        # back may be another one's.
        later = [iteration for iteration in self._set.windows() if iteration > manifest.iteration]
        self.check_owner()

        def staged(stage: str) -> None:
            if stage == "temporary":  # writing took a while; what follows is one rename
                self.check_owner()
            if on_stage is not None:
                on_stage(stage)

        self._set.commit(manifest, staged)
        for iteration in later:
            self.check_owner()
            self._root.remove_manifest(iteration)

    def drop(self, iteration: int) -> None:
        """Remove a window: its manifest first, then the files that no other window names."""
        self.check_owner()
        self._root.remove_manifest(iteration)
        self._collect()

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
        self._known.update(manifest.files)

    def local_path(self, record: FileRecord) -> Path:
        """A local path of a file; remote ones are downloaded to a private directory and verified."""
        return self._root.file_path(record)

    def set_aside(self, iterations: Iterable[int] | None = None) -> str:
        """Another course of training begins: move windows aside, where no restart takes them by itself.

        Args:
            iterations: the windows; None for all, with what was noted of their course.

        Returns:
            Name of the course that lies aside now, "" when there was no such window.
        """
        self.check_owner()
        return self._set.set_aside(iterations)

    def take_back(self, course: str) -> None:
        """Make the windows of a course that lies aside the current ones; the current ones go aside."""
        self.check_owner()
        self._set.take_back(course)

    def forget_aside(self, *, keep: Collection[str] = ()) -> None:
        """The current course has a window of its own: remove what lies aside.

        Args:
            keep: files of a window that is being written.
        """
        if self._root.courses_aside():
            self.check_owner()
            self._set.forget_aside()
            self._collect(keep)

    def mark_trained(self) -> None:
        """Note that training came to its end. The windows can be restored until the process has ended well, too."""
        self.check_owner()
        self._set.mark(TRAINED)

    def mark_resumed(self, iteration: int) -> None:
        """Note which iteration the user asked for when this course began."""
        self.check_owner()
        self._set.mark(RESUMED, {"iteration": iteration})

    def count_restore(self, iteration: int, *, asked_for: bool = False) -> int:
        """A window is restored. Returns how often in a row; 0 for one that was asked for, although there are others."""
        self.check_owner()
        return self._set.count_restore(iteration, asked_for=asked_for)

    def mark_completed(self) -> None:
        """Note that the process ended well, so that the same command starts anew instead of resuming."""
        self.check_owner()
        if self.windows():
            self.forget_aside()
        self._set.mark(COMPLETED)

    def mark_continued(self) -> None:
        """The course of the current windows goes on: it is neither at its end nor completed."""
        self.check_owner()
        self._set.mark_continued()

    def is_trained(self, aside: str = "") -> bool:
        """Whether a course came to its end (:meth:`mark_trained`): the current one, or one that lies aside."""
        return self._set.is_trained(aside)

    @property
    def completed(self) -> bool:
        """Whether the process that trained the current windows ended well (:meth:`mark_completed`)."""
        return self._set.completed

    @property
    def resumed(self) -> int | None:
        """The iteration that the user asked for when this course began (:meth:`mark_resumed`)."""
        return self._set.resumed

    def is_of_this_process(self) -> bool:
        """Whether this process was the last one to open it for writing."""
        data = self._root.read_note("job.json")
        return data is not None and is_of_this_process(parse_json(data, path=self.location))

    def close(self) -> None:
        """Let go of the directory, and remove downloaded copies."""
        if self._is_open:
            self._is_open = False
            with contextlib.suppress(StoreError):  # a record that nobody renews is nobody's in the end
                self._owner.release()
        self._root.close()

    def _is_present(self, record: FileRecord, sizes: dict[str, int]) -> bool:
        if sizes.get(record.name) != record.nbytes:
            return False
        if record in self._known:
            return True
        if isinstance(self._root, RemoteRoot):
            return False  # reading it back costs as much as writing it
        try:
            self._root.verify_file(record)
        except CorruptSnapshotError:
            return False
        return True

    def _put(self, record: FileRecord, source: Path, manifest: Manifest) -> None:
        try:
            self._root.put_file(record, source, self.check_owner)
        except StoreError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in _FULL or not self.courses_aside():
                raise
            _log.warning(
                "%s is full; the windows of an earlier course of training that lay aside are removed, before this one "
                "has a window of its own there",
                self.location,
            )
            self.forget_aside(keep={r.name for r in manifest.files})
            self._root.put_file(record, source, self.check_owner)

    def _make_way(self, record: FileRecord, manifest: Manifest, readable: dict[int, Manifest]) -> None:
        """Before a file is replaced: a window that names it with other content stops being a restore point.

        That can only be the window being written again, or a later one of a course that was given up.
        """
        if any(r.name == record.name and r != record for other in self._set.manifests_aside()[0] for r in other.files):
            raise StoreError(
                f"{self.location}: a window that lies aside needs {record.name} with other content than window "
                f"{manifest.iteration}. Give files names that no earlier window has used."
            )
        for iteration, other in list(readable.items()):
            if any(r.name == record.name and r != record for r in other.files):
                if iteration < manifest.iteration:
                    raise StoreError(
                        f"{self.location}: window {iteration} needs {record.name} with other content than window "
                        f"{manifest.iteration}. Give files names that no earlier window has used."
                    )
                self.check_owner()
                self._root.remove_manifest(iteration)
                del readable[iteration]

    def _retain(self) -> None:
        iterations = self._set.windows()
        readable, _ = self._set.named_files()
        # Damaged windows do not count as kept; they go when they are older than all that are.
        kept = windows_to_keep(readable, self.keep, finite=[i for i, m in readable.items() if m.finite])
        for iteration in iterations:
            if iteration not in kept and (iteration in readable or iteration < kept[-1]):
                self.check_owner()
                self._root.remove_manifest(iteration)
        self._collect()

    def _collect(self, keep: Collection[str] = ()) -> None:
        existing = self._root.files()  # before the manifests are read: a file that comes later is no garbage
        readable, is_safe = self._set.named_files()
        aside, is_aside_safe = self._set.manifests_aside()
        if is_safe and is_aside_safe:
            manifests = [*readable.values(), *aside]
            for name in set(files_to_drop(manifests, existing)).difference(keep):
                self.check_owner()
                self._root.remove_file(name)
            self._known &= {record for manifest in manifests for record in manifest.files}
