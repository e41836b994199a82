"""An ordinary Lightning script of several ranks (DDP) with one callback of ours.

usage: lightning_job.py FOLDER STEPS [KILL_STEP]

Every rank writes FOLDER/final-RANK.safetensors when training ends, and events to FOLDER/events.jsonl. Training begins
when FOLDER/go exists. With KILL_STEP rank 1 kills itself there, in the first attempt of torchrun.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from moetion_lightning import SparseExpertCheckpoint
from moetion_lightning.testing.recording import FinalState
from tests.runs.models import Body


class Module(pl.LightningModule):
    def __init__(self, kill_step: int | None) -> None:
        super().__init__()
        self.body = Body("fused")
        self.kill_step = kill_step

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.global_step == self.kill_step and self.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.nn.functional.cross_entropy(self.body(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def main(folder: Path, steps: int, kill_step: int | None) -> None:
    pl.seed_everything(7)
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randint(32, (96, 8), generator=generator), torch.randint(32, (96,), generator=generator))
    trainer = pl.Trainer(
        strategy="ddp",
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        max_steps=steps,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        callbacks=[
            SparseExpertCheckpoint(
                window=3, memory_dir=str(folder / "memory"), events_path=str(folder / "events.jsonl")
            ),
            FinalState(str(folder / "final.safetensors")),
        ],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    while not (folder / "go").exists():
        time.sleep(0.05)
    trainer.fit(Module(kill_step), DataLoader(data, batch_size=4, shuffle=True))


if __name__ == "__main__":
    first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 and first_attempt else None)
