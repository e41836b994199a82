"""Jobs that have windows somewhere: in this machine's memory and on storage, live and dead, and what dead ones left."""

from __future__ import annotations

import contextlib
import functools
import os
import posixpath
import shlex
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from moetion_lightning.errors import JobBusyError, MoEtionError, StoreError
from moetion_lightning.storage.disk import is_local_url, local_path_of
from moetion_lightning.storage.folders import FILES
from moetion_lightning.storage.job_note import is_of_this_process, read_job_note
from moetion_lightning.storage.local import LocalPlace
from moetion_lightning.storage.lock import JobLock, is_locked
from moetion_lightning.storage.manifest import Manifest
from moetion_lightning.storage.place import Place
from moetion_lightning.storage.posix import check_private_dir, explain_os_errors, make_private_dir
from moetion_lightning.storage.remote import RemotePlace
from moetion_lightning.storage.tier import Tier
from moetion_lightning.units import age_text, bytes_text

__all__ = [
    "JobInfo",
    "clean_stale",
    "default_base_dir",
    "describe_place",
    "find_everywhere",
    "find_jobs",
    "prepare_base_dir",
    "remove_if_ours",
    "who_holds_memory",
]

_SHARED_MEMORY = Path("/dev/shm")
_LOOK_AGAIN_SECONDS = 30.0


def default_base_dir() -> Path:
    """``/dev/shm/moetion-<uid>``, or the same name in the temporary directory where there is no /dev/shm.

    That may be on a disk: slower, but as safe.
    """
    is_usable = _SHARED_MEMORY.is_dir() and os.access(_SHARED_MEMORY, os.W_OK | os.X_OK)
    return (_SHARED_MEMORY if is_usable else Path(tempfile.gettempdir())) / f"moetion-{os.getuid()}"


def prepare_base_dir(path: Path) -> None:
    """Create the base directory of host memory and check that no other user could have put anything there.

    Raises:
        StoreError: it is a symbolic link, belongs to another user, others may write to it, or it cannot be created.
    """
    make_private_dir(path)
    check_private_dir(path, os.getuid(), "another base")


@dataclass(frozen=True, kw_only=True)
class JobInfo:
    """What one rank of one job has in one place: its own windows, or its copies of another rank's.

    Args:
        name: job, which ``MOETION_JOB_ID`` takes.
        rank_name: ``rank-00000``, or ``replica-00003-at-00000`` for rank 0's copies of rank 3's windows.
        tier: ``"host memory"``, ``"disk"`` or ``"storage"``.
        location: path or URL of the rank directory.
        alive: whether a live process holds its lock.
        pid: process that owned it last, if known.
        script: absolute path of the main file that made the windows, "" if unknown.
        argv: its command line.
        cwd: its working directory.
        opened_at: when a process last opened it to write, seconds since the epoch; 0 if unknown.
        age_seconds: since the last commit where that is known, else since it was opened.
        nbytes: size of all files in bytes.
        windows: iterations of committed windows, newest first.
        aside: iterations of windows of earlier courses of training, which lie aside, the latest course first.
        trained: training came to its end.
        completed: and so did the process.
        read: reads a manifest.
    """

    name: str
    rank_name: str
    tier: str
    location: str
    alive: bool
    pid: int | None
    script: str
    argv: tuple[str, ...]
    cwd: str
    opened_at: float
    age_seconds: float
    nbytes: int
    windows: tuple[int, ...]
    aside: tuple[int, ...]
    trained: bool
    completed: bool
    read: Callable[[int], Manifest]

    @property
    def newest(self) -> Manifest | None:
        """The newest current window's manifest (not verified), None when none can be read."""
        for iteration in self.windows:
            with contextlib.suppress(MoEtionError):
                return self.read(iteration)
        return None


def describe_place(place: Place, name: str, rank_name: str, tier: str) -> JobInfo:
    """What is in a place. Raises ``StoreError`` when it cannot be listed."""
    found, note = Tier(place), read_job_note(place)
    pid, argv, opened_at = note.get("pid"), note.get("argv"), float(note.get("created", 0))
    changed_at = place.changed_at() or opened_at
    return JobInfo(
        name=name,
        rank_name=rank_name,
        tier=tier,
        location=place.location,
        alive=isinstance(place, LocalPlace) and is_locked(place.path),
        pid=pid if isinstance(pid, int) else None,
        script=_text(note, "script"),
        argv=tuple(map(str, argv)) if isinstance(argv, list) else (),
        cwd=_text(note, "cwd"),
        opened_at=opened_at,
        age_seconds=max(0.0, time.time() - changed_at) if changed_at else 0.0,
        nbytes=sum(place.entries(FILES).values()),
        windows=tuple(found.windows()),
        aside=tuple(iteration for course in found.courses_aside() for iteration in found.windows(course)),
        trained=found.is_trained(),
        completed=found.completed,
        read=found.read_manifest,
    )


def _text(note: dict[str, Any], key: str) -> str:
    return str(note.get(key) or "")


def find_jobs(base_dir: Path | None = None) -> list[JobInfo]:
    """All jobs of this user in host memory, live and dead, one entry a rank and one a replica.

    Args:
        base_dir: None for the default one.

    Raises:
        StoreError: the base directory is not safe (see :func:`prepare_base_dir`) or cannot be read.
    """
    base = default_base_dir() if base_dir is None else Path(base_dir)
    if not os.path.lexists(base):
        return []
    check_private_dir(base, os.getuid(), "another base")
    return [_describe(path, "host memory") for path in _rank_dirs(base, "rank-*", "replica-*")]


