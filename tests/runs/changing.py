"""Models that change while they train: lazy, growing, resting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from tests.runs.models import Automatic


class Lazy(Automatic):
    """Parameters and buffers that are made in the first forward."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.extra = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Linear(8, 32))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.body(batch["tokens"]).float()
        return nn.functional.cross_entropy(logits + self.extra(logits), batch["target"])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.spec["lr"])


class Resting(Automatic):
    """Nothing trains in epoch 1, though the optimizer is stepped."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.automatic_optimization = False

    def on_train_epoch_start(self) -> None:
        self.requires_grad_(self.current_epoch != 1)
        self.body.frozen.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer, loss = self.optimizers(), self.loss(batch)
        optimizer.zero_grad()
        if loss.requires_grad:
            self.manual_backward(loss)
        optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.spec["lr"])


class Growing(Automatic):
    """Gets an adapter in step 7; a start after that finds it there already, if the script says so."""

    knows_that_it_grew = True

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.marker = Path(spec["out"]) / "grown"
        if self.knows_that_it_grew and self.marker.exists():
            self.adapter = nn.Linear(32, 32)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.body(batch["tokens"]).float()
        if hasattr(self, "adapter"):
            logits = logits + self.adapter(logits)
        return nn.functional.cross_entropy(logits, batch["target"])

    def on_train_start(self) -> None:
        self.optimizers().optimizer.param_groups[-1]["tag"] = 1.0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers().optimizer
        if self.global_step == 7 and not hasattr(self, "adapter"):
            self.adapter = nn.Linear(32, 32)
            optimizer.add_param_group({"params": list(self.adapter.parameters()), "lr": 0.01})
            self.marker.touch()
        assert sum("tag" in group for group in optimizer.param_groups) == 1


class GrowingUnawares(Growing):
    knows_that_it_grew = False


class Shrinking(Automatic):
    """Loses a part in step 7."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.marker = Path(spec["out"]) / "shrunk"
        if not self.marker.exists():
            self.adapter = nn.Linear(32, 32)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.body(batch["tokens"]).float()
        if hasattr(self, "adapter"):
            logits = logits + self.adapter(logits)
        return nn.functional.cross_entropy(logits, batch["target"])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == 7 and hasattr(self, "adapter"):
            gone = {id(p) for p in self.adapter.parameters()}
            del self.adapter
            optimizer = self.optimizers().optimizer
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in gone]
            for p in [p for p in optimizer.state if id(p) in gone]:
                del optimizer.state[p]
            self.marker.touch()


class Alternating(Automatic):
    """What trains is another half in every iteration."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.body.blocks[0].requires_grad_(self.global_step % 2 == 0)
        self.body.blocks[1].requires_grad_(self.global_step % 2 == 1)


MODULES: dict[str, type[pl.LightningModule]] = {
    "lazy": Lazy,
    "resting": Resting,
    "growing": Growing,
    "growing_unawares": GrowingUnawares,
    "shrinking": Shrinking,
    "alternating": Alternating,
}
