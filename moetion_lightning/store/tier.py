"""The seam between engine and tiers, and the choice of the window to restore."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from moetion_lightning.errors import (
    CorruptSnapshotError,
    ForeignWindowError,
    MoEtionError,
    StoreError,
    VersionError,
)
from moetion_lightning.store.manifest import FileRecord, Manifest

__all__ = ["Choice", "Problem", "RestoreChoice", "Tier", "choose_window"]


class Tier(Protocol):
    """One place that holds committed windows of one rank of one job."""

    @property
    def name(self) -> str:
        """What messages call it: ``"host memory"``, ``"disk"``."""

    def windows(self) -> list[int]:
        """Iterations of committed windows (a manifest is present), newest first."""

    def read_manifest(self, iteration: int) -> Manifest:
        """Read and check a manifest."""

    def verify(self, manifest: Manifest) -> None:
        """Check sizes and checksums of all files of a window; raises ``CorruptSnapshotError``."""

    def local_path(self, record: FileRecord) -> Path:
        """A local path to read or map a file of a verified window from."""

    def commit(self, manifest: Manifest) -> None:
        """Make a window a restore point; its files are there already."""

    def drop(self, iteration: int) -> None:
        """Remove a window: its manifest first, then the files that no other window names."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Why a window, or a whole tier, was passed over.

    Args:
        tier: name of the tier.
        iteration: the window, or None when the tier itself could not be listed.
        error: what happened; its message names the file and the remedy.
    """

    tier: str
    iteration: int | None
    error: MoEtionError

    def __str__(self) -> str:
        what = "the tier" if self.iteration is None else f"window {self.iteration}"
        return f"{what} in {self.tier}: {self.error}"


@dataclass(frozen=True, kw_only=True)
class RestoreChoice:
    """The window to restore.

    Args:
        tier: where to read it from.
        manifest: its verified manifest.
        problems: newer or nearer windows that were passed over, and why.
    """

    tier: Tier
    manifest: Manifest
    problems: tuple[Problem, ...] = ()


Choice = RestoreChoice


def choose_window(
    tiers: Sequence[Tier],
    *,
    job: str,
    rank: int | None = None,
    world_size: int | None = None,
    fingerprint: str | None = None,
) -> RestoreChoice | None:
    """Find the newest window that is whole.

    Every file of the chosen window is read and its checksum compared. A window that fails gives way to the same window
    on a later tier, then to the next older one.

    Args:
        tiers: fastest first; of two copies of one window the earlier tier's is taken.
        job: the window must belong to this job.
        rank: and to this rank, unless None.
        world_size: and be of a run with as many ranks, unless None.
        fingerprint: and of this model, unless None.

    Returns:
        The choice, or None when no tier has any window.

    Raises:
        CorruptSnapshotError: there are windows, but none is whole; the message lists every problem.
        ForeignWindowError: all of them belong to another job or model.
        VersionError: all of them were written by a newer version.
        StoreError: a tier could not be read and no other has a window: starting anew could lose the run.
    """
    problems: list[Problem] = []
    candidates: list[tuple[int, int]] = []
    for order, tier in enumerate(tiers):
        try:
            candidates.extend((-iteration, order) for iteration in tier.windows())
        except MoEtionError as error:
            problems.append(Problem(tier=tier.name, iteration=None, error=error))
    for negative, order in sorted(candidates):
        tier = tiers[order]
        try:
            manifest = tier.read_manifest(-negative)
            _check_belongs(manifest, job=job, rank=rank, world_size=world_size, fingerprint=fingerprint)
            tier.verify(manifest)
        except MoEtionError as error:
            problems.append(Problem(tier=tier.name, iteration=-negative, error=error))
        else:
            return RestoreChoice(tier=tier, manifest=manifest, problems=tuple(problems))
    if not problems:
        return None
    raise _nothing_whole(job, problems)


def _check_belongs(
    manifest: Manifest, *, job: str, rank: int | None, world_size: int | None, fingerprint: str | None
) -> None:
    where = f"Window {manifest.iteration}"
    if manifest.job != job:
        raise ForeignWindowError(f"{where} belongs to job {manifest.job!r}, not {job!r}.")
    if rank is not None and manifest.rank != rank:
        raise ForeignWindowError(f"{where} belongs to rank {manifest.rank}, not {rank}.")
    if world_size is not None and manifest.world_size != world_size:
        raise ForeignWindowError(
            f"{where} is of a run with {manifest.world_size} ranks, this one has {world_size}. Start as many ranks."
        )
    if fingerprint is not None and manifest.fingerprint != fingerprint:
        raise ForeignWindowError(
            f"{where} is of another model or optimizer (fingerprint {manifest.fingerprint}, this model has "
            f"{fingerprint}). Restore the model's configuration, or give the run another job_id."
        )
    if not manifest.complete:
        raise CorruptSnapshotError(f"{where} is marked incomplete: it is no restore point by itself.")


def _nothing_whole(job: str, problems: Sequence[Problem]) -> MoEtionError:
    listed = "\n".join(f"  - {problem}" for problem in problems)
    message = (
        f"No whole window of job {job!r} was found; nothing was restored.\n{listed}\n"
        "Repair the cause, or start anew: give the run another job_id, or delete these windows."
    )
    for kind in (ForeignWindowError, VersionError, StoreError):
        if all(isinstance(problem.error, kind) for problem in problems):
            return kind(message)
    return CorruptSnapshotError(message)
