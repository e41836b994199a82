"""What happened: typed events, and the sinks that listen to them.

The engine announces each step of its work on an :class:`EventBus`. Loggers, progress bars, metrics and fault drills are
*sinks*: callables that take one event. A sink runs in the thread that emits, so it must be quick. A sink that raises is
logged and dropped: listening must not end training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from moetion_lightning.errors import ConfigurationError

__all__ = [
    "CaptureFinished",
    "CaptureShared",
    "CaptureStarted",
    "CopiesChanged",
    "Event",
    "EventBus",
    "GroupsFormed",
    "IterationFinished",
    "JsonlSink",
    "LastIterationFinished",
    "LossNoticed",
    "LossRecorded",
    "ManifestWritten",
    "Notice",
    "OperatorAudited",
    "OperatorsFound",
    "PartialExpertsRestored",
    "ProcessEnded",
    "ProcessStarted",
    "ProtectionChanged",
    "ReplayFinished",
    "ReplayIteration",
    "ReplayMismatch",
    "ReplicationFailed",
    "RestoreApplied",
    "RestoreStarted",
    "ScheduleMade",
    "Sink",
    "SlotSealed",
    "StageReplayFinished",
    "StageReplayStarted",
    "StartedAfresh",
    "StateRebuilt",
    "StepSkipped",
    "TokensCounted",
    "ValidationFinished",
    "WindowCommitted",
    "WindowPersisted",
    "WindowReplicated",
    "listen",
]


_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events."""

    @property
    def kind(self) -> str:
        """Name of the event: its class name."""
        return type(self).__name__


@dataclass(frozen=True, kw_only=True)
class ProcessStarted(Event):
    """A process takes part in a run: its first event.

    ``created_at``: when the system made it, seconds since 1970. ``groups_seconds``: what forming its process groups
    took until now, where that is measured. ``predecessor``: how the process ended whose place it takes, where the
    launcher says so. ``environment``: host, devices, versions, job, command and commit, by name; ``settings``: those
    of the callback.
    """

    created_at: float
    groups_seconds: float
    predecessor: str
    environment: dict[str, str]
    settings: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class ProcessEnded(Event):
    """A process leaves a run in good order: its last event. ``reason``: "", or the error or signal that ended it."""

    completed: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class StartedAfresh(Event):
    """Training begins anew although windows of an earlier course were there: they lie aside now."""

    num_windows: int


@dataclass(frozen=True, kw_only=True)
class LossNoticed(Event):
    """This process lives, and has noticed that another rank was lost: it leaves its groups, and waits for a new one."""

    iteration: int


@dataclass(frozen=True, kw_only=True)
class GroupsFormed(Event):
    """All ranks have met again in new process groups; ``seconds`` do not count the wait for those that start."""

    seconds: float


@dataclass(frozen=True, kw_only=True)
class OperatorsFound(Event):
    """The operators of the module are known."""

    num_operators: int
    num_moe_layers: int
    num_experts: int
    dense_bytes: int


@dataclass(frozen=True, kw_only=True)
class ScheduleMade(Event):
    """A schedule for the next windows was made (first one, re-sized or re-ordered).

    ``measured``: whether its length follows from what captures were measured to cost (``window="auto"``).
    """

    window: int
    heaviest_bytes: int
    total_bytes: int
    dense_bytes: int
    reason: str
    measured: bool = False


@dataclass(frozen=True, kw_only=True)
class CaptureShared(Event):
    """State that several ranks hold was dealt out to them; bytes of state that the busiest rank captures."""

    method: str
    bottleneck_before: int
    bottleneck_after: int


@dataclass(frozen=True, kw_only=True)
class IterationFinished(Event):
    """An optimizer step (with everything that follows it) is complete.

    ``own_seconds``: processor time of the training thread, and its waits for data: not what it waits for other ranks.
    """

    iteration: int
    seconds: float
    stall_seconds: float
    own_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LastIterationFinished(Event):
    """Training has ended, and with it the last iteration, which no next one ends. Nothing of it is captured."""

    iteration: int
    seconds: float
    stall_seconds: float


