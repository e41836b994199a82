"""Evaluation loaders of a Hugging Face ``Trainer``: it keeps those whose workers live on, and makes others anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetion_lightning.core.instance_patches import InstancePatches
from moetion_lightning.integrations._other_loaders import OtherLoader, OtherLoaders

__all__ = ["TrainerEvaluation"]


class TrainerEvaluation:
    """Follows them from the moment that the Trainer makes them.

    Args:
        trainer: The trainer.
        patches: Where its method is replaced.
    """

    def __init__(self, trainer: Any, patches: InstancePatches) -> None:
        self._trainer = trainer
        self._loaders = OtherLoaders("MoEtionTrainerCallback", self._kept)
        original = trainer._get_dataloader

        def get_dataloader(*args: Any, **kwargs: Any) -> Any:
            loader = original(*args, **kwargs)
            self._loaders.look()
            return loader

        patches.put(trainer, "_get_dataloader", get_dataloader)

    def _kept(self) -> dict[str, OtherLoader]:
        kept: Mapping[str, Any] = getattr(self._trainer, "_eval_dataloaders", {})
        return {
            key: OtherLoader(loader, loader.base_dataloader, counter="iteration")
            for key, loader in kept.items()
            if hasattr(loader, "base_dataloader")
        }

    def snapshot(self) -> dict[str, Any]:
        """Between two passes."""
        return self._loaders.snapshot()

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Continue there; loaders that were there are made."""
        several = isinstance(self._trainer.eval_dataset, dict)
        for key in saved.keys() - self._kept().keys():
            self._trainer.get_eval_dataloader(key if several else None)
        self._loaders.restore(saved)

    def release(self) -> None:
        """Leave them as they were."""
        self._loaders.release()
