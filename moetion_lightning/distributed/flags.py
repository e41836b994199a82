"""One small number that all ranks learn together."""

from __future__ import annotations

import torch
import torch.distributed as dist

__all__ = ["largest"]


def largest(value: int, device: torch.device) -> int:
    """The largest of the numbers that the ranks give; ``value``, where there are no process groups.

    Ranks:
        All ranks of the default process group, together.

    Args:
        value: This rank's number.
        device: A device that the backend can send from.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    number = torch.tensor(value, device=device)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number)
