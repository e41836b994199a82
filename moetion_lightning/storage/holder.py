"""The process that holds a rank directory's lock, so surely that a signal may be sent to it."""

from __future__ import annotations

import os
import select
import signal
from dataclasses import dataclass
from pathlib import Path

from moetion_lightning.storage.jobs import JobInfo

__all__ = ["LockHolder", "holder_of"]

_END_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class LockHolder:
    """A process of this user that has a rank directory's lock open.

    Args:
        pid: Its process id.
        rank_name: ``rank-00000``.
        lock: The lock's file.
    """

    pid: int
    rank_name: str
    lock: Path

    def kill(self) -> bool:
        """Send SIGKILL, to this process and to no later one of the same number, and wait for its end.

        Returns:
            False if it has ended, or holds the lock no more.
        """
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if not _holds(self.pid, self.lock):  # asked while the number is taken: nobody else can have it now
                return False
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            select.select([descriptor], [], [], _END_SECONDS)
        except ProcessLookupError:
            return False
        finally:
            os.close(descriptor)
        return True


def holder_of(info: JobInfo) -> LockHolder | None:
    """The live process of a rank; None if there is none that is this user's and holds the lock.

    Args:
        info: Of a rank directory in host memory.
    """
    lock = Path(info.location) / "lock"
    if not info.alive or info.pid is None or info.pid == os.getpid() or not _holds(info.pid, lock):
        return None
    return LockHolder(pid=info.pid, rank_name=info.rank_name, lock=lock)


def _holds(pid: int, lock: Path) -> bool:
    """Whether a process of this user has the file open."""
    folder = Path(f"/proc/{pid}")
    try:
        if folder.stat().st_uid != os.getuid():
            return False
        wanted = lock.stat()
        for descriptor in (folder / "fd").iterdir():
            try:
                found = descriptor.stat()
            except OSError:  # it was closed meanwhile
                continue
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    except OSError:
        return False
    return False