def find_everywhere(memory_dir: Path | str | None = None, persist_dir: str | None = None) -> list[JobInfo]:
    """All jobs in this machine's memory and, if given, on storage. Never raises: it only informs.

    Args:
        memory_dir: base directory of host memory; None for the default one.
        persist_dir: directory or fsspec URL of storage; None for none.

    Returns:
        One entry a rank, the youngest first; on storage only those of rank 0.
    """
    memory = default_base_dir() if memory_dir is None else Path(memory_dir)
    found = [*_in_directory(memory, "host memory", "rank-*")]
    if persist_dir is not None and is_local_url(persist_dir):
        found += _in_directory(local_path_of(persist_dir), "disk", "rank-00000")
    elif persist_dir is not None:
        found += _on_storage(persist_dir)
    return sorted(found, key=lambda info: info.age_seconds)


def _in_directory(base: Path, tier: str, pattern: str) -> Iterator[JobInfo]:
    with contextlib.suppress(MoEtionError):
        for path in _rank_dirs(base, pattern):
            with contextlib.suppress(MoEtionError):
                yield _describe(path, tier)


def _on_storage(url: str) -> Iterator[JobInfo]:
    with contextlib.suppress(Exception):  # whatever a file system's client raises
        fs, base = fsspec.core.url_to_fs(url)
        for entry in fs.ls(base, detail=True):
            job = posixpath.basename(entry["name"].rstrip("/"))
            place = RemotePlace(f"{url.rstrip('/')}/{job}/rank-00000")
            with contextlib.suppress(MoEtionError):
                if read_job_note(place):
                    yield describe_place(place, job, "rank-00000", "storage")


def _rank_dirs(base: Path, *patterns: str) -> list[Path]:
    with explain_os_errors("list", base):
        jobs = [job for job in sorted(base.iterdir()) if job.is_dir() and not job.is_symlink()]
        found = [path for job in jobs for path in sorted(p for pattern in patterns for p in job.glob(pattern))]
        return [path for path in found if path.is_dir() and not path.is_symlink()]


def _describe(path: Path, tier: str) -> JobInfo:
    return describe_place(LocalPlace(path), path.parent.name, path.name, tier)


def who_holds_memory(base_dir: Path, own_job: str) -> str:
    """For messages about full memory: which other jobs hold how much there, and what frees it; "" if none does.

    Looked up at most twice a minute.

    Args:
        base_dir: base directory of the host-memory tier.
        own_job: the job that wants room.
    """
    return _who_holds_memory(base_dir, own_job, int(time.monotonic() / _LOOK_AGAIN_SECONDS))


@functools.lru_cache(maxsize=8)
def _who_holds_memory(base_dir: Path, own_job: str, _now: int) -> str:
    jobs: dict[str, list[JobInfo]] = {}
    with contextlib.suppress(StoreError):
        for info in find_jobs(base_dir):
            if info.name != own_job and info.nbytes:
                jobs.setdefault(info.name, []).append(info)
    texts: dict[bool, list[str]] = {True: [], False: []}
    which = ""
    for name, infos in jobs.items():
        size = bytes_text(sum(info.nbytes for info in infos))
        pids = sorted({info.pid for info in infos if info.pid is not None})
        process = f"process {', '.join(map(str, pids))}" if pids else "process unknown"
        if any(info.alive for info in infos):
            texts[True].append(f"{name} ({size}, {process})")
        else:
            age = age_text(min(info.age_seconds for info in infos))
            texts[False].append(f"{name} ({size}, {age} old, {process} is gone)")
            which += f" --job {name}"
    text = f" Live jobs hold memory there: {', '.join(texts[True])}." if texts[True] else ""
    if texts[False]:
        where = "" if base_dir == default_base_dir() else f" --memory-dir {shlex.quote(str(base_dir))}"
        text += (
            f" Dead jobs hold memory there: {', '.join(texts[False])}. If none of them is to be started again: "
            f"`moetion clean{where} --older-than 0{which}`."
        )
    return text


def clean_stale(
    base_dir: Path | None = None,
    older_than_seconds: float = 0.0,
    keep: Collection[str] = (),
    only: Collection[str] | None = None,
    *,
    dry_run: bool = False,
) -> list[JobInfo]:
    """Remove what dead jobs left in host memory.

    Args:
        base_dir: None for the default one.
        older_than_seconds: leave jobs whose last commit is younger: they may be restarted soon.
        keep: names of jobs to leave, whatever their age.
        only: names of the jobs to remove; None for all.
        dry_run: remove nothing.

    Returns:
        What was removed, or would be.

    Raises:
        StoreError: the base directory is not safe or cannot be changed.
    """
    return [
        info
        for info in find_jobs(base_dir)
        if not info.alive
        and info.name not in keep
        and (only is None or info.name in only)
        and info.age_seconds >= older_than_seconds
        and (dry_run or _remove(Path(info.location)))
    ]


def remove_if_ours(path: Path) -> None:
    """Remove a rank directory that this process was the last one to own, unless another one owns it now."""
    if is_of_this_process(LocalPlace(path)):
        _remove(path)


def _remove(path: Path) -> bool:
    """Remove a rank directory. Returns False when a live process owns it: it came back to life."""
    lock = JobLock(path)
    try:
        lock.acquire()
    except JobBusyError:
        return False
    try:
        LocalPlace(path, lock.check).remove_all()
    finally:
        lock.release()
    return True
