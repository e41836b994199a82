"""Writes windows to the host-memory tier: slot by slot on the capture thread, manifest last."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moetion_lightning.capture.plan import CompiledSlot, SlotSources
from moetion_lightning.core.pace import Pace
from moetion_lightning.core.policy import SlotPlan, WindowPlan
from moetion_lightning.engine.finiteness import TENSORS, record_is_finite, weights_are_finite
from moetion_lightning.engine.replay_record import BatchToCome, tell_loss
from moetion_lightning.engine.slot_files import OperatorTable, SlotFiles, StaticCopy, StaticPart, WindowHeader
from moetion_lightning.engine.weight_check import OperatorSamples, choose_whole, piece_at
from moetion_lightning.events import (
    CaptureFinished,
    CaptureStarted,
    EventBus,
    ManifestWritten,
    Notice,
    SlotSealed,
    WindowCommitted,
)
from moetion_lightning.storage.format import FileRecord, Manifest
from moetion_lightning.storage.host_memory import HostBuffer
from moetion_lightning.storage.tree import FlatTree

__all__ = ["BASELESS", "TORN", "OpenWindow", "WindowWriter"]


_log = logging.getLogger(__name__)
#: Why a window is given up when user code writes to weights behind the captures' back.
TORN = "weights were changed between an iteration's end and the next optimizer step"
#: Why a window is given up whose parameters that do not train were to be those of the window before it.
BASELESS = "the window on which it builds was given up"


@dataclass
class OpenWindow:
    """A window that is being captured; without ``static``, that of the window before it still holds.

    It is committed when the batch behind it is known.

    Args:
        plan: Its slots.
        first_iteration: The iteration after which it begins.
        header: What its manifest says besides.
        rest: The run state.
        static: Parameters that do not train, if they are not as in the window before.
        static_digest: Their digest.
        signature: What trained when it began.
        broken: Why it is given up, else empty.
        error: The error that is the reason, if it is one.
        done: Whether its last slot has left the capture thread: it is committed or broken for good.
    """

    plan: WindowPlan
    first_iteration: int
    header: WindowHeader
    rest: FlatTree | None
    static: StaticPart | None
    static_digest: str
    signature: tuple[int, ...]
    started: float = field(default_factory=time.perf_counter)
    captured_at: float = field(default_factory=time.time)
    next_slot: int = 0
    broken: str = ""
    error: Exception | None = None
    done: bool = False
    finite: bool = True
    records: list[FileRecord] = field(default_factory=list)
    slots: list[dict[str, Any]] = field(default_factory=list)
    to_come: BatchToCome = field(default_factory=BatchToCome)
    rest_record: FileRecord | None = None
    static_record: FileRecord | None = None

    @property
    def last_iteration(self) -> int:
        """The iteration with which it ends."""
        return self.first_iteration + len(self.plan.slots) - 1

    @property
    def complete(self) -> bool:
        """Whether every slot has been handed to the capture thread."""
        return self.next_slot == len(self.plan.slots)

    def fail(self, error: Exception) -> None:
        """An error has ended it."""
        self.broken, self.error = f"{type(error).__name__}: {error}", error
        error.__traceback__ = None  # its frames hold views of buffers, which could then have no other size


class WindowWriter:
    """Captures slots and commits windows.

    Everything but :meth:`capture` and :meth:`abandon` runs on the capture thread.

    Args:
        files: Makes the files.
        bus: Gets the events.
        pace: Learns the bandwidth.
        on_commit: Called with each committed manifest, on the capture thread.
        keeps_older: Whether older windows stay until :meth:`drop_older`: other ranks may still need theirs.
    """

    def __init__(
        self,
        files: SlotFiles,
        bus: EventBus,
        pace: Pace,
        on_commit: Callable[[Manifest], None],
        *,
        keeps_older: bool = False,
    ) -> None:
        self._keeps_older = keeps_older
        self._files = files
        self._tier, self._thread, self._live = files.tier, files.thread, files.live
        self._bus = bus
        self._pace = pace
        self._on_commit = on_commit
        self._table = OperatorTable()
        self._newest: Manifest | None = None
        self._static_digest = ""  # of what the newest window holds; unknown for a predecessor's
        self._said_not_finite = False

    @property
    def newest(self) -> Manifest | None:
        """The newest window that this writer or its predecessor committed."""
        return self._newest

    def newest_is(self, window: OpenWindow) -> bool:
        """Whether this window was committed."""
        return self._newest is not None and self._newest.first_iteration == window.first_iteration

    def adopt(self, manifest: Manifest) -> None:
        """A predecessor's window on this tier is the newest one; it is dropped after the next commit."""
        self._newest, self._static_digest = manifest, ""

    def drop_later(self, iteration: int) -> bool:
        """Another rank gave up what came after this window, which all have: nothing later can ever be restored.

        Returns:
            Whether there was something later.
        """
        if self._newest is None or self._newest.last_iteration <= iteration:
            return False
        for later in [it for it in self._tier.windows() if it > iteration]:
            self._tier.drop(later)
        self._newest, self._static_digest = self._tier.read_manifest(iteration), ""
        return True

    def drop_older(self, iteration: int) -> None:
        """All ranks have committed the window of this iteration: older ones have served."""
        for older in [it for it in self._tier.windows() if it < iteration]:
            self._tier.drop(older)

    def capture(self, window: OpenWindow, iteration: int, record: Callable[[], dict[str, Any]]) -> None:
        """Training thread: hand the window's next slot to the capture thread.

        Args:
            window: The window.
            iteration: The iteration that has just ended.
            record: Gives the iteration's record; called on the capture thread.
        """
        slot = window.next_slot
        window.next_slot += 1
        plan = window.plan.slots[slot]
        job = _SlotJob(self, window, slot, plan, iteration, record)
        self._thread.submit(job.copy, job.finish, job.failed, job.check)

    def abandon(self, window: OpenWindow) -> None:
        """Training thread: give up a window; its files are garbage."""
        if not window.done:
            self._thread.drain()
        for record in [*window.records, window.rest_record, window.static_record]:
            if record is not None:
                self._tier.discard(record)

    # --- capture thread ------------------------------------------------------------------------------------------

    def take_static_of_newest(self, window: OpenWindow) -> None:
        """The newest window has what does not train, unless the one between the two was given up meanwhile."""
        if self._newest is None or window.static_digest != self._static_digest:
            window.broken = BASELESS
        elif self._newest.static is not None:
            window.static_record = self._newest.file(self._newest.static)

    def commit(self, window: OpenWindow, iteration: int, following: dict[str, Any]) -> None:
        """Write the manifest of a complete window, then drop the windows before it.

        Args:
            window: The window.
            iteration: Its last iteration.
            following: Record of the batch behind it.
        """
        operators, index = self._table.of(window.plan)
        carried = self._carried(window.plan, index)
        carried_files = {entry["file"] for entry in carried}
        files = [*window.records, *[r for r in self._records_of_newest() if r.name in carried_files]]
        assert window.rest_record is not None
        files.append(window.rest_record)
        if window.static_record is not None:
            files.append(window.static_record)
        for slot, plan in zip(window.slots, window.plan.slots):
            slot["active"], slot["frozen"] = self._table.numbers(plan.active), self._table.numbers(plan.frozen)
        manifest = Manifest(
            job=self._tier.job,
            rank=self._tier.rank,
            world_size=self._tier.world_size,
            policy=window.header.policy,
            first_iteration=window.first_iteration,
            last_iteration=iteration,
            created_at=time.time(),
            fingerprint=window.header.fingerprint,
            operators=operators,
            slots=window.slots,
            files=tuple(files),
            rest=window.rest_record.name,
            static=window.static_record.name if window.static_record else None,
            extra={
                **window.header.extra,
                "parameters": window.header.parameters,
                "layout": window.header.layout,
                "carried": carried,
                "first_captured_at": window.captured_at,
                "next": following,
                **({} if window.finite else {"finite": False}),
            },
        )
        previous = [it for it in self._tier.windows() if it != manifest.iteration]
        self._tier.commit(
            manifest,
            on_stage=lambda stage: self._bus.emit(ManifestWritten(iteration=iteration, committed=stage == "committed")),
        )
        before, self._newest = self._newest, manifest
        self._static_digest = window.static_digest
        if not manifest.finite:
            self._say_not_finite(manifest)
        if not self._keeps_older:
            if not manifest.finite and before is not None and before.finite:
                # As long as there is room: a restart rather takes it.
                self._tier.set_aside([before.iteration])
                previous.remove(before.iteration)
            for older in previous:
                self._tier.drop(older)
        self._bus.emit(
            WindowCommitted(
                first_iteration=window.first_iteration,
                last_iteration=iteration,
                nbytes=manifest.nbytes,
                seconds=time.perf_counter() - window.started,
            )
        )
        self._on_commit(manifest)

    def _say_not_finite(self, manifest: Manifest) -> None:
        if not self._said_not_finite:
            self._said_not_finite = True
            message = (
                f"the window of iterations {manifest.first_iteration}..{manifest.last_iteration} holds a loss, a "
                "gradient norm or a weight that is not finite: a restart takes the newest window without one, if "
                "there is any"
            )
            _log.warning(message)
            self._bus.emit(Notice(message=message))

    def _records_of_newest(self) -> tuple[FileRecord, ...]:
        return self._newest.files if self._newest is not None else ()

    def _carried(self, plan: WindowPlan, index: dict[str, int]) -> list[dict[str, Any]]:
        """Where the newest capture of each carried operator is: in the last window's slots or in what that carried."""
        if not plan.carried or self._newest is None:
            return []
        names = [op["name"] for op in self._newest.operators]
        wanted = {op.name for op in plan.carried}
        entries = [
            {"iteration": s["iteration"], "file": s["file"], "scalars": s["scalars"], "operators": s["active"]}
            for s in self._newest.slots
        ] + list(self._newest.extra.get("carried", []))
        result = []
        for entry in entries:
            kept = [index[names[i]] for i in entry["operators"] if names[i] in wanted]
            if kept:
                result.append({**entry, "operators": kept})
        return result


