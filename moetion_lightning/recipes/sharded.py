"""The recipes' byte-level MoE, sharded over ranks by FSDP2."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, fully_shard

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.recipes.models import ByteMoE

__all__ = ["ShardedByteMoE"]


class ShardedByteMoE(ByteMoE):
    """:class:`ByteMoE` of which every rank holds a shard of every parameter, under Lightning's ModelParallelStrategy.

    Sharded by block, not by expert: all ranks gather a block together, whichever experts their tokens go to. Under any
    other strategy it is not sharded. Its arguments are those of ByteMoE.
    """

    def configure_model(self) -> None:
        """Shard the blocks, then the rest, over the strategy's data-parallel ranks."""
        module: Any = self
        if self.device_mesh is None or isinstance(module, FSDPModule):
            return
        if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            raise ConfigurationError(
                f"ShardedByteMoE needs torch 2.13 or newer; this is {torch.__version__}, whose FSDP2 waits for ever "
                "where an expert has tokens on some ranks only. Install a newer one, or take strategy='ddp' and ByteMoE"
            )
        mesh = self.device_mesh["data_parallel"]
        for block in self.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
        # An expert without tokens on this rank may have some on another one: both must reduce its gradient.
        module.set_reduce_scatter_unused_params(True)
