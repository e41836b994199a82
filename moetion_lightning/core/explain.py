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
from moetion_lightning.core.state import LiveState
from moetion_lightning.errors import ConfigurationError

_UNLIMITED = 1 << 62

__all__ = ["Explanation", "OperatorRow", "explain"]


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
