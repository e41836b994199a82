"""Lightning's part of the training state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from moetion_lightning.callbacks._data_seam import DataSeam
from moetion_lightning.callbacks._loop_seam import LoopSeam
from moetion_lightning.callbacks._ranks import cuts_at_first_batch, ddp_of
from moetion_lightning.callbacks._transfer_hooks import TransferHooks
from moetion_lightning.core.generators import Generators
from moetion_lightning.core.local import is_wrapper, local
from moetion_lightning.core.module_table import module_table
from moetion_lightning.core.run_state import with_extra_state, write_buffers
from moetion_lightning.distributed.ddp import bucket_order, set_bucket_order
from moetion_lightning.engine import LivePoint, PlainAttributes, RestorePoint, build_values
from moetion_lightning.engine.users_classes import is_framework

__all__ = ["LightningRunState", "write_model"]


class LightningRunState:
    """Captures what a Lightning run needs besides parameters, optimizer state, buffers and random generators.

    Args:
        trainer: The trainer.
        module: Its module.
        loops: Access to the loops.
        data: Access to the training loaders.
        say_once: Tells the user something, once.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        loops: LoopSeam,
        data: DataSeam,
        say_once: Callable[[str], None],
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._loops = loops
        self._data = data
        self._attributes = PlainAttributes(self._users_objects, say_once)
        self._transfers = TransferHooks(trainer, module, self._attributes, loops.patches)
        self._generators = Generators(self._roots)
        #: Whether a batch has just ended, and what follows it (a validation, the end of the epoch) has not begun.
        self.after_batch = False

    def begin(self) -> None:
        """Hooks of the beginning of training come next: attributes that change from now on are state."""
        self._attributes.begin()

    def start(self) -> None:
        """A fresh run's first batch begins."""
        self._attributes.start()

    def capture(self, *, weights: bool) -> dict[str, Any]:
        """The state between two batches, as nested plain values and live tensors.

        Args:
            weights: Whether an ordinary checkpoint's weights are in it.
        """
        counters = self._loops.counters(after_batch=self.after_batch)
        checkpoint = self._loops.checkpoints.dump(counters, weights=weights)
        gradients = {}
        if not self._module.automatic_optimization or is_overridden("optimizer_zero_grad", self._module):
            # Lightning sets gradients to None before it makes new ones; a user's code may keep them.
            gradients = {
                n: local(p.grad) for n, p in module_table(self._module).parameters.items() if p.grad is not None
            }
        ddp = ddp_of(self._trainer)
        strategy = self._trainer.strategy
        return {
            "checkpoint": checkpoint,
            "pipeline": strategy.pipeline_state() if cuts_at_first_batch(self._trainer) else {},  # type: ignore[attr-defined]
            "extras": self._loops.extras(),
            "files": self._loops.files.snapshot(),
            "attributes": self._attributes.capture(),
            "before_transfer": self._transfers.snapshot(),
            "data": self._data.snapshot(after_batch=self.after_batch),
            "after_batch": self.after_batch,
            "validates": self._loops.validates,
            "gradients": gradients,
            "extra_states": {name: module.get_extra_state() for name, module in with_extra_state(self._module)},
            "buckets": [] if ddp is None else bucket_order(ddp),
            # Whether the next forward takes over rank 0's buffers: not after a validation, or with manual optimization.
            "sync_buffers": ddp is None or ddp.require_forward_param_sync,
        }

    def before_restore(self, state: Mapping[str, Any]) -> None:
        """Before the first forward and before the engine restores: what no checkpoint of Lightning brings back.

        Args:
            state: What :meth:`capture` gave.
        """
        self._loops.files.restore(state["files"])
        ddp = ddp_of(self._trainer)
        if ddp is not None:
            set_bucket_order(ddp, state["buckets"])
            ddp.require_forward_param_sync = state["sync_buffers"]
        for name, module in with_extra_state(self._module):
            if name in state["extra_states"]:
                module.set_extra_state(state["extra_states"][name])
        self._data.settle(state["data"])
        self._attributes.restore(state["attributes"], self._tensors())
        self._attributes.begin()

    def build(self, point: RestorePoint | LivePoint) -> dict[str, Any]:
        """What :meth:`capture` gave, with values of the user's own classes in it.

        Args:
            point: Where it was found.
        """
        trainer: Any = self._trainer
        build_values(point, [self._module, trainer.datamodule, *trainer.callbacks])
        state: dict[str, Any] = point.run_state()["adapter"]
        self._transfers.restore(state["before_transfer"], self._tensors())
        return state

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self._module.named_buffers()), **dict(self._module.named_parameters())}

    def _users_objects(self) -> dict[str, object]:
        """Objects whose plain attributes are state."""
        trainer: Any = self._trainer
        roots: dict[str, object] = {"module": self._module}
        if trainer.datamodule is not None:
            roots["datamodule"] = trainer.datamodule
        for callback in trainer.callbacks:
            if not is_framework(type(callback)):
                name = type(callback).__qualname__
                count = sum(other.startswith(f"{name} ") for other in roots)
                roots[f"{name} {count}"] = callback
        return roots

    def generators(self) -> Generators:
        """Random number generators of user objects."""
        return self._generators

    def _roots(self) -> dict[str, object]:
        roots: dict[str, object] = {"module": self._module}
        if getattr(self._trainer, "datamodule", None) is not None:
            roots["datamodule"] = self._trainer.datamodule  # type: ignore[attr-defined]
        for index, callback in enumerate(self._trainer.callbacks):  # type: ignore[attr-defined]
            roots[f"callback{index}"] = callback
        for index, optimizer in enumerate(self._trainer.optimizers):
            if not is_framework(type(optimizer)):
                roots[f"optimizer{index}"] = optimizer
        return {**roots, **self._data.all_loaders()}


@torch.no_grad()
def write_model(module: nn.Module, point: RestorePoint) -> None:
    """Weights and buffers as of a window's first iteration, for hooks that look at them before the first batch.

    Args:
        module: The module.
        point: The window; what it has of other parameters in compute precision only is precise after the replay.
    """
    point.materialize(module)
    for name, parameter in module.named_parameters():
        if not is_wrapper(parameter):  # those wait for the engine, which takes them apart
            parameter.copy_(point.parameter(name))
    write_buffers(module, point.run_state()["buffers"])
