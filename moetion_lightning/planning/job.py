"""The job that is planned: what a rank holds, how fast its links are, how often it fails and what a failure takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moetion_lightning.core.window_choice import ASSUMED_SHARE
from moetion_lightning.errors import ConfigurationError

__all__ = ["Job", "Outage", "RankState", "state_of"]

#: Adam in mixed precision: float32 weights and two moments; bfloat16 weights; float32 gradients (what `step` consumes).
FULL_BYTES, COMPUTE_BYTES, GRADIENT_BYTES = 12.0, 2.0, 4.0


@dataclass(frozen=True, kw_only=True)
class RankState:
    """What one rank captures.

    Args:
        full_bytes: Master weights and optimizer state.
        compute_bytes: The weights of the same, as the forward consumes them.
        gradient_bytes: Gradients of the same, as the optimizer consumes them.
        expert_share: Share of ``full_bytes`` that belongs to routed experts.
        num_experts: Routed experts of each MoE layer; 0: the model is dense.
    """

    full_bytes: int
    compute_bytes: int
    gradient_bytes: int
    expert_share: float = 0.0
    num_experts: int = 0


def state_of(
    parameters: float,
    ranks: int,
    *,
    experts: int = 0,
    expert_parameters: float = 0.0,
    full: float = FULL_BYTES,
    compute: float = COMPUTE_BYTES,
    gradient: float = GRADIENT_BYTES,
) -> RankState:
    """What one rank captures of a model that is spread evenly.

    Args:
        parameters: Of the whole model; greater than 0.
        ranks: Ranks that share the captures: all of them where each byte is captured once (``sharding="auto"``), those
            that together hold the model once where every replica captures everything (``sharding="none"``).
        experts: Routed experts of each MoE layer.
        expert_parameters: Parameters of all routed experts.
        full: Bytes of a parameter in full.
        compute: Bytes as the forward consumes it.
        gradient: Bytes of its gradient.
    """
    return RankState(
        full_bytes=round(parameters * full / ranks),
        compute_bytes=round(parameters * compute / ranks),
        gradient_bytes=round(parameters * gradient / ranks),
        expert_share=expert_parameters / parameters,
        num_experts=experts,
    )


@dataclass(frozen=True, kw_only=True)
class Outage:
    """What a failure takes before training runs again, in order; seconds each.

    Args:
        detection: Until the job knows of it.
        start: Until processes run in the lost ones' place; 0 with a warm standby.
        groups: Until all ranks can communicate again.
        restore: Until a restorable state is in place.
        rebuild: Until it is the state of an iteration: a window's replay, or the optimizer steps of a gradient log.
    """

    detection: float = 0.0
    start: float = 0.0
    groups: float = 0.0
    restore: float = 0.0
    rebuild: float = 0.0

    def phases(self) -> Iterator[tuple[str, float]]:
        """Name and seconds of each, in order."""
        for name in ("detection", "start", "groups", "restore", "rebuild"):
            yield name, getattr(self, name)

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(length for _, length in self.phases())


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training job on given hardware.

    Args:
        state: What one rank captures.
        ranks: Ranks of the job.
        ranks_per_node: Ranks that fail together.
        iteration_seconds: An iteration that nothing disturbs.
        copy_bandwidth: From a rank's device into host memory, bytes per second.
        network_bandwidth: From a rank to another node, bytes per second.
        storage_bandwidth: A rank's share of the storage's bandwidth, bytes per second.
        host_memory: Bytes of a rank's share of its host's memory that snapshots may take; 0: not known.
        replicas: Copies of each rank's snapshots in other nodes' memory.
        interference: Share of a copy's time that training loses although the copy runs beside it.
        overlap: Share of an iteration behind which copies can hide.
        persist_seconds: Time between two copies to storage of policies that keep snapshots in memory; 0: ten times as
            long as one takes, and at least a minute.
        replay: Time of a replayed iteration, by that of an ordinary one.
        live_copies: Whether a living rank holds whatever a lost rank held (replicas that are not sharded): the state is
            then copied from there, and nothing is replayed.
        node_losses: Share of the failures that take a node's memory with them; this costs something where there are no
            replicas.
        mtbf: Seconds between two failures of the whole job.
        outage: What a failure takes apart from state; ``restore`` is what is needed besides moving bytes.

    Raises:
        ConfigurationError: A value is out of range.
    """

    state: RankState
    ranks: int
    ranks_per_node: int = 8
    iteration_seconds: float
    copy_bandwidth: float = 25e9
    network_bandwidth: float = 25e9
    storage_bandwidth: float = 0.125e9
    host_memory: float = 0.0
    replicas: int = 1
    interference: float = ASSUMED_SHARE
    overlap: float = 0.8
    persist_seconds: float = 0.0
    replay: float = 1.0
    live_copies: bool = False
    node_losses: float = 0.2
    mtbf: float
    outage: Outage

    def __post_init__(self) -> None:
        if self.state.full_bytes < 1:
            raise ConfigurationError(f"full_bytes={self.state.full_bytes!r}: expected at least one byte on each rank")
        for name in ("ranks", "ranks_per_node", "iteration_seconds", "copy_bandwidth", "network_bandwidth",
                     "storage_bandwidth", "overlap", "replay", "mtbf"):  # fmt: skip
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigurationError(f"{name}={getattr(self, name)!r}: expected a number greater than 0")
        for name in ("host_memory", "replicas", "interference", "persist_seconds"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigurationError(f"{name}={getattr(self, name)!r}: expected a number of at least 0")
        if not self.node_losses <= 1 or self.node_losses < 0:
            raise ConfigurationError(f"node_losses={self.node_losses!r}: expected a share from 0 to 1")
        if any(not 0 <= seconds < float("inf") for _, seconds in self.outage.phases()):
            raise ConfigurationError(f"{self.outage}: expected seconds of at least 0")

    @property
    def nodes(self) -> int:
        """Nodes of the job."""
        return -(-self.ranks // self.ranks_per_node)
