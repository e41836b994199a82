"""Cuts the trainable state of a module into operators.

Experts and gates come from :mod:`moetion_lightning.core.discovery`; everything else is shared state, split by the
module that owns it. Together the operators hold every element of every trainable parameter exactly once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from moetion_lightning.core.layouts import MoELayer
from moetion_lightning.core.local import local, to_local_rows
from moetion_lightning.core.operators import Operator, OperatorKind, Piece, clean_name
from moetion_lightning.errors import OperatorError

__all__ = ["OperatorSet", "build_operators", "check_partition"]


@dataclass(frozen=True, kw_only=True)
class OperatorSet:
    """The operators of a module.

    Args:
        operators: Experts of each layer, its gate, then shared state; the order is that of the module.
        layers: The MoE layers they come from; empty for a dense model.
        static: Parameters that never train, in no window.
        unsliced: Fused expert parameters whose optimizer couples rows, so that all experts of the layer are one
            operator. The caller should say so.
    """

    operators: tuple[Operator, ...]
    layers: tuple[MoELayer, ...]
    static: tuple[str, ...]
    unsliced: tuple[str, ...] = ()


class _Claims:
    """Which rows of which trainable parameter already belong to an operator."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], trainable: Collection[str]) -> None:
        # One byte a row: an embedding has hundreds of thousands of them.
        self.rows = {name: bytearray(shape[0] if shape else 1) for name, shape in shapes.items() if name in trainable}

    def take(self, pieces: Iterable[Piece]) -> tuple[Piece, ...]:
        """Claim what is trainable and still free; a tied or shared parameter stays with its first owner."""
        taken = []
        for piece in pieces:
            rows = self.rows.get(piece.parameter)
            if rows is None:
                continue
            start, stop = (0, len(rows)) if piece.start is None or piece.stop is None else (piece.start, piece.stop)
            free = rows[start:stop]
            if not free or any(free):
                continue
            rows[start:stop] = b"\1" * len(free)
            taken.append(piece)
        return tuple(taken)

    def leftovers(self, name: str) -> list[Piece]:
        """Pieces that hold the rows nobody claimed."""
        rows = self.rows[name]
        if not any(rows):
            return [Piece(parameter=name)]
        pieces, stop = [], 0
        while (start := rows.find(0, stop)) >= 0:
            stop = rows.find(1, start)
            stop = len(rows) if stop < 0 else stop
            pieces.append(Piece(parameter=name, start=start, stop=stop))
        return pieces


def build_operators(
    module: nn.Module,
    layers: Sequence[MoELayer],
    *,
    trainable: Collection[str],
    sliceable: Callable[[str], bool],
    offsets: Mapping[str, int] | None = None,
    held: Container[str] | None = None,
) -> OperatorSet:
    """Cut the trainable parameters of a module into operators.

    Of distributed parameters an operator owns this process's shard: the cut is made in global rows, so that names are
    the same everywhere, and then brought to local rows.

    Args:
        module: Any module; a dense one gives shared operators only.
        layers: Its MoE layers, from ``discover_layers``, or those that the token counter confirmed.
        trainable: Names of the parameters that an optimizer updates (tied ones under any of their names).
        sliceable: Whether rows of a parameter may be cut apart, that is, whether its optimizer works element by
            element. Asked for the canonical name.
        offsets: Global row of the first local row of each distributed parameter, by canonical name.
        held: Canonical names of the parameters that this process holds; the others get no operator and are not static
            either. None: all.

    Returns:
        The operators, in a deterministic order; they partition the trainable parameters.

    Raises:
        OperatorError: A name in ``trainable`` is no parameter, or the result is no partition (a layer description
            that does not fit the module).
    """
    parameters = {name: parameter for name, parameter in module.named_parameters() if not is_lazy(parameter)}
    canonical = {id(parameter): name for name, parameter in parameters.items()}
    aliases = {
        name: canonical[id(p)] for name, p in module.named_parameters(remove_duplicate=False) if id(p) in canonical
    }
    unknown = sorted(name for name in trainable if name not in aliases)
    if unknown:
        raise OperatorError(
            f"trainable names {unknown[:5]} that {type(module).__name__} does not have; expected names from "
            "named_parameters() of this very module"
        )
    training = {aliases[name] for name in trainable}
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    claims = _Claims(shapes, training)

    operators: list[Operator] = []
    unsliced: list[str] = []
    for layer in layers:
        # A description may use any alias of a tied parameter; operators speak canonical names only.
        experts = [[_renamed(piece, aliases, module) for piece in pieces] for pieces in layer.experts]
        container = clean_name(layer.experts_module) or "(root)"
        coupled = _coupled([piece for pieces in experts for piece in pieces], training, sliceable)
        for index, pieces in enumerate(experts):
            taken = claims.take(piece for piece in pieces if piece.parameter not in coupled)
            if taken:
                name = f"{container}/expert/{index}"
                operators.append(
                    Operator(name=name, kind=OperatorKind.EXPERT, pieces=taken, layer=layer.name, expert=index)
                )
        whole = claims.take(Piece(parameter=name) for name in coupled)
        if whole:
            unsliced.extend(piece.parameter for piece in whole)
            operators.append(
                Operator(name=f"{container}/experts", kind=OperatorKind.EXPERT, pieces=whole, layer=layer.name)
            )
        gate = claims.take(_renamed(piece, aliases, module) for piece in layer.gate)
        if gate:
            operators.append(
                Operator(name=f"{layer.name or '(root)'}/gate", kind=OperatorKind.GATE, pieces=gate, layer=layer.name)
            )

    operators.extend(_shared(claims))
    check_partition(operators, shapes, training)
    static = tuple(name for name in parameters if name not in training and (held is None or name in held))
    mine = _localized(operators, parameters, offsets or {})
    return OperatorSet(operators=mine, layers=tuple(layers), static=static, unsliced=tuple(unsliced))


