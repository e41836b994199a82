"""Storage: a local directory or any fsspec URL, fed from host memory in the background at its own pace."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moetion_lightning.errors import CorruptSnapshotError, StoreError
from moetion_lightning.store.jobs import job_note
from moetion_lightning.store.local import LocalRoot
from moetion_lightning.store.manifest import FileRecord, Manifest
from moetion_lightning.store.remote import RemoteRoot
from moetion_lightning.store.retention import files_to_drop, windows_to_keep
from moetion_lightning.store.tier import Tier
from moetion_lightning.store.windows import Root, WindowSet, rank_dir

__all__ = ["DirectoryTier", "is_local_url", "local_path_of"]


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
        keep: committed windows to keep, at least 1.
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
        self._known: set[FileRecord] = set()  # written or read whole by this process
        self._is_created = False

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
        """Create the directories now, to learn before the first step that it is impossible.

        Raises:
            StoreError: they cannot be created or written.
        """
        if not self._is_created:
            self._root.create()
            note = job_note(job=self.job, rank=self.rank, world_size=self.world_size)
            self._root.write_note("job.json", json.dumps(note, indent=1).encode())
            self._is_created = True
        return self

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
            CorruptSnapshotError: a file of the source is not what was committed; nothing is committed here.
            StoreError: writing fails (full, no permission); the windows committed before are untouched.
        """
        self.open()
        readable, _ = self._set.named_files()
        sizes = self._root.files()
        for record in manifest.files:
            if not self._is_present(record, sizes):
                self._make_way(record, manifest, readable)
                self._root.put_file(record, source.local_path(record))
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
        self.open()
        self._set.commit(manifest, on_stage)
        for later in [i for i in self._set.windows() if i > manifest.iteration]:
            self._root.remove_manifest(later)

    def drop(self, iteration: int) -> None:
        """Remove a window: its manifest first, then the files that no other window names."""
        self._root.remove_manifest(iteration)
        self._collect()

    def windows(self) -> list[int]:
        """Iterations of committed windows, newest first; none when the directory does not exist."""
        return self._set.windows()

    def read_manifest(self, iteration: int) -> Manifest:
        """Read and check a manifest. Raises ``CorruptSnapshotError``, ``VersionError``, ``ForeignWindowError``."""
        return self._set.read_manifest(iteration)

    def verify(self, manifest: Manifest) -> None:
        """Check sizes and checksums of all files of a window. Raises ``CorruptSnapshotError``."""
        self._set.verify(manifest)
        self._known.update(manifest.files)

    def local_path(self, record: FileRecord) -> Path:
        """A local path of a file; remote ones are downloaded to a private directory and verified."""
        return self._root.file_path(record)

    def mark_completed(self) -> None:
        """Note that training ended as planned, so that the same command starts anew instead of resuming."""
        self.open()
        self._root.write_note("completed.json", json.dumps({"completed_at": time.time()}).encode())

    def clear_completed(self) -> None:
        """Take the note back (a new run under the same name)."""
        self._root.write_note("completed.json", None)

    @property
    def completed(self) -> bool:
        """Whether :meth:`mark_completed` was called."""
        return self._root.read_note("completed.json") is not None

    def close(self) -> None:
        """Remove downloaded copies."""
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

    def _make_way(self, record: FileRecord, manifest: Manifest, readable: dict[int, Manifest]) -> None:
        """Before a file is replaced: a window that names it with other content stops being a restore point.

        That can only be the window being written again, or a later one of a course that was given up.
        """
        for iteration, other in list(readable.items()):
            if any(r.name == record.name and r != record for r in other.files):
                if iteration < manifest.iteration:
                    raise StoreError(
                        f"{self.location}: window {iteration} needs {record.name} with other content than window "
                        f"{manifest.iteration}. Give files names that no earlier window has used."
                    )
                self._root.remove_manifest(iteration)
                del readable[iteration]

    def _retain(self) -> None:
        readable, _ = self._set.named_files()
        # Damaged windows do not count as kept; they go when they are older than all that are.
        oldest = windows_to_keep(readable, self.keep)[-1]
        for iteration in self._set.windows():
            if iteration < oldest:
                self._root.remove_manifest(iteration)
        self._collect()

    def _collect(self) -> None:
        readable, is_safe = self._set.named_files()
        if is_safe:
            for name in files_to_drop(readable.values(), self._root.files()):
                self._root.remove_file(name)
            self._known &= {record for manifest in readable.values() for record in manifest.files}
