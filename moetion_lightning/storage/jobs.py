"""Who owns the state under a host-memory base directory: locks, job descriptions, and what dead jobs left behind."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import shlex
import shutil
import stat
import sys
import tempfile
import time
import weakref
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetion_lightning.errors import CorruptSnapshotError, JobBusyError, StoreError
from moetion_lightning.storage.folders import WINDOWS
from moetion_lightning.storage.local import LocalRoot, explain_os_errors, make_private_dir, read_regular
from moetion_lightning.storage.owner import OWNER_NOTE, boot_id
from moetion_lightning.units import age_text, bytes_text

__all__ = [
    "JobInfo",
    "JobLock",
    "clean_stale",
    "default_base_dir",
    "find_jobs",
    "job_note",
    "prepare_base_dir",
    "stale_jobs",
    "who_holds_memory",
]

_SHARED_MEMORY = Path("/dev/shm")
_RETRY_SECONDS = 0.02


def default_base_dir() -> tuple[Path, bool]:
    """``/dev/shm/moetion-<uid>``, or the same name in the temporary directory where there is no /dev/shm.

    Returns:
        The path, and whether it is the fallback (which may be on a disk: slower, but as safe).
    """
    name = f"moetion-{os.getuid()}"
    if _SHARED_MEMORY.is_dir() and os.access(_SHARED_MEMORY, os.W_OK | os.X_OK):
        return _SHARED_MEMORY / name, False
    return Path(tempfile.gettempdir()) / name, True


def prepare_base_dir(path: Path) -> None:
    """Create the base directory and check that no other user could have put anything there.

    Raises:
        StoreError: it is a symbolic link, belongs to another user, others may write to it, or it cannot be created.
    """
    make_private_dir(path)
    check_base_dir(path)


def check_storage_dir(base: Path, rank_dir: Path) -> None:
    """Check that no other user could put windows in place of ours on storage.

    The base may be a group's, as shared folders are, and a link; what is below it is this user's alone. On network
    file systems this user may have another number: what counts is that of a file that it has just written.

    Args:
        base: ``persist_dir``.
        rank_dir: This rank's directory below it; this process has written a file there.

    Raises:
        StoreError: everybody may write to the base, or the job's or rank's directory is another user's.
    """
    with explain_os_errors("inspect", base):
        mode = os.stat(base).st_mode
        if mode & 0o002 and not mode & stat.S_ISVTX:
            raise StoreError(
                f"{base}: all users may write there (mode {stat.S_IMODE(mode):o}), and could put other windows in "
                f"place of this job's. Run: chmod o-w {base}"
            )
        mine = os.lstat(rank_dir / OWNER_NOTE).st_uid
        for path in (rank_dir.parent, rank_dir):
            status = os.lstat(path)
            if status.st_uid != mine:
                raise StoreError(
                    f"{path}: belongs to user {status.st_uid}, this process writes as {mine}. Choose another "
                    "persist_dir or job_id."
                )
            if status.st_mode & 0o022:
                raise StoreError(
                    f"{path}: other users may write there (mode {stat.S_IMODE(status.st_mode):o}). Run: chmod 700 "
                    f"{path}"
                )


def check_base_dir(path: Path) -> None:
    """The checks of :func:`prepare_base_dir` alone."""
    with explain_os_errors("inspect", path):
        status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise StoreError(f"{path}: not a directory (a symbolic link, perhaps). Remove it, or choose another base.")
    if status.st_uid != os.getuid():
        raise StoreError(
            f"{path}: belongs to user {status.st_uid}, this process runs as {os.getuid()}. Choose another base."
        )
    if status.st_mode & 0o022:
        raise StoreError(
            f"{path}: other users may write there (mode {stat.S_IMODE(status.st_mode):o}). Run: chmod 700 {path}"
        )


class JobLock:
    """Exclusive ownership of one rank directory, given up by the kernel whenever the process ends.

    Args:
        path: the rank directory; created when absent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def acquire(self, *, wait_seconds: float = 0.0) -> None:
        """Take the lock.

        Args:
            wait_seconds: how long to try while another process holds it: a killed process may take a moment to die,
                and :func:`find_jobs` holds a lock for an instant while it looks.

        Raises:
            JobBusyError: a live process holds it; the message names its process id and start time.
            StoreError: the directory or the lock file cannot be created.
        """
        deadline = time.monotonic() + wait_seconds
        while True:
            fd = self._try()
            if fd is not None:
                break
            if time.monotonic() >= deadline:
                raise JobBusyError(self._busy_message())
            time.sleep(_RETRY_SECONDS)
        self._fd = fd
        _held.add(self)

    def release(self) -> None:
        """Give the lock up; nothing happens when it is not held."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            _held.discard(self)

    def _try(self) -> int | None:
        make_private_dir(self.path)
        lock = self.path / "lock"
        with explain_os_errors("lock", lock):
            try:
                fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
            except FileNotFoundError:
                return None  # a cleaner removed the directory in between
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The file may have been removed between open and lock: then another process can hold a newer one.
                if os.fstat(fd).st_ino == os.lstat(lock).st_ino:
                    return fd
            except (BlockingIOError, FileNotFoundError):
                pass
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
            return None

    def _busy_message(self) -> str:
        note = read_job_note(self.path)
        owner = "another process"
        if "pid" in note:
            started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(note.get("created", 0)))
            owner = f"process {note['pid']} on {note.get('host', 'this machine')}, started {started}"
        return (
            f"{self.path}: {owner}, owns the state of this job and rank. Wait for it to end or stop it; to run "
            "both at once, give this run another job_id=."
        )


_held: weakref.WeakSet[JobLock] = weakref.WeakSet()


def _forget_in_child() -> None:
    # A forked data-loader worker may outlive its killed parent by seconds. Were the descriptor left open in it, the
    # restarted run would find the lock held. Closing a copy does not unlock the parent's.
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_forget_in_child)


def job_note(*, job: str, rank: int, world_size: int) -> dict[str, Any]:
    """What ``job.json`` says: who owns the directory, for people and for messages."""
    return {
        "job": job,
        "rank": rank,
        "world_size": world_size,
        "pid": os.getpid(),
        "host": platform.node(),
        "boot_id": boot_id(),
        "argv": sys.argv,
        "cwd": os.getcwd(),
        "script": main_file(),
        "created": time.time(),
    }


def main_file() -> str:
    """Absolute path of the program's main file; "" where there is none (a notebook, ``python -c``)."""
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None) or (sys.argv[0] if sys.argv else "")
    return os.path.abspath(file) if file and os.path.exists(file) else ""


