"""CheckFreq's two-phase checkpoints, as a callback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from moetion_lightning.callbacks._base import EngineCallback
from moetion_lightning.core.policy import DensePolicy, Policy
from moetion_lightning.core.two_phase_policy import TwoPhasePolicy
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.events import Event, Sink, WindowPersisted

__all__ = ["TwoPhaseCheckpoint"]


class TwoPhaseCheckpoint(EngineCallback):
    """Copies the whole state into host memory, and from there to storage in the background; exact, without a replay.

    How often is measured: as often as snapshots cost no more than ``overhead``, and each gets to storage before the
    next one is made. A restart on the same machine finds the newest snapshot in memory, one on another machine the
    newest on storage.

    Args:
        persist_dir: Directory or fsspec URL of the second phase.
        every_n_steps: Optimizer steps between snapshots; "auto" measures.
        overhead: Share of the training time that "auto" lets snapshots cost.
        sinks: As of :class:`~moetion_lightning.callbacks._base.EngineCallback`.
        **settings: As of :class:`~moetion_lightning.callbacks.SparseExpertCheckpoint`, but for its window.

    Raises:
        ConfigurationError: A setting is unknown or out of range.

    Source: CheckFreq (FAST'21).
    """

    def __init__(
        self,
        persist_dir: str,
        every_n_steps: int | Literal["auto"] = "auto",
        overhead: float = 0.035,
        sinks: Sequence[Sink] = (),
        **settings: Any,
    ) -> None:
        if not persist_dir:
            raise ConfigurationError(
                f"persist_dir={persist_dir!r}: expected a directory or URL for the second phase; "
                "DenseInMemoryCheckpoint has the first phase alone"
            )
        super().__init__(window=1, persist_dir=persist_dir, sinks=(*sinks, self._note), **settings)
        self._every_n_steps = every_n_steps
        self._overhead = overhead
        self._persist_seconds = 0.0
        self._policy()  # a wrong value raises here

    def _policy(self) -> Policy:
        if self._every_n_steps != "auto":
            return DensePolicy(self._every_n_steps)
        return TwoPhasePolicy(self._overhead, self.config.overlap_target, lambda: self._persist_seconds)

    def _note(self, event: Event) -> None:
        if isinstance(event, WindowPersisted):
            self._persist_seconds = event.seconds
