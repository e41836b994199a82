"""What captures cost training: iterations with and without them, compared where they lie next to each other."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

__all__ = ["CaptureCost", "Measured", "compare"]

#: Iterations of a pause. The first one is not counted: the window before it is still being committed.
_PAUSE = 6
#: Iterations with captures before a pause, and after it, that are compared with it: two windows, and at least these.
_BESIDE = 4
_FIRST_INTERVAL, _LONGEST_INTERVAL = 8, 4096  # iterations with captures between two pauses
_OTHER_PACE = 0.2  # change of the iteration time
_OTHER_COST = 4.0, 0.01  # a comparison that is off by so many standard errors, and this share of an iteration
_MIN_ROUNDS = 2  # one comparison alone may be chance
_KEPT_SAMPLES = 16  # of each slot, the newest
_NORMAL = 1.4826  # median deviation -> standard deviation
_MEDIAN = 1.25  # standard error of a median, in those of a mean
_LEAST_ERROR = 5e-4  # of an iteration


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What captures add to an iteration, on average over a window.

    Args:
        seconds: The difference; noise can make it negative.
        error: Its standard error, seconds.
        rounds: Pauses that it was compared with.
    """

    seconds: float
    error: float
    rounds: int


def compare(captured: Sequence[float], plain: Sequence[float]) -> Measured | None:
    """What captures add where iterations with and without them alternate; None before there are enough of both.

    Args:
        captured: Seconds of iterations with a capture behind them.
        plain: Seconds of those without.
    """
    if min(len(captured), len(plain)) < _BESIDE:
        return None
    middle, base = statistics.median(captured), statistics.median(plain)
    error = math.hypot(_error([s - middle for s in captured]), _error([s - base for s in plain]))
    rounds = min(len(captured), len(plain)) // _BESIDE
    return Measured(
        seconds=middle - base, error=max(error * (1 + 2 / rounds), _LEAST_ERROR * base), rounds=rounds
    )  # fmt: skip


