"""The table of a module's operators: what a window would capture, when, and how many bytes that is.

Nothing is trained here: the table follows from the module, its optimizers and, where a step was observed, from the
tokens that each expert saw and the dtypes that the forward consumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from moetion_lightning.core.discovery import discover_layers
from moetion_lightning.core.layouts import MoELayer, MoESpec
from moetion_lightning.core.operators import Operator
from moetion_lightning.core.partition import build_operators
from moetion_lightning.core.schedule import MAX_SHARE, fractional_bound, make_schedule, order_operators, split_operators
from moetion_lightning.core.state import LiveState

__all__ = ["Explanation", "OperatorRow", "explain", "format_bytes", "format_explanation"]


@dataclass(frozen=True, kw_only=True)
class OperatorRow:
    """One operator of the table.

    Args:
        name: Name of the operator.
        kind: ``expert``, ``gate`` or ``shared``.
        elements: Parameter elements that it holds.
        full_bytes: Master weights and optimizer state, captured once a window.
        compute_bytes: Weights as the forward consumes them, captured in each iteration before that.
        tokens: Tokens routed to the expert in the observed step; None for the others, or without observation.
        slot: Iteration of the window, from 0, in which it is captured in full; its last part, if it is cut into parts.
        first_slot: The same of its first part.
        num_parts: Parts into which it is cut, so that no operator weighs too much in one slot.
    """

    name: str
    kind: str
    elements: int
    full_bytes: int
    compute_bytes: int
    tokens: int | None
    slot: int
    first_slot: int
    num_parts: int


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What :func:`explain` found.

    Args:
        title: Class of the module.
        rows: The operators, in capture order.
        slot_bytes: Bytes captured in each iteration of the window.
        dense_bytes: Bytes of one dense checkpoint of the same state.
        layers: The MoE layers.
        static: Parameters that never train, in no window.
        notes: What a reader should know: assumptions, what could not be sliced, a dense model.
    """

    title: str
    rows: tuple[OperatorRow, ...]
    slot_bytes: tuple[int, ...]
    dense_bytes: int
    layers: tuple[MoELayer, ...]
    static: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def window(self) -> int:
        """Iterations of the window."""
        return len(self.slot_bytes)


def explain(
    module: nn.Module,
    *,
    optimizers: Sequence[Optimizer] = (),
    specs: Sequence[MoESpec] = (),
    layers: Sequence[MoELayer] | None = None,
    window: int = 4,
    tokens: Mapping[tuple[str, int], int] | None = None,
    compute_dtype: Mapping[str, torch.dtype] | None = None,
    elementwise: Iterable[str] = (),
) -> Explanation:
    """Cut a module into operators and schedule one window of them.

    Args:
        module: Any module, on any device (``meta`` too).
        optimizers: Its optimizers; without any, AdamW with two float32 moments is assumed.
        specs: The user's own descriptions of MoE blocks.
        layers: MoE layers if they are known already; None discovers them.
        window: Iterations of the window.
        tokens: Tokens routed to ``(layer, expert)``; None if no step was observed.
        compute_dtype: Dtype that the forward consumes, by parameter; None if no step was observed.
        elementwise: Qualified class names of further elementwise optimizers.

    Returns:
        The operators in capture order, with their bytes and slots.

    Raises:
        OperatorError: The operators are no partition of the trainable parameters.
        ConfigurationError: Nothing trains, or ``window`` is not positive.
    """
    notes: list[str] = []
    if not optimizers:
        training = [p for p in module.parameters() if p.requires_grad]
        optimizers = [torch.optim.AdamW(training)] if training else []
        notes.append("no optimizer given: two float32 moments a parameter (AdamW) are assumed")
    live = LiveState(module, optimizers, elementwise)
    found = tuple(discover_layers(module, specs) if layers is None else layers)
    trainable = live.trainable()
    ops = build_operators(module, found, trainable=trainable, sliceable=live.is_elementwise)
    notes.extend(_notes(ops.unsliced, found, observed=compute_dtype is not None))

    full = {name: live.full_bytes(name) for name in trainable}
    rows = {name: live.rows(name) for name in trainable}
    ordered = order_operators(ops.operators, tokens or {})
    sizes = [_costs(op, live, full, compute_dtype or {}) for op in ordered]
    bound = fractional_bound([s[1] for s in sizes], [s[2] for s in sizes], window)
    ordered = split_operators(
        ordered,
        full_bytes=full,
        rows=rows,
        sliceable={name: live.is_elementwise(name) for name in trainable},
        max_bytes=max(1, int(MAX_SHARE * bound)),
    )
    costs = {op.name: _costs(op, live, full, compute_dtype or {}) for op in ordered}
    schedule = make_schedule(
        ordered,
        window,
        full_bytes={name: cost[1] for name, cost in costs.items()},
        compute_bytes={name: cost[2] for name, cost in costs.items()},
    )
    parts: dict[str, list[tuple[int, Operator]]] = {}
    for slot, members in enumerate(schedule.slots):
        for op in members:
            parts.setdefault(op.name.partition("#")[0], []).append((slot, op))
    table = tuple(
        OperatorRow(
            name=name,
            kind=members[0][1].kind.value,
            elements=sum(costs[op.name][0] for _, op in members),
            full_bytes=sum(costs[op.name][1] for _, op in members),
            compute_bytes=sum(costs[op.name][2] for _, op in members),
            tokens=_tokens(members[0][1], tokens),
            slot=members[-1][0],
            first_slot=members[0][0],
            num_parts=len(members),
        )
        for name, members in parts.items()
    )
    return Explanation(
        title=type(module).__name__,
        rows=table,
        slot_bytes=schedule.slot_bytes,
        dense_bytes=schedule.dense_bytes,
        layers=found,
        static=ops.static,
        notes=tuple(notes),
    )


