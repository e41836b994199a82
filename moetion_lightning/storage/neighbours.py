"""Jobs that have windows on a tier, for messages: which of them could be meant, and what continues it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import posixpath
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from moetion_lightning.errors import MoEtionError
from moetion_lightning.storage.disk import is_local_url, local_path_of
from moetion_lightning.storage.jobs import default_base_dir, is_locked
from moetion_lightning.storage.local import LocalRoot
from moetion_lightning.storage.manifest import Manifest
from moetion_lightning.storage.remote import RemoteRoot
from moetion_lightning.storage.windows import Root, WindowSet

__all__ = ["Neighbour", "find_neighbours"]


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """What one rank of one job has on one tier. Manifests are read when they are asked for.

    Args:
        job: its name, which ``MOETION_JOB_ID`` takes.
        rank_name: ``rank-00000``.
        tier: ``"host memory"``, ``"disk"`` or ``"storage"``.
        location: path or URL of its windows.
        script: absolute path of the main file that made them, "" if unknown.
        argv: its command line.
        cwd: its working directory.
        host: its machine.
        pid: process that owned it last, if known.
        alive: whether a live process owns it (of storage: as far as this machine can tell).
        age_seconds: since the last commit where that is known, else since it was opened.
        opened_at: when a process last opened it to write, seconds since the epoch; 0 if unknown.
        nbytes: size of all files in bytes.
        windows: iterations of current windows, newest first.
        aside: iterations of windows of earlier courses of training.
        trained: training came to its end.
        completed: and so did the process.
    """

    job: str
    rank_name: str
    tier: str
    location: str
    script: str
    argv: tuple[str, ...]
    cwd: str
    host: str
    pid: int | None
    alive: bool
    age_seconds: float
    opened_at: float
    nbytes: int
    windows: tuple[int, ...]
    aside: tuple[int, ...]
    trained: bool
    completed: bool
    read: Callable[[int], Manifest]

    @functools.cached_property
    def newest(self) -> Manifest | None:
        """The newest current window's manifest (not verified), None when none can be read."""
        for iteration in self.windows:
            with contextlib.suppress(MoEtionError):
                return self.read(iteration)
        return None

    @property
    def lineage(self) -> dict[str, Any] | None:
        """How the fit began that the newest window belongs to."""
        found = None if self.newest is None else self.newest.extra.get("lineage")
        return found if isinstance(found, dict) else None


def find_neighbours(memory_dir: Path | str | None = None, persist_dir: str | None = None) -> list[Neighbour]:
    """All jobs on this machine's host memory and, if given, on a storage tier. Never raises: it only informs.

    Args:
        memory_dir: base directory of host memory; None for the default one.
        persist_dir: directory or fsspec URL of the storage tier; None for none.

    Returns:
        One entry a rank, the youngest first; on storage only those of rank 0.
    """
    memory = default_base_dir()[0] if memory_dir is None else Path(memory_dir)
    found = [*_local(memory, "host memory")]
    if persist_dir is not None and is_local_url(persist_dir):
        found += _local(local_path_of(persist_dir), "disk", ranks="rank-00000")
    elif persist_dir is not None:
        found += _remote(persist_dir)
    return sorted(found, key=lambda neighbour: neighbour.age_seconds)


def _local(base: Path, tier: str, ranks: str = "rank-*") -> Iterator[Neighbour]:
    with contextlib.suppress(OSError):
        for path in sorted(base.glob(f"*/{ranks}")):
            if path.is_dir() and not path.is_symlink() and not path.parent.is_symlink():
                places = (path, path / "windows", path / "job.json")
                times = [os.lstat(place).st_mtime for place in places if os.path.lexists(place)]
                age = max(0.0, time.time() - max(times, default=0.0))
                with contextlib.suppress(MoEtionError):
                    yield _describe(LocalRoot(path), path.parent.name, path.name, tier, is_locked(path), age)


def _remote(url: str) -> Iterator[Neighbour]:
    with contextlib.suppress(Exception):  # whatever a file system's client raises
        fs, base = fsspec.core.url_to_fs(url)
        for entry in fs.ls(base, detail=True):
            job = posixpath.basename(entry["name"].rstrip("/"))
            root = RemoteRoot(f"{url.rstrip('/')}/{job}/rank-00000")
            with contextlib.suppress(MoEtionError):
                if root.read_note("job.json") is not None:
                    yield _describe(root, job, "rank-00000", "storage", False, None)


def _describe(root: Root, job: str, rank_name: str, tier: str, alive: bool, age: float | None) -> Neighbour:
    note = _note(root)
    found = WindowSet(root, job=None, rank=None)
    pid, created = note.get("pid"), note.get("created")
    opened_at = float(created) if isinstance(created, (int, float)) else 0.0
    if age is None:
        age = max(0.0, time.time() - opened_at) if opened_at else 0.0
    argv = note.get("argv")
    return Neighbour(
        job=job,
        rank_name=rank_name,
        tier=tier,
        location=root.location,
        script=str(note.get("script") or ""),
        argv=tuple(map(str, argv)) if isinstance(argv, list) else (),
        cwd=str(note.get("cwd") or ""),
        host=str(note.get("host") or ""),
        pid=pid if isinstance(pid, int) else None,
        alive=alive,
        age_seconds=age,
        opened_at=opened_at,
        nbytes=sum(root.files().values()),
        windows=tuple(found.windows()),
        aside=tuple(iteration for course in found.courses_aside() for iteration in found.windows(course)),
        trained=found.is_trained(),
        completed=found.completed,
        read=found.read_manifest,
    )


def _note(root: Root) -> dict[str, Any]:
    try:
        note = json.loads(root.read_note("job.json") or b"{}")
    except (MoEtionError, ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}
