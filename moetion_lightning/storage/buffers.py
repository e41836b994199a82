"""Preallocated memory-mapped files that captures write into."""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moetion_lightning.errors import HostMemoryError, StoreError
from moetion_lightning.storage.format import SnapshotLayout
from moetion_lightning.storage.manifest import FILE_NAME, FileRecord, Manifest, bytes_checksum
from moetion_lightning.storage.mapping import map_fd
from moetion_lightning.storage.posix import explain_os_errors
from moetion_lightning.storage.room import free_bytes_at, no_room

__all__ = ["BufferPool", "BufferState", "HostBuffer"]

_OUT_OF_ROOM = (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG)

# A free buffer that two commits in a row could do without is of a size that the schedule no longer uses.
_MAX_IDLE_COMMITS = 2
# Resizing keeps pages only if sizes are alike; beyond this factor a small file would take a slot's buffer.
_RESIZE_FACTOR = 2


class BufferState(enum.Enum):
    """Who may write to a buffer."""

    FREE = "free"
    CAPTURING = "capturing"
    SEALED = "sealed"


class HostBuffer:
    """One file of a fixed size, mapped for writing as long as it exists.

    Made by ``HostMemoryTier.acquire``. Its bytes survive the process; they count only once a manifest names them.

    Args:
        path: file to create; it must not exist.
        nbytes: size, at least 1.

    Raises:
        HostMemoryError: there is no room.
        StoreError: the file cannot be created.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        self.nbytes = nbytes
        self.state = BufferState.CAPTURING
        self.record: FileRecord | None = None
        self.idle_commits = 0
        self._map: Any = None  # a ctypes array
        self._tensor: torch.Tensor | None = None
        self._unpin: Callable[[], None] | None = None
        with explain_os_errors("create", path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            self._allocate_and_map(fd, nbytes)
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        finally:
            os.close(fd)

    @property
    def name(self) -> str:
        """File name, as manifests use it."""
        return self.path.name

    @property
    def tensor(self) -> torch.Tensor:
        """The file's bytes: 1-D uint8 CPU tensor of ``nbytes``, writable."""
        if self._tensor is None:
            raise StoreError(f"{self.path}: the buffer was given back; acquire another one.")
        return self._tensor

    @property
    def memory(self) -> memoryview:
        """The same bytes as a buffer, for checksums."""
        if self._map is None:
            raise StoreError(f"{self.path}: the buffer was given back; acquire another one.")
        return memoryview(self._map).cast("B")

    @property
    def is_pinned(self) -> bool:
        """Whether a device driver has the memory registered."""
        return self._unpin is not None

    def pinned(self, unpin: Callable[[], None]) -> None:
        """A device driver has registered the memory: ``unpin`` is called before it goes away."""
        self._unpin = unpin

    def digest(self, layout: SnapshotLayout | None) -> FileRecord:
        """Write the header (None: it is written already) and compute the checksum.

        Raises:
            StoreError: the layout is of another size.
        """
        if layout is not None:
            if layout.nbytes != self.nbytes:
                raise StoreError(
                    f"{self.path}: the layout takes {layout.nbytes} bytes, the buffer has {self.nbytes}. Acquire a "
                    "buffer of layout.nbytes."
                )
            layout.write_header(self.tensor)
        with self.memory as memory:
            return FileRecord(self.name, self.nbytes, bytes_checksum(memory))

    def rename(self, path: Path) -> None:
        """Give the file another name, to be captured into again."""
        with explain_os_errors("rename", path):
            os.rename(self.path, path)
        self.path = path

    def resize(self, nbytes: int) -> bool:
        """Give the file another size, if nobody looks at its memory any more.

        Returns:
            False when tensors still alias the memory: cutting the file under them would kill the process.
        """
        if not self._unmap():
            return False
        with explain_os_errors("open", self.path):
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if nbytes < self.nbytes:
                os.ftruncate(fd, nbytes)
            self._allocate_and_map(fd, nbytes)
        finally:
            os.close(fd)
        self.nbytes = nbytes
        return True

    def delete(self) -> None:
        """Remove the file; memory that tensors still alias is given back when they are gone."""
        self._unmap()
        self.forget_mapping()
        with explain_os_errors("remove", self.path):
            self.path.unlink(missing_ok=True)

    def forget_mapping(self) -> None:
        """Stop holding the memory, leaving the file."""
        self._release_pin()
        self._tensor = None
        self._map = None

    def _unmap(self) -> bool:
        if self._map is None:
            return True
        self._release_pin()
        left = weakref.ref(self._map)
        self._tensor = self._map = None
        self._map = left()
        if self._map is None:
            return True
        self._tensor = _as_tensor(self._map)  # a tensor that somebody has still aliases it
        return False

    def _release_pin(self) -> None:
        unpin, self._unpin = self._unpin, None
        if unpin is not None:
            unpin()

    def _allocate_and_map(self, fd: int, nbytes: int) -> None:
        try:
            # Pages that do not fit would otherwise be found out by SIGBUS in the middle of a capture.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, nbytes)
            else:
                os.ftruncate(fd, nbytes)
            self._map = map_fd(fd, nbytes, shared=True)
        except OSError as error:
            if error.errno in _OUT_OF_ROOM:
                raise no_room(self.path.parent, nbytes) from error
            raise StoreError(f"{self.path}: cannot allocate {nbytes} bytes: {error.strerror or error}.") from error
        self._tensor = _as_tensor(self._map)


