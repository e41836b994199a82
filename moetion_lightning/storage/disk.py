"""Storage: a local directory or any fsspec URL, filled from host memory in the background."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from moetion_lightning.errors import CorruptSnapshotError, StoreError
from moetion_lightning.storage.folders import FILES, OWNER_NOTE, WINDOWS, manifest_name, rank_dir
from moetion_lightning.storage.job_note import write_job_note
from moetion_lightning.storage.local import LocalPlace
from moetion_lightning.storage.manifest import FileRecord, Manifest
from moetion_lightning.storage.owner import Ownership
from moetion_lightning.storage.place import Place
from moetion_lightning.storage.posix import check_private_dir, explain_os_errors
from moetion_lightning.storage.remote import RemotePlace
from moetion_lightning.storage.tier import Tier

__all__ = ["DirectoryTier", "is_local_url", "local_path_of", "windows_to_keep"]

_log = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_local_url(url: str) -> bool:
    """Whether a URL or path is of this machine's file system."""
    return "://" not in url or url.startswith(("file://", "local://"))


def local_path_of(url: str) -> Path:
    """Path of a local URL or of a plain path, with ``~`` expanded."""
    return Path(url.split("://", 1)[-1]).expanduser()


def windows_to_keep(iterations: Iterable[int], keep: int, *, finite: Iterable[int] | None = None) -> list[int]:
    """The newest windows, and the newest one whose values are finite.

    Args:
        iterations: iterations of committed windows, in any order.
        keep: how many to keep, at least 1.
        finite: those of them whose values are finite; None for all.

    Returns:
        Iterations to keep, newest first: ``keep``, or one more when none of these is finite.

    Raises:
        ValueError: ``keep`` is below 1: the newest committed window is never dropped.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least the newest window must be kept.")
    newest_first = sorted(set(iterations), reverse=True)
    kept = newest_first[:keep]
    usable = set(newest_first if finite is None else finite)
    if usable.isdisjoint(kept):
        kept += [iteration for iteration in newest_first if iteration in usable][:1]
    return kept


class DirectoryTier(Tier):
    """Committed windows of one rank on storage.

    It is opened, and its owner asked, by the first method that changes anything. One thread (the persister) writes
    windows; reads happen before it starts.

    Args:
        url: directory, or fsspec URL; the job's directory is made under it.
        job: name of the job: letters, digits and ``._-``.
        rank: global rank.
        world_size: number of ranks of the job.
        keep: committed windows to keep, at least 1; the newest one that is finite is kept in any case.
        run: launch that this process belongs to and which start of it this is; see :class:`~.owner.Ownership`.

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
    ) -> None:
        windows_to_keep((), keep)
        self.url, self.keep = os.fspath(url), keep
        self._directory = rank_dir(job, rank)
        super().__init__(self._place_for(self.check_owner), job, rank, world_size)
        self.name = "storage" if self.place.is_remote else "disk"
        self._owner = Ownership(self._place_for, run)
        self._known: set[FileRecord] = set()  # written or read whole by this process
        self._is_open = False

    def of_rank(self, rank: int) -> DirectoryTier:
        """The tier of another rank of the same job, to read from."""
        return DirectoryTier(self.url, self.job, rank, self.world_size, keep=self.keep)

    def open(self) -> DirectoryTier:
        """Become the owner of the directory, now, to learn before the first step that it is impossible.

        Raises:
            JobBusyError: a live process, on this machine or another one, persists there.
            StoreError: it cannot be created or written, or others may write there.
        """
        if not self._is_open:
            self._owner.claim()
            self._is_open = True
            try:
                self.place.clean()
                self._check_users()
                write_job_note(self.place, job=self.job, rank=self.rank, world_size=self.world_size)
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

    def close(self) -> None:
        """Let go of the directory, and remove downloaded copies."""
        if self._is_open:
            self._is_open = False
            with contextlib.suppress(StoreError):  # a record that nobody renews is nobody's in the end
                self._owner.release()
        super().close()

    def persist(self, manifest: Manifest, source: Tier) -> None:
        """Copy a committed window here, then drop the windows beyond ``keep``.

        Args:
            manifest: a window of ``source``, which must keep it until this returns (``HostMemoryTier.pinned``).
            source: tier to read from.

        Raises:
            OwnerLostError: another process owns the directory now; nothing is committed or removed.
            CorruptSnapshotError: a file of the source is not what was committed; nothing is committed here.
            StoreError: writing fails (full, no permission); the windows committed before are untouched.
        """
        self.check_owner()
        sizes = self.place.entries(FILES)
        current, aside, _ = self.manifests()
        taken = {record.name: record for other in (*current.values(), *aside) for record in other.files}
        for record in manifest.files:
            if taken.get(record.name, record) != record:
                raise StoreError(
                    f"{self.location}: another window needs {record.name} with other content than window "
                    f"{manifest.iteration}. Give files names that no earlier window has used."
                )
            if not self._is_present(record, sizes):
                self._put(record, source.local_path(record), manifest)
            self._known.add(record)
        self.commit(manifest)
        self._retain()

    def verify(self, manifest: Manifest) -> None:
        """Check sizes and checksums of all files of a window. Raises ``CorruptSnapshotError``."""
        super().verify(manifest)
        self._known.update(manifest.files)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _place_for(self, may_change: Callable[[], object]) -> Place:
        if is_local_url(self.url):
            return LocalPlace(local_path_of(self.url) / self._directory, may_change)
        return RemotePlace(f"{self.url.rstrip('/')}/{self._directory}", may_change)

    def _check_users(self) -> None:
        """Check that no other user could put windows in place of ours.

        The base may be a group's, as shared folders are, and a link; what is below it is this user's alone. On network
        file systems this user may have another number: what counts is that of a file that it has just written.
        """
        if not isinstance(self.place, LocalPlace):
            return
        base, path = local_path_of(self.url), self.place.path
        with explain_os_errors("inspect", base):
            mode = os.stat(base).st_mode
            if mode & 0o002 and not mode & stat.S_ISVTX:
                raise StoreError(
                    f"{base}: all users may write there (mode {stat.S_IMODE(mode):o}), and could put other windows in "
                    f"place of this job's. Run: chmod o-w {base}"
                )
            user = os.lstat(path / OWNER_NOTE).st_uid
        for directory in (path.parent, path):
            check_private_dir(directory, user, "another persist_dir or job_id")

    def _is_present(self, record: FileRecord, sizes: dict[str, int]) -> bool:
        if sizes.get(record.name) != record.nbytes:
            return False
        if record in self._known:
            return True
        if self.place.is_remote:
            return False  # reading it back costs as much as writing it
        try:
            self.place.verify(record)
        except CorruptSnapshotError:
            return False
        return True

    def _put(self, record: FileRecord, source: Path, manifest: Manifest) -> None:
        try:
            self.place.put(record, source)
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
            self.place.put(record, source)

    def _retain(self) -> None:
        iterations = self.windows()
        readable, _, _ = self.manifests()
        # Damaged windows do not count as kept; they go when they are older than all that are.
        kept = windows_to_keep(readable, self.keep, finite=[i for i, m in readable.items() if m.finite])
        for iteration in iterations:
            if iteration not in kept and (iteration in readable or iteration < kept[-1]):
                self.place.remove(f"{WINDOWS}/{manifest_name(iteration)}")
        self._free_files()

    def _free_files(self, keep: Collection[str] = ()) -> None:
        existing = self.place.entries(FILES)  # before the manifests are read: a file that comes later is no garbage
        current, aside, is_safe = self.manifests()
        if is_safe:
            needed = {record for manifest in (*current.values(), *aside) for record in manifest.files}
            for name in set(existing).difference(keep, (record.name for record in needed)):
                self.place.remove(f"{FILES}/{name}")
            self._known &= needed
