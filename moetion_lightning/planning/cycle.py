"""A policy as a cycle of restore points and outages, and the closed form of its effective training time ratio.

    E[wall time of an interval] = exp(r (R + l)) (exp(r (W + s)) - 1) / r

with failures at the rate r at any instant (during a recovery, too: it then begins again), an interval of useful work W
with a stall s, an outage R, and a lag l: what is worked after a restore point before it can be used, and then again.

Source: J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps" (2006), whose
complete model this is, with the lag added. The MoEtion paper's 1/(1 + T_ckpt / (T_iter I)) x 1/(1 + E[R] / MTBF) is its
first order in r.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moetion_lightning.planning.job import Outage

__all__ = ["CAUSES", "Cycle", "Fallback", "Shares", "closed_form"]

#: Where the time goes that is not useful, in the order in which it is shown.
CAUSES = ("detection", "start", "groups", "restore", "rebuild", "redo", "stall")
_HOPELESS = 500.0  # failures in one interval: no job gets through


@dataclass(frozen=True, kw_only=True)
class Fallback:
    """What happens where a failure takes the snapshots in memory with it.

    Args:
        share: Share of the failures that do.
        interval: Iterations between two states on storage.
        lag_seconds: Until such a state is whole.
        outage: What the failure then takes.
    """

    share: float
    interval: int
    lag_seconds: float
    outage: Outage


@dataclass(frozen=True, kw_only=True)
class Cycle:
    """How a policy runs.

    Args:
        iteration_seconds: An iteration that nothing disturbs.
        stall_seconds: What captures add to it, on average.
        interval: Iterations between two restore points.
        lag_seconds: From the end of a restore point's iteration until it can be used.
        outage: What a failure takes.
        fallback: Where memory is lost, too; None: never, or nothing is in memory.
    """

    iteration_seconds: float
    stall_seconds: float
    interval: int
    lag_seconds: float
    outage: Outage
    fallback: Fallback | None = None

    @property
    def step_seconds(self) -> float:
        """An iteration with its captures."""
        return self.iteration_seconds + self.stall_seconds


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Where the wall time of a job goes, as shares of it.

    Args:
        ettr: Effective training time ratio: every iteration counts once, with the time that it takes undisturbed.
        causes: The rest, by cause.
    """

    ettr: float
    causes: dict[str, float]


def closed_form(cycle: Cycle, mtbf: float) -> Shares:
    """Expected shares under failures at exponential times.

    Where memory can be lost there are two kinds of failures: what the more frequent ones leave of the pace is taken as
    the pace between two of the others.

    Args:
        cycle: The policy.
        mtbf: Seconds between two failures.
    """
    fallback, causes = cycle.fallback, dict.fromkeys(CAUSES, 0.0)
    share = 0.0 if fallback is None else fallback.share
    step = cycle.step_seconds
    causes["stall"] = cycle.stall_seconds
    step = _passed((1 - share) / mtbf, step, cycle.interval, cycle.lag_seconds, cycle.outage, causes)
    if fallback is not None and share:
        lag = fallback.lag_seconds * step / cycle.step_seconds
        step = _passed(share / mtbf, step, fallback.interval, lag, fallback.outage, causes)
    if not step < math.inf:
        return Shares(ettr=0.0, causes={**dict.fromkeys(CAUSES, 0.0), "redo": 1.0})
    return Shares(ettr=cycle.iteration_seconds / step, causes={name: part / step for name, part in causes.items()})


def _passed(
    rate: float, step: float, interval: int, lag: float, outage: Outage, causes: dict[str, float]
) -> float:  # fmt: skip
    """Seconds that an iteration takes with these failures, which are added to what it loses by ``causes``."""
    if rate * (interval * step + outage.seconds + lag) > _HOPELESS:
        return math.inf
    if not rate or not step < math.inf:
        return step
    wall = math.exp(rate * (outage.seconds + lag)) * math.expm1(rate * interval * step) / rate
    failures = rate * wall / interval  # per iteration
    begun = lost = 0.0
    for name, seconds in outage.phases():  # a failure on the way begins it again
        spent = failures * math.exp(-rate * begun) * -math.expm1(-rate * seconds) / rate
        causes[name] += spent
        lost += spent
        begun += seconds
    causes["redo"] += max(0.0, wall / interval - step - lost)
    return wall / interval
