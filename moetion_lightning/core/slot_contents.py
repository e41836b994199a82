"""What one capture of a slot holds, and how it is put back.

Names of the tensors of a snapshot (``key`` is a :attr:`Piece.key`)::

    w:<key>             master weights (active capture)
    c:<key>             compute weights (frozen capture)
    s:<key>:<path>      a tensor that an optimizer keeps of the parameter (active capture)

What an optimizer keeps belongs to the optimizer *and* the parameter: several optimizers may have one parameter. How it
is put together from tensors and plain values travels as JSON ("scalars") beside the tensors, by parameter and by the
optimizer's index; ``path`` is a name in there (:mod:`.description`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from moetion_lightning.core.description import Described, Describer
from moetion_lightning.core.operators import Operator, Piece
from moetion_lightning.core.rebuilding import Rebuilder
from moetion_lightning.core.state import LiveState, state_of

__all__ = [
    "CopyItem",
    "SlotContents",
    "TensorLoader",
    "read_kept",
    "read_slot",
    "write_active",
    "write_compute",
    "write_kept",
]

TensorLoader: TypeAlias = Callable[[str], Tensor]


@dataclass(frozen=True, kw_only=True)
class CopyItem:
    """One tensor of a slot: where it comes from and how it is stored.

    Args:
        name: Name in the snapshot.
        source: Live tensor (a view), valid until the next optimizer step.
        dtype: Stored dtype; differs from the source's for compute weights.
    """

    name: str
    source: Tensor
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Stored size."""
        return self.source.numel() * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class SlotContents:
    """What one capture holds.

    Args:
        items: The tensors.
        scalars: By parameter and index of the optimizer: what that keeps of it, see :mod:`.description`.
    """

    items: tuple[CopyItem, ...]
    scalars: dict[str, Any]


def read_slot(
    live: LiveState,
    active: Sequence[Operator],
    frozen: Sequence[Operator],
    compute_dtype: Mapping[str, torch.dtype],
) -> SlotContents:
    """List what to copy for one slot; copies nothing.

    Args:
        live: The live state.
        active: Operators captured in full.
        frozen: Operators of which only the compute weights are captured.
        compute_dtype: Dtype that the forward consumes, by parameter name; missing means the parameter's own.

    Raises:
        UnsupportedStateError: An optimizer keeps something that cannot be captured.
    """
    items: list[CopyItem] = []
    scalars: dict[str, Any] = {}
    # Pieces are many, parameters few: what is the same for all pieces of a parameter is looked up once.
    weights: dict[str, Tensor] = {}
    kept: dict[str, list[Described]] = {}
    for op in active:
        for piece in op.pieces:
            name = piece.parameter
            if name not in kept:
                weights[name] = live.weight(name)
                scalars[name], kept[name] = _describe(live, name, weights[name])
            key, weight = piece.key, weights[name]
            items.append(CopyItem(name=f"w:{key}", source=piece.of(weight), dtype=weight.dtype))
            for path, tensor, rows in kept[name]:
                source = piece.of(tensor) if rows else tensor
                items.append(CopyItem(name=f"s:{key}:{path}", source=source, dtype=source.dtype))
    for op in frozen:
        for piece in op.pieces:
            name = piece.parameter
            if name not in weights:
                weights[name] = live.weight(name)
            weight = weights[name]
            dtype = compute_dtype.get(name, weight.dtype)
            items.append(CopyItem(name=f"c:{piece.key}", source=piece.of(weight), dtype=dtype))
    return SlotContents(items=tuple(items), scalars=scalars)


def read_kept(live: LiveState, names: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What optimizers keep of whole parameters: tensors by their names in a snapshot, and scalars; copies nothing.

    Args:
        live: The live state.
        names: The parameters; those that no optimizer has are left out.

    Raises:
        UnsupportedStateError: An optimizer keeps something that cannot be captured.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for name in names:
        if name in live.owners:
            scalars[name], found = _describe(live, name, live.weight(name))
            tensors.update({f"s:{name}:{path}": tensor for path, tensor, _ in found})
    return tensors, scalars


def _describe(live: LiveState, name: str, weight: Tensor) -> tuple[dict[str, Any], list[Described]]:
    """What all optimizers keep of a parameter, and the tensors in it."""
    describer = Describer(f"the optimizer's state of parameter {name!r}", weight)
    found: dict[str, Any] = {}
    for index, state in live.states(name):
        describer.prefix = str(index)
        found[str(index)] = {"state": describer.describe(state)}
    for index, attribute, value in live.tables(name):
        describer.prefix = str(index)
        tables = found.setdefault(str(index), {}).setdefault("tables", {})
        tables[attribute] = describer.describe(value, attribute)
    return found, describer.tensors


@torch.no_grad()
def write_active(
    live: LiveState, operators: Iterable[Operator], load: TensorLoader, scalars: Mapping[str, Any]
) -> None:
    """Put master weights and optimizer state of active operators back.

    Args:
        live: The live state to change in place.
        operators: The operators of the slot.
        load: Gives a stored tensor by name.
        scalars: The slot's scalars.
    """
    for op in operators:
        for piece in op.pieces:
            name = piece.parameter
            piece.of(live.weight(name)).copy_(load(f"w:{piece.key}"))
            write_kept(live, piece, load, scalars[name])


@torch.no_grad()
def write_kept(live: LiveState, piece: Piece, load: TensorLoader, saved: Mapping[str, Any]) -> None:
    """Put back what optimizers keep of a piece of a parameter, and remove what they did not keep then.

    Args:
        live: The live state to change in place.
        piece: The piece.
        load: Gives a stored tensor by name.
        saved: The parameter's scalars.
    """
    parameter = live.parameters[piece.parameter]
    rebuilder = Rebuilder(
        lambda path: load(f"s:{piece.key}:{path}"),
        parameter.device,
        parameter,
        None if piece.start is None else piece.of,
    )
    for index in sorted({*live.owners[piece.parameter], *map(int, saved)}):
        optimizer, entry = live.optimizers[index], saved.get(str(index), {})
        state: Any = state_of(optimizer)
        if "state" in entry:
            state[parameter] = _updated(state.get(parameter), rebuilder, entry["state"])
        elif index not in live.aliases and parameter in state:
            # No state yet when captured: whatever a frozen phase left there must go, so that it is made afresh.
            del state[parameter]
        tables = entry.get("tables", {})
        for attribute in {*live.table_names()[index], *tables}:
            table = vars(optimizer).setdefault(attribute, {})
            if attribute in tables:
                table[parameter] = rebuilder.rebuild(tables[attribute], table.get(parameter))
            else:
                table.pop(parameter, None)


def _updated(current: Any, rebuilder: Rebuilder, described: Mapping[str, Any]) -> Any:
    """The state of a parameter; a dict that is there stays the same object."""
    state = rebuilder.rebuild(described, current)
    if type(current) is dict and type(state) is dict:
        current.clear()
        current.update(state)
        return current
    return state


@torch.no_grad()
def write_compute(live: LiveState, operators: Iterable[Operator], load: TensorLoader, *, active: bool = False) -> None:
    """Put compute weights back (``active=True``: the master weights of an active capture, without optimizer state)."""
    prefix = "w" if active else "c"
    for op in operators:
        for piece in op.pieces:
            piece.of(live.weight(piece.parameter)).copy_(load(f"{prefix}:{piece.key}"))
