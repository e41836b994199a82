"""The run state of the last boundary between two iterations, kept where a replacement of this process finds it.

Model state has living copies on other ranks; random generators, data position and counters of a rank are its own. They
are small, so they are noted after every iteration: in this process, to take back an iteration that cannot be finished,
and in a file beside this rank's windows, for the process that takes its place.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moetion_lightning.distributed.rank_report import Window
from moetion_lightning.engine.restore import RestorePoint
from moetion_lightning.errors import MoEtionError, UnsupportedStateError
from moetion_lightning.storage.tree import FlatTree, load_tree

__all__ = ["Boundary", "Journal", "LivePoint"]

_log = logging.getLogger(__name__)
_NAMES = ("journal-0", "journal-1")  # written in turn, so that one of them is always whole


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """The run state between two iterations.

    Args:
        serial: Counts boundaries; the same on all ranks.
        iteration: Completed iterations.
        tree: The run state.
        extra: What a manifest keeps beside it.
        copies: Other ranks that hold a copy of all of this rank's model state.
    """

    serial: int
    iteration: int
    tree: Mapping[str, Any]
    extra: Mapping[str, Any]
    copies: tuple[int, ...]

    @classmethod
    def from_bytes(cls, data: bytes) -> Boundary:
        """What :class:`Journal` wrote. Raises ``CorruptSnapshotError``."""
        stored = load_tree(data, resolve=lambda reference: None)  # parameters come from a living rank
        return cls(**{**stored, "copies": tuple(stored["copies"])})


@dataclass(frozen=True, kw_only=True)
class LivePoint:
    """Continue from living state: nothing is replayed, but for stages of a pipeline of which no rank lives.

    Args:
        boundary: This rank's run state.
        sources: For each rank, the rank that sends it its model state, or None: it has it, or replays.
        replays: By rank that replays: the window that it restores. All of them replay up to the iteration of the
            boundary.
        window: Where this rank restores from, if it replays.
    """

    boundary: Boundary
    sources: tuple[int | None, ...]
    replays: Mapping[int, Window] = field(default_factory=dict)
    window: RestorePoint | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"the state after iteration {self.boundary.iteration} that other ranks hold"

    @property
    def extra(self) -> Mapping[str, Any]:
        """See :class:`Boundary`."""
        return self.boundary.extra

    @property
    def captured_at(self) -> float:
        """When it was captured, seconds since the epoch."""
        return float(self.boundary.extra["first_captured_at"])

    def run_state(self) -> Any:
        """The run state."""
        return self.boundary.tree


class Journal:
    """Keeps the last boundary.

    Args:
        write: Keeps a small file by name, whole or not at all.
        read: Gives it back, None if there is none.
    """

    def __init__(self, write: Callable[[str, bytes], None], read: Callable[[str], bytes | None]) -> None:
        self._write = write
        self._read = read
        self._is_noted = False
        self._next: tuple[int, FlatTree] | None = None
        self._changed = threading.Condition()
        self._writing = threading.Lock()  # never held by the training thread while a file is written
        self._closing = self._busy = False
        self._thread: threading.Thread | None = None

    def record(self, serial: int, flat: FlatTree) -> None:
        """Note a boundary; the file follows in the background.

        Args:
            serial: Its number.
            flat: The fields of :class:`Boundary`, copied.
        """
        with self._changed:
            self._is_noted, self._next = True, (serial, flat)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="moetion-journal", daemon=True)
                self._thread.start()
            self._changed.notify()

    def wait(self) -> None:
        """Until the last boundary is on file: before the next one can come about anywhere."""
        with self._changed:
            self._changed.wait_for(lambda: self._next is None and not self._busy)

    @staticmethod
    def boundary(flat: FlatTree) -> Boundary | None:
        """A boundary of this process; None if it cannot be written down."""
        try:
            return Boundary.from_bytes(flat.to_bytes())
        except UnsupportedStateError as error:
            _log.warning("the run state between two iterations cannot be gone back to: %s", error)
            return None

    def left_behind(self) -> list[Boundary]:
        """Boundaries that a predecessor of this process noted, as far as they can be read."""
        found = []
        for name in _NAMES:
            try:
                data = self._read(name)
                if data:
                    found.append(Boundary.from_bytes(data))
            except (MoEtionError, OSError, KeyError, TypeError) as error:
                _log.warning("%s of this rank's predecessor cannot be read: %s", name, error)
        return found

    def forget(self) -> None:
        """Another course of training begins: nothing noted so far belongs to it."""
        with self._changed:
            self._is_noted, self._next = False, None
        with self._writing:
            for name in _NAMES:
                self._write(name, b"")

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None or self._closing)
                if self._closing:
                    return
                assert self._next is not None
                (serial, flat), self._next = self._next, None
                self._busy = True
            try:
                data = flat.to_bytes()
                with self._writing:
                    if self._is_noted:  # not forgotten meanwhile
                        self._write(_NAMES[serial % 2], data)
            except Exception as error:  # whatever it is: only the fastest way back is lost
                _log.warning("the run state of boundary %d could not be noted: %s", serial, error)
            with self._changed:
                self._busy = False
                self._changed.notify_all()
