"""An ordinary Lightning script with one callback of ours, as a user of a cluster has it.

usage: lightning_job.py FOLDER STEPS [--persist FOLDER] [--every WINDOWS] [--hold STEP] [--devices N] [--nodes N]

Every rank writes FOLDER/final-RANK.safetensors (final.safetensors, if it is alone) when training ends, and events to
FOLDER/events.jsonl. With --hold training stands still inside of that step until FOLDER/go exists. Each node of a SLURM
job has host memory of its own. A task of an array of jobs has another seed, and FOLDER/task-NUMBER for its files.
"""

from __future__ import annotations

import argparse
import os
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
    def __init__(self, hold: int | None = None, go: Path | None = None) -> None:
        super().__init__()
        self.body = Body("fused")
        self._hold, self._go = hold, go

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        while self.global_step == self._hold and self._go is not None and not self._go.exists():
            time.sleep(0.01)
        return torch.nn.functional.cross_entropy(self.body(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randint(32, (96, 8), generator=generator), torch.randint(32, (96,), generator=generator))
    return DataLoader(data, batch_size=4, shuffle=True)


def trainer(
    folder: Path,
    steps: int,
    *,
    root: Path,
    memory_dir: Path,
    persist_dir: Path | None = None,
    persist_every: int = 100,
    **settings: Any,
) -> pl.Trainer:
    memory_dir.mkdir(parents=True, exist_ok=True)
    window = SparseExpertCheckpoint(
        window=3,
        memory_dir=str(memory_dir),
        persist_dir=None if persist_dir is None else str(persist_dir),
        persist_every_n_windows=persist_every,
        events_path=str(folder / "events.jsonl"),
    )
    return pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        gradient_clip_val=1.0,
        default_root_dir=root,
        callbacks=[window, FinalState(str(folder / "final.safetensors"))],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--persist", type=Path)
    parser.add_argument("--hold", type=int)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=1)
    given = parser.parse_args()
    task, node = os.environ.get("SLURM_ARRAY_TASK_ID"), os.environ.get("SLURMD_NODENAME")
    folder = given.folder if task is None else given.folder / f"task-{task}"
    pl.seed_everything(7 + int(task or 0))
    ranks: dict[str, Any] = {"devices": given.devices, "num_nodes": given.nodes}
    if given.devices * given.nodes > 1:
        ranks["strategy"] = "ddp"
    fit = trainer(
        folder,
        given.steps,
        root=given.folder,
        memory_dir=given.folder / ("memory" if node is None else f"memory-{node}"),
        persist_dir=given.persist,
        persist_every=given.every,
        **ranks,
    )
    fit.fit(Module(given.hold, folder / "go"), loader())


if __name__ == "__main__":
    main()
