"""Runs of a user's step that leave no trace in the module."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moetion_lightning.core.generators import find_generators
from moetion_lightning.core.run_state import get_rng, set_rng
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.moe.routing.forms import repeated_forward
from moetion_lightning.pipeline.specs import same_bits

__all__ = ["ModuleState", "buffers_aside", "trace_free"]

_MAX_DEPTH = 4  # of containers in attributes: a metric's list of tensors, a dict of such lists


class ModuleState:
    """What steps change in a module besides its parameters, to be put back: any number of times.

    Buffers and other tensors in attributes get their values back, and attributes, lists, dicts and sets their content:
    states of metrics, counters, caches, hooks that a library registers when it is first used. Also the global random
    number generators and those that the module holds. Objects of other kinds in attributes are not looked into.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._versions = [(name, p, p._version) for name, p in module.named_parameters() if not p.is_inference()]
        self._generators = find_generators({"module": module})
        self._rng = get_rng(self._generators)
        self._buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
        self._tensors: dict[int, tuple[Tensor, Tensor]] = {}
        self._containers: dict[int, tuple[Any, Any]] = {}
        for child in module.modules():
            self._containers[id(child.__dict__)] = child.__dict__, dict(child.__dict__)
            for value in child.__dict__.values():
                self._remember(value, 0)

    def _remember(self, value: Any, depth: int) -> None:
        if isinstance(value, nn.Parameter) or id(value) in self._containers:
            return
        if isinstance(value, Tensor):
            if value.layout is not torch.strided or value.is_meta:
                return
            self._tensors[id(value)] = value, value.detach().clone()
        elif isinstance(value, (list, dict, set, deque)) and depth < _MAX_DEPTH:
            self._containers[id(value)] = value, value.copy()
            for item in value.values() if isinstance(value, dict) else value:
                self._remember(item, depth + 1)
        elif isinstance(value, tuple) and depth < _MAX_DEPTH:
            for item in value:
                self._remember(item, depth + 1)

    def changed_buffers(self) -> dict[str, Tensor]:
        """Copies of the buffers that are not as they were, by name."""
        return {
            name: buffer.detach().clone()
            for name, buffer in self._module.named_buffers()
            if name not in self._buffers or not same_bits(buffer, self._buffers[name])
        }

    def put_back(self) -> None:
        """Make the module as it was.

        Raises:
            ConfigurationError: A parameter was changed in place; that cannot be undone.
        """
        for container, content in self._containers.values():
            if isinstance(container, (list, deque)):
                if len(container) != len(content) or any(a is not b for a, b in zip(container, content)):
                    container.clear()
                    container.extend(content)
            elif not _holds(container, content):
                container.clear()
                container.update(content)
        for tensor, value in self._tensors.values():
            if not same_bits(tensor, value):
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.copy_(value)
        set_rng(self._rng, self._generators)
        for name, parameter, version in self._versions:
            if parameter._version != version:
                raise ConfigurationError(
                    f"the step changed parameter {name!r} in place, in its forward; only the optimizer may change "
                    "parameters of a pipelined module. Make it a buffer, or update it after the optimizer's step"
                )


def _holds(container: Any, content: Any) -> bool:
    """Whether a set or dict has the very content."""
    if isinstance(container, dict):
        return container.keys() == content.keys() and all(container[key] is content[key] for key in content)
    return bool(container == content)


@contextmanager
def buffers_aside(module: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Inside, some buffers are copies that are thrown away at the end.

    The buffers themselves are not touched, not even for a moment: a backward may still need them.
    """
    held = []
    for name in names:
        path, _, key = name.rpartition(".")
        owner = module.get_submodule(path)
        held.append((owner, key, owner._buffers[key]))
    try:
        for owner, key, buffer in held:
            owner._buffers[key] = None if buffer is None else buffer.clone()
        yield
    finally:
        for owner, key, buffer in held:
            owner._buffers[key] = buffer


@contextmanager
def trace_free(module: nn.Module) -> Iterator[ModuleState]:
    """Whatever runs inside leaves no trace in the module's buffers, attributes and random generators.

    Yields:
        The state to which the module returns at the end, for returning to it in between.
    """
    state = ModuleState(module)
    try:
        with repeated_forward():  # tokens are counted when it is run for good
            yield state
    finally:
        state.put_back()
