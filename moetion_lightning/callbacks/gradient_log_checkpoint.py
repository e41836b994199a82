"""Restore points at every iteration from logged gradients, as a callback."""

from __future__ import annotations

from typing import Any, Literal

from moetion_lightning.callbacks._base import EngineCallback
from moetion_lightning.core.log_policy import GradientLogPolicy
from moetion_lightning.core.policy import Policy

__all__ = ["GradientLogCheckpoint"]


class GradientLogCheckpoint(EngineCallback):
    """Logs what every optimizer step consumes, and captures a part of the state in full at each iteration.

    A failure costs at most the iteration in flight, wherever it falls. When the same command is started again, the
    optimizers' own steps rebuild the state from the log, without a forward or backward, so that it is exact also where
    training is not deterministic. It moves more bytes per iteration than
    :class:`~moetion_lightning.callbacks.SparseExpertCheckpoint`, which takes the same settings.

    Args:
        window: Iterations in which full captures go round; "auto" takes 8. A longer one captures fewer bytes in each
            iteration and takes more host memory.
        **settings: ``specs``, ``sinks``, ``events_path`` and ``log_metrics`` as of
            :class:`~moetion_lightning.callbacks._base.EngineCallback`, and all of
            :class:`~moetion_lightning.config.EngineConfig` but ``max_window``, ``overlap_target`` and ``mtbf``.

    Raises:
        ConfigurationError: A setting is unknown or out of range.

    Source: the log goes back to GoCkpt and Checkmate (dense copies, data parallelism), to full captures in turn of
    MoEtion (NSDI'26).
    """

    def __init__(self, window: int | Literal["auto"] = "auto", **settings: Any) -> None:
        super().__init__(window=window, **settings)

    def _policy(self) -> Policy:
        return GradientLogPolicy(self.config.window)
