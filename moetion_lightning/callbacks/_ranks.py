"""The ranks of a Lightning job, and how its strategy lays the training state out over them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch.nn.parallel import DistributedDataParallel

from moetion_lightning.config import launched_process
from moetion_lightning.core.layouts import MoELayer
from moetion_lightning.distributed.control import default_control
from moetion_lightning.distributed.groups import Groups, current_groups
from moetion_lightning.distributed.layout import holders, row_offset
from moetion_lightning.distributed.meshes import can_outlive_groups, drop_groups, rebind
from moetion_lightning.distributed.messages import sum_over_ranks
from moetion_lightning.engine import RankLayout, Ranks
from moetion_lightning.errors import ConfigurationError

__all__ = ["cuts_at_first_batch", "ddp_of", "gathers_state", "leave_groups", "make_ranks", "wrap_again"]


def make_ranks(trainer: Trainer, module: LightningModule) -> Ranks:
    """The ranks as the engine sees them.

    Raises:
        ConfigurationError: The strategy lays state out in a way that is not known.
    """
    strategy = trainer.strategy
    if trainer.world_size == 1:
        return Ranks()
    if not isinstance(strategy, (DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy)):
        raise ConfigurationError(
            f"Trainer(strategy=...) is {type(strategy).__name__} with {trainer.world_size} processes: expected "
            'DDPStrategy ("ddp"), ModelParallelStrategy (FSDP2 and tensor parallel) or MoEtionStrategy ("moetion": '
            "pipeline, expert and data parallel)."
        )
    groups = current_groups()
    if groups is not None and not isinstance(strategy, DDPStrategy) and not can_outlive_groups():
        raise ConfigurationError(
            f"`moetion launch` with {type(strategy).__name__} needs a torch whose FSDPModule has reset_iter_state() "
            "(2.13): older ones cannot take a module back from an iteration that failed half-way. Use torchrun, which "
            "restarts all ranks."
        )
    launched = launched_process()
    return Ranks(
        default_control() if groups is None else groups.control(),
        lambda: _layout(strategy, module, trainer.world_size),
        domain="" if launched is None else launched.failure_domain,
        address="" if launched is None else launched.local_address,
        elastic=groups is not None,
        replaced=groups is not None and groups.alone,
        link=lambda: getattr(strategy, "link", None),
        sum_counts=sum_over_ranks,
    )


def _layout(strategy: Any, module: LightningModule, world_size: int) -> RankLayout:
    local = strategy.local_parameters() if hasattr(strategy, "local_parameters") else None
    parameters = {n: p for n, p in module.named_parameters() if local is None or n in local}
    offsets = {name: row_offset(p) for name, p in parameters.items()}
    replica_ranks = getattr(strategy, "replica_ranks", None)
    mesh = strategy.device_mesh if isinstance(strategy, ModelParallelStrategy) else None
    return RankLayout(
        holders={
            name: tuple(replica_ranks(name)) if replica_ranks is not None else holders(p, world_size)
            for name, p in parameters.items()
        },
        offsets={name: offset for name, offset in offsets.items() if offset is not None},
        counted=mesh is None or mesh["tensor_parallel"].get_local_rank() == 0,
        layers=_local_layers(strategy, parameters),
        parameters=local,
    )


def _local_layers(strategy: Any, parameters: Mapping[str, Any]) -> tuple[MoELayer, ...] | None:
    """The MoE layers with global expert numbers, in rows of this rank's parameters; None where nothing was spread."""
    if getattr(strategy, "expert_parallel_size", 1) == 1:
        return None
    found = []
    for shard in strategy.expert_layers:
        experts = []
        for expert, pieces in enumerate(shard.layer.experts):
            if expert not in shard.owned:
                experts.append(())
            elif shard.kind == "list":
                experts.append(tuple(piece for piece in pieces if piece.parameter in parameters))
            else:
                row = expert - shard.owned.start
                experts.append(tuple(dataclasses.replace(p, start=row, stop=row + 1) for p in pieces))
        found.append(dataclasses.replace(shard.layer, experts=tuple(experts)))
    return tuple(found)


def gathers_state(trainer: Trainer) -> bool:
    """Whether the strategy gathers state from all ranks for an ordinary checkpoint."""
    strategy = trainer.strategy
    return isinstance(strategy, ModelParallelStrategy) or getattr(strategy, "spreads_state", False)


def cuts_at_first_batch(trainer: Trainer) -> bool:
    """Whether a rank knows its part of the module only when the first batch is there."""
    return hasattr(trainer.strategy, "local_parameters")


def wrap_again(trainer: Trainer) -> None:
    """After the process groups were made anew: rebuild what refers to them. All ranks call it together."""
    strategy: Any = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        rebind(strategy.device_mesh, trainer.lightning_module)
        return
    if hasattr(strategy, "rebuild_groups"):
        strategy.rebuild_groups()
        return
    strategy.model = strategy.lightning_module
    given = dict(strategy._ddp_kwargs)
    strategy._ddp_kwargs = {**given, "init_sync": False}  # rank 0 may be the new one
    try:
        strategy.configure_ddp()
    finally:
        strategy._ddp_kwargs = given


def leave_groups(trainer: Trainer, groups: Groups) -> None:
    """Give up all process groups, and everything that refers to them, so that nobody waits for this rank."""
    strategy: Any = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        drop_groups(trainer.lightning_module)
        groups.leave()
        rebind(strategy.device_mesh, trainer.lightning_module)  # to groups in which this rank is alone
        return
    if isinstance(strategy.model, DistributedDataParallel):
        strategy.model = strategy.lightning_module
        _end_redirection(strategy.lightning_module)
    if hasattr(strategy, "drop_groups"):
        strategy.drop_groups()
    groups.leave()


def _end_redirection(module: LightningModule) -> None:
    """Take back what Lightning put in place of ``forward``, which a wrapper that failed before it called it leaves.

    It would run a step in place of the next call of the module, and it refers to the wrapper and so to its groups.
    """
    while "_ForwardRedirection" in getattr(module.forward, "__qualname__", ""):
        original = inspect.getclosurevars(module.forward).nonlocals["original_forward"]
        module.forward = original  # type: ignore[method-assign]


def ddp_of(trainer: Trainer) -> DistributedDataParallel | None:
    """The wrapper that sums gradients, if there is one."""
    model = trainer.strategy.model
    return model if isinstance(model, DistributedDataParallel) else None