@dataclass(frozen=True, kw_only=True)
class LossRecorded(Event):
    """What the record of an iteration says (mean loss of its micro-batches; learning rate of the first group).

    It comes from the capture thread, for iterations that are captured or replayed, and for the last one. A loss that
    is not finite, or not known, is not told.
    """

    iteration: int
    loss: float
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class ValidationFinished(Event):
    """A validation that belongs to the iteration that ends next is done."""

    seconds: float


@dataclass(frozen=True, kw_only=True)
class StepSkipped(Event):
    """The optimizer step was skipped (loss-scale overflow): nothing is captured, nothing advances."""

    iteration: int


@dataclass(frozen=True, kw_only=True)
class CaptureStarted(Event):
    """A slot's capture begins (on the capture thread)."""

    iteration: int
    slot: int
    num_slots: int


@dataclass(frozen=True, kw_only=True)
class CaptureFinished(Event):
    """All bytes of a slot are in host memory; the optimizer may step."""

    iteration: int
    slot: int
    num_slots: int
    nbytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class OperatorAudited(Event):
    """An operator was rebuilt from the gradient log; `difference` says where its new capture differs, "" if nowhere."""

    iteration: int
    operator: str
    difference: str


@dataclass(frozen=True, kw_only=True)
class SlotSealed(Event):
    """A slot's file is complete and its checksum known; no manifest names it yet."""

    iteration: int
    slot: int
    file: str


@dataclass(frozen=True, kw_only=True)
class ManifestWritten(Event):
    """The manifest's bytes are in a temporary file (`committed=False`), or under its final name (`committed=True`)."""

    iteration: int
    committed: bool


@dataclass(frozen=True, kw_only=True)
class WindowCommitted(Event):
    """A window is committed on the host-memory tier."""

    first_iteration: int
    last_iteration: int
    nbytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ProtectionChanged(Event):
    """Whether a failure now would be survived: there is a window to go back to, and captures succeed; else why not."""

    protected: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class WindowPersisted(Event):
    """A committed window is committed on the storage tier too."""

    first_iteration: int
    last_iteration: int
    nbytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class WindowReplicated(Event):
    """A window that rank `owner` has committed is committed here, too; `nbytes` came over the wire."""

    first_iteration: int
    last_iteration: int
    owner: int
    nbytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ReplicationFailed(Event):
    """The windows of rank `owner` cannot be copied here now; it is tried again, and training goes on."""

    owner: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class CopiesChanged(Event):
    """How many copies of ranks' windows on other failure domains cannot be made now: 0 when all windows are safe."""

    missing: int


@dataclass(frozen=True, kw_only=True)
class RestoreStarted(Event):
    """A restore point was chosen and verified."""

    first_iteration: int
    last_iteration: int
    tier: str
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class RestoreApplied(Event):
    """The state of the window's first iteration is in place; `replay` iterations follow."""

    iteration: int
    replay: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ReplayIteration(Event):
    """A window's iteration was re-executed and its snapshot applied; `verified`: compared, and equal."""

    iteration: int
    slot: int
    num_slots: int
    verified: bool


@dataclass(frozen=True, kw_only=True)
class ReplayFinished(Event):
    """The state is dense again, and the next batch is known; training goes on.

    `compared` names what both runs had; `verified` means that this was something, and that all of it agreed.
    """

    iteration: int
    replayed: int
    seconds: float
    compared: list[str]
    verified: bool


@dataclass(frozen=True, kw_only=True)
class StateRebuilt(Event):
    """The state after `iteration` was rebuilt from captures and `steps` logged optimizer steps; nothing ran again.

    `rebuilt` counts the iterations behind the oldest capture.
    """

    iteration: int
    rebuilt: int
    steps: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StageReplayStarted(Event):
    """This rank's stage restores its window of `first_iteration` alone, to replay up to `last_iteration`."""

    stage: int
    first_iteration: int
    last_iteration: int


