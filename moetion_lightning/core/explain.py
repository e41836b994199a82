"""The table of a module's operators: what a window would capture, when, and how many bytes that is.

Nothing is trained here: the policy plans a window, as it does while training, from the module, its optimizers and,
where steps were observed, from the tokens that each expert saw, the dtypes that the forward consumed, and the time that
an iteration took.
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
from moetion_lightning.core.policy import PolicyContext, Sizes, SparsePolicy
from moetion_lightning.core.policy_table import HEADER, policy_table
from moetion_lightning.core.state import LiveState
from moetion_lightning.core.window_memory import memory_table
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.units import aligned, size_text

_WINDOWS = (1, 2, 4, 8, 16)  # of the table of memory, and the planned one
_UNLIMITED = 1 << 62

__all__ = ["Explanation", "OperatorRow", "explain", "format_explanation"]


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
        compute_bytes: Bytes of its weights as the forward consumes them.
        gradient_bytes: Bytes of its gradients.
        reason: Why the window has this length.
        layers: The MoE layers.
        static: Parameters that never train, in no window.
        notes: What a reader should know: assumptions, what could not be sliced, a dense model.
        iteration_seconds: Seconds of an iteration; 0 if not known.
    """

    title: str
    rows: tuple[OperatorRow, ...]
    slot_bytes: tuple[int, ...]
    dense_bytes: int
    compute_bytes: int
    gradient_bytes: int
    reason: str
    layers: tuple[MoELayer, ...]
    static: tuple[str, ...]
    notes: tuple[str, ...]
    iteration_seconds: float = 0.0

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
    policy: SparsePolicy,
    tokens: Mapping[tuple[str, int], int] | None = None,
    compute_dtype: Mapping[str, torch.dtype] | None = None,
    elementwise: Iterable[str] = (),
    iteration_seconds: float = 0.0,
    bytes_per_second: float = 0.0,
) -> Explanation:
    """Cut a module into operators, and ask a policy for its first window of them.

    Args:
        module: Any module, on any device (``meta`` too).
        optimizers: Its optimizers; without any, AdamW with two float32 moments is assumed.
        specs: The user's own descriptions of MoE blocks.
        layers: MoE layers if they are known already; None discovers them.
        policy: A new one.
        tokens: Tokens routed to ``(layer, expert)``; None if no step was observed.
        compute_dtype: Dtype that the forward consumes, by parameter; None if no step was observed.
        elementwise: Qualified class names of further elementwise optimizers.
        iteration_seconds: Seconds of an iteration; 0 if not known.
        bytes_per_second: Copy bandwidth; 0 if not known.

    Returns:
        The operators in capture order, with their bytes and slots.

    Raises:
        OperatorError: The operators are no partition of the trainable parameters.
        ConfigurationError: Nothing trains, or the window is not positive.
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
    if policy.window == "auto" and not iteration_seconds:
        notes.append('how long an iteration takes is not known: "auto" then hides as much as it can')

    if not ops.operators:
        raise ConfigurationError(
            "there is no trainable parameter to checkpoint: every parameter is frozen or belongs to no optimizer"
        )
    sizes = Sizes.of(live, compute_dtype or {})
    plan = policy.plan(
        PolicyContext(
            iteration=1,
            operators=ops.operators,
            sizes=sizes,
            iteration_seconds=iteration_seconds,
            bytes_per_second=bytes_per_second,
            capacity_bytes=_UNLIMITED,
            layers=tuple(layer.name for layer in found),
            tokens=dict(tokens or {}),
        )
    )
    schedule = plan.schedule
    assert schedule is not None
    everything = tuple(op for slot in schedule.slots for op in slot)
    full, compute = sizes.operator_bytes(everything, sizes.full), sizes.operator_bytes(everything, sizes.compute)
    parts: dict[str, list[tuple[int, Operator]]] = {}
    for slot, active in enumerate(schedule.slots):
        for op in active:
            parts.setdefault(op.name.partition("#")[0], []).append((slot, op))
    table = tuple(
        OperatorRow(
            name=name,
            kind=members[0][1].kind.value,
            elements=sum(_elements(op, live) for _, op in members),
            full_bytes=sum(full[op.name] for _, op in members),
            compute_bytes=sum(compute[op.name] for _, op in members),
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
        compute_bytes=sum(compute.values()),
        gradient_bytes=sum(live.weight(name).numel() * live.parameters[name].element_size() for name in trainable),
        reason=plan.changed.partition("; ")[2],
        layers=found,
        static=ops.static,
        notes=tuple(notes),
        iteration_seconds=iteration_seconds,
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


def _elements(op: Operator, live: LiveState) -> int:
    return sum(piece.of(live.parameters[piece.parameter]).numel() for piece in op.pieces)


def _tokens(op: Operator, tokens: Mapping[tuple[str, int], int] | None) -> int | None:
    if tokens is None or op.layer is None or op.expert is None:
        return None
    return tokens.get((op.layer, op.expert), 0)


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
        f"dense checkpoint {size_text(explanation.dense_bytes)}; window of {explanation.window}: "
        + ", ".join(size_text(n) for n in explanation.slot_bytes)
        + f" an iteration (heaviest {heaviest / max(1, explanation.dense_bytes):.0%} of dense)",
        *([explanation.reason] if explanation.reason else []),
        "",
        "GiB of host memory for windows, of a rank that captures all of this:",
        *_memory(explanation),
        "",
        "The policies beside each other, for the same rank:",
        *aligned([HEADER, *_policies(explanation)], right={1, 2}),
    ]
    return "\n".join(
        [*aligned([header, *lines], right=(0, 3, 4, 5, 6)), *summary, *(f"note: {note}" for note in explanation.notes)]
    )


def _policies(explanation: Explanation) -> list[tuple[str, ...]]:
    dense, compute, gradients = explanation.dense_bytes, explanation.compute_bytes, explanation.gradient_bytes
    return policy_table(dense, compute, gradients, max(2, explanation.window))


def _memory(explanation: Explanation) -> list[str]:
    windows = sorted({*_WINDOWS, explanation.window})
    table = memory_table(explanation.dense_bytes, explanation.compute_bytes, windows)
    return aligned([("window", "no replicas", "1 replica", "2 replicas"), *map(tuple, table)], right={0, 1, 2, 3})


def _line(row: OperatorRow) -> tuple[str, ...]:
    tokens = "-" if row.tokens is None else f"{row.tokens:,}"
    sizes = (f"{row.elements:,}", size_text(row.full_bytes), size_text(row.compute_bytes))
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
        size_text(sum(row.full_bytes for row in members)),
        size_text(sum(row.compute_bytes for row in members)),
        f"{sum(known):,}" if known else "-",
    )
