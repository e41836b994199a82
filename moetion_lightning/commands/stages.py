"""Which pipeline stage each layer and operator of a configuration would be on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from torch import nn

from moetion_lightning.commands.tables import table
from moetion_lightning.core.explain import OperatorRow
from moetion_lightning.pipeline.balance import balance, check_bounds, layer_weights
from moetion_lightning.pipeline.layer_list import LayerList, find_layers
from moetion_lightning.pipeline.layout import PipelineLayout
from moetion_lightning.pipeline.schedules import schedule_kind
from moetion_lightning.units import size_text

__all__ = ["StageTable", "describe_stages"]

COLUMNS = ("stage", "rank", "layers", "operators", "elements", "full")
_SHOWN = 4  # modules outside of the layers, by name
_NOTES = (
    "note: the slots above are those of one process; each rank schedules a window of its own operators",
    "note: what is outside of the layers follows the order of registration here; the first batch shows who uses it",
)
_TIMED = "note: balance is 'time', which is measured with the first batch; shown is 'parameters'"


@dataclass(frozen=True, kw_only=True)
class StageTable:
    """The stages of a pipeline.

    Args:
        title: Ranks, stages, schedule and micro-batches.
        rows: Cells under :data:`COLUMNS`, one row a stage.
        notes: What a reader should know.
    """

    title: str
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]

    def parts(self) -> list[str | Table]:
        """What is printed."""
        return ["", self.title, table(COLUMNS, self.rows, right={0, 1, 3, 4, 5}), *self.notes]

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        return {"title": self.title, "stages": [dict(zip(COLUMNS, row, strict=True)) for row in self.rows]}


def describe_stages(module: nn.Module, settings: Mapping[str, Any], rows: Sequence[OperatorRow]) -> StageTable:
    """Which stage holds what.

    Args:
        module: The whole module.
        settings: Arguments of ``MoEtionStrategy(pipeline_parallel_size=...)``.
        rows: The module's operators.

    Raises:
        ConfigurationError: The module has no layers to cut between, too few, or settings contradict each other.
    """
    size = settings["pipeline_parallel_size"]
    chunks = settings.get("chunks_per_rank", 1)
    number = settings.get("num_microbatches") or size
    kind = schedule_kind(settings.get("schedule", "1f1b"), chunks, number, size)
    layout = PipelineLayout(
        world_size=size, pipeline_parallel_size=size, chunks_per_rank=chunks, v_shaped=kind.v_shaped
    )
    layers = find_layers(module, settings.get("layers"))
    wanted = settings.get("balance", "parameters")
    if isinstance(wanted, str):
        bounds = balance(layer_weights(module, layers), layout.num_stages)
    else:
        bounds = check_bounds(wanted, len(layers), layout.num_stages)
    title = f"pipeline of {size} ranks, {layout.num_stages} stages, schedule {kind.name}, {number} micro-batches"
    found: list[tuple[str, ...]] = []
    for stage, held in enumerate(_members(module, layers, bounds, rows)):
        elements, full = sum(row.elements for row in held), sum(row.full_bytes for row in held)
        numbers = (str(len(held)), f"{elements:,}", size_text(full))
        found.append((str(stage), str(layout.owner(stage)), _contents(layers, bounds, stage, held), *numbers))
    notes = (*_NOTES, _TIMED) if wanted == "time" else _NOTES
    return StageTable(title=title, rows=tuple(found), notes=notes)


def _contents(layers: LayerList, bounds: Sequence[int], stage: int, held: Sequence[OperatorRow]) -> str:
    last = (bounds[stage + 1] if stage + 1 < len(bounds) else len(layers)) - 1
    first = bounds[stage]
    own = layers.names[first] if first == last else f"{layers.names[first]} .. {layers.names[last]}"
    others = list(dict.fromkeys(_owner(row) for row in held if _layer_of(row, layers) is None))
    more = [f"{len(others) - _SHOWN} more"] if len(others) > _SHOWN else []
    return ", ".join([own, *others[:_SHOWN], *more])


def _members(
    module: nn.Module, layers: LayerList, bounds: Sequence[int], rows: Sequence[OperatorRow]
) -> list[list[OperatorRow]]:
    stage_of = [sum(bound <= index for bound in bounds[1:]) for index in range(len(layers))]
    names = [name for name, _ in module.named_modules()]
    first = names.index(layers.names[0])
    members: list[list[OperatorRow]] = [[] for _ in bounds]
    for row in rows:
        index = _layer_of(row, layers)
        if index is None:
            index = 0 if _registered(row, names) < first else len(layers) - 1
        members[stage_of[index]].append(row)
    return members


def _layer_of(row: OperatorRow, layers: LayerList) -> int | None:
    owner = _owner(row) + "."
    return next((index for index, name in enumerate(layers.names) if owner.startswith(name + ".")), None)


def _owner(row: OperatorRow) -> str:
    """The module of an operator: its name is ``MODULE/KIND...``."""
    return row.name.partition("/")[0]


def _registered(row: OperatorRow, names: Sequence[str]) -> int:
    owner = _owner(row)
    return names.index(owner) if owner in names else -1
