"""What one capture of a slot holds, and how it is put back.

Names of the tensors of a snapshot (``key`` is a :attr:`Piece.key`, of neighbouring rows as one)::

    w:<key>             master weights (active capture)
    c:<key>             compute weights (frozen capture)
    s:<key>:<path>      a tensor that an optimizer keeps of the parameter (active capture); of what has no rows, the key
                        is the parameter's name

What an optimizer keeps belongs to the optimizer *and* the parameter: several optimizers may have one parameter. How it
is put together from tensors and plain values travels as JSON ("scalars") beside the tensors, by parameter and by the
optimizer's index; ``path`` is a name in there (:mod:`.description`).
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from moetion_lightning.core.description import Described, Describer
from moetion_lightning.core.operators import Operator, Piece
from moetion_lightning.core.rebuilding import Rebuilder
from moetion_lightning.core.state import LiveState, state_of

__all__ = [
    "StoredNames",
    "StoredTensors",
    "TensorLoader",
    "describe_kept",
    "neighbours_joined",
    "parameter_of",
    "read_kept",
    "write_active",
    "write_compute",
    "write_kept",
]

TensorLoader: TypeAlias = Callable[[str], Tensor]
_ROWS = re.compile(r"\[(\d+):(\d+)\]$")


def neighbours_joined(operators: Iterable[Operator]) -> dict[str, tuple[Piece, ...]]:
    """The pieces of operators by parameter, those that lie side by side as one."""
    found: dict[str, list[Piece]] = {}
    for op in operators:
        for piece in op.pieces:
            found.setdefault(piece.parameter, []).append(piece)
    return {name: tuple(_joined(pieces)) for name, pieces in found.items()}


def _joined(pieces: list[Piece]) -> list[Piece]:
    if len(pieces) == 1 or any(piece.start is None for piece in pieces):
        return pieces[:1] if any(piece.start is None for piece in pieces) else pieces
    ranges: list[list[int]] = []
    for start, stop in sorted((piece.start or 0, piece.stop or 0) for piece in pieces):
        if ranges and ranges[-1][1] == start:
            ranges[-1][1] = stop
        else:
            ranges.append([start, stop])
    return [Piece(parameter=pieces[0].parameter, start=start, stop=stop) for start, stop in ranges]


class StoredNames:
    """Where the tensors that operators ask for are among stored ones: rows of a joined piece are found in it.

    Args:
        names: The names of the stored tensors.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._joined: dict[tuple[str, str, str], list[tuple[int, int, str]]] = {}
        for name in self._names:
            kind, parameter, rows, path = _parsed(name)
            if rows is not None:
                self._joined.setdefault((kind, parameter, path), []).append((*rows, name))
        for ranges in self._joined.values():
            ranges.sort(key=lambda entry: entry[0])

    def find(self, name: str) -> tuple[str, int | None, int | None]:
        """The stored tensor by a name, and the rows of it.

        Raises:
            KeyError: Nothing is stored by that name.
        """
        if name in self._names:
            return name, None, None
        kind, parameter, rows, path = _parsed(name)
        if rows is not None:
            ranges = self._joined.get((kind, parameter, path), [])
            at = bisect.bisect_right(ranges, rows[0], key=lambda entry: entry[0]) - 1
            if at >= 0 and rows[1] <= ranges[at][1]:
                start, _, stored = ranges[at]
                return stored, rows[0] - start, rows[1] - start
            whole = f"s:{parameter}:{path}"
            if kind == "s" and whole in self._names:  # of the whole parameter, stored once
                return whole, None, None
        raise KeyError(name)


class StoredTensors:
    """The tensors of slots by the names that operators ask for.

    Args:
        tensors: The stored tensors by name.
        names: Of the same; None: they are looked at here.
    """

    def __init__(self, tensors: Mapping[str, Tensor], names: StoredNames | None = None) -> None:
        self._tensors = tensors
        self._names = StoredNames(tensors) if names is None else names

    def load(self, name: str) -> Tensor:
        """A stored tensor, or rows of one.

        Raises:
            KeyError: Nothing is stored by that name.
        """
        stored, start, stop = self._names.find(name)
        tensor = self._tensors[stored]
        return tensor if start is None else tensor[start:stop]


def _parsed(name: str) -> tuple[str, str, tuple[int, int] | None, str]:
    """Kind, parameter, rows and path of a stored tensor's name."""
    kind, _, key = name.partition(":")
    path = ""
    if kind == "s":
        key, _, path = key.rpartition(":")
    rows = _ROWS.search(key)
    if rows is None:
        return kind, key, None, path
    return kind, key[: rows.start()], (int(rows[1]), int(rows[2])), path


def parameter_of(name: str) -> str:
    """The parameter that a stored tensor belongs to."""
    return _parsed(name)[1]


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
            scalars[name], found = describe_kept(live, name, live.weight(name))
            tensors.update({f"s:{name}:{path}": tensor for path, tensor, _ in found})
    return tensors, scalars


def describe_kept(live: LiveState, name: str, weight: Tensor) -> tuple[dict[str, Any], list[Described]]:
    """What all optimizers keep of a parameter, and the tensors in it.

    Raises:
        UnsupportedStateError: One of them keeps something that cannot be captured.
    """
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
