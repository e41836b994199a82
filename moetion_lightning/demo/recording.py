"""What only the demonstrations write down of a run."""

from __future__ import annotations

import json
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from moetion_lightning.callbacks import StageBoundaryLogging
from moetion_lightning.testing.recording import rank_path

__all__ = ["BoundaryLogSize"]


class BoundaryLogSize(Callback):
    """Writes how large each rank's boundary log is when training ends.

    Args:
        path: File to write, as JSON: bytes of the last step, and most bytes ever held. Each rank puts its number before
            the ending.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StageBoundaryLogging) and callback.link is not None:
                log = callback.link.log
                sizes = {"step_bytes": log.iteration_bytes, "most_bytes": log.high_water_bytes}
                path = Path(rank_path(self.path, trainer.global_rank, trainer.world_size))
                path.write_text(json.dumps(sizes) + "\n", encoding="utf-8")
