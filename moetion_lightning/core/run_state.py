"""What belongs to a run and is no operator: random number generators, buffers, metric states, gradients.

Everything here is small next to the operators and is captured once per window, with its first iteration.
"""

from __future__ import annotations

import ctypes
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
from moetion_lightning.core.kept_values import Unchanging
from moetion_lightning.core.module_table import module_table
from moetion_lightning.errors import ForeignWindowError

__all__ = ["Rng", "get_rng", "set_rng", "with_extra_state", "write_buffers"]


class _NumpyGlobal:
    """The state of numpy's global generator.

    numpy takes 0.1 ms to give it, in a loop over its numbers. Their memory is looked at first, and that of the object
    that may keep a second normal number: as long as both are as they were, so is the state.
    """

    _NUMBERS = 4 * 625  # bytes of a Mersenne twister: 624 numbers and the position
    _HEAD = 16  # bytes at the beginning of an object, where its references are counted

    def __init__(self) -> None:
        self._bits: Any = None
        self._address = 0
        self._seen: tuple[bytes, bytes] | None = None
        self._state: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        """As ``numpy.random.get_state(legacy=False)``; not to be changed."""
        owner: Any = np.random.mtrand._rand
        bits = owner._bit_generator  # another one after numpy.random.set_bit_generator
        if type(bits) is not np.random.MT19937:
            return dict(np.random.get_state(legacy=False))
        if bits is not self._bits:
            self._bits, self._address, self._seen = bits, bits.ctypes.state_address, None
        held = ctypes.string_at(id(owner) + self._HEAD, type(owner).__basicsize__ - self._HEAD)
        seen = held, ctypes.string_at(self._address, self._NUMBERS)
        if seen != self._seen:
            self._seen, self._state = seen, Unchanging(np.random.get_state(legacy=False))
        return self._state


_numpy = _NumpyGlobal()


_last: tuple[dict[str, Any], Unchanging] = ({}, Unchanging())  # parts and their packed form


class Rng:
    """State of the global generators of python, numpy and torch (all devices), as of now: cheap to take.

    Attributes:
        parts: Their states, as the libraries give them; not to be changed.
    """

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": _numpy.state(),
            "torch": torch.get_rng_state(),
        }
        kind, states = device_states()
        if states:
            self.parts["devices"] = {"kind": kind, "states": states}
        self._packed: Unchanging | None = None

    def packed(self, generators: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Plain values and arrays, as of :func:`get_rng`; the same object as long as nothing is drawn.

        Args:
            generators: States of further generators, by name.
        """
        global _last
        if self._packed is None:
            self._packed = _pack(self.parts, *_last)
            _last = self.parts, self._packed
        return {**self._packed, "generators": dict(generators)} if generators else self._packed


def _pack(parts: dict[str, Any], before: dict[str, Any], known: Unchanging) -> Unchanging:
    """Packed form of parts; what is as it was before is the same object as in their packed form."""
    if before and _are_equal(parts, before):
        return known
    is_same = parts["python"] == before.get("python")
    python = known["python"] if is_same else Unchanging(state=packed_python(parts["python"]))
    packed = Unchanging(parts, python=python, torch=parts["torch"].numpy())
    if "devices" in packed:
        packed["devices"] = {**packed["devices"], "states": [s.numpy() for s in packed["devices"]["states"]]}
    return packed


def _are_equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if a["numpy"] is not b["numpy"] or a["python"] != b["python"] or not torch.equal(a["torch"], b["torch"]):
        return False
    first, second = (parts.get("devices", {"kind": "", "states": []}) for parts in (a, b))
    if first["kind"] != second["kind"] or len(first["states"]) != len(second["states"]):
        return False
    return all(map(torch.equal, first["states"], second["states"]))


def _set_numpy(state: Mapping[str, Any]) -> None:
    owner: Any = np.random.mtrand._rand
    kind = getattr(np.random, state["bit_generator"])
    if type(owner._bit_generator) is not kind:  # numpy.random.set_bit_generator was called
        if not (isinstance(kind, type) and issubclass(kind, np.random.BitGenerator)):
            raise ForeignWindowError(
                f"the window holds the state of a numpy.random.{state['bit_generator']}, which is none"
            )
        np.random.mtrand.set_bit_generator(kind())
    np.random.set_state(dict(state))


def get_rng(generators: Mapping[str, object] | None = None) -> dict[str, Any]:
    """State of the global generators of python, numpy and torch (all devices), and of the given ones.

    Args:
        generators: Further generators by name (torch, numpy or python objects).

    Returns:
        Plain values and arrays, which nothing changes later.
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
    random.setstate(unpacked_python(state["python"]["state"]))
    _set_numpy(state["numpy"])
    torch.set_rng_state(torch.from_numpy(state["torch"]))
    devices = state.get("devices")
    if devices:
        set_device_states(devices["kind"], [torch.from_numpy(array) for array in devices["states"]])
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
