"""A recovery under way: the reconstruction, checked against what was recorded."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from moetion_lightning.capture.fence import DeviceFence
from moetion_lightning.core.generators import Generators
from moetion_lightning.core.operators import Operator
from moetion_lightning.core.reconstruct import Reconstruction, SavedSlot
from moetion_lightning.core.state import LiveState
from moetion_lightning.engine.replay_check import (
    Comparison,
    Difference,
    Suspects,
    Verdict,
    compare_next,
    compare_records,
    likely_causes,
)
from moetion_lightning.engine.restore import RestorePoint
from moetion_lightning.engine.run_state import EngineState
from moetion_lightning.engine.weight_check import OperatorSamples
from moetion_lightning.errors import NonDeterminismError
from moetion_lightning.events import (
    EventBus,
    ReplayFinished,
    ReplayIteration,
    ReplayMismatch,
    RestoreApplied,
)

__all__ = ["MismatchReport", "Recovery"]

_log = logging.getLogger(__name__)


class MismatchReport:
    """Says what differs from the run that failed.

    Args:
        bus: Gets every difference.
        on_mismatch: What to do besides.
        suspects: Gives what may explain it.
    """

    def __init__(
        self, bus: EventBus, on_mismatch: Literal["warn", "raise"], suspects: Callable[[], Suspects] = Suspects
    ) -> None:
        self._bus = bus
        self._on_mismatch = on_mismatch
        self._suspects = suspects
        self._warned = False

    def say(self, found: Comparison, iteration: int, what: str) -> None:
        """Every difference as an event; the first ones with their cause, as the others follow from them.

        Raises:
            NonDeterminismError: There is one, and ``on_mismatch="raise"``.
        """
        for difference in found.differences:
            self._bus.emit(
                ReplayMismatch(
                    iteration=iteration,
                    quantity=difference.quantity,
                    recorded=difference.recorded,
                    replayed=difference.replayed,
                )
            )
        if not found.differences or self._warned:
            return
        self._warned = True
        causes = likely_causes(found.differences, found.compared, self._suspects())
        message = (
            f"{what} ({'; '.join(map(str, found.differences))}). THE RECOVERED STATE IS APPROXIMATE from here on. "
            f"Likely cause: {'; or '.join(causes)}."
        )
        if self._on_mismatch == "raise":
            raise NonDeterminismError(message)
        _log.warning(message)


class Recovery:
    """From :meth:`begin` to :meth:`finish`, and to :meth:`conclude`, when the batch behind it is known.

    Args:
        reconstruction: Puts snapshots into the live state.
        live: The live state.
        point: The restore point.
        state: Its run state.
        bus: Gets the events.
        on_mismatch: What to do when a replayed iteration differs from what was recorded.
        gradients_skipped: Whether the replay leaves gradients of frozen operators out.
    """

    def __init__(
        self,
        reconstruction: Reconstruction,
        live: LiveState,
        point: RestorePoint,
        state: EngineState,
        *,
        bus: EventBus,
        on_mismatch: Literal["warn", "raise"],
        gradients_skipped: bool,
        changed: Sequence[str] = (),
    ) -> None:
        self._reconstruction = reconstruction
        self._live = live
        self._point = point
        self._state = state
        self._bus = bus
        self._gradients_skipped = gradients_skipped
        self._changed = tuple(changed)
        slots = reconstruction.slots
        self._next: Mapping[str, Any] = point.extra.get("next", {})
        self._verdict = Verdict(num_operators=sum(len(slot.active) for slot in slots))
        self._lost_generators: list[str] = []
        self._report = MismatchReport(bus, on_mismatch, self._suspects)
        self._started = time.perf_counter()
        self._seconds = 0.0

    @property
    def done(self) -> bool:
        """Whether the state is dense."""
        return self._reconstruction.done

    def begin(self, live: LiveState, generators: Generators) -> None:
        """Put the window's first iteration in place."""
        self._state.apply_structure(live)
        self._point.apply_static(live)
        self._reconstruction.begin()
        self._lost_generators = self._state.apply(live, generators)
        self._bus.emit(
            RestoreApplied(
                iteration=self._point.manifest.first_iteration,
                replay=self._point.num_slots - 1,
                seconds=time.perf_counter() - self._started,
            )
        )

    def after_step(self, optimizer_index: int) -> None:
        """An optimizer has stepped."""
        self._reconstruction.after_step(optimizer_index)

    def norms_to_give(self) -> list[float] | None:
        """Gradient norms of the iteration to be replayed next, for clipping without the frozen gradients."""
        if self.done:
            return None
        return [float.fromhex(norm) for norm in self._reconstruction.next_slot.record.get("norms", [])]

    def end_iteration(self, record: Mapping[str, Any], misread: Sequence[str] = ()) -> None:
        """A replayed iteration is complete: apply its snapshot, compare its record.

        Args:
            record: What the replayed iteration looked like.
            misread: Parameters that were read in full precision although only compute weights had been kept.

        Raises:
            NonDeterminismError: It differs, and ``on_mismatch="raise"``.
        """
        weights = self._weights(self._reconstruction.next_slot)
        slot = self._reconstruction.finish_iteration()
        found = compare_records(slot.record, {**record, "weights": weights}, gradients_skipped=self._gradients_skipped)
        if misread:
            kept, read = "cast to 16 bits in every use", f"{', '.join(misread)} read in full"
            late = Difference(quantity="compute weights", recorded=kept, replayed=read)
            found = dataclasses.replace(found, differences=(*found.differences, late))
        self._verdict.add(slot.iteration, found)
        self._bus.emit(
            ReplayIteration(
                iteration=slot.iteration,
                slot=self._reconstruction.position,
                num_slots=self._point.num_slots,
                verified=bool(found.compared) and not found.differences,
            )
        )
        self._report.say(found, slot.iteration, f"iteration {slot.iteration} was replayed differently")

    def finish(self) -> None:
        """The state is dense; what is still to be compared is the next batch."""
        self.release()
        self._state.apply_order(self._live)
        self._seconds = time.perf_counter() - self._started

    def conclude(self, batch: Mapping[str, Any] | None) -> None:
        """Say what was compared: the state is dense, and the batch behind it is known.

        Args:
            batch: Its record, with that of the random generators; None if training ends without one.

        Raises:
            NonDeterminismError: It differs from the one that the original run drew, and ``on_mismatch="raise"``.
        """
        verdict = self._verdict
        if batch is not None:
            verdict.next_batch = compare_next(self._next, batch)
        replayed = self._point.num_slots - 1
        iteration = self._point.manifest.first_iteration + replayed
        self._bus.emit(
            ReplayFinished(
                iteration=iteration,
                replayed=replayed,
                seconds=self._seconds,
                compared=verdict.compared,
                verified=verdict.verified,
            )
        )
        _log.info(
            "recovered: %s state of iteration %d after %d replayed iterations in %.1f s; %s",
            "APPROXIMATE" if verdict.differs else "dense", iteration, replayed, self._seconds, verdict,
        )  # fmt: skip
        if verdict.next_batch is not None:
            what = f"what follows the restored iteration {iteration} is not what followed it before"
            self._report.say(verdict.next_batch, iteration + 1, what)

    def release(self) -> None:
        """Undo what the replay changed on the module."""
        self._reconstruction.release()

    def _weights(self, slot: SavedSlot) -> dict[str, str]:
        """Of the operators that the original run looked at after this iteration."""
        wanted = slot.record.get("weights", {})
        known = self._operators() if wanted else {}
        operators = [known[name] for name in wanted if name in known]
        return OperatorSamples(self._live, operators, slot.iteration, DeviceFence()).read()

    def _operators(self) -> dict[str, Operator]:
        whole = self._reconstruction.slots[: self._reconstruction.position + 1]
        return {op.name: op for slot in whole for op in slot.active}

    def _suspects(self) -> Suspects:
        return Suspects(
            elementwise=tuple(self._live.declared_elementwise()),
            generators=tuple(self._lost_generators),
            changed=self._changed,
        )
