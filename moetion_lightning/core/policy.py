"""What to capture when. A policy plans; the engine acts.

Three policies run on the same engine: sparse (MoEtion: exact, a window of W iterations), dense in memory (Gemini:
exact, W = 1) and partial experts (MoC-System: lossy, all non-expert state and K of N experts per checkpoint).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from moetion_lightning.config import DEFAULT_MTBF
from moetion_lightning.core.capture_cost import CaptureCost, compare
from moetion_lightning.core.operators import Operator, OperatorKind
from moetion_lightning.core.schedule import (
    MAX_SHARE,
    Schedule,
    fractional_bound,
    make_schedule,
    order_operators,
    split_operators,
)
from moetion_lightning.core.state import LiveState
from moetion_lightning.core.window_choice import Facts, choose, dense_interval, describe
from moetion_lightning.core.window_memory import longest_window
from moetion_lightning.errors import ConfigurationError

__all__ = [
    "DensePolicy",
    "PacedDensePolicy",
    "PartialExpertsPolicy",
    "Policy",
    "PolicyContext",
    "RestoreOnlyPolicy",
    "Sizes",
    "SlotPlan",
    "SparsePolicy",
    "WindowPlan",
]


#: Of dense fallbacks: how many follow each other at once, and then with an iteration between, to see what they cost.
_FIRST_SNAPSHOTS, _COMPARED_SNAPSHOTS = 24, 12
_DENSE_SAMPLES = 32


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes and shapes of the parameters, by name.

    Args:
        full: With optimizer state.
        compute: Compute weights alone.
        rows: Size of dimension 0 (1 for 0-d parameters).
        sliceable: Whether rows may be captured at different iterations.
    """

    full: Mapping[str, int]
    compute: Mapping[str, int]
    rows: Mapping[str, int]
    sliceable: Mapping[str, bool]

    @classmethod
    def of(cls, live: LiveState, compute_dtype: Mapping[str, torch.dtype]) -> Sizes:
        """Measure the live state."""
        names = live.trainable()
        return cls(
            full={n: live.full_bytes(n) for n in names},
            compute={
                n: live.weight(n).numel() * compute_dtype.get(n, live.parameters[n].dtype).itemsize for n in names
            },
            rows={n: live.rows(n) for n in names},
            sliceable={n: live.is_elementwise(n) for n in names},
        )

    def operator_bytes(self, operators: Sequence[Operator], which: Mapping[str, int]) -> dict[str, int]:
        """Bytes of operators by name; ``which`` is :attr:`full` or :attr:`compute`."""
        result = {}
        for op in operators:
            total = 0
            for piece in op.pieces:
                nbytes = which[piece.parameter]
                if piece.start is not None and piece.stop is not None:
                    nbytes = nbytes * (piece.stop - piece.start) // max(1, self.rows[piece.parameter])
                total += nbytes
            result[op.name] = total
        return result


