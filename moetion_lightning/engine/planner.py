"""Plans windows: operators, their sizes, the policy's decision, the memory that it takes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moetion_lightning.capture.fence import DeviceFence
from moetion_lightning.capture.thread import measure_bandwidth
from moetion_lightning.core.layouts import MoELayer
from moetion_lightning.core.log_policy import GradientLogPolicy
from moetion_lightning.core.operators import Operator
from moetion_lightning.core.pace import Pace
from moetion_lightning.core.partition import OperatorSet, build_operators
from moetion_lightning.core.policy import PartialExpertsPolicy, Policy, PolicyContext, Sizes, SparsePolicy, WindowPlan
from moetion_lightning.core.schedule import window_bytes
from moetion_lightning.core.slot_contents import describe_kept
from moetion_lightning.core.state import LiveState
from moetion_lightning.core.window_memory import log_bytes
from moetion_lightning.engine.ranks import Agreed, RankLayout, Ranks
from moetion_lightning.engine.restore import model_fingerprint, parameter_table
from moetion_lightning.engine.shares import Shares
from moetion_lightning.engine.slot_files import StaticPart, WindowHeader
from moetion_lightning.engine.state_layout import StateLayout
from moetion_lightning.engine.static_state import StaticLook, read_static, static_bytes
from moetion_lightning.engine.tiers import Tiers
from moetion_lightning.errors import OperatorError
from moetion_lightning.events import EventBus, OperatorsFound, ScheduleMade
from moetion_lightning.moe.routing import Routing
from moetion_lightning.storage.format import Manifest
from moetion_lightning.storage.tree import flatten_tree

__all__ = ["WindowPlanner", "kept_points"]

# Restore points of a gradient log that stay where there are several ranks: another one may be an iteration behind, and
# its commit one more.
_KEPT_WITH_OTHERS = 3


def kept_points(ranks: Ranks, keep_rounds: int, window: int) -> int:
    """How many restore points of a gradient log stay.

    Args:
        ranks: The ranks of the job.
        keep_rounds: The user's setting.
        window: Iterations of a round.
    """
    return (1 if ranks.alone else _KEPT_WITH_OTHERS) + keep_rounds * window


class WindowPlanner:
    """Decides, at an iteration's end, whether a window begins and what it holds.

    Args:
        live: The live state.
        routing: The MoE layers, and what is counted of them.
        tiers: Says how much memory there is.
        pace: Iteration time and bandwidth.
        compute_dtype: Dtype that the forward consumes, by parameter.
        bus: Gets the events.
        say_once: Tells the user something, once.
        ranks: The other ranks.
        shares: Which operators this rank captures.
        layout: How the state lies over the ranks.
        keep_rounds: Older rounds of a gradient log that stay.
    """

    def __init__(
        self,
        live: LiveState,
        routing: Routing,
        tiers: Tiers,
        pace: Pace,
        compute_dtype: dict[str, torch.dtype],
        bus: EventBus,
        say_once: Callable[..., None],
        ranks: Ranks,
        shares: Shares,
        layout: RankLayout,
        *,
        keep_rounds: int = 0,
    ) -> None:
        self._keep_rounds = keep_rounds
        self._ranks = ranks
        self._shares = shares
        self._layout = layout
        self._live = live
        self._routing = routing
        self._tiers = tiers
        self._pace = pace
        self._compute_dtype = compute_dtype
        self._bus = bus
        self._say_once = say_once
        self._parameters = parameter_table(live.parameters)
        self._fingerprint = model_fingerprint(self._parameters)
        self._state_layout = StateLayout(live, layout.layers or ())
        self._bandwidth = 0.0
        self._static_digest = ""
        self._run_state_bytes = self._static_bytes = 0
        self._at_start = live.names()
        self._changes: tuple[int, dict[str, list[str]]] = (-1, {})
        self._signature = live.signature()
        self._outdated = False
        self._routing_fits = True
        self._measured: object = None
        self._measure()
        self.operators = self._find_operators()

    def prepare(self, policy: Policy, device: torch.device, run_state_bytes: int) -> None:
        """Before the first step: measure the bandwidth, refuse what the host memory cannot hold.

        Args:
            policy: Decides how large a window is.
            device: Where the training state lives.
            run_state_bytes: Size of what is no operator (buffers, averaged weights ...).

        Raises:
            HostMemoryError: With the numbers and the remedy.
            UnsupportedStateError: What the optimizers keep already, or a frozen parameter, cannot be captured.
        """
        for name in dict.fromkeys(piece.parameter for op in self.operators.operators for piece in op.pieces):
            describe_kept(self._live, name, self._live.weight(name))
        self._static_bytes = static_bytes(read_static(self._live, self.operators.static))
        self._run_state_bytes = run_state_bytes
        self._bandwidth = measure_bandwidth(device)
        slots = policy.window if isinstance(policy, SparsePolicy) and isinstance(policy.window, int) else 1
        full = compute = 0
        for name in self._live.trainable():
            holders = len(self._layout.holders.get(name, ())) or 1  # each captures its share of a copy
            weight = self._live.weight(name)
            full += self._live.full_bytes(name) // holders
            compute += weight.numel() * weight.element_size() // holders
        if isinstance(policy, GradientLogPolicy):
            self._check_log_memory(full, compute, policy.window)
        else:
            self._check_memory(window_bytes(full, compute, slots))

    def _measure(self) -> None:
        """Sizes are looked at when they may have changed: it takes long if there are many parameters."""
        mark = (self._live.sizes_depend_on(), dict(self._compute_dtype))
        if mark != self._measured:
            self._sizes, self._measured = Sizes.of(self._live, self._compute_dtype), mark

    def agree(
        self, iteration: int, newest: Manifest | None, signature: tuple[int, ...], dense: str, *, behind: bool
    ) -> Agreed:
        """A window may begin: exchange what all ranks plan by.

        Args:
            iteration: Completed iterations.
            newest: The newest window that this rank has committed.
            signature: What trains now.
            dense: Why this rank needs dense windows, else empty.
            behind: Whether this rank's last window is not safe yet.
        """
        if signature != self._signature or self._live.outdated():
            self._signature = signature
            self._look_again()
        if self._routing.settle(self._ranks.agree) or self._outdated:
            self._outdated = False
            self.operators = self._find_operators()
        self._measure()
        agreed = self._ranks.agree_on_window(
            {
                "iteration": iteration,
                "iteration_seconds": self._pace.iteration_seconds,
                "bytes_per_second": self._pace.bytes_per_second(self._bandwidth),
                "capacity_bytes": self._tiers.capacity.window_bytes(self._static_bytes) - self._run_state_bytes,
                "committed": self._tiers.committed(newest),
                "held": self._tiers.held(newest),
                "uncopied": self._tiers.uncopied(),
                "behind": behind,
                "persist": self._tiers.wants_to_persist(),
                "dense": dense,
                "digest": "" if self._ranks.alone else self._shares.digest(self.operators.operators, self._sizes),
            }
        )
        counts = self._routing.counts()
        if counts is not None:
            self._routing.add(self._ranks.sum("tokens", counts), iteration)
        return agreed

    def plan(self, policy: Policy, iteration: int, newest: Manifest | None, agreed: Agreed) -> WindowPlan:
        """The window that begins with this iteration.

        Args:
            policy: Decides.
            iteration: Completed iterations.
            newest: The newest window that this rank has committed.
            agreed: From :meth:`agree`, at the same iteration.
        """
        self._shares.settle(self.operators.operators, self._sizes, agreed.digest, uniform=agreed.uniform)
        context = PolicyContext(
            iteration=iteration,
            operators=self._shares.mine,
            sizes=self._sizes,
            iteration_seconds=agreed.iteration_seconds,
            bytes_per_second=agreed.bytes_per_second,
            capacity_bytes=agreed.capacity_bytes,
            saved=_saved(newest, self._shares.mine) if isinstance(policy, PartialExpertsPolicy) else frozenset(),
            experts=self._experts(policy),
            agree=self._ranks.agree,
            protected=agreed.committed >= 0,
            **self._routing.context(),
        )
        plan = policy.plan(context)
        if plan.schedule is not None and plan.changed:
            self._bus.emit(
                ScheduleMade(
                    window=plan.schedule.window,
                    heaviest_bytes=plan.schedule.heaviest_bytes,
                    total_bytes=plan.schedule.total_bytes,
                    dense_bytes=plan.schedule.dense_bytes,
                    reason=plan.changed,
                    measured=plan.measured,
                )
            )
        self._routing.captured(plan.experts, iteration)
        return plan

    def _experts(self, policy: Policy) -> dict[str, tuple[int, ...]]:
        """Experts of each layer on all ranks together, for the policy that chooses among them."""
        if not isinstance(policy, PartialExpertsPolicy):
            return {}
        if self._layout.layers is not None:
            return {layer.name: tuple(range(layer.num_experts)) for layer in self._layout.layers}
        found: dict[str, set[int]] = {}
        for op in self.operators.operators:
            if op.layer is not None and op.expert is not None:
                found.setdefault(op.layer, set()).add(op.expert)
        if self._layout.parameters is not None:
            mine = {layer: sorted(experts) for layer, experts in found.items()}
            for answer in self._ranks.agree("experts", mine):
                for layer, experts in answer.items():
                    found.setdefault(layer, set()).update(experts)
        return {layer: tuple(sorted(experts)) for layer, experts in found.items()}

    def check_room(self, plan: WindowPlan) -> None:
        """Refuse a new schedule's windows if host memory cannot hold them. Raises ``HostMemoryError``."""
        if plan.changed and plan.schedule is not None:
            self._check_memory(plan.schedule.total_bytes)
        elif plan.changed:
            self._check_memory(sum(self._sizes.operator_bytes(plan.slots[0].active, self._sizes.full).values()))

    def restored(self) -> None:
        """Another state was put in place, perhaps on other processes: nothing that was planned before counts."""
        self._outdated = True
        self._static_digest = ""
        self._shares.reset()

    def header(self, policy: Policy, serial: int) -> WindowHeader:
        """What the manifest says besides the slots.

        Args:
            policy: The policy.
            serial: Number of the boundary at which the window begins.
        """
        state: dict[str, Any] = {}
        if isinstance(policy, PartialExpertsPolicy):
            state = {
                "num_experts": policy.num_experts,
                "checkpoints": policy.checkpoints,
                "num_persisted": policy.num_persisted,
                "selection": policy.selection,
            }
        return WindowHeader(
            policy=policy.name,
            parameters=self._parameters,
            layout=self._state_layout.json(),
            fingerprint=self._fingerprint,
            extra={
                "compute_dtype": {n: str(d).removeprefix("torch.") for n, d in self._compute_dtype.items()},
                "policy": state,
                **self._routing.state(),
                "serial": serial,
                "shares": list(self._shares.ranks),
                "holders": self._shares.holders(),
                **self._came_and_went(),
            },
        )

    def _came_and_went(self) -> dict[str, list[str]]:
        if self._changes[0] != self._live.generation:
            now = self._live.names()
            joined, left = sorted(now - self._at_start), sorted(self._at_start - now)
            self._changes = (self._live.generation, {"joined": joined, "left": left})
        return self._changes[1]

    def static_part(self) -> tuple[str, StaticPart | None]:
        """Digest of the parameters that do not train; what to copy, unless the window before holds them as they are."""
        live, names = self._live, self.operators.static
        tree = read_static(live, names)
        digest = StaticLook(tree, DeviceFence()).digest()
        if digest == self._static_digest:
            return digest, None
        self._static_digest, self._static_bytes = digest, static_bytes(tree)
        look = functools.partial(_look_again, live, names)
        return digest, StaticPart(tree=flatten_tree(tree), digest=digest, look=look)

    def forget_static(self) -> None:
        """The window that held the parameters that never train was given up."""
        self._static_digest = ""

    def _look_again(self) -> None:
        """Parameters came or went, or others train."""
        live, before = self._live, set(self._parameters)
        live.refresh()
        self._parameters = parameter_table(live.parameters)
        self._fingerprint = model_fingerprint(self._parameters)
        self._outdated = self._routing_fits = True
        for names, what, remedy in (
            (set(self._parameters) - before - self._at_start, "joined", "adds them"),
            (before - live.names(), "left the module", "removes them"),
        ):
            if names:
                shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                self._say_once(
                    f"parameters {what} while training ({shown}): windows follow, but a restart can take those windows "
                    f"only if the script {remedy} before training begins. Until then it is refused, and says so.",
                    warning=True,
                )

    def _find_operators(self) -> OperatorSet:
        live, layers = self._live, self._routing.layers if self._routing_fits else ()
        try:
            found = self._cut(layers)
        except OperatorError as error:  # experts grew, or were removed, since the layers were found
            self._routing_fits, layers = False, ()
            self._say_once(f"experts are captured as shared state from now on: {error}", warning=True)
            found = self._cut(layers)
        self._bus.emit(
            OperatorsFound(
                num_operators=len(found.operators),
                num_moe_layers=len(layers),
                num_experts=sum(layer.num_experts for layer in layers),
                dense_bytes=sum(live.full_bytes(n) for n in live.trainable()),
            )
        )
        if not layers:
            self._say_once(
                "no mixture-of-experts layer was found: checkpointing works all the same, in slots of shared state. "
                "If the module has experts, describe them with specs=[MoESpec(...)] (see `moetion explain`)."
            )
        if found.unsliced:
            self._say_once(
                "the experts of these parameters cannot be captured one by one, because their optimizer couples rows: "
                + ", ".join(found.unsliced[:4])
            )
        return found

    def _cut(self, layers: Sequence[MoELayer]) -> OperatorSet:
        live = self._live
        return build_operators(
            live.module,
            layers,
            trainable=live.trainable(),
            sliceable=live.is_elementwise,
            offsets=self._layout.offsets,
            held=self._layout.parameters,
        )

    def _check_log_memory(self, full: int, gradients: int, window: int) -> None:
        keeps = kept_points(self._ranks, self._keep_rounds, window)
        needed = log_bytes(full, gradients, window, keeps)
        self._tiers.capacity.check_log(needed + (1 + keeps) * self._run_state_bytes + self._static_bytes)

    def _check_memory(self, window_bytes: int) -> None:
        self._tiers.capacity.check_windows(window_bytes + self._run_state_bytes, self._static_bytes)
        warning = self._tiers.capacity.check_restore(window_bytes + self._run_state_bytes, len(self._shares.ranks))
        if warning:
            self._say_once(warning, warning=True)


def _look_again(live: LiveState, names: Sequence[str], fence: DeviceFence) -> StaticLook:
    return StaticLook(read_static(live, names), fence)


def _saved(newest: Manifest | None, operators: Sequence[Operator]) -> frozenset[str]:
    """Operators that the newest window holds in full, cut the same way."""
    if newest is None:
        return frozenset()
    held = {op["name"]: op for op in newest.operators}
    return frozenset(op.name for op in operators if held.get(op.name) == op.to_json())