def _localized(
    operators: Sequence[Operator], parameters: Mapping[str, nn.Parameter], offsets: Mapping[str, int]
) -> tuple[Operator, ...]:
    """Operators in rows of this process; those of which it holds nothing are left out.

    An empty shard goes, whole, to the first operator that would have rows of it: its optimizer state has a step count.
    """
    if not offsets:
        return tuple(operators)
    found = []
    empty: set[str] = set()
    for op in operators:
        pieces = []
        for piece in op.pieces:
            name = piece.parameter
            if name not in offsets:
                pieces.append(piece)
                continue
            shard = local(parameters[name])
            if not shard.numel():
                if name not in empty:
                    empty.add(name)
                    pieces.append(Piece(parameter=name))
                continue
            if piece.start is None or piece.stop is None:
                pieces.append(piece)
                continue
            rows = to_local_rows(piece.start, piece.stop, offsets[name], shard.shape[0])
            if rows is not None:
                pieces.append(Piece(parameter=name, start=rows[0], stop=rows[1]))
        if pieces:
            found.append(dataclasses.replace(op, pieces=tuple(pieces)))
    return tuple(found)


def _renamed(piece: Piece, aliases: Mapping[str, str], module: nn.Module) -> Piece:
    name = aliases.get(piece.parameter)
    if name is None:
        raise OperatorError(
            f"an MoE layer names the parameter {piece.parameter!r}, which {type(module).__name__} does not have; "
            "discover the layers of this very module, after it is wrapped"
        )
    return piece if name == piece.parameter else dataclasses.replace(piece, parameter=name)


def _coupled(pieces: Iterable[Piece], training: Collection[str], sliceable: Callable[[str], bool]) -> list[str]:
    """Sliced parameters whose optimizer forbids slicing, in order, once each."""
    sliced = dict.fromkeys(p.parameter for p in pieces if p.start is not None and p.parameter in training)
    return [name for name in sliced if not sliceable(name)]


def _shared(claims: _Claims) -> list[Operator]:
    """Everything that is still free, one operator for each module that owns some of it."""
    groups: dict[str, list[Piece]] = {}
    for name in claims.rows:
        pieces = claims.leftovers(name)
        if pieces:
            owner = clean_name(name).rpartition(".")[0] or "(root)"
            groups.setdefault(owner, []).extend(pieces)
    return [
        Operator(name=f"{owner}/shared", kind=OperatorKind.SHARED, pieces=tuple(pieces))
        for owner, pieces in groups.items()
    ]


def check_partition(
    operators: Sequence[Operator], shapes: Mapping[str, tuple[int, ...]], trainable: Collection[str]
) -> None:
    """Check that every element of every trainable parameter is in exactly one operator.

    Args:
        operators: The operators, in any order.
        shapes: Shape of each parameter, by canonical name.
        trainable: Canonical names of the parameters that must be covered.

    Raises:
        OperatorError: Rows in no operator or in two, a piece outside its parameter, of an unknown or untrained
            parameter, an operator without pieces, or two operators of one name. Names the parameter and the rows.
    """
    names: set[str] = set()
    owners: dict[str, list[tuple[int, int, str]]] = {name: [] for name in trainable}
    for operator in operators:
        if operator.name in names:
            raise OperatorError(f"two operators are named {operator.name!r}; names must be unique")
        if not operator.pieces:
            raise OperatorError(f"operator {operator.name!r} owns nothing; leave it out")
        names.add(operator.name)
        for piece in operator.pieces:
            if piece.parameter not in shapes or piece.parameter not in owners:
                state = "does not train" if piece.parameter in shapes else "does not exist"
                raise OperatorError(f"operator {operator.name!r} owns {piece.key!r}, which {state}")
            shape = shapes[piece.parameter]
            rows = shape[0] if shape else 1
            if piece.stop is not None and (not shape or piece.stop > rows):
                raise OperatorError(
                    f"operator {operator.name!r} owns {piece.key!r}, but the parameter has shape {tuple(shape)}"
                )
            start, stop = (0, rows) if piece.start is None or piece.stop is None else (piece.start, piece.stop)
            owners[piece.parameter].append((start, stop, operator.name))
    for name, spans in owners.items():
        if name not in shapes:
            raise OperatorError(f"trainable parameter {name!r} has no shape; expected a parameter of the module")
        _check_spans(name, shapes[name], spans)


def _check_spans(name: str, shape: tuple[int, ...], spans: list[tuple[int, int, str]]) -> None:
    rows = shape[0] if shape else 1
    remedy = "report the layout with `moetion explain`, or describe it with a MoESpec"
    if not spans:
        raise OperatorError(f"parameter {name!r}, rows [0:{rows}], belongs to no operator; {remedy}")
    covered, last_owner = 0, ""
    for start, stop, owner in sorted(spans):
        if start < covered or (start == stop == covered and last_owner):
            raise OperatorError(
                f"parameter {name!r}, rows [{start}:{min(stop, covered)}], belongs to both {last_owner!r} and "
                f"{owner!r}; {remedy}"
            )
        if start > covered:
            raise OperatorError(f"parameter {name!r}, rows [{covered}:{start}], belongs to no operator; {remedy}")
        covered, last_owner = stop, owner
    if covered < rows:
        raise OperatorError(f"parameter {name!r}, rows [{covered}:{rows}], belongs to no operator; {remedy}")
