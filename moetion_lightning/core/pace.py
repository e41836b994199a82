"""How fast training and copying are: rolling medians of the iteration time and the copy bandwidth."""

from __future__ import annotations

import statistics
import time
from collections import deque

__all__ = ["Pace"]

#: Iterations of the rolling median (released MoEvement code: 50).
_NUM_ITERATIONS = 50


class Pace:
    """Rolling medians, robust against iterations that validate or save."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_NUM_ITERATIONS)
        self._bandwidth: deque[float] = deque(maxlen=_NUM_ITERATIONS)
        self._own = 0.0
        self._asked = time.thread_time()

    def iteration(self, seconds: float) -> None:
        """Note the duration of an iteration, seconds."""
        self._seconds.append(seconds)

    def copied(self, nbytes: int, seconds: float) -> None:
        """Note a capture that ran beside training."""
        if nbytes > 1 << 20 and seconds > 0:  # the fixed cost of a small capture says nothing about bandwidth
            self._bandwidth.append(nbytes / seconds)

    def waited_for_data(self, seconds: float) -> None:
        """Note how long the training thread had to wait for a batch, seconds."""
        self._own += seconds

    def take_own_seconds(self) -> float:
        """Since the last call: processor time of the calling thread, and its waits for data.

        That is what this rank makes the others wait for, wherever in an iteration they do: a wait for another rank
        takes no processor time (on the CPU; a device is waited for by asking it again and again).
        """
        now = time.thread_time()
        own, self._own, self._asked = self._own + now - self._asked, 0.0, now
        return own

    @property
    def iteration_seconds(self) -> float:
        """Median iteration time, seconds; 0 before the first."""
        return statistics.median(self._seconds) if self._seconds else 0.0

    def bytes_per_second(self, measured_at_start: float) -> float:
        """Median bandwidth of the captures, or what was measured at start before the first one."""
        return statistics.median(self._bandwidth) if self._bandwidth else measured_at_start
