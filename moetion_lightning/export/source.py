"""The restore point to export: where all ranks' manifests of one iteration are, verified."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moetion_lightning.errors import ConfigurationError, JobBusyError, MoEtionError, StateLostError, StoreError
from moetion_lightning.storage.disk import is_local_url, local_path_of
from moetion_lightning.storage.folders import WINDOWS
from moetion_lightning.storage.local import LocalPlace
from moetion_lightning.storage.lock import is_locked
from moetion_lightning.storage.manifest import Manifest
from moetion_lightning.storage.place import Place
from moetion_lightning.storage.remote import RemotePlace
from moetion_lightning.storage.tier import Tier
from moetion_lightning.units import bytes_text

__all__ = ["Part", "Source", "find_source"]

_RANK = re.compile(r"rank-(\d{5,})|replica-(\d{5,})-at-\d{5,}")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One rank's share: its manifest, and where its files are."""

    manifest: Manifest
    tier: Tier


@dataclass(frozen=True, kw_only=True)
class Source:
    """A restore point of a whole job.

    Args:
        parts: Of every rank, by rank.
        iteration: The iteration.
    """

    parts: tuple[Part, ...]
    iteration: int

    @property
    def first(self) -> Manifest:
        """Rank 0's manifest."""
        return self.parts[0].manifest

    def check_dead(self) -> None:
        """Refuse the memory of a live job, whose files may be filled anew at any time.

        Raises:
            JobBusyError: A process owns one of the places.
        """
        for part in self.parts:
            _check_dead(part.tier.place)

    def close(self) -> None:
        """Remove what was downloaded."""
        for part in self.parts:
            part.tier.close()


def find_source(target: str, memory_base: Path, iteration: int | None, say: Callable[[str], None]) -> Source:
    """Find the newest restore point that all ranks have, and read every file of it.

    Args:
        target: A job's name in this machine's memory, or a path or URL: of a job's folder, of a rank's, of a manifest,
            or of a folder with one job.
        memory_base: Base directory of the host-memory tier.
        iteration: The iteration instead of the newest one; None also takes that of a manifest that ``target`` names.
        say: Gets progress.

    Raises:
        StoreError: There is nothing there.
        StateLostError: A rank's part is not there.
        ConfigurationError: There is no such iteration.
        CorruptSnapshotError: A file is damaged; the message names it.
        JobBusyError: A live process owns the memory.
    """
    places, named = _places(target, memory_base)
    tiers = {rank: [Tier(place) for place in found] for rank, found in sorted(places.items())}
    for found in places.values():
        for place in found:
            _check_dead(place)
    return _verified(_chosen(tiers, target, named if iteration is None else iteration), say)


def _check_dead(place: Place) -> None:
    if isinstance(place, LocalPlace) and is_locked(place.path):
        raise JobBusyError(
            f"{place.location}: a live process trains there, and writes over these files. End it first, or export from "
            "the job's folder in its persist_dir."
        )


def _places(target: str, memory_base: Path) -> tuple[dict[int, list[Place]], int | None]:
    """By rank, where its windows are, its own memory before replicas; and the iteration of a manifest."""
    if not is_local_url(target):
        return _remote_places(target.rstrip("/")), None
    path, named = local_path_of(target), None
    if not path.exists():
        path = memory_base / target
    if path.suffix == ".json" and path.parent.name == WINDOWS and path.stem.isdigit():
        named, path = int(path.stem), path.parent.parent
    if _RANK.fullmatch(path.resolve().name) and path.is_dir():
        path = path.resolve().parent
    found = _ranks_in(path)
    if not found and path.is_dir():
        jobs = [child for child in sorted(path.iterdir()) if child.is_dir() and _ranks_in(child)]
        if len(jobs) > 1:
            names = ", ".join(job.name for job in jobs[:8])
            raise ConfigurationError(f"{path}: holds several jobs ({names}). Give the folder of one of them.")
        found = _ranks_in(jobs[0]) if jobs else {}
    if not found:
        raise StoreError(
            f"{target}: no windows are stored here, and no job of that name is in {memory_base}. Give a job's name as "
            "`moetion jobs` lists it, or its folder in memory or on storage."
        )
    return found, named


