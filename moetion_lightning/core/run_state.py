"""What belongs to a run and is no operator: random number generators, buffers, metric states, gradients.

Everything here is small next to the operators and is captured once per window, with its first iteration.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["find_generators", "get_rng", "read_buffers", "set_rng", "write_buffers"]

_MODULE_TABLES = frozenset({"_parameters", "_buffers", "_modules"})
_MAX_ITEMS = 1000  # a long list holds data, not generators
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def get_rng(generators: Mapping[str, object] | None = None) -> dict[str, Any]:
    """State of the global generators of python, numpy and torch (all devices), and of the given ones.

    Args:
        generators: Further generators by name (torch, numpy or python objects).

    Returns:
        Plain values and tensors; every tensor is a copy.
    """
    state: dict[str, Any] = {
        "python": _packed(random.getstate()),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if generators:
        state["generators"] = {name: _get_generator(g) for name, g in generators.items()}
    return state


def set_rng(state: Mapping[str, Any], generators: Mapping[str, object] | None = None) -> None:
    """Put the state of :func:`get_rng` back. Named generators that no longer exist are left out."""
    random.setstate(_unpacked(state["python"]))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(list(state["cuda"])[: torch.cuda.device_count()])
    for name, value in state.get("generators", {}).items():
        if generators and name in generators:
            _set_generator(generators[name], value)


def _get_generator(generator: object) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    assert isinstance(generator, random.Random)
    return _packed(generator.getstate())


def _set_generator(generator: object, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(_unpacked(state))


def _packed(state: tuple[Any, ...]) -> tuple[Any, ...]:
    """The state of a python generator with its 625 integers as one array: it is stored after every iteration."""
    version, values, gauss = state
    return version, np.array(values, dtype=np.uint32), gauss


def _unpacked(state: Sequence[Any]) -> tuple[Any, ...]:
    version, values, gauss = state
    return version, tuple(int(value) for value in values), gauss


def find_generators(roots: Mapping[str, object]) -> dict[str, object]:
    """Generators that user objects hold as attributes, also inside lists, tuples and dicts, by name.

    Args:
        roots: Objects to look at. Of a module, every submodule is looked at; of anything else, its own attributes.
    """
    found: dict[str, object] = {}
    for name, root in roots.items():
        owners: Iterable[tuple[str, object]] = [("", root)]
        if isinstance(root, nn.Module):
            owners = root.named_modules()
        for path, owner in owners:
            for attribute, value in list(getattr(owner, "__dict__", {}).items()):
                if attribute not in _MODULE_TABLES:
                    _look(".".join(part for part in (name, path, attribute) if part), value, found, depth=2)
    return found


def _look(name: str, value: object, found: dict[str, object], depth: int) -> None:
    if isinstance(value, _GENERATORS):
        found[name] = value
    elif depth and isinstance(value, dict) and len(value) <= _MAX_ITEMS:
        for key, item in list(value.items()):
            _look(f"{name}[{key!r}]", item, found, depth - 1)
    elif depth and isinstance(value, (list, tuple)) and len(value) <= _MAX_ITEMS:
        for index, item in enumerate(value):
            _look(f"{name}[{index}]", item, found, depth - 1)


def read_buffers(module: nn.Module) -> dict[str, Tensor]:
    """All buffers (persistent or not) by name; live tensors, not copies."""
    return dict(module.named_buffers())


@torch.no_grad()
def write_buffers(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Put buffers back. A buffer whose shape changed meanwhile is replaced."""
    for name, buffer in module.named_buffers():
        value = saved.get(name)
        if value is None:
            continue
        if buffer.shape == value.shape and buffer.dtype == value.dtype:
            buffer.copy_(value)
        else:
            owner = module.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], value.to(buffer.device))
