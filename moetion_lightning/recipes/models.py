"""The models of the recipes: a small byte-level MoE in plain torch, and any transformers model with random weights."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from moetion_lightning.errors import ConfigurationError

__all__ = ["ByteMoE", "CausalLM", "Expert", "MoELayer", "warmup_cosine"]


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int, floor: float = 0.1) -> float:
    """Factor of the peak learning rate after ``step`` optimizer steps: linear warm-up, then a cosine down to ``floor``.

    Args:
        step: Optimizer steps taken so far.
        warmup_steps: Length of the linear part.
        total_steps: Where the cosine ends; the factor stays at ``floor`` afterwards.
        floor: Last factor.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


class Expert(nn.Module):
    """One feed-forward expert.

    Args:
        d_model: Width of the residual stream.
        d_expert: Inner width.
    """

    def __init__(self, d_model: int, d_expert: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_expert)
        self.down = nn.Linear(d_expert, d_model)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``[T, d_model]`` to ``[T, d_model]``."""
        out: Tensor = self.down(F.gelu(self.up(tokens)))
        return out


class MoELayer(nn.Module):
    """Top-k routed experts in a ModuleList.

    Args:
        d_model: Width of the residual stream.
        d_expert: Inner width of each expert.
        num_experts: Number of experts.
        top_k: Experts a token.
    """

    def __init__(self, d_model: int, d_expert: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(d_model, d_expert) for _ in range(num_experts))
        self.top_k = top_k

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Mix the experts' outputs.

        Args:
            hidden: ``[B, S, d_model]``.

        Returns:
            The mixed output ``[B, S, d_model]``, and the load-balancing loss (0-d): the Switch Transformer's
            ``E * sum_e(share of assignments_e * mean router probability_e)``.
        """
        num_experts = len(self.experts)
        tokens = hidden.reshape(-1, hidden.shape[-1])
        probabilities = self.gate(tokens).softmax(dim=-1, dtype=torch.float32)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(tokens.dtype)
        # Combining by a dense [T, E] matrix keeps the sum's order fixed, so that a run can be repeated bit for bit.
        mix = torch.zeros_like(probabilities, dtype=tokens.dtype).scatter(1, chosen, weights)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).any(dim=-1).nonzero().squeeze(-1)
            if rows.numel() == 0:
                continue
            result = expert(tokens[rows]) * mix[rows, index].unsqueeze(-1)
            out = out.index_add(0, rows, result.to(out.dtype))
        share = F.one_hot(chosen, num_experts).sum(dim=(0, 1)).float() / chosen.numel()
        balance = num_experts * (share * probabilities.mean(dim=0)).sum()
        return out.view_as(hidden), balance


class _Block(nn.Module):
    def __init__(
        self, d_model: int, num_heads: int, d_expert: int, num_experts: int, top_k: int, dropout: float
    ) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.proj = nn.Linear(d_model, d_model, bias=False)
        self.norm_moe = nn.LayerNorm(d_model)
        self.moe = MoELayer(d_model, d_expert, num_experts, top_k)
        self.dropout = nn.Dropout(dropout)
        self.num_heads = num_heads

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, width = hidden.shape
        heads = self.qkv(self.norm_attention(hidden)).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        hidden = hidden + self.dropout(self.proj(mixed.transpose(1, 2).reshape(batch, length, width)))
        routed, balance = self.moe(self.norm_moe(hidden))
        return hidden + self.dropout(routed), balance


