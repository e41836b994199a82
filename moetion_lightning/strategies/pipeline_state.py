"""One ordinary checkpoint of a module whose stages are spread over ranks: gathered on saving, cut apart on loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.pipeline.layout import PipelineGroups
from moetion_lightning.strategies.optimizer_order import (
    Entries,
    OptimizerOrder,
    SpreadState,
    receive_entries,
    send_entries,
)

__all__ = ["PipelineState"]


class PipelineState(SpreadState):
    """What of a module's state is whose.

    Args:
        module: The module.
        places: By name of a parameter, or of a buffer that the step changes, the places in the pipeline that hold it as
            it is in training; the first one speaks for it.
        groups: Who is where.
        device: A device that the backend can send from.
    """

    def __init__(
        self,
        module: nn.Module,
        places: Mapping[str, Sequence[int]],
        groups: PipelineGroups,
        device: torch.device,
    ) -> None:
        super().__init__(groups.global_rank)
        self._module = module
        self._places = places
        self._groups = groups
        self._device = device
        first = {id(p): name for name, p in module.named_parameters()}
        # A tied parameter is in the state dict under all of its names.
        self._first_name = {name: first[id(p)] for name, p in module.named_parameters(remove_duplicate=False)}
        self._of_module: dict[str, int] = {}
        for name, holders in places.items():
            if name not in self._first_name:  # a buffer
                continue
            parts = name.split(".")
            for depth in range(len(parts)):  # every module on the way to it: the first parameter decides
                self._of_module.setdefault(".".join(parts[:depth]), holders[0])

    def local(self, name: str) -> bool:
        """Whether this rank holds an entry of the state dict as it is in training."""
        return self._groups.pp_rank in self._holders(name)

    def _holders(self, name: str) -> Sequence[int]:
        name = self._first_name.get(name, name)
        if name in self._places:
            return self._places[name]
        # A buffer that no step has changed so far belongs where the parameters around it are used.
        owner = name.rpartition(".")[0]
        while owner and owner not in self._of_module:
            owner = owner.rpartition(".")[0]
        return (self._of_module.get(owner, 0),) if owner else (0,)

    def gather(self, state: dict[str, Any]) -> dict[str, Any]:
        """See :class:`SpreadState`: all ranks of the pipeline of rank 0."""
        found = self.gathered({name: {"": value} for name, value in state.items() if isinstance(value, Tensor)})
        for name, fields in found.items():
            state[name] = fields[""]
        return state

    def _speaks_for(self, name: str) -> bool:
        return self._holders(name)[0] == self._groups.pp_rank

    def gathered(self, entries: Entries) -> Entries:
        """What the other places speak for, on rank 0, on the CPU; one entry at a time, so that no device holds all."""
        own = {name: fields for name, fields in entries.items() if self._speaks_for(name)}
        layout, rank = self._groups.layout, self._groups.global_rank
        if layout.dp_rank(rank):
            return {}
        if rank:
            send_entries({"": {"count": len(own)}}, 0, self._device)
            for name, fields in own.items():
                send_entries({name: fields}, 0, self._device)
            return {}
        found: Entries = {}
        for peer in layout.pipeline_ranks(0)[1:]:
            for _ in range(receive_entries(peer, self._device)[""]["count"]):
                found.update(receive_entries(peer, self._device))
        return found

    def load(self, state: Mapping[str, Any], *, strict: bool) -> None:
        """Load this rank's part of a state dict of the whole module.

        Raises:
            ConfigurationError: Names do not match, and ``strict``.
        """
        known = self._module.state_dict()
        missing, unexpected = sorted(known.keys() - state.keys()), sorted(state.keys() - known.keys())
        if strict and (missing or unexpected):
            raise ConfigurationError(
                f"the checkpoint does not fit {type(self._module).__name__}: missing {missing[:5]}, unexpected "
                f"{unexpected[:5]}. Load it into the module that it was saved from, or set strict_loading = False"
            )
        # Buffers are whole on every rank, and any stage may read one that none changes.
        wanted = {n: v for n, v in state.items() if n in known and (n not in self._first_name or self.local(n))}
        self._module.load_state_dict(wanted, strict=False)

    def order_of(self, optimizer: Optimizer) -> OptimizerOrder:
        """Take the parameters of other ranks out of an optimizer, and remember their order."""
        names = {id(p): n for n, p in self._module.named_parameters()}
        order = OptimizerOrder(optimizer, names, lambda p: id(p) in names and not self.local(names[id(p)]))
        self.orders[id(optimizer)] = order
        return order
