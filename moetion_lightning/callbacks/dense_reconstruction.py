"""Recovery alone."""

from __future__ import annotations

from typing import Any

from moetion_lightning.callbacks._base import EngineCallback
from moetion_lightning.core.policy import Policy, RestoreOnlyPolicy

__all__ = ["DenseReconstruction"]


class DenseReconstruction(EngineCallback):
    """Finds the newest restore point at start, rebuilds the dense state by replaying its window, checks what it can.

    The capturing callbacks do this automatically. Add it beside one of them to set how a restore is done (``resume``,
    ``on_changed_settings``, ``on_mismatch``, ``skip_frozen_gradients``), or alone to continue a job without capturing
    any more.

    Args:
        **settings: As of :class:`~moetion_lightning.callbacks.SparseExpertCheckpoint`, but for its window.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)

    def captures(self) -> bool:
        return False

    def setup(self, trainer, pl_module, stage):  # type: ignore[no-untyped-def]
        callbacks = trainer.callbacks
        if any(isinstance(c, EngineCallback) and c.captures() for c in callbacks):
            return  # the capturing callback restores, with the settings of this one
        super().setup(trainer, pl_module, stage)

    def _policy(self) -> Policy:
        return RestoreOnlyPolicy()
