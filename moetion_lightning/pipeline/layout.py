"""Which rank runs which stages, computed without asking anybody, and the process groups that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from moetion_lightning.distributed.rank_groups import RankGroups
from moetion_lightning.errors import ConfigurationError

__all__ = ["PipelineGroups", "PipelineLayout"]


@dataclass(frozen=True, kw_only=True)
class PipelineLayout:
    """World = pipeline x data: global rank ``pp_rank * data_parallel_size + dp_rank``.

    A rank runs ``chunks_per_rank`` stages. They are dealt out in turn (rank 0 has stages 0, P, 2P ...), or in the shape
    of a V (rank 0 has the first and the last).

    Args:
        world_size: Number of ranks.
        pipeline_parallel_size: Ranks of one pipeline.
        chunks_per_rank: Stages of each rank.
        v_shaped: Whether odd rounds go backwards.

    Raises:
        ConfigurationError: ``pipeline_parallel_size`` does not divide ``world_size``.

    Example:
        >>> layout = PipelineLayout(world_size=4, pipeline_parallel_size=2, chunks_per_rank=2)
        >>> layout.stages(3), layout.pipeline_ranks(3), layout.replica_ranks(3)
        ((1, 3), (1, 3), (2, 3))
    """

    world_size: int
    pipeline_parallel_size: int
    chunks_per_rank: int = 1
    v_shaped: bool = False

    def __post_init__(self) -> None:
        if self.pipeline_parallel_size < 1 or self.world_size % self.pipeline_parallel_size:
            raise ConfigurationError(
                f"MoEtionStrategy(pipeline_parallel_size={self.pipeline_parallel_size}): it must divide the number of "
                f"ranks, which is {self.world_size} (devices x num_nodes). Change one of them"
            )

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the pipeline."""
        return self.world_size // self.pipeline_parallel_size

    @property
    def num_stages(self) -> int:
        """Stages of one pipeline, over all its ranks."""
        return self.pipeline_parallel_size * self.chunks_per_rank

    def pp_rank(self, global_rank: int) -> int:
        """Place of a rank in its pipeline."""
        return global_rank // self.data_parallel_size

    def dp_rank(self, global_rank: int) -> int:
        """Which replica of the pipeline a rank belongs to."""
        return global_rank % self.data_parallel_size

    def global_rank(self, pp_rank: int, dp_rank: int) -> int:
        """The rank at a place of a replica."""
        return pp_rank * self.data_parallel_size + dp_rank

    def pipeline_ranks(self, global_rank: int) -> tuple[int, ...]:
        """The ranks of the pipeline of a rank, first stage first."""
        return tuple(range(self.dp_rank(global_rank), self.world_size, self.data_parallel_size))

    def replica_ranks(self, global_rank: int) -> tuple[int, ...]:
        """The ranks that run the same stages as this one."""
        first = self.pp_rank(global_rank) * self.data_parallel_size
        return tuple(range(first, first + self.data_parallel_size))

    def owner(self, stage: int) -> int:
        """Place in the pipeline of the rank that runs a stage."""
        turn, place = divmod(stage, self.pipeline_parallel_size)
        return self.pipeline_parallel_size - 1 - place if self.v_shaped and turn % 2 else place

    def stages(self, global_rank: int) -> tuple[int, ...]:
        """The stages of a rank, ascending."""
        place = self.pp_rank(global_rank)
        return tuple(stage for stage in range(self.num_stages) if self.owner(stage) == place)


class PipelineGroups(RankGroups):
    """The process groups of this rank.

    Args:
        layout: Who is where.
        global_rank: This rank.
        timeout: Of the collectives; None for torch's default.
    """

    def __init__(self, layout: PipelineLayout, global_rank: int, timeout: timedelta | None) -> None:
        places = range(layout.pipeline_parallel_size)
        families = {
            "pipeline": [layout.pipeline_ranks(dp_rank) for dp_rank in range(layout.data_parallel_size)],
            "replica": [layout.replica_ranks(layout.global_rank(pp_rank, 0)) for pp_rank in places],
        }
        super().__init__(global_rank, timeout, families)
        self.layout = layout

    @property
    def pipeline(self) -> dist.ProcessGroup:
        """The ranks of this rank's pipeline."""
        return self.group("pipeline")

    @property
    def replica(self) -> dist.ProcessGroup:
        """The ranks that run the same stages and average gradients."""
        return self.group("replica")

    @property
    def pp_rank(self) -> int:
        """Place of this rank in its pipeline."""
        return self.layout.pp_rank(self.global_rank)
