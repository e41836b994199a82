"""A tier root in a local directory: the file operations under host memory and disk.

Files and directories are private (0600, 0700). What is read is opened without following symbolic links and without
waiting (a FIFO put in place of a file must not hang a restore), and must be a regular file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import xxhash

from moetion_lightning.errors import CorruptSnapshotError, MoEtionError, StoreError
from moetion_lightning.storage.folders import ASIDE_NAME, MANIFEST_NAME, WINDOWS, manifest_name
from moetion_lightning.storage.manifest import FileRecord

__all__ = ["LocalRoot", "explain_os_errors", "hash_file", "make_private_dir", "read_regular", "write_atomically"]

_CHUNK_BYTES = 4 * 1024 * 1024
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REMEDY = "Restore from another window or tier."
OnStage = Callable[[str], None]


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


def hash_file(path: Path, nbytes: int, *, on_chunk: Callable[[memoryview], object] | None = None) -> str:
    """Checksum of a whole file in the form of :class:`FileRecord`.

    Args:
        path: a regular file.
        nbytes: the size that it must have.
        on_chunk: also given each chunk, in order (to copy in the same pass).

    Raises:
        CorruptSnapshotError: missing, not a regular file, another size.
    """
    digest = xxhash.xxh3_128()
    chunk = memoryview(bytearray(min(_CHUNK_BYTES, max(nbytes, 1))))
    with _open_regular(path) as (fd, size):
        done = 0
        if size == nbytes:
            while count := os.readv(fd, [chunk]):
                digest.update(chunk[:count])
                if on_chunk is not None:
                    on_chunk(chunk[:count])
                done += count
        else:
            done = size
    if done != nbytes:
        raise CorruptSnapshotError(f"{path}: {done} bytes, committed with {nbytes}. {_REMEDY}")
    return f"xxh3:{digest.hexdigest()}"


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write everything: ``os.write`` may write less."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def write_atomically(path: Path, data: bytes, on_stage: OnStage | None = None) -> None:
    """Write a file so that readers see the old content or all of the new one, also after a crash.

    Args:
        path: final name; its directory exists.
        data: content.
        on_stage: called with ``"temporary"`` when the temporary file is on the medium and ``"committed"`` after the
            rename.

    Raises:
        StoreError: the operating system refuses.
    """
    # A name of its own: on storage, a process that lost its place may write at the same instant.
    temporary = path.with_name(f".{path.name}.{os.getpid():x}-{threading.get_ident():x}.tmp")
    with explain_os_errors("write", path):
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            write_all(fd, data)
            os.fsync(fd)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        finally:
            os.close(fd)
    if on_stage is not None:
        on_stage("temporary")
    with explain_os_errors("write", path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)  # rename cannot replace a directory that somebody put there
        os.replace(temporary, path)
        sync_dir(path.parent)
    if on_stage is not None:
        on_stage("committed")


def sync_dir(path: Path) -> None:
    """Make renames within a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(path: Path) -> None:
    with explain_os_errors("remove", path):
        try:
            path.unlink(missing_ok=True)
        except OSError:
            if path.is_symlink() or not path.is_dir():
                raise
            shutil.rmtree(path)


