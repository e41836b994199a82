"""A state rebuilt from a gradient log, and compared with what was recorded of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from moetion_lightning.capture.fence import DeviceFence
from moetion_lightning.core.generators import Generators
from moetion_lightning.core.state import LiveState
from moetion_lightning.engine.completeness import check_complete
from moetion_lightning.engine.recovery import MismatchReport
from moetion_lightning.engine.replay_check import Comparison, Suspects, Verdict, compare_next, compare_records
from moetion_lightning.engine.restore import RestorePoint
from moetion_lightning.engine.run_state import EngineState
from moetion_lightning.engine.weight_check import OperatorSamples
from moetion_lightning.events import EventBus, ReplayFinished, RestoreApplied, StateRebuilt
from moetion_lightning.gradient_log.rebuild import Capture, rebuild

__all__ = ["LogRecovery", "compare_rebuilt"]

_log = logging.getLogger(__name__)


def compare_rebuilt(point: RestorePoint, live: LiveState, captures: Iterable[Capture]) -> Comparison:
    """Compare a state that was rebuilt with the samples that were recorded of it.

    Args:
        point: The restore point.
        live: The state.
        captures: What it was rebuilt from.
    """
    recorded = {"weights": point.extra.get("record", {}).get("weights", {})}
    operators = {op.name: op for capture in captures for op in capture.operators}
    looked_at = [operators[name] for name in recorded["weights"] if name in operators]
    now = OperatorSamples(live, looked_at, point.manifest.iteration, DeviceFence()).read()
    return compare_records(recorded, {"weights": now})


class LogRecovery:
    """:meth:`rebuild`, and :meth:`conclude`, when the batch behind it is known.

    Args:
        point: The restore point.
        live: The live state.
        bus: Gets the events.
        on_mismatch: What to do when the rebuilt state, or the batch behind it, differs from what was recorded.
    """

    def __init__(
        self, point: RestorePoint, live: LiveState, bus: EventBus, on_mismatch: Literal["warn", "raise"]
    ) -> None:
        self._point = point
        self._live = live
        self._bus = bus
        self._lost_generators: list[str] = []
        self._report = MismatchReport(bus, on_mismatch, self._suspects)
        self._next: Mapping[str, Any] = point.extra.get("next", {})
        self._verdict = Verdict(num_operators=0)
        self._iteration = point.manifest.iteration
        self._seconds = 0.0

    def rebuild(self, state: EngineState, generators: Generators, world_size: int) -> None:
        """Put the state after the restore point's iteration in place.

        Args:
            state: Its run state.
            generators: Random number generators of user objects.
            world_size: Ranks of this run.

        Raises:
            StateLostError, ForeignWindowError, CorruptSnapshotError: The restore point is not whole.
            NonDeterminismError: What was rebuilt is not what was recorded, and ``on_mismatch="raise"``.
        """
        point, live, started = self._point, self._live, time.perf_counter()
        check_complete(point, live, world_size)
        state.apply_structure(live)
        point.apply_static(live)
        captures = point.captures(live.parameters)
        self._bus.emit(RestoreApplied(iteration=self._iteration, replay=0, seconds=time.perf_counter() - started))
        steps = rebuild(live, captures, point.logged(), self._iteration)
        self._verdict.num_operators = sum(len(capture.operators) for capture in captures)
        self._lost_generators = state.apply(live, generators)
        state.apply_order(live)
        found = compare_rebuilt(point, live, captures)
        self._verdict.add(self._iteration, found)
        self._seconds = time.perf_counter() - started
        oldest = min((capture.iteration for capture in captures), default=self._iteration)
        self._bus.emit(
            StateRebuilt(
                iteration=self._iteration, rebuilt=self._iteration - oldest, steps=steps, seconds=self._seconds
            )
        )
        self._report.say(found, self._iteration, f"the state after iteration {self._iteration} was rebuilt differently")

    def _suspects(self) -> Suspects:
        return Suspects(generators=tuple(self._lost_generators), rebuilt=True)

    def conclude(self, batch: Mapping[str, Any] | None) -> None:
        """Say what was compared.

        Args:
            batch: Record of the batch behind the state; None if training ends without one.

        Raises:
            NonDeterminismError: It differs from the one that the original run drew, and ``on_mismatch="raise"``.
        """
        verdict = self._verdict
        if batch is not None:
            verdict.next_batch = compare_next(self._next, batch)
        self._bus.emit(
            ReplayFinished(
                iteration=self._iteration,
                replayed=0,
                seconds=self._seconds,
                compared=verdict.compared,
                verified=verdict.verified,
            )
        )
        _log.info(
            "recovered: %sstate of iteration %d, rebuilt from logged gradients in %.1f s; %s",
            "APPROXIMATE " if verdict.differs else "", self._iteration, self._seconds, verdict,
        )  # fmt: skip
        if verdict.next_batch is not None:
            what = f"what follows the restored iteration {self._iteration} is not what followed it before"
            self._report.say(verdict.next_batch, self._iteration + 1, what)
