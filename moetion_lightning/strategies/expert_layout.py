"""Which rank holds which experts, computed without asking anybody, and the process groups that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from moetion_lightning.distributed.rank_groups import RankGroups
from moetion_lightning.errors import ConfigurationError

__all__ = ["ExpertGroups", "ExpertLayout"]


@dataclass(frozen=True, kw_only=True)
class ExpertLayout:
    """World = data x expert: global rank ``position + expert_parallel_size * replica_index``.

    Args:
        world_size: Number of ranks.
        expert_parallel_size: Ranks that share the experts of each layer among them.

    Raises:
        ConfigurationError: ``expert_parallel_size`` does not divide ``world_size``.

    Example:
        >>> layout = ExpertLayout(world_size=4, expert_parallel_size=2)
        >>> layout.expert_ranks(3), layout.replica_ranks(3)
        ((2, 3), (1, 3))
        >>> layout.experts_at(1, num_experts=5)
        range(3, 5)
    """

    world_size: int
    expert_parallel_size: int

    def __post_init__(self) -> None:
        if self.expert_parallel_size < 1 or self.world_size % self.expert_parallel_size:
            raise ConfigurationError(
                f"MoEtionStrategy(expert_parallel_size={self.expert_parallel_size}): it must divide the number of "
                f"ranks, which is {self.world_size} (devices x num_nodes). Change one of them"
            )

    def position(self, global_rank: int) -> int:
        """Place of a rank in its expert-parallel group."""
        return global_rank % self.expert_parallel_size

    def expert_ranks(self, global_rank: int) -> tuple[int, ...]:
        """The ranks that, between them, hold each expert once: the expert-parallel group of a rank."""
        first = global_rank - self.position(global_rank)
        return tuple(range(first, first + self.expert_parallel_size))

    def replica_ranks(self, global_rank: int) -> tuple[int, ...]:
        """The ranks that hold the same experts as this one: its expert-data group."""
        return tuple(range(self.position(global_rank), self.world_size, self.expert_parallel_size))

    def experts_at(self, position: int, num_experts: int) -> range:
        """The experts of a layer at a place of the group: one contiguous block, sizes differ by one at most."""
        size, larger = divmod(num_experts, self.expert_parallel_size)
        start = position * size + min(position, larger)
        return range(start, start + size + (position < larger))


class ExpertGroups(RankGroups):
    """The two process groups of this rank.

    Args:
        layout: Who is where.
        global_rank: This rank.
        timeout: Of the collectives; None for torch's default.
    """

    def __init__(self, layout: ExpertLayout, global_rank: int, timeout: timedelta | None) -> None:
        places = range(layout.expert_parallel_size)
        families = {
            "expert": [layout.expert_ranks(first) for first in range(0, layout.world_size, len(places))],
            "replica": [layout.replica_ranks(position) for position in places],
        }
        super().__init__(global_rank, timeout, families)
        self.layout = layout

    @property
    def expert(self) -> dist.ProcessGroup:
        """The group that exchanges tokens."""
        return self.group("expert")

    @property
    def replica(self) -> dist.ProcessGroup:
        """The group that averages gradients of experts."""
        return self.group("replica")

    @property
    def position(self) -> int:
        """Place of this rank in the expert-parallel group."""
        return self.layout.position(self.global_rank)
