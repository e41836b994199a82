"""Attributes that hooks of a batch's transfer read: as they were before the batch that comes next.

A window begins when the next batch is fetched and moved to its device already. Where hooks of the user take part in
that (``on_before_batch_transfer``, ``transfer_batch_to_device``, ``on_after_batch_transfer``), a restart does it again,
and must do it with the attributes of that time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.hooks import DataHooks
from torch import Tensor

from moetion_lightning.core.instance_patches import InstancePatches
from moetion_lightning.engine import PlainAttributes
from moetion_lightning.storage.tree import FlatTree, load_tree

__all__ = ["TransferHooks"]

_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
_OWNERS = ("module", "datamodule")


class TransferHooks:
    """Notes and restores them, where there are such hooks.

    Args:
        trainer: The trainer.
        module: Its module.
        attributes: The attributes; owners of hooks are called ``module`` and ``datamodule`` there.
        patches: What is replaced until the run ends.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, attributes: PlainAttributes, patches: InstancePatches
    ) -> None:
        self._attributes = attributes
        self._before: FlatTree | None = None
        self._pending: tuple[Any, Mapping[str, Tensor]] | None = None
        owners = [module, getattr(trainer, "datamodule", None)]
        if all(owner is None or _inherits(owner) for owner in owners):
            return
        original = module._on_before_batch_transfer

        def on_before_batch_transfer(batch: Any, dataloader_idx: int = 0) -> Any:
            if trainer.training:
                self._note()
            return original(batch, dataloader_idx)

        patches.put(module, "_on_before_batch_transfer", on_before_batch_transfer)

    def _note(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self._attributes.restore(*pending)
        self._before = self._attributes.copy_of(_OWNERS)

    def snapshot(self) -> bytes | None:
        """The attributes before the batch was moved that the training loop is about to use."""
        return None if self._before is None else self._before.to_bytes()

    def restore(self, saved: bytes | None, tensors: Mapping[str, Tensor]) -> None:
        """Put them back before the first batch is moved.

        Args:
            saved: What :meth:`snapshot` gave.
            tensors: Live parameters and buffers by name.
        """
        self._pending = None if saved is None else (load_tree(saved), tensors)


def _inherits(owner: object) -> bool:
    return all(getattr(type(owner), hook, None) is getattr(DataHooks, hook) for hook in _HOOKS)
