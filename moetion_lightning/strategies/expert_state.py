"""One ordinary checkpoint of a module whose experts are spread: gathered on saving, cut apart on loading."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from moetion_lightning.errors import ConfigurationError, UnsupportedStateError
from moetion_lightning.strategies.expert_layout import ExpertGroups
from moetion_lightning.strategies.expert_parallel import ExpertShards, ShardedLayer

__all__ = ["OptimizerOrder", "gather_module_state", "gather_optimizer_state", "local_module_state"]

#: Tensors and plain values by field, by the name of the parameter or state entry that they belong to.
Entries = dict[str, dict[str, Any]]


def _send(entries: Mapping[str, Mapping[str, Any]], group: dist.ProcessGroup, device: torch.device) -> None:
    """Send entries to the first rank of the group, as a JSON header and the bytes of the tensors."""
    tensors: list[Tensor] = []
    header: list[Any] = []
    for name, fields in entries.items():
        described: list[Any] = []
        for field, value in fields.items():
            if isinstance(value, Tensor):
                described.append([field, str(value.dtype).removeprefix("torch."), list(value.shape)])
                tensors.append(value)
            elif value is None or isinstance(value, (bool, int, float, str)):
                described.append([field, value])
            else:
                raise UnsupportedStateError(
                    f"optimizer state {field!r} of {name!r} is a {type(value).__name__}; experts of other ranks can be "
                    "put into a checkpoint only if their state is tensors, numbers and strings"
                )
        header.append([name, described])
    text = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
    dist.send(torch.tensor([text.numel()], device=device), group=group, group_dst=0)
    dist.send(text.to(device), group=group, group_dst=0)
    for tensor in tensors:
        if tensor.numel():
            dist.send(tensor.detach().contiguous().reshape(-1).view(torch.uint8).to(device), group=group, group_dst=0)


def _receive(position: int, group: dist.ProcessGroup, device: torch.device) -> Entries:
    """Receive what :func:`_send` sends, on the CPU."""

    def read(num_bytes: int) -> Tensor:
        buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        dist.recv(buffer, group=group, group_src=position)
        return buffer.cpu()

    size = torch.zeros(1, dtype=torch.int64, device=device)
    dist.recv(size, group=group, group_src=position)
    entries: Entries = {}
    for name, described in json.loads(bytes(read(int(size)).numpy())):
        fields = entries.setdefault(name, {})
        for field, *rest in described:
            if len(rest) == 1:
                fields[field] = rest[0]
                continue
            dtype, shape = getattr(torch, rest[0]), torch.Size(rest[1])
            num_bytes = shape.numel() * torch.empty(0, dtype=dtype).element_size()
            fields[field] = (read(num_bytes).view(dtype) if num_bytes else torch.empty(0, dtype=dtype)).reshape(shape)
    return entries


def _gather_layer(layer: ShardedLayer, own: Entries, groups: ExpertGroups, device: torch.device) -> Entries | None:
    """The entries of all experts of a layer on global rank 0, None elsewhere. Only the group of rank 0 takes part."""
    if 0 not in groups.layout.expert_ranks(groups.global_rank):
        return None
    if groups.position:
        _send(own, groups.expert, device)
        return None
    parts = [own, *(_receive(p, groups.expert, device) for p in range(1, groups.layout.expert_parallel))]
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


def _own_rows(value: Any, layer: ShardedLayer) -> Any:
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == layer.layer.num_experts:
        return value[layer.owned.start : layer.owned.stop].clone()
    return value


class OptimizerOrder:
    """The parameter groups that an optimizer has for the whole module, by name.

    Args:
        optimizer: Just made, with placeholders for the parameters of other ranks, which are taken out.
        shards: The experts of this rank.
    """

    def __init__(self, optimizer: Optimizer, shards: ExpertShards) -> None:
        known = shards.names_by_id()
        self.groups: list[list[str]] = []
        self.local: list[list[str]] = []
        self.user_names: list[list[str] | None] = []
        for number, group in enumerate(optimizer.param_groups):
            names = [known.get(id(p), f"parameter {i} of group {number}") for i, p in enumerate(group["params"])]
            keep = [not shards.is_placeholder(p) for p in group["params"]]
            self.groups.append(names)
            self.local.append([name for name, kept in zip(names, keep) if kept])
            self.user_names.append(group.get("param_names"))
            for key in ("params", "param_names"):
                if key in group:
                    group[key] = [value for value, kept in zip(group[key], keep) if kept]
        for parameter in [p for p in optimizer.state if shards.is_placeholder(p)]:
            del optimizer.state[parameter]

    def entries(self, state: Mapping[str, Any]) -> Entries:
        """A local optimizer state dict by parameter name.

        Raises:
            ConfigurationError: Parameter groups were added or changed since.
        """
        sizes = [len(group["params"]) for group in state["param_groups"]]
        if sizes != [len(names) for names in self.local]:
            raise ConfigurationError(
                f"the optimizer's parameter groups have {sizes} parameters, and had {[len(n) for n in self.local]} "
                "when training began; under expert parallelism a checkpoint needs unchanged groups. Give the optimizer "
                "all its groups in configure_optimizers"
            )
        names = [name for local in self.local for name in local]
        return {names[index]: dict(fields) for index, fields in state["state"].items()}

    def whole(self, state: Mapping[str, Any], entries: Entries) -> dict[str, Any]:
        """The optimizer state dict of the whole module.

        Args:
            state: Of this rank; its options are kept.
            entries: Of all parameters, by name.
        """
        result: dict[str, Any] = {**state, "state": {}, "param_groups": []}
        first = 0
        for group, names, user_names in zip(state["param_groups"], self.groups, self.user_names):
            indices = list(range(first, first + len(names)))
            first += len(names)
            options = {**group, "params": indices}
            if user_names is not None:
                options["param_names"] = user_names
            result["param_groups"].append(options)
            result["state"].update({i: entries[name] for i, name in zip(indices, names) if name in entries})
        return result

    def cut(self, state: Mapping[str, Any], shards: ExpertShards) -> dict[str, Any]:
        """This rank's part of an optimizer state dict.

        Args:
            state: Of the whole module, or already of this rank.
            shards: The experts of this rank.

        Raises:
            ConfigurationError: The groups are others than this optimizer's.
        """
        sizes = [len(group["params"]) for group in state["param_groups"]]
        if sizes != [len(names) for names in self.groups]:
            if sizes == [len(names) for names in self.local]:
                return dict(state)
            raise ConfigurationError(
                f"the checkpoint's optimizer has groups of {sizes} parameters, this run's has "
                f"{[len(names) for names in self.groups]}: it is of another module or another configure_optimizers"
            )
        layers = {name: layer for layer in shards.layers if layer.kind == "fused" for name in layer.parameters}
        result: dict[str, Any] = {**state, "state": {}, "param_groups": []}
        index = 0
        for group, names, local in zip(state["param_groups"], self.groups, self.local):
            by_name = dict(zip(names, group["params"]))
            options = {**group, "params": list(range(index, index + len(local)))}
            if "param_names" in group:
                given = dict(zip(names, group["param_names"]))
                options["param_names"] = [given[name] for name in local]
            result["param_groups"].append(options)
            for name in local:
                fields = state["state"].get(by_name[name])
                if fields is not None:
                    layer = layers.get(name)
                    result["state"][index] = (
                        fields if layer is None else {k: _own_rows(v, layer) for k, v in fields.items()}
                    )
                index += 1
        return result


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
