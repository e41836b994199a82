"""Recovery alone."""

from __future__ import annotations

from typing import Literal

from moetion_lightning.callbacks._base import EngineCallback
from moetion_lightning.config import EngineConfig
from moetion_lightning.core.policy import Policy, RestoreOnlyPolicy

__all__ = ["DenseReconstruction"]


class DenseReconstruction(EngineCallback):
    """Finds the newest restore point at start, rebuilds the dense state by replaying its window, checks what it can.

    The capturing callbacks do this by themselves. Add it beside one of them to set how a restore is done, or alone to
    continue a job without capturing any more.

    Args:
        resume: "auto" continues from the newest window of this job, "never" starts afresh.
        on_mismatch: What to do when a replayed iteration differs from the recorded one.
        skip_frozen_gradients: While replaying, skip the weight gradients of operators that are not rebuilt yet.
        memory_dir: Where windows in host memory are, when used alone.
        persist_dir: Where persisted windows are, when used alone.
        job_id: Identity of the job, when used alone.
        events_path: JSONL file for the events, when used alone.
    """

    def __init__(
        self,
        resume: Literal["auto", "never"] = "auto",
        on_mismatch: Literal["warn", "raise"] = "warn",
        skip_frozen_gradients: bool = False,
        memory_dir: str | None = None,
        persist_dir: str | None = None,
        job_id: str | None = None,
        events_path: str | None = None,
    ) -> None:
        config = EngineConfig(
            resume=resume,
            on_mismatch=on_mismatch,
            skip_frozen_gradients=skip_frozen_gradients,
            memory_dir=memory_dir,
            persist_dir=persist_dir,
            job_id=job_id,
        )
        super().__init__(config, events_path=events_path)

    def captures(self) -> bool:
        return False

    def setup(self, trainer, pl_module, stage):  # type: ignore[no-untyped-def]
        callbacks = trainer.callbacks
        if any(isinstance(c, EngineCallback) and c.captures() for c in callbacks):
            return  # the capturing callback restores, with the settings of this one
        super().setup(trainer, pl_module, stage)

    def _policy(self) -> Policy:
        return RestoreOnlyPolicy()
