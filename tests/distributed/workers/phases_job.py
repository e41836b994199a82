"""An ordinary Lightning script with phases: two fits of the same module, then a test.

usage: phases_job.py FOLDER STEPS

Every rank writes FOLDER/final-RANK.safetensors when the second fit ends, and what the test found to FOLDER/test-RANK.
FOLDER/at-PHASE-RANK holds the process that has come to the middle of a phase (fit1, fit2, test, and of rank 1 end); it
waits there while FOLDER/hold-PHASE exists.
"""

from __future__ import annotations

import os
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
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.body = Body("fused")
        self.folder = folder
        self.phase = ""

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return torch.nn.functional.cross_entropy(self.body(batch[0]), batch[1])

    def come_to(self) -> None:
        note = self.folder / f"at-{self.phase}-{self.global_rank}"
        note.with_suffix(".new").write_text(str(os.getpid()))
        note.with_suffix(".new").rename(note)
        while (self.folder / f"hold-{self.phase}").exists():
            time.sleep(0.02)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 7:
            self.come_to()
        return self._loss(batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        if batch_idx == 2:
            self.come_to()
        self.log("test_loss", self._loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def main(folder: Path, steps: int) -> None:
    pl.seed_everything(7)
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randint(32, (96, 8), generator=generator), torch.randint(32, (96,), generator=generator))
    module = Module(folder)
    for phase in ("fit1", "fit2"):
        trainer = pl.Trainer(
            strategy="ddp",
            accelerator="cpu",
            devices=int(os.environ["WORLD_SIZE"]),
            max_steps=steps,
            default_root_dir=folder,
            callbacks=[
                SparseExpertCheckpoint(
                    window=3, memory_dir=str(folder / "memory"), events_path=str(folder / f"{phase}.jsonl")
                ),
                FinalState(str(folder / "final.safetensors")),
            ],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module.phase = phase
        trainer.fit(module, DataLoader(data, batch_size=4, shuffle=True))
    module.phase = "test"
    (found,) = trainer.test(module, DataLoader(data, batch_size=4))
    (folder / f"test-{trainer.global_rank}").write_text(repr(found))
    if trainer.global_rank == 1:
        module.phase = "end"
        module.come_to()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
