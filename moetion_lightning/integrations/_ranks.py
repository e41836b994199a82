"""The ranks of a job that ``torchrun``, ``accelerate launch`` or Fabric started, and how the state lies over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from moetion_lightning.config import launched_process
from moetion_lightning.distributed.control import default_control, default_world
from moetion_lightning.distributed.layout import holders, row_offset
from moetion_lightning.distributed.messages import sum_over_ranks
from moetion_lightning.engine import RankLayout, Ranks
from moetion_lightning.errors import ConfigurationError

__all__ = ["make_ranks"]


def make_ranks(
    parameters: Callable[[], Mapping[str, Tensor]], replicated: Callable[[], frozenset[str]], where: str
) -> Ranks:
    """The ranks as the engine sees them. With a process group, all ranks call this together.

    Args:
        parameters: Gives this rank's parameters, once they exist.
        replicated: Gives the names of those that all ranks hold alike, because a wrapper keeps them so. Distributed
            tensors say themselves who holds what; everything else is taken to be this rank's own.
        where: The call that the user made, for messages.

    Raises:
        ConfigurationError: ``moetion launch`` started this process.
    """
    if launched_process() is not None:
        raise ConfigurationError(
            f"{where} under `moetion launch`, which replaces a lost rank while the others go on: only the Lightning "
            "Trainer can be taken back to an earlier iteration in a living process. Start this script with torchrun or "
            "`accelerate launch` (--max-restarts), which start all ranks again."
        )
    rank, world_size = default_world()
    if world_size == 1:
        return Ranks()

    def layout() -> RankLayout:
        known, everywhere = parameters(), replicated()
        offsets = {name: row_offset(p) for name, p in known.items()}
        return RankLayout(
            holders={
                name: holders(p, world_size) if hasattr(p, "to_local") or name in everywhere else (rank,)
                for name, p in known.items()
            },
            offsets={name: offset for name, offset in offsets.items() if offset is not None},
        )

    return Ranks(default_control(), layout, sum_counts=sum_over_ranks)
