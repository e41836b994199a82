"""A place behind an fsspec URL: object stores, ``memory://``, anything without rename."""

from __future__ import annotations

import contextlib
import posixpath
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec

from moetion_lightning.errors import ConfigurationError, CorruptSnapshotError, MoEtionError, StoreError
from moetion_lightning.storage.folders import FILES
from moetion_lightning.storage.manifest import FileRecord
from moetion_lightning.storage.place import MAX_NOTE_BYTES, Incoming, Place, nobody
from moetion_lightning.storage.posix import check_file

__all__ = ["RemotePlace"]

_CHUNK_BYTES = 8 * 1024 * 1024
_REMEDY = "Restore from another window or tier."


class _Object:
    """An object small enough to be sent in one piece."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path, self._data = fs, path, bytearray()

    def append(self, data: bytes | memoryview) -> None:
        self._data += data

    def finish(self) -> None:
        pass

    def publish(self) -> None:
        self._fs.pipe_file(self._path, bytes(self._data))

    def abandon(self) -> None:
        pass


class _Upload:
    """A larger one: its parts are sent as they come, and it appears when the transaction ends, or never.

    Args:
        fs: used by nobody else meanwhile.
        path: of the object.
    """

    def __init__(self, fs: Any, path: str) -> None:
        self._transaction = fs.transaction
        self._transaction.start()
        self._file = fs.open(path, "wb", block_size=_CHUNK_BYTES)
        self._is_staged = hasattr(self._file, "commit")
        if not self._is_staged:  # a file system without transactions: it appears as it is written
            self._transaction.files.clear()

    def append(self, data: bytes | memoryview) -> None:
        self._file.write(bytes(data))

    def finish(self) -> None:
        self._file.close()

    def publish(self) -> None:
        self._transaction.complete(commit=True)

    def abandon(self) -> None:
        with contextlib.suppress(Exception):
            if self._is_staged:
                self._file.close()  # else the garbage collector does, after the end
            self._transaction.complete(commit=False)


class RemotePlace(Place):
    """See :class:`~moetion_lightning.storage.place.Place`.

    Objects appear whole. Reading downloads to a private temporary directory, which :meth:`close` removes, and verifies
    there.

    Args:
        url: ``<base>/<job>/rank-00000``.
        may_change: as there; the default allows no change.

    Raises:
        ConfigurationError: the protocol is unknown or its package is not installed.
    """

    is_remote = True

    def __init__(self, url: str, may_change: Callable[[], object] = nobody) -> None:
        super().__init__(url, may_change)
        try:
            self._fs, self._path = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ConfigurationError(
                f"{url}: {error}. Install the file system's package (pip install 'moetion-lightning[s3]' for s3://, "
                "'[gcs]' for gs://) or correct the URL."
            ) from error
        self._uploads: Any = None
        self._cache: Path | None = None
        self._downloaded: set[FileRecord] = set()

    def clean(self) -> None:
        """Nothing is ever half-written."""

    def entries(self, folder: str) -> dict[str, int]:
        """Objects."""
        return {posixpath.basename(e["name"]): int(e.get("size") or 0) for e in self._list(folder, "file")}

    def folders(self) -> list[str]:
        """Folders, or what a client takes for them."""
        return [posixpath.basename(entry["name"].rstrip("/")) for entry in self._list("", "directory")]

    def read(self, name: str, max_bytes: int = MAX_NOTE_BYTES) -> bytes | None:
        """Content of an object, None when absent."""
        with self._explained("read", name):
            self._fs.invalidate_cache()
            try:
                with self._fs.open(self._join(name), "rb") as file:
                    data: bytes = file.read(max_bytes + 1)
            except FileNotFoundError:
                return None
        if len(data) > max_bytes:
            raise CorruptSnapshotError(f"{self.where(name)}: longer than {max_bytes} bytes. {_REMEDY}")
        return data

    def local_path(self, record: FileRecord) -> Path:
        """A verified private copy, downloaded once."""
        if self._cache is None:
            self._cache = Path(tempfile.mkdtemp(prefix="moetion-download-"))  # 0700
            weakref.finalize(self, shutil.rmtree, self._cache, ignore_errors=True)
        path, name = self._cache / record.name, f"{FILES}/{record.name}"
        if record not in self._downloaded:
            with self._explained("download", name):
                try:
                    self._fs.get_file(self._join(name), str(path))
                except FileNotFoundError as error:
                    raise CorruptSnapshotError(f"{self.where(name)}: the file is missing. {_REMEDY}") from error
            try:
                check_file(path, record)
            except CorruptSnapshotError as error:
                path.unlink(missing_ok=True)
                raise CorruptSnapshotError(f"{self.where(name)}, downloaded: {error}") from error
            self._downloaded.add(record)
        return path

    def verify(self, record: FileRecord) -> None:
        """Download it, and compare."""
        self.local_path(record)

    def close(self) -> None:
        """Remove the downloaded copies."""
        if self._cache is not None:
            shutil.rmtree(self._cache, ignore_errors=True)
        self._cache = None
        self._downloaded.clear()

    def _list(self, folder: str, kind: str) -> list[dict[str, Any]]:
        with self._explained("list", folder):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._join(folder), detail=True)
            except FileNotFoundError:
                return []
        return [entry for entry in found if entry["type"] == kind]

    @contextlib.contextmanager
    def _explained(self, what: str, name: str) -> Iterator[None]:
        try:
            yield
        except MoEtionError:
            raise
        except Exception as error:  # each file system's client has errors of its own
            raise StoreError(
                f"{self.where(name)}: cannot {what}: {type(error).__name__}: {error}. Check the address, the "
                "credentials and the room there."
            ) from error

    def _join(self, name: str) -> str:
        return posixpath.join(self._path, name) if name else self._path

    def _incoming(self, name: str, nbytes: int) -> Incoming:
        if nbytes <= _CHUNK_BYTES:
            return _Object(self._fs, self._join(name))
        if self._uploads is None:  # of its own: while a transaction is open, all that an instance writes is part of it
            self._uploads = fsspec.core.url_to_fs(self.location, skip_instance_cache=True)[0]
        return _Upload(self._uploads, self._join(name))

    def _make_folder(self, folder: str) -> None:
        self._fs.makedirs(self._join(folder), exist_ok=True)

    def _transfer(self, source: str, target: str) -> None:
        self._fs.cp_file(self._join(source), self._join(target))

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._join(name))

    def _remove_empty(self, folder: str) -> None:
        with contextlib.suppress(Exception):  # an object store has no folders
            self._fs.rmdir(self._join(folder))