class LocalRoot:
    """The tier root of one rank in a local directory. See :class:`~moetion_lightning.storage.windows.Root`.

    Args:
        path: ``<base>/<job>/rank-00000`` or ``<base>/<job>/replica-00003-at-00000``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.location = str(path)
        self.files_dir = path / "files"
        self.windows_dir = path / WINDOWS

    def create(self) -> None:
        """Make the directories. Raises ``StoreError`` when that fails."""
        for directory in (self.path, self.files_dir, self.windows_dir):
            make_private_dir(directory)

    def clean(self) -> None:
        """Remove half-written manifests and notes; only for the owner, who alone writes."""
        for directory in (self.path, self.windows_dir):
            for name in self._names(directory):
                if name.startswith(".") and name.endswith(".tmp"):
                    _remove(directory / name)

    def courses_aside(self) -> list[str]:
        """Folders of windows that were set aside, the latest first."""
        return sorted(filter(ASIDE_NAME.fullmatch, self._names(self.path)), reverse=True)

    def iterations(self, folder: str = WINDOWS) -> list[int]:
        """Iterations that have something under a manifest's name, newest first; none when there is no directory."""
        found = (MANIFEST_NAME.fullmatch(name) for name in self._names(self.path / folder))
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def manifest_location(self, iteration: int, folder: str = WINDOWS) -> str:
        """Where a manifest is, for messages."""
        return str(self.path / folder / manifest_name(iteration))

    def read_manifest(self, iteration: int, max_bytes: int, folder: str = WINDOWS) -> bytes:
        """Content of a manifest."""
        return read_regular(self.path / folder / manifest_name(iteration), max_bytes=max_bytes)

    def write_manifest(self, iteration: int, data: bytes, on_stage: OnStage | None = None) -> None:
        """Commit: everything that the manifest names must be there already."""
        with explain_os_errors("flush", self.files_dir):
            sync_dir(self.files_dir)
        write_atomically(self.windows_dir / manifest_name(iteration), data, on_stage)

    def remove_manifest(self, iteration: int, folder: str = WINDOWS) -> None:
        """Remove a manifest, or whatever is in its place."""
        _remove(self.path / folder / manifest_name(iteration))

    def move(self, source: str, target: str, iterations: Iterable[int] | None = None) -> None:
        """Move manifests from one folder to a new one; each is in one of them at every instant.

        Args:
            source: folder that exists.
            target: folder that does not, or holds nothing.
            iterations: the manifests, or None for the whole folder with its notes.
        """
        with explain_os_errors("move", self.path / source):
            if iterations is None:
                with contextlib.suppress(FileNotFoundError):
                    (self.path / target).rmdir()
                os.rename(self.path / source, self.path / target)
            else:
                make_private_dir(self.path / target)
                for iteration in iterations:
                    name = manifest_name(iteration)
                    os.rename(self.path / source / name, self.path / target / name)
                sync_dir(self.path / target)
            make_private_dir(self.windows_dir)
            sync_dir(self.path / source if iterations is not None else self.path)

    def remove_folder(self, folder: str) -> None:
        """Remove a folder of manifests; those that a kill leaves are whole."""
        with explain_os_errors("remove", self.path / folder):
            shutil.rmtree(self.path / folder, ignore_errors=True)
            sync_dir(self.path)

    def files(self) -> dict[str, int]:
        """Names and sizes in bytes of everything under ``files``, leftovers of interrupted copies included."""
        sizes = {}
        for name in self._names(self.files_dir):
            with contextlib.suppress(FileNotFoundError):
                sizes[name] = os.lstat(self.files_dir / name).st_size
        return sizes

    def verify_file(self, record: FileRecord) -> None:
        """Compare size and checksum. Raises ``CorruptSnapshotError``."""
        path = self.files_dir / record.name
        checksum = hash_file(path, record.nbytes)
        if checksum != record.checksum:
            raise CorruptSnapshotError(f"{path}: checksum {checksum}, committed with {record.checksum}. {_REMEDY}")

    def file_path(self, record: FileRecord) -> Path:
        """Path of a regular file of the recorded size (its content is checked by :meth:`verify_file`)."""
        path = self.files_dir / record.name
        with _open_regular(path) as (_, size):
            if size != record.nbytes:
                raise CorruptSnapshotError(f"{path}: {size} bytes, committed with {record.nbytes}. {_REMEDY}")
        return path

    def put_file(self, record: FileRecord, source: Path, before_naming: Callable[[], None]) -> None:
        """Copy a file in, verifying its checksum in the same pass; its name appears when it is whole and durable."""
        path = self.files_dir / record.name
        temporary = self.files_dir / f".{record.name}.part"
        with explain_os_errors(f"write {record.nbytes} bytes", path):
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                checksum = hash_file(source, record.nbytes, on_chunk=lambda chunk: write_all(fd, chunk))
                if checksum != record.checksum:
                    raise CorruptSnapshotError(
                        f"{source}: checksum {checksum}, committed with {record.checksum}. {_REMEDY}"
                    )
                os.fsync(fd)
                before_naming()
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
            finally:
                os.close(fd)

    def remove_file(self, name: str) -> None:
        """Remove a file, or whatever is in its place."""
        _remove(self.files_dir / name)

    def read_note(self, name: str) -> bytes | None:
        """Content of a small file beside the windows (``job.json``), None when absent."""
        path = self.path / name
        return read_regular(path, max_bytes=1 << 20) if os.path.lexists(path) else None

    def write_note(self, name: str, data: bytes | None) -> None:
        """Write (None: remove) a small file beside the windows."""
        if data is None:
            _remove(self.path / name)
        else:
            write_atomically(self.path / name, data)

    def close(self) -> None:
        """Nothing is held."""

    def _names(self, directory: Path) -> list[str]:
        with explain_os_errors("list", directory):
            try:
                return os.listdir(directory)
            except FileNotFoundError:
                return []
