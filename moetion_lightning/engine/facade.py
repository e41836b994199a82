"""The engine: captures windows while training runs, and rebuilds the state after a failure.

An adapter (a Lightning callback, an Accelerate hook, a plain loop) opens the engine, attaches it to the module and its
optimizers, and calls :meth:`Engine.boundary` whenever an iteration may have ended: after the optimizer's step and
everything that belongs to it, and before the next forward. The engine never calls the adapter's framework.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moetion_lightning.capture import make_fence
from moetion_lightning.capture.thread import CaptureThread
from moetion_lightning.config import EngineConfig
from moetion_lightning.core.digests import rng_digests
from moetion_lightning.core.discovery import discover_layers
from moetion_lightning.core.grad_norm import GradNormSeam
from moetion_lightning.core.kept_values import Fresh
from moetion_lightning.core.layouts import MoELayer, MoESpec
from moetion_lightning.core.log_policy import GradientLogPolicy
from moetion_lightning.core.pace import Pace
from moetion_lightning.core.policy import PacedDensePolicy, PartialExpertsPolicy, Policy, SparsePolicy
from moetion_lightning.core.state import LiveState
from moetion_lightning.engine.completeness import check_complete, make_reconstruction
from moetion_lightning.engine.journal import LivePoint
from moetion_lightning.engine.living import Living
from moetion_lightning.engine.log_capture import GradientLog
from moetion_lightning.engine.log_recovery import LogRecovery
from moetion_lightning.engine.log_writer import LogWriter
from moetion_lightning.engine.model_state import exchange_model_state
from moetion_lightning.engine.parts import Attached, RunState
from moetion_lightning.engine.planner import WindowPlanner, kept_points
from moetion_lightning.engine.precision_watch import PrecisionWatch
from moetion_lightning.engine.protection import Protection
from moetion_lightning.engine.ranks import Ranks
from moetion_lightning.engine.recovery import Recovery
from moetion_lightning.engine.replay_record import (
    BatchDigest,
    BatchToCome,
    IterationRecorder,
    record_of_next,
    tell_loss,
)
from moetion_lightning.engine.restore import RestorePoint
from moetion_lightning.engine.run_state import EngineState, capture_run_state
from moetion_lightning.engine.shares import Shares
from moetion_lightning.engine.slot_files import SlotFiles, WindowHeader
from moetion_lightning.engine.stage_recovery import Stages
from moetion_lightning.engine.steps import StepWatcher
from moetion_lightning.engine.tiers import Tiers
from moetion_lightning.engine.window_capture import WindowCapture
from moetion_lightning.engine.writer import WindowWriter
from moetion_lightning.errors import NonDeterminismError
from moetion_lightning.events import (
    EventBus,
    IterationFinished,
    LastIterationFinished,
    Notice,
    RestoreApplied,
    StepSkipped,
)
from moetion_lightning.moe.routing import Routing, TokenCounts
from moetion_lightning.storage.choice import Accept
from moetion_lightning.storage.tree import FlatTree, flatten_tree
from moetion_lightning.storage.tree_cache import TreeCache

__all__ = ["Engine", "RunState"]

_log = logging.getLogger(__name__)
_NOT_REPLAYED = "a sparse window could not be replayed exactly, so windows are dense now"
_NOT_LOGGED = "the steps could not be done again from a log, so windows are dense now"


class Engine:
    """Sparse checkpointing and exact recovery of one rank.

    Ranks: one engine per rank; with one rank nothing is exchanged.

    Args:
        config: Settings.
        policy: What to capture when.
        bus: Gets the events.
        job: Identity of the job.
        ranks: The other ranks, and how the state lies over them.
    """

    def __init__(
        self, config: EngineConfig, policy: Policy, *, bus: EventBus, job: str, ranks: Ranks | None = None
    ) -> None:
        self.ranks = ranks if ranks is not None else Ranks()
        self.config = config
        self.policy = policy
        self.bus = bus
        self.job = job
        self.iteration = 0
        self.tiers = Tiers(config, job, bus, self.ranks)
        self.pace = Pace()
        self.norms = GradNormSeam()
        self.record = IterationRecorder(self.norms)
        self.recovery: Recovery | None = None
        self.precision = PrecisionWatch()
        #: Whether somebody beside the engine wants to know the tokens of each expert: before :meth:`attach`.
        self.counts_tokens = False
        #: An adapter with a gradient scaler clears this: whether a step was skipped depends on all gradients.
        self.may_skip_gradients = True
        self.living = Living(self.ranks, self.tiers)
        #: What the windows say of the course of training that they belong to.
        self.lineage: Callable[[], Mapping[str, Any]] = dict
        #: Whether the batch behind the restored state is another one than before, on purpose.
        self.next_is_another = False
        #: Settings that the user has changed since the window was captured, and whose new values are in use.
        self.changed_settings: Sequence[str] = ()
        #: Called when a restored state is whole, before training goes on.
        self.on_recovered: Callable[[], None] | None = None
        self._attached: Attached | None = None
        self._windows: WindowCapture | None = None
        self._log: GradientLog | None = None  # in place of windows
        self._records_batches = False  # whether the adapter does
        self._to_come: BatchToCome | None = None  # of a window that is whole but for the batch behind it
        self._concluding: Recovery | LogRecovery | None = None  # its state is dense, and the batch behind it not known
        self._stall = 0.0
        self._sparse: Policy | None = None  # in whose place a dense one is
        #: Set when the state that was restored is that after a batch: what follows the batch comes next.
        self.restored_after_batch = False
        self._started_at = 0.0
        self._said: set[str] = set()
        self.protection = Protection(bus, self._say)
        self._flattened, self._noted = TreeCache(), TreeCache()
        self._stages = Stages(self.ranks, bus)

    # --- before training -----------------------------------------------------------------------------------------

    def open(self, accept: Accept | None = None, *, fresh: bool = False) -> RestorePoint | LivePoint | None:
        """Open the tiers and look for a window of this job, together with all ranks.

        Args:
            accept: Says why a window is not to be restored; None: all may be.
            fresh: Look for none: training begins anew.

        Returns:
            The newest whole window, verified, or what other ranks still hold; None if there is nothing.

        Raises:
            StoreError, HostMemoryError, JobBusyError, CorruptSnapshotError, VersionError: See the message.
        """
        replay_stages = self._stages.may_replay(self.policy)
        return self.tiers.open(self.living.report, replay_stages=replay_stages, accept=accept, fresh=fresh)

    def find_again(self) -> RestorePoint | LivePoint | None:
        """Ranks were replaced: give up what is under way, and agree with all ranks where to continue.

        Also after :meth:`restore` has raised a :class:`~.stage_recovery.StageReplayError`.

        Returns:
            As :meth:`open`; None if no rank has trained yet.

        Raises:
            RankLostError: Nothing is left that all ranks can reach; or another rank was lost meanwhile.
        """
        self._abandon()
        return self.tiers.find_together(
            self.living.report, first=self._attached is None, replay_stages=self._stages.may_replay(self.policy)
        )

    def attach(self, module: nn.Module, optimizers: Sequence[Optimizer], specs: Sequence[MoESpec] = ()) -> None:
        """Connect the module and its optimizers, before the first forward.

        Raises:
            ConfigurationError, OperatorError, ForeignWindowError, StateLostError, UnsupportedStateError: See the
                message.
        """
        layout = self.ranks.layout()
        point = self.tiers.point
        window = point.window if isinstance(point, LivePoint) else point
        if window is not None:
            window.materialize(module)
        live = LiveState(module, optimizers, self.config.elementwise_optimizers, held=layout.parameters)
        live.check_devices()
        if window is not None:
            window.check_model(live.parameters)
            check_complete(window, live, self.ranks.control.world_size)
        devices = list(dict.fromkeys(p.device for p in live.parameters.values())) or [torch.device("cpu")]
        layers = discover_layers(module, specs) if layout.layers is None else layout.layers
        routing = Routing(layers)
        if self._uses_routing:
            routing = TokenCounts(module, layers, self.bus, counted=layout.counted, held=layout.parameters)
        thread = CaptureThread(make_fence(devices))
        dtypes = self.precision.compute_dtype
        holders = {name: ranks for name, ranks in layout.holders.items() if name in live.parameters}
        shares = Shares(self.ranks, holders, self.config.sharding, self.bus)
        planner = WindowPlanner(
            live, routing, self.tiers, self.pace, dtypes, self.bus, self.say_once, self.ranks, shares, layout,
            keep_rounds=self.config.keep_rounds,
        )  # fmt: skip
        files = SlotFiles(self.tiers.host, thread, live, dtypes)
        self._attached = Attached(
            live=live,
            routing=routing,
            planner=planner,
            shares=shares,
            steps=StepWatcher(
                live.optimizers,
                live.calls_closure_first(),
                enter=self._step_is_entered,
                before=self._before_update,
                ready=self._gradients_are_ready,
                done=self._after_update,
                after=self._after_step,
            ),
            thread=thread,
            writer=WindowWriter(
                files,
                self.bus,
                self.pace,
                self.tiers.on_commit,
                keeps_older=not self.ranks.alone,
            ),
        )
        self._windows = WindowCapture(
            self._attached,
            tiers=self.tiers,
            ranks=self.ranks,
            stages=self._stages,
            protection=self.protection,
            precision=self.precision,
            header=self._header,
            with_lineage=self._with_lineage,
            flatten=self._flatten,
            fall_back=self._fall_back_to_dense,
            say_once=self.say_once,
        )
        if isinstance(self.policy, GradientLogPolicy):
            keeps = kept_points(self.ranks, self.config.keep_rounds, self.policy.window)
            writer = LogWriter(files, self.bus, self.pace, self.tiers.on_commit, keeps=keeps)
            self._log = GradientLog(
                self._attached,
                writer,
                self.policy,
                tiers=self.tiers,
                ranks=self.ranks,
                protection=self.protection,
                header=self._header,
                say_once=self.say_once,
                bus=self.bus,
                audit=self.config.audit,
            )
        self.norms.install()

    def check_run_state(self, run_state: RunState) -> None:
        """Before the first step: refuse a state that cannot be stored, and windows that the memory cannot hold.

        Raises:
            UnsupportedStateError, HostMemoryError: See the message.
        """
        attached = self._need()
        if self.config.skip_frozen_gradients and not self.ranks.alone:
            where = "no effect" if self.ranks.link() is None else "an effect only where a stage is replayed alone"
            self.say_once(
                f"skip_frozen_gradients=True has {where} in a job of several ranks: their gradients are summed. "
                "Replays of all ranks together compute them all."
            )
        tensors = self._flatten(run_state).tensors
        device = next((p.device for p in attached.live.parameters.values()), torch.device("cpu"))
        attached.planner.prepare(self.policy, device, sum(t.numel() * t.element_size() for t in tensors))

    # --- training ------------------------------------------------------------------------------------------------

    def start(self, run_state: RunState) -> None:
        """A fresh run begins now: before its first forward."""
        self._need().steps.take()
        self.tiers.set_aside()
        self.tiers.training_begins()
        self.precision.enabled = self.precision.enabled and self.policy.name == "sparse"
        self.precision.start(self._need().live)
        self._stages.begin(self.iteration + 1)
        noted = self._note_boundary(run_state)
        self.protection.begin(restored=False)
        self._begin_log(noted)
        self._started_at = time.perf_counter()

    def restore(self, run_state: RunState) -> None:
        """Put the state of the restore point's first iteration in place: before the first forward.

        The adapter has put its own part back already. What follows is a replay of ``num_slots - 1`` iterations, driven
        by :meth:`boundary`. After a :class:`LivePoint` nothing follows: lost stages of a pipeline replay in here.

        Raises:
            StageReplayError: On all ranks: a stage's replay was not exact. Call :meth:`find_again`, put the adapter's
                part of what it returns in place, and come here again.
            RankLostError: Another rank was lost meanwhile.
        """
        attached, point = self._need(), self.tiers.point
        assert point is not None
        self.tiers.training_begins()
        state = EngineState.of(point)
        attached.steps.take()
        self.record.take()
        attached.routing.load_state(state.routing)
        attached.planner.restored()
        self.living.serial = int(point.extra["serial"])
        self._records_batches = self._records_batches or bool(point.extra.get("next"))
        if isinstance(self.policy, PartialExpertsPolicy):
            self.policy.num_experts, self.policy.checkpoints = state.policy["num_experts"], state.policy["checkpoints"]
        noted: Callable[[], FlatTree] | None
        if isinstance(point, LivePoint):
            noted = self._continue(point, state, run_state)
        elif point.is_log:
            noted = self._rebuild(point, state, run_state)
        else:
            noted = self._replay(point, state, run_state)
        self._stages.failed = False
        self.protection.begin(restored=True)
        if noted is not None:
            self._begin_log(noted, point.captured_at)
        self._started_at = time.perf_counter()

    def _begin_log(self, state: Callable[[], FlatTree], captured_at: float | None = None) -> None:
        """The state is whole, and training goes on from it. Its time is given if it was restored."""
        if self._log is None:
            return
        self._expect(self._log.begin(self.iteration, state, captured_at))
        self._give_the_log_up()
        if self._log is not None and self._log.synchronous:
            self._wait()

    def _expect(self, to_come: BatchToCome | None) -> None:
        """The batch behind what was captured comes next, if the adapter tells of batches."""
        if to_come is not None and self._records_batches:
            self._to_come = to_come
        elif to_come is not None:
            to_come.never_comes()

    def _give_the_log_up(self) -> None:
        """If what the optimizers do cannot be logged: windows take its place."""
        if self._log is not None and self._log.given_up:
            log, self._log = self._log, None
            log.abandon()
            if log.writer.newest is not None:
                self._need().writer.adopt(log.writer.newest)
            self._fall_back_to_dense(log.given_up)

    def _rebuild(self, point: RestorePoint, state: EngineState, run_state: RunState) -> Callable[[], FlatTree]:
        """From a gradient log: nothing runs again but optimizer steps."""
        attached = self._need()
        self.living.replaced()
        self.iteration = point.manifest.iteration
        recovery = LogRecovery(point, attached.live, self.bus, self.config.on_mismatch)
        recovery.rebuild(state, run_state.generators(), self.ranks.control.world_size)
        self._concluding = recovery
        self._stages.begin(self.iteration + 1)
        if point.tier is self.tiers.host:
            attached.writer.adopt(point.manifest)
        self.tiers.release_point()
        if self.on_recovered is not None:
            self.on_recovered()
        return self._note_boundary(run_state, advance=False)

    def _replay(self, point: RestorePoint, state: EngineState, run_state: RunState) -> Callable[[], FlatTree] | None:
        """From a window. Returns None if iterations have to be done again first."""
        attached = self._need()
        self.living.replaced()
        self.iteration = point.manifest.first_iteration
        self._stages.begin(self.iteration + 1)
        skip = self._skips_gradients
        world_size = self.ranks.control.world_size
        reconstruction = make_reconstruction(point, attached.live, world_size, skip_gradients=skip)
        self.recovery = Recovery(
            reconstruction,
            attached.live,
            point,
            state,
            bus=self.bus,
            on_mismatch=self.config.on_mismatch,
            gradients_skipped=skip,
            changed=self.changed_settings,
        )
        self.recovery.begin(attached.live, run_state.generators())
        self.norms.give(self.recovery.norms_to_give() if skip else None)
        if point.tier is self.tiers.host:
            attached.writer.adopt(point.manifest)
        if isinstance(self.policy, PartialExpertsPolicy):
            carried = {op.name: slot.iteration for slot in point.carried() for op in slot.operators}
            experts = {(op["layer"], op["expert"]) for op in point.manifest.operators if op["expert"] is not None}
            attached.routing.report_lost(self.policy, self.iteration, carried, experts, self.ranks.agree)
        self.precision.start_replay(attached.live, state.compute_dtype)
        if self.recovery.done:
            self._end_recovery()
            return self._note_boundary(run_state, advance=False) if self._log is not None else None
        return None

    def _continue(self, point: LivePoint, state: EngineState, run_state: RunState) -> Callable[[], FlatTree]:
        """From living state: this process has it, or gets it now from one that has."""
        attached, started = self._need(), time.perf_counter()
        self.iteration = point.boundary.iteration
        state.apply_structure(attached.live)
        exchange_model_state(attached.live, point.sources, self.ranks.control.rank)
        if point.replays:
            self._replay_stages(point, state, run_state)
        self._stages.begin(self.iteration + 1)
        state.apply(attached.live, run_state.generators())
        state.apply_order(attached.live)
        self.precision.compute_dtype.update(state.compute_dtype)
        manifest = None
        if point.window is not None and point.window.tier is self.tiers.host:
            manifest = point.window.manifest
        elif attached.writer.newest is None and self.tiers.host.windows():  # of the process whose place this one takes
            manifest = self.tiers.host.read_manifest(self.tiers.host.windows()[0])
        if manifest is not None:
            attached.writer.adopt(manifest)
        self.tiers.release_point()
        self.bus.emit(RestoreApplied(iteration=self.iteration, replay=0, seconds=time.perf_counter() - started))
        return self._note_boundary(run_state, advance=False)

    def _replay_stages(self, point: LivePoint, state: EngineState, run_state: RunState) -> None:
        """Lost stages replay; structure and token counts are those of the living state again afterwards."""
        attached = self._need()
        skip = self.config.skip_frozen_gradients and self.may_skip_gradients
        error = self._stages.replay(point, attached, run_state.generators(), skip=skip)
        if error is not None:
            self._say(str(error), logging.WARNING)
            raise error
        if point.window is not None:
            self.record.take()
            attached.routing.load_state(state.routing)
            state.apply_structure(attached.live)

    def record_loss(self, loss: Tensor) -> None:
        """Note the loss of a micro-batch: replays are compared by it (a copy is taken)."""
        self.record.add_loss(loss)

    def record_batch(self, batch: BatchDigest) -> None:
        """A micro-batch is about to be trained on: after :meth:`start`, :meth:`restore` or :meth:`boundary`.

        Raises:
            NonDeterminismError: A state was restored, it is not the batch that followed before, and
                ``on_mismatch="raise"``.
        """
        started = time.perf_counter()
        self.record.add_batch(batch)
        self._records_batches = True
        to_come, self._to_come = self._to_come, None
        concluding, self._concluding = self._concluding, None
        if to_come is not None or concluding is not None:
            rng = rng_digests()
            try:
                if concluding is not None:
                    concluding.conclude(None if self.next_is_another else record_of_next(batch, rng))
            except NonDeterminismError as error:
                if self._windows is not None:
                    self._windows.break_off(str(error))
                raise
            finally:
                if to_come is not None:
                    to_come.came(batch, rng)
        self._stall += time.perf_counter() - started

    def attempt_step(self) -> None:
        """An optimizer step is about to be tried: if it then does not happen, it was skipped."""
        self._need().steps.attempt()

    def hold(self) -> None:
        """Wait until nothing is being copied from the live state: before anything may change it."""
        started = time.perf_counter()
        self._wait()
        self._stall += time.perf_counter() - started
        if self._attached is not None:
            self._stall += self._attached.thread.fence.stalled_seconds()

    def _wait(self) -> None:
        if self._attached is not None:
            self._attached.thread.wait_copied()
        if self.tiers.journal is not None:
            self.tiers.journal.wait()

    def boundary(self, run_state: RunState) -> bool:
        """An iteration may have ended. Returns whether one did.

        Call it where the state is whole: after the optimizer's step, its scheduler, validation and hooks, before the
        next forward.
        """
        attached = self._need()
        started = time.perf_counter()
        self.precision.pause()  # what follows is this package's own work
        try:
            self._no_batch_to_come()
            return self._boundary(attached, run_state)
        finally:
            self.precision.resume()
            self._stall += time.perf_counter() - started

    def after_batch(self, run_state: RunState) -> None:
        """A batch is done, and what follows takes long: from here ranks go on if one is lost meanwhile.

        Call it at the same places on all ranks; the state must be whole, as for :meth:`boundary`, which follows.
        """
        started = time.perf_counter()
        if any(self._need().steps.steps) and self.recovery is None:
            self.iteration += 1
            try:
                self._note_boundary(run_state, stamp=self._stamp)
            finally:
                self.iteration -= 1
        self._stall += time.perf_counter() - started

    def _boundary(self, attached: Attached, run_state: RunState) -> bool:
        if self.restored_after_batch:
            self.restored_after_batch = False
            self._note_boundary(run_state)  # what followed the restored batch is done
        if not any(attached.steps.steps):
            if attached.steps.attempts:
                attached.steps.take()
                self.bus.emit(StepSkipped(iteration=self.iteration))
                self.record.take()
                self._stages.begin(self.iteration + 1)
                self._note_boundary(run_state)
            return False
        assert self._windows is not None
        steps = attached.steps.take()
        self.iteration += 1
        self._stages.begin(self.iteration + 1)
        now = time.perf_counter()
        seconds, stall = now - self._started_at, self._stall
        self._started_at, self._stall = now, 0.0
        self.pace.iteration(seconds)
        slot = self._windows.take_slot()
        if self.recovery is None and isinstance(self.policy, (SparsePolicy, PacedDensePolicy)):
            self.policy.iteration(self.iteration, seconds, slot)
        attached.routing.end_iteration()
        record = self.record.take(attached.live.optimizers)
        misread = self.precision.end_iteration(self.iteration, replaying=self.recovery is not None)
        own = self.pace.take_own_seconds()
        self.bus.emit(
            IterationFinished(iteration=self.iteration, seconds=seconds, stall_seconds=stall, own_seconds=own)
        )
        if self.recovery is not None:
            replayed = record.read()
            tell_loss(self.bus, self.iteration, replayed)
            self.recovery.end_iteration(replayed, misread)
            self.norms.give(self.recovery.norms_to_give() if self._skips_gradients else None)
            if not self.recovery.done:
                self.living.serial += 1
                return True
            self._end_recovery()
            if self._log is not None:
                self._begin_log(self._note_boundary(run_state))
                return True
        noted = self._note_boundary(run_state)
        if self._log is not None:
            to_come = self._log.iteration(self.iteration, noted, record.read)
        else:
            if misread:
                self._windows.break_off(f"{misread[0]} was read in full precision, not only cast to 16 bits")
            to_come = self._windows.iteration(self.policy, self.iteration, run_state, steps, record.read)
        self._expect(to_come)
        synchronous = self._windows.synchronous if self._log is None else self._log.synchronous
        self._give_the_log_up()
        if synchronous:
            self._wait()  # as all of this, it is counted by boundary()
        return True

    @property
    def layers(self) -> tuple[MoELayer, ...]:
        """The module's MoE layers, as far as they are known."""
        return self._need().routing.layers

    @property
    def _skips_gradients(self) -> bool:
        return self.config.skip_frozen_gradients and self.may_skip_gradients and self.ranks.alone

    @property
    def _uses_routing(self) -> bool:
        """Whether something needs to know how many tokens each expert gets."""
        replays_alone = self.ranks.alone or self.ranks.link() is not None
        skips = self.config.skip_frozen_gradients and self.may_skip_gradients and replays_alone
        return self.counts_tokens or not self.policy.exact or (skips and isinstance(self.policy, SparsePolicy))

    @property
    def converting(self) -> bool:
        """Whether a replay is under way: the live state is not dense."""
        return self.recovery is not None

    def drain(self) -> None:
        """Note a SIGTERM: :meth:`close` copies committed windows to storage within ``grace_seconds``."""
        self.tiers.drain()

    def end(self) -> None:
        """Training has ended: an iteration that no next batch follows is complete, too. It is told, not captured."""
        attached = self._attached
        if attached is None or self.recovery is not None or not any(attached.steps.steps):
            return
        attached.steps.take()
        last, seconds = self.iteration + 1, time.perf_counter() - self._started_at
        self.bus.emit(LastIterationFinished(iteration=last, seconds=seconds, stall_seconds=self._stall))
        tell_loss(self.bus, last, self.record.take(attached.live.optimizers).read())

    def close(self, *, trained: bool) -> None:
        """End: finish what is in flight, and keep the windows for a restart.

        Args:
            trained: Whether training has come to its end.
        """
        self.precision.stop()
        self.norms.remove()
        self._no_batch_to_come()
        try:
            if self._attached is not None:
                self._attached.steps.remove()
                self._attached.routing.close()
                self._attached.thread.close()
                assert self._windows is not None
                self._windows.settle_last()
                if self._log is not None:
                    self._log.settle()
        finally:
            if self.recovery is not None:
                self.recovery.release()
                self.recovery = None
            self.tiers.close(trained=trained)
        self._attached = None

    # --- inside --------------------------------------------------------------------------------------------------

    def _need(self) -> Attached:
        if self._attached is None:
            raise RuntimeError("Engine.attach(module, optimizers) must be called first")
        return self._attached

    def say_once(self, message: str, *, warning: bool = False) -> None:
        """Log a notice, once."""
        if message not in self._said:
            self._said.add(message)
            self._say(message, logging.WARNING if warning else logging.INFO)

    def _say(self, message: str, level: int = logging.INFO) -> None:
        _log.log(level, message)
        self.bus.emit(Notice(message=message))

    def _no_batch_to_come(self) -> None:
        """Nobody shall wait for one any more."""
        to_come, self._to_come = self._to_come, None
        if to_come is not None:
            to_come.never_comes()
        concluding, self._concluding = self._concluding, None
        if concluding is not None:
            concluding.conclude(None)

    def _before_update(self, optimizer_index: int | None) -> None:
        self.hold()
        self.precision.pause()
        if optimizer_index is not None:
            live = self._need().live
            self.record.look_at_gradients(live.optimizers[optimizer_index], live.parameters)
        self.living.about_to_update()

    # --- when a rank is lost -------------------------------------------------------------------------------------

    def _note_boundary(
        self, run_state: RunState, *, advance: bool = True, stamp: Callable[[], object] | None = None
    ) -> Callable[[], FlatTree]:
        """The state is dense and between two iterations. Returns what copies the run state, once."""

        @functools.cache
        def describe() -> FlatTree:
            attached = self._need()
            # Averaged weights cannot be taken apart from the weights; no journal is kept then.
            tree, leaf = self._tree(run_state, weights=not self.living.allowed)
            extra = Fresh(self._header().extra, first_captured_at=time.time())
            boundary = {"serial": self.living.serial, "iteration": self.iteration, "extra": extra}
            whole = {**boundary, "tree": tree, "copies": list(attached.shares.copies())}
            return flatten_tree(whole, clone=True, leaf=leaf, cache=self._noted)

        self.living.note(describe, advance=advance, stamp=stamp)
        return describe

    def _stamp(self) -> object:
        live = self._need().live
        return [live.weight(name)._version for name in live.parameters]

    def _abandon(self) -> None:
        """Give up the iteration in flight, the window being captured, and a replay under way."""
        if self._attached is None:
            return
        assert self._windows is not None
        self._no_batch_to_come()
        self._windows.abandon()
        if self._log is not None:
            self._log.abandon()
        if self.recovery is not None:
            self.recovery.release()
            self.recovery = None
        self.precision.stop()
        self.norms.give(None)
        self.tiers.release_point()
        if self._sparse is not None:  # whoever joins has not fallen back; the reason is told again at the next window
            self.policy, self._sparse = self._sparse, None
        if isinstance(self.policy, (SparsePolicy, GradientLogPolicy)):
            self.policy.forget()

    def _step_is_entered(self, index: int) -> None:
        self._tell_the_log(lambda log: log.enter_step(index))

    def _gradients_are_ready(self, index: int, result: tuple[Any, ...]) -> None:
        if self._to_come is not None:  # nobody has told of it
            self._no_batch_to_come()
        self._tell_the_log(lambda log: log.before_step(index, result))

    def _after_update(self, index: int) -> None:
        self._tell_the_log(lambda log: log.after_step(index))
        self.precision.resume()

    def _tell_the_log(self, act: Callable[[GradientLog], None]) -> None:
        if self._log is not None and self.recovery is None:
            started = time.perf_counter()
            act(self._log)
            self._stall += time.perf_counter() - started

    def _after_step(self, index: int) -> None:
        if self.recovery is not None:
            self.precision.pause()
            self.recovery.after_step(index)
            self.precision.resume()

    def _end_recovery(self) -> None:
        assert self.recovery is not None
        self.recovery.finish()
        self.recovery, self._concluding = None, self.recovery
        self.precision.stop()
        self.norms.give(None)
        self.tiers.release_point()
        if self.on_recovered is not None:
            self.on_recovered()

    def _fall_back_to_dense(self, reason: str) -> Policy:
        self._sparse = self.policy
        what = _NOT_LOGGED if isinstance(self.policy, GradientLogPolicy) else _NOT_REPLAYED
        self.policy = PacedDensePolicy(self.config.overlap_target, self.config.mtbf)
        self.say_once(
            f"{reason}: {what}: one iteration each, and as many iterations apart as a copy is worth", warning=True
        )
        return self.policy

    def _header(self) -> WindowHeader:
        return self._with_lineage(self._need().planner.header(self.policy, self.living.serial))

    def _with_lineage(self, header: WindowHeader) -> WindowHeader:
        """As it is now: a window says what has happened until its end."""
        return dataclasses.replace(header, extra={**header.extra, "lineage": dict(self.lineage())})

    def _tree(self, run_state: RunState, *, weights: bool) -> tuple[dict[str, Any], Callable[[object], Any]]:
        live = self._need().live
        adapter = run_state.capture(weights=weights)
        tree, leaf = capture_run_state(live, adapter, run_state.generators())
        return tree, leaf

    def _flatten(self, run_state: RunState) -> FlatTree:
        tree, leaf = self._tree(run_state, weights=True)
        return flatten_tree(tree, clone=True, leaf=leaf, cache=self._flattened)
