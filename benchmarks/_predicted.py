"""What the simulator says of a run under failures, from what that run itself has measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from moetion_lightning.planning.cycle import Cycle, closed_form
from moetion_lightning.planning.failures import Failure
from moetion_lightning.planning.job import Outage
from moetion_lightning.planning.simulation import simulate

__all__ = ["observed", "predicted"]

_GAP_STEPS, _GAP_SECONDS = 4.0, 0.5  # a pause between two steps that is longer than both is an outage


def observed(times: Sequence[float], kills: Sequence[float]) -> dict[str, Any]:
    """The pace between failures, and how long each outage was.

    Args:
        times: When rank 0 finished steps, seconds from the beginning, in order; repeated ones too.
        kills: When ranks were killed, in order.

    Returns:
        ``pace_seconds``, a step on average, and ``outages``, seconds from the last kill before a pause until training
        ran again, the step that ends the pause not counted.
    """
    durations = [after - before for before, after in zip(times, times[1:])]
    limit = max(_GAP_SECONDS, _GAP_STEPS * statistics.median(durations))
    pace = statistics.fmean(length for length in durations if length <= limit)
    outages = []
    for before, after in zip(times, times[1:]):
        if after - before > limit:
            within = [kill for kill in kills if before - pace <= kill < after]
            outages += [max(0.0, after - within[-1] - pace)] if within else []
    return {"pace_seconds": pace, "outages": outages}


def predicted(
    *, step_seconds: float, every: int, kills: Sequence[float], seconds: float, mtbf: float, pace_seconds: float,
    outages: Sequence[float],
) -> dict[str, float]:  # fmt: skip
    """The ratio by the simulator with the same kills, and by the closed form with their mean rate.

    Args:
        step_seconds: A step that nothing disturbs.
        every: Steps between two restore points.
        kills: When ranks were killed, seconds from the beginning.
        seconds: How long the run was.
        mtbf: Mean time between the failures.
        pace_seconds: A step of this run between failures, on average.
        outages: Seconds that recoveries took.
    """
    cycle = Cycle(
        iteration_seconds=step_seconds,
        stall_seconds=max(0.0, pace_seconds - step_seconds),
        interval=every,
        lag_seconds=0.0,
        outage=Outage(groups=statistics.fmean(outages) if outages else 0.0),
    )
    found = simulate(cycle, [*map(Failure, kills), Failure(float("inf"))], seconds)
    return {"simulated": found.shares.ettr, "closed_form": closed_form(cycle, mtbf).ettr}
