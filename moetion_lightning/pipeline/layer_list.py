"""Which submodules of a module are the layers that its pipeline is cut between."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from moetion_lightning.errors import ConfigurationError

__all__ = ["LayerList", "find_layers"]

_MINOR_SHARE = 0.2  # of the largest stack's parameters: below it a stack is a head, an adapter or a list of metrics
_DOMINANT_SHARE = 0.5  # of a plain Sequential's parameters: above it a stack inside is what to cut


@dataclass(frozen=True)
class LayerList:
    """The layers that a pipeline may be cut between, in the order in which a step calls them.

    Args:
        names: Qualified name of each layer in the module.
        modules: The layers.
        root: The whole module.
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    root: nn.Module

    def __len__(self) -> int:
        return len(self.names)


def find_layers(module: nn.Module, layers: str | Sequence[str] | None = None) -> LayerList:
    """Find the layers of a module.

    Args:
        module: The whole module, unchanged.
        layers: Name of the list of layers (``"model.layers"``), or several names in the order in which the step calls
            them, each a list or a single layer. None: what the module's ``configure_pipeline()`` returns if it has
            that method (a sequence of its submodules that the step calls once each, one after the other), else the
            largest lists of alike layers, for example an encoder's and a decoder's.

    Raises:
        ConfigurationError: A name does not exist or names no list, a layer is given twice or lies inside another one,
            or there is nothing to cut.
    """
    if layers is not None:
        found = _named(
            module, [layers] if isinstance(layers, str) else list(layers), single=not isinstance(layers, str)
        )
    elif callable(getattr(module, "configure_pipeline", None)):
        found = _declared(module)
    else:
        found = _automatic(module)
    _check(module, found)
    return LayerList(tuple(name for name, _ in found), tuple(layer for _, layer in found), module)


def _named(module: nn.Module, names: Sequence[str], single: bool) -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    for name in names:
        try:
            owner = module.get_submodule(name)
        except AttributeError as error:
            raise ConfigurationError(
                f"layers={name!r}: {type(module).__name__} has no submodule of that name ({error}). Lists of layers in "
                f"it: {_known(module)}"
            ) from error
        if isinstance(owner, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            prefix = f"{name}." if name else ""
            found += [(prefix + key, child) for key, child in owner.named_children()]
        elif single:
            found.append((name, owner))
        else:
            raise ConfigurationError(
                f"layers={name!r} is a {type(owner).__name__}; expected a ModuleList, ModuleDict or Sequential. Lists "
                f"of layers in {type(module).__name__}: {_known(module)}"
            )
    return found


def _declared(module: nn.Module) -> list[tuple[str, nn.Module]]:
    declared = module.configure_pipeline()  # type: ignore[operator]
    kind = type(module).__name__
    if isinstance(declared, (nn.ModuleList, nn.Sequential)):
        declared = list(declared)
    if not isinstance(declared, Sequence) or not all(isinstance(stage, nn.Module) for stage in declared):
        raise ConfigurationError(
            f"{kind}.configure_pipeline() returned {declared!r:.200}; expected a sequence of its own submodules, in "
            "the order in which the step calls them"
        )
    names = {id(child): name for name, child in module.named_modules()}
    found = []
    for position, stage in enumerate(declared):
        if id(stage) not in names or stage is module:
            raise ConfigurationError(
                f"{kind}.configure_pipeline() returned at position {position} a {type(stage).__name__} that is no "
                "submodule of it; assign it to an attribute in __init__, so that its parameters belong to the module"
            )
        found.append((names[id(stage)], stage))
    return found


def _automatic(module: nn.Module) -> list[tuple[str, nn.Module]]:
    stacks = _stacks("", module)
    if not stacks:
        raise ConfigurationError(
            f"{type(module).__name__} has no ModuleList, ModuleDict or Sequential of at least two layers to cut "
            "between. Name the layers (layers=...), or return the stages' modules from configure_pipeline()"
        )
    largest = max(_num_elements(stack) for _, stack in stacks)
    chosen = [(name, stack) for name, stack in stacks if _num_elements(stack) >= _MINOR_SHARE * largest]
    return [
        (f"{name}.{key}" if name else key, child) for name, stack in chosen for key, child in stack.named_children()
    ]


def _stacks(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The top-most lists of layers, in order of registration."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) and _alike(module.children()):
        return [(name, module)]
    inner = [
        stack for key, child in module.named_children() for stack in _stacks(f"{name}.{key}" if name else key, child)
    ]
    if isinstance(module, nn.Sequential) and len(module) > 1 and _num_elements(module):
        largest = max((_num_elements(stack) for _, stack in inner), default=0)
        if largest <= _DOMINANT_SHARE * _num_elements(module):
            return [(name, module)]
    return inner


def _alike(children: Iterable[nn.Module]) -> bool:
    """Whether there are several layers of one kind; long lists may mix two (attention and state-space layers)."""
    found = list(children)
    kinds = {type(child) for child in found}
    if not all(_num_elements(child) for child in found):
        return False
    return len(found) >= 2 and (len(kinds) == 1 or (len(kinds) == 2 and len(found) >= 4))


def _num_elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _known(module: nn.Module) -> str:
    return ", ".join(repr(name) for name, _ in _stacks("", module)) or "none"


def _check(module: nn.Module, found: Sequence[tuple[str, nn.Module]]) -> None:
    if not found:
        raise ConfigurationError(
            f"no layer of {type(module).__name__} was given to cut between; expected at least one. Name a list that is "
            f"not empty: {_known(module)}"
        )
    seen: dict[int, str] = {}
    for name, layer in found:
        if id(layer) in seen:
            raise ConfigurationError(
                f"layer {name!r} is the same module as {seen[id(layer)]!r}; a pipeline can call each layer only once. "
                "Shared layers must stay inside one stage: give larger stage modules (layers=..., configure_pipeline())"
            )
        seen[id(layer)] = name
    for name, layer in found:
        for inner_name, inner in layer.named_modules():
            if inner is not layer and id(inner) in seen:
                raise ConfigurationError(
                    f"layer {seen[id(inner)]!r} lies inside layer {name!r} (as {inner_name!r}); expected layers that "
                    "are called one after the other. Give only the outer or only the inner ones"
                )
