"""The model and the data of the benchmarks: a byte-level MoE language model on synthetic tokens."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from _sizes import sizes
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from moetion_lightning.recipes.models import ByteMoE, CausalLM

__all__ = ["dense_bytes", "make_loader", "make_model"]


class _Clocked(LightningModule):
    """Calls ``clock`` once a batch, after all callbacks' ``on_train_batch_end``."""

    clock: Callable[[], None] | None = None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.clock is not None:
            self.clock()


class _ClockedByteMoE(_Clocked, ByteMoE):
    pass


class _ClockedCausalLM(_Clocked, CausalLM):
    pass


def make_model(args: argparse.Namespace) -> _Clocked:
    """The model with random weights, the same in every process."""
    torch.manual_seed(1234)
    size = sizes(args)
    if args.experts == "list":
        names = ("d_model", "d_expert", "num_layers", "num_experts", "top_k")
        return _ClockedByteMoE(max_seq_len=size["seq_len"], total_steps=10_000, **{n: size[n] for n in names})
    return _ClockedCausalLM(
        model_type="qwen3_moe",
        config={
            "vocab_size": 256,
            "hidden_size": size["d_model"],
            "num_hidden_layers": size["num_layers"],
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": size["d_model"] // 8,
            "max_position_embeddings": size["seq_len"],
            "intermediate_size": size["d_model"],
            "moe_intermediate_size": size["d_expert"],
            "num_experts": size["num_experts"],
            "num_experts_per_tok": size["top_k"],
            "output_router_logits": True,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        },
        attn_implementation="sdpa",
        total_steps=10_000,
    )


def dense_bytes(module: nn.Module) -> int:
    """Bytes of parameters and AdamW's two moments."""
    return sum(3 * p.numel() * p.element_size() for p in module.parameters())


class _Tokens(Dataset[dict[str, Tensor]]):
    """Synthetic tokens: item ``i`` is a function of ``i`` alone."""

    def __init__(self, seq_len: int, length: int) -> None:
        self._seq_len, self._length = seq_len, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = index * 2_654_435_761 % 1_000_003
        return {"input_ids": (torch.arange(self._seq_len) * (start % 97 + 1) + start) % 256}


def make_loader(args: argparse.Namespace) -> DataLoader[dict[str, Tensor]]:
    """An ordinary loader, longer than any run here."""
    size = sizes(args)
    return DataLoader(_Tokens(size["seq_len"], 1_000_000), batch_size=size["batch"])
