"""Training state from a living rank to a new one, over the training's own process group; no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["receive_state", "send_state"]


def send_state(tensors: Sequence[tuple[str, Tensor]], header: Mapping[str, Any], to: int, device: torch.device) -> None:
    """Send tensors by name, and plain values.

    Args:
        tensors: On any device; each is sent as its bytes.
        header: JSON.
        to: Global rank; it calls :func:`receive_state` at the same time.
        device: What the process group communicates from.
    """
    specs = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors]
    text = torch.frombuffer(bytearray(json.dumps([specs, header]).encode()), dtype=torch.uint8).to(device)
    dist.send(torch.tensor([text.numel()], dtype=torch.int64, device=device), to)
    dist.send(text, to)
    for _, tensor in tensors:
        if tensor.numel():
            dist.send(tensor.detach().to(device).contiguous().reshape(-1).view(torch.uint8), to)


def receive_state(source: int, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Receive what ``source`` sends. Returns the tensors by name, on ``device``, and the header."""
    size = torch.zeros(1, dtype=torch.int64, device=device)
    dist.recv(size, source)
    text = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.recv(text, source)
    specs, header = json.loads(bytes(text.cpu().numpy()).decode())
    tensors = {}
    for name, dtype, shape in specs:
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        if tensor.numel():
            dist.recv(tensor.view(-1).view(torch.uint8), source)
        tensors[name] = tensor
    return tensors, header
