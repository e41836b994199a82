"""Turns an ordinary module into one that holds a part of its experts, and decides whether that is possible."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetion_lightning.core.discovery import discover_layers
from moetion_lightning.core.layouts import MoELayer, MoESpec
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.strategies.expert_dispatch import FusedDispatch, ListDispatch
from moetion_lightning.strategies.expert_layout import ExpertGroups, ExpertLayout

__all__ = ["ExpertShards", "ShardedLayer", "plan_layers"]

_logger = logging.getLogger(__name__)
_OTHERWISE = (
    "Train without expert parallelism (expert_parallel_size=1), or shard the parameters with Lightning's "
    "ModelParallelStrategy (FSDP2)"
)


@dataclass(frozen=True, kw_only=True)
class ShardedLayer:
    """One MoE layer whose experts are spread over an expert-parallel group.

    Args:
        layer: The whole layer, as discovered; experts are counted over the group.
        kind: ``list``: experts are modules, a rank keeps some of them; ``fused``: experts are the rows of parameters,
            a rank keeps some of the rows.
        blocks: The experts at each place of the group.
        owned: The experts of this rank.
        parameters: Names of this layer's parameters that hold experts of this rank; for ``list`` they are whole
            parameters of one expert, for ``fused`` row ``i`` is expert ``owned[i]``.
    """

    layer: MoELayer
    kind: Literal["list", "fused"]
    blocks: tuple[range, ...]
    owned: range
    parameters: tuple[str, ...]


def plan_layers(
    module: nn.Module, layout: ExpertLayout, global_rank: int, specs: Sequence[MoESpec] = ()
) -> tuple[ShardedLayer, ...]:
    """Decide how each MoE layer is spread. Nothing is changed.

    Args:
        module: The whole module.
        layout: Who is where.
        global_rank: This rank.
        specs: The user's descriptions of layers.

    Returns:
        The layers. With ``expert_parallel_size=1`` those whose experts are modules, which may have no gradient in an
        iteration; all other parameters are left to data parallelism.

    Raises:
        ConfigurationError: There is no MoE layer, or one that cannot be spread.
    """
    found = discover_layers(module, specs)
    kinds: list[tuple[MoELayer, Literal["list", "fused"]]] = []
    for layer in found:
        kind = _kind_of(module, layer)
        if kind == "list":
            kinds.append((layer, "list"))
        elif layout.expert_parallel_size == 1:
            continue  # whole on every rank: left to DDP
        elif kind == "fused":
            kinds.append((layer, "fused"))
        elif layer.candidate:
            _logger.warning("%s stays whole on every rank: %s", layer.name, kind)
        else:
            raise ConfigurationError(f"expert parallelism: MoE layer {layer.name!r}: {kind}. {_OTHERWISE}")
    if not kinds and layout.expert_parallel_size > 1:
        seen = ", ".join(f"{layer.name} ({layer.source})" for layer in found) or "nothing"
        containers = [f"{n} ({type(m).__name__})" for n, m in module.named_modules() if isinstance(m, nn.ModuleList)]
        raise ConfigurationError(
            f"MoEtionStrategy(expert_parallel_size={layout.expert_parallel_size}): no MoE layer that can be spread in "
            f"{type(module).__name__}; discovery saw {seen}. Its ModuleLists are {containers[:8]}. Describe the layers "
            f"with MoEtionStrategy(specs=[MoESpec(block=..., experts=..., router=...)]), or use expert_parallel_size=1"
        )
    if layout.expert_parallel_size > 1:
        _check_structure(module, kinds)
    position = layout.position(global_rank)
    plan = []
    for layer, kind in kinds:
        if layer.num_experts < layout.expert_parallel_size:
            raise ConfigurationError(
                f"MoEtionStrategy(expert_parallel_size={layout.expert_parallel_size}): MoE layer {layer.name!r} has "
                f"only {layer.num_experts} experts; every rank of a group needs at least one"
            )
        blocks = tuple(layout.experts_at(p, layer.num_experts) for p in range(layout.expert_parallel_size))
        owned = blocks[position]
        pieces = [piece.parameter for e in (owned if kind == "list" else [0]) for piece in layer.experts[e]]
        plan.append(
            ShardedLayer(layer=layer, kind=kind, blocks=blocks, owned=owned, parameters=tuple(dict.fromkeys(pieces)))
        )
    return tuple(plan)


def _kind_of(module: nn.Module, layer: MoELayer) -> str:
    """``list``, ``fused``, or the reason why it is neither."""
    if layer.expert_modules:
        return "list"
    parameters = dict(module.named_parameters())
    for expert, pieces in enumerate(layer.experts):
        for piece in pieces:
            rows = parameters[piece.parameter].shape[0]
            if (piece.start, piece.stop) != (expert, expert + 1) or rows != layer.num_experts:
                return f"its experts are not the rows of parameters [{layer.num_experts}, ...] ({piece.parameter})"
    experts = module.get_submodule(layer.experts_module)
    names = list(inspect.signature(type(experts).forward).parameters)[1:]
    index = layer.tap.key if layer.tap is not None else None
    fits = len(names) == 3 and index in (1, names[1]) and "weight" in names[2]
    if layer.tap is None or (layer.tap.site, layer.tap.io, layer.tap.form) != ("experts", "in", "index") or not fits:
        return (
            f"its experts share fused parameters, and {type(experts).__name__}.forward({', '.join(names)}) is not "
            "forward(hidden_states, expert ids, expert weights), the one form in which tokens can be exchanged"
        )
    return "fused"


def _check_structure(module: nn.Module, kinds: Sequence[tuple[MoELayer, str]]) -> None:
    owner: dict[int, str] = {}
    owned = {piece.parameter for layer, _ in kinds for pieces in layer.experts for piece in pieces}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first = owner.setdefault(id(parameter), name)
        if first != name and (first in owned or name in owned):
            raise ConfigurationError(
                f"expert parallelism: {first!r} and {name!r} are one parameter, and at least one of them belongs to an "
                f"expert; an expert's parameters must be its own. {_OTHERWISE}"
            )
    compiled = [n for n, m in module.named_modules() if m._compiled_call_impl is not None or "_orig_mod" in m._modules]
    if compiled:
        raise ConfigurationError(
            f"expert parallelism: {compiled[0] or type(module).__name__!r} is compiled; token exchange replaces the "
            f"forward of MoE layers, which a compiled module would not see. Do not compile it. {_OTHERWISE}"
        )
    for layer, kind in kinds:
        _check_alone(module, layer, [other for other, _ in kinds if other is not layer], kind)


def _check_alone(module: nn.Module, layer: MoELayer, others: Sequence[MoELayer], kind: str) -> None:
    """Refuse layers inside of experts, and blocks that run more than one layer."""
    where = f"expert parallelism: MoE layer {layer.name!r}"
    if kind == "list":
        if not layer.block_module:
            raise ConfigurationError(
                f"{where}: the router and the experts are children of {type(module).__name__} itself; put them in a "
                "module of their own, whose forward routes and mixes"
            )
        inside = [o.name for o in others if f"{o.block_module}.".startswith(f"{layer.block_module}.")]
        if inside:
            raise ConfigurationError(
                f"{where}: its block {layer.block_module!r} also runs the MoE layer {inside[0]!r}; each needs a module "
                f"of its own, and layers must not be nested. {_OTHERWISE}"
            )
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for n in layer.expert_modules
               for m in module.get_submodule(n).modules()):  # fmt: skip
            raise ConfigurationError(
                f"{where}: batch normalization in experts depends on which tokens a rank sees. {_OTHERWISE}"
            )
    for ancestor in _ancestors(layer.block_module):
        parent, _, _ = ancestor.rpartition(".")
        siblings = dict(module.get_submodule(parent).named_children())
        container = module.get_submodule(ancestor)
        routers = [siblings.get(name) for name in ("gate", "router", "gating")]
        if isinstance(container, nn.ModuleList) and any(
            r is not None and any(len(container) in p.shape for p in r.parameters()) for r in routers
        ):
            raise ConfigurationError(
                f"{where} lies inside {ancestor!r}, whose {len(container)} modules are themselves routed to; nested "
                f"MoE layers are not supported. {_OTHERWISE}"
            )


def _ancestors(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


class ExpertShards:
    """The experts of one module as this rank holds them.

    Args:
        module: The whole module; :meth:`take` changes it.
        layers: From :func:`plan_layers`.
        groups: The groups of this rank.
    """

    def __init__(self, module: nn.Module, layers: Sequence[ShardedLayer], groups: ExpertGroups) -> None:
        self.module = module
        self.layers = tuple(layers)
        self._groups = groups
        #: Names of all state entries of the whole module, in order.
        self.state_names = list(module.state_dict())
        # Where parameters of other ranks' experts were, and what stands for them while optimizers are made.
        self._places: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._placeholder_names: dict[int, str] = {}
        self.taken = False

    def broadcast(self, device: torch.device) -> None:
        """Give all ranks the experts of rank 0, as data parallelism does with all other parameters.

        Args:
            device: A device that the backend can send from.

        Ranks:
            All ranks of the job, together, while the module is whole.
        """
        for layer in self.layers:
            for tensor in self._whole_tensors(layer):
                moved = tensor.detach().to(device)
                dist.broadcast(moved, src=0)
                tensor.detach().copy_(moved)

    def take(self) -> None:
        """Keep this rank's experts only, and let the layers exchange tokens. Harmless if done already."""
        if self.taken or self._groups.layout.expert_parallel_size == 1:
            return
        self.taken = True
        for layer in self.layers:
            if layer.kind == "fused":
                self._take_rows(layer)
            else:
                self._take_modules(layer)

    def _take_rows(self, layer: ShardedLayer) -> None:
        parameters = [self.module.get_parameter(name) for name in layer.parameters]
        for parameter in parameters:
            # The object stays, so that optimizers and hooks that know it stay right.
            parameter.data = parameter.data[layer.owned.start : layer.owned.stop].clone()
        experts = self.module.get_submodule(layer.layer.experts_module)
        FusedDispatch(layer.layer.name, experts, layer.blocks, parameters, self._groups)

    def _take_modules(self, layer: ShardedLayer) -> None:
        experts = [self.module.get_submodule(name) for name in layer.layer.expert_modules]
        for index, (name, expert) in enumerate(zip(layer.layer.expert_modules, experts)):
            if index in layer.owned:
                continue
            for path, module in expert.named_modules():
                for key, parameter in list(module._parameters.items()):
                    if parameter is not None:
                        # One element in memory, and the dtype and device that optimizers check.
                        shown = nn.Parameter(parameter.data.new_zeros(()).expand_as(parameter), parameter.requires_grad)
                        self._places.append((module, key, shown))
                        self._placeholder_names[id(shown)] = ".".join(filter(None, (name, path, key)))
                        module._parameters[key] = None
                for key, buffer in list(module._buffers.items()):
                    module._buffers[key] = None if buffer is None else buffer.new_empty(0)
                    module._non_persistent_buffers_set.add(key)
        block = self.module.get_submodule(layer.layer.block_module)
        ListDispatch(layer.layer.name, block, experts, layer.blocks, self._groups)

    def show_placeholders(self, show: bool) -> None:
        """Let the module have parameters without data where other ranks' experts were, or take them away again.

        ``configure_optimizers`` sees them, so that every rank makes the parameter groups of the whole module.
        """
        for module, key, placeholder in self._places:
            module._parameters[key] = placeholder if show else None

    def is_placeholder(self, parameter: Tensor) -> bool:
        """Whether the parameter stands for one of another rank."""
        return id(parameter) in self._placeholder_names

    def names_by_id(self) -> dict[int, str]:
        """Name of every parameter, and of every placeholder, by ``id``."""
        return {**{id(p): n for n, p in self.module.named_parameters()}, **self._placeholder_names}

    def expert_parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters that hold experts, by name."""
        return {name: self.module.get_parameter(name) for layer in self.layers for name in layer.parameters}

    def expert_buffers(self) -> list[str]:
        """Names of the buffers of experts that are modules."""
        prefixes = tuple(f"{e}." for layer in self.layers if layer.kind == "list" for e in layer.layer.expert_modules)
        return [name for name, _ in self.module.named_buffers() if name.startswith(prefixes)] if prefixes else []

    def _whole_tensors(self, layer: ShardedLayer) -> Iterator[Tensor]:
        if layer.kind == "fused":
            yield from (self.module.get_parameter(name) for name in layer.parameters)
            return
        for name in layer.layer.expert_modules:
            expert = self.module.get_submodule(name)
            yield from expert.parameters()
            yield from expert.buffers()
