"""A place of one rank's windows: the few operations that everything above is made of, wherever the bytes are.

Names are relative to the place: ``job.json``, ``windows/000000000007.json``, ``files/a.safetensors``. Every change goes
through a method of :class:`Place`, which asks right before it takes effect whether this process still may change
anything there: whoever was frozen or cut off, however long, neither adds nor removes anything of its successor.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from moetion_lightning.errors import StoreError
from moetion_lightning.storage.folders import FILES, MANIFEST_NAME, WINDOWS
from moetion_lightning.storage.manifest import FileRecord
from moetion_lightning.storage.posix import check_file

__all__ = ["MAX_NOTE_BYTES", "Incoming", "Place", "nobody"]

MAX_NOTE_BYTES = 1 << 20
OnStage = Callable[[str], None]


def nobody() -> None:
    """The right of whoever only looks: none."""
    raise StoreError("a place that is only looked at was to be changed. Open the tier first.")


class Incoming(Protocol):
    """A file that is being written and has no name yet."""

    def append(self, data: bytes | memoryview) -> None:
        """Add bytes."""

    def finish(self) -> None:
        """Make the bytes durable, still without a name."""

    def publish(self) -> None:
        """Give it its name, in one step."""

    def abandon(self) -> None:
        """Remove what was written. Never what has the name, which may be another process's by now."""


class Place(abc.ABC):
    """The directory of one rank of one job: ``<base>/<job>/rank-00000``, or ``.../replica-00003-at-00000``.

    Args:
        location: path or URL, for messages.
        may_change: asked before each change; raises when this process may not (any more).
    """

    #: Whether reading a file back costs as much as writing it.
    is_remote = False

    def __init__(self, location: str, may_change: Callable[[], object]) -> None:
        self.location = location
        self.may_change = may_change

    def where(self, name: str) -> str:
        """Where a name is, for messages."""
        return f"{self.location}/{name}"

    # --- reading -------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def entries(self, folder: str) -> dict[str, int]:
        """Names and sizes in bytes of everything in a folder; none when there is no such folder."""

    @abc.abstractmethod
    def folders(self) -> list[str]:
        """Names of the folders, and perhaps of files."""

    @abc.abstractmethod
    def read(self, name: str, max_bytes: int = MAX_NOTE_BYTES) -> bytes | None:
        """Content of a file, None when absent. Raises ``CorruptSnapshotError`` when it is longer, or no file."""

    @abc.abstractmethod
    def local_path(self, record: FileRecord) -> Path:
        """A local path to read a file from, of the recorded size."""

    @abc.abstractmethod
    def verify(self, record: FileRecord) -> None:
        """Compare a file's size and checksum. Raises ``CorruptSnapshotError``."""

    def changed_at(self) -> float:
        """When a window was committed or moved last, seconds since the epoch; 0.0 where that cannot be told."""
        return 0.0

    # --- changing ------------------------------------------------------------------------------------------------

    def create(self) -> None:
        """Make what must exist before the first write."""
        self.may_change()
        for folder in ("", FILES, WINDOWS):
            with self._explained("create the directory", folder):
                self._make_folder(folder)

    def clean(self) -> None:
        """Remove half-written manifests and notes of earlier owners."""
        for folder in ("", WINDOWS):
            for name in self.entries(folder):
                if name.startswith(".") and name.endswith(".tmp"):
                    self.remove(f"{folder}/{name}" if folder else name)

    def write(self, name: str, data: bytes, on_stage: OnStage | None = None) -> None:
        """Write a file so that readers see the old content or all of the new one, also after a crash.

        Args:
            name: its folder exists.
            data: content.
            on_stage: called with ``"temporary"`` before it takes its name and ``"committed"`` after.
        """
        self.may_change()
        say = on_stage or (lambda stage: None)
        with contextlib.ExitStack() as unless_published:
            with self._explained("write", name):
                incoming = self._incoming(name, len(data))
                unless_published.callback(incoming.abandon)
                incoming.append(data)
                incoming.finish()
            say("temporary")
            with self._explained("write", name):
                self.may_change()  # again: writing took a while; what follows is one step
                incoming.publish()
            unless_published.pop_all()
        self.sync(name.rpartition("/")[0])
        say("committed")

    def put(self, record: FileRecord, source: Path) -> None:
        """Copy a local file in, comparing its checksum in the same pass; :meth:`sync` makes its name durable."""
        name = f"{FILES}/{record.name}"
        with self._explained(f"write {record.nbytes} bytes", name), contextlib.ExitStack() as unless_published:
            incoming = self._incoming(name, record.nbytes)
            unless_published.callback(incoming.abandon)
            check_file(source, record, on_chunk=incoming.append)
            incoming.finish()
            self.may_change()
            incoming.publish()
            unless_published.pop_all()

    def remove(self, name: str) -> None:
        """Remove a file, or whatever is in its place."""
        self.may_change()
        with self._explained("remove", name):
            self._remove(name)

    def move(self, source: str, target: str, names: Iterable[str] | None = None) -> None:
        """Move files from one folder to another; each can be read in one of them, or in both, at every instant.

        Args:
            source: folder that exists.
            target: folder that does not, or holds nothing.
            names: the files; None for all, in which case the folder itself ends.
        """
        if names is None:
            # Notes first, then the newest window: whatever a kill leaves, the target is what it says it is.
            there = sorted(self.entries(source), reverse=True)
            moved = sorted(there, key=lambda name: MANIFEST_NAME.fullmatch(name) is not None)
        else:
            moved = list(names)
        with self._explained("move", source):
            self.may_change()
            if names is None and self._rename_folder(source, target):
                return
            self._make_folder(target)
            for name in moved:
                self.may_change()
                self._transfer(f"{source}/{name}", f"{target}/{name}")
        self.sync(target)
        for name in reversed(moved):
            self.remove(f"{source}/{name}")
        self.sync(source)
        if names is None and source != WINDOWS:
            self.remove_folder(source)

    def remove_folder(self, folder: str) -> None:
        """Remove a folder of manifests; those that a kill leaves are whole."""
        for name in self.entries(folder):
            self.remove(f"{folder}/{name}")
        self.may_change()
        with self._explained("remove", folder):
            self._remove_empty(folder)

    def sync(self, folder: str) -> None:  # noqa: B027
        """Make the names in a folder durable."""

    def close(self) -> None:  # noqa: B027
        """Give back what is held."""

    # --- what differs; only called by the methods above, which have asked ------------------------------------------

    @abc.abstractmethod
    def _explained(self, what: str, name: str) -> contextlib.AbstractContextManager[None]:
        """Turns errors of the medium into a :class:`StoreError`."""

    @abc.abstractmethod
    def _incoming(self, name: str, nbytes: int) -> Incoming:
        """Begin a file."""

    @abc.abstractmethod
    def _make_folder(self, folder: str) -> None:
        """Make a folder, if there is none."""

    @abc.abstractmethod
    def _transfer(self, source: str, target: str) -> None:
        """Give a file its new name; the old one may stay."""

    def _rename_folder(self, source: str, target: str) -> bool:
        """Rename a folder in one step. Returns False where that cannot be done."""
        return False

    @abc.abstractmethod
    def _remove(self, name: str) -> None:
        """Remove a file, if there is one."""

    @abc.abstractmethod
    def _remove_empty(self, folder: str) -> None:
        """Remove an empty folder, if there is one."""