def read_job_note(path: Path) -> dict[str, Any]:
    """Content of ``job.json``, empty when it is absent or damaged: it only informs."""
    try:
        note = json.loads(read_regular(path / "job.json", max_bytes=1 << 20))
    except (CorruptSnapshotError, StoreError, ValueError, RecursionError):
        return {}
    if not isinstance(note, dict) or not isinstance(note.get("created", 0), (int, float)):
        return {}
    return note


def is_of_this_process(note: Mapping[str, Any]) -> bool:
    """Whether a ``job.json`` is this process's."""
    mine = job_note(job="", rank=0, world_size=1)
    return all(note.get(key) == mine[key] for key in ("pid", "host", "boot_id"))


@dataclass(frozen=True, kw_only=True)
class JobInfo:
    """What one rank of one job has in host memory: its own windows, or its copies of another rank's.

    Args:
        name: job.
        rank_name: ``rank-00000``, or ``replica-00003-at-00000`` for rank 0's copies of rank 3's windows.
        path: the rank directory.
        pid: process that owned it last, if known.
        alive: whether a live process holds its lock.
        age_seconds: since the last commit, or since it was opened.
        nbytes: size of all files in bytes.
        windows: iterations of committed windows, newest first.
        aside: iterations of windows of earlier courses of training, which lie aside, the latest course first.
    """

    name: str
    rank_name: str
    path: Path
    pid: int | None
    alive: bool
    age_seconds: float
    nbytes: int
    windows: tuple[int, ...]
    aside: tuple[int, ...] = ()


def find_jobs(base_dir: Path | None = None) -> list[JobInfo]:
    """All jobs of this user in host memory, live and dead, one entry a rank and one a replica.

    Args:
        base_dir: None for the default one.

    Raises:
        StoreError: the base directory is not safe (see :func:`prepare_base_dir`) or cannot be read.
    """
    base = default_base_dir()[0] if base_dir is None else Path(base_dir)
    if not os.path.lexists(base):
        return []
    check_base_dir(base)
    return [_describe(path) for path in _rank_dirs(base)]


