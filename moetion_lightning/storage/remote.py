"""A tier root behind an fsspec URL: object stores, ``memory://``, anything without rename."""

from __future__ import annotations

import contextlib
import posixpath
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec

from moetion_lightning.errors import ConfigurationError, CorruptSnapshotError, MoEtionError, StoreError
from moetion_lightning.storage.folders import ASIDE_NAME, MANIFEST_NAME, WINDOWS, manifest_name
from moetion_lightning.storage.local import LocalRoot, hash_file
from moetion_lightning.storage.manifest import FileRecord

__all__ = ["RemoteRoot"]

_CHUNK_BYTES = 8 * 1024 * 1024
_REMEDY = "Restore from another window or tier."


@contextlib.contextmanager
def _explain(what: str, path: str) -> Iterator[None]:
    """Turn whatever a file system's client raises (each has errors of its own) into a :class:`StoreError`."""
    try:
        yield
    except MoEtionError:
        raise
    except Exception as error:
        raise StoreError(
            f"{path}: cannot {what}: {type(error).__name__}: {error}. Check the address, the credentials and the room "
            "there."
        ) from error


class RemoteRoot:
    """The tier root of one rank behind an fsspec URL. See :class:`~moetion_lightning.storage.windows.Root`.

    Objects appear when their upload ends; the manifest's is put last. Reading downloads to a private temporary
    directory, which :meth:`close` removes, and verifies there.

    Args:
        url: ``<base>/<job>/rank-00000``.
        storage_options: for the file system's constructor.

    Raises:
        ConfigurationError: the protocol is unknown or its package is not installed.
    """

    def __init__(self, url: str, storage_options: dict[str, Any] | None = None) -> None:
        try:
            self._fs, self._path = fsspec.core.url_to_fs(url, **(storage_options or {}))
        except (ValueError, ImportError) as error:
            raise ConfigurationError(
                f"{url}: {error}. Install the file system's package or correct the URL."
            ) from error
        self.location = url
        self._cache: LocalRoot | None = None
        self._downloaded: set[FileRecord] = set()

    def create(self) -> None:
        """Make the directories, where the file system has any."""
        with _explain("create the directory", self.location):
            for part in ("files", "windows"):
                self._fs.makedirs(self._join(part), exist_ok=True)

    def clean(self) -> None:
        """Nothing is ever half-written: objects appear whole."""

    def courses_aside(self) -> list[str]:
        """Folders of windows that were set aside, the latest first."""
        names = (posixpath.basename(entry["name"].rstrip("/")) for entry in self._entries(""))
        return sorted(filter(ASIDE_NAME.fullmatch, names), reverse=True)

    def iterations(self, folder: str = WINDOWS) -> list[int]:
        """Iterations that have a manifest, newest first."""
        found = (MANIFEST_NAME.fullmatch(name) for name in self._list(folder))
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def manifest_location(self, iteration: int, folder: str = WINDOWS) -> str:
        """Where a manifest is, for messages."""
        return f"{self.location}/{folder}/{manifest_name(iteration)}"

    def read_manifest(self, iteration: int, max_bytes: int, folder: str = WINDOWS) -> bytes:
        """Content of a manifest."""
        data = self._read(f"{folder}/{manifest_name(iteration)}", max_bytes)
        if data is None:
            raise CorruptSnapshotError(
                f"{self.manifest_location(iteration, folder)}: the manifest is missing. {_REMEDY}"
            )
        return data

    def write_manifest(self, iteration: int, data: bytes, on_stage: Callable[[str], None] | None = None) -> None:
        """Commit: everything that the manifest names must be there already."""
        if on_stage is not None:
            on_stage("temporary")
        with _explain("write", self.manifest_location(iteration)):
            self._fs.pipe_file(self._join(f"{WINDOWS}/{manifest_name(iteration)}"), data)
        if on_stage is not None:
            on_stage("committed")

    def remove_manifest(self, iteration: int, folder: str = WINDOWS) -> None:
        """Remove a manifest."""
        self._remove(f"{folder}/{manifest_name(iteration)}")

    def move(self, source: str, target: str, iterations: Iterable[int] | None = None) -> None:
        """Move manifests from one folder to another; each is in one of them, or in both, at every instant.

        Args:
            source: folder that exists.
            target: folder that does not, or holds nothing.
            iterations: the manifests, or None for all, with the folder's notes.
        """
        if iterations is None:
            # Notes first, then the newest window: whatever a kill leaves, the target is what it says it is.
            manifests = [manifest_name(iteration) for iteration in self.iterations(source)]
            names = [*sorted(set(self._list(source)) - set(manifests)), *manifests]
        else:
            names = [manifest_name(iteration) for iteration in iterations]
        with _explain("move", f"{self.location}/{source}"):
            self._fs.makedirs(self._join(target), exist_ok=True)
            for name in names:
                self._fs.cp_file(self._join(f"{source}/{name}"), self._join(f"{target}/{name}"))
        for name in reversed(names):
            self._remove(f"{source}/{name}")
        if source != WINDOWS:
            self.remove_folder(source)

    def remove_folder(self, folder: str) -> None:
        """Remove a folder of manifests; those that a kill leaves are whole."""
        for name in self._list(folder):
            self._remove(f"{folder}/{name}")
        with contextlib.suppress(Exception):  # an object store has no folders
            self._fs.rmdir(self._join(folder))

    def files(self) -> dict[str, int]:
        """Names and sizes in bytes of the files."""
        return self._list("files")

    def verify_file(self, record: FileRecord) -> None:
        """Download a file and compare size and checksum. Raises ``CorruptSnapshotError``."""
        self.file_path(record)

    def file_path(self, record: FileRecord) -> Path:
        """A verified private copy of a file, downloaded once."""
        cache = self._local_cache()
        path = cache.files_dir / record.name
        if record not in self._downloaded:
            where = f"{self.location}/files/{record.name}"
            with _explain("download", where):
                try:
                    self._fs.get_file(self._join(f"files/{record.name}"), str(path))
                except FileNotFoundError as error:
                    raise CorruptSnapshotError(f"{where}: the file is missing. {_REMEDY}") from error
            try:
                cache.verify_file(record)
            except CorruptSnapshotError as error:
                cache.remove_file(record.name)
                raise CorruptSnapshotError(f"{where}, downloaded: {error}") from error
            self._downloaded.add(record)
        return path

    def put_file(self, record: FileRecord, source: Path, before_naming: Callable[[], None]) -> None:
        """Upload a file, verifying its checksum in the same pass."""
        target = self._join(f"files/{record.name}")
        with _explain(f"upload {record.nbytes} bytes", f"{self.location}/files/{record.name}"):
            try:
                with self._fs.open(target, "wb", block_size=_CHUNK_BYTES) as upload:
                    checksum = hash_file(source, record.nbytes, on_chunk=lambda chunk: upload.write(bytes(chunk)))
                    before_naming()
                if checksum != record.checksum:
                    raise CorruptSnapshotError(
                        f"{source}: checksum {checksum}, committed with {record.checksum}. {_REMEDY}"
                    )
            except BaseException:
                with contextlib.suppress(Exception):
                    self._fs.rm_file(target)
                raise

    def remove_file(self, name: str) -> None:
        """Remove a file."""
        self._remove(f"files/{name}")

    def read_note(self, name: str) -> bytes | None:
        """Content of a small file beside the windows, None when absent."""
        return self._read(name, 1 << 20)

    def write_note(self, name: str, data: bytes | None) -> None:
        """Write (None: remove) a small file beside the windows."""
        if data is None:
            self._remove(name)
            return
        with _explain("write", f"{self.location}/{name}"):
            self._fs.pipe_file(self._join(name), data)

    def close(self) -> None:
        """Remove the downloaded copies."""
        if self._cache is not None:
            shutil.rmtree(self._cache.path, ignore_errors=True)
        self._cache = None
        self._downloaded.clear()

    def _local_cache(self) -> LocalRoot:
        if self._cache is None:
            path = Path(tempfile.mkdtemp(prefix="moetion-download-"))  # 0700
            weakref.finalize(self, shutil.rmtree, path, ignore_errors=True)
            self._cache = LocalRoot(path)
            self._cache.create()
        return self._cache

    def _join(self, name: str) -> str:
        return posixpath.join(self._path, name)

    def _list(self, part: str) -> dict[str, int]:
        entries = self._entries(part)
        return {posixpath.basename(e["name"]): int(e.get("size") or 0) for e in entries if e["type"] == "file"}

    def _entries(self, part: str) -> list[dict[str, Any]]:
        with _explain("list", f"{self.location}/{part}"):
            self._fs.invalidate_cache()
            try:
                return list(self._fs.ls(self._join(part) if part else self._path, detail=True))
            except FileNotFoundError:
                return []

    def _read(self, name: str, max_bytes: int) -> bytes | None:
        where = f"{self.location}/{name}"
        with _explain("read", where):
            self._fs.invalidate_cache()
            try:
                with self._fs.open(self._join(name), "rb") as file:
                    data: bytes = file.read(max_bytes + 1)
            except FileNotFoundError:
                return None
        if len(data) > max_bytes:
            raise CorruptSnapshotError(f"{where}: longer than {max_bytes} bytes. {_REMEDY}")
        return data

    def _remove(self, name: str) -> None:
        with _explain("remove", f"{self.location}/{name}"), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._join(name))
