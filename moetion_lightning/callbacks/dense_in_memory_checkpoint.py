"""Dense in-memory snapshots, as a callback."""

from __future__ import annotations

from typing import Any

from moetion_lightning.callbacks._base import EngineCallback
from moetion_lightning.core.policy import DensePolicy, Policy

__all__ = ["DenseInMemoryCheckpoint"]


class DenseInMemoryCheckpoint(EngineCallback):
    """Copies the whole state into host memory every ``every_n_steps`` optimizer steps. Exact, without a replay.

    Args:
        every_n_steps: Optimizer steps between snapshots.
        **settings: As of :class:`~moetion_lightning.callbacks.SparseExpertCheckpoint`, but for its window.

    Raises:
        ConfigurationError: A setting is unknown or out of range.

    Source: Gemini (SOSP'23).
    """

    def __init__(self, every_n_steps: int = 1, **settings: Any) -> None:
        super().__init__(window=1, **settings)
        self._every_n_steps = every_n_steps
        self._policy()  # a wrong value raises here

    def _policy(self) -> Policy:
        return DensePolicy(self._every_n_steps)
