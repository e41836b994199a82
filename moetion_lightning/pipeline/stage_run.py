"""One micro-batch on one stage: earlier layers are replaced by stubs, received tensors enter, the payload leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.pipeline.cut_plan import CutPlan, SideOutput, TapForm
from moetion_lightning.pipeline.layer_calls import ALTERNATIVES, LayerCalls, device_of, fire_hooks, replace_leaves
from moetion_lightning.pipeline.layer_list import LayerList
from moetion_lightning.pipeline.specs import (
    LayerSpec,
    LeafSpec,
    TensorSpec,
    assemble,
    flatten,
    junk_like,
    leaf_specs,
    outline,
)
from moetion_lightning.pipeline.taps import call_tapped

__all__ = ["StageCalls", "StageRun"]


@dataclass(frozen=True)
class StageRun:
    """What came out of one micro-batch on one stage.

    Args:
        payload: What the next stage receives, in order; a backward can start from each that requires grad. Empty on
            the last stage.
        result: What the step returned; None before the last stage.
        layer_specs: The outputs of this stage's own layers, from which later stages build stand-ins.
    """

    payload: tuple[Tensor, ...]
    result: Any
    layer_specs: tuple[LayerSpec, ...]

    @property
    def payload_specs(self) -> tuple[TensorSpec, ...]:
        """Shape, dtype and differentiability of the payload."""
        return tuple(TensorSpec.of(tensor) for tensor in self.payload)


class StageCalls(LayerCalls):
    """The layer calls of one stage under a plan.

    Args:
        layers: All layers.
        plan: The plan.
        stage: Which stage.
        received: The payload of the stage before.
        stubs: Specs of all layers before the stage, from the runs of the same micro-batch on earlier stages.
    """

    def __init__(
        self, layers: LayerList, plan: CutPlan, stage: int, received: Sequence[Tensor], stubs: Sequence[LayerSpec]
    ) -> None:
        span = plan.layers_of(stage)
        super().__init__(layers, span.start, span.stop)
        _check_given(plan, stage, received, stubs)
        self.plan = plan
        self.stage = stage
        self.specs: list[LayerSpec] = []
        self._received = received
        self._stubs = stubs
        num_crossings = len(plan.boundary(stage).crossings) if stage else 0
        self._entering = received[:num_crossings]
        self._sides = dict(zip(map(_key, plan.sides_into(stage)), received[num_crossings:]))
        self._wanted: dict[int, list[SideOutput]] = {}
        for side in plan.sides:
            if side.layer in span and side.last_stage > stage:
                self._wanted.setdefault(side.layer, []).append(side)
        # Objects that received tensors take the place of, by id; held so that no other object gets their id.
        self._substitutes: dict[int, Tensor] = {}
        self._replaced: list[Any] = []
        self._leaving: list[Any] = []

    def stub(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the layer would, with received tensors where later stages read them and junk elsewhere."""
        form, spec, layer = self.plan.forms[index], self._stubs[index], self.layers.modules[index]
        device = device_of(args, kwargs)
        for tap, leaves in zip(form.taps, spec.taps):
            output = self._stand_in(index, tap.name, tap.structure, leaves, device, ())
            self.put_out(layer, tap, output)
        output = self._stand_in(index, "", form.structure, spec.output, device, (args, kwargs))
        # So that code which collects the layers' outputs by hooks finds each at its place, and junk where it reads it.
        if layer._forward_hooks:
            fire_hooks(layer, args, kwargs, output)
        return output

    def fill(self, index: int, tap: str, leaf: int, spec: LeafSpec, device: torch.device) -> Tensor:
        """A stand-in for a tensor that the stage does not receive."""
        return junk_like(spec, device)

    def compute(self, index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer of this stage on what was received."""
        if self.stage and index == self.start:
            args, kwargs = self._enter(args, kwargs)
        elif self._substitutes:
            args, kwargs = replace_leaves(args, kwargs, self._substitutes)
        if self.stage + 1 == self.plan.num_stages:  # nobody stands in for this layer
            return forward(*args, **kwargs)
        form = self.plan.forms[index]
        output, found = call_tapped(self.layers.modules[index], form.taps, forward, args, kwargs)
        leaves = self._leaves(index, "", form.structure, output)
        tapped = {tap.name: self._tapped(index, tap, found[tap.name]) for tap in form.taps}
        self.specs.append(
            LayerSpec(leaf_specs(leaves, (args, kwargs)), tuple(leaf_specs(tap, ()) for tap in tapped.values()))
        )
        for side in self._wanted.get(index, ()):
            self._sides[_key(side)] = (tapped[side.tap] if side.tap else leaves)[side.leaf]
        return output

    def cut(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take what crosses into the next stage."""
        boundary = self.plan.boundary(self.stage + 1)
        leaves, structure = flatten((args, kwargs))
        self._check_entry(self.stop, boundary.structure, structure)
        for crossing in boundary.crossings:
            leaf = leaves[crossing.positions[0]]
            self._leaving.append(self._substitutes.get(id(leaf), leaf))

    def payload(self) -> tuple[Tensor, ...]:
        """What the next stage receives; after the step, outside of whatever contexts it entered."""
        if self.stage + 1 == self.plan.num_stages:
            return ()
        sides = self.plan.sides_into(self.stage + 1)
        leaving = [*self._leaving, *(self._sides[_key(side)] for side in sides)]
        flags = [crossing.differentiable for crossing in self.plan.boundary(self.stage + 1).crossings]
        flags += [side.differentiable for side in sides]
        seen = {id(tensor) for tensor in self._received}
        sendable = []
        for position, (leaf, differentiable) in enumerate(zip(leaving, flags)):
            if not isinstance(leaf, Tensor):
                raise ConfigurationError(
                    f"layer {self.layers.names[self.stop]!r} was called with a {type(leaf).__name__} where the plan "
                    f"expects a tensor (payload position {position}). The step must call its layers alike for every "
                    "micro-batch; make the plan from a typical one"
                )
            sendable.append(_sendable(leaf, differentiable, copy=id(leaf) in seen))
            seen.add(id(leaf))
        return tuple(sendable)

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        boundary = self.plan.boundary(self.stage)
        leaves, structure = flatten((args, kwargs))
        self._check_entry(self.start, boundary.structure, structure)
        entering = [_writable(tensor) for tensor in self._entering]
        for crossing, tensor in zip(boundary.crossings, entering):
            for position in crossing.positions:
                self._substitutes[id(leaves[position])] = tensor
                self._replaced.append(leaves[position])
        for crossing, tensor in zip(boundary.crossings, entering):
            for position in crossing.positions:
                leaves[position] = tensor
        return tree_unflatten(leaves, structure)

    def _stand_in(
        self, index: int, tap: str, structure: TreeSpec, specs: Sequence[LeafSpec], device: torch.device, arguments: Any
    ) -> Any:
        def tensor(position: int, spec: LeafSpec) -> Tensor:
            side = self._sides.get((index, tap, position))
            return self.fill(index, tap, position, spec, device) if side is None else side

        return assemble(structure, specs, tensor, arguments, self.layers.names[index])

    def _leaves(self, index: int, tap: str, expected: TreeSpec, output: Any) -> list[Any]:
        leaves, structure = flatten(output)
        if structure != expected:
            name = ".".join(filter(None, (self.layers.names[index], tap)))
            raise ConfigurationError(
                f"{name!r} returned {outline(structure)}; the plan expects {outline(expected)}. A layer must return "
                "the same containers for every micro-batch, since later pipeline stages stand in for it; return a "
                "placeholder tensor instead of leaving one out"
            )
        return leaves

    def _tapped(self, index: int, tap: TapForm, outputs: Sequence[Any]) -> list[Any]:
        if len(outputs) != 1:
            raise ConfigurationError(
                f"{self.layers.names[index]}.{tap.module} ran {len(outputs)} times in one call of its layer; the loss "
                f"reads its output through a forward hook, for which it must run once. {ALTERNATIVES}"
            )
        return self._leaves(index, tap.name, tap.structure, outputs[0])

    def _check_entry(self, index: int, expected: TreeSpec, structure: TreeSpec) -> None:
        if structure != expected:
            raise ConfigurationError(
                f"layer {self.layers.names[index]!r} was called with arguments {outline(structure)}; the plan expects "
                f"{outline(expected)}. The step must call its layers alike for every micro-batch; make the plan from a "
                "typical one"
            )


def _key(side: SideOutput) -> tuple[int, str, int]:
    return side.layer, side.tap, side.leaf


def _writable(tensor: Tensor) -> Tensor:
    """A tensor that the layer may change in place, as it may in the whole module, where it is no leaf."""
    return tensor.clone() if tensor.is_leaf and tensor.requires_grad and torch.is_grad_enabled() else tensor


def _sendable(tensor: Tensor, differentiable: bool, copy: bool) -> Tensor:
    # A schedule detaches stage outputs in place, which a view or a leaf does not survive.
    if copy or tensor.is_leaf or tensor._is_view():
        tensor = tensor.clone()
    if differentiable and torch.is_grad_enabled() and not tensor.requires_grad:
        return tensor.detach().requires_grad_()
    return tensor


def _check_given(plan: CutPlan, stage: int, received: Sequence[Tensor], stubs: Sequence[LayerSpec]) -> None:
    if len(received) != plan.payload_size(stage):
        raise ConfigurationError(
            f"stage {stage} was given {len(received)} tensors; the plan expects {plan.payload_size(stage)}: the "
            f"payload of stage {stage - 1}, in its order. Check that all ranks have the same plan (CutPlan.digest())"
        )
    if stage and len(stubs) != plan.bounds[stage]:
        raise ConfigurationError(
            f"stage {stage} was given the specs of {len(stubs)} layers; expected those of all {plan.bounds[stage]} "
            "layers before it, in order"
        )
