"""The part of a tensor that this process holds: all of it, or its shard of a distributed tensor."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["local", "local_rows", "to_local_rows"]


def local(tensor: Tensor) -> Tensor:
    """The tensor's bytes in this process, detached.

    Args:
        tensor: A plain tensor, or a ``DTensor`` (known by its ``to_local``).

    Returns:
        A view that shares memory: of a DTensor its local shard, which may have no elements.
    """
    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):
        with torch.no_grad():
            shard: Tensor = tensor.to_local()
        return shard.detach()
    return tensor


def local_rows(tensor: Tensor) -> int:
    """Rows along dimension 0 in this process; 1 for 0-d tensors."""
    shard = local(tensor)
    return shard.shape[0] if shard.dim() else 1


def to_local_rows(start: int, stop: int, offset: int, count: int) -> tuple[int, int] | None:
    """Global rows ``[start, stop)`` as rows of a shard that begins at ``offset`` and has ``count``; None if none."""
    first, last = max(start - offset, 0), min(stop - offset, count)
    return (first, last) if first < last else None
