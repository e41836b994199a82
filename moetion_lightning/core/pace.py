"""How fast training and copying are: rolling medians of the iteration time and the copy bandwidth."""

from __future__ import annotations

import statistics
from collections import deque

__all__ = ["Pace"]

#: Iterations of the rolling median (released MoEvement code: 50).
_NUM_ITERATIONS = 50


class Pace:
    """Rolling medians, robust against iterations that validate or save."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_NUM_ITERATIONS)
        self._bandwidth: deque[float] = deque(maxlen=_NUM_ITERATIONS)

    def iteration(self, seconds: float) -> None:
        """Note the duration of an iteration, seconds."""
        self._seconds.append(seconds)

    def copied(self, nbytes: int, seconds: float) -> None:
        """Note a capture that ran beside training."""
        if nbytes > 1 << 20 and seconds > 0:  # the fixed cost of a small capture says nothing about bandwidth
            self._bandwidth.append(nbytes / seconds)

    @property
    def iteration_seconds(self) -> float:
        """Median iteration time, seconds; 0 before the first."""
        return statistics.median(self._seconds) if self._seconds else 0.0

    def bytes_per_second(self, measured_at_start: float) -> float:
        """Median bandwidth of the captures, or what was measured at start before the first one."""
        return statistics.median(self._bandwidth) if self._bandwidth else measured_at_start
