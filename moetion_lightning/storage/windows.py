"""The windows under one tier root: reading, verifying, committing and dropping them, wherever the bytes are."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from moetion_lightning.errors import (
    ConfigurationError,
    CorruptSnapshotError,
    ForeignWindowError,
    StoreError,
    VersionError,
)
from moetion_lightning.storage.folders import COMPLETED, NOTES, RESTORES, RESUMED, TRAINED, WINDOWS, next_aside
from moetion_lightning.storage.manifest import MAX_MANIFEST_BYTES, FileRecord, Manifest

__all__ = ["Root", "WindowSet", "rank_dir", "replica_dir"]

_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def rank_dir(job: str, rank: int) -> str:
    """``<job>/rank-00000``, the place of one rank's windows under a base.

    Raises:
        ConfigurationError: the job's name could leave the base directory, or the rank is negative.
    """
    if not job or len(job) > 120 or job.startswith(".") or not set(job) <= _NAME_CHARACTERS:
        raise ConfigurationError(
            f"Job name {job!r}: use 1 to 120 letters, digits and ._- and do not begin with a dot; it names a directory."
        )
    if rank < 0:
        raise ConfigurationError(f"rank={rank}: ranks count from 0.")
    return f"{job}/rank-{rank:05d}"


def replica_dir(job: str, owner: int, holder: int) -> str:
    """``<job>/replica-00003-at-00000``, where rank ``holder`` keeps copies of rank ``owner``'s windows.

    The holder is in the name because ranks of several hosts may share one base directory.

    Raises:
        ConfigurationError: as :func:`rank_dir`, or both are the same rank.
    """
    if owner == holder:
        raise ConfigurationError(
            f"rank {holder} keeps no replicas of its own windows. Choose another rank to hold them."
        )
    rank_dir(job, holder)
    return f"{rank_dir(job, owner).replace('/rank-', '/replica-')}-at-{holder:05d}"


class Root(Protocol):
    """Where a tier root's bytes are: a local directory or an fsspec file system."""

    location: str

    def create(self) -> None:
        """Make what must exist before the first write."""

    def clean(self) -> None:
        """Remove what an earlier owner left half-written."""

    def courses_aside(self) -> list[str]:
        """Folders of windows that were set aside, the latest first."""

    def iterations(self, folder: str = WINDOWS) -> list[int]:
        """Iterations that have a manifest, newest first."""

    def manifest_location(self, iteration: int, folder: str = WINDOWS) -> str:
        """Where a manifest is, for messages."""

    def read_manifest(self, iteration: int, max_bytes: int, folder: str = WINDOWS) -> bytes:
        """Content of a manifest."""

    def write_manifest(self, iteration: int, data: bytes, on_stage: Callable[[str], None] | None = None) -> None:
        """Write a manifest whole or not at all."""

    def remove_manifest(self, iteration: int, folder: str = WINDOWS) -> None:
        """Remove a manifest."""

    def move(self, source: str, target: str, iterations: Iterable[int] | None = None) -> None:
        """Move manifests (None: the whole folder) to a new folder; each can be read at every instant."""

    def remove_folder(self, folder: str) -> None:
        """Remove a folder of manifests."""

    def files(self) -> dict[str, int]:
        """Names and sizes in bytes of the files."""

    def verify_file(self, record: FileRecord) -> None:
        """Compare size and checksum."""

    def file_path(self, record: FileRecord) -> Path:
        """A local path to read the file from."""

    def put_file(self, record: FileRecord, source: Path, before_naming: Callable[[], None]) -> None:
        """Copy a local file in; what is called right before it takes its name may refuse it."""

    def remove_file(self, name: str) -> None:
        """Remove a file."""

    def read_note(self, name: str) -> bytes | None:
        """Content of a small file beside the windows, None when absent."""

    def write_note(self, name: str, data: bytes | None) -> None:
        """Write (None: remove) a small file beside the windows."""

    def close(self) -> None:
        """Give back what is held."""


