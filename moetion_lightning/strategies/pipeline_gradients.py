"""Gradients of a pipeline's ranks: tied parameters, replicas, and the norm over all stages."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetion_lightning.pipeline.layout import PipelineGroups
from moetion_lightning.strategies.averaging import average_gradients, clipping_by

__all__ = ["PipelineGradients", "TiedExchange"]

#: Given a tied parameter's name and this rank's share of its gradient: the shares of all places, in their order.
TiedExchange = Callable[[str, Tensor], "list[Tensor]"]


class PipelineGradients:
    """Makes of what the backward passes left the gradients of the mean loss of all replicas.

    Args:
        parameters: This rank's parameters, by name.
        tied: Places in the pipeline that hold a copy of a parameter, for those that several hold.
        groups: Who is where.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        tied: Mapping[str, tuple[int, ...]],
        groups: PipelineGroups,
    ) -> None:
        self._parameters = dict(parameters)
        self._position: dict[str, int] = {}
        self._tied = {name: places for name, places in sorted(tied.items()) if name in parameters}
        self._groups = groups
        #: Norms that were asked for in the iteration (clipping), in order.
        self.norms: list[Tensor] = []
        #: Norms to answer with, in a replay.
        self.given: list[float] | None = None
        #: Replaced in a replay, where other places of a tied parameter are not there.
        self.exchange: TiedExchange = self._exchange

    def set_order(self, names: Sequence[str]) -> None:
        """Say in which order one process would clip all parameters of the module: by it the norm has the same bits."""
        self._position = {name: index for index, name in enumerate(names)}

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum the shares of tied parameters, then average over the replicas.

        Ranks:
            All ranks of the job, together (in a replay: those that replay).
        """
        for name in self._tied:
            parameter = self._parameters[name]
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            shares = self.exchange(name, own)
            total = shares[0].clone()
            for share in shares[1:]:  # the same order on all places: the copies stay equal to the bit
                total += share
            if parameter.requires_grad:  # frozen ones exchange too: places may not agree on it while they replay
                parameter.grad = total
        replicas = self._groups.layout.data_parallel_size
        if replicas > 1:
            for name in self._tied:  # alone: the other places have other neighbours for it
                average_gradients([self._parameters[name]], self._groups.replica, replicas)
            rest = [p for name, p in self._parameters.items() if name not in self._tied and p.requires_grad]
            average_gradients(rest, self._groups.replica, replicas)

    def _exchange(self, name: str, own: Tensor) -> list[Tensor]:
        layout, me = self._groups.layout, self._groups.pp_rank
        dp_rank = layout.dp_rank(self._groups.global_rank)
        own = own.contiguous()
        shares = {me: own}
        operations = []
        for place in self._tied[name]:
            if place != me:
                shares[place] = torch.empty_like(own)
                peer = layout.global_rank(place, dp_rank)
                operations.append(dist.P2POp(dist.isend, own, peer, self._groups.pipeline))
                operations.append(dist.P2POp(dist.irecv, shares[place], peer, self._groups.pipeline))
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        return [shares[place] for place in self._tied[name]]

    # --- norms -----------------------------------------------------------------------------------------------------

    def global_norm(self) -> contextlib.AbstractContextManager[None]:
        """While this is open, ``torch.nn.utils.clip_grad_norm_`` sees the norm over the parameters of all stages.

        Ranks:
            All ranks of the pipeline must make the same calls.
        """
        self.norms = []
        return clipping_by(self._next_norm)

    def _next_norm(self, gradients: list[Tensor], norm_type: float, foreach: bool | None) -> Tensor:
        if self.given is not None and len(self.norms) < len(self.given):
            like = gradients[0] if gradients else torch.empty(0)
            norm = torch.tensor(self.given[len(self.norms)], dtype=torch.float64).to(like)
        else:
            norm = self._norm(gradients, norm_type)
        self.norms.append(norm)
        return norm

    def _norm(self, gradients: Sequence[Tensor], norm_type: float) -> Tensor:
        """The norm of the parameters' norms, in the order of one process: the same bits."""
        names = {id(p.grad): name for name, p in self._parameters.items() if p.grad is not None}
        device = next(iter(self._parameters.values())).device if self._parameters else torch.device("cpu")
        table = torch.zeros(2, len(self._position), dtype=torch.float64, device=device)  # holds each norm as it is
        for gradient in gradients:
            name = names[id(gradient)]
            if self._tied.get(name, (self._groups.pp_rank,))[0] == self._groups.pp_rank:
                table[0, self._position[name]] = torch.linalg.vector_norm(gradient, norm_type)
                table[1, self._position[name]] = 1
        dist.all_reduce(table, group=self._groups.pipeline)
        norms = table[0][table[1] > 0].to(gradients[0].dtype if gradients else torch.float32)
        total: Tensor = torch.linalg.vector_norm(norms, norm_type)
        return total

    def stage_norm(self) -> float:
        """Norm of this rank's own gradients, for a replay to be checked against."""
        found = [torch.linalg.vector_norm(p.grad) for p in self._parameters.values() if p.grad is not None]
        return float(torch.linalg.vector_norm(torch.stack(found))) if found else 0.0
