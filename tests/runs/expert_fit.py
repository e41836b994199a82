"""Trainings with experts spread over ranks, one after the other in one start of the ranks. Runs in child processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

WIDTH, SYMBOLS = 8, 16
SAMPLES = 64
GLOBAL_BATCH = 8


class Expert(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


class FusedExperts(nn.Module):
    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.up = nn.Parameter(torch.randn(num_experts, WIDTH, 2 * WIDTH) * 0.3)
        self.down = nn.Parameter(torch.randn(num_experts, 2 * WIDTH, WIDTH) * 0.3)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            rows, place = torch.where(top_k_index == expert)
            hidden = F.gelu(hidden_states[rows] @ self.up[expert]) @ self.down[expert]
            result = result.index_add(0, rows, (hidden * top_k_weights[rows, place, None]).to(result.dtype))
        return result


class Block(nn.Module):
    """Routes every token that is not symbol 0, which stands for padding."""

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        num_experts = case.get("num_experts", 4)
        self.gate = nn.Linear(WIDTH, num_experts, bias=False)
        self.fused = case["kind"] == "fused"
        self.experts = FusedExperts(num_experts) if self.fused else nn.ModuleList(Expert() for _ in range(num_experts))
        self.usable = case.get("usable", num_experts)

    def forward(self, x: Tensor, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = x.reshape(-1, WIDTH)
        kept = real.reshape(-1).nonzero().squeeze(-1)
        weights, ids = self.gate(tokens[kept])[:, : self.usable].softmax(-1).topk(2, -1)
        if self.fused:
            mixed = self.experts(tokens[kept], ids, weights)
            return torch.zeros_like(tokens).index_add(0, kept, mixed.to(tokens.dtype)).view_as(x), {}
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows, place = torch.where(ids == index)
            if rows.numel():
                result = expert(tokens[kept[rows]]).mul_(weights[rows, place, None])
                out = out.index_add(0, kept[rows], result.to(out.dtype))
        return out.view_as(x), {"weights": weights.detach()}


class Model(pl.LightningModule):
    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        self.case = case
        self.automatic_optimization = not case.get("manual", False)
        self.embed = nn.Embedding(SYMBOLS, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.blocks = nn.ModuleList(Block(case) for _ in range(2))
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def loss(self, tokens: Tensor) -> Tensor:
        x, real = self.embed(tokens), tokens > 0
        for norm, block in zip(self.norms, self.blocks):
            if self.case.get("checkpointing"):
                x = x + checkpoint(lambda h, b=block: b(h, real)[0], norm(x), use_reentrant=False)
            else:
                x = x + block(norm(x), real)[0]
        return F.cross_entropy(self.head(x).flatten(0, 1), tokens.roll(-1, 1).flatten())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch[0])
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            self.manual_backward(loss / 2)
            if batch_idx % 2:
                torch.nn.utils.clip_grad_norm_(self.parameters(), 0.2)
                optimizer.step()
                optimizer.zero_grad()
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch[0]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.dim() > 1]
        rest = [p for p in self.parameters() if p.dim() <= 1]
        groups = [{"params": rest, "weight_decay": 0.0}, {"params": matrices[::-1]}]
        return torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.1)


def make_data(case: dict[str, Any]) -> TensorDataset:
    tokens = torch.randint(1, SYMBOLS, (SAMPLES, 6), generator=torch.Generator().manual_seed(1))
    if case.get("padded"):
        tokens[1::2] = 0  # the odd samples are the batches of rank 1 of 2
    return TensorDataset(tokens)


def fit(case: dict[str, Any], out: Path, world: int, checkpoints: Path | None = None) -> Any:
    """Train; write an ordinary checkpoint."""
    pl.seed_everything(case.get("seed", 0) + int(os.environ.get("RANK", 0)), verbose=False)
    model = Model(case)
    if "precision" not in case:
        model.double()  # Lightning would convert it only after it has loaded a checkpoint
    strategy: Any = "auto"
    if world > 1:
        from moetion_lightning.strategies import MoEtionStrategy

        # A rank without any real token has no gradient for its gate: as under DDP, that must be announced.
        options = {"find_unused_parameters": True} if case.get("padded") else {}
        strategy = MoEtionStrategy(expert_parallel_size=case["ep"], process_group_backend="gloo", **options)
    manual = case.get("manual", False)
    data = make_data(case)
    callbacks = [Rebuild()] if case.get("rebuild") else []
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, precision=case.get("precision", "64-true"),
        max_steps=case.get("steps", 4), accumulate_grad_batches=1 if manual else 2, callbacks=callbacks,
        gradient_clip_val=None if manual else 0.2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=1, num_sanity_val_steps=1,
        use_distributed_sampler=False,
    )  # fmt: skip
    # Every rank's batch is a part of the batch of one process; Lightning's own sampler would shuffle.
    sampler = DistributedSampler(data, world, int(os.environ.get("RANK", 0)), shuffle=False) if world > 1 else None
    loaders = [DataLoader(data, batch_size=GLOBAL_BATCH // world, sampler=sampler) for _ in range(2)]
    resume = str((checkpoints or out.parent) / f"{case['resume']}.ckpt") if "resume" in case else None
    trainer.fit(model, *loaders, ckpt_path=resume)
    trainer.save_checkpoint(out.with_suffix(".ckpt"))
    torch.save(
        {
            "local": model.state_dict(),
            "replicas": {n: strategy.replica_ranks(n) for n, _ in model.named_parameters()} if world > 1 else {},
        },
        out.with_suffix(f".rank{os.environ.get('RANK', 0)}"),
    )
    return model


class Rebuild(pl.Callback):
    """Destroys all process groups between two steps, as after a lost rank, and makes them again."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if index != 4:
            return
        dist = torch.distributed
        rank, world = dist.get_rank(), dist.get_world_size()
        store = dist.PrefixStore("generation1", dist.distributed_c10d._get_default_store())
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        trainer.strategy.rebuild_groups()  # type: ignore[attr-defined]


def run(spec: dict[str, Any]) -> None:
    """All cases of one world size."""
    for name, case in spec["cases"].items():
        fit(case, Path(spec["out"]) / name, spec["ranks"])
    torch.distributed.barrier()  # rank 0 serves the store: it is the last one to need it
    torch.distributed.destroy_process_group()
