"""A place in a local directory: on a disk, or in this node's memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

from moetion_lightning.storage.folders import ASIDE_NAME, FILES, JOB_NOTE, WINDOWS
from moetion_lightning.storage.manifest import FileRecord
from moetion_lightning.storage.place import MAX_NOTE_BYTES, Incoming, Place, nobody
from moetion_lightning.storage.posix import (
    check_file,
    check_size,
    explain_os_errors,
    make_private_dir,
    read_regular,
    remove_path,
    sync_dir,
    write_all,
)

__all__ = ["LocalPlace"]


_READINGS = 20  # of a folder in which files come and go all the time
_THIS_RUN = uuid.uuid4().hex[:12]  # processes of two machines may have the same number


class _File:
    """A file under a temporary name of this thread's own: a process that lost its place may write at the same time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        whose = f"{_THIS_RUN}-{os.getpid():x}-{threading.get_ident():x}"
        self._temporary = path.with_name(f".{path.name}.{whose}.tmp")
        self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def append(self, data: bytes | memoryview) -> None:
        write_all(self._fd, data)

    def finish(self) -> None:
        os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1

    def publish(self) -> None:
        if self._path.is_dir() and not self._path.is_symlink():
            shutil.rmtree(self._path)  # rename cannot replace a directory that somebody put there
        os.replace(self._temporary, self._path)

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            if self._fd >= 0:
                os.close(self._fd)
            self._temporary.unlink()


class LocalPlace(Place):
    """See :class:`~moetion_lightning.storage.place.Place`.

    Args:
        path: the directory.
        may_change: as there; the default allows no change.
    """

    def __init__(self, path: Path, may_change: Callable[[], object] = nobody) -> None:
        super().__init__(str(path), may_change)
        self.path = path
        self.files_dir = path / FILES

    def entries(self, folder: str) -> dict[str, int]:
        """Names and sizes in bytes, leftovers of interrupted copies included.

        A file that comes, and one that goes for it while the folder is read, may both be missing in one reading: the
        answer is one that was read twice.
        """
        sizes = self._sizes(folder)
        for _ in range(_READINGS):
            before, sizes = sizes, self._sizes(folder)
            if before.keys() == sizes.keys():
                break
        return sizes

    def _sizes(self, folder: str) -> dict[str, int]:
        sizes = {}
        for entry in self._scan(folder):
            with contextlib.suppress(FileNotFoundError):
                sizes[entry.name] = entry.stat(follow_symlinks=False).st_size
        return sizes

    def folders(self) -> list[str]:
        """Everything that is there."""
        return [entry.name for entry in self._scan("")]

    def read(self, name: str, max_bytes: int = MAX_NOTE_BYTES) -> bytes | None:
        """Content of a regular file, None when absent."""
        path = self.path / name
        return read_regular(path, max_bytes=max_bytes) if os.path.lexists(path) else None

    def local_path(self, record: FileRecord) -> Path:
        """The file itself."""
        path = self.files_dir / record.name
        check_size(path, record.nbytes)
        return path

    def verify(self, record: FileRecord) -> None:
        """Compare size and checksum."""
        check_file(self.files_dir / record.name, record)

    def changed_at(self) -> float:
        """From the times of folders and notes."""
        times = [0.0]
        for name in ("", WINDOWS, JOB_NOTE, *filter(ASIDE_NAME.fullmatch, self.folders())):
            with contextlib.suppress(OSError):
                times.append(os.lstat(self.path / name).st_mtime)
        return max(times)

    def sync(self, folder: str) -> None:
        """A rename is durable when its folder is."""
        with self._explained("flush", folder):
            sync_dir(self.path / folder)

    def remove_all(self) -> None:
        """Remove the directory, and the job's when it was the last.

        Manifests go first, so that a kill in the middle leaves no window without its files.
        """
        for folder in (WINDOWS, *filter(ASIDE_NAME.fullmatch, self.folders())):
            self.remove_folder(folder)
        self.may_change()
        with self._explained("remove", ""):
            shutil.rmtree(self.path)
            with contextlib.suppress(OSError):
                self.path.parent.rmdir()

    def _scan(self, folder: str) -> list[os.DirEntry[str]]:
        with self._explained("list", folder):
            try:
                with os.scandir(self.path / folder) as found:
                    return list(found)
            except FileNotFoundError:
                return []

    def _explained(self, what: str, name: str) -> contextlib.AbstractContextManager[None]:
        return explain_os_errors(what, self.path / name)

    def _incoming(self, name: str, nbytes: int) -> Incoming:
        return _File(self.path / name)

    def _make_folder(self, folder: str) -> None:
        make_private_dir(self.path / folder)

    def _transfer(self, source: str, target: str) -> None:
        os.rename(self.path / source, self.path / target)

    def _rename_folder(self, source: str, target: str) -> bool:
        os.rename(self.path / source, self.path / target)  # takes the place of an empty folder, too
        make_private_dir(self.path / WINDOWS)
        sync_dir(self.path)
        return True

    def _remove(self, name: str) -> None:
        remove_path(self.path / name)

    def _remove_empty(self, folder: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.path / folder).rmdir()
            sync_dir(self.path)