def _notes(unsliced: Sequence[str], layers: Sequence[MoELayer], *, observed: bool) -> list[str]:
    notes = []
    if not layers:
        notes.append("no MoE layer found: every operator is shared state, which works, but saves only by splitting it")
    candidates = [layer.name for layer in layers if layer.candidate]
    if candidates and not observed:
        notes.append(
            f"{len(candidates)} layers were found by structure only ({candidates[0]}, ...): the first training "
            "iteration confirms them"
        )
    if unsliced:
        notes.append(f"not sliced, because the optimizer couples rows: {', '.join(unsliced)}")
    if not observed:
        notes.append(
            "no step observed: compute-only bytes assume that the forward reads every parameter as it is stored"
        )
    return notes


def _costs(
    op: Operator, live: LiveState, full: Mapping[str, int], dtypes: Mapping[str, torch.dtype]
) -> tuple[int, int, int]:
    """Elements, full bytes and compute bytes of an operator."""
    elements, whole, compute = 0, 0, 0
    for piece in op.pieces:
        parameter = live.parameters[piece.parameter]
        count = piece.of(parameter).numel()
        elements += count
        whole += full[piece.parameter] * count // max(1, parameter.numel())
        compute += count * dtypes.get(piece.parameter, parameter.dtype).itemsize
    return elements, whole, compute


def _tokens(op: Operator, tokens: Mapping[tuple[str, int], int] | None) -> int | None:
    if tokens is None or op.layer is None or op.expert is None:
        return None
    return tokens.get((op.layer, op.expert), 0)


def format_bytes(count: float) -> str:
    """A size for people, in powers of ten: ``"1.25 MB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def format_explanation(explanation: Explanation, *, max_rows: int | None = 60) -> str:
    """The table as text.

    Args:
        explanation: From :func:`explain`.
        max_rows: With more operators than this, those of one kind and slot share a line; None for one line each.
    """
    rows = explanation.rows
    header = ("slot", "kind", "operator", "elements", "full", "compute-only", "tokens")
    if max_rows is not None and len(rows) > max_rows:
        lines = [_group_line(slot, kind, rows) for slot, kind in dict.fromkeys((r.slot, r.kind) for r in rows)]
    else:
        lines = [_line(row) for row in rows]
    heaviest = max(explanation.slot_bytes)
    experts = sum(layer.num_experts for layer in explanation.layers)
    summary = [
        "",
        f"{explanation.title}: {len(rows)} operators, {len(explanation.layers)} MoE layers, {experts} experts, "
        f"{sum(r.elements for r in rows):,} trainable elements, {len(explanation.static)} parameters that never train",
        f"dense checkpoint {format_bytes(explanation.dense_bytes)}; window of {explanation.window}: "
        + ", ".join(format_bytes(n) for n in explanation.slot_bytes)
        + f" an iteration (heaviest {heaviest / max(1, explanation.dense_bytes):.0%} of dense)",
    ]
    return "\n".join([*_align([header, *lines]), *summary, *(f"note: {note}" for note in explanation.notes)])


def _line(row: OperatorRow) -> tuple[str, ...]:
    tokens = "-" if row.tokens is None else f"{row.tokens:,}"
    sizes = (f"{row.elements:,}", format_bytes(row.full_bytes), format_bytes(row.compute_bytes))
    slot = str(row.slot) if row.slot == row.first_slot else f"{row.first_slot}-{row.slot}"
    name = row.name if row.num_parts == 1 else f"{row.name} ({row.num_parts} parts)"
    return (slot, row.kind, name, *sizes, tokens)


def _group_line(slot: int, kind: str, rows: Sequence[OperatorRow]) -> tuple[str, ...]:
    members = [row for row in rows if row.slot == slot and row.kind == kind]
    known = [row.tokens for row in members if row.tokens is not None]
    return (
        str(slot),
        kind,
        f"{len(members)} operators, {members[0].name} ..." if len(members) > 1 else members[0].name,
        f"{sum(row.elements for row in members):,}",
        format_bytes(sum(row.full_bytes for row in members)),
        format_bytes(sum(row.compute_bytes for row in members)),
        f"{sum(known):,}" if known else "-",
    )


def _align(table: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    right = {0, 3, 4, 5, 6}
    return [
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))
        ).rstrip()
        for row in table
    ]
