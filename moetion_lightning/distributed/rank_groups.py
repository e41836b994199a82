"""Process groups that are made anew when a rank was replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch.distributed as dist

from moetion_lightning.errors import RankLostError

__all__ = ["RankGroups"]


class RankGroups:
    """The process groups of this rank, one of each family, and the only place that refers to them.

    Args:
        global_rank: This rank.
        timeout: Of the collectives; None for torch's default.
        families: By name, the groups that together have every rank once.
    """

    def __init__(
        self, global_rank: int, timeout: timedelta | None, families: Mapping[str, Sequence[Sequence[int]]]
    ) -> None:
        self.global_rank = global_rank
        self._timeout = timeout
        self._families = families
        self._groups: dict[str, dist.ProcessGroup] = {}

    def build(self) -> None:
        """Make the groups.

        Ranks:
            All ranks of the job, together; the order of the groups is the same on each.
        """
        for family, members in self._families.items():
            for ranks in members:
                group = dist.new_group(list(ranks), timeout=self._timeout)
                if self.global_rank in ranks:
                    self._groups[family] = group

    def drop(self) -> None:
        """Forget the groups, so that their sockets can close. Harmless without any."""
        self._groups = {}

    def group(self, family: str) -> dist.ProcessGroup:
        """This rank's group of a family. Raises ``RankLostError`` where there is none."""
        if family not in self._groups:
            raise RankLostError(
                f"rank {self.global_rank}: the {family} groups do not exist (never built, or dropped after a rank was "
                "lost); call MoEtionStrategy.rebuild_groups() on all ranks first"
            )
        return self._groups[family]
