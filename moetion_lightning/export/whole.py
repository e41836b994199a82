"""The state of all ranks as one: shards joined, copies taken once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moetion_lightning.core.state import LiveState
from moetion_lightning.engine.restore import RestorePoint
from moetion_lightning.engine.run_state import EngineState
from moetion_lightning.errors import StateLostError, UnsupportedStateError
from moetion_lightning.export.bare import bare_module, make_optimizers
from moetion_lightning.export.rebuilt import RankState, layout_of, rebuild_rank
from moetion_lightning.export.source import Source

__all__ = ["WholeState", "whole_state"]


@dataclass(frozen=True, kw_only=True)
class WholeState:
    """What all ranks together held after the iteration, on the CPU.

    Args:
        module: Parameters and buffers by name, as a module without a forward.
        optimizers: The optimizers, whose parameters are the module's.
        ranks: Ranks whose state was put together.
        rebuilt: Iterations that were rebuilt from logged gradients.
        steps: Optimizer steps that were made, of all ranks.
        compared: Operators of which a sample was recorded, and is as recorded.
        notes: What else there is to know.
    """

    module: nn.Module
    optimizers: tuple[Optimizer, ...]
    ranks: tuple[int, ...]
    rebuilt: int
    steps: int
    compared: int
    notes: tuple[str, ...] = ()


def whole_state(
    source: Source, allowed: Collection[str], device: torch.device, say: Callable[[str], None]
) -> WholeState:
    """Rebuild the ranks one after the other, and join them.

    Args:
        source: The restore point.
        allowed: Classes of optimizers besides torch's own, as ``module.Class``.
        device: Where optimizers step.
        say: Gets progress.

    Raises:
        UnsupportedStateError: It cannot be put together without running training, or not joined.
        StateLostError: A part is missing.
    """
    points = [_point(source, rank) for rank in range(len(source.parts))]
    if points[0].run_state()["adapter"].get("pipeline"):
        raise UnsupportedStateError(
            "the stages of a pipeline cannot be joined offline: save an ordinary checkpoint from the training script."
        )
    needed = _needed(points)
    joiner = _Joiner(points[0], allowed) if len(needed) > 1 or layout_of(points[0])["shards"] else None
    states: list[RankState] = []
    rebuilt = steps = compared = 0
    for rank in needed:
        point = points[rank]
        count = len(point.extra["log"]) if point.is_log else 0
        logged = f" from captures and the gradients of up to {count} iterations" if count else ""
        say(f"putting together the state of rank {rank} of {len(points)}{logged}")
        state = rebuild_rank(point, allowed, device)
        rebuilt, steps = max(rebuilt, state.rebuilt), steps + state.steps
        compared += state.compared
        if joiner is None:
            states.append(state)
        else:
            joiner.add(state)
        point.close()
    live = states[0].live if joiner is None else joiner.whole()
    return WholeState(
        module=live.module,
        optimizers=live.optimizers,
        ranks=tuple(needed),
        rebuilt=rebuilt,
        steps=steps,
        compared=compared,
        notes=() if joiner is None else tuple(joiner.notes),
    )


def _point(source: Source, rank: int) -> RestorePoint:
    own = source.parts[rank]
    shares = [source.parts[other] for other in own.manifest.extra["shares"] if other != rank]
    return RestorePoint(own.manifest, own.tier, [(part.manifest, part.tier) for part in shares])


def _needed(points: Sequence[RestorePoint]) -> list[int]:
    """Ranks that hold, between them, every parameter: of ranks with the same copies one is enough."""
    found: set[int] = set()
    for rank, point in enumerate(points):
        if not all(_holders(point, name) & found for name in point.extra["parameters"]):
            found.add(rank)
    return sorted(found)


def _holders(point: RestorePoint, name: str) -> set[int]:
    """Ranks that hold the same bytes of what a rank holds of a parameter, itself included."""
    holders = point.extra["holders"]
    index = holders["of"].get(name)
    return set(range(point.manifest.world_size)) if index is None else set(holders["sets"][index])


class _Joiner:
    """Shards of several ranks on their way into whole tensors.

    Args:
        point: Rank 0's restore point: its groups, settings and buffers are taken.
        allowed: Classes of optimizers besides torch's own.
    """

    def __init__(self, point: RestorePoint, allowed: Collection[str]) -> None:
        layout = layout_of(point)
        self._engine = EngineState.of(point)
        tree = self._engine.tree
        forms = {
            name: (getattr(torch, dtype), layout["shards"].get(name, [shape])[0])
            for name, (dtype, shape) in point.extra["parameters"].items()
        }
        module = bare_module(forms, tree["buffers"], layout["tied"], layout["transient"], torch.device("cpu"))
        parameters = dict(module.named_parameters())
        self._live = LiveState(module, make_optimizers(layout["optimizers"], tree["groups"], parameters, allowed))
        self._engine.apply_structure(self._live)
        self._covered: dict[str, dict[tuple[int, ...], tuple[int, int]]] = {}
        self._ranks: set[int] = set()
        #: What there is to know of ranks that differ.
        self.notes: list[str] = []

    @torch.no_grad()
    def add(self, state: RankState) -> None:
        """Copy what a rank holds.

        Raises:
            UnsupportedStateError: It cannot be joined with the others'.
        """
        shards, rank = layout_of(state.point)["shards"], state.point.manifest.rank
        ours = dict(self._live.module.named_buffers())
        others = [n for n, b in state.live.module.named_buffers() if n in ours and not torch.equal(b, ours[n])]
        if others:
            shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
            self.notes.append(f"rank {rank} holds other values of the buffers {shown}: those of rank 0 are taken")
        for name, parameter in state.live.parameters.items():
            shape, start = shards.get(name, [list(parameter.shape), [0] * parameter.dim()])
            target = self._live.parameters.get(name)
            if target is None or list(target.shape) != shape or start is None:
                raise UnsupportedStateError(
                    f"rank {rank} holds a part {tuple(parameter.shape)} of the parameter {name!r} that cannot be "
                    "joined with the other ranks': only copies, shards along one dimension of a mesh (FSDP2), and rows "
                    "of stacked experts can. Save an ordinary checkpoint from the training script."
                )
            if self._ranks & _holders(state.point, name):
                continue  # a copy of what another one has
            known = self._covered.setdefault(name, {})
            if name not in shards and known:
                (other, _), *_ = known.values()
                raise UnsupportedStateError(
                    f"the ranks {other} and {rank} hold different parameters of the name {name!r} (experts spread over "
                    "ranks, perhaps), which cannot be joined offline. Save an ordinary checkpoint from the training "
                    "script."
                )
            known.setdefault(tuple(start), (rank, parameter.numel()))
            box = tuple(slice(first, first + size) for first, size in zip(start, parameter.shape))
            target[box].copy_(parameter)
            if parameter.numel() and name in state.live.owners:
                for index, kept in state.live.states(name):
                    whole = self._live.optimizers[index].state
                    whole[target] = _joined(whole.get(target), kept, parameter, target, box, name)
        self._ranks.add(rank)

    def whole(self) -> LiveState:
        """The joined state.

        Raises:
            StateLostError: Elements of a parameter are missing.
        """
        for name, parameter in self._live.parameters.items():
            count = sum(numel for _, numel in self._covered.get(name, {}).values())
            if count != parameter.numel():
                raise StateLostError(
                    f"the ranks' shards of the parameter {name!r} have {count} of {parameter.numel()} elements. "
                    "Nothing was written."
                )
        self._engine.apply_optimizers(self._live)
        self._live.refresh()
        self._engine.apply_order(self._live)
        return self._live


def _joined(old: Any, value: Any, part: Tensor, whole: Tensor, box: tuple[slice, ...], name: str) -> Any:
    """What an optimizer keeps of a shard, put into what it keeps of the whole parameter."""
    if isinstance(value, Tensor) and value.shape == part.shape and value.dim():
        target = old if isinstance(old, Tensor) else torch.zeros(whole.shape, dtype=value.dtype)
        target[box].copy_(value)
        return target
    if isinstance(value, Tensor) and value.numel() > 1:
        raise UnsupportedStateError(
            f"an optimizer keeps a tensor {tuple(value.shape)} of a shard {tuple(part.shape)} of the parameter "
            f"{name!r}, which cannot be joined with the other ranks'. Save an ordinary checkpoint from the training "
            "script."
        )
    if isinstance(value, Mapping):
        before = old or {}
        return {key: _joined(before.get(key), item, part, whole, box, name) for key, item in value.items()}
    return value if old is None else old
