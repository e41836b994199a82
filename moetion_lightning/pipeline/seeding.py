"""Random numbers that do not depend on where a module is cut: generators are seeded anew at every layer call."""

from __future__ import annotations

import random
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import numpy as np
import torch

__all__ = ["LayerSeeds", "mix"]

_MASK = (1 << 64) - 1


def mix(seed: int, index: int) -> int:
    """A 64-bit seed from two integers (splitmix64's finalizer), the same on every platform."""
    value = (seed * 0x9E3779B97F4A7C15 + (index + 1) * 0xD1342543DE82EF95) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class LayerSeeds:
    """Seeds torch's generators at each layer call of one run, and puts all global generators back afterwards.

    Code before the first layer, each layer, and the code after each layer have a seed of their own, so that each draws
    the same numbers whichever layers ran before it. Python's and numpy's generators are seeded once, at the start: few
    layers draw from them, and seeding them is slow.

    Args:
        seed: The run's seed: one for each micro-batch of each step, the same on all stages.
        devices: Devices, besides the CPU, whose default generators are seeded.
    """

    def __init__(self, seed: int, devices: Iterable[torch.device]) -> None:
        self._seed = seed
        self._generators = [torch.default_generator, *_device_generators(devices)]
        self._states: list[torch.Tensor] = []
        self._python: Any = None
        self._numpy: Any = None

    def __enter__(self) -> LayerSeeds:
        self._states = [generator.get_state() for generator in self._generators]
        self._python = random.getstate()
        self._numpy = np.random.get_state(legacy=False)
        seed = mix(self._seed, 0)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        self._reseed(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        for generator, state in zip(self._generators, self._states):
            generator.set_state(state)

    def before(self, layer: int) -> None:
        """Seed for a layer."""
        self._reseed(2 * layer + 1)

    def after(self, layer: int) -> None:
        """Seed for the code between a layer and the next one, or for what follows the last."""
        self._reseed(2 * layer + 2)

    def _reseed(self, index: int) -> None:
        seed = mix(self._seed, index)
        for generator in self._generators:
            generator.manual_seed(seed)


def _device_generators(devices: Iterable[torch.device]) -> list[torch.Generator]:
    found = []
    for device in dict.fromkeys(devices):
        if device.type in ("cpu", "meta"):
            continue
        backend = torch.get_device_module(device.type)
        index = device.index if device.index is not None else backend.current_device()
        found.append(backend.default_generators[index])
    return found
