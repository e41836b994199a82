"""What a gradient log is made of, on its way into files and in them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moetion_lightning.capture.plan import CompiledSlot
from moetion_lightning.core.operators import Operator, Piece
from moetion_lightning.engine.replay_record import BatchToCome
from moetion_lightning.engine.slot_files import StaticPart, WindowHeader
from moetion_lightning.gradient_log.audit import Finding
from moetion_lightning.gradient_log.gradients import GradientFile
from moetion_lightning.gradient_log.rebuild import Capture
from moetion_lightning.gradient_log.steps import Call, Consumed
from moetion_lightning.storage.format import FileRecord, SnapshotLayout
from moetion_lightning.storage.host_memory import HostBuffer
from moetion_lightning.storage.tree import FlatTree

__all__ = ["CallInFlight", "Captured", "IterationState", "Logged", "LoggedIteration"]


@dataclass
class CallInFlight:
    """The gradients of one call of ``step`` on their way into files.

    Args:
        call: The call; its gradients are let go of when they are copied.
        copied: Whether they are.
    """

    call: Call
    versions: list[int] | None
    copied: threading.Event = field(default_factory=threading.Event)
    consumed: Consumed | None = None
    audited: list[tuple[Piece, Tensor | None]] = field(default_factory=list)  # gradients of the audited operator
    buffers: dict[int, tuple[HostBuffer, GradientFile]] = field(default_factory=dict)


@dataclass
class LoggedIteration:
    """An iteration on its way into the log.

    Args:
        iteration: Its number.
        slots: The slots that are captured in full behind it.
        audited: The slot and the operator in it that is rebuilt from the log, and compared; None for none.
    """

    iteration: int
    slots: tuple[int, ...]
    audited: tuple[int, Operator] | None = None
    finding: Finding | None = None
    calls: list[CallInFlight] = field(default_factory=list)
    to_come: BatchToCome = field(default_factory=BatchToCome)
    done: threading.Event = field(default_factory=threading.Event)
    broken: str = ""
    error: Exception | None = None
    torn: set[int] = field(default_factory=set)  # optimizers whose gradients changed before they were copied
    sealed: list[FileRecord] = field(default_factory=list)  # files that no manifest names yet
    started: float = field(default_factory=time.perf_counter)

    def fail(self, error: Exception) -> None:
        """An error has ended it."""
        self.broken, self.error = f"{type(error).__name__}: {error}", error
        error.__traceback__ = None  # its frames hold views of buffers, which could then have no other size


@dataclass(frozen=True)
class Captured:
    """The newest full capture of a slot."""

    iteration: int
    record: FileRecord
    scalars: Mapping[str, Any]
    buffer: HostBuffer
    compiled: CompiledSlot

    def of(self, operator: Operator) -> Capture:
        """An operator in it."""
        layout, memory = self.compiled.layout, self.buffer.tensor

        def load(name: str) -> Tensor:
            stored, start, stop = self.compiled.names.find(name)
            tensor = layout.view(memory, layout.spec(stored))
            return tensor if start is None else tensor[start:stop]

        return Capture(iteration=self.iteration, operators=(operator,), scalars=self.scalars, load=load)


@dataclass(frozen=True)
class Logged:
    """What one iteration consumed: the steps' file, and for each call, by group of slots, a file of gradients."""

    iteration: int
    steps: FileRecord
    gradients: tuple[Mapping[int, FileRecord], ...]
    calls: list[dict[str, Any]]  # what the steps' file holds
    buffers: Mapping[str, tuple[HostBuffer, SnapshotLayout]]  # of the gradients, by name of the file


@dataclass(frozen=True, kw_only=True)
class IterationState:
    """What is captured of an iteration besides operators and gradients.

    Args:
        header: What its manifest says.
        rest: The run state.
        static: Parameters that do not train, if they are not as in the restore point before.
        static_digest: Their digest.
        record: Gives the iteration's record; called on the capture thread.
        looked_at: Operators of which a sample is recorded.
        round_begins: Whether all slots have been captured since this was true last.
        stops_at_findings: Whether there is no restore point where an audit fails.
        captured_at: When, seconds since the epoch.
    """

    header: WindowHeader
    rest: FlatTree
    static: StaticPart | None
    static_digest: str
    record: Callable[[], dict[str, Any]]
    looked_at: Sequence[Operator]
    round_begins: bool
    stops_at_findings: bool
    captured_at: float
