"""Which rows of which parameters belong to which expert, for each way of packing them."""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from moetion_lightning.core.operators import Piece, clean_name

__all__ = ["Experts", "ModuleIndex", "fused", "numbered", "pack_experts", "packed_rows", "router_rows", "submodules"]


class ModuleIndex:
    """Modules and parameters of a tree by name, with the shared ones under their first name.

    Args:
        root: The module; names are relative to it.
    """

    def __init__(self, root: nn.Module) -> None:
        self.modules = dict(root.named_modules())
        # Those of lazy modules have no shape yet: nothing is known of them.
        self.parameters = {name: p for name, p in root.named_parameters() if not is_lazy(p)}
        first = {id(parameter): name for name, parameter in self.parameters.items()}
        #: Canonical name of every parameter, by each of its names.
        self.canonical = {n: first[id(p)] for n, p in root.named_parameters(remove_duplicate=False) if id(p) in first}
        self._by_class: dict[type, list[str]] = {}
        for name, module in self.modules.items():
            self._by_class.setdefault(type(module), []).append(name)

    def of_classes(self, pattern: re.Pattern[str]) -> list[str]:
        """Modules of which a class in the MRO has a name (``module.Class``) that matches, in their order."""
        kinds = {
            kind
            for kind in self._by_class
            if any(pattern.fullmatch(f"{base.__module__}.{base.__qualname__}") for base in kind.__mro__)
        }
        return [name for name, module in self.modules.items() if type(module) in kinds] if kinds else []

    @functools.cached_property
    def _sizes(self) -> dict[str, int]:
        """Elements by module, in one go for all of them."""
        found: dict[str, int] = dict.fromkeys(self.modules, 0)
        names = collections.Counter(self.canonical.values())
        seen: set[tuple[str, str]] = set()  # of parameters that have several names
        for name, canonical in self.canonical.items():
            owner, count = name, self.parameters[canonical].numel()
            while owner:
                owner = owner.rpartition(".")[0]
                if names[canonical] > 1:
                    if (owner, canonical) in seen:
                        continue
                    seen.add((owner, canonical))
                if owner in found:
                    found[owner] += count
        return found

    @staticmethod
    def join(module: str, path: str) -> str:
        """Name of the descendant ``path``; an empty path is the module itself."""
        return f"{module}.{path}" if module and path else module or path

    def below(self, name: str) -> list[str]:
        """The module itself and its descendants."""
        return [n for n in self.modules if not name or n == name or n.startswith(f"{name}.")]

    @staticmethod
    def relative(root: str, name: str) -> str:
        """``name`` as seen from ``root``, free of wrapper components."""
        return clean_name(name[len(root) :].lstrip(".") if root else name)

    def parent(self, name: str) -> str:
        """The module that holds this one, not counting wrappers and plain containers of one name."""
        parent = name.rpartition(".")[0]
        # A wrapper is no parent: what matters is the user's block, in which the router sits.
        while parent and clean_name(parent) == clean_name(name):
            parent = parent.rpartition(".")[0]
        return parent

    def own_parameters(self, name: str) -> list[str]:
        """Canonical names of the parameters that the module holds directly."""
        own = (self.join(name, key) for key, _ in self.modules[name].named_parameters(recurse=False))
        return [self.canonical[n] for n in own if n in self.canonical]

    def parameters_of(self, name: str) -> list[str]:
        """Canonical names of the parameters of the module and its descendants."""
        names = (self.join(name, key) for key, _ in self.modules[name].named_parameters())
        return list(dict.fromkeys(self.canonical[n] for n in names if n in self.canonical))

    def size(self, name: str) -> int:
        """Elements of all parameters of the module."""
        return self._sizes[name]


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of one layer.

    Args:
        pieces: The pieces of each expert.
        modules: The module of each expert, if experts are modules.
    """

    pieces: tuple[tuple[Piece, ...], ...]
    modules: tuple[str, ...] = ()


def pack_experts(index: ModuleIndex, containers: Sequence[str], pack: str, *, num_experts: int) -> Experts | None:
    """Cut the parameters of the containers into experts.

    Args:
        index: The module tree.
        containers: Modules that own the expert parameters; expert ``i`` owns its share of each.
        pack: One of the choices of ``MoESpec.pack``.
        num_experts: E where the shapes do not tell it (packed rows), 0 if unknown.

    Returns:
        At least two experts, or None if the containers are not packed that way.
    """
    ways: dict[str, Callable[[], Experts | None]] = {
        "list": lambda: submodules(index, containers),
        "numbered": lambda: numbered(index, containers),
        "dim0": lambda: fused(index, _fused_names(index, containers)),
        "rows": lambda: packed_rows(index, containers, num_experts),
    }
    chosen = [ways[pack]] if pack != "auto" else list(ways.values())
    return next((experts for way in chosen if (experts := way()) is not None), None)


def submodules(index: ModuleIndex, containers: Sequence[str]) -> Experts | None:
    """Experts are the children of a ModuleList or ModuleDict: one class, the same parameter shapes."""
    (container,) = containers[:1]
    if not isinstance(index.modules[container], (nn.ModuleList, nn.ModuleDict)):
        return None
    children = [index.join(container, key) for key, _ in index.modules[container].named_children()]
    # NLLB-MoE keeps a dropout among its experts.
    children = [child for child in children if index.parameters_of(child)]
    alike = {(type(index.modules[c]), _signature(index.modules[c])) for c in children}
    if len(children) < 2 or len(alike) != 1:
        return None
    pieces = tuple(tuple(Piece(parameter=n) for n in index.parameters_of(child)) for child in children)
    return Experts(pieces=pieces, modules=tuple(children))


def _signature(module: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    parameters = module.named_parameters()
    return tuple((clean_name(name), () if is_lazy(p) else tuple(p.shape)) for name, p in parameters)


def fused(index: ModuleIndex, names: Sequence[str]) -> Experts | None:
    """Experts are the rows of these parameters.

    E is the smallest dim 0 (global shape, also of a DTensor): further rows are identity experts without parameters of
    their own elsewhere. ``module.num_experts`` is not asked, it is the local count under expert parallelism.
    """
    rows = [index.parameters[name].shape[0] for name in names if index.parameters[name].dim() >= 2]
    num_experts = min(rows, default=0)
    if num_experts < 2:
        return None
    pieces = tuple(
        tuple(Piece(parameter=name, start=e, stop=e + 1) for name in names if index.parameters[name].dim())
        for e in range(num_experts)
    )
    return Experts(pieces=pieces)


def _fused_names(index: ModuleIndex, containers: Sequence[str]) -> list[str]:
    """3-D parameters of the containers, and the biases ``[E, out]`` beside them."""
    names: list[str] = []
    for container in containers:
        for module in index.below(container):
            own = index.own_parameters(module)
            sizes = {index.parameters[n].shape[0] for n in own if index.parameters[n].dim() >= 3}
            if sizes and not isinstance(index.modules[module], nn.modules.conv._ConvNd):
                names += [n for n in own if index.parameters[n].dim() >= 2 and index.parameters[n].shape[0] in sizes]
    return list(dict.fromkeys(names))


def packed_rows(index: ModuleIndex, containers: Sequence[str], num_experts: int) -> Experts | None:
    """Experts are blocks of ``r`` rows of matrices ``[E*r, ...]``."""
    names = [n for c in containers for n in index.parameters_of(c) if index.parameters[n].dim() >= 2]
    if num_experts < 2 or not names or any(index.parameters[n].shape[0] % num_experts for n in names):
        return None
    pieces = []
    for expert in range(num_experts):
        step = {n: index.parameters[n].shape[0] // num_experts for n in names}
        pieces.append(tuple(Piece(parameter=n, start=expert * step[n], stop=(expert + 1) * step[n]) for n in names))
    return Experts(pieces=tuple(pieces))


def numbered(index: ModuleIndex, containers: Sequence[str]) -> Experts | None:
    """Experts are parameters ``weight0 .. weightN`` (and ``bias0 .. biasN``) of the same modules."""
    experts: dict[int, list[Piece]] = {}
    groups: dict[str, set[int]] = {}
    for container in containers:
        for name in index.parameters_of(container):
            match = re.fullmatch(r"(.*(?:^|\.)(?:weight|bias))(\d+)", name)
            if match:
                experts.setdefault(int(match[2]), []).append(Piece(parameter=name))
                groups.setdefault(match[1], set()).add(int(match[2]))
    expected = set(range(len(experts)))
    if len(experts) < 2 or any(group != expected for group in groups.values()):
        return None
    return Experts(pieces=tuple(tuple(experts[i]) for i in range(len(experts))))


def router_rows(index: ModuleIndex, router: str) -> int:
    """E as the router's matrix ``[E, hidden]`` tells it; 0 if it has none."""
    shapes = [index.parameters[n].shape for n in index.parameters_of(router) if index.parameters[n].dim() == 2]
    return int(shapes[-1][0]) if shapes else 0
