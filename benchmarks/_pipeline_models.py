"""What the pipeline benchmarks train: a byte-level MoE model that really computes, and a chain of emulated devices."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moetion_lightning.recipes.models import ByteMoE

__all__ = [
    "Device",
    "EmulatedPipeline",
    "Workload",
    "language_loss",
    "make_language_model",
    "make_tokens",
]

_BALANCE_WEIGHT = 0.01


def make_language_model(*, d_model: int, d_expert: int, num_layers: int, seq_len: int) -> ByteMoE:
    """Random weights, the same in every process. Without dropout."""
    torch.manual_seed(1234)
    return ByteMoE(
        max_seq_len=seq_len, d_model=d_model, num_layers=num_layers, num_experts=8, top_k=2, d_expert=d_expert,
        dropout=0.0,
    )  # fmt: skip


def make_tokens(number: int, samples: int, seq_len: int) -> Tensor:
    """The batch of an iteration."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(256, (samples, seq_len), generator=generator)


def language_loss(model: ByteMoE, tokens: Tensor) -> Tensor:
    """Next-byte loss, with the load-balancing loss of all layers."""
    logits, balance = model(tokens)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return loss + _BALANCE_WEIGHT * balance


class Device:
    """An emulated device: computing takes time, but no core. Counts what it computes.

    Args:
        forward_seconds: Of one micro-batch.
        backward_seconds: Of one micro-batch.
    """

    def __init__(self, forward_seconds: float, backward_seconds: float) -> None:
        self.busy = False  # the runs from which the cut is learnt take no time and do not count
        self.forwards = self.backwards = 0
        self._forward_seconds = forward_seconds
        self._backward_seconds = backward_seconds

    def forward(self) -> None:
        if self.busy:
            self.forwards += 1
            time.sleep(self._forward_seconds)

    def backward(self) -> None:
        if self.busy:
            self.backwards += 1
            time.sleep(self._backward_seconds)


class _Emulated(torch.autograd.Function):
    """Multiplies by a weight, while the device is busy."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, device: Device) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.device = device
        device.forward()
        return hidden * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight = ctx.saved_tensors
        ctx.device.backward()
        return gradient * weight, (gradient * hidden).flatten(0, -2).sum(0), None


class _Layer(nn.Module):
    def __init__(self, width: int, device: Device) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))
        self._device = device

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = _Emulated.apply(hidden, self.weight, self._device)
        return out


class EmulatedPipeline(nn.Module):
    """A layer for each stage, each on a device of its own: as many as there are processes.

    Args:
        num_stages: Number of layers.
        width: Size of the last dimension.
        device: This process's.
    """

    def __init__(self, num_stages: int, width: int, device: Device) -> None:
        super().__init__()
        torch.manual_seed(1234)
        self.layers = nn.ModuleList(_Layer(width, device) for _ in range(num_stages))

    def loss(self, batch: Tensor) -> Tensor:
        """Mean square of what comes out of the last layer."""
        hidden = batch
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden.square().mean()


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a rank trains.

    Args:
        module: The whole module.
        step: Gives the loss of a micro-batch.
        batch: The batch of an iteration, with so many samples.
        device: The emulated one, if it is.
    """

    module: nn.Module
    step: Callable[[Tensor], Tensor]
    batch: Callable[[int, int], Tensor]
    device: Device | None = None

    @classmethod
    def computing(cls, *, seq_len: int, **sizes: int) -> Workload:
        """The language model."""
        model = make_language_model(seq_len=seq_len, **sizes)
        return cls(
            module=model,
            step=lambda tokens: language_loss(model, tokens),
            batch=lambda number, samples: make_tokens(number, samples, seq_len),
        )

    @classmethod
    def emulated(cls, num_stages: int, *, seq_len: int, d_model: int, device: Device) -> Workload:
        """Emulated devices, between which as much passes as between stages of the language model."""
        model = EmulatedPipeline(num_stages, d_model, device)

        def batch(number: int, samples: int) -> Tensor:
            return torch.randn(samples, seq_len, d_model, generator=torch.Generator().manual_seed(number))

        return cls(module=model, step=model.loss, batch=batch, device=device)
