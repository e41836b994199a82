"""Order of the operators and byte-balanced slots. Pure functions: same input, same output, on every rank.

An operator is seen here only through its costs: ``full_bytes`` (master weights and optimizer state, captured once, when
the operator is *active*) and ``compute_bytes`` (the weights that the forward consumes, captured in every iteration of
the window before that, while the operator is *frozen*). Iteration ``k`` of a window therefore costs

    cost(k) = sum(full_bytes of G_k) + sum(compute_bytes of G_{k+1} .. G_{W-1}).

Source: MoEtion / MoEvement, Algorithm 1 (OrderOperators, GenerateSchedule); balanced by bytes instead of by operator
count.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from moetion_lightning.core.operators import Operator, OperatorKind, Piece
from moetion_lightning.errors import ConfigurationError

__all__ = [
    "Schedule",
    "fractional_bound",
    "make_schedule",
    "order_operators",
    "split_operators",
    "window_bytes",
]

#: An operator may take at most this share of the heaviest iteration's bytes; larger ones are cut into row ranges.
#: It bounds the distance of the packed schedule from the fractional optimum.
MAX_SHARE = 0.05

_KIND_ORDER = {OperatorKind.EXPERT: 0, OperatorKind.GATE: 1, OperatorKind.SHARED: 2}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """An ordered partition of the operators into slots.

    Args:
        slots: Slot ``k`` holds the operators that are active in the window's ``k``-th iteration.
        slot_bytes: Bytes captured in each iteration of the window.
        dense_bytes: Bytes of one dense snapshot (all operators in full).
    """

    slots: tuple[tuple[Operator, ...], ...]
    slot_bytes: tuple[int, ...]
    dense_bytes: int

    @property
    def window(self) -> int:
        """Number of iterations of a window."""
        return len(self.slots)

    @property
    def heaviest_bytes(self) -> int:
        """Bytes of the heaviest iteration."""
        return max(self.slot_bytes)

    @property
    def total_bytes(self) -> int:
        """Bytes of a whole window."""
        return sum(self.slot_bytes)

    def padded(self, window: int) -> Schedule:
        """This schedule with as many iterations as another rank needs: in the last ones nothing is captured."""
        missing = window - self.window
        return replace(self, slots=self.slots + ((),) * missing, slot_bytes=self.slot_bytes + (0,) * missing)

    def frozen(self, slot: int) -> tuple[Operator, ...]:
        """Operators captured as frozen in iteration ``slot`` of the window."""
        return self._frozen[slot]

    @functools.cached_property
    def _frozen(self) -> list[tuple[Operator, ...]]:
        """Of all slots: a window of thousands of operators asks for the same ones each time."""
        later: tuple[Operator, ...] = ()
        found = []
        for active in reversed(self.slots):
            found.append(later)
            later = active + later
        return found[::-1]


def order_operators(operators: Sequence[Operator], tokens: Mapping[tuple[str, int], int]) -> tuple[Operator, ...]:
    """Experts by ascending popularity, then gates, then shared operators.

    Popular experts come late, so that they stay frozen (cheap) longest in a replay.

    Args:
        operators: The operators, in their canonical order (which breaks ties).
        tokens: Tokens routed to ``(layer, expert)`` in the rolling window; missing means 0.
    """

    def key(item: tuple[int, Operator]) -> tuple[int, int, int]:
        index, op = item
        routed = tokens.get((op.layer or "", op.expert), 0) if op.expert is not None else 0
        return _KIND_ORDER[op.kind], routed, index

    return tuple(op for _, op in sorted(enumerate(operators), key=key))


def split_operators(
    operators: Sequence[Operator],
    *,
    full_bytes: Mapping[str, int],
    rows: Mapping[str, int],
    sliceable: Mapping[str, bool],
    max_bytes: int,
) -> tuple[Operator, ...]:
    """Cut operators larger than ``max_bytes`` into several, by pieces first and by rows where a piece is still too big.

    Args:
        operators: What to cut.
        full_bytes: Bytes of a whole parameter with its optimizer state.
        rows: Size of dimension 0 of each parameter (1 for 0-d parameters).
        sliceable: Whether rows of a parameter may be cut apart (elementwise optimizer).
        max_bytes: Largest size of a resulting operator, as far as rows allow.
    """
    result: list[Operator] = []
    for op in operators:
        chunks: list[list[Piece]] = [[]]
        filled = 0
        for piece in op.pieces:
            for part in _cut_piece(piece, full_bytes, rows, sliceable, max_bytes):
                size = _piece_bytes(part, full_bytes, rows)
                if chunks[-1] and filled + size > max_bytes:
                    chunks.append([])
                    filled = 0
                chunks[-1].append(part)
                filled += size
        if len(chunks) == 1:
            result.append(op)
        else:
            for number, chunk in enumerate(chunks):
                result.append(replace(op, name=f"{op.name}#{number}", pieces=tuple(chunk)))
    return tuple(result)


def _piece_bytes(piece: Piece, full_bytes: Mapping[str, int], rows: Mapping[str, int]) -> int:
    total = full_bytes[piece.parameter]
    if piece.start is None or piece.stop is None:
        return total
    return total * (piece.stop - piece.start) // max(1, rows[piece.parameter])


def _cut_piece(
    piece: Piece,
    full_bytes: Mapping[str, int],
    rows: Mapping[str, int],
    sliceable: Mapping[str, bool],
    max_bytes: int,
) -> list[Piece]:
    size = _piece_bytes(piece, full_bytes, rows)
    start = piece.start or 0
    stop = rows[piece.parameter] if piece.stop is None else piece.stop
    count = min(stop - start, math.ceil(size / max(1, max_bytes)))
    if count <= 1 or not sliceable[piece.parameter]:
        return [piece]
    edges = [start + (stop - start) * i // count for i in range(count + 1)]
    return [Piece(parameter=piece.parameter, start=a, stop=b) for a, b in zip(edges, edges[1:])]


def fractional_bound(full: Sequence[int], compute: Sequence[int], window: int) -> float:
    """Smallest possible bytes of the heaviest iteration if operators, kept in order, could be cut anywhere.

    Args:
        full: Bytes of each operator when active.
        compute: Bytes of each operator when frozen; at most ``full`` of the same operator.
        window: Number of slots.
    """
    costs = _Prefix(full, compute)
    low, high = float(costs.compute[-1]), float(costs.full[-1])
    for _ in range(60):
        middle = (low + high) / 2
        if _fits_fractionally(costs, window, middle):
            high = middle
        else:
            low = middle
    return high


class _Prefix:
    """Prefix sums: ``gain`` is what capturing an operator costs beyond its frozen capture."""

    def __init__(self, full: Sequence[int], compute: Sequence[int]) -> None:
        self.full = [0, *accumulate(full)]
        self.compute = [0, *accumulate(compute)]
        self.gain = [f - c for f, c in zip(self.full, self.compute)]


def _fits_fractionally(costs: _Prefix, window: int, cap: float) -> bool:
    count = len(costs.full) - 1
    position = 0.0  # in operators; the fraction is the share of an operator that is already captured
    for _ in range(window):
        index, part = int(position), position - int(position)
        captured = float(costs.compute[index])
        gained = float(costs.gain[index])
        if part:
            captured += part * (costs.compute[index + 1] - costs.compute[index])
            gained += part * (costs.gain[index + 1] - costs.gain[index])
        room = cap - (costs.compute[-1] - captured)
        if room < 0:
            return False
        target = gained + room
        if target >= costs.gain[-1]:
            return True
        index = bisect_right(costs.gain, target) - 1
        step = costs.gain[index + 1] - costs.gain[index]
        moved = index + (target - costs.gain[index]) / step
        if moved <= position:
            return False
        position = min(moved, count - 1e-12)
    return False


def make_schedule(
    operators: Sequence[Operator],
    window: int,
    *,
    full_bytes: Mapping[str, int],
    compute_bytes: Mapping[str, int],
) -> Schedule:
    """Pack ordered operators into ``window`` slots so that the heaviest iteration is as light as possible.

    Among all contiguous partitions of the given order this one has the lightest heaviest iteration: for a given cap,
    taking as much as fits as early as possible is optimal, because what is captured early is never captured again.

    Args:
        operators: In capture order.
        window: Number of slots. The schedule has fewer where more would not make any iteration lighter.
        full_bytes: Bytes of each operator (by name) when active.
        compute_bytes: Bytes of each operator (by name) when frozen.

    Raises:
        ConfigurationError: If ``window`` is not positive or there is nothing to schedule.
    """
    if window < 1:
        raise ConfigurationError(f"window must be at least 1 iteration, got {window}")
    if not operators:
        raise ConfigurationError(
            "there is no trainable parameter to checkpoint: every parameter is frozen or belongs to no optimizer"
        )
    full = [full_bytes[op.name] for op in operators]
    compute = [compute_bytes[op.name] for op in operators]
    edges = _balance(full, compute, window)
    slots = tuple(tuple(operators[a:b]) for a, b in zip([0, *edges], edges))
    return Schedule(slots=slots, slot_bytes=_slot_bytes(full, compute, edges), dense_bytes=sum(full))


def window_bytes(full_bytes: int, compute_bytes: int, window: int) -> int:
    """About what a window takes, if operators are alike and can be cut.

    Args:
        full_bytes: Master weights and optimizer state of everything.
        compute_bytes: The weights of the same, as the forward consumes them; at most ``full_bytes``.
        window: Its iterations; no more are used than make it lighter.
    """
    if not full_bytes:
        return 0
    heaviest = fractional_bound([full_bytes], [compute_bytes], window)
    parts = math.ceil(full_bytes / (MAX_SHARE * heaviest)) if window > 1 else 1
    full, compute = [full_bytes // parts] * parts, [compute_bytes // parts] * parts
    return sum(_slot_bytes(full, compute, _balance(full, compute, window)))


def _balance(full: Sequence[int], compute: Sequence[int], window: int) -> list[int]:
    """Ends of at most ``window`` slots, so that the heaviest iteration is as light as possible."""
    prefix = _Prefix(full, compute)
    low, high = max(full), sum(full)
    while low < high:
        middle = (low + high) // 2
        if _pack(prefix, window, middle) is None:
            low = middle + 1
        else:
            high = middle
    edges = _pack(prefix, window, high)
    assert edges is not None  # a cap of sum(full) always fits
    return edges


def _slot_bytes(full: Sequence[int], compute: Sequence[int], edges: Sequence[int]) -> tuple[int, ...]:
    return tuple(sum(full[a:b]) + sum(compute[b:]) for a, b in zip([0, *edges], edges))


def _pack(costs: _Prefix, window: int, cap: int) -> list[int] | None:
    """Ends of the slots under ``cap``, taking as much as possible as early as possible; None if it does not fit."""
    count = len(costs.full) - 1
    edges: list[int] = []
    index = 0
    while index < count:
        room = cap - (costs.compute[-1] - costs.compute[index])
        if len(edges) == window or room < 0:
            return None
        end = bisect_right(costs.gain, costs.gain[index] + room) - 1
        if end <= index:
            return None
        edges.append(end)
        index = end
    return edges
