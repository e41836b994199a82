"""A monitor that writes down after each batch what it has counted."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from moetion_lightning.callbacks import FaultToleranceMonitor
from moetion_lightning.callbacks._base import EngineCallback


class RecordingMonitor(FaultToleranceMonitor):
    def __init__(self, path: Path) -> None:
        super().__init__(every_n_steps=1)
        self._path = path

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._write({"started": time.time()})

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        engines = [c for c in trainer.callbacks if isinstance(c, EngineCallback) and c.captures()]
        lost = engines[0]._session.engine._attached.routing.lost
        self._write(
            {
                "step": trainer.global_step,
                **self.state_dict(),
                "values": self.values,
                "engine": {"plt": lost.plt, "lost": lost.lost.tolist(), "total": lost.total.tolist()},
            }
        )

    def _write(self, record: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"pid": os.getpid(), **record}) + "\n")


def read(out: Path, rank: int | None = None) -> list[dict[str, Any]]:
    """What the monitors of all processes of a rank wrote."""
    path = out / ("monitor.jsonl" if rank is None else f"monitor-{rank}.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]
