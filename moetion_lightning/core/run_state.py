"""What belongs to a run and is no operator: random number generators, buffers, metric states, gradients.

Everything here is small next to the operators and is captured once per window, with its first iteration.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moetion_lightning.core.device_random import device_states, set_device_states
from moetion_lightning.core.generators import (
    Generators,
    generator_state,
    packed_python,
    set_generator,
    unpacked_python,
)
from moetion_lightning.core.module_table import module_table

__all__ = ["Rng", "get_rng", "set_rng", "with_extra_state", "write_buffers"]


class Rng:
    """State of the global generators of python, numpy and torch (all devices), as of now: cheap to take.

    Attributes:
        parts: Their states, as the libraries give them.
    """

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state(),
        }
        kind, states = device_states()
        if states:
            self.parts["devices"] = {"kind": kind, "states": states}

    def packed(self, generators: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Plain values and tensors, as of :func:`get_rng`.

        Args:
            generators: States of further generators, by name.
        """
        state = {**self.parts, "python": packed_python(self.parts["python"])}
        return {**state, "generators": dict(generators)} if generators else state


def get_rng(generators: Mapping[str, object] | None = None) -> dict[str, Any]:
    """State of the global generators of python, numpy and torch (all devices), and of the given ones.

    Args:
        generators: Further generators by name (torch, numpy or python objects).

    Returns:
        Plain values and tensors; every tensor is a copy.
    """
    return Rng().packed({name: generator_state(g) for name, g in (generators or {}).items()})


def set_rng(state: Mapping[str, Any], generators: Generators | Mapping[str, object] | None = None) -> list[str]:
    """Put the state of :func:`get_rng` back.

    Args:
        state: The state.
        generators: The named generators.

    Returns:
        Names in the state that no generator was found for.
    """
    random.setstate(unpacked_python(state["python"]))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    devices = state.get("devices") or {"kind": "cuda", "states": state.get("cuda", ())}  # of an older release
    set_device_states(devices["kind"], devices["states"])
    named = state.get("generators", {})
    if isinstance(generators, Generators):
        return generators.take(named)
    known = generators or {}
    return [name for name, value in named.items() if name not in known or not set_generator(known[name], value)]


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


def with_extra_state(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that put something of their own into ``state_dict()``, by name."""
    return module_table(module).where(_has_extra_state)


def _has_extra_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state
