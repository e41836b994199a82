"""MoC-System's partial experts checkpointing, as a callback."""

from __future__ import annotations

import logging
from typing import Any, Literal

from moetion_lightning.callbacks._base import EngineCallback
from moetion_lightning.core.policy import PartialExpertsPolicy, Policy

__all__ = ["PartialExpertsCheckpoint"]

_log = logging.getLogger(__name__)


class PartialExpertsCheckpoint(EngineCallback):
    """Saves all non-expert state and K of the N experts of each layer: small, and lossy.

    After a failure, experts that were not in the last checkpoint come back from older ones; the tokens that they have
    seen since are lost. The proportion of lost tokens (PLT) is counted per layer and reported after each restore.

    Args:
        num_experts_per_checkpoint: K, experts of each MoE layer in one checkpoint.
        num_experts_persisted: How many of those K go to ``persist_dir``, taken by the same ``selection`` and so that
            each expert gets there within a bounded number of copies; None: all K. A restart that finds host memory
            loses fewer tokens than one that has only storage. Three checkpoints exist at a time: the one being made,
            the committed one, and the one being copied. The first copy of a process holds all experts.
        selection: "sequential" (round robin) or "load_aware" (most unsaved tokens first).
        every_n_steps: Optimizer steps between checkpoints.
        plt_limit: After a restore with a higher PLT, K doubles (and ``num_experts_persisted``); None keeps K.
        **settings: As of :class:`~moetion_lightning.callbacks.SparseExpertCheckpoint`, but for its window.

    Raises:
        ConfigurationError: A setting is unknown or out of range.

    Source: MoC-System (ASPLOS'25), sections 3 and 4.
    """

    def __init__(
        self,
        num_experts_per_checkpoint: int,
        num_experts_persisted: int | None = None,
        selection: Literal["sequential", "load_aware"] = "sequential",
        every_n_steps: int = 1,
        plt_limit: float | None = 0.0375,
        **settings: Any,
    ) -> None:
        super().__init__(window=1, **settings)
        self._settings = (num_experts_per_checkpoint, selection, every_n_steps, plt_limit, num_experts_persisted)
        self._policy()  # a wrong value raises here
        if num_experts_persisted is not None and self.config.persist_dir is None:
            _log.warning("num_experts_persisted=%d has no effect without persist_dir=", num_experts_persisted)

    def _policy(self) -> Policy:
        return PartialExpertsPolicy(*self._settings)
