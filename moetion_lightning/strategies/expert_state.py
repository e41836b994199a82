"""One ordinary checkpoint of a module whose experts are spread: gathered on saving, cut apart on loading."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetion_lightning.errors import UnsupportedStateError
from moetion_lightning.strategies.expert_layout import ExpertGroups
from moetion_lightning.strategies.expert_parallel import ExpertShards, ShardedLayer
from moetion_lightning.strategies.optimizer_order import Entries, SpreadState, receive_entries, send_entries

__all__ = ["ExpertState"]


class ExpertState(SpreadState):
    """The experts of a module, one layer at a time.

    Args:
        shards: The experts of this rank.
        groups: The groups of this rank; that of rank 0 gathers.
        device: A device that the backend can send from.
    """

    def __init__(self, shards: ExpertShards, groups: ExpertGroups, device: torch.device) -> None:
        super().__init__(groups.global_rank)
        self._shards = shards
        self._groups = groups
        self._device = device
        self._fused = {n: layer for layer in shards.layers if layer.kind == "fused" for n in layer.parameters}

    def gather(self, state: dict[str, Any]) -> Any:
        """See :class:`SpreadState`: in the order of the whole module, with other ranks' experts on the CPU."""
        found = self.gathered({name: {"": value} for name, value in state.items()})
        if self._global_rank:
            return state
        whole = {**state, **{name: fields[""] for name, fields in found.items()}}
        names = dict.fromkeys([*self._shards.state_names, *whole])
        ordered = type(state)((name, whole[name]) for name in names if name in whole)
        if hasattr(state, "_metadata"):
            ordered._metadata = state._metadata  # type: ignore[attr-defined]
        return ordered

    def gathered(self, entries: Entries) -> Entries:
        """See :class:`SpreadState`."""
        found: Entries = {}
        for layer in self._shards.layers:
            own = {name: entries[name] for name in _state_names(layer, entries)}
            found.update(self._gathered_layer(layer, own))
        return found

    def _gathered_layer(self, layer: ShardedLayer, own: Entries) -> Entries:
        groups, device = self._groups, self._device
        if 0 not in groups.layout.expert_ranks(groups.global_rank):
            return {}
        if groups.position:
            send_entries(own, dist.get_global_rank(groups.expert, 0), device)
            return {}
        others = [dist.get_global_rank(groups.expert, p) for p in range(1, groups.layout.expert_parallel_size)]
        parts = [own, *(receive_entries(rank, device) for rank in others)]
        if layer.kind == "list":
            return {name: fields for part in parts for name, fields in part.items()}
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: _joined(name, [part.get(name, {}) for part in parts], layer) for name in names}

    def load(self, state: Mapping[str, Any], *, strict: bool) -> None:
        """See :class:`SpreadState`; entries that are of this rank alone already are taken as they are."""
        own = {name: self.part(name, value) for name, value in state.items()}
        for layer in self._shards.layers:
            others = [n for e, n in enumerate(layer.layer.expert_modules) if e not in layer.owned]
            prefixes = tuple(f"{other}." for other in others)
            own = {name: value for name, value in own.items() if not name.startswith(prefixes)} if prefixes else own
        self._shards.module.load_state_dict(own, strict=strict)

    def part(self, name: str, value: Any) -> Any:
        """Of a fused parameter, or of its optimizer state, the rows of this rank's experts."""
        layer = self._fused.get(name)
        if layer is None or not isinstance(value, Tensor) or not value.dim():
            return value
        if value.shape[0] != layer.layer.num_experts:
            return value
        return value[layer.owned.start : layer.owned.stop].clone()


def _joined(name: str, parts: Sequence[dict[str, Any]], layer: ShardedLayer) -> dict[str, Any]:
    """The rows of a fused parameter, or of its optimizer state, put together again."""
    result: dict[str, Any] = {}
    for field in dict.fromkeys(field for part in parts for field in part):
        values = [part.get(field) for part in parts]
        first = values[0]
        if not isinstance(first, Tensor) or first.dim() == 0:
            result[field] = first  # Adam's `step`: the same on all ranks
        elif all(isinstance(v, Tensor) and v.shape[:1] == (len(b),) for v, b in zip(values, layer.blocks)):
            result[field] = torch.cat([value.detach().cpu() for value in values if value is not None])
        else:
            raise UnsupportedStateError(
                f"optimizer state {field!r} of {name!r} does not consist of one row an expert on every rank, and "
                f"cannot be put together from {len(parts)} ranks. Use an elementwise optimizer (AdamW, SGD, Lion)"
            )
    return result


def _state_names(layer: ShardedLayer, names: Iterable[str]) -> list[str]:
    """The state entries that hold experts of a layer."""
    if layer.kind == "fused":
        return [name for name in layer.parameters if name in names]
    prefixes = tuple(f"{name}." for name in layer.layer.expert_modules)
    return [name for name in names if name.startswith(prefixes)]
