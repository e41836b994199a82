"""Writes the gradient log to the host-memory tier: one restore point for each iteration, its manifest last.

A restore point names the newest full capture of every slot, and for each iteration behind the oldest of them a file of
the steps' settings and, for each group of slots of which one was captured before it, a file of gradients.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import operator
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from moetion_lightning.capture.plan import CompiledSlot, SlotSources
from moetion_lightning.core.operators import Operator, Piece
from moetion_lightning.core.pace import Pace
from moetion_lightning.core.policy import SlotPlan, WindowPlan
from moetion_lightning.core.state import LiveState
from moetion_lightning.engine.finiteness import TENSORS, record_is_finite, weights_are_finite
from moetion_lightning.engine.log_items import CallInFlight, Captured, IterationState, Logged, LoggedIteration
from moetion_lightning.engine.replay_record import tell_loss
from moetion_lightning.engine.slot_files import OperatorTable, SlotFiles, StaticCopy
from moetion_lightning.engine.weight_check import OperatorSamples
from moetion_lightning.events import (
    CaptureFinished,
    CaptureStarted,
    EventBus,
    ManifestWritten,
    Notice,
    OperatorAudited,
    SlotSealed,
    WindowCommitted,
)
from moetion_lightning.gradient_log.audit import Finding, audit
from moetion_lightning.gradient_log.gradients import GradientFiles, Rows, rows_that_count
from moetion_lightning.gradient_log.rebuild import LoggedCall
from moetion_lightning.gradient_log.rebuild import LoggedIteration as Iteration
from moetion_lightning.gradient_log.steps import Consumed, calls_tree
from moetion_lightning.storage.format import FileRecord, Manifest
from moetion_lightning.storage.host_memory import HostBuffer
from moetion_lightning.storage.tree import flatten_tree

__all__ = ["TORN", "CallInFlight", "IterationState", "LogWriter", "LoggedIteration"]

_SMALL_BYTES = 4 << 20
_log = logging.getLogger(__name__)
#: Why an iteration is no restore point when user code writes to weights behind the captures' back.
TORN = "weights were changed between an iteration's end and the next optimizer step"


def _weight_bytes(live: LiveState, slot: SlotPlan) -> int:
    names = dict.fromkeys(piece.parameter for op in slot.active for piece in op.pieces)
    return sum(live.weight(name).numel() * live.weight(name).element_size() for name in names)


class LogWriter:
    """Everything but :meth:`begin`, :meth:`log`, :meth:`capture` and :meth:`abandon` runs on the capture thread.

    Args:
        files: Makes the files.
        bus: Gets the events.
        pace: Learns the bandwidth.
        on_commit: Called with each committed manifest, on the capture thread.
        keeps: Restore points that stay.
    """

    def __init__(
        self,
        files: SlotFiles,
        bus: EventBus,
        pace: Pace,
        on_commit: Callable[[Manifest], None],
        *,
        keeps: int,
    ) -> None:
        self.files = files
        self._tier, self._thread, self._live = files.tier, files.thread, files.live
        self._bus = bus
        self._pace = pace
        self._on_commit = on_commit
        self._keeps = keeps
        self._table = OperatorTable()
        self._gradient_files: dict[int, tuple[list[tuple[Operator, ...]], GradientFiles]] = {}
        self._slots: tuple[SlotPlan, ...] = ()
        #: Slots whose gradients share files: those of small models, where a file costs more than what is in it.
        self._groups: tuple[tuple[int, ...], ...] = ()
        self._captured: dict[int, Captured] = {}
        self._logged: list[Logged] = []
        self._static: tuple[str, FileRecord | None] = ("", None)
        #: The newest restore point that this writer committed.
        self.newest: Manifest | None = None
        #: The oldest restore point that must stay, whatever follows: a rank has no newer one. None: as many as ever.
        self.oldest_needed: int | None = None
        self._said_not_finite = False

    # --- training thread -----------------------------------------------------------------------------------------

    def begin(self, slots: tuple[SlotPlan, ...]) -> None:
        """The next capture is of all slots, and nothing that was logged before counts. The thread is idle."""
        self._slots = slots
        nbytes = sum(_weight_bytes(self._live, slot) for slot in slots)
        numbers = range(len(slots))
        self._groups = (tuple(numbers),) if nbytes <= _SMALL_BYTES else tuple((slot,) for slot in numbers)
        self._captured, self._logged = {}, []

    def log(self, iteration: LoggedIteration, call: CallInFlight) -> None:
        """Copy the gradients of a call."""
        job = _GradientJob(self, iteration, call)
        self._thread.submit_beside(job.copy, job.finish, job.failed, call.copied)

    def capture(self, behind: LoggedIteration, state: IterationState) -> None:
        """An iteration has ended: capture its slots, and commit it."""
        behind.started = time.perf_counter()
        job = _CommitJob(self, behind, state)
        self._thread.submit(job.copy, job.finish, job.failed, job.check)

    def abandon(self, iteration: LoggedIteration) -> None:
        """Give back the files of an iteration that will not be committed. The thread is idle."""
        for call in iteration.calls:
            self.let_go(call)

    # --- capture thread ------------------------------------------------------------------------------------------

    def let_go(self, call: CallInFlight) -> None:
        """Give back the buffers of a call."""
        buffers, call.buffers, call.consumed = call.buffers, {}, None
        for buffer, _ in buffers.values():
            self._tier.release(buffer)

    def gradient_files(self, group: int) -> GradientFiles:
        """Where gradients of a group of slots lie in a file."""
        slots = [self._slots[slot].active for slot in self._groups[group]]
        known = self._gradient_files.get(group)
        if known is None or len(known[0]) != len(slots) or any(map(operator.is_not, known[0], slots)):
            operators = [op for slot in slots for op in slot]
            names = dict.fromkeys(piece.parameter for op in operators for piece in op.pieces)
            weights = {name: self._live.weight(name) for name in names}
            forms = {name: (weight.dtype, tuple(weight.shape)) for name, weight in weights.items()}
            known = self._gradient_files[group] = (slots, GradientFiles(forms, operators))
        return known[1]

    def wanted(self, iteration: LoggedIteration) -> list[int]:
        """Groups of slots whose gradients of this iteration a restore may need: of slots not captured behind it."""
        return [
            group
            for group, slots in enumerate(self._groups)
            if any(self._slots[slot].active and slot not in iteration.slots for slot in slots)
        ]

    def commit(
        self,
        behind: LoggedIteration,
        state: IterationState,
        captured: Mapping[int, Captured],
        rest: FileRecord,
        static: tuple[str, FileRecord | None],
        record: Mapping[str, Any],
        finite: bool,
    ) -> None:
        """Seal what the iteration consumed, write its manifest, and drop what is not needed any more."""
        iteration = behind.iteration
        if self.wanted(behind):
            self._logged.append(self._sealed(behind))
        for call in behind.calls:
            self.let_go(call)
        self._captured.update(captured)
        self._static = static
        oldest = min((c.iteration for c in self._captured.values()), default=iteration)
        self._logged = [logged for logged in self._logged if logged.iteration > oldest]
        plan = WindowPlan(slots=self._slots)
        operators, _ = self._table.of(plan)
        log, logged_files = self._needed()
        slots = [
            {
                "slot": slot,
                "iteration": c.iteration,
                "file": c.record.name,
                "scalars": c.scalars,
                "active": self._table.numbers(self._slots[slot].active),
                "frozen": [],
            }
            for slot, c in sorted(self._captured.items())
        ]
        files = [*(c.record for c in self._captured.values()), *logged_files, rest]
        if static[1] is not None:
            files.append(static[1])
        header = state.header
        manifest = Manifest(
            job=self._tier.job,
            rank=self._tier.rank,
            world_size=self._tier.world_size,
            policy=header.policy,
            first_iteration=iteration,
            last_iteration=iteration,
            created_at=time.time(),
            fingerprint=header.fingerprint,
            operators=operators,
            slots=slots,
            files=tuple(files),
            rest=rest.name,
            static=None if static[1] is None else static[1].name,
            extra={
                **header.extra,
                "parameters": header.parameters,
                "layout": header.layout,
                "carried": [],
                "first_captured_at": state.captured_at,
                "next": behind.to_come.wait(),
                "log": log,
                "groups": [list(group) for group in self._groups],
                "record": dict(record),
                "round_begins": state.round_begins,
                **({} if finite else {"finite": False}),
            },
        )
        if behind.broken:
            return
        self._tier.commit(
            manifest,
            on_stage=lambda stage: self._bus.emit(ManifestWritten(iteration=iteration, committed=stage == "committed")),
        )
        behind.sealed.clear()
        before, self.newest = self.newest, manifest
        self._drop_older(manifest, before)
        nbytes = sum(r.nbytes for r in files if before is None or r not in before.files)
        self._bus.emit(
            WindowCommitted(
                first_iteration=iteration,
                last_iteration=iteration,
                nbytes=nbytes,
                seconds=time.perf_counter() - behind.started,
            )
        )
        self._on_commit(manifest)

    def _sealed(self, behind: LoggedIteration) -> Logged:
        consumed = [(c.call, c.consumed) for c in behind.calls if c.consumed is not None]
        calls = calls_tree(consumed)
        steps = self.files.write_tree(behind.iteration, "steps", flatten_tree(calls))
        behind.sealed.append(steps)
        gradients = []
        buffers = {}
        for call in behind.calls:
            records = {}
            for group, (buffer, file) in list(call.buffers.items()):
                records[group] = self._tier.seal(buffer, file.layout)
                behind.sealed.append(records[group])
                buffers[records[group].name] = (buffer, file.layout)
                del call.buffers[group]
            gradients.append(records)
        return Logged(behind.iteration, steps, tuple(gradients), calls, buffers)

    def audit(self, behind: LoggedIteration, captured: Captured) -> Finding | None:
        """Rebuild the audited operator from its last capture and the log. Returns what differs from this one."""
        assert behind.audited is not None
        slot, operator = behind.audited
        before = self._captured[slot]
        group = next(number for number, slots in enumerate(self._groups) if slot in slots)
        keys = {piece.key for piece in operator.pieces}
        log = [
            Iteration(
                iteration=logged.iteration,
                calls=tuple(
                    LoggedCall.from_tree(call, functools.partial(self._pieces, logged, records.get(group), group, keys))
                    for call, records in zip(logged.calls, logged.gradients)
                ),
            )
            for logged in self._logged
            if before.iteration < logged.iteration < behind.iteration
        ]
        calls = calls_tree([(call.call, call.consumed) for call in behind.calls if call.consumed is not None])
        last = [
            LoggedCall.from_tree(tree, functools.partial(iter, call.audited)) for tree, call in zip(calls, behind.calls)
        ]
        log.append(Iteration(iteration=behind.iteration, calls=tuple(last)))
        return audit(self._live, operator, before.of(operator), log, captured.of(operator))

    def _pieces(
        self, logged: Logged, record: FileRecord | None, group: int, keys: Collection[str]
    ) -> Iterator[tuple[Piece, Tensor | None]]:
        if record is None:
            return iter(())
        buffer, layout = logged.buffers[record.name]
        return self.gradient_files(group).read(layout.views(buffer.tensor), keys)

    def _needed(self) -> tuple[list[dict[str, Any]], list[FileRecord]]:
        """What is needed of the log, as JSON, and its files."""
        entries, files = [], []
        captured = {slot: c.iteration for slot, c in self._captured.items()}
        oldest = [min((captured[s] for s in slots if s in captured), default=0) for slots in self._groups]
        for logged in self._logged:
            files.append(logged.steps)
            calls = []
            for call in logged.gradients:
                needed = {group: record for group, record in call.items() if oldest[group] < logged.iteration}
                files += needed.values()
                calls.append({str(group): record.name for group, record in needed.items()})
            entries.append({"iteration": logged.iteration, "steps": logged.steps.name, "gradients": calls})
        return entries, files

    def _drop_older(self, manifest: Manifest, before: Manifest | None) -> None:
        previous = [iteration for iteration in self._tier.windows() if iteration < manifest.iteration]
        if not manifest.finite:
            self._say_not_finite(manifest)
            if before is not None and before.finite and self._keeps == 1:
                self._tier.set_aside([before.iteration])  # as long as there is room: a restart rather takes it
                previous = [iteration for iteration in previous if iteration != before.iteration]
        needed = self.oldest_needed
        for older in previous[self._keeps - 1 :]:
            if needed is None or older < needed:
                self._tier.drop(older)

    def _say_not_finite(self, manifest: Manifest) -> None:
        if not self._said_not_finite:
            self._said_not_finite = True
            message = (
                f"iteration {manifest.iteration} has a loss, a gradient norm or a weight that is not finite: a restart "
                "takes the newest restore point without one, if there is any"
            )
            _log.warning(message)
            self._bus.emit(Notice(message=message))


class _GradientJob:
    """The gradients of one call on their way into files."""

    def __init__(self, writer: LogWriter, iteration: LoggedIteration, call: CallInFlight) -> None:
        self._writer = writer
        self._iteration = iteration
        self._call = call

    def copy(self) -> None:
        writer, iteration, call = self._writer, self._iteration, self._call
        if iteration.broken:
            return
        fence = writer._thread.fence
        consumed = call.consumed = Consumed.of(call.call, writer._live)
        rows: Rows = {}
        for group in writer.wanted(iteration):
            files = writer.gradient_files(group)
            for name in files.cut:
                if name in consumed.dense and name not in rows:
                    rows[name] = rows_that_count(consumed.dense[name], fence)
            file = files.file(consumed.dense, rows)
            if file is not None:
                buffer = writer.files.acquire(iteration.iteration, "grad", file.layout.nbytes)
                call.buffers[group] = (buffer, file)
                files.fill(file, buffer, fence)
        if iteration.audited is not None:
            pieces = [p for p in iteration.audited[1].pieces if p.parameter in consumed.dense]
            dense = [(piece, piece.of(consumed.dense[piece.parameter])) for piece in pieces]
            call.audited = [(piece, fence.fetch(g.device, functools.partial(torch.clone, g))) for piece, g in dense]

    def finish(self) -> None:
        call = self._call
        if call.versions is not None and call.call.versions() != call.versions:
            self._iteration.torn.add(call.call.optimizer)
            self._iteration.broken = "gradients were changed while they were copied"
        self._let_go()

    def failed(self, error: Exception) -> None:
        self._iteration.fail(error)
        self._writer.let_go(self._call)
        self._let_go()

    def _let_go(self) -> None:
        """Nothing is read from the gradients any more."""
        call = self._call
        call.call = dataclasses.replace(call.call, parameters=(), gradients=())
        if call.consumed is not None:
            others = {name: tensor.clone() for name, tensor in call.consumed.others.items()}
            call.consumed = Consumed(strides=call.consumed.strides, others=others)


class _CommitJob:
    """The end of one iteration on its way into the log."""

    def __init__(self, writer: LogWriter, behind: LoggedIteration, state: IterationState) -> None:
        self._writer = writer
        self._behind = behind
        self._state = state
        self._buffers: dict[int, tuple[HostBuffer, CompiledSlot, SlotSources]] = {}
        self._static: StaticCopy | None = None
        self._samples: OperatorSamples | None = None
        self._checked = threading.Event()
        live = writer._live
        names = [writer.files.names(slot, writer._slots[slot]) for slot in behind.slots]
        self._names = names[0] if len(names) == 1 else tuple(name for some in names for name in some)
        self._versions = live.versions(self._names, behind.iteration)

    def copy(self) -> None:
        writer, behind, state = self._writer, self._behind, self._state
        if behind.broken:
            return
        files, num_slots = writer.files, len(writer._slots)
        for slot in behind.slots:
            writer._bus.emit(CaptureStarted(iteration=behind.iteration, slot=slot, num_slots=num_slots))
            compiled, sources = files.compiled(slot, writer._slots[slot])
            buffer = files.acquire(behind.iteration, f"slot{slot:04d}", compiled.layout.nbytes)
            self._buffers[slot] = (buffer, compiled, sources)
            compiled.copy(sources, buffer)
        self._samples = OperatorSamples(writer._live, state.looked_at, behind.iteration, writer._thread.fence)
        if state.static is not None:
            self._static = files.copy_static(behind.iteration, state.static)
        self._look()

    def check(self) -> None:
        """Training thread, before the next update."""
        self._look()
        self._checked.set()

    def _look(self) -> None:
        if self._versions != self._writer._live.versions(self._names, self._behind.iteration):
            self._behind.broken = self._behind.broken or TORN

    def failed(self, error: Exception) -> None:
        behind = self._behind
        if self._writer.newest is not None and self._writer.newest.iteration == behind.iteration:
            _log.warning("what follows the commit of a restore point failed: %s: %s", type(error).__name__, error)
        else:
            behind.fail(error)
        self._end()

    def finish(self) -> None:
        behind, state, static = self._behind, self._state, self._static
        if static is not None and state.static is not None and static.look.digest() != state.static.digest:
            behind.broken = behind.broken or TORN
        if not behind.broken:
            self._seal()
        self._end()

    def _seal(self) -> None:
        writer, behind, state = self._writer, self._behind, self._state
        nbytes = sum(buffer.nbytes for buffer, _, _ in self._buffers.values())
        nbytes += sum(buffer.nbytes for call in behind.calls for buffer, _ in call.buffers.values())
        writer._bus.emit(
            CaptureFinished(
                iteration=behind.iteration,
                slot=behind.slots[0] if behind.slots else 0,
                num_slots=len(writer._slots),
                nbytes=nbytes,
                seconds=writer._thread.fence.copy_seconds(),
            )
        )
        record = state.record()
        tell_loss(writer._bus, behind.iteration, record)
        finite = record_is_finite(record)
        captured = {}
        for slot, (buffer, compiled, sources) in list(self._buffers.items()):
            finite = finite and weights_are_finite(compiled.stored_weights(buffer, TENSORS))
            sealed = writer._tier.seal(buffer, compiled.layout)
            behind.sealed.append(sealed)
            del self._buffers[slot]
            captured[slot] = Captured(behind.iteration, sealed, sources.scalars, buffer, compiled)
            writer._bus.emit(SlotSealed(iteration=behind.iteration, slot=slot, file=sealed.name))
        if behind.audited is not None and behind.audited[0] in captured:
            behind.finding = writer.audit(behind, captured[behind.audited[0]])
            writer._bus.emit(
                OperatorAudited(
                    iteration=behind.iteration,
                    operator=behind.audited[1].name,
                    difference="" if behind.finding is None else str(behind.finding),
                )
            )
            if behind.finding is not None and state.stops_at_findings:
                behind.broken = str(behind.finding)
                return
        rest = writer.files.write_tree(behind.iteration, "rest", state.rest)
        behind.sealed.append(rest)
        static = writer._static
        if self._static is not None:
            record_of_static = writer._tier.seal(self._static.buffer, self._static.layout)
            behind.sealed.append(record_of_static)
            static = (state.static_digest, record_of_static)
            self._static = None
        elif state.static_digest != static[0]:
            behind.broken = "the restore point on which it builds was given up"
            return
        if writer._thread.fence.enabled:
            self._checked.wait()
        record["weights"] = {} if self._samples is None else self._samples.read()
        if not behind.broken:
            writer.commit(behind, state, captured, rest, static, record, finite)

    def _end(self) -> None:
        """Give everything back that is not in a restore point now."""
        tier = self._writer._tier
        for buffer, _, _ in self._buffers.values():
            tier.release(buffer)
        if self._static is not None:
            tier.release(self._static.buffer)
        self._buffers, self._static = {}, None
        for call in self._behind.calls:
            self._writer.let_go(call)
        for record in self._behind.sealed:
            tier.discard(record)
        self._behind.done.set()
