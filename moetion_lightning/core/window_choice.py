"""Which window "auto" takes: the one with the least expected cost.

    cost(W) = what its captures add to an iteration + what a failure throws away x failures per iteration

The first part is measured (:mod:`~moetion_lightning.core.capture_cost`) where a window has run, and follows for the
others from the bytes that each of their iterations captures. The second is known: a failure throws away W to 2 W - 1
iterations. Pure functions of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moetion_lightning.core.capture_cost import Measured
from moetion_lightning.units import age_text

__all__ = [
    "ASSUMED_SHARE",
    "Facts",
    "WindowCost",
    "choose",
    "dense_interval",
    "describe",
    "expected_costs",
    "visible_seconds",
]

#: Share of a copy's time that training loses although the copy runs beside it, as long as nothing is measured.
ASSUMED_SHARE = 0.25
#: Costs that differ by less than this share of an iteration count as equal: the smallest window takes least memory.
_NEGLIGIBLE = 0.005
#: A measured gain counts as far as it is larger than this share of its standard error.
_DOUBT = 0.5


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What costs follow from.

    Args:
        heaviest_bytes: Bytes of the heaviest iteration of each window, from 1 on.
        iteration_seconds: An iteration, without captures if that is known.
        bytes_per_second: Copy bandwidth.
        overlap_target: Share of an iteration behind which copies can hide, in (0, 1].
        mtbf: Seconds between two failures.
        measured: What captures cost, by window.
    """

    heaviest_bytes: Mapping[int, int]
    iteration_seconds: float
    bytes_per_second: float
    overlap_target: float
    mtbf: float
    measured: Mapping[int, Measured]

    def visible_seconds(self, nbytes: int) -> float:
        """What copying so many bytes in each iteration is expected to cost it, before anything is measured."""
        copy = nbytes / self.bytes_per_second if self.bytes_per_second > 0 else 0.0
        return visible_seconds(copy, self.overlap_target * self.iteration_seconds)


def visible_seconds(copy_seconds: float, hiding_seconds: float, share: float = ASSUMED_SHARE) -> float:
    """What training loses by copies that run beside it: a share of their time, and all that cannot hide.

    Args:
        copy_seconds: How long the copies take.
        hiding_seconds: How long they may take without anybody waiting for them.
        share: Of their time, that training loses all the same.
    """
    return share * copy_seconds + max(0.0, copy_seconds - hiding_seconds)


@dataclass(frozen=True, kw_only=True)
class WindowCost:
    """What a window is expected to cost.

    Args:
        window: Its iterations.
        overhead: Seconds that captures add to an iteration.
        doubt: How much more that may be.
        replay: Seconds that failures cost, per iteration.
    """

    window: int
    overhead: float
    doubt: float
    replay: float

    @property
    def total(self) -> float:
        """Seconds per iteration."""
        return self.overhead + self.replay


def expected_costs(facts: Facts) -> dict[int, WindowCost]:
    """The cost of each window."""
    fixed, scale, doubt = _fit(facts)
    failures = facts.iteration_seconds / facts.mtbf
    costs = {}
    for window, nbytes in facts.heaviest_bytes.items():
        visible = facts.visible_seconds(nbytes)
        costs[window] = WindowCost(
            window=window,
            overhead=fixed + scale * visible,
            doubt=doubt * visible,
            replay=failures * (1.5 * window - 0.5) * facts.iteration_seconds,
        )
    return costs


def choose(facts: Facts, current: int | None = None, *, longest: int | None = None) -> int:
    """The window with the least expected cost.

    Of windows that cost about the same, the smallest; but W = 1, which copies everything in every iteration, only if it
    is the least, and certainly so. The current window stays as long as another one is not clearly better.

    Args:
        facts: What costs follow from.
        current: The window that is used now, if any.
        longest: The longest one that fits into host memory; None: all do.
    """
    costs = {w: cost for w, cost in expected_costs(facts).items() if longest is None or w <= max(1, longest)}
    candidates = [cost for cost in costs.values() if cost.window > 1]
    dense = costs.get(1)
    best = min(candidates, key=lambda cost: (cost.total, cost.window), default=dense)
    if best is None:
        return 1
    if dense is not None and dense.total + dense.doubt <= best.total + best.doubt:
        return 1
    slack = _NEGLIGIBLE * facts.iteration_seconds
    target = min(cost.window for cost in candidates if cost.total <= best.total + slack)
    now = None if current in (None, 1) else costs.get(current)
    return target if now is None or _is_worth(now, costs[target], slack, bool(facts.measured)) else now.window


