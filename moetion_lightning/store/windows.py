"""The windows under one tier root: reading, verifying, committing and dropping them, wherever the bytes are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from moetion_lightning.errors import (
    ConfigurationError,
    CorruptSnapshotError,
    ForeignWindowError,
    StoreError,
    VersionError,
)
from moetion_lightning.store.manifest import MAX_MANIFEST_BYTES, FileRecord, Manifest

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

    def iterations(self) -> list[int]:
        """Iterations that have a manifest, newest first."""

    def manifest_location(self, iteration: int) -> str:
        """Where a manifest is, for messages."""

    def read_manifest(self, iteration: int, max_bytes: int) -> bytes:
        """Content of a manifest."""

    def write_manifest(self, iteration: int, data: bytes, on_stage: Callable[[str], None] | None = None) -> None:
        """Write a manifest whole or not at all."""

    def remove_manifest(self, iteration: int) -> None:
        """Remove a manifest."""

    def files(self) -> dict[str, int]:
        """Names and sizes in bytes of the files."""

    def verify_file(self, record: FileRecord) -> None:
        """Compare size and checksum."""

    def file_path(self, record: FileRecord) -> Path:
        """A local path to read the file from."""

    def put_file(self, record: FileRecord, source: Path) -> None:
        """Copy a local file in."""

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

    def windows(self) -> list[int]:
        """Iterations of committed windows, newest first."""
        return self.root.iterations()

    def read_manifest(self, iteration: int) -> Manifest:
        """Read and check one manifest.

        Raises:
            CorruptSnapshotError: unreadable, altered, or under another iteration's name.
            VersionError: from a newer version.
            ForeignWindowError: of another job or rank.
        """
        where = self.root.manifest_location(iteration)
        manifest = Manifest.from_bytes(self.root.read_manifest(iteration, MAX_MANIFEST_BYTES), path=where)
        if manifest.iteration != iteration:
            raise CorruptSnapshotError(
                f"{where}: holds the manifest of window {manifest.iteration}. It was renamed or copied; delete it."
            )
        self._check_owner(manifest, where)
        return manifest

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

    def named_files(self, iterations: Iterable[int] | None = None) -> tuple[dict[int, Manifest], bool]:
        """Manifests that can be read, and whether it is safe to call all other files garbage.

        It is not when a manifest could not be read for a reason that may pass (a newer version, no permission): its
        window may be whole.
        """
        readable, is_safe = {}, True
        for iteration in self.windows() if iterations is None else iterations:
            try:
                readable[iteration] = self.read_manifest(iteration)
            except CorruptSnapshotError:
                pass
            except (VersionError, ForeignWindowError, StoreError):
                is_safe = False
        return readable, is_safe

    def _check_owner(self, manifest: Manifest, where: str) -> None:
        if self.job not in (None, manifest.job) or self.rank not in (None, manifest.rank):
            raise ForeignWindowError(
                f"{where}: window of rank {manifest.rank} of job {manifest.job!r}, expected rank {self.rank} of job "
                f"{self.job!r}. Remove it from this directory."
            )
