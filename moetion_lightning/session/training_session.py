"""One training run of any adapter: from the search for a window to the end of training."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from moetion_lightning.engine import Engine, LivePoint, Ranks, RestorePoint
from moetion_lightning.engine.parts import RunState
from moetion_lightning.engine.replay_record import BatchDigest
from moetion_lightning.engine.reporting import Reporter, show_log_lines
from moetion_lightning.errors import ConfigurationError, HostMemoryError
from moetion_lightning.events import (
    EventBus,
    GroupsFormed,
    JsonlSink,
    LossNoticed,
    ProcessEnded,
    Sink,
    ValidationFinished,
)
from moetion_lightning.session.beginning import Beginning, of_optimizers
from moetion_lightning.session.fits import Fit
from moetion_lightning.session.lineage import LIMITS
from moetion_lightning.session.process_start import describe_process
from moetion_lightning.session.settings import SessionSettings
from moetion_lightning.session.skipped_batches import SkippedBatches
from moetion_lightning.session.versions import notice_untested

__all__ = ["TrainingSession"]

_log = logging.getLogger(__name__)
_NOT_REACHED = (
    "training ended before it came to where the window begins that was found: nothing was trained, and the windows are "
    "kept. Start it with as many epochs or steps as before, or begin afresh with another job_id (MOETION_JOB_ID)."
)


class TrainingSession:
    """Connects one run of an adapter to the engine: everything that the adapters do alike.

    An adapter opens it when the weights exist that training would begin with, attaches the module and its optimizers,
    begins before the first forward, and calls :meth:`boundary` whenever an iteration may have ended.

    Ranks: all of them make it, and call its methods, together.

    Args:
        settings: The user's.
        where: The user's call, for messages.
        root_dir: Where the run writes its files: part of the derived job identity.
        ranks: The ranks of the job.
        sinks: Further listeners.
        groups_seconds: What forming their process groups took, where that is known.
    """

    def __init__(
        self,
        settings: SessionSettings,
        where: str,
        root_dir: str | os.PathLike[str],
        ranks: Ranks,
        sinks: Sequence[Sink] = (),
        groups_seconds: float = 0.0,
    ) -> None:
        rank, world_size = ranks.control.rank, ranks.control.world_size
        show_log_lines(rank)
        notice_untested()
        self._settings = settings
        self._where = where
        self._groups_seconds = groups_seconds
        self.ranks = ranks
        self.reporter = Reporter()
        path = settings.events_path
        self._jsonl = None if path is None else JsonlSink(path, rank=rank if world_size > 1 else None)
        own: tuple[Sink, ...] = (self.reporter, *([self._jsonl] if self._jsonl is not None else []))
        self._bus = EventBus((*own, *settings.sinks, *sinks))
        self._fit = Fit(settings.config, root_dir, ranks)
        #: Which batches are left out; adapters that ask it say where they are.
        self.skipped = SkippedBatches(settings.config.skip_batches, self._say_once)
        self._engine: Engine | None = None
        self._point: RestorePoint | LivePoint | None = None
        self._run_state: RunState | None = None
        self._optimizers: tuple[Optimizer, ...] = ()
        self._is_open = self._closed = self._trained = self._at_exit = False
        # A script may end, or fail, without an end of the run: a copy that is under way then would abort the
        # interpreter's end.
        atexit.register(self._close_at_exit)

    # --- before training -----------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The engine, once the session is open."""
        if self._engine is None:
            raise RuntimeError("TrainingSession.open() must be called first")
        return self._engine

    @property
    def is_open(self) -> bool:
        """Whether :meth:`open` was called."""
        return self._is_open

    def open(self, beginning: Beginning) -> RestorePoint | LivePoint | None:
        """Decide which windows belong to this fit, and find the newest one that is whole; once more after a loss.

        Args:
            beginning: How this fit begins, as far as it is known now (:mod:`~.beginning`).

        Returns:
            Where training continues; None if it begins anew.

        Raises:
            ForeignWindowError: The windows of this job are of another model, other optimizers, other loaders.
            StoreError, HostMemoryError, JobBusyError, CorruptSnapshotError, VersionError: See the message.
        """
        fit, settings = self._fit, self._settings
        if self._engine is None:
            fit.decide(beginning)
            self._bus.emit(describe_process(settings, self._where, fit.job, self.ranks, self._groups_seconds))
            self._engine = Engine(settings.config, settings.policy, bus=self._bus, job=fit.job, ranks=self.ranks)
            self._engine.counts_tokens = settings.counts_tokens
        self._engine.tiers.left = fit.continues_what_was_left
        self._point = self._engine.open(fit.accept, fresh=fit.is_fresh)
        self._is_open = True
        self._continue_skipping()
        fit.found(self._point)
        return self._point

    @property
    def point(self) -> RestorePoint | LivePoint | None:
        """Where training will continue; None if it begins anew, or has begun."""
        return self._point

    @property
    def saved(self) -> Any:
        """The adapter's part of that state; None if there is none."""
        return None if self._point is None else self._point.run_state()["adapter"]

    def last_step(self, step: int) -> int:
        """Optimizer steps at the end of the state that was found, given those at its beginning."""
        point = self._point
        return step + (point.replays if isinstance(point, RestorePoint) else 0)

    def find_again(self) -> RestorePoint | LivePoint | None:
        """Ranks were replaced: agree with all others where to continue, in this process."""
        self._point = self.engine.find_again()
        self._continue_skipping()
        self._run_state = None
        return self._point

    @property
    def restarted(self) -> bool:
        """Whether another process of this job was started before, be it that it left no window."""
        return self._fit.restarted

    @property
    def trained(self) -> bool:
        """Whether this process has trained in this run."""
        return self._trained

    def prefer(self, what: str, step: int | None = None) -> None:
        """The user has put another state in place: it wins over the window that was found.

        Args:
            what: The user's call.
            step: The step of that state, if it is known.

        Raises:
            ConfigurationError: Training is under way: windows of two courses would mix.
        """
        if self.begun and not self._closed:
            raise ConfigurationError(
                f"{what} while {self._where} captures: the state would change in the middle of a window. Load before "
                "the loop begins, or call close() first."
            )
        said = self._fit.preferred(what, step, self._point)
        if said:
            self.engine.say_once(said, warning=True)
        self._point = None
        self._continue_skipping()
        self.engine.tiers.release_point()

    def _continue_skipping(self) -> None:
        self.skipped.continue_from({} if self._point is None else self._point.extra.get("lineage", {}))
        self.engine.next_is_another = self._point is not None and self.skipped.next_is_another

    def _say_once(self, message: str, *, warning: bool = False) -> None:
        self.engine.say_once(message, warning=warning)

    def set_precision(self, *, autocast: bool, averaging: bool = False, sharded: bool = False) -> None:
        """Say how the forward reads the weights: whether compute weights may be 16 bits wide is observed only there.

        Args:
            autocast: Whether the forward may cast parameters to 16 bits.
            averaging: Whether something else reads the weights in full, perhaps only later.
            sharded: Whether shards are gathered (or modules compiled) before they are used, which is not seen.
        """
        self.engine.precision.enabled = autocast and not (averaging or sharded)

    def needs_all_gradients(self) -> None:
        """A gradient scaler decides by all gradients whether a step is skipped."""
        self.engine.may_skip_gradients = False
        if self.engine.config.skip_frozen_gradients:
            self.engine.say_once(
                "skip_frozen_gradients=True has no effect with a gradient scaler: whether a step is skipped "
                "depends on all gradients. Replays compute them all."
            )

    def learn(self, more: Beginning) -> None:
        """Something more has become known of how this fit begins; before anything of a window is put in place.

        Raises:
            ForeignWindowError: The windows are of other optimizers, schedulers or loaders.
        """
        self._fit.learn(more)

    def attach(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Connect the module and its optimizers.

        Raises:
            OperatorError, ForeignWindowError, HostMemoryError, ConfigurationError: See the message.
        """
        self.learn({"settings": of_optimizers(optimizers)})
        if self._point is None:
            self.engine.tiers.release_point()
        self.engine.attach(module, optimizers, self._settings.specs)
        self._optimizers = tuple(optimizers)

    @property
    def attached(self) -> bool:
        """Whether :meth:`attach` was called."""
        return bool(self._optimizers)

    def check(self, run_state: RunState) -> None:
        """Refuse a state that cannot be stored, and windows that the memory cannot hold, before the first step.

        Raises:
            UnsupportedStateError, HostMemoryError: See the message.
        """
        try:
            self.engine.check_run_state(run_state)
        except HostMemoryError:
            if not self._fit.give_room():
                raise
            self.engine.check_run_state(run_state)

    def begin(
        self, run_state: RunState, before_restore: Callable[[Any], None], schedulers: Sequence[Any], *, step: int
    ) -> None:
        """Put the state in place from which training continues, or begin afresh: right before the first batch.

        Args:
            run_state: The adapter's part of the state.
            before_restore: Puts the adapter's part back; called before the engine restores.
            schedulers: Learning-rate schedulers.
            step: Optimizer steps before the first batch, as the adapter counts them.

        Raises:
            ForeignWindowError: The windows are of other optimizers, schedulers or loaders.
            StageReplayError, RankLostError: As of :meth:`Engine.restore`.
        """
        engine, point = self.engine, self._point
        changed = self._fit.complete(point, step)
        for difference in changed:
            engine.say_once(f"changed since the window was captured: {difference}", warning=True)
        engine.changed_settings = [d.name for d in changed if d.counts == "script" and d.name not in LIMITS]
        engine.lineage = self._lineage
        self._trained = True
        if point is None:
            self._run_state = run_state
            engine.start(run_state)
            return
        before_restore(point.run_state()["adapter"])
        self._run_state, self._point = run_state, None
        engine.on_recovered = self._fit.adoption(changed, self._optimizers, schedulers)
        engine.restore(run_state)

    def _lineage(self) -> dict[str, Any]:
        return {**self._fit.lineage, **self.skipped.described()}

    # --- training ------------------------------------------------------------------------------------------------

    @property
    def begun(self) -> bool:
        """Whether training has begun."""
        return self._run_state is not None

    @property
    def replaying(self) -> bool:
        """Whether iterations are done again from a window: the live state is not whole yet."""
        return self._engine is not None and self._engine.converting

    def boundary(self) -> None:
        """A batch is done, with all that belongs to it."""
        if self._run_state is not None and not self._closed:
            self.engine.boundary(self._run_state)

    def record_batch(self, batch: BatchDigest) -> None:
        """A batch is trained on next: replays, and what follows them, are compared by it.

        Raises:
            NonDeterminismError: It is not the one that followed before, and ``on_mismatch="raise"``.
        """
        if self._run_state is not None and not self._closed:
            self.engine.record_batch(batch)

    def record_loss(self, loss: Tensor) -> None:
        """The loss of a batch: replays are compared by it."""
        if self._engine is not None and not self._closed and loss.numel() == 1:
            self._engine.record_loss(loss)

    def attempt_step(self) -> None:
        """An optimizer step is about to be tried."""
        if self._optimizers and not self._closed:
            self.engine.attempt_step()

    def hold(self) -> None:
        """Something other than the optimizer may change weights now."""
        if self._engine is not None:
            self._engine.hold()

    def loss_noticed(self) -> None:
        """Another rank was lost, and this process goes on: it meets the others again, and goes back with them."""
        self._bus.emit(LossNoticed(iteration=0 if self._engine is None else self._engine.iteration))

    def groups_formed(self, seconds: float) -> None:
        """All ranks have met again.

        Args:
            seconds: What forming the groups took, without the wait for those that start.
        """
        self._bus.emit(GroupsFormed(seconds=seconds))

    def validated(self, seconds: float) -> None:
        """A validation is done, in the course of training."""
        self._bus.emit(ValidationFinished(seconds=seconds))

    def end(self) -> None:
        """Training has ended: the last iteration is complete, although no next batch follows it."""
        if self._engine is not None and self._run_state is not None and not self._closed:
            self._engine.end()

    def drain(self) -> None:
        """Note a SIGTERM: :meth:`close` copies committed windows to storage within ``grace_seconds``."""
        if self._engine is not None:
            self._engine.drain()

    def close(self, *, completed: bool) -> None:
        """End. Harmless if called again.

        Args:
            completed: Whether training has come to its end. Its windows are removed when the process ends well. A
                window that was found and never put in place is kept all the same.
        """
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._close_at_exit)
        if completed and self._point is not None:
            completed = False
            _log.warning(_NOT_REACHED)
        with contextlib.ExitStack() as stack:
            if self._jsonl is not None:
                stack.callback(self._jsonl.close)
            if self._engine is not None:
                if completed:
                    self._engine.end()
                stack.callback(
                    self._bus.emit, ProcessEnded(completed=completed, reason="" if completed else self._reason())
                )
            if self._engine is not None:
                stack.callback(self._fit.ended, self._engine, completed=completed and self._trained)
                self._engine.close(trained=completed and self._trained)
                if self.begun and not completed:
                    self._say_what_is_kept(self._engine)

    def _say_what_is_kept(self, engine: Engine) -> None:
        host, disk = engine.tiers.host, engine.tiers.disk
        kept = host.windows()
        if kept:
            also = f", of storage at {disk.location}" if disk is not None else ""
            _log.info(
                "training stops before its end. Iteration %d is kept in %s%s: the same command continues there, and "
                "`moetion clean --job %s` removes it.",
                kept[0], host.location, also, host.job,
            )  # fmt: skip
        else:
            _log.info("training stops before its end, and before its first window: the same command begins anew")

    def _close_at_exit(self) -> None:
        self._at_exit = True
        self.close(completed=False)

    def _reason(self) -> str:
        """Why training ends here: the error that is on its way, or that has ended the script."""
        error = sys.exc_info()[1] or (getattr(sys, "last_value", None) if self._at_exit else None)
        if error is None:
            return "ended before training was complete"
        name, first = type(error).__name__, str(error).partition("\n")[0][:200]
        name = name.replace("SIGTERMException", "SIGTERM")
        return f"{name}: {first}" if first else name
