"""A job under failures, event by event, next to the closed form.

Iterations are whole, restore points lie at their ends, phases of an outage follow one another, and a failure in an
outage begins it again: nothing is averaged. What is not simulated: a job that is short of nodes (a standby or a
replacement is always there), and stragglers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.planning.cycle import CAUSES, Cycle, Shares
from moetion_lightning.planning.failures import Failure, loss_share

__all__ = ["Simulated", "simulate"]


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What a simulation has seen.

    Args:
        shares: Where its time went.
        wall_seconds: How long the job ran.
        iterations: How many it finished; each counts once.
        failures: How many it had.
        from_storage: In how many of them the snapshots in memory were lost.
    """

    shares: Shares
    wall_seconds: float
    iterations: int
    failures: int
    from_storage: int


class _Clock:
    """Where the job is, and where its time went."""

    def __init__(self, cycle: Cycle) -> None:
        self._cycle = cycle
        self.at = 0  # iteration from which training goes on
        self.done = 0  # the newest one that was ever finished
        self.point = 0  # the newest that memory can give back
        self.spent = dict.fromkeys(CAUSES, 0.0)

    def train(self, seconds: float) -> None:
        """Train; what is done for the first time is useful, the iteration that is cut off is not."""
        cycle = self._cycle
        reached = self.at + math.floor(seconds / cycle.step_seconds)
        new = max(0, reached - self.done)
        self.spent["stall"] += new * cycle.stall_seconds
        self.spent["redo"] += seconds - new * cycle.step_seconds
        usable = self.at + (seconds - cycle.lag_seconds) / cycle.step_seconds
        self.point = max(self.point, cycle.interval * math.floor(usable / cycle.interval))
        self.done = max(self.done, reached)
        self.at = reached

    def stored(self) -> int:
        """The newest iteration that storage can give back."""
        fallback = self._cycle.fallback
        assert fallback is not None
        lag = math.ceil(fallback.lag_seconds / self._cycle.step_seconds)
        return max(0, fallback.interval * ((self.done - lag) // fallback.interval))


def simulate(
    cycle: Cycle, failures: Iterable[Failure], seconds: float, *, num_nodes: int = 1, replicas: int = 0, seed: int = 0
) -> Simulated:
    """Run a job for a time.

    Args:
        cycle: Its policy.
        failures: When it fails, in order; all of them are read up to ``seconds``.
        seconds: How long it runs.
        num_nodes: Nodes of the job. This and the next two only matter where the cycle has a fallback.
        replicas: Copies of each node's snapshots on other nodes.
        seed: Of whether a failure of several nodes takes all copies of something.

    Raises:
        ConfigurationError: The time is not greater than 0.
    """
    if not seconds > 0:
        raise ConfigurationError(f"seconds={seconds!r}: expected a time greater than 0")
    clock, rng = _Clock(cycle), random.Random(f"losses {seed}")  # another stream than that of the failures
    now = 0.0
    outage = None  # what is going on
    num_failures = from_storage = 0
    for failure in failures:
        until = min(failure.at, seconds)
        if outage is not None:
            now = _pass(outage.phases(), now, until, clock.spent)
        if now < until:
            outage = None
            clock.train(until - now)
            now = until
        if failure.at >= seconds:
            break
        num_failures += 1
        fallback = cycle.fallback
        if fallback is not None and rng.random() < _lost(failure, fallback.share, num_nodes, replicas):
            from_storage += 1
            clock.point = min(clock.point, clock.stored())
            outage = fallback.outage
        elif outage is None or fallback is None or outage is not fallback.outage:
            outage = cycle.outage
        clock.at = clock.point
    useful = clock.done * cycle.iteration_seconds
    causes = {cause: spent / now for cause, spent in clock.spent.items()}
    return Simulated(
        shares=Shares(ettr=useful / now, causes=causes),
        wall_seconds=now,
        iterations=clock.done,
        failures=num_failures,
        from_storage=from_storage,
    )


def _lost(failure: Failure, share: float, num_nodes: int, replicas: int) -> float:
    """The probability that this failure takes snapshots with it; ``share`` is that of one node."""
    return share if failure.nodes <= 1 else max(share, loss_share(failure.nodes, num_nodes, replicas))


def _pass(phases: Iterable[tuple[str, float]], now: float, until: float, spent: dict[str, float]) -> float:
    """Let an outage go on until it is over, or cut off. Returns when that is."""
    for name, length in phases:
        taken = min(length, until - now)
        spent[name] += taken
        now += taken
    return now
