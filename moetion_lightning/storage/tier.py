"""The windows of one rank of one job in one place: listed, read, committed, set aside and dropped."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from moetion_lightning.errors import CorruptSnapshotError, ForeignWindowError, StoreError, VersionError
from moetion_lightning.storage.folders import (
    ASIDE_NAME,
    COMPLETED,
    FILES,
    MANIFEST_NAME,
    NOTES,
    RESTORES,
    RESUMED,
    TRAINED,
    WINDOWS,
    manifest_name,
    next_aside,
)
from moetion_lightning.storage.job_note import is_of_this_process
from moetion_lightning.storage.manifest import MAX_MANIFEST_BYTES, FileRecord, Manifest
from moetion_lightning.storage.place import Place

__all__ = ["Tier"]


class Tier:
    """Committed windows of one rank of one job.

    A window is there when its manifest is. Windows of an earlier course of training lie aside, where no restart takes
    them by itself, until the current course has one of its own (:meth:`forget_aside`).

    Reading needs no right. Whatever changes something needs the place's, see :class:`~.place.Place`.

    Args:
        place: where they are.
        job: name of the job; "" accepts any (inspection).
        rank: global rank; -1 accepts any.
        world_size: number of ranks of the job.
    """

    #: What messages call it.
    name = "files"

    def __init__(self, place: Place, job: str = "", rank: int = -1, world_size: int = 1) -> None:
        self.place = place
        self.job, self.rank, self.world_size = job, rank, world_size
        self._mutex = threading.RLock()

    @property
    def location(self) -> str:
        """Path or URL."""
        return self.place.location

    def close(self) -> None:
        """Give back what is held; committed windows stay."""
        self.place.close()

    def is_of_this_process(self) -> bool:
        """Whether this process was the last one to open it for writing."""
        return is_of_this_process(self.place)

    # --- windows -------------------------------------------------------------------------------------------------

    def windows(self, aside: str = "") -> list[int]:
        """Iterations of committed windows, newest first; of a course that lies aside when one is named."""
        found = map(MANIFEST_NAME.fullmatch, self.place.entries(aside or WINDOWS))
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def read_manifest(self, iteration: int, aside: str = "") -> Manifest:
        """Read and check a manifest.

        Raises:
            CorruptSnapshotError: missing, unreadable, altered, or under another iteration's name.
            VersionError: from a newer version.
            ForeignWindowError: of another job or rank.
        """
        name = f"{aside or WINDOWS}/{manifest_name(iteration)}"
        where = self.place.where(name)
        data = self.place.read(name, MAX_MANIFEST_BYTES)
        if data is None:
            raise CorruptSnapshotError(f"{where}: the manifest is missing. Restore from another window or tier.")
        manifest = Manifest.from_bytes(data, path=where)
        if manifest.iteration != iteration:
            raise CorruptSnapshotError(
                f"{where}: holds the manifest of window {manifest.iteration}. It was renamed or copied; delete it."
            )
        self._check_belongs(manifest, where)
        return manifest

    def verify(self, manifest: Manifest) -> None:
        """Check sizes and checksums of all files of a window. Raises ``CorruptSnapshotError``."""
        for record in manifest.files:
            self.place.verify(record)

    def local_path(self, record: FileRecord) -> Path:
        """Where to read or map a file from; remote ones are downloaded and verified.

        Raises:
            CorruptSnapshotError: it is missing or of another size.
        """
        return self.place.local_path(record)

    def commit(self, manifest: Manifest, on_stage: Callable[[str], None] | None = None) -> None:
        """Make a window a restore point. Its files are there already, those of the manifest's name are replaced.

        Windows of later iterations go: they belong to a course of training that was given up (a restore from an older
        window), and would otherwise win the next restore.

        Args:
            manifest: the window.
            on_stage: called with ``"temporary"`` before the manifest takes its name and ``"committed"`` after.

        Raises:
            ForeignWindowError: the manifest is of another job or rank.
            StoreError: a file is missing, or writing fails.
        """
        name = f"{WINDOWS}/{manifest_name(manifest.iteration)}"
        where = self.place.where(name)
        self._check_belongs(manifest, where)
        with self._mutex:
            # Listed before anything is asked of the owner: this process may be frozen at any point, and what is there
            # when it comes back may be another one's.
            later = [iteration for iteration in self.windows() if iteration > manifest.iteration]
            sizes = self.place.entries(FILES)
            for record in manifest.files:
                if sizes.get(record.name) != record.nbytes:
                    raise StoreError(
                        f"{where}: cannot commit, file {record.name} has {sizes.get(record.name, 'no')} bytes there, "
                        f"expected {record.nbytes}. Write and seal all files before the commit."
                    )
            self.place.sync(FILES)
            self.place.write(name, manifest.to_bytes(), on_stage)
            for iteration in later:
                self.drop(iteration)

    def drop(self, iteration: int) -> None:
        """Remove a window: its manifest first, then the files that no other window names."""
        with self._mutex:
            self.place.remove(f"{WINDOWS}/{manifest_name(iteration)}")
            self._free_files()

    def manifests(self) -> tuple[dict[int, Manifest], list[Manifest], bool]:
        """All manifests that can be read.

        Returns:
            Those of current windows, by iteration; those that lie aside; and whether it is safe to call all files that
            they do not name garbage. It is not when a manifest could not be read for a reason that may pass (a newer
            version, no permission): its window may be whole.
        """
        current: dict[int, Manifest] = {}
        aside: list[Manifest] = []
        is_safe = True
        for course in ("", *self._folders_aside()):
            for iteration in self.windows(course):
                try:
                    manifest = self.read_manifest(iteration, course)
                except CorruptSnapshotError:
                    continue
                except (VersionError, ForeignWindowError, StoreError):
                    is_safe = False
                    continue
                if course:
                    aside.append(manifest)
                else:
                    current[iteration] = manifest
        return current, aside, is_safe

    # --- courses of training ---------------------------------------------------------------------------------------

    def courses_aside(self) -> list[str]:
        """Courses of training whose windows lie aside, the latest first."""
        return [course for course in self._folders_aside() if self.windows(course)]

    def set_aside(self, iterations: Iterable[int] | None = None) -> str:
        """Another course of training begins: move windows aside.

        A kill leaves every window readable, in its old place or in the new one.

        Args:
            iterations: the windows; None for all, with what was noted of their course.

        Returns:
            Name of the course that lies aside now, "" when there was no such window.
        """
        with self._mutex:
            existing = self.windows()
            if iterations is None and not existing:
                self._forget(*NOTES)
            moved = existing if iterations is None else sorted(set(iterations).intersection(existing), reverse=True)
            if not moved:
                return ""
            course = next_aside(self._folders_aside())
            self.place.move(WINDOWS, course, None if iterations is None else map(manifest_name, moved))
            self._moved()
            return course

    def take_back(self, course: str) -> None:
        """Make the windows of a course that lies aside the current ones; the current ones go aside."""
        with self._mutex:
            if not self.set_aside():
                self.place.remove_folder(WINDOWS)  # notes of a course without windows
            self.place.move(course, WINDOWS)
            self._moved()

    def forget_aside(self, *, keep: Collection[str] = ()) -> None:
        """The current course has a window of its own: remove what lies aside, the oldest course first.

        Args:
            keep: files of a window that is being written.
        """
        with self._mutex:
            if courses := self._folders_aside():
                for course in reversed(courses):
                    self.place.remove_folder(course)
                self._free_files(keep)

    def mark_trained(self) -> None:
        """Note that training came to its end. The windows can be restored until the process has ended well, too."""
        self._mark(TRAINED)

    def is_trained(self, aside: str = "") -> bool:
        """Whether a course came to its end (:meth:`mark_trained`): the current one, or one that lies aside."""
        return self._has(TRAINED, aside)

    def mark_completed(self) -> None:
        """Note that the process ended well, so that the same command starts anew instead of resuming."""
        if self.windows():
            self.forget_aside()
        self._mark(COMPLETED)

    @property
    def completed(self) -> bool:
        """Whether the process that trained the current windows ended well (:meth:`mark_completed`)."""
        return self.is_completed()

    def is_completed(self, aside: str = "") -> bool:
        """The same of a course that lies aside."""
        return self._has(COMPLETED, aside)

    def mark_uncompleted(self) -> None:
        """The run was not complete after all: other ranks of it did not end well."""
        self._forget(COMPLETED)

    def mark_continued(self) -> None:
        """The course of the current windows goes on: it is neither at its end nor completed."""
        self._forget(TRAINED, COMPLETED)

    def mark_resumed(self, iteration: int) -> None:
        """Note which iteration the user asked for when this course began."""
        self._mark(RESUMED, iteration=iteration)

    @property
    def resumed(self) -> int | None:
        """The iteration that the user asked for when this course began (:meth:`mark_resumed`)."""
        value = self._noted(RESUMED).get("iteration")
        return value if type(value) is int else None

    def count_restore(self, iteration: int, *, asked_for: bool = False) -> int:
        """A window is restored. Returns how often in a row; 0 for one that was asked for, although there are others."""
        before = self._noted(RESTORES)
        count = before.get("count") if before.get("iteration") == iteration else 0
        count = 0 if asked_for else count + 1 if type(count) is int else 1
        self._mark(RESTORES, iteration=iteration, count=count)
        return count

    # --- inside ------------------------------------------------------------------------------------------------------

    def _free_files(self, keep: Collection[str] = ()) -> None:
        """Free the files that no window needs any more, except ``keep``."""
        raise NotImplementedError

    def _moved(self) -> None:
        """Windows were moved from one folder to another."""

    def _folders_aside(self) -> list[str]:
        return sorted(filter(ASIDE_NAME.fullmatch, self.place.folders()), reverse=True)

    def _mark(self, note: str, **content: Any) -> None:
        self.place.write(f"{WINDOWS}/{note}", json.dumps({**content, "at": time.time()}).encode())

    def _forget(self, *notes: str) -> None:
        there = self.place.entries(WINDOWS)
        for note in filter(there.__contains__, notes):
            self.place.remove(f"{WINDOWS}/{note}")

    def _has(self, note: str, aside: str = "") -> bool:
        return note in self.place.entries(aside or WINDOWS)

    def _noted(self, note: str) -> dict[str, Any]:
        """Content of a note, empty when it is absent or damaged."""
        try:
            content = json.loads(self.place.read(f"{WINDOWS}/{note}") or b"{}")
        except (CorruptSnapshotError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    def _check_belongs(self, manifest: Manifest, where: str) -> None:
        if self.job not in ("", manifest.job) or self.rank not in (-1, manifest.rank):
            raise ForeignWindowError(
                f"{where}: window of rank {manifest.rank} of job {manifest.job!r}, expected rank {self.rank} of job "
                f"{self.job!r}. Remove it from this directory."
            )
