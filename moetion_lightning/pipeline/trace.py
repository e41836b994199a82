"""A run of the whole module, recorded: what each layer was called with and returned, and what came out in the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from moetion_lightning.pipeline.cut_plan import CutPlan, LayerForm, TapForm
from moetion_lightning.pipeline.layer_calls import LayerCalls, device_of
from moetion_lightning.pipeline.layer_list import LayerList
from moetion_lightning.pipeline.specs import LayerSpec, LeafSpec, flatten, leaf_specs
from moetion_lightning.pipeline.taps import call_watched

__all__ = ["Entry", "LayerRecord", "Output", "TimedCalls", "Trace", "WholeCalls"]


@dataclass(frozen=True)
class Entry:
    """What a layer was called with.

    Args:
        structure: Structure of ``(args, kwargs)``.
        leaves: Their leaves; tensors are detached copies.
        differentiable: For each leaf, whether it required grad.
        groups: For each leaf that is a tensor, all positions of the very same object; empty for others.
    """

    structure: TreeSpec
    leaves: tuple[Any, ...]
    differentiable: tuple[bool, ...]
    groups: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Output:
    """An output of a layer or of one of its taps.

    Args:
        form: The tap; its ``module`` is empty, and its ``attribute`` None, for what the layer returned.
        specs: Its leaves.
        differentiable: For each leaf, whether it requires grad.
        values: Detached copies of tensors, by position; integers always, others where they were asked for.
    """

    form: TapForm
    specs: tuple[LeafSpec, ...]
    differentiable: tuple[bool, ...]
    values: dict[int, Tensor]


@dataclass
class LayerRecord:
    """One layer's call.

    Args:
        returned: What the layer returned.
        taps: Everything that may be a tap, if it was asked for.
        inputs: Positions of leaves that are arguments of the next layer's call, the very same objects.
    """

    returned: Output
    taps: list[Output] = field(default_factory=list)
    inputs: set[int] = field(default_factory=set)

    def output(self, tap: str) -> Output:
        """What the layer returned (empty name), or a tap."""
        return next(o for o in (self.returned, *self.taps) if o.form.name == tap)


@dataclass
class Trace:
    """A recorded run of the whole module.

    Args:
        entries: By layer, for the layers that were asked for.
        layers: One record a layer.
        result: Leaves of what the step returned; tensors are detached copies.
        norms: Norm of each parameter's gradient, by name, for those that got one; if a backward was asked for.
        buffers: Buffers that the run changed, by name, as they were after it.
    """

    entries: dict[int, Entry]
    layers: list[LayerRecord]
    result: list[Any] = field(default_factory=list)
    norms: dict[str, float] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def forms(self) -> tuple[LayerForm, ...]:
        """Forms of all layers, with everything that may be a tap."""
        return tuple(
            LayerForm(record.returned.form.structure, tuple(tap.form for tap in record.taps)) for record in self.layers
        )

    def stubs(self, plan: CutPlan, stage: int) -> list[LayerSpec]:
        """Specs of all layers before a stage, with the plan's taps."""
        return [
            LayerSpec(record.returned.specs, tuple(record.output(tap.name).specs for tap in form.taps))
            for record, form in zip(self.layers, plan.forms[: plan.bounds[stage]])
        ]


class WholeCalls(LayerCalls):
    """The layer calls of a run of the whole module, recorded.

    Args:
        layers: All layers.
        entries: Indices of layers whose arguments to record.
        everything: Whether to record also the values of all outputs, and everything that may be a tap.
    """

    def __init__(self, layers: LayerList, entries: Collection[int] = (), everything: bool = False) -> None:
        super().__init__(layers, 0, len(layers))
        self.trace = Trace({}, [])
        self._entries = set(entries)
        self._everything = everything
        self._last: list[Any] = []  # the leaves that the layer before returned

    def compute(self, index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer and record the call."""
        leaves, structure = flatten((args, kwargs))
        if index:
            given = {id(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
            self.trace.layers[-1].inputs |= {p for p, leaf in enumerate(self._last) if id(leaf) in given}
        if index in self._entries:
            self.trace.entries[index] = _entry(leaves, structure)
        if self._everything:
            output, found = call_watched(self.layers.modules[index], forward, args, kwargs)
        else:
            output, found = forward(*args, **kwargs), []
        self._last, structure = flatten(output)
        returned = self._output(TapForm("", None, structure), self._last, (args, kwargs))
        taps = [self._output(form, flatten(value)[0], ()) for form, value in found]
        self.trace.layers.append(LayerRecord(returned, taps))
        return output

    def _output(self, form: TapForm, leaves: list[Any], arguments: Any) -> Output:
        values = {
            position: leaf.detach().clone()
            for position, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and (self._everything or not (leaf.is_floating_point() or leaf.is_complex()))
        }
        differentiable = tuple(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)
        return Output(form, leaf_specs(leaves, arguments), differentiable, values)


class TimedCalls(LayerCalls):
    """The layer calls of a run of the whole module, timed.

    Args:
        layers: All layers.

    Attributes:
        seconds: For each layer, from the end of the layer before (the beginning of the step, for the first).
    """

    def __init__(self, layers: LayerList) -> None:
        super().__init__(layers, 0, len(layers))
        self.seconds = [0.0] * len(layers)
        self._device = torch.device("cpu")
        self._mark = time.perf_counter()

    def compute(self, index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer and take the time."""
        output = forward(*args, **kwargs)
        self._device = device_of(output, args, kwargs)
        self.seconds[index] += self._lap()
        return output

    def end(self) -> None:
        """After the step: the time since the last layer counts for it."""
        self.seconds[-1] += self._lap()

    def _lap(self) -> float:
        if self._device.type != "cpu":
            torch.get_device_module(self._device.type).synchronize(self._device)
        now = time.perf_counter()
        passed, self._mark = now - self._mark, now
        return passed


def _entry(leaves: list[Any], structure: TreeSpec) -> Entry:
    positions: dict[int, list[int]] = {}
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            positions.setdefault(id(leaf), []).append(position)
    return Entry(
        structure,
        tuple(leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves),
        tuple(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves),
        tuple(tuple(positions.get(id(leaf), ())) if isinstance(leaf, Tensor) else () for leaf in leaves),
    )
