"""Small modules that have, between them, every kind of training state."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard


class ListMoE(nn.Module):
    """Experts as a ModuleList; an expert without tokens gets no gradient."""

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(num_experts)
        )
        # Auxiliary-loss-free balancing: a buffer that training changes and routing reads.
        self.register_buffer("bias_correction", torch.zeros(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).softmax(-1)
        ids = (scores + self.bias_correction.to(scores)).topk(2, -1).indices
        weights = scores.gather(-1, ids)
        if self.training:
            load = torch.bincount(ids.flatten(), minlength=len(self.experts)).float()
            self.bias_correction += 0.01 * (load.mean() - load).sign()
        result = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            mask = ids == index
            rows = mask.any(-1)
            if rows.any():
                share = (weights * mask).sum(-1, keepdim=True)[rows]
                result[rows] = result[rows] + (expert(x[rows]) * share).to(result.dtype)
        return result


class FusedMoE(nn.Module):
    """All experts in one 3-D parameter each: an expert is a slice."""

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.experts = FusedExperts(width, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).softmax(-1)
        weights, ids = scores.topk(2, -1)
        return self.experts(x, ids, weights)


class FusedExperts(nn.Module):
    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(num_experts, width, 2 * width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(num_experts, 2 * width, width) * width**-0.5)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden_states)
        for index in range(self.up.shape[0]):
            mask = top_k_index == index
            rows = mask.any(-1)
            if rows.any():
                share = (top_k_weights * mask).sum(-1, keepdim=True)[rows]
                hidden = torch.nn.functional.gelu(hidden_states[rows] @ self.up[index])
                result[rows] = result[rows] + (hidden @ self.down[index] * share).to(result.dtype)
        return result


class Dense(nn.Module):
    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


BLOCKS: dict[str, type[nn.Module]] = {"list": ListMoE, "fused": FusedMoE, "dense": Dense}


class Body(nn.Module):
    """Two blocks between an embedding and a head that share their weights; batch norm, dropout, a frozen part."""

    def __init__(self, block: str, width: int = 16, vocabulary: int = 32, num_experts: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.blocks = nn.ModuleList(BLOCKS[block](width, num_experts) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.batch_norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).mean(1)
        x = self.batch_norm(x + self.frozen(x))
        for norm, block in zip(self.norms, self.blocks):
            x = x + self.dropout(block(norm(x)))
        return self.head(x)


def make_optimizer(name: str, parameters: Any, lr: float) -> torch.optim.Optimizer:
    if name == "lion":
        from lion_pytorch import Lion

        return Lion(parameters, lr=lr / 10, weight_decay=0.01)
    kinds: dict[str, Any] = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=lr, foreach=True),
        "adamw_fused": lambda p: torch.optim.AdamW(p, lr=lr, fused=True),
        "adamw_loop": lambda p: torch.optim.AdamW(p, lr=lr, foreach=False, amsgrad=True),
        "adam": lambda p: torch.optim.Adam(p, lr=lr),
        "sgd": lambda p: torch.optim.SGD(p, lr=10 * lr, momentum=0.9, nesterov=True),
        "adafactor": lambda p: torch.optim.Adafactor(p, lr=lr),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=lr / 10, momentum=0.5),
    }
    return kinds[name](parameters)


def make_scheduler(name: str, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    schedulers = torch.optim.lr_scheduler
    if name == "cosine":
        return {"scheduler": schedulers.CosineAnnealingLR(optimizer, 20), "interval": "step"}
    if name == "warmup":
        return {"scheduler": schedulers.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 6)), "interval": "step"}
    if name == "epoch":
        return {"scheduler": schedulers.StepLR(optimizer, 1, gamma=0.7), "interval": "epoch"}
    if name == "plateau":
        return {
            "scheduler": schedulers.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=0.5),
            "interval": "epoch",
            "monitor": "train_loss_epoch",
        }
    raise ValueError(name)


class Automatic(pl.LightningModule):
    """One optimizer, run by Lightning."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self.spec = {key: value for key, value in spec.items() if key not in ("break", "kill")}  # of this start
        self.body = Body(spec["block"], width=spec["width"], num_experts=spec["num_experts"])

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.body(batch["tokens"])
        return torch.nn.functional.cross_entropy(logits.float(), batch["target"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = batch if isinstance(batch, list) else [batch]  # a list: several loaders combined
        loss = sum(self.loss(part) for part in parts)
        if self.spec["overflow_at"] and self.global_step == self.spec["overflow_at"]:
            loss = loss * (torch.inf if batch_idx % 2 == 0 else 1.0)
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=4)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=4)

    def configure_optimizers(self) -> Any:
        spec = self.spec
        if spec["estimate_steps"]:
            assert self.trainer.estimated_stepping_batches > 0
        decay = [p for p in self.parameters() if p.dim() > 1]
        rest = [p for p in self.parameters() if p.dim() <= 1]
        groups = [{"params": decay}, {"params": rest, "weight_decay": 0.0}]
        optimizer = make_optimizer(spec["optimizer"], groups, spec["lr"])
        if not spec["scheduler"]:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": make_scheduler(spec["scheduler"], optimizer)}


class Manual(Automatic):
    """Two optimizers, run by the module itself; the second one accumulates over batches."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.automatic_optimization = False
        self.critic = nn.Linear(32, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first, second = self.optimizers()
        logits = self.body(batch["tokens"])
        loss = torch.nn.functional.cross_entropy(logits.float(), batch["target"])
        first.zero_grad()
        self.manual_backward(loss - 0.1 * self.critic(logits).mean())
        first.step()
        second_loss = self.critic(self.body(batch["tokens"]).detach()).pow(2).mean()
        self.manual_backward(second_loss)
        for _ in range(self.spec["inner_steps"]):
            if batch_idx % 2:
                second.step()
        if batch_idx % 2:
            second.zero_grad()
            self.lr_schedulers().step()
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=4)
        return loss

    def configure_optimizers(self) -> Any:
        first = make_optimizer(self.spec["optimizer"], self.body.parameters(), self.spec["lr"])
        second = torch.optim.SGD(self.critic.parameters(), lr=0.01, momentum=0.9)
        return [first, second], [torch.optim.lr_scheduler.ExponentialLR(first, 0.95)]


class Sharded(pl.LightningModule):
    """Mixed into a module: every rank holds a shard of every parameter (FSDP2).

    Sharded by block, not by expert: all ranks gather a block together, whichever experts their tokens go to.
    """

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for child in self.children():
            if not any(True for _ in child.parameters()):
                continue
            for block in getattr(child, "blocks", ()):
                fully_shard(block, mesh=mesh)
            fully_shard(child, mesh=mesh)
            # An expert without tokens on this rank may have some on another one: both must reduce its gradient.
            child.set_reduce_scatter_unused_params(True)