@dataclass(frozen=True, kw_only=True)
class StageReplayFinished(Event):
    """This rank's stage was replayed from its neighbours' logs; unless `verified`, all ranks go back together now."""

    stage: int
    first_iteration: int
    last_iteration: int
    seconds: float
    verified: bool


@dataclass(frozen=True, kw_only=True)
class ReplayMismatch(Event):
    """A replayed iteration, or the batch behind the restored state, differs from the recorded one."""

    iteration: int
    quantity: str
    recorded: str
    replayed: str


@dataclass(frozen=True, kw_only=True)
class PartialExpertsRestored(Event):
    """A lossy restore: how many iterations each expert is behind (`layer/expert -> iterations`), and the PLT."""

    iteration: int
    stale: dict[str, int]
    lost_tokens: int
    lost_by_layer: dict[str, int]
    plt: float


@dataclass(frozen=True, kw_only=True)
class TokensCounted(Event):
    """A window may begin: expert assignments of all ranks since the last time, up to `iteration`, by MoE layer."""

    iteration: int
    tokens: dict[str, list[int]]


@dataclass(frozen=True, kw_only=True)
class Notice(Event):
    """Something a user should know, said once."""

    message: str


Sink: TypeAlias = Callable[[Event], None]

_listeners: list[Sink] = []


def listen(sink: Sink) -> Callable[[], None]:
    """Deliver the events of every bus of this process to a sink: to watch a script that gives its adapter no sinks.

    Args:
        sink: Callable that takes one event.

    Returns:
        What ends it.
    """
    _listeners.append(sink)

    def stop() -> None:
        with contextlib.suppress(ValueError):
            _listeners.remove(sink)

    return stop


class EventBus:
    """Delivers events to sinks.

    Args:
        sinks: Callables that take one event.
    """

    def __init__(self, sinks: tuple[Sink, ...] = ()) -> None:
        self._sinks: list[Sink] = list(sinks)

    def emit(self, event: Event) -> None:
        """Deliver ``event`` to every sink, in the calling thread."""
        for sinks in (self._sinks, _listeners):
            for sink in tuple(sinks):
                try:
                    sink(event)
                except Exception:
                    _log.exception("event sink %r raised and gets no more events", sink)
                    with contextlib.suppress(ValueError):  # another thread may have dropped it meanwhile
                        sinks.remove(sink)


class JsonlSink:
    """Appends every event as one JSON line to a file.

    Each line is written with a single ``write`` call, so lines of a process that was killed are whole, but for one that
    crosses a page of memory in that very moment: the next process begins a new line.

    Args:
        path: File to append to; created with mode 0600. Several processes may append to the same.
        rank: Noted in every line, unless None.

    Raises:
        ConfigurationError: The file cannot be made, or not be written to.
    """

    def __init__(self, path: str | os.PathLike[str], *, rank: int | None = None) -> None:
        self.path = Path(path)
        self._who: dict[str, Any] = {"pid": os.getpid()} if rank is None else {"pid": os.getpid(), "rank": rank}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            size = os.fstat(self._fd).st_size
            if size and os.pread(self._fd, 1, size - 1) != b"\n":
                os.write(self._fd, b"\n")
        except OSError as error:
            raise ConfigurationError(
                f"events_path={str(path)!r}: cannot append to this file: {error.strerror or error}. Give the path of a "
                "file, new or existing, in a folder where this user may write."
            ) from error
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        """Append one line."""
        record: dict[str, Any] = {"time": time.time(), **self._who, "event": event.kind}
        record.update(dataclasses.asdict(event))
        line = (json.dumps(record) + "\n").encode()
        with self._lock:
            if self._fd >= 0:
                os.write(self._fd, line)

    def close(self) -> None:
        """Close the file; later events are dropped."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