class CaptureCost:
    """Pauses captures now and then, and compares the iterations on both sides with those in between.

    A pause costs protection: a failure then goes back further. So it has few iterations, comes ever more rarely, and
    never before a window is committed.

    What is planned (:meth:`window_begins`, :meth:`pauses`) depends on iterations only: it is the same on all ranks.
    What is measured (:meth:`iteration`, :meth:`measured`) is this rank's own.
    """

    def __init__(self) -> None:
        self._window = 0
        self._changes = 0
        self._since = self._interval = 0
        self._seconds = 0.0
        self._pause = range(0)
        #: Whether there is a new result since this was cleared.
        self.news = False
        self._rounds = 0
        self._plain: deque[float] = deque(maxlen=4)
        self._past: dict[int, tuple[Measured, int]] = {}
        self._start()

    # --- the rhythm --------------------------------------------------------------------------------------------------

    def window_begins(self, iteration: int, window: int, seconds: float, *, protected: bool) -> None:
        """A window is planned.

        Args:
            iteration: Completed iterations.
            window: Its iterations.
            seconds: How long iterations take; the same on all ranks.
            protected: Whether all ranks have committed a window.
        """
        if window != self._window:
            measured = self._now()
            if measured is not None:
                self._past[self._window] = measured, self._rounds
            self._past.pop(window, None)
            self._window = window
            self._start()
            self._since = iteration + 2 * window  # the first two windows make their buffers
            # Who changes again and again waits longer and longer before the next change.
            self._interval = min(max(_FIRST_INTERVAL, 2 * window) << min(self._changes, 10), _LONGEST_INTERVAL)
            self._changes += measured is not None
            self._seconds = seconds
        if abs(seconds - self._seconds) > _OTHER_PACE * self._seconds:  # training is another one now: look soon
            self._seconds, self._since = seconds, iteration
            self._interval = max(_FIRST_INTERVAL, 2 * window, self._interval // 8)
        end = iteration + window
        if protected and end - self._since >= self._interval:
            self._pause = range(end, end + _PAUSE)
            self._since, self._seconds = end + _PAUSE, seconds
            self._interval = min(2 * self._interval, _LONGEST_INTERVAL)

    def pauses(self, iteration: int) -> bool:
        """Whether no window begins after this iteration."""
        return iteration in self._pause

    # --- what is measured --------------------------------------------------------------------------------------------

    def iteration(self, iteration: int, seconds: float, slot: int | None) -> None:
        """An iteration has ended.

        Args:
            iteration: Completed iterations.
            seconds: How long it took.
            slot: The window's slot that was captured behind it; None if nothing was.
        """
        if slot is None:
            if iteration - 1 in self._pause[1:]:
                if iteration - 1 == self._pause[1]:
                    self._without.clear()
                    self._beside[:] = self._recent
                    self._missing = len(self._beside)
                self._without.append(seconds)
            return
        self._recent.append((slot, seconds))
        if self._without and self._missing:
            self._beside.append((slot, seconds))
            self._missing -= 1
            if not self._missing:
                self._compare()

    @property
    def plain_seconds(self) -> float:
        """An iteration without captures, seconds; 0 before the first pause."""
        return statistics.median(self._plain) if self._plain else 0.0

    def measured(self) -> Mapping[int, Measured]:
        """By window: the current one, and those before it, whose errors grow as time goes on."""
        result = {
            window: replace(found, error=found.error * (1 + (self._rounds - at) / 4))
            for window, (found, at) in self._past.items()
        }
        now = self._now()
        return result if now is None else {**result, self._window: now}

    def forget_samples(self) -> None:
        """Windows have other bytes now: what was measured says nothing of them."""
        self._past.clear()
        self._start()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Nothing is known of the current window."""
        self._samples = _Samples()
        num_beside = self._window * max(2, math.ceil(_BESIDE / max(1, self._window)))
        self._recent: deque[tuple[int, float]] = deque(maxlen=num_beside)
        self._without: list[float] = []
        self._beside: list[tuple[int, float]] = []
        self._missing = 0

    def _compare(self) -> None:
        plain = statistics.median(self._without)
        here = _Samples()
        here.add(self._beside, self._without, plain)
        before = self._samples
        if before.rounds:
            off, error = abs(here.seconds - before.seconds), math.hypot(here.error, before.error)
            if off > max(_OTHER_COST[0] * error, _OTHER_COST[1] * plain):
                self._samples = _Samples()  # what was before is no more
        self._samples.add(self._beside, self._without, plain)
        self._plain.append(plain)
        self._rounds += 1
        self.news = self._now() is not None

    def _now(self) -> Measured | None:
        now = self._samples
        if now.rounds < _MIN_ROUNDS:
            return None
        error = max(now.error * (1 + 2 / now.rounds), _LEAST_ERROR * self.plain_seconds)
        return Measured(seconds=now.seconds, error=error, rounds=now.rounds)


class _Samples:
    """Differences between iterations with captures and those without, slot by slot.

    What a window costs once (its beginning, its commit) is always in the same slot, and stays in the slot's median;
    what happens now and then (validation, logging) does not.
    """

    def __init__(self) -> None:
        self._slots: dict[int, deque[float]] = {}
        self._noise: deque[float] = deque(maxlen=_KEPT_SAMPLES)
        self.rounds = 0

    def add(self, beside: Iterable[tuple[int, float]], without: Iterable[float], plain: float) -> None:
        """One comparison."""
        for slot, seconds in beside:
            self._slots.setdefault(slot, deque(maxlen=_KEPT_SAMPLES)).append(seconds - plain)
        self._noise.extend(seconds - plain for seconds in without)
        self.rounds += 1

    @property
    def seconds(self) -> float:
        """The mean of the slots' medians."""
        return statistics.fmean(map(statistics.median, self._slots.values()))

    @property
    def error(self) -> float:
        """Its standard error."""
        medians = {slot: statistics.median(values) for slot, values in self._slots.items()}
        rest = [difference - medians[slot] for slot, values in self._slots.items() for difference in values]
        return math.hypot(_error(rest), _error(self._noise))


def _error(deviations: Sequence[float]) -> float:
    """Standard error of a median, from the deviations from it."""
    return _MEDIAN * _NORMAL * statistics.median(map(abs, deviations)) / math.sqrt(len(deviations))