class _SlotJob:
    """One slot on its way into a file."""

    def __init__(
        self,
        writer: WindowWriter,
        window: OpenWindow,
        slot: int,
        plan: SlotPlan,
        iteration: int,
        record: Callable[[], dict[str, Any]],
    ) -> None:
        self._writer = writer
        self._window = window
        self._slot = slot
        self._plan = plan
        self._iteration = iteration
        self._record = record
        self._buffer: HostBuffer | None = None
        self._compiled: CompiledSlot | None = None
        self._checked = threading.Event()
        self._sources: SlotSources | None = None  # kept until the copies have arrived: they read from it
        self._static: StaticCopy | None = None
        # Taken on the training thread, at the iteration's end: copies that began late see later changes, too.
        self._names = writer._files.names(slot, plan)
        self._versions = writer._live.versions(self._names, iteration)
        self._whole = choose_whole(writer._live, window.plan.slots, slot)
        self._whole_versions = self._versions_of_whole()
        self._samples: OperatorSamples | None = None

    def copy(self) -> None:
        """Capture thread: copy the slot's bytes into a buffer."""
        writer, window = self._writer, self._window
        if window.broken:
            return
        bus, num_slots = writer._bus, len(window.plan.slots)
        bus.emit(CaptureStarted(iteration=self._iteration, slot=self._slot, num_slots=num_slots))
        self._compiled, self._sources = writer._files.compiled(self._slot, self._plan)
        buffer = self._buffer = writer._files.acquire(
            self._iteration, f"slot{self._slot:04d}", self._compiled.layout.nbytes
        )
        self._compiled.copy(self._sources, buffer)
        self._samples = OperatorSamples(writer._live, self._whole, self._iteration, writer._thread.fence)
        self._look()
        if self._slot == 0 and window.static is not None:
            self._static = writer._files.copy_static(window.first_iteration, window.static)

    def check(self) -> None:
        """Training thread, before the next update: copies that are queued may have run after a change by user code."""
        self._look()
        self._checked.set()

    def _look(self) -> None:
        """User code may have changed the sources since the iteration's end: then the copies are of no use."""
        if self._versions != self._writer._live.versions(self._names, self._iteration):
            self._window.broken = TORN
        elif self._whole_versions != self._versions_of_whole():
            self._samples = None  # they are not those of this iteration

    def failed(self, error: Exception) -> None:
        """Capture thread: something went wrong; that gives the window up, whatever it is, and never the training."""
        window = self._window
        if self._writer.newest_is(window):
            _log.warning("what follows the commit of a window failed: %s: %s", type(error).__name__, error)
        else:
            window.fail(error)
        self._let_go()

    def _let_go(self) -> None:
        """Give the buffers back, and what they were filled from."""
        static = None if self._static is None else self._static.buffer
        for buffer in (self._buffer, static):
            if buffer is not None:
                self._writer._tier.release(buffer)
        self._buffer = self._static = self._sources = None
        self._window.done = self._slot == len(self._window.plan.slots) - 1

    def _versions_of_whole(self) -> list[int]:
        live = self._writer._live
        return [live.weight(piece_at(op, self._iteration).parameter)._version for op in self._whole]

    def _weights(self) -> dict[str, str]:
        return {} if self._samples is None else self._samples.read()

    def finish(self) -> None:
        """Capture thread: seal the slot; commit the window if it was the last one."""
        static = self._window.static
        if self._static is not None and static is not None and self._static.look.digest() != static.digest:
            self._window.broken = TORN
        if not self._window.broken:
            self._seal()
        self._let_go()

    def _seal(self) -> None:
        writer, window, sources, compiled = self._writer, self._window, self._sources, self._compiled
        assert self._buffer is not None
        assert sources is not None
        assert compiled is not None
        nbytes, num_slots = compiled.layout.nbytes, len(window.plan.slots)
        seconds = writer._thread.fence.copy_seconds()
        writer._pace.copied(nbytes + (self._static.layout.nbytes if self._static is not None else 0), seconds)
        writer._bus.emit(
            CaptureFinished(
                iteration=self._iteration, slot=self._slot, num_slots=num_slots, nbytes=nbytes, seconds=seconds
            )
        )
        replay_record = self._record()
        tell_loss(writer._bus, self._iteration, replay_record)
        # The views are gone again at once: memory that a tensor aliases cannot be given another size.
        finite = weights_are_finite(compiled.stored_weights(self._buffer, TENSORS))
        window.finite = window.finite and finite and record_is_finite(replay_record)
        record = writer._tier.seal(self._buffer, compiled.layout)
        self._buffer = None
        window.records.append(record)
        window.slots.append(
            {
                "iteration": self._iteration,
                "file": record.name,
                "scalars": sources.scalars,
                "record": {**replay_record, "weights": self._weights()},
            }
        )
        if self._slot == 0:
            assert window.rest is not None
            window.rest_record = writer._files.write_tree(window.first_iteration, "rest", window.rest)
            if self._static is not None:
                window.static_record = writer._tier.seal(self._static.buffer, self._static.layout)
                self._static = None
            else:
                writer.take_static_of_newest(window)
        writer._bus.emit(SlotSealed(iteration=self._iteration, slot=self._slot, file=record.name))
        if self._slot == num_slots - 1:
            if writer._thread.fence.enabled:
                self._checked.wait()
            following = window.to_come.wait()
            if not window.broken:
                writer.commit(window, self._iteration, following)