def who_holds_memory(base_dir: Path, own_job: str) -> str:
    """For messages about full memory: which other jobs hold how much there, and what frees it; "" if none does.

    Args:
        base_dir: base directory of the host-memory tier.
        own_job: the job that wants room.
    """
    jobs: dict[str, list[JobInfo]] = {}
    with contextlib.suppress(StoreError):
        for info in find_jobs(base_dir):
            if info.name != own_job and info.nbytes:
                jobs.setdefault(info.name, []).append(info)
    dead, alive, names = [], [], []
    for name, infos in jobs.items():
        size = bytes_text(sum(info.nbytes for info in infos))
        pids = sorted({info.pid for info in infos if info.pid is not None})
        process = f"process {', '.join(map(str, pids))}" if pids else "process unknown"
        age = age_text(min(info.age_seconds for info in infos))
        if any(info.alive for info in infos):
            alive.append(f"{name} ({size}, {process})")
        else:
            dead.append(f"{name} ({size}, {age} old, {process} is gone)")
            names.append(name)
    text = f" Live jobs hold memory there: {', '.join(alive)}." if alive else ""
    if dead:
        where = "" if base_dir == default_base_dir()[0] else f" --memory-dir {shlex.quote(str(base_dir))}"
        which = "".join(f" --job {name}" for name in names)
        text += (
            f" Dead jobs hold memory there: {', '.join(dead)}. If none of them is to be started again: "
            f"`moetion clean{where} --older-than 0{which}`."
        )
    return text


def stale_jobs(
    base_dir: Path | None = None,
    older_than_seconds: float = 0.0,
    keep: Collection[str] = (),
    only: Collection[str] | None = None,
) -> list[JobInfo]:
    """What :func:`clean_stale` would remove."""
    return [
        info
        for info in find_jobs(base_dir)
        if not info.alive
        and info.name not in keep
        and (only is None or info.name in only)
        and info.age_seconds >= older_than_seconds
    ]


def clean_stale(
    base_dir: Path | None = None,
    older_than_seconds: float = 0.0,
    keep: Collection[str] = (),
    only: Collection[str] | None = None,
) -> list[JobInfo]:
    """Remove what dead jobs left in host memory.

    Args:
        base_dir: None for the default one.
        older_than_seconds: leave jobs whose last commit is younger: they may be restarted soon.
        keep: names of jobs to leave, whatever their age.
        only: names of the jobs to remove; None for all.

    Returns:
        What was removed.

    Raises:
        StoreError: the base directory is not safe or cannot be changed.
    """
    removed = []
    for info in stale_jobs(base_dir, older_than_seconds, keep, only):
        lock = JobLock(info.path)
        try:
            lock.acquire()
        except JobBusyError:
            continue  # it came back to life
        try:
            remove_rank_dir(info.path)
        finally:
            lock.release()
        removed.append(info)
    return removed


def remove_if_ours(path: Path) -> None:
    """Remove a rank directory that this process was the last one to own, unless another one owns it now."""
    if not is_of_this_process(read_job_note(path)):
        return
    lock = JobLock(path)
    with contextlib.suppress(JobBusyError):
        lock.acquire()
        try:
            remove_rank_dir(path)
        finally:
            lock.release()


def remove_rank_dir(path: Path) -> None:
    """Remove a rank directory (its lock is held by the caller), and the job's when it was the last.

    Manifests go first, so that a kill in the middle leaves no window without its files.
    """
    with explain_os_errors("remove", path):
        root = LocalRoot(path)
        for folder in (WINDOWS, *root.courses_aside()):
            shutil.rmtree(path / folder, ignore_errors=True)
        shutil.rmtree(path)
        with contextlib.suppress(OSError):
            path.parent.rmdir()


def is_locked(path: Path) -> bool:
    """Whether a live process owns a rank directory."""
    try:
        fd = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EAGAIN)
    finally:
        os.close(fd)
    return False


def _rank_dirs(base: Path) -> Iterator[Path]:
    with explain_os_errors("list", base):
        for job in sorted(base.iterdir()):
            if job.is_dir() and not job.is_symlink():
                found = (p for pattern in ("rank-*", "replica-*") for p in job.glob(pattern))
                yield from sorted(p for p in found if p.is_dir() and not p.is_symlink())


def _describe(path: Path) -> JobInfo:
    root = LocalRoot(path)
    note = read_job_note(path)
    times = [0.0]
    for place in (path, root.windows_dir, path / "job.json", *(path / course for course in root.courses_aside())):
        with contextlib.suppress(OSError):
            times.append(os.lstat(place).st_mtime)
    pid = note.get("pid")
    return JobInfo(
        name=path.parent.name,
        rank_name=path.name,
        path=path,
        pid=pid if isinstance(pid, int) else None,
        alive=is_locked(path),
        age_seconds=max(0.0, time.time() - max(times)),
        nbytes=sum(root.files().values()),
        windows=tuple(root.iterations()),
        aside=tuple(iteration for course in root.courses_aside() for iteration in root.iterations(course)),
    )
