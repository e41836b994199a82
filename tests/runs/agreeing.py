"""What an ordinary module lets its ranks agree on when it starts: a folder, a seed, ids, and groups of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.runs.models import Automatic


class Agreeing(Automatic):
    """Each value is another one on each rank and in each process, before it is agreed on."""

    def setup(self, stage: str) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        own = 10 * rank + int(os.environ.get("MOETION_GENERATION", "0"))
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, own)
        folder = self.trainer.strategy.broadcast(f"run-{own}")
        last = [{"last": own, "with": (own, b"bytes", torch.tensor([own]))}]
        dist.broadcast_object_list(last, src=world - 1)
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, [own + other for other in range(world)], src=0)
        seed = torch.tensor([float(own)])
        dist.broadcast(seed, src=0)
        total = torch.tensor([own])
        dist.all_reduce(total)
        parts = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
        dist.all_gather(parts, torch.tensor([own]))
        self.agreed = {
            "gathered": gathered,
            "folder": folder,
            "last": repr(last),
            "mine": mine[0],
            "seed": float(seed),
            "total": int(total),
            "parts": [int(part) for part in parts],
        }
        self.scale = 1.0 + 0.01 * float(seed) + 0.01 * sum(gathered) + 0.001 * int(total)
        self.checkpoints: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * self.scale

    def on_train_end(self) -> None:
        out, rank = Path(self.spec["out"]), dist.get_rank()
        checkpoint = self.trainer.checkpoint_callback
        found = {
            **self.agreed,
            "log_dir": str(self.trainer.log_dir),
            "dirpath": str(checkpoint.dirpath),
            "best": sorted(checkpoint.best_k_models),
        }
        (out / f"agreed-{rank}.json").write_text(json.dumps(found))