def _is_worth(now: WindowCost, other: WindowCost, slack: float, is_measured: bool) -> bool:
    """Whether to change: for a clear gain, or for half the memory without a clear loss."""
    doubt = _DOUBT * abs(now.doubt - other.doubt) if is_measured else 0.0
    gain = now.total - other.total
    return gain > 2 * slack + doubt or (now.window > 2 * other.window and gain >= doubt - slack)


def dense_interval(facts: Facts) -> int:
    """Iterations from one dense snapshot to the next, where windows have to be dense: those of the least expected cost.

    A snapshot's cost is spread over the iterations until the next one; a failure throws away half of them. Of intervals
    that cost about the same, the shortest.

    Args:
        facts: What costs follow from; ``heaviest_bytes[1]`` is a snapshot's.
    """
    snapshot = expected_costs(facts)[1]
    overhead = snapshot.overhead + snapshot.doubt
    lost = facts.iteration_seconds**2 / facts.mtbf  # per iteration of distance
    if not lost:
        return 1
    best = max(1, round(math.sqrt(2 * overhead / lost)))  # Young's formula
    slack = _NEGLIGIBLE * facts.iteration_seconds

    def cost(interval: int) -> float:
        return overhead / interval + lost * (interval + 1) / 2

    return next(n for n in range(1, best + 1) if cost(n) <= cost(best) + slack)


def describe(facts: Facts, window: int) -> str:
    """Why this window: its costs, as shares of an iteration."""
    costs = expected_costs(facts)
    cost = costs[window]
    iteration = facts.iteration_seconds or math.inf
    how = "measured" if facts.measured else "assumed until it is measured"
    dense = f", {costs[1].overhead / iteration:.2%} with W = 1" if window > 1 and 1 in costs else ""
    length = _time_text(facts.iteration_seconds)
    return (
        f"captures cost {cost.overhead / iteration:.2%} of an iteration of {length}{dense} ({how}), "
        f"a failure every {age_text(facts.mtbf)} {cost.replay / iteration:.2%}"
    )


def _time_text(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _fit(facts: Facts) -> tuple[float, float, float]:
    """Overhead as a line over the visible seconds: its height at zero, its slope, and the slope's standard error.

    Least squares, with what is assumed as one more measurement of the slope: it counts as long as noise is larger than
    what is to be measured. Only windows of different weight tell what is the same for all of them.
    """
    points = [
        (facts.visible_seconds(facts.heaviest_bytes[window]), found.seconds, max(found.error, 1e-9))
        for window, found in facts.measured.items()
        if window in facts.heaviest_bytes
    ]
    points = [(x, y, e) for x, y, e in points if x > 0]
    ratio = max((y / x for x, y, _ in points), default=0.0)
    prior = 1 / max(3.0, ratio) ** 2
    s_1 = sum(1 / e**2 for _, _, e in points)
    s_x = sum(x / e**2 for x, _, e in points)
    s_xx = sum(x * x / e**2 for x, _, e in points) + prior
    s_y = sum(y / e**2 for _, y, e in points)
    s_xy = sum(x * y / e**2 for x, y, e in points) + prior
    if len({x for x, _, _ in points}) > 1:
        determinant = s_1 * s_xx - s_x * s_x
        fixed = (s_y * s_xx - s_x * s_xy) / determinant
        slope = (s_1 * s_xy - s_x * s_y) / determinant
        if fixed >= 0:
            if slope >= 0:
                return fixed, slope, math.sqrt(s_1 / determinant)
            return max(0.0, s_y / s_1), 0.0, math.sqrt(s_1 / determinant)
    return 0.0, max(0.0, s_xy / s_xx), 1 / math.sqrt(s_xx)