def _ranks_in(job: Path) -> dict[int, list[Place]]:
    found: dict[int, list[Place]] = {}
    children = sorted(job.iterdir()) if job.is_dir() else []
    for child in sorted(children, key=lambda child: child.name.startswith("replica")):
        match = _RANK.fullmatch(child.name)
        if match and child.is_dir() and not child.is_symlink():
            found.setdefault(int(match[1] or match[2]), []).append(LocalPlace(child))
    return found


def _remote_places(url: str) -> dict[int, list[Place]]:
    first = RemotePlace(f"{url}/rank-00000")
    iterations = Tier(first).windows()
    if not iterations:
        raise StoreError(f"{url}: no windows of rank 0 are stored here. Give the URL of a job's folder.")
    ranks = Tier(first).read_manifest(iterations[0]).world_size
    return {rank: [first if rank == 0 else RemotePlace(f"{url}/rank-{rank:05d}")] for rank in range(ranks)}


def _chosen(tiers: dict[int, list[Tier]], target: str, iteration: int | None) -> list[list[Part]]:
    """Of each rank, the candidates for the iteration."""
    windows = {rank: {i for tier in found for i in tier.windows()} for rank, found in tiers.items()}
    there = {rank: found for rank, found in windows.items() if found}
    if not there:
        raise StoreError(f"{target}: no committed window is here.")
    some = min(there)
    known = iteration if iteration in there[some] else max(there[some])
    world = _manifests(tiers[some], known)[0].manifest.world_size
    missing = [rank for rank in range(world) if rank not in there]
    if missing:
        raise StateLostError(
            f"{target}: the windows of rank {', '.join(map(str, missing))} of {world} are not here; each rank holds a "
            "part of the state. Put the folders of all ranks side by side (rank-00000, rank-00001, ...), or give the "
            "job's folder in its persist_dir."
        )
    common = set.intersection(*(there[rank] for rank in range(world)))
    wanted = [iteration] if iteration is not None else sorted(common, reverse=True)
    if not common.intersection(wanted):
        listed = "; ".join(f"rank {r}: {', '.join(map(str, sorted(there[r])))}" for r in range(world))
        which = "no iteration is there of all ranks" if iteration is None else f"no iteration {iteration} of all ranks"
        raise ConfigurationError(f"{target}: {which}. There are {listed}. Give one that all ranks have.")
    first: list[list[Part]] = []
    for i in wanted:
        candidates = [_manifests(tiers[rank], i) for rank in range(world)]
        if all(part.manifest.finite for found in candidates for part in found):
            return candidates
        first = first or candidates
    return first


def _manifests(tiers: list[Tier], iteration: int) -> list[Part]:
    found, errors = [], []
    for tier in tiers:
        if iteration in tier.windows():
            try:
                found.append(Part(manifest=tier.read_manifest(iteration), tier=tier))
            except MoEtionError as error:
                errors.append(error)
    if not found:
        raise errors[0]
    return found


def _verified(candidates: list[list[Part]], say: Callable[[str], None]) -> Source:
    parts = []
    for rank, found in enumerate(candidates):
        errors = []
        for part in found:
            say(f"reading {bytes_text(part.manifest.nbytes)} of rank {rank} in {part.tier.location}")
            try:
                part.tier.verify(part.manifest)
            except MoEtionError as error:
                errors.append(error)
                continue
            parts.append(part)
            break
        else:
            raise errors[0]
    first = parts[0].manifest
    for rank, part in enumerate(parts):
        other = part.manifest
        lineage = [m.extra.get("lineage", {}).get("name") for m in (first, other)]
        if (other.rank, other.world_size, other.job) != (rank, first.world_size, first.job) or len(set(lineage)) > 1:
            raise StateLostError(
                f"{part.tier.location}: holds the window of rank {other.rank} of {other.world_size} of job "
                f"{other.job!r}, of another course of training than rank 0's of {first.world_size} of {first.job!r}. "
                "Put folders of one run side by side."
            )
        if not other.complete:
            raise StateLostError(
                f"{part.tier.location}: window {other.iteration} is marked incomplete, it is no restore point."
            )
    return Source(parts=tuple(parts), iteration=first.iteration)
