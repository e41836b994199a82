"""Steps from which nothing was learnt (validation, prediction): everything that a later stage may need crosses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten, treespec_dumps, treespec_loads

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.pipeline.cut_plan import CutPlan
from moetion_lightning.pipeline.layer_calls import LayerCalls, device_of, fire_hooks, replace_leaves
from moetion_lightning.pipeline.layer_list import LayerList
from moetion_lightning.pipeline.specs import LeafSpec, assemble, flatten, junk_like, leaf_specs, outline
from moetion_lightning.pipeline.taps import call_tapped

__all__ = ["EvalCalls", "EvalMessage"]

_AS_PLANNED = ""  # a structure that cannot be written as text, but is the one in the plan


@dataclass(frozen=True)
class EvalMessage:
    """What one stage tells the next one in a forward-only step.

    Args:
        header: Values that JSON can hold: shapes and dtypes of the tensors, and the structure around them.
        tensors: The tensors, in the header's order.
    """

    header: dict[str, Any]
    tensors: list[Tensor]


@dataclass
class _Output:
    """An output, its leaves described; ``sent`` holds the positions and tensors that go to later stages."""

    structure: str
    specs: tuple[LeafSpec, ...]
    sent: dict[int, Tensor]

    def to_json(self) -> list[Any]:
        return [self.structure, [spec.to_json() for spec in self.specs], list(self.sent)]


class EvalCalls(LayerCalls):
    """The layer calls of one stage in a forward-only step.

    Args:
        layers: All layers.
        plan: The plan, for bounds and taps.
        stage: Which stage.
        message: From the stage before; None for the first one.
    """

    def __init__(self, layers: LayerList, plan: CutPlan, stage: int, message: EvalMessage | None) -> None:
        span = plan.layers_of(stage)
        super().__init__(layers, span.start, span.stop)
        if (message is None) != (stage == 0):
            raise ConfigurationError(
                f"stage {stage} was given {'no message' if message is None else 'a message'}; expected the message of "
                "the stage before on every stage but the first"
            )
        self.plan = plan
        self._outputs: list[list[_Output]] = []  # of each layer: its own output, then its taps'
        self._entering: dict[int, Tensor] = {}
        self._num_entering = 0
        self._leaving: list[Any] = []
        self._substitutes: dict[int, Tensor] = {}
        self._replaced: list[Any] = []
        self._last: list[Any] = []  # leaves of the layer that ran last
        if message is not None:
            self._read(message)

    def stub(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the layer's output as received; NaN for what was merely the next layer's input."""
        own, *tapped = self._outputs[index]
        form, layer = self.plan.forms[index], self.layers.modules[index]
        device = device_of(args, kwargs)
        for tap, output in zip(form.taps, tapped):
            if output.specs:
                value = self._build(index, tap.structure, output, device, ())
                self.put_out(layer, tap, value)
        value = self._build(index, form.structure, own, device, (args, kwargs))
        if layer._forward_hooks:
            fire_hooks(layer, args, kwargs, value)
        return value

    def compute(self, index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer of this stage on what was received."""
        if index == self.start and index:
            args, kwargs = self._enter(args, kwargs)
        elif self._substitutes:
            args, kwargs = replace_leaves(args, kwargs, self._substitutes)
        self._drop_inputs(flatten((args, kwargs))[0])
        form = self.plan.forms[index]
        output, collected = call_tapped(self.layers.modules[index], form.taps, forward, args, kwargs)
        leaves, structure = flatten(output)
        found = [self._describe(index, structure, form.structure, leaves, (args, kwargs))]
        for tap in form.taps:
            outputs = collected[tap.name]
            tap_leaves, tap_structure = flatten(outputs[0] if len(outputs) == 1 else ())
            found.append(self._describe(index, tap_structure, tap.structure, tap_leaves, ()))
        self._outputs.append(found)
        self._last = leaves
        return output

    def cut(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take everything that the next stage's first layer was called with."""
        args, kwargs = replace_leaves(args, kwargs, self._substitutes)
        self._leaving = flatten((args, kwargs))[0]
        self._drop_inputs(self._leaving)

    def message(self) -> EvalMessage:
        """The message for the next stage."""
        positions = [position for position, leaf in enumerate(self._leaving) if isinstance(leaf, Tensor)]
        tensors = [self._leaving[position] for position in positions]
        for outputs in self._outputs:
            for output in outputs:
                tensors += output.sent.values()
        tensors = [tensor.detach().contiguous() for tensor in tensors]
        header = {
            "num_leaves": len(self._leaving),
            "positions": positions,
            "outputs": [[output.to_json() for output in outputs] for outputs in self._outputs],
            "tensors": [spec.to_json() for spec in leaf_specs(tensors, ())],
        }
        return EvalMessage(header, tensors)

    def _read(self, message: EvalMessage) -> None:
        header = message.header
        if len(header["tensors"]) != len(message.tensors) or len(header["outputs"]) != self.start:
            raise ConfigurationError(
                f"a stage that begins at layer {self.start} was given {len(message.tensors)} tensors and the outputs "
                f"of {len(header['outputs'])} layers; its message's header announces {len(header['tensors'])} tensors, "
                f"and it needs the outputs of {self.start} layers. Check that all ranks have the same plan "
                "(CutPlan.digest())"
            )
        tensors = iter(message.tensors)
        self._num_entering = header["num_leaves"]
        self._entering = {position: next(tensors) for position in header["positions"]}
        for outputs in header["outputs"]:
            self._outputs.append(
                [
                    _Output(structure, tuple(map(LeafSpec.from_json, specs)), {leaf: next(tensors) for leaf in sent})
                    for structure, specs, sent in outputs
                ]
            )

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, structure = flatten((args, kwargs))
        given = {position for position, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        if len(leaves) != self._num_entering or given != self._entering.keys():
            raise ConfigurationError(
                f"layer {self.layers.names[self.start]!r} was called with {len(leaves)} arguments, tensors at "
                f"{sorted(given)}; on the stage before it was called with {self._num_entering}, tensors at "
                f"{sorted(self._entering)}. All stages must run the same step on the same batch"
            )
        for position, tensor in self._entering.items():
            self._substitutes[id(leaves[position])] = tensor
            self._replaced.append(leaves[position])
        for position, tensor in self._entering.items():
            leaves[position] = tensor
        return tree_unflatten(leaves, structure)

    def _drop_inputs(self, arguments: Sequence[Any]) -> None:
        """Of the previous layer's output, keep what is more than an argument of the next layer."""
        if self._outputs and self._last:
            inputs = {id(argument) for argument in arguments}
            sent = self._outputs[-1][0].sent
            for position, leaf in enumerate(self._last):
                if id(leaf) in inputs:
                    sent.pop(position, None)
        self._last = []

    def _describe(
        self, index: int, structure: TreeSpec, planned: TreeSpec, leaves: Sequence[Any], arguments: Any
    ) -> _Output:
        if structure == planned:
            text = _AS_PLANNED
        else:
            try:
                text = treespec_dumps(structure)
            except (NotImplementedError, TypeError) as error:
                raise ConfigurationError(
                    f"layer {self.layers.names[index]!r} returned {outline(structure)} in an evaluation step, and "
                    f"{outline(planned)} in training; later pipeline stages cannot rebuild it ({error}). Return "
                    "tuples, lists or dicts"
                ) from error
        sent = {position: leaf for position, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        return _Output(text, leaf_specs(leaves, arguments), sent)

    def _build(self, index: int, planned: TreeSpec, output: _Output, device: torch.device, arguments: Any) -> Any:
        def tensor(position: int, spec: LeafSpec) -> Tensor:
            sent = output.sent.get(position)
            return junk_like(spec, device) if sent is None else sent

        structure = planned if output.structure == _AS_PLANNED else treespec_loads(output.structure)
        return assemble(structure, output.specs, tensor, arguments, self.layers.names[index])
