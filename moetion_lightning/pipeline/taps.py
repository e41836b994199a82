"""What a layer puts out otherwise than by returning it: outputs of submodules that hooks collect, and attributes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moetion_lightning.pipeline.cut_plan import TapForm
from moetion_lightning.pipeline.specs import flatten

__all__ = ["call_tapped", "call_watched"]


def call_tapped(
    layer: nn.Module,
    taps: Sequence[TapForm],
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, dict[str, list[Any]]]:
    """Call a layer and collect its taps.

    Returns:
        What the layer returned, and for each tap, by name, its values: one for each time that the submodule ran.
    """
    found: dict[str, list[Any]] = {tap.name: [] for tap in taps}
    handles = [_collect(layer.get_submodule(tap.module), found[tap.name]) for tap in taps if tap.attribute is None]
    try:
        output = forward(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for tap in taps:
        if tap.attribute is not None:
            found[tap.name].append(getattr(layer.get_submodule(tap.module), tap.attribute, None))
    return output, found


def call_watched(
    layer: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, list[tuple[TapForm, Any]]]:
    """Call a layer and collect everything that may be a tap.

    Returns:
        What the layer returned, and the possible taps with their values, in the order in which they came: outputs of
        submodules that have forward hooks and ran once, and attributes of submodules that got tensors.
    """
    ran: list[tuple[str, Any]] = []
    before = {name: dict(module.__dict__) for name, module in layer.named_modules()}
    handles = [_collect(module, ran, name) for name, module in layer.named_modules() if name and module._forward_hooks]
    try:
        output = forward(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    names = [name for name, _ in ran]
    found = [(TapForm(name, None, flatten(value)[1]), value) for name, value in ran if names.count(name) == 1]
    for name, module in layer.named_modules():
        for attribute, value in module.__dict__.items():
            if value is not before.get(name, {}).get(attribute, value) or attribute not in before.get(name, {}):
                leaves, structure = flatten(value)
                if any(isinstance(leaf, Tensor) for leaf in leaves):
                    found.append((TapForm(name, attribute, structure), value))
    return output, found


def _collect(module: nn.Module, found: list[Any], name: str | None = None) -> RemovableHandle:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output if name is None else (name, output))

    return module.register_forward_hook(hook)
