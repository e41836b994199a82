"""Gradients of experts that no rank shares with all others: their mean over the replicas, and the global norm."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from moetion_lightning.strategies.averaging import average_gradients, clipping_by
from moetion_lightning.strategies.expert_layout import ExpertGroups

__all__ = ["ExpertGradients"]


def _scaler(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * factor


class ExpertGradients:
    """Makes the gradient of each expert that of the mean loss of all ranks, as it is for all other parameters.

    A rank's backward pass leaves in an expert the sum over its expert-parallel group, whose tokens it has seen. A hook
    divides it by the group's size, and :meth:`average` takes the mean over the replicas. Averaging twice changes
    nothing, so that gradients may be kept and added to, as with data parallelism.

    Args:
        parameters: This rank's expert parameters, by name.
        groups: The groups of this rank.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], groups: ExpertGroups) -> None:
        self._parameters = list(parameters.values())
        self._groups = groups
        self._handles: list[Any] = []
        self._active = False
        factor = 1.0 / groups.layout.expert_parallel_size
        for parameter in self._parameters if factor != 1.0 else ():
            # A hook needs `requires_grad` to be registered only; a parameter may be unfrozen later.
            wanted = parameter.requires_grad
            parameter.requires_grad_(True)
            self._handles.append(parameter.register_hook(_scaler(factor)))
            parameter.requires_grad_(wanted)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def average(self) -> None:
        """Average the gradients over the replicas; an expert that no replica has used keeps none.

        Ranks:
            All ranks of the job, together.
        """
        replicas = len(self._groups.layout.replica_ranks(self._groups.global_rank))
        if replicas > 1:
            average_gradients(self._parameters, self._groups.replica, replicas)

    @contextlib.contextmanager
    def global_norm(self) -> Iterator[None]:
        """While this is open, ``torch.nn.utils.clip_grad_norm_`` sees the norm over the experts of all ranks.

        Ranks:
            All ranks of the job must make the same calls.
        """
        if self._active or self._groups.layout.expert_parallel_size == 1 or not self._parameters:
            yield
            return
        self._active = True
        try:
            with clipping_by(self._norm):
                yield
        finally:
            self._active = False

    def _norm(self, gradients: Sequence[Tensor], norm_type: float, foreach: bool | None) -> Tensor:
        experts = {id(parameter.grad) for parameter in self._parameters}
        own = [g for g in gradients if id(g) in experts]
        shared = [g for g in gradients if id(g) not in experts]
        device = self._parameters[0].device
        part = get_total_norm(own, norm_type, foreach=foreach).to(device, torch.float64)
        # Gathered and not reduced: every rank adds in one order, so that all clip by the same bits.
        parts = [torch.empty_like(part) for _ in range(self._groups.layout.expert_parallel_size)]
        dist.all_gather(parts, part, group=self._groups.expert)
        rest = get_total_norm(shared, norm_type, foreach=foreach).to(device, torch.float64)
        norm: Tensor = torch.linalg.vector_norm(torch.stack([rest, *parts]), norm_type)
        return norm.to(gradients[0].dtype if gradients else torch.float32)
