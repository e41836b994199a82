"""What is stored under a path: the report behind ``moetion inspect PATH``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moetion_lightning.errors import MoEtionError, StoreError
from moetion_lightning.storage.disk import is_local_url, local_path_of
from moetion_lightning.storage.folders import ASIDE_NAME, FILES, WINDOWS
from moetion_lightning.storage.jobs import JobInfo, describe_place
from moetion_lightning.storage.local import LocalPlace
from moetion_lightning.storage.manifest import Manifest
from moetion_lightning.storage.tier import Tier

__all__ = ["RootReport", "StoreReport", "WindowReport", "describe"]

_MAX_DEPTH = 3  # base / job / rank


@dataclass(frozen=True, kw_only=True)
class WindowReport:
    """One window.

    Args:
        iteration: the window's name, its last iteration.
        manifest: its manifest, None when that is unreadable.
        problem: what is wrong, with the remedy; "" when every checksum is right.
        aside: whether it is of an earlier course of training, and lies aside.
    """

    iteration: int
    manifest: Manifest | None = None
    problem: str = ""
    aside: bool = False


@dataclass(frozen=True, kw_only=True)
class RootReport:
    """What one rank of one job has in one place.

    Args:
        path: the rank directory.
        info: what is there, None when it cannot be listed.
        uncommitted_nbytes: bytes of files that no readable window names (a capture in progress, or garbage).
        windows: current ones, then those that lie aside, newest first.
        problem: why it could not be listed.
    """

    path: Path
    info: JobInfo | None = None
    uncommitted_nbytes: int = 0
    windows: tuple[WindowReport, ...] = ()
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class StoreReport:
    """Everything found under a path: one entry a rank and one a replica."""

    roots: tuple[RootReport, ...]

    @property
    def is_whole(self) -> bool:
        """Whether nothing that was found has a problem."""
        return not any(r.problem or any(w.problem for w in r.windows) for r in self.roots)


def describe(path: str | os.PathLike[str]) -> StoreReport:
    """Look at a base directory, a job's, a rank's, or one manifest; read every file and compare its checksum.

    Args:
        path: local path or file:// URL.

    Returns:
        The report; problems of single windows are in it, not raised.

    Raises:
        StoreError: there is nothing of ours at the path, or it cannot be read.
    """
    text = os.fspath(path)
    if not is_local_url(text):
        raise StoreError(f"{text}: only local directories can be inspected. Copy the job's directory to this machine.")
    start = local = local_path_of(text)
    only: int | None = None
    if (local.parent.name == WINDOWS or ASIDE_NAME.fullmatch(local.parent.name)) and local.suffix == ".json":
        only = int(local.stem) if local.stem.isdigit() else None
        start = local.parent.parent
    roots = sorted(_find_roots(start, _MAX_DEPTH))
    if not roots or (start is not local and (only is None or not os.path.lexists(local))):
        raise StoreError(
            f"{text}: no windows are stored here. Give a base directory (such as /dev/shm/moetion-{os.getuid()}), a "
            "job's or a rank's directory, or a manifest."
        )
    return StoreReport(roots=tuple(_describe_root(root, only) for root in roots))


def _find_roots(path: Path, depth: int) -> Iterator[Path]:
    try:
        if (path / WINDOWS).is_dir() or Tier(LocalPlace(path)).courses_aside():
            yield path
        elif depth > 0 and path.is_dir():
            for child in path.iterdir():
                if child.is_dir() and not child.is_symlink():
                    yield from _find_roots(child, depth - 1)
    except PermissionError as error:
        raise StoreError(f"{path}: cannot be listed: {error.strerror}. Run as the user who owns it.") from error


def _describe_root(path: Path, only: int | None) -> RootReport:
    place = LocalPlace(path)
    tier = Tier(place)
    try:
        info = describe_place(place, path.resolve().parent.name, path.name, tier.name)
        courses = ["", *tier.courses_aside()]
        listed = [(course, i) for course in courses for i in tier.windows(course) if only in (None, i)]
        sizes = place.entries(FILES)
    except MoEtionError as error:
        return RootReport(path=path, problem=_one_line(error))
    current, aside, _ = tier.manifests()
    named = {record.name for manifest in (*current.values(), *aside) for record in manifest.files}
    return RootReport(
        path=path,
        info=info,
        uncommitted_nbytes=sum(size for name, size in sizes.items() if name not in named),
        windows=tuple(_describe_window(tier, iteration, course) for course, iteration in listed),
    )


def _describe_window(tier: Tier, iteration: int, course: str) -> WindowReport:
    manifest, problem = None, ""
    try:
        manifest = tier.read_manifest(iteration, course)
        tier.verify(manifest)
    except MoEtionError as error:
        problem = _one_line(error)
    return WindowReport(iteration=iteration, manifest=manifest, problem=problem, aside=bool(course))


def _one_line(error: MoEtionError) -> str:
    return " ".join(str(error).split())
