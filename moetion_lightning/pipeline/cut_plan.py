"""What is known about a cut module before it runs: bounds, ownership, and what crosses each boundary."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import xxhash
from torch.utils._pytree import TreeSpec

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.pipeline.specs import LayerSpec

__all__ = ["Boundary", "Crossing", "CutPlan", "LayerForm", "LayerSpec", "SideOutput", "TapForm"]


@dataclass(frozen=True)
class Crossing:
    """A tensor among the arguments of a stage's first layer that comes from the stage before.

    Args:
        positions: Where it is among the leaves of ``(args, kwargs)``; several if the same object is given repeatedly.
        differentiable: Whether a gradient flows back through it.
    """

    positions: tuple[int, ...]
    differentiable: bool


@dataclass(frozen=True)
class Boundary:
    """Where a stage after the first begins.

    Args:
        structure: Structure of the ``(args, kwargs)`` of the stage's first layer.
        crossings: What crosses, in payload order.
    """

    structure: TreeSpec
    crossings: tuple[Crossing, ...]


@dataclass(frozen=True)
class SideOutput:
    """A tensor that a layer puts out besides the next layer's input, and that later stages read.

    Args:
        layer: Index of the layer.
        tap: Name of the layer's tap that puts it out; empty: the layer returns it.
        leaf: Position among the leaves of that output.
        differentiable: Whether a gradient flows back through it.
        last_stage: The last stage that reads it.
    """

    layer: int
    tap: str
    leaf: int
    differentiable: bool
    last_stage: int


@dataclass(frozen=True)
class TapForm:
    """Something that a layer puts out otherwise than by returning it.

    Args:
        module: Name, within the layer, of the submodule; empty: the layer itself.
        attribute: The attribute that the submodule sets. None: the submodule's output, collected by forward hooks,
            which later stages run too.
        structure: Structure of the value.
    """

    module: str
    attribute: str | None
    structure: TreeSpec

    @property
    def name(self) -> str:
        """Name of the tap within its layer."""
        return self.module if self.attribute is None else f"{self.module}:{self.attribute}"


@dataclass(frozen=True)
class LayerForm:
    """Structure of what a layer returns, and its taps in the order in which they run."""

    structure: TreeSpec
    taps: tuple[TapForm, ...] = ()


@dataclass(frozen=True)
class CutPlan:
    """A module cut into stages; made by ``make_plan``, and the same on all ranks that made it from alike data.

    Args:
        bounds: First layer of each stage.
        num_stages: Number of stages.
        layer_names: Name of each layer, in call order.
        owned: For each stage, the names of the parameters that it holds and trains. A parameter that several stages
            use is in each of them; its gradient is the sum over them, where a stage may have none.
        boundaries: One for each stage after the first.
        sides: Side outputs that cross boundaries.
        forms: One for each layer.
        true_buffers: For each stage, the names of buffers that the step changes there as it would in the whole module.
        junk_buffers: For each stage, the names of buffers that the step changes there from junk; every run puts them
            back.
        deterministic: Whether two runs of the whole module were bitwise equal, so that the cut was verified bitwise.
    """

    bounds: tuple[int, ...]
    num_stages: int
    layer_names: tuple[str, ...]
    owned: tuple[tuple[str, ...], ...]
    boundaries: tuple[Boundary, ...]
    sides: tuple[SideOutput, ...]
    forms: tuple[LayerForm, ...]
    true_buffers: tuple[tuple[str, ...], ...]
    junk_buffers: tuple[tuple[str, ...], ...]
    deterministic: bool

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layer_names)

    def layers_of(self, stage: int) -> range:
        """Indices of a stage's layers.

        Raises:
            ConfigurationError: There is no such stage.
        """
        if not 0 <= stage < self.num_stages:
            raise ConfigurationError(
                f"stage {stage} of a plan of {self.num_stages} stages; expected 0 <= stage < {self.num_stages}"
            )
        stop = self.bounds[stage + 1] if stage + 1 < self.num_stages else self.num_layers
        return range(self.bounds[stage], stop)

    def stage_of(self, layer: int) -> int:
        """The stage that runs a layer."""
        return sum(bound <= layer for bound in self.bounds) - 1

    def boundary(self, stage: int) -> Boundary:
        """Where a stage after the first begins."""
        return self.boundaries[stage - 1]

    def sides_into(self, stage: int) -> tuple[SideOutput, ...]:
        """Side outputs that cross into a stage, in payload order, after the boundary's crossings."""
        first = self.bounds[stage] if stage else 0
        return tuple(side for side in self.sides if side.layer < first and side.last_stage >= stage)

    def payload_size(self, stage: int) -> int:
        """Number of tensors that a stage receives."""
        return len(self.boundary(stage).crossings) + len(self.sides_into(stage)) if stage else 0

    def tied(self) -> dict[str, tuple[int, ...]]:
        """Parameters that several stages hold, with these stages; their gradients are to be summed."""
        stages: dict[str, list[int]] = {}
        for stage, names in enumerate(self.owned):
            for name in names:
                stages.setdefault(name, []).append(stage)
        return {name: tuple(held) for name, held in stages.items() if len(held) > 1}

    def describe(self) -> dict[str, Any]:
        """What ranks must agree on, as values that JSON can hold; structures as text.

        Not which buffers change: that may differ with the data.
        """
        return {
            "bounds": list(self.bounds),
            "layer_names": list(self.layer_names),
            "owned": [list(names) for names in self.owned],
            "boundaries": [
                {
                    "structure": repr(boundary.structure),
                    "crossings": [[list(c.positions), c.differentiable] for c in boundary.crossings],
                }
                for boundary in self.boundaries
            ],
            "sides": [[s.layer, s.tap, s.leaf, s.differentiable, s.last_stage] for s in self.sides],
            "forms": [
                [repr(form.structure), [[tap.name, repr(tap.structure)] for tap in form.taps]] for form in self.forms
            ],
        }

    def digest(self) -> str:
        """Short text that two ranks have in common if and only if their plans agree."""
        return xxhash.xxh3_128(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()
