"""CheckFreq: snapshots of everything, as often as a budget of overhead and the storage allow."""

from __future__ import annotations

import math
from collections.abc import Callable

from moetion_lightning.core.policy import PacedDensePolicy
from moetion_lightning.core.window_choice import Facts, expected_costs
from moetion_lightning.errors import ConfigurationError

__all__ = ["TwoPhasePolicy"]


class TwoPhasePolicy(PacedDensePolicy):
    """Phase one copies everything into host memory, phase two writes that to storage in the background; one in flight.

    The interval is the shortest of which a snapshot costs no more than the budget, and in which it gets to storage.
    Both are measured: iterations with a snapshot behind them against those without, and the time of each write.

    Args:
        overhead: Share of the training time that snapshots may cost.
        overlap_target: Share of an iteration behind which copies can hide, as long as nothing is measured.
        persist_seconds: Says how long the newest snapshot took to storage; 0 before the first one is there.

    Raises:
        ConfigurationError: The budget is no share.

    Source: CheckFreq (FAST'21), section 4.
    """

    def __init__(self, overhead: float, overlap_target: float, persist_seconds: Callable[[], float]) -> None:
        if not 0 < overhead < 1:
            raise ConfigurationError(f"overhead={overhead!r}: expected a share of the training time in (0, 1)")
        super().__init__(overlap_target, math.inf)
        self._overhead = overhead
        self._persist_seconds = persist_seconds

    def interval(self, facts: Facts) -> int:
        """Iterations until the next snapshot: within the budget, and not before this one is on storage."""
        snapshot = expected_costs(facts)[1]
        cost = max(0.0, snapshot.overhead + snapshot.doubt) / self._overhead
        return max(1, math.ceil(max(cost, self._persist_seconds()) / max(facts.iteration_seconds, 1e-9)))