@dataclass(frozen=True, kw_only=True)
class SlotPlan:
    """Operators captured in full and as compute weights in one iteration."""

    active: tuple[Operator, ...]
    frozen: tuple[Operator, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WindowPlan:
    """A window: its slots, one per iteration, and the operators that stay as saved by an older restore point.

    Args:
        slots: One per iteration.
        carried: Operators of which the newest older capture is kept (lossy policies only).
        schedule: The schedule, where the policy makes one.
        changed: Why the schedule is a new one, else empty.
        measured: Whether what captures cost was measured, and the window's length follows from it.
        experts: ``(layer, expert)`` that all ranks together save in full; None: all.
    """

    slots: tuple[SlotPlan, ...]
    carried: tuple[Operator, ...] = ()
    schedule: Schedule | None = None
    changed: str = ""
    measured: bool = False
    experts: frozenset[tuple[str, int]] | None = None


def _alone(topic: str, value: Any) -> list[Any]:
    """The answers of a job of one rank."""
    return [value]


@dataclass(frozen=True, kw_only=True)
class PolicyContext:
    """What a policy may look at when a window could begin.

    Args:
        iteration: Completed iterations.
        operators: The operators that this rank captures.
        sizes: Their sizes.
        iteration_seconds: Rolling median.
        bytes_per_second: Copy bandwidth.
        capacity_bytes: Host memory that one window may take.
        layers: Names of the MoE layers.
        tokens: Tokens in the rolling window, by layer and expert. This and the next two are there where routing is
            counted (:mod:`moetion_lightning.moe.routing`).
        frequencies_changed: Whether at least 25 % of the experts' frequencies changed by more than 10 % since this was
            true last.
        unsaved: Tokens since the expert's last capture, by layer and expert.
        saved: Names of operators that an older restore point holds.
        experts: Experts of each layer, on all ranks together.
        agree: Gives every rank's value, by rank; all ranks ask in the same order.
        protected: Whether all ranks have committed a window.
    """

    iteration: int
    operators: tuple[Operator, ...]
    sizes: Sizes
    iteration_seconds: float
    bytes_per_second: float
    capacity_bytes: int
    layers: tuple[str, ...] = ()
    tokens: Mapping[tuple[str, int], int] = field(default_factory=dict)
    frequencies_changed: bool = False
    unsaved: Mapping[tuple[str, int], int] = field(default_factory=dict)
    saved: frozenset[str] = field(default_factory=frozenset)
    experts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    agree: Callable[[str, Any], list[Any]] = _alone
    protected: bool = False


class Policy(Protocol):
    """Plans windows.

    Attributes:
        name: Stored in the manifest.
        exact: Whether a restore is exact.
    """

    name: str
    exact: bool

    def begins(self, iteration: int) -> bool:
        """Whether a window may begin after this iteration; the same on all ranks."""
        ...

    def plan(self, context: PolicyContext) -> WindowPlan:
        """The window that begins now."""
        ...


class SparsePolicy:
    """MoEtion: every operator in full once per window, its compute weights in the window's iterations before.

    Args:
        window: Iterations per window, or "auto": the one with the least expected cost, which is measured.
        max_window: Upper limit for "auto".
        overlap_target: Share of an iteration behind which copies can hide.
        mtbf: Seconds between two failures that "auto" expects.
    """

    name = "sparse"
    exact = True

    def __init__(
        self, window: int | Literal["auto"], max_window: int, overlap_target: float, mtbf: float = DEFAULT_MTBF
    ) -> None:
        self.window = window
        self.max_window = max_window
        self.overlap_target = overlap_target
        self.mtbf = mtbf
        self._cost = CaptureCost()
        self._schedule: Schedule | None = None
        self._known: tuple[object, ...] = ()
        self._seen: tuple[object, object] = (None, None)
        self._heaviest: dict[int, int] = {}
        self._full_bytes = 0  # of all parameters, also of those that other ranks capture
        self._sums = (0, 0)  # bytes of all operators, in full and as compute weights
        self._chosen = 0
        self._budget = 0.0
        self._is_measured = False

    def begins(self, iteration: int) -> bool:
        """Always; but "auto" pauses now and then, to measure what captures cost."""
        return not self._cost.pauses(iteration)

    def iteration(self, iteration: int, seconds: float, slot: int | None) -> None:
        """An iteration has ended.

        Args:
            iteration: Completed iterations.
            seconds: How long it took.
            slot: The window's slot that was captured behind it; None if nothing was.
        """
        if self.window == "auto":
            self._cost.iteration(iteration, seconds, slot)

    def forget(self) -> None:
        """Make the schedule anew: a rank was replaced, and has none."""
        self._schedule = None
        self._chosen, self._cost = 0, CaptureCost()

    def plan(self, context: PolicyContext) -> WindowPlan:
        """The schedule is kept until there is a reason for another."""
        reason = self._why_new(context)
        if reason:
            self._make(context)
        schedule = self._schedule
        assert schedule is not None
        if self.window == "auto":
            seconds = context.iteration_seconds
            self._cost.window_begins(context.iteration, schedule.window, seconds, protected=context.protected)
        slots = tuple(SlotPlan(active=ops, frozen=schedule.frozen(k)) for k, ops in enumerate(schedule.slots))
        return WindowPlan(slots=slots, schedule=schedule, changed=reason, measured=self._is_measured)

    def _why_new(self, context: PolicyContext) -> str:
        """Why the schedule must be made anew, or "". The same on all ranks, but for the numbers that each has."""
        here = self._what_changed_here(context)
        is_first = self._cost.news and not self._is_measured
        wanted = self._choose(context, anew=bool(here))
        if is_first and not here:
            here = "what captures cost is measured now"
        answers = context.agree("schedule", [here, wanted])
        chosen = int(max(answer[1] for answer in answers))
        resized, self._chosen = chosen != self._chosen, chosen
        reasons = [str(answer[0]) for answer in answers if answer[0]][:1]
        if not reasons and resized:
            reasons = ["the expected costs have changed"]
        elif not reasons and context.frequencies_changed:
            reasons = ["the experts' popularity changed"]
        if reasons and self.window == "auto":
            why = describe(self._facts(context), chosen) if chosen == wanted else "another rank needs this window"
            reasons.append(f"auto: {why}")
        return "; ".join(reasons)

    def _what_changed_here(self, context: PolicyContext) -> str:
        before, self._seen = self._seen, (context.operators, context.sizes)
        if self._schedule is not None and all(new is old for new, old in zip(self._seen, before)):
            return ""
        known = (tuple(op.name for op in context.operators), tuple(context.sizes.compute.items()))
        if self._schedule is None:
            self._known = known
            return "first schedule"
        if known != self._known:
            self._known = known
            return "the operators or their compute weights changed"
        if abs(sum(context.sizes.full.values()) - self._full_bytes) > 0.1 * self._full_bytes:
            return "the optimizer's state changed its size"
        return ""

    def _choose(self, context: PolicyContext, *, anew: bool) -> int:
        """The window that this rank wants.

        Args:
            context: What it follows from.
            anew: Whether windows have other bytes than before.
        """
        if self.window != "auto":
            return self.window
        if anew:
            self._weigh(context)
        budget = (self._cost.plain_seconds or context.iteration_seconds) * context.bytes_per_second
        if not anew and not self._cost.news and abs(budget - self._budget) <= 0.1 * self._budget:
            return self._chosen
        self._budget, self._cost.news = budget, False
        self._is_measured = bool(self._cost.measured())
        longest = longest_window(*self._sums, self.max_window, context.capacity_bytes)
        return choose(self._facts(context), self._chosen or None, longest=longest)

    def _weigh(self, context: PolicyContext) -> None:
        """Bytes of the heaviest iteration of each window, as if all operators were alike: that is quick, and enough."""
        sizes = context.sizes
        full = sum(sizes.operator_bytes(context.operators, sizes.full).values())
        compute = sum(sizes.operator_bytes(context.operators, sizes.compute).values())
        self._sums = full, compute
        self._heaviest = {w: int(fractional_bound([full], [compute], w)) for w in range(1, self.max_window + 1)}
        self._cost.forget_samples()

    def _facts(self, context: PolicyContext) -> Facts:
        return Facts(
            heaviest_bytes=self._heaviest,
            iteration_seconds=self._cost.plain_seconds or context.iteration_seconds,
            bytes_per_second=context.bytes_per_second,
            overlap_target=self.overlap_target,
            mtbf=self.mtbf,
            measured=self._cost.measured(),
        )

    def _make(self, context: PolicyContext) -> None:
        sizes, window = context.sizes, self._chosen
        self._full_bytes = sum(sizes.full.values())
        ordered = order_operators(context.operators, context.tokens)
        full = list(sizes.operator_bytes(ordered, sizes.full).values())
        compute = list(sizes.operator_bytes(ordered, sizes.compute).values())
        if window > 1:
            cap = max(1, int(MAX_SHARE * fractional_bound(full, compute, window)))
            ordered = split_operators(
                ordered, full_bytes=sizes.full, rows=sizes.rows, sliceable=sizes.sliceable, max_bytes=cap
            )
        if ordered:
            schedule = make_schedule(
                ordered,
                window,
                full_bytes=sizes.operator_bytes(ordered, sizes.full),
                compute_bytes=sizes.operator_bytes(ordered, sizes.compute),
            )
        else:  # other ranks capture all that this one holds, or nothing trains now
            schedule = Schedule(slots=((),), slot_bytes=(0,), dense_bytes=0)
        self._schedule = schedule.padded(max(context.agree("slots", schedule.window)))


class DensePolicy:
    """Gemini: everything in full, every ``every_n_steps`` iterations.

    Args:
        every_n_steps: Iterations between snapshots.
    """

    name = "dense"
    exact = True

    def __init__(self, every_n_steps: int = 1) -> None:
        if every_n_steps < 1:
            raise ConfigurationError(f"every_n_steps={every_n_steps!r}: expected an int >= 1")
        self.every_n_steps = every_n_steps

    def begins(self, iteration: int) -> bool:
        """Every ``every_n_steps`` iterations."""
        return iteration % self.every_n_steps == 0

    def plan(self, context: PolicyContext) -> WindowPlan:
        """A snapshot of everything."""
        return WindowPlan(slots=(SlotPlan(active=context.operators),))


class PacedDensePolicy(DensePolicy):
    """Everything in full, as often as it pays: where no sparse window would be exact.

    What a snapshot costs is measured: the iterations between two of them have none behind them. The first snapshots
    follow each other at once, and then with an iteration between, to compare.

    Args:
        overlap_target: Share of an iteration behind which copies can hide.
        mtbf: Seconds between two failures.
    """

    def __init__(self, overlap_target: float, mtbf: float) -> None:
        super().__init__()
        self._overlap_target, self._mtbf = overlap_target, mtbf
        self._next = 0
        self._nbytes = 0
        self._snapshots = 0
        self._captured: deque[float] = deque(maxlen=_DENSE_SAMPLES)
        self._plain: deque[float] = deque(maxlen=_DENSE_SAMPLES)

    def iteration(self, iteration: int, seconds: float, slot: int | None) -> None:
        """An iteration has ended, see :meth:`SparsePolicy.iteration`."""
        (self._plain if slot is None else self._captured).append(seconds)

    def begins(self, iteration: int) -> bool:
        """When the last snapshot is paid for."""
        return iteration >= self._next

    def plan(self, context: PolicyContext) -> WindowPlan:
        """A snapshot of everything; the next one follows after as many iterations as this one is worth."""
        nbytes = sum(context.sizes.operator_bytes(context.operators, context.sizes.full).values())
        nbytes = int(max(context.agree("dense", nbytes)))
        self._snapshots += 1
        interval = self.interval(self._facts(context, nbytes))
        if self._snapshots <= _FIRST_SNAPSHOTS + _COMPARED_SNAPSHOTS:
            interval = 1 if self._snapshots <= _FIRST_SNAPSHOTS else min(interval, 2)
        self.every_n_steps = int(max(context.agree("interval", interval)))
        self._next = context.iteration + self.every_n_steps
        grown, self._nbytes = nbytes > 1.1 * self._nbytes, max(nbytes, self._nbytes)
        reason = "the dense state grew" if grown else ""
        return WindowPlan(slots=(SlotPlan(active=context.operators),), changed=reason)

    def interval(self, facts: Facts) -> int:
        """Iterations until the next snapshot: as many as this one is worth."""
        return dense_interval(facts)

    def _facts(self, context: PolicyContext, nbytes: int) -> Facts:
        measured = compare(self._captured, self._plain)
        return Facts(
            heaviest_bytes={1: nbytes},
            iteration_seconds=context.iteration_seconds,
            bytes_per_second=context.bytes_per_second,
            overlap_target=self._overlap_target,
            mtbf=self._mtbf,
            measured={} if measured is None else {1: measured},
        )


class PartialExpertsPolicy:
    """MoC-System's partial experts checkpointing (PEC): lossy.

    Args:
        num_experts_per_checkpoint: K, experts of each MoE layer saved per checkpoint.
        selection: "sequential" (round robin, shifted from layer to layer) or "load_aware" (most unsaved tokens first).
        every_n_steps: Iterations between checkpoints.
        plt_limit: Proportion of lost tokens above which K doubles after a restore (dynamic K); None keeps K.
        num_experts_persisted: How many of the K go to storage; None: all.
    """

    name = "partial"
    exact = False

    def __init__(
        self,
        num_experts_per_checkpoint: int,
        selection: Literal["sequential", "load_aware"] = "sequential",
        every_n_steps: int = 1,
        plt_limit: float | None = 0.0375,
        num_experts_persisted: int | None = None,
    ) -> None:
        if num_experts_per_checkpoint < 1:
            raise ConfigurationError(f"num_experts_per_checkpoint={num_experts_per_checkpoint!r}: expected an int >= 1")
        if selection not in ("sequential", "load_aware"):
            raise ConfigurationError(f'selection={selection!r}: expected "sequential" or "load_aware"')
        if every_n_steps < 1:
            raise ConfigurationError(f"every_n_steps={every_n_steps!r}: expected an int >= 1")
        if plt_limit is not None and not 0 < plt_limit < 1:
            raise ConfigurationError(f"plt_limit={plt_limit!r}: expected a proportion in (0, 1), or None")
        if num_experts_persisted is not None and not 1 <= num_experts_persisted <= num_experts_per_checkpoint:
            raise ConfigurationError(
                f"num_experts_persisted={num_experts_persisted!r}: expected an int from 1 to "
                f"num_experts_per_checkpoint={num_experts_per_checkpoint}, or None to persist all of them"
            )
        self.num_experts = num_experts_per_checkpoint
        self._configured = (num_experts_per_checkpoint, num_experts_persisted)
        self.selection = selection
        self.every_n_steps = every_n_steps
        self.plt_limit = plt_limit
        self.checkpoints = 0

    @property
    def num_persisted(self) -> int | None:
        """Experts of each layer that one persist writes; grows with K. None: all that the checkpoint holds."""
        per_checkpoint, persisted = self._configured
        return None if persisted is None else max(1, persisted * self.num_experts // per_checkpoint)

    def begins(self, iteration: int) -> bool:
        """Every ``every_n_steps`` iterations."""
        return iteration % self.every_n_steps == 0

    def plan(self, context: PolicyContext) -> WindowPlan:
        """All non-expert state, and K experts of each layer."""
        chosen = self._choose(context)
        active, carried = [], []
        for op in context.operators:
            is_expert = op.kind is OperatorKind.EXPERT and op.expert is not None
            if not is_expert or (op.layer, op.expert) in chosen or op.name not in context.saved:
                active.append(op)
            else:
                carried.append(op)
        self.checkpoints += 1
        return WindowPlan(
            slots=(SlotPlan(active=tuple(active)),),
            carried=tuple(carried),
            # Counted alike on all ranks, also where one has nothing to carry: it reads its last window from storage.
            experts=frozenset(chosen) if any(context.agree("saved", bool(context.saved))) else None,
        )

    def _choose(self, context: PolicyContext) -> set[tuple[str, int]]:
        chosen: set[tuple[str, int]] = set()
        for row, layer in enumerate(context.layers):
            experts = context.experts.get(layer, ())
            count = min(self.num_experts, len(experts))
            if self.selection == "sequential":
                first = (self.checkpoints + row) * count
                picked = [experts[(first + i) % len(experts)] for i in range(count)] if experts else []
            else:
                unsaved = [(-context.unsaved.get((layer, e), 0), e) for e in experts]
                picked = [expert for _, expert in sorted(unsaved)[:count]]
            chosen.update((layer, expert) for expert in picked)
        return chosen

    def after_restore(self, plt: float) -> bool:
        """Dynamic K: double K if the proportion of lost tokens is above the limit. Returns whether it did."""
        if self.plt_limit is None or plt <= self.plt_limit:
            return False
        self.num_experts *= 2
        return True


class RestoreOnlyPolicy:
    """Never captures: a job is continued, not protected."""

    name = "none"
    exact = True

    def begins(self, iteration: int) -> bool:
        """Never."""
        return False

    def plan(self, context: PolicyContext) -> WindowPlan:
        """An empty window (none ever begins)."""
        return WindowPlan(slots=())
