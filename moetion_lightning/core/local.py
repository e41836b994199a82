"""The part of a tensor that this process holds: all of it, or its shard of a distributed tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["is_wrapper", "local", "local_rows", "place", "to_local_rows"]


def local(tensor: Tensor) -> Tensor:
    """The tensor's bytes in this process, detached.

    Args:
        tensor: A plain tensor, or a ``DTensor`` (known by its ``to_local``).

    Returns:
        A view that shares memory: of a DTensor its local shard, which may have no elements. A subclass that is laid out
        as an ordinary tensor comes as one; one that keeps its values elsewhere (:func:`is_wrapper`) as it is.
    """
    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):
        with torch.no_grad():
            tensor = tensor.to_local()
        tensor = tensor.detach()
    if type(tensor) is not Tensor and not is_wrapper(tensor):
        return tensor.as_subclass(Tensor)
    return tensor


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor is of a subclass that keeps its values elsewhere: such a one has no memory of its own."""
    kind = type(tensor)
    if kind is Tensor or kind is nn.Parameter:
        return False
    return hasattr(kind, "__tensor_flatten__") or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


def local_rows(tensor: Tensor) -> int:
    """Rows along dimension 0 in this process; 1 for 0-d tensors."""
    shard = local(tensor)
    return shard.shape[0] if shard.dim() else 1


def to_local_rows(start: int, stop: int, offset: int, count: int) -> tuple[int, int] | None:
    """Global rows ``[start, stop)`` as rows of a shard that begins at ``offset`` and has ``count``; None if none."""
    first, last = max(start - offset, 0), min(stop - offset, count)
    return (first, last) if first < last else None


def place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor's values are: equal for two tensors that show the same ones."""
    if is_wrapper(tensor):
        wrapper: Any = tensor
        parts = wrapper.__tensor_flatten__()[0] if hasattr(wrapper, "__tensor_flatten__") else ()
        inner = [getattr(wrapper, part) for part in parts]
        return (type(tensor), *map(place, inner)) if inner else (id(tensor),)
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype)
