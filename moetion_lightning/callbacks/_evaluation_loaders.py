"""Validation loaders of a Lightning fit loop: a pass over them depends on the passes before it.

Their samplers may count, and workers that live on are started in the first pass, with a seed from torch's generator,
which later passes do not draw. A restarted trainer makes them anew and leaves the sanity check out.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from moetion_lightning.callbacks._loader_source import LoaderSource
from moetion_lightning.core.instance_patches import InstancePatches
from moetion_lightning.data import LoaderPosition, Seen, make_resumable, release, unfollowed

__all__ = ["EvaluationLoaders"]


class EvaluationLoaders:
    """Follows the validation loaders of one trainer.

    Args:
        trainer: The trainer; its validation loop is hooked where it has built its loaders.
        seen: What attributes were before anything was restored.
    """

    def __init__(self, trainer: Trainer, seen: Seen) -> None:
        self._trainer = trainer
        self._seen = seen
        self._loop: Any = trainer.fit_loop.epoch_loop.val_loop
        self._source = LoaderSource(trainer, self._loop, seen)
        self._combined: Any = None
        self._positions: dict[str, LoaderPosition] = {}
        self._pending: Mapping[str, Any] | None = None
        original = self._loop.setup_data

        def setup_data() -> None:
            original()
            if self._loop._combined_loader is not self._combined:
                self._combined = self._loop._combined_loader
                self._follow()

        self._patches = InstancePatches()
        self._patches.put(self._loop, "setup_data", setup_data)

    def remove(self) -> None:
        """Leave the loop as it was."""
        self._patches.undo()
        self._source.remove()
        for loader in self.loaders().values():
            release(loader)

    def loaders(self) -> dict[str, object]:
        """By name."""
        combined = self._loop._combined_loader
        return {} if combined is None else {f"val{i}": loader for i, loader in enumerate(combined.flattened)}

    def _follow(self) -> None:
        trained = self._trainer.fit_loop._combined_loader
        training = [] if trained is None else trained.flattened
        self._positions = {}
        loaders = list(self._combined.flattened)
        for index, loader in enumerate(loaders):
            if not any(loader is other for other in training):
                loaders[index], self._positions[f"val{index}"] = make_resumable(loader, seen=self._seen)
        self._combined.flattened = loaders

    def snapshot(self) -> dict[str, Any]:
        """While none is iterated."""
        return {
            "made": self._source.snapshot(),
            "loaders": {name: position.snapshot_between() for name, position in self._positions.items()},
        }

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """The loaders that are made next are those that were made then."""
        self._pending = state
        self._source.restore(None if state is None else state["made"])

    def settle(self) -> None:
        """Right before the first batch is used: loaders that were there are, and a new pass follows the same ones."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending["made"] is not None and self._combined is None:
            self._trainer.validating = True
            self._loop.setup_data()
            self._trainer.training = True
        self._source.restore(None)
        for name, loader in self.loaders().items():
            position, saved = self._positions.get(name), pending["loaders"].get(name)
            if position is None or saved is None:
                continue
            if getattr(loader, "_iterator", None) is not None:
                loader._iterator = None  # type: ignore[attr-defined]
            position.restore_between(saved, functools.partial(unfollowed, loader))
