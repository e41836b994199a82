"""One ordinary checkpoint of a module whose experts are spread: gathered on saving, cut apart on loading."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetion_lightning.errors import UnsupportedStateError
from moetion_lightning.strategies.expert_layout import ExpertGroups
from moetion_lightning.strategies.expert_parallel import ExpertShards, ShardedLayer
from moetion_lightning.strategies.optimizer_order import Entries, OptimizerOrder, receive_entries, send_entries

__all__ = ["gather_module_state", "gather_optimizer_state", "local_module_state", "own_rows"]


def _gather_layer(layer: ShardedLayer, own: Entries, groups: ExpertGroups, device: torch.device) -> Entries | None:
    """The entries of all experts of a layer on global rank 0, None elsewhere. Only the group of rank 0 takes part."""
    if 0 not in groups.layout.expert_ranks(groups.global_rank):
        return None
    if groups.position:
        send_entries(own, dist.get_global_rank(groups.expert, 0), device)
        return None
    parts = [
        own,
        *(
            receive_entries(dist.get_global_rank(groups.expert, p), device)
            for p in range(1, groups.layout.expert_parallel_size)
        ),
    ]
    if layer.kind == "list":
        return {name: fields for part in parts for name, fields in part.items()}
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _joined(name, [part.get(name, {}) for part in parts], layer) for name in names}


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


def gather_module_state(shards: ExpertShards, state: dict[str, Any], groups: ExpertGroups, device: torch.device) -> Any:
    """The state dict of the whole module, one layer at a time.

    Args:
        shards: The experts of this rank.
        state: The module's own ``state_dict()``.
        groups: The groups of this rank.
        device: A device that the backend can send from.

    Returns:
        On global rank 0 the whole state dict, in the order of the whole module, with other ranks' experts on the CPU;
        elsewhere ``state``.

    Ranks:
        All ranks of the expert-parallel group of rank 0, together; others return at once.
    """
    whole = dict(state)
    for layer in shards.layers:
        gathered = _gather_layer(layer, {n: {"": state[n]} for n in _state_names(layer, state)}, groups, device)
        whole.update({name: fields[""] for name, fields in (gathered or {}).items()})
    if groups.global_rank:
        return state
    ordered = type(state)((n, whole[n]) for n in dict.fromkeys([*shards.state_names, *whole]) if n in whole)
    if hasattr(state, "_metadata"):
        ordered._metadata = state._metadata  # type: ignore[attr-defined]
    return ordered


def _state_names(layer: ShardedLayer, names: Iterable[str]) -> list[str]:
    """The state entries that hold experts of a layer."""
    if layer.kind == "fused":
        return [name for name in layer.parameters if name in names]
    prefixes = tuple(f"{name}." for name in layer.layer.expert_modules)
    return [name for name in names if name.startswith(prefixes)]


def local_module_state(shards: ExpertShards, state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a state dict that belong on this rank.

    Args:
        shards: The experts of this rank.
        state: Of the whole module, or already of this rank.
    """
    result = dict(state)
    for layer in shards.layers:
        if layer.kind == "fused":
            for name in _state_names(layer, result):
                result[name] = _own_rows(result[name], layer)
        else:
            others = [n for e, n in enumerate(layer.layer.expert_modules) if e not in layer.owned]
            for name in [n for n in result if n.startswith(tuple(f"{other}." for other in others))] if others else ():
                del result[name]
    return result


def own_rows(shards: ExpertShards) -> Callable[[str, Any], Any]:
    """What takes this rank's rows out of a parameter's state, by the parameter's name."""
    layers = {name: layer for layer in shards.layers if layer.kind == "fused" for name in layer.parameters}
    return lambda name, value: _own_rows(value, layers[name]) if name in layers else value


def _own_rows(value: Any, layer: ShardedLayer) -> Any:
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == layer.layer.num_experts:
        return value[layer.owned.start : layer.owned.stop].clone()
    return value


def gather_optimizer_state(
    shards: ExpertShards, order: OptimizerOrder, state: dict[str, Any], groups: ExpertGroups, device: torch.device
) -> dict[str, Any]:
    """The optimizer state dict of the whole module, one layer at a time.

    Args:
        shards: The experts of this rank.
        order: The optimizer's groups.
        state: The optimizer's own ``state_dict()``.
        groups: The groups of this rank.
        device: A device that the backend can send from.

    Returns:
        On global rank 0 the whole state dict; elsewhere ``state``.

    Ranks:
        All ranks of the expert-parallel group of rank 0, together; others return at once.
    """
    entries = order.entries(state)
    for layer in shards.layers:
        own = {name: entries[name] for name in layer.parameters if name in entries}
        entries.update(_gather_layer(layer, own, groups, device) or {})
    return state if groups.global_rank else order.whole(state, entries)