class ByteMoE(LightningModule):
    """A small decoder-only Mixture-of-Experts language model over bytes, in plain torch.

    Learned positions, pre-norm blocks, ModuleList experts behind a top-k router with a load-balancing loss, dropout,
    AdamW with warm-up and a cosine. Logs ``train_loss``, ``train_balance`` and ``val_loss``.

    Args:
        vocab_size: Number of symbols.
        max_seq_len: Longest sequence (size of the position table).
        d_model: Width of the residual stream.
        num_layers: Number of blocks; each has an MoE layer.
        num_heads: Attention heads a block; divides ``d_model``.
        num_experts: Experts an MoE layer.
        top_k: Experts a token.
        d_expert: Inner width of each expert.
        dropout: Dropout probability on both branches of a block.
        balance_weight: Weight of the load-balancing loss.
        lr: Peak learning rate.
        weight_decay: AdamW's weight decay.
        warmup_steps: Optimizer steps of linear warm-up.
        total_steps: Optimizer step at which the cosine ends.
    """

    def __init__(
        self,
        vocab_size: int = 256,
        max_seq_len: int = 64,
        d_model: int = 64,
        num_layers: int = 2,
        num_heads: int = 4,
        num_experts: int = 8,
        top_k: int = 2,
        d_expert: int = 128,
        dropout: float = 0.1,
        balance_weight: float = 0.01,
        lr: float = 3e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 5,
        total_steps: int = 60,
    ) -> None:
        super().__init__()
        if d_model % num_heads:
            raise ConfigurationError(
                f"ByteMoE(d_model={d_model}, num_heads={num_heads}): num_heads must divide d_model"
            )
        if not 1 <= top_k <= num_experts:
            raise ConfigurationError(
                f"ByteMoE(top_k={top_k}, num_experts={num_experts}): expected 1 <= top_k <= num_experts"
            )
        self.save_hyperparameters()
        self.embed = nn.Embedding(vocab_size, d_model)
        self.position = nn.Embedding(max_seq_len, d_model)
        self.blocks = nn.ModuleList(
            _Block(d_model, num_heads, d_expert, num_experts, top_k, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        self.balance_weight = balance_weight
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[B, S, vocab_size]`` of the next byte, and the mean load-balancing loss (0-d)."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = self.embed(input_ids) + self.position(positions)
        balances = []
        for block in self.blocks:
            hidden, balance = block(hidden)
            balances.append(balance)
        return self.head(self.norm(hidden)), torch.stack(balances).mean()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Next-byte loss plus the weighted load-balancing loss."""
        loss, balance = self._losses(batch)
        self.log("train_loss", loss, prog_bar=True)
        self.log("train_balance", balance)
        return loss + self.balance_weight * balance

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the next-byte loss."""
        self.log("val_loss", self._losses(batch)[0], prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW, and a schedule stepped with the optimizer."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay, betas=(0.9, 0.95))
        return _with_schedule(optimizer, self.warmup_steps, self.total_steps)

    def _losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        ids = batch["input_ids"]
        logits, balance = self(ids)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        return loss, balance


class CausalLM(LightningModule):
    """A causal language model of transformers, built from a configuration with random weights (nothing is downloaded).

    The model computes its own loss from ``labels``, which includes the router's load-balancing loss where the family
    has one. Logs ``train_loss`` and ``val_loss``.

    Args:
        model_type: transformers' name of the family, for example ``qwen3_moe`` or ``mixtral``.
        config: Fields of the family's configuration that differ from its defaults.
        experts_implementation: How transformers runs fused experts (``eager``, ``grouped_mm``, ``batched_mm``); None
            for its own choice.
        attn_implementation: How transformers runs attention (``eager``, ``sdpa``); None for its own choice.
        lr: Peak learning rate.
        weight_decay: AdamW's weight decay.
        warmup_steps: Optimizer steps of linear warm-up.
        total_steps: Optimizer step at which the cosine ends.
    """

    def __init__(
        self,
        model_type: str = "qwen3_moe",
        config: dict[str, Any] | None = None,
        experts_implementation: str | None = None,
        attn_implementation: str | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 5,
        total_steps: int = 60,
    ) -> None:
        super().__init__()
        try:
            from transformers import AutoConfig, AutoModelForCausalLM
        except ModuleNotFoundError as error:
            raise ConfigurationError("CausalLM needs transformers: pip install 'moetion-lightning[hf]'") from error
        self.save_hyperparameters()
        try:
            hf_config = AutoConfig.for_model(model_type, **(config or {}))
        except ValueError as error:
            raise ConfigurationError(
                f"CausalLM(model_type={model_type!r}): this version of transformers has no such family. {error}"
            ) from error
        options: dict[str, Any] = {}
        if attn_implementation is not None:
            options["attn_implementation"] = attn_implementation
        self.model = AutoModelForCausalLM.from_config(hf_config, **options)
        if experts_implementation is not None:
            self.model.set_experts_implementation(experts_implementation)
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits ``[B, S, vocab]`` of the next token."""
        logits: Tensor = self.model(input_ids=input_ids).logits
        return logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The model's own loss, including the router's."""
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the model's own loss."""
        self.log("val_loss", self._loss(batch), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW, and a schedule stepped with the optimizer."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay, betas=(0.9, 0.95))
        return _with_schedule(optimizer, self.warmup_steps, self.total_steps)

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        ids = batch["input_ids"]
        loss: Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss


class _WarmupCosine:
    # A class of its own rather than a lambda: LambdaLR stores the attributes of callable objects in its state, and no
    # state of a lambda, so that resumed runs follow the recorded schedule.
    def __init__(self, warmup_steps: int, total_steps: int) -> None:
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps

    def __call__(self, step: int) -> float:
        return warmup_cosine(step, warmup_steps=self.warmup_steps, total_steps=self.total_steps)


def _with_schedule(optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int) -> Any:
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _WarmupCosine(warmup_steps, total_steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
