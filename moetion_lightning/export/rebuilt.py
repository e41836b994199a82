"""The state of one rank, put together offline."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetion_lightning.core.state import LiveState, state_of
from moetion_lightning.engine.completeness import check_complete
from moetion_lightning.engine.log_recovery import compare_rebuilt
from moetion_lightning.engine.restore import RestorePoint
from moetion_lightning.engine.run_state import EngineState
from moetion_lightning.errors import ForeignWindowError, MoEtionError, NonDeterminismError, UnsupportedStateError
from moetion_lightning.export.bare import bare_module, make_optimizers
from moetion_lightning.gradient_log.rebuild import Capture, rebuild

__all__ = ["RankState", "layout_of", "rebuild_rank"]


@dataclass(frozen=True, kw_only=True)
class RankState:
    """What a rank held after the iteration.

    Args:
        point: Where it came from.
        live: Its parameters and optimizers.
        rebuilt: Iterations that were rebuilt from logged gradients.
        steps: Optimizer steps that were made.
        compared: Operators of which a sample was recorded, and is as recorded.
    """

    point: RestorePoint
    live: LiveState
    rebuilt: int
    steps: int
    compared: int


def layout_of(point: RestorePoint) -> Mapping[str, Any]:
    """What the manifest says of module and optimizers.

    Raises:
        ForeignWindowError: It says nothing.
    """
    layout: Mapping[str, Any] | None = point.extra.get("layout")
    if layout is None:
        raise ForeignWindowError(
            f"{point.name} (rank {point.manifest.rank}) was captured by a version that cannot export. Start the "
            "training script again: the restore points that it commits then can be exported."
        )
    return layout


def rebuild_rank(point: RestorePoint, allowed: Collection[str], device: torch.device) -> RankState:
    """Put one rank's state together, with the optimizers' own steps.

    Args:
        point: Its restore point, with the shares of other ranks.
        allowed: Classes of optimizers besides torch's own, as ``module.Class``.
        device: Where optimizers step; the state comes back on the CPU.

    Raises:
        UnsupportedStateError: It cannot be put together without running training.
        StateLostError, ForeignWindowError: It is not whole.
        NonDeterminismError: It is not what was recorded of it.
    """
    layout = layout_of(point)
    _check_kind(point, layout)
    state = EngineState.of(point)
    forms = {name: (getattr(torch, d), shape) for name, (d, shape) in point.extra["parameters"].items()}
    module = bare_module(forms, state.tree["buffers"], layout["tied"], layout["transient"], device)
    parameters = dict(module.named_parameters())
    optimizers = make_optimizers(layout["optimizers"], state.tree["groups"], parameters, allowed)
    live = LiveState(module, optimizers)
    check_complete(point, live, point.manifest.world_size)
    state.apply_structure(live)
    point.apply_static(live)
    captures = _captures(point, live)
    iteration = point.manifest.iteration
    try:
        steps = rebuild(live, captures, point.logged() if point.is_log else (), iteration)
    except MoEtionError:
        raise
    except Exception as error:  # of an optimizer's own step
        raise UnsupportedStateError(
            f"an optimizer's step failed on the device {device} ({type(error).__name__}: {error}); the run was on "
            f"{layout['device']}. Export on a machine with such a device: --device {layout['device']}"
        ) from error
    state.apply_optimizers(live)
    live.refresh()
    state.apply_order(live)
    compared = _compare(point, live, captures, device)
    _to_cpu(live)
    oldest = min((capture.iteration for capture in captures), default=iteration)
    return RankState(point=point, live=live, rebuilt=iteration - oldest, steps=steps, compared=compared)


def _check_kind(point: RestorePoint, layout: Mapping[str, Any]) -> None:
    """Refuse what is whole only after a replay, or never."""
    manifest = point.manifest
    if manifest.policy == "partial" and (len(manifest.slots) > 1 or point.extra.get("carried")):
        raise UnsupportedStateError(
            f"{point.name} is LOSSY: some of its experts are older than the others, and no ordinary checkpoint of one "
            "iteration can be made of it. Start the training script again to continue from it, or train with "
            "GradientLogCheckpoint."
        )
    if not point.is_log and (len(manifest.slots) != 1 or manifest.slots[0]["frozen"]):
        raise UnsupportedStateError(
            f"{point.name} is sparse: its state is whole only after its {len(manifest.slots)} iterations were run "
            "again, with the model and the data. Start the training script again: it replays them, and can then save a "
            "checkpoint. Restore points of GradientLogCheckpoint and DenseInMemoryCheckpoint can be exported."
        )
    if layout["given"] < len(layout["optimizers"]):
        names = ", ".join(name.partition(":")[2] for name in layout["optimizers"])
        raise UnsupportedStateError(
            f"{point.name}: an optimizer works inside another one ({names}), which cannot be made without the training "
            "script. Save an ordinary checkpoint from there."
        )
    taken_apart = [name for name, value in point.static().items() if not name.startswith(".") and not _plain(value)]
    if taken_apart:
        raise UnsupportedStateError(
            f"{point.name}: the frozen parameter {taken_apart[0]!r} is of a tensor subclass (quantised, perhaps), of "
            "which no ordinary checkpoint can be made here. Save one from the training script."
        )


def _plain(value: object) -> bool:
    return isinstance(value, Tensor)


def _captures(point: RestorePoint, live: LiveState) -> tuple[Capture, ...]:
    if point.is_log:
        return point.captures(live.parameters)
    (slot,) = point.slots(live.parameters)
    return (Capture(iteration=slot.iteration, operators=slot.active, scalars=slot.scalars, load=slot.load),)


def _compare(point: RestorePoint, live: LiveState, captures: tuple[Capture, ...], device: torch.device) -> int:
    """Compare with what was recorded. Returns of how many operators."""
    found = compare_rebuilt(point, live, captures)
    if found.differences:
        layout = layout_of(point)
        raise NonDeterminismError(
            f"{point.name} (rank {point.manifest.rank}) was rebuilt differently from what was recorded: "
            f"{found.differences[0]}. It was captured with torch {layout['torch']} on {layout['device']}, and rebuilt "
            f"with torch {torch.__version__} on {device}: optimizers round differently elsewhere. Nothing was written. "
            f"Export with that version, on a machine with such a device (--device {layout['device']})."
        )
    return len(found.operators)


def _to_cpu(live: LiveState) -> None:
    for tensor in (*live.parameters.values(), *live.module.buffers()):
        tensor.data = tensor.data.cpu()
    for optimizer in live.optimizers:
        state: Any = state_of(optimizer)
        for key in list(state):
            state[key] = _moved(state[key])


def _moved(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if type(value) is dict:
        return {key: _moved(item) for key, item in value.items()}
    return type(value)(map(_moved, value)) if type(value) in (list, tuple) else value
