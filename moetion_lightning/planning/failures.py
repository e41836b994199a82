"""When a job fails: exponential, Weibull, failures that come together, or a trace."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

from moetion_lightning.errors import ConfigurationError

__all__ = ["Failure", "FailureModel", "loss_share"]


@dataclass(frozen=True)
class Failure:
    """One failure: when, seconds from the start, and how many nodes it takes."""

    at: float
    nodes: int = 1


@dataclass(frozen=True, kw_only=True)
class FailureModel:
    """Failures of a job.

    Args:
        kind: "exponential" times; "weibull": many short and a few long ones; "correlated": failures that take several
            nodes, some of which fail again soon; "trace": those of a file, over and over.
        mtbf: Seconds between two failures, on average (all kinds but a trace).
        shape: Of Weibull; below 1 failures come in bursts. 0.7 is usual for large systems (Schroeder and Gibson, 2006).
        burst_nodes: Correlated: nodes that a failure takes, on average (geometric).
        repeats: Correlated: share of the failures that are followed by another one soon.
        repeat_seconds: Correlated: how soon, on average.
        trace: Failures of a trace.
        trace_seconds: Its length.

    Raises:
        ConfigurationError: A value is out of range.
    """

    kind: Literal["exponential", "weibull", "correlated", "trace"] = "exponential"
    mtbf: float = 0.0
    shape: float = 0.7
    burst_nodes: float = 1.5
    repeats: float = 0.2
    repeat_seconds: float = 120.0
    trace: Sequence[Failure] = ()
    trace_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.kind == "trace" and (not self.trace or self.trace_seconds <= 0):
            raise ConfigurationError("the trace has no failure; give another file, or mtbf")
        if self.kind != "trace" and not self.mtbf > 0:
            raise ConfigurationError(f"mtbf={self.mtbf!r}: expected seconds greater than 0")
        if not 0.1 <= self.shape <= 100:
            raise ConfigurationError(f"shape={self.shape!r}: expected a number from 0.1 to 100")
        if not 1 <= self.burst_nodes < math.inf:
            raise ConfigurationError(f"burst_nodes={self.burst_nodes!r}: expected a number of nodes of at least 1")
        if not 0 <= self.repeats < 1:
            raise ConfigurationError(f"repeats={self.repeats!r}: expected a share of at least 0 and below 1")
        if not self.repeat_seconds > 0:
            raise ConfigurationError(f"repeat_seconds={self.repeat_seconds!r}: expected seconds greater than 0")

    @property
    def mean_seconds(self) -> float:
        """Seconds between two failures, on average."""
        return self.trace_seconds / len(self.trace) if self.kind == "trace" else self.mtbf

    def memory_loss(self, num_nodes: int, replicas: int, node_losses: float) -> float:
        """The share of the failures that take all copies of some snapshot with them.

        Args:
            num_nodes: Nodes of the job.
            replicas: Copies of each node's snapshots on other nodes.
            node_losses: The same share for failures of a single node.
        """

        def share(nodes: int) -> float:
            return max(node_losses, loss_share(nodes, num_nodes, replicas)) if nodes > 1 else node_losses

        if self.kind == "trace":
            return sum(share(failure.nodes) for failure in self.trace) / len(self.trace)
        if self.kind != "correlated":
            return node_losses
        more = 1 - 1 / self.burst_nodes
        first = sum((1 - more) * more**extra * share(1 + extra) for extra in range(200))
        return self.repeats * node_losses + (1 - self.repeats) * first

    def draw(self, seed: int) -> Iterator[Failure]:
        """Failures in their order, without an end.

        Args:
            seed: The same one gives the same failures.
        """
        if self.kind == "trace":
            return self._repeated()
        return self._drawn(random.Random(seed))

    def _repeated(self) -> Iterator[Failure]:
        for turn in count():
            for failure in self.trace:
                yield Failure(turn * self.trace_seconds + failure.at, failure.nodes)

    def _drawn(self, rng: random.Random) -> Iterator[Failure]:
        scale = self.mtbf / math.gamma(1 + 1 / self.shape)
        # The first of several failures comes after a pause that makes up for the short ones behind it.
        pause = (self.mtbf - self.repeats * min(self.repeat_seconds, self.mtbf)) / (1 - self.repeats)
        at = 0.0
        while True:
            nodes = 1
            if self.kind == "weibull":
                at += rng.weibullvariate(scale, self.shape)
            elif self.kind == "exponential":
                at += rng.expovariate(1 / self.mtbf)
            else:
                is_repeat = rng.random() < self.repeats
                at += rng.expovariate(1 / (min(self.repeat_seconds, self.mtbf) if is_repeat else pause))
                while not is_repeat and rng.random() < 1 - 1 / self.burst_nodes:
                    nodes += 1
            yield Failure(at, nodes)


@functools.cache
def loss_share(nodes: int, num_nodes: int, replicas: int) -> float:
    """The probability that a failure of so many nodes takes all copies of some snapshot with it.

    Each of the lost nodes has its copies on ``replicas`` others, drawn from all: copies lie in other failure domains.

    Args:
        nodes: Nodes that are lost at once.
        num_nodes: Nodes of the job.
        replicas: Copies of each node's snapshots on other nodes.
    """
    if replicas == 0 or num_nodes <= 1:
        return 1.0
    together = 1.0
    for index in range(replicas):
        together *= max(0.0, (nodes - 1 - index) / max(1, num_nodes - 1 - index))
    return 1.0 - (1.0 - min(1.0, together)) ** nodes
