"""Files of this machine: read only when they are regular, written and named so that a crash leaves old or new.

Files and directories are private (0600, 0700). What is read is opened without following symbolic links and without
waiting (a FIFO put in place of a file must not hang a restore), and must be a regular file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from moetion_lightning.errors import CorruptSnapshotError, MoEtionError, StoreError
from moetion_lightning.storage.manifest import FileRecord

__all__ = [
    "check_file",
    "check_private_dir",
    "check_size",
    "explain_os_errors",
    "make_private_dir",
    "read_regular",
    "remove_path",
    "sync_dir",
    "write_all",
]

_CHUNK_BYTES = 4 * 1024 * 1024
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REMEDY = "Restore from another window or tier."


@contextlib.contextmanager
def explain_os_errors(what: str, path: object) -> Iterator[None]:
    """Turn an ``OSError`` of the operating system into a :class:`StoreError` that names the file and the remedy."""
    try:
        yield
    except MoEtionError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            remedy = "Free space there, keep fewer windows, or choose another directory."
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = "Give this user the right to read and write there, or choose another directory."
        else:
            remedy = "Check the directory, or choose another one."
        raise StoreError(f"{path}: cannot {what}: {error.strerror or error}. {remedy}") from error


def make_private_dir(path: Path) -> None:
    """Create a directory (0700) with its parents; a symbolic link or another kind of file in its place is refused."""
    with explain_os_errors("create the directory", path):
        for missing in reversed([p for p in (path, *path.parents) if not p.exists()]):
            missing.mkdir(mode=0o700, exist_ok=True)  # parents=True would give parents the umask's mode
            sync_dir(missing.parent)  # else a power cut may take the directory, with all that was synchronised in it
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            raise StoreError(f"{path}: a symbolic link is in the place of a directory. Remove it.")
        if not stat.S_ISDIR(mode):
            raise StoreError(f"{path} is a file; expected a directory, or nothing yet. Give another directory.")


def check_private_dir(path: Path, user: int, other: str) -> None:
    """Check that no other user could have put anything into a directory.

    Args:
        path: the directory.
        user: whom it must belong to.
        other: what to choose instead, for messages.

    Raises:
        StoreError: it is no directory (a symbolic link, perhaps), another user's, or others may write to it.
    """
    with explain_os_errors("inspect", path):
        status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise StoreError(f"{path}: not a directory (a symbolic link, perhaps). Remove it, or choose {other}.")
    if status.st_uid != user:
        raise StoreError(f"{path}: belongs to user {status.st_uid}, this process is user {user}. Choose {other}.")
    if status.st_mode & 0o022:
        raise StoreError(
            f"{path}: other users may write there (mode {stat.S_IMODE(status.st_mode):o}). Run: chmod 700 {path}"
        )


@contextlib.contextmanager
def _open_regular(path: Path) -> Iterator[tuple[int, int]]:
    """Open for reading; yields (descriptor, size in bytes)."""
    with explain_os_errors("read", path):
        try:
            # Ask before opening: opening some kinds of file (devices) has effects.
            if not stat.S_ISREG(os.lstat(path).st_mode):
                raise CorruptSnapshotError(f"{path}: not a regular file. Remove it. {_REMEDY}")
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise CorruptSnapshotError(f"{path}: the file is missing. {_REMEDY}") from error
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise CorruptSnapshotError(f"{path}: not a regular file. Remove it. {_REMEDY}")
            yield fd, status.st_size
        finally:
            os.close(fd)


def read_regular(path: Path, *, max_bytes: int) -> bytes:
    """Read a whole regular file.

    Raises:
        CorruptSnapshotError: missing, not a regular file (symbolic link, directory, FIFO), or too long.
        StoreError: the operating system refuses.
    """
    with _open_regular(path) as (fd, size):
        if size > max_bytes:
            raise CorruptSnapshotError(f"{path}: {size} bytes, at most {max_bytes} are read. {_REMEDY}")
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read(size)


def check_file(path: Path, record: FileRecord, *, on_chunk: Callable[[memoryview], object] | None = None) -> None:
    """Compare a file's size and checksum.

    Args:
        path: a regular file.
        record: what it must be.
        on_chunk: also given each chunk, in order (to copy in the same pass).

    Raises:
        CorruptSnapshotError: missing, not a regular file, or with another content.
    """
    digest = xxhash.xxh3_128()
    chunk = memoryview(bytearray(min(_CHUNK_BYTES, max(record.nbytes, 1))))
    with _open_regular(path) as (fd, size):
        done = 0 if size == record.nbytes else size
        while size == record.nbytes and (count := os.readv(fd, [chunk])):
            digest.update(chunk[:count])
            if on_chunk is not None:
                on_chunk(chunk[:count])
            done += count
    if done != record.nbytes:
        raise CorruptSnapshotError(f"{path}: {done} bytes, committed with {record.nbytes}. {_REMEDY}")
    if (checksum := f"xxh3:{digest.hexdigest()}") != record.checksum:
        raise CorruptSnapshotError(f"{path}: checksum {checksum}, committed with {record.checksum}. {_REMEDY}")


def check_size(path: Path, nbytes: int) -> None:
    """Check that a path is a regular file of a size. Raises ``CorruptSnapshotError``."""
    with _open_regular(path) as (_, size):
        if size != nbytes:
            raise CorruptSnapshotError(f"{path}: {size} bytes, committed with {nbytes}. {_REMEDY}")


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write everything: ``os.write`` may write less."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def sync_dir(path: Path) -> None:
    """Make renames within a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_path(path: Path) -> None:
    """Remove a file, or a directory that somebody put in its place; nothing happens when there is none."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        if path.is_symlink() or not path.is_dir():
            raise
        shutil.rmtree(path)
