"""Who owns a directory in host memory: a lock that the kernel gives up whenever the process ends."""

from __future__ import annotations

import errno
import fcntl
import os
import time
import weakref
from pathlib import Path

from moetion_lightning.errors import JobBusyError, StoreError
from moetion_lightning.storage.job_note import read_job_note
from moetion_lightning.storage.local import LocalPlace
from moetion_lightning.storage.posix import explain_os_errors, make_private_dir

__all__ = ["JobLock", "is_locked"]

_RETRY_SECONDS = 0.02


class JobLock:
    """Exclusive ownership of one rank directory.

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
                and :func:`is_locked` holds it for an instant while it looks.

        Raises:
            JobBusyError: a live process holds it; the message names its process id and start time.
            StoreError: the directory or the lock file cannot be created.
        """
        deadline = time.monotonic() + wait_seconds
        while (fd := self._try()) is None:
            if time.monotonic() >= deadline:
                raise JobBusyError(self._busy_message())
            time.sleep(_RETRY_SECONDS)
        self._fd = fd
        _held.add(self)

    def check(self) -> None:
        """Before anything is changed. Raises ``StoreError`` when the lock is not held."""
        if self._fd is None:
            raise StoreError(f"{self.path}: the tier is not open. Call open() first.")

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
        note = read_job_note(LocalPlace(self.path))
        owner = "another process"
        if "pid" in note:
            started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(note.get("created", 0)))
            owner = f"process {note['pid']} on {note.get('host', 'this machine')}, started {started}"
        return (
            f"{self.path}: {owner}, owns the state of this job and rank. Wait for it to end or stop it; to run "
            "both at once, give this run another job_id=."
        )


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


_held: weakref.WeakSet[JobLock] = weakref.WeakSet()


def _forget_in_child() -> None:
    # A forked data-loader worker may outlive its killed parent by seconds. Were the descriptor left open in it, the
    # restarted run would find the lock held. Closing a copy does not unlock the parent's.
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_forget_in_child)
