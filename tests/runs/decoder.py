"""A decoder whose layers hand on a tuple: what a pipeline cuts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.runs.models import BLOCKS, Automatic


class Layer(nn.Module):
    """Attention and experts; returns the hidden states and an auxiliary loss."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        width = spec["width"]
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.block = BLOCKS[spec["block"]](width, spec["num_experts"])
        self.dropout = nn.Dropout(spec["dropout"])

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = self.attention(self.attention_norm(x)).chunk(3, -1)
        scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5 + mask
        x = x + self.dropout(self.out(scores.softmax(-1) @ value))
        normed = self.norm(x)
        x = x + self.dropout(self.block(normed.flatten(0, 1)).view_as(x))
        return x, (self.block.gate(normed).softmax(-1).mean((0, 1)) ** 2).sum()


class Decoder(Automatic):
    """Embedding, a positional parameter used directly, layers, a norm, a head (which may share the embedding)."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        width = spec["width"]
        self.body = nn.Module()
        self.body.embed = nn.Embedding(32, width)
        self.body.positions = nn.Parameter(torch.randn(5, width) * 0.1)
        self.body.layers = nn.ModuleList(Layer(spec) for _ in range(spec["num_layers"]))
        self.body.norm = nn.LayerNorm(width)
        self.body.head = nn.Linear(width, 32, bias=False)
        if spec["tied"]:
            self.body.head.weight = self.body.embed.weight
        if spec["frozen_front"]:
            self.body.embed.requires_grad_(False)
            self.body.layers[0].requires_grad_(False)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        tokens = batch["tokens"]
        x = self.body.embed(tokens) + self.body.positions
        mask = torch.full((5, 5), -torch.inf, device=x.device).triu(1)
        auxiliary = torch.zeros((), device=x.device)
        for layer in self.body.layers:
            x, more = layer(x, mask)
            auxiliary = auxiliary + more
        logits = self.body.head(self.body.norm(x))
        return nn.functional.cross_entropy(logits.float().mean(1), batch["target"]) + 0.1 * auxiliary