class WindowSet:
    """The windows of one rank of one job under a root.

    Not thread-safe by itself; the host-memory tier serialises its calls.

    Args:
        root: where the bytes are.
        job: name of the job; None accepts any (inspection).
        rank: global rank; None accepts any.
    """

    def __init__(self, root: Root, *, job: str | None, rank: int | None) -> None:
        self.root = root
        self.job = job
        self.rank = rank

    def windows(self, aside: str = "") -> list[int]:
        """Iterations of committed windows, newest first; of a course that lies aside when one is named."""
        return self.root.iterations(aside or WINDOWS)

    def courses_aside(self) -> list[str]:
        """Courses of training whose windows lie aside, the latest first."""
        return [course for course in self.root.courses_aside() if self.root.iterations(course)]

    def read_manifest(self, iteration: int, aside: str = "") -> Manifest:
        """Read and check one manifest.

        Raises:
            CorruptSnapshotError: unreadable, altered, or under another iteration's name.
            VersionError: from a newer version.
            ForeignWindowError: of another job or rank.
        """
        where = self.root.manifest_location(iteration, aside or WINDOWS)
        data = self.root.read_manifest(iteration, MAX_MANIFEST_BYTES, aside or WINDOWS)
        manifest = Manifest.from_bytes(data, path=where)
        if manifest.iteration != iteration:
            raise CorruptSnapshotError(
                f"{where}: holds the manifest of window {manifest.iteration}. It was renamed or copied; delete it."
            )
        self._check_owner(manifest, where)
        return manifest

    def set_aside(self, iterations: Iterable[int] | None = None) -> str:
        """Move current windows aside: all of them with what was noted of their course, or only some.

        A kill leaves every window readable, in its old place or in the new one.

        Returns:
            Name of the course, "" when there was nothing to move.
        """
        existing = self.windows()
        if iterations is None and not existing:
            for note in NOTES:
                self.root.write_note(note, None)
        moved = existing if iterations is None else sorted(set(iterations).intersection(existing), reverse=True)
        if not moved:
            return ""
        course = next_aside(self.root.courses_aside())
        self.root.move(WINDOWS, course, None if iterations is None else moved)
        return course

    def take_back(self, course: str) -> None:
        """Make the windows of a course that lies aside the current ones; the current ones go aside."""
        if not self.set_aside():
            self.root.remove_folder(WINDOWS)  # notes of a course without windows
        self.root.move(course, WINDOWS)

    def mark(self, note: str, content: dict[str, Any] | None = None) -> None:
        """Note something about the course of the current windows; it goes with them when they are set aside."""
        self.root.write_note(note, json.dumps({**(content or {}), "at": time.time()}).encode())

    def mark_continued(self) -> None:
        """The course goes on: it is neither at its end nor completed."""
        for note in (TRAINED, COMPLETED):
            if self.root.read_note(note) is not None:
                self.root.write_note(note, None)

    def is_trained(self, aside: str = "") -> bool:
        """Whether training came to its end; of a course that lies aside when one is named."""
        return self.root.read_note(f"{aside}/{TRAINED.partition('/')[2]}" if aside else TRAINED) is not None

    @property
    def completed(self) -> bool:
        """Whether the process ended well, too."""
        return self.root.read_note(COMPLETED) is not None

    @property
    def resumed(self) -> int | None:
        """The iteration that the user asked for when this course began."""
        value = self._note(RESUMED).get("iteration")
        return value if type(value) is int else None

    def count_restore(self, iteration: int, *, asked_for: bool = False) -> int:
        """A window is restored. Returns how often in a row; 0 for one that was asked for, although there are others."""
        before = self._note(RESTORES)
        count = before.get("count") if before.get("iteration") == iteration else 0
        count = 0 if asked_for else count + 1 if type(count) is int else 1
        self.mark(RESTORES, {"iteration": iteration, "count": count})
        return count

    def _note(self, name: str) -> dict[str, Any]:
        """Content of a note, empty when it is absent or damaged."""
        try:
            content = json.loads(self.root.read_note(name) or b"{}")
        except (CorruptSnapshotError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    def forget_aside(self) -> None:
        """Remove all manifests that lie aside, the oldest course first."""
        for course in reversed(self.root.courses_aside()):
            self.root.remove_folder(course)

    def verify(self, manifest: Manifest) -> None:
        """Check sizes and checksums of all files of a window. Raises ``CorruptSnapshotError``."""
        for record in manifest.files:
            self.root.verify_file(record)

    def commit(self, manifest: Manifest, on_stage: Callable[[str], None] | None = None) -> None:
        """Write the manifest; its files must be there.

        Raises:
            ForeignWindowError: of another job or rank.
            StoreError: a file is absent or has another size, or writing fails.
        """
        where = self.root.manifest_location(manifest.iteration)
        self._check_owner(manifest, where)
        sizes = self.root.files()
        for record in manifest.files:
            if sizes.get(record.name) != record.nbytes:
                raise StoreError(
                    f"{where}: cannot commit, file {record.name} has {sizes.get(record.name, 'no')} bytes there, "
                    f"expected {record.nbytes}. Write and seal all files before the commit."
                )
        self.root.write_manifest(manifest.iteration, manifest.to_bytes(), on_stage)

    def named_files(self, aside: str = "") -> tuple[dict[int, Manifest], bool]:
        """Manifests that can be read, and whether it is safe to call all other files garbage.

        It is not when a manifest could not be read for a reason that may pass (a newer version, no permission): its
        window may be whole.
        """
        readable, is_safe = {}, True
        for iteration in self.windows(aside):
            try:
                readable[iteration] = self.read_manifest(iteration, aside)
            except CorruptSnapshotError:
                pass
            except (VersionError, ForeignWindowError, StoreError):
                is_safe = False
        return readable, is_safe

    def manifests_aside(self) -> tuple[list[Manifest], bool]:
        """As :meth:`named_files`, of all courses that lie aside."""
        found = [self.named_files(course) for course in self.root.courses_aside()]
        return [m for readable, _ in found for m in readable.values()], all(is_safe for _, is_safe in found)

    def _check_owner(self, manifest: Manifest, where: str) -> None:
        if self.job not in (None, manifest.job) or self.rank not in (None, manifest.rank):
            raise ForeignWindowError(
                f"{where}: window of rank {manifest.rank} of job {manifest.job!r}, expected rank {self.rank} of job "
                f"{self.job!r}. Remove it from this directory."
            )
