"""The engine: captures windows while training runs, and rebuilds the state after a failure.

An adapter (a Lightning callback, an Accelerate hook, a plain loop) opens the engine, attaches it to the module and its
optimizers, and calls :meth:`Engine.boundary` whenever an iteration may have ended: after the optimizer's step and
everything that belongs to it, and before the next forward. The engine never calls the adapter's framework.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moetion_lightning.config import EngineConfig
from moetion_lightning.core.capture import CaptureThread, DeviceFence, measure_bandwidth
from moetion_lightning.core.compute_dtype import ComputeDtypeObserver
from moetion_lightning.core.discovery import discover_layers
from moetion_lightning.core.grad_norm import GradNormSeam
from moetion_lightning.core.layouts import MoESpec
from moetion_lightning.core.operators import OperatorSet, build_operators
from moetion_lightning.core.pace import Pace
from moetion_lightning.core.policy import DensePolicy, PartialExpertsPolicy, Policy, Sizes, WindowPlan
from moetion_lightning.core.reconstruct import Reconstruction
from moetion_lightning.core.run_state import find_generators, read_buffers
from moetion_lightning.core.state import LiveState
from moetion_lightning.engine.recovery import Recovery
from moetion_lightning.engine.restore import RestorePoint, model_fingerprint, parameter_table
from moetion_lightning.engine.run_state import EngineState, capture_run_state, static_sample
from moetion_lightning.engine.token_counts import TokenCounts
from moetion_lightning.engine.steps import StepWatcher
from moetion_lightning.engine.tiers import Tiers
from moetion_lightning.engine.witness import WitnessRecorder
from moetion_lightning.engine.writer import OpenWindow, WindowHeader, WindowWriter
from moetion_lightning.events import (
    EventBus,
    IterationFinished,
    Notice,
    OperatorsFound,
    ScheduleMade,
    StepSkipped,
)
from moetion_lightning.store.tree import FlatTree, flatten_tree

__all__ = ["Engine", "RunState"]

_log = logging.getLogger(__name__)
_OBSERVED_ITERATIONS = 3  # an expert that no token reached in the first iterations is captured in full precision
_MEASURE_BYTES = 16 << 20


class RunState(Protocol):
    """What an adapter adds to the training state."""

    def capture(self) -> Any:
        """Loop counters, schedulers, callbacks, data position ...: nested plain values and tensors (not copied)."""
        ...

    def generators(self) -> Mapping[str, object]:
        """Objects whose attributes may be random number generators, by name."""
        ...


@dataclass(frozen=True, kw_only=True)
class _Attached:
    """Everything that exists once the module and its optimizers do."""

    live: LiveState
    routing: TokenCounts
    steps: StepWatcher
    thread: CaptureThread
    writer: WindowWriter
    parameters: dict[str, Any]
    fingerprint: str


class Engine:
    """Sparse checkpointing and exact recovery of one rank.

    Ranks: one engine per rank; with one rank nothing is exchanged.

    Args:
        config: Settings.
        policy: What to capture when.
        bus: Gets the events.
        job: Identity of the job.
    """

    def __init__(self, config: EngineConfig, policy: Policy, *, bus: EventBus, job: str) -> None:
        self.config = config
        self.policy = policy
        self.bus = bus
        self.job = job
        self.iteration = 0
        self.tiers = Tiers(config, job, bus)
        self.pace = Pace()
        self.norms = GradNormSeam()
        self.witness = WitnessRecorder(self.norms)
        self.recovery: Recovery | None = None
        self.compute_dtype: dict[str, torch.dtype] = {}
        #: An adapter with a gradient scaler clears this: whether a step was skipped depends on all gradients.
        self.may_skip_gradients = True
        self._attached: _Attached | None = None
        self._operators: OperatorSet | None = None
        self._window: OpenWindow | None = None
        self._observer: ComputeDtypeObserver | None = None
        self._bandwidth = 0.0
        self._stall = 0.0
        self._started_at = 0.0
        self._static_digest = ""  # of the parameters that never train, as the newest window holds them
        self._said: set[str] = set()

    # --- before training -----------------------------------------------------------------------------------------

    def open(self) -> RestorePoint | None:
        """Open the tiers and look for a window of this job.

        Returns:
            The newest whole window, verified; None if there is none or ``resume="never"``.

        Raises:
            StoreError, HostMemoryError, JobBusyError, CorruptSnapshotError, VersionError: See the message.
        """
        return self.tiers.open()

    def attach(self, module: nn.Module, optimizers: Sequence[Optimizer], specs: Sequence[MoESpec] = ()) -> None:
        """Connect the module and its optimizers, before the first forward.

        Raises:
            OperatorError, ForeignWindowError, HostMemoryError: See the message.
        """
        live = LiveState(module, optimizers, self.config.elementwise_optimizers)
        table = parameter_table(live.parameters)
        if self.tiers.point is not None:
            self.tiers.point.check_model(live.parameters)
        devices = list(dict.fromkeys(p.device for p in live.parameters.values()))
        thread = CaptureThread(DeviceFence(devices))
        routing = TokenCounts(module, discover_layers(module, specs))
        self._attached = _Attached(
            live=live,
            routing=routing,
            steps=StepWatcher(live.optimizers, self.hold, self._after_step),
            thread=thread,
            writer=WindowWriter(
                self.tiers.host, thread, live, self.compute_dtype, self.bus, self.pace, self.tiers.on_commit
            ),
            parameters=table,
            fingerprint=model_fingerprint(table),
        )
        self.norms.install()
        self._find_operators()
        sample = torch.empty(_MEASURE_BYTES, dtype=torch.uint8)
        self._bandwidth = measure_bandwidth(sample, devices[0] if devices else torch.device("cpu"))
        self._check_memory(None)

    def check_run_state(self, run_state: RunState) -> None:
        """Capture the run state once for nothing, so that what cannot be stored is reported before the first step."""
        self._flatten(run_state)

    # --- training ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """A fresh run begins now: before its first forward."""
        self.tiers.forget_windows()
        if self.policy.name == "sparse" and not _is_compiled(self._need().live.module):
            live = self._need().live
            self._observer = ComputeDtypeObserver({n: live.parameters[n] for n in live.trainable()})
            self._observer.start()
        self._started_at = time.perf_counter()

    def restore(self, run_state: RunState) -> None:
        """Put the state of the restore point's first iteration in place: before the first forward.

        The adapter has put its own part back already. What follows is a replay of ``num_slots - 1`` iterations, driven
        by :meth:`boundary`.
        """
        attached, point = self._need(), self.tiers.point
        assert point is not None
        state = EngineState.of(point)
        self.iteration = point.manifest.first_iteration
        self.compute_dtype.update(state.compute_dtype)
        attached.routing.load_state(state)
        if isinstance(self.policy, PartialExpertsPolicy):
            self.policy.num_experts, self.policy.checkpoints = state.policy["num_experts"], state.policy["checkpoints"]
        slots, carried = point.slots(), point.carried()
        skip = self._skips_gradients
        reconstruction = Reconstruction(attached.live, slots, carried, skip_gradients=skip)
        self.recovery = Recovery(reconstruction, point, state, bus=self.bus, on_mismatch=self.config.on_mismatch)
        self.recovery.begin(attached.live, run_state.generators())
        self.norms.give(self.recovery.norms_to_give() if skip else None)
        if point.tier is self.tiers.host:
            attached.writer.adopt(point.manifest)
        if not self.policy.exact:
            attached.routing.report_lost(self.policy, point, self.bus, self.iteration)
        attached.steps.take()
        self.witness.take()
        if self.recovery.done:
            self._end_recovery()
        self._started_at = time.perf_counter()

    def record_loss(self, loss: Tensor) -> None:
        """Note the loss of a micro-batch, for the witness (0-d tensor; read later, on another thread)."""
        self.witness.losses.append(loss.detach())

    def attempt_step(self) -> None:
        """An optimizer step is about to be tried: if it then does not happen, it was skipped."""
        self._need().steps.attempt()

    def hold(self) -> None:
        """Wait until nothing is being copied from the live state: before anything may change it."""
        if self._observer is not None:
            self._observer.pause()
        if self._attached is not None:
            self._stall += self._attached.thread.wait_copied()

    def boundary(self, run_state: RunState) -> bool:
        """An iteration may have ended. Returns whether one did.

        Call it where the state is whole: after the optimizer's step, its scheduler, validation and hooks, before the
        next forward.
        """
        attached = self._need()
        if self._observer is not None:
            self._observer.resume()
        if not any(attached.steps.steps):
            if attached.steps.attempts:
                attached.steps.attempts = 0
                self.bus.emit(StepSkipped(iteration=self.iteration))
                self.witness.take()
            return False
        steps = attached.steps.take()
        self.iteration += 1
        now = time.perf_counter()
        seconds, stall = now - self._started_at, self._stall
        self._started_at, self._stall = now, 0.0
        self.pace.iteration(seconds)
        attached.routing.end_iteration()
        witness = self.witness.take(attached.live.optimizers)
        if self._observer is not None:
            self._end_observed_iteration()
        self.bus.emit(IterationFinished(iteration=self.iteration, seconds=seconds, stall_seconds=stall))
        if self.recovery is not None:
            self.recovery.end_iteration(witness.read())
            self.norms.give(self.recovery.norms_to_give() if self._skips_gradients else None)
            if not self.recovery.done:
                return True
            self._end_recovery()
        self._fall_back_to_dense_if_needed(steps)
        window = self._open_window(run_state)
        if window is not None:
            attached.writer.capture(window, self.iteration, witness.read)
            if window.complete:
                self._window = None
        return True

    @property
    def _skips_gradients(self) -> bool:
        return self.config.skip_frozen_gradients and self.may_skip_gradients

    @property
    def converting(self) -> bool:
        """Whether a replay is under way: the live state is not dense."""
        return self.recovery is not None

    @property
    def routing(self) -> TokenCounts:
        """Token counts."""
        return self._need().routing

    @property
    def operators(self) -> OperatorSet:
        """The operators of the module."""
        assert self._operators is not None
        return self._operators

    def stop_observing(self) -> None:
        """Leave the observation of compute dtypes (harmless if none is running)."""
        if self._observer is not None:
            self._observer.stop()
            self._observer = None

    def drain(self) -> None:
        """Wait until every capture so far is committed or given up."""
        if self._attached is not None:
            self._attached.thread.drain()

    def close(self, *, completed: bool) -> None:
        """End: finish what is in flight; keep the windows for a restart, or remove them if training is complete."""
        self.stop_observing()
        self.norms.remove()
        try:
            if self._attached is not None:
                self._attached.steps.remove()
                self._attached.routing.close()
                self._attached.thread.close()
        finally:
            if self.recovery is not None:
                self.recovery.release()
                self.recovery = None
            self.tiers.close(completed=completed)
        if self._attached is not None:
            thread, self._attached = self._attached.thread, None
            if not completed:
                return
            thread.raise_error()

    # --- inside --------------------------------------------------------------------------------------------------

    def _need(self) -> _Attached:
        if self._attached is None:
            raise RuntimeError("Engine.attach(module, optimizers) must be called first")
        return self._attached

    def say_once(self, message: str) -> None:
        """Log a notice, once."""
        if message not in self._said:
            self._said.add(message)
            _log.info(message)
            self.bus.emit(Notice(message=message))

    def _after_step(self, index: int) -> None:
        if self.recovery is not None:
            self.recovery.after_step(index)

    def _find_operators(self) -> None:
        attached = self._need()
        live, layers = attached.live, attached.routing.layers
        self._operators = build_operators(
            live.module, layers, trainable=live.trainable(), sliceable=live.is_elementwise
        )
        dense = sum(live.full_bytes(n) for n in live.trainable())
        self.bus.emit(
            OperatorsFound(
                num_operators=len(self._operators.operators),
                num_moe_layers=len(layers),
                num_experts=sum(layer.num_experts for layer in layers),
                dense_bytes=dense,
            )
        )
        if not layers:
            self.say_once(
                "no mixture-of-experts layer was found: checkpointing works all the same, in slots of shared operators. "
                "If the module has experts, describe them with specs=[MoESpec(...)] (see `moetion explain`)."
            )
        if self._operators.unsliced:
            self.say_once(
                "the experts of these parameters cannot be captured one by one, because their optimizer couples rows: "
                + ", ".join(self._operators.unsliced[:4])
            )

    def _end_observed_iteration(self) -> None:
        observer = self._observer
        assert observer is not None
        self.compute_dtype.clear()
        self.compute_dtype.update(observer.result())
        if not observer.unseen() or self.iteration >= _OBSERVED_ITERATIONS:
            self.stop_observing()

    def _end_recovery(self) -> None:
        assert self.recovery is not None
        self.recovery.finish()
        self.recovery = None
        self.norms.give(None)
        self.tiers.release_point()

    def _fall_back_to_dense_if_needed(self, steps: Sequence[int]) -> None:
        if self.policy.name != "sparse":
            return
        attached = self._need()
        reason = ""
        if max(steps) > 1:
            reason = f"an optimizer stepped {max(steps)} times within one iteration"
        elif attached.steps.self_tuning:
            names = sorted(type(attached.live.optimizers[i]).__name__ for i in attached.steps.self_tuning)
            reason = f"{', '.join(names)} changes its own settings from the state of all parameters"
        if reason:
            self.policy = DensePolicy()
            self.say_once(f"{reason}: a sparse window could not be replayed exactly, so every iteration is dense now")
            if self._window is not None:
                self._window.broken = reason

    def _open_window(self, run_state: RunState) -> OpenWindow | None:
        """The window that the iteration that has just ended belongs to, beginning one if it is time."""
        attached = self._need()
        if self._window is not None:
            if not self._window.broken:
                return self._window
            _log.info("window from iteration %d given up: %s", self._window.first_iteration, self._window.broken)
            attached.writer.abandon(self._window)
            self._window = None
            self._static_digest = ""
        signature = attached.live.signature()
        if attached.routing.settle() or tuple(attached.live.trainable()) != self._trainable:
            self._find_operators()
        assert self._operators is not None
        sizes = Sizes.of(attached.live, self.compute_dtype)
        context = attached.routing.context(
            iteration=self.iteration,
            operators=self._operators.operators,
            sizes=sizes,
            iteration_seconds=self.pace.iteration_seconds,
            bytes_per_second=self.pace.bytes_per_second(self._bandwidth),
            newest=attached.writer.newest,
        )
        plan = self.policy.plan(context)
        if plan is None:
            return None
        self._announce(plan, sizes)
        attached.routing.captured(plan)
        self._window = OpenWindow(
            plan=plan,
            first_iteration=self.iteration,
            header=WindowHeader(
                policy=self.policy.name,
                parameters=attached.parameters,
                fingerprint=attached.fingerprint,
                extra=self._engine_state(),
            ),
            rest=self._flatten(run_state),
            static=self._static_part(),
            signature=signature,
        )
        return self._window

    @property
    def _trainable(self) -> tuple[str, ...]:
        assert self._operators is not None
        static = set(self._operators.static)
        return tuple(n for n in self._need().live.parameters if n not in static)

    def _engine_state(self) -> dict[str, Any]:
        policy = {}
        if isinstance(self.policy, PartialExpertsPolicy):
            policy = {"num_experts": self.policy.num_experts, "checkpoints": self.policy.checkpoints}
        return {
            "compute_dtype": {n: str(d).removeprefix("torch.") for n, d in self.compute_dtype.items()},
            "policy": policy,
            "routing": self._need().routing.state(),
        }

    def _flatten(self, run_state: RunState) -> FlatTree:
        live = self._need().live
        tree, leaf = capture_run_state(live, run_state.capture(), find_generators(run_state.generators()))
        return flatten_tree(tree, clone=True, leaf=leaf)

    def _static_part(self) -> FlatTree | None:
        """Parameters that never train, unless the window before holds them already."""
        live = self._need().live
        assert self._operators is not None
        names = self._operators.static
        digest = static_sample(live, names)
        if digest == self._static_digest:
            return None
        self._static_digest = digest
        return flatten_tree({n: live.parameters[n].detach() for n in names}, clone=True)

    def _announce(self, plan: WindowPlan, sizes: Sizes) -> None:
        if plan.schedule is None or not plan.changed:
            return
        schedule = plan.schedule
        self._check_memory(schedule.total_bytes)
        self.bus.emit(
            ScheduleMade(
                window=schedule.window,
                heaviest_bytes=schedule.heaviest_bytes,
                total_bytes=schedule.total_bytes,
                dense_bytes=schedule.dense_bytes,
                reason=plan.changed,
            )
        )

    def _check_memory(self, window_bytes: int | None) -> None:
        """Refuse before the first step, and again when a schedule is made, what the host memory cannot hold."""
        live = self._need().live
        if window_bytes is None:
            full = sum(live.full_bytes(n) for n in live.trainable())
            compute = sum(p.numel() * p.element_size() for p in live.parameters.values())
            slots = self.config.window if isinstance(self.config.window, int) and self.policy.name == "sparse" else 1
            window_bytes = full + compute * (slots - 1) // 2
        buffers = sum(b.numel() * b.element_size() for b in read_buffers(live.module).values())
        self.tiers.check_capacity(window_bytes + buffers)


def _is_compiled(module: nn.Module) -> bool:
    """Whether any part runs compiled, where single operator calls cannot be observed."""
    return any(
        getattr(m, "_compiled_call_impl", None) is not None or type(m).__name__ == "OptimizedModule"
        for m in module.modules()
    )
