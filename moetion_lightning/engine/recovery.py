"""A recovery under way: the reconstruction, checked against the witnesses."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from moetion_lightning.core.reconstruct import Reconstruction, compare_witness
from moetion_lightning.core.state import LiveState
from moetion_lightning.engine.restore import RestorePoint
from moetion_lightning.engine.run_state import EngineState
from moetion_lightning.errors import NonDeterminismError
from moetion_lightning.events import (
    EventBus,
    ReplayFinished,
    ReplayIteration,
    RestoreApplied,
    RestoreProgress,
    WitnessMismatch,
)

__all__ = ["Recovery"]

_log = logging.getLogger(__name__)


class Recovery:
    """From :meth:`begin` to :meth:`finish`.

    Args:
        reconstruction: Puts snapshots into the live state.
        point: The restore point.
        state: Its run state.
        bus: Gets the events.
        on_mismatch: What to do when a replayed iteration differs from its witness.
    """

    def __init__(
        self,
        reconstruction: Reconstruction,
        point: RestorePoint,
        state: EngineState,
        *,
        bus: EventBus,
        on_mismatch: Literal["warn", "raise"],
    ) -> None:
        self._reconstruction = reconstruction
        self._point = point
        self._state = state
        self._bus = bus
        self._on_mismatch = on_mismatch
        self._verified = True
        self._started = time.perf_counter()

    @property
    def done(self) -> bool:
        """Whether the state is dense."""
        return self._reconstruction.done

    def begin(self, live: LiveState, roots: Mapping[str, object]) -> None:
        """Put the window's first iteration in place."""
        progress = None
        if self._bus.fine_grained:

            def progress(done: int, total: int) -> None:
                self._bus.emit(RestoreProgress(index=done, total=total))

        self._state.apply_structure(live)
        self._point.apply_static(live)
        self._reconstruction.begin(progress)
        self._state.apply(live, roots)
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
        return [float.fromhex(norm) for norm in self._reconstruction.next_slot.witness["norms"]]

    def end_iteration(self, witness: Mapping[str, Any], misread: Sequence[str] = ()) -> None:
        """A replayed iteration is complete: apply its snapshot, compare its witness.

        Args:
            witness: What the replayed iteration looked like.
            misread: Parameters that were read in full precision although only compute weights had been kept.

        Raises:
            NonDeterminismError: It differs, and ``on_mismatch="raise"``.
        """
        slot = self._reconstruction.finish_iteration()
        differences = compare_witness(slot.witness, witness)
        differences += [("compute weights", "cast to 16 bits in every use", f"{n} read in full") for n in misread]
        for quantity, recorded, replayed in differences:
            self._verified = False
            self._bus.emit(
                WitnessMismatch(iteration=slot.iteration, quantity=quantity, recorded=recorded, replayed=replayed)
            )
        self._bus.emit(
            ReplayIteration(
                iteration=slot.iteration,
                slot=self._reconstruction.position,
                num_slots=self._point.num_slots,
                verified=not differences,
            )
        )
        if differences:
            details = "; ".join(f"{q}: recorded {a}, replayed {b}" for q, a, b in differences)
            message = (
                f"iteration {slot.iteration} was replayed differently ({details}). The recovered state is approximate: "
                "the training is not deterministic. Look for unseeded randomness, non-deterministic kernels "
                "(torch.use_deterministic_algorithms(True) names them), data that changes between runs, or state that "
                "is neither in a buffer nor in state_dict()."
            )
            if self._on_mismatch == "raise":
                raise NonDeterminismError(message)
            _log.warning(message)

    def finish(self) -> None:
        """The state is dense."""
        self.release()
        replayed = self._point.num_slots - 1
        seconds = time.perf_counter() - self._started
        iteration = self._point.manifest.first_iteration + replayed
        self._bus.emit(ReplayFinished(iteration=iteration, replayed=replayed, seconds=seconds, verified=self._verified))
        verdict = "every replayed iteration matched its witness" if self._verified else "SOME ITERATIONS DIFFERED"
        _log.info(
            "recovered: dense state of iteration %d after %d replayed iterations in %.1f s; %s",
            iteration, replayed, seconds, verdict,
        )  # fmt: skip

    def release(self) -> None:
        """Undo what the replay changed on the module."""
        self._reconstruction.release()
