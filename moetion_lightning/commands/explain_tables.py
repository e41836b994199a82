"""The table of ``moetion explain``: operators, memory and policies, as tables or as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moetion_lightning.commands.tables import table
from moetion_lightning.core.policy_table import HEADER, policy_table
from moetion_lightning.core.window_memory import memory_table
from moetion_lightning.units import size_text

if TYPE_CHECKING:
    from rich.table import Table

    from moetion_lightning.core.explain import Explanation, OperatorRow

__all__ = ["explanation_as_json", "explanation_tables"]

_WINDOWS = (1, 2, 4, 8, 16)  # of the table of memory, and the planned one
_COLUMNS = ("slot", "kind", "operator", "elements", "full", "compute-only", "tokens")
_REPLICAS = ("window", "no replicas", "1 replica", "2 replicas")


def explanation_tables(explanation: Explanation, *, max_rows: int | None = 60) -> list[str | Table]:
    """What is printed.

    Args:
        explanation: From :func:`moetion_lightning.core.explain.explain`.
        max_rows: With more operators than this, those of one kind and slot share a line; None for one line each.
    """
    rows = explanation.rows
    if max_rows is not None and len(rows) > max_rows:
        lines = [_group_line(slot, kind, rows) for slot, kind in dict.fromkeys((r.slot, r.kind) for r in rows)]
    else:
        lines = [_line(row) for row in rows]
    heaviest = max(explanation.slot_bytes)
    experts = sum(layer.num_experts for layer in explanation.layers)
    return [
        table(_COLUMNS, lines, right={0, 3, 4, 5, 6}),
        "",
        f"{explanation.title}: {len(rows)} operators, {len(explanation.layers)} MoE layers, {experts} experts, "
        f"{sum(r.elements for r in rows):,} trainable elements, {len(explanation.static)} parameters that never train",
        f"dense checkpoint {size_text(explanation.dense_bytes)}; window of {explanation.window}: "
        + ", ".join(size_text(n) for n in explanation.slot_bytes)
        + f" an iteration (heaviest {heaviest / max(1, explanation.dense_bytes):.0%} of dense)",
        *([explanation.reason] if explanation.reason else []),
        "",
        "GiB of host memory for windows, of a rank that captures all of this:",
        table(_REPLICAS, _memory(explanation), right={0, 1, 2, 3}),
        "",
        "The policies beside each other, for the same rank:",
        table(HEADER, _policies(explanation), right={1, 2}),
        *(f"note: {note}" for note in explanation.notes),
    ]


def explanation_as_json(explanation: Explanation) -> dict[str, Any]:
    """The same for programs: sizes in bytes, memory in GiB."""
    layers = [{"name": layer.name, "num_experts": layer.num_experts} for layer in explanation.layers]
    return {
        **{field.name: getattr(explanation, field.name) for field in dataclasses.fields(explanation)},
        "layers": layers,
        "window": explanation.window,
        "host_memory_gib": [dict(zip(_REPLICAS, row, strict=True)) for row in _memory(explanation)],
        "policies": [dict(zip(HEADER, row, strict=True)) for row in _policies(explanation)],
    }


def _policies(explanation: Explanation) -> list[tuple[str, ...]]:
    dense, compute, gradients = explanation.dense_bytes, explanation.compute_bytes, explanation.gradient_bytes
    return policy_table(dense, compute, gradients, max(2, explanation.window))


def _memory(explanation: Explanation) -> list[tuple[str, ...]]:
    windows = sorted({*_WINDOWS, explanation.window})
    return [tuple(row) for row in memory_table(explanation.dense_bytes, explanation.compute_bytes, windows)]


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
