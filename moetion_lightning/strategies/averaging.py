"""Gradients averaged over ranks that hold the same parameters, and clipped by the norm over all ranks.

Sums are made in an order that does not depend on when values came.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad

__all__ = ["average_gradients", "clipping_by"]

_BUCKET_BYTES = 64 * 2**20


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup, replicas: int) -> None:
    """Give each parameter the mean of its gradients; one that no replica has used keeps none.

    The layout of what is sent follows from the parameters alone: sums over three ranks or more depend on it.

    Args:
        parameters: The same on all replicas, in the same order.
        group: The replicas.
        replicas: Their number.

    Ranks:
        All ranks of the group, together.
    """
    for bucket in _buckets(parameters):
        like = bucket[0]
        used = torch.tensor([p.grad is not None for p in bucket], dtype=like.dtype, device=like.device)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([*(grad.reshape(-1) for grad in grads), used])
        dist.all_reduce(flat, group=group)
        numbers = flat[-len(bucket) :].tolist()
        start = 0
        for parameter, grad, number in zip(bucket, grads, numbers):
            if number:
                grad.copy_((flat[start : start + grad.numel()] / replicas).view_as(grad))
                parameter.grad = grad
            start += grad.numel()


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype in pieces of a bounded size; the same on all replicas."""
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for kind in kinds.values():
        bucket: list[nn.Parameter] = []
        for parameter in kind:
            bucket.append(parameter)
            if sum(p.numel() * p.element_size() for p in bucket) >= _BUCKET_BYTES:
                yield bucket
                bucket = []
        if bucket:
            yield bucket


@contextlib.contextmanager
def clipping_by(norm: Callable[[list[Tensor], float, bool | None], Tensor]) -> Iterator[None]:
    """While this is open, ``torch.nn.utils.clip_grad_norm_`` clips by another norm of the gradients.

    Whoever else listens for the norm at that place (the recorder of a checkpoint engine) is told this one.

    Args:
        norm: Gives it, of the gradients, the order of the norm, and torch's ``foreach``.
    """
    outer = clip_grad._get_total_norm

    def total_norm(
        tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
    ) -> Tensor:
        gradients = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        return outer([norm(gradients, float(norm_type), foreach)], norm_type, error_if_nonfinite, foreach)

    clip_grad._get_total_norm = total_norm
    try:
        yield
    finally:
        clip_grad._get_total_norm = outer
