"""Digests of operators that are whole already while their window is still being captured, or replayed.

An operator that was captured in full in a slot trains on in the slots behind it. What its weights and optimizer state
are then is recorded in a sample; a replay, which has trained it from its capture on, must come to the same. That finds
state which an optimizer keeps where nobody captures it, within the window.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import xxhash
from torch import Tensor

from moetion_lightning.capture.fence import DeviceFence
from moetion_lightning.core.digests import sample_positions
from moetion_lightning.core.local import local
from moetion_lightning.core.operators import Operator, Piece
from moetion_lightning.core.policy import SlotPlan
from moetion_lightning.core.state import LiveState

__all__ = ["OperatorSamples", "choose_whole", "piece_at"]

_OPERATORS = 8  # in each iteration
_CANDIDATES = 32
_ELEMENTS = 32  # of each tensor


def choose_whole(
    live: LiveState, slots: Sequence[SlotPlan], slot: int, turn: int | None = None
) -> tuple[Operator, ...]:
    """Operators to look at after a slot's iteration: some of those that were captured in full before it.

    Every optimizer and every kind of operator is among them if there is room, and others in each slot.

    Args:
        live: The live state.
        slots: The window's plan.
        slot: Which slot.
        turn: Others are chosen in each; None: in each slot.
    """
    groups: dict[object, list[Operator]] = {}
    for op in _candidates(slots[:slot], slot if turn is None else turn):
        groups.setdefault((live.owners.get(op.pieces[0].parameter), op.kind), []).append(op)
    chosen: list[Operator] = []
    for turn in range(_OPERATORS):
        chosen += [ops[turn] for ops in groups.values() if turn < len(ops)]
    return tuple(chosen[:_OPERATORS])


def _candidates(slots: Sequence[SlotPlan], offset: int) -> Iterator[Operator]:
    """A few operators of each slot: the training thread asks, and a model may have thousands."""
    each = max(1, _CANDIDATES // max(1, len(slots)))
    for plan in slots[-_CANDIDATES:]:
        count = len(plan.active) or 1
        for index in dict.fromkeys((offset + turn * count // each) % count for turn in range(min(each, count))):
            yield from plan.active[index : index + 1]


def piece_at(op: Operator, iteration: int) -> Piece:
    """The piece of an operator that is looked at after an iteration."""
    return op.pieces[iteration % len(op.pieces)]


class OperatorSamples:
    """Samples of some operators' weights and optimizer state, taken now and read later.

    Args:
        live: The live state.
        operators: The operators; those whose parameters the live state does not have are left out.
        iteration: Completed iterations: of each operator another piece is looked at in turn.
        fence: Orders the copies behind training; its :meth:`~.DeviceFence.synchronize` comes before :meth:`read`.
    """

    def __init__(self, live: LiveState, operators: Iterable[Operator], iteration: int, fence: DeviceFence) -> None:
        self._samples: dict[str, list[tuple[str, Tensor]]] = {}
        self._sources: list[Tensor] = []  # kept until the samples have arrived
        for op in operators:
            piece = piece_at(op, iteration)
            if piece.parameter in live.owners:
                parts = _parts(live, piece)
                self._sources += parts.values()
                self._samples[op.name] = [
                    (entry, fence.fetch(part.device, functools.partial(_some, part))) for entry, part in parts.items()
                ]

    def read(self) -> dict[str, str]:
        """Digests by operator."""
        self._sources.clear()
        found = {}
        for name, samples in self._samples.items():
            digest = xxhash.xxh3_64()
            for entry, values in samples:
                digest.update(entry.encode())
                digest.update(values.cpu().view(torch.uint8).numpy().data)
            found[name] = digest.hexdigest()
        return found


@torch.no_grad()
def _some(flat: Tensor) -> Tensor:
    return flat.index_select(0, sample_positions(flat.numel(), flat.device, _ELEMENTS))


def _parts(live: LiveState, piece: Piece) -> dict[str, Tensor]:
    """The weight and what optimizers keep of its rows, by name, flat; what has no memory of its own is left out."""
    weight = live.weight(piece.parameter)
    tensors = {"": weight}
    for index, state in live.states(piece.parameter):
        if isinstance(state, Mapping):
            tensors |= {f"{index}.{name}": local(v) for name, v in state.items() if isinstance(v, Tensor)}
    tensors |= {
        f"{index}.{name}": local(value)
        for index, name, value in live.tables(piece.parameter)
        if isinstance(value, Tensor)
    }
    found = {}
    for entry, tensor in tensors.items():
        part = piece.of(tensor) if tensor.shape == weight.shape else tensor
        if type(part) is Tensor and part.is_contiguous() and part.numel():
            found[entry] = part.detach().view(-1)
    return found