class BufferPool:
    """All buffers of a tier, by file name. Not thread-safe: its owner serialises calls.

    Args:
        directory: where their files are.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._buffers: dict[str, HostBuffer] = {}

    def get(self, name: str) -> HostBuffer | None:
        """The buffer of a file, None when the file is not of this process."""
        return self._buffers.get(name)

    def check_captured(self, buffer: HostBuffer) -> None:
        """Check that a buffer is being captured into. Raises ``StoreError``."""
        if self.get(buffer.name) is not buffer or buffer.state is not BufferState.CAPTURING:
            raise StoreError(f"{buffer.path}: the buffer is {buffer.state.value}, it is not being captured into.")

    def check_sealed(self, manifest: Manifest) -> None:
        """Check that a window's files are sealed, or none of this process's. Raises ``StoreError``."""
        for record in manifest.files:
            buffer = self.get(record.name)
            if buffer is not None and (buffer.record != record or buffer.state is not BufferState.SEALED):
                raise StoreError(
                    f"{buffer.path}: cannot commit window {manifest.iteration}, the file is {buffer.state.value} "
                    f"as {buffer.record}, the manifest has {record}. Seal all files before the commit."
                )

    def free_path(self, uid: str) -> Path:
        """A path that no file has. Raises ``StoreError`` when the name cannot be a file's."""
        for number in range(1, 1_000_000):
            name = f"{uid}.safetensors" if number == 1 else f"{uid}-{number}.safetensors"
            if not FILE_NAME.fullmatch(name):
                raise StoreError(f"{uid!r} cannot name a file: use at most 100 letters, digits and ._-")
            path = self._directory / name
            if not os.path.lexists(path):
                return path
        raise StoreError(f"{self._directory}: too many files are named after {uid!r}. Use another uid.")

    def acquire(self, path: Path, nbytes: int) -> HostBuffer:
        """A free buffer of that size under a new name, one resized, or a new one.

        Raises:
            HostMemoryError: there is no room, even with every free buffer given up.
            StoreError: a buffer has at least one byte.
        """
        if nbytes < 1:
            raise StoreError(f"{path}: {nbytes} bytes were asked for; a buffer has at least one.")
        buffer = self._recycle(path, nbytes) or self._create(path, nbytes)
        buffer.state = BufferState.CAPTURING
        buffer.record = None
        self._buffers[buffer.name] = buffer
        return buffer

    def delete(self, buffer: HostBuffer) -> None:
        """Delete a free buffer and its file."""
        self._buffers.pop(buffer.name, None)
        buffer.delete()

    def put_back(self, buffer: HostBuffer) -> None:
        """Mark a buffer free."""
        buffer.state = BufferState.FREE
        buffer.idle_commits = 0

    def trim(self) -> None:
        """Called once a commit: delete free buffers that have not been needed for a while."""
        for buffer in self._free():
            buffer.idle_commits += 1
            if buffer.idle_commits > _MAX_IDLE_COMMITS:
                self.delete(buffer)

    def free_bytes(self) -> int:
        """Bytes in free buffers."""
        return sum(buffer.nbytes for buffer in self._free())

    def forget_all(self) -> list[str]:
        """Stop holding all memory; the files stay. Returns their names."""
        names = list(self._buffers)
        for buffer in self._buffers.values():
            buffer.forget_mapping()
        self._buffers.clear()
        return names

    def _free(self) -> list[HostBuffer]:
        return [buffer for buffer in self._buffers.values() if buffer.state is BufferState.FREE]

    def _recycle(self, path: Path, nbytes: int) -> HostBuffer | None:
        alike = [b for b in self._free() if max(b.nbytes, nbytes) <= _RESIZE_FACTOR * min(b.nbytes, nbytes)]
        buffer = min(alike, key=lambda b: abs(b.nbytes - nbytes), default=None)
        if buffer is None or (buffer.nbytes != nbytes and not self._resize(buffer, nbytes)):
            return None
        del self._buffers[buffer.name]
        buffer.rename(path)
        return buffer

    def _resize(self, buffer: HostBuffer, nbytes: int) -> bool:
        try:
            if buffer.resize(nbytes):
                return True
        except HostMemoryError:
            pass  # its own pages are given up below; a new file may fit then
        self.delete(buffer)
        return False

    def _create(self, path: Path, nbytes: int) -> HostBuffer:
        while True:
            try:
                if nbytes > free_bytes_at(path.parent):
                    raise no_room(path.parent, nbytes)
                return HostBuffer(path, nbytes)
            except HostMemoryError:
                free = self._free()
                if not free:
                    raise
                self.delete(max(free, key=lambda b: b.nbytes))


def _as_tensor(memory: Any) -> torch.Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8)
