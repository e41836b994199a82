"""Sparse checkpointing with exact recovery, as a callback."""

from __future__ import annotations

from typing import Any, Literal

from moetion_lightning.callbacks._base import EngineCallback
from moetion_lightning.core.policy import Policy, SparsePolicy

__all__ = ["SparseExpertCheckpoint"]


class SparseExpertCheckpoint(EngineCallback):
    """Snapshots a part of the experts after every optimizer step, and recovers bit for bit after a kill.

    Add it to a Trainer and change nothing else. After a failure the same command continues from the newest committed
    window: it repeats fewer than 2W iterations, and has exactly the weights, optimizer state, losses and samples of the
    run that never failed.

    Args:
        window: Iterations over which the state is spread (W). 1 is a dense checkpoint of every iteration; "auto"
            measures what captures cost, and takes the window with the least expected cost.
        **settings: ``specs``, ``sinks``, ``events_path`` and ``log_metrics`` as of
            :class:`~moetion_lightning.callbacks._base.EngineCallback`, and all of
            :class:`~moetion_lightning.config.EngineConfig`.

    Raises:
        ConfigurationError: A setting is unknown or out of range.

    Source: MoEtion (NSDI'26, published as MoEvement), sections 3 and 4.
    """

    def __init__(self, window: int | Literal["auto"] = "auto", **settings: Any) -> None:
        super().__init__(window=window, **settings)

    def _policy(self) -> Policy:
        config = self.config
        return SparsePolicy(config.window, config.max_window, config.overlap_target, config.mtbf)
