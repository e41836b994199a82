"""Lightning callbacks that write down what a run did, so that two runs can be compared bit for bit.

In a run of several ranks each one writes a file of its own: ``final.safetensors`` becomes ``final-2.safetensors``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from moetion_lightning.testing.compare import flatten_state, write_state

__all__ = ["FinalState", "LossRecorder", "rank_path"]


def rank_path(path: str | os.PathLike[str], rank: int, world_size: int) -> Path:
    """Where a rank writes.

    Args:
        path: The file that was asked for.
        rank: Global rank.
        world_size: Ranks of the run; a single one writes to ``path`` itself.
    """
    given = Path(path)
    return given if world_size == 1 else given.with_name(f"{given.stem}-{rank}{given.suffix}")


class LossRecorder(Callback):
    """Appends the loss of every training micro-batch to a JSONL file, exactly (hexadecimal).

    Lines are written with one system call each, so that a process killed at any instant leaves whole lines.

    Args:
        path: File to append to; created where it does not exist.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write one line."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor):
            return
        record: dict[str, Any] = {
            "epoch": trainer.current_epoch,
            "batch_idx": batch_idx,
            "global_step": trainer.global_step,
            "loss": float(loss.detach()).hex(),
            "pid": os.getpid(),
        }
        if isinstance(batch, Mapping) and isinstance(batch.get("sample_id"), Tensor):
            record["sample_ids"] = batch["sample_id"].tolist()
        path = rank_path(self.path, trainer.global_rank, trainer.world_size)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, (json.dumps(record) + "\n").encode())
        finally:
            os.close(descriptor)


class FinalState(Callback):
    """Writes parameters, buffers and optimizer state to a safetensors file when training ends.

    Args:
        path: File to write. It exists only if training ended.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        path = rank_path(self.path, trainer.global_rank, trainer.world_size)
        write_state(path, *flatten_state(pl_module, trainer.optimizers))
