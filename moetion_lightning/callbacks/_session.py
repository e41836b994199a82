"""One training run of one trainer: Lightning's hooks, onto a session."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from moetion_lightning.callbacks._beginning import FitCall, of_trainer
from moetion_lightning.callbacks._data_seam import DataSeam
from moetion_lightning.callbacks._elastic import Elastic
from moetion_lightning.callbacks._fits import check_callbacks
from moetion_lightning.callbacks._loop_seam import LoopSeam
from moetion_lightning.callbacks._ranks import cuts_at_first_batch, gathers_state, make_ranks
from moetion_lightning.callbacks._run_state import LightningRunState, write_model
from moetion_lightning.callbacks._unused_experts import UnusedExperts
from moetion_lightning.distributed.groups import current_groups
from moetion_lightning.engine import Engine, LivePoint, RestorePoint
from moetion_lightning.errors import ConfigurationError, RankLostError
from moetion_lightning.session import SessionSettings, TrainingSession
from moetion_lightning.session.beginning import of_loaders, of_schedulers

__all__ = ["LightningSession"]


class LightningSession:
    """From ``setup`` to ``teardown`` of a ``fit``.

    Args:
        trainer: The trainer.
        module: Its module.
        settings: The user's.
        where: The callback, for messages.
        log_metrics: Whether numbers go to the progress bar and the loggers.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, settings: SessionSettings, where: str, *, log_metrics: bool
    ) -> None:
        check_callbacks(trainer)
        self._trainer = trainer
        self._module = module
        self._log_metrics = log_metrics
        self._validating_since = 0.0
        self._loss_known = False  # of the present batch
        self._call = FitCall.of(trainer)
        self._ranks = make_ranks(trainer, module)
        self._loops = LoopSeam(trainer)
        groups = current_groups()
        formed = 0.0 if groups is None else groups.formed_seconds
        self._session = TrainingSession(settings, where, trainer.default_root_dir, self._ranks, groups_seconds=formed)
        self._data: DataSeam | None = None
        self._unused: UnusedExperts | None = None
        self._elastic: Elastic | None = None
        if groups is not None and self._ranks.elastic:
            self._elastic = Elastic(trainer, groups, self._ranks, self._find_again, self._go_to_found, self._session)
            if groups.alone:
                trainer.num_sanity_val_steps = 0  # the others have checked; here the sharded weights are not whole yet
        try:
            self._open()
        except BaseException:
            self.close(completed=False)
            raise

    def _open(self) -> None:
        session, loops, elastic = self._session, self._loops, self._elastic
        beginning = of_trainer(self._trainer, self._module, self._call)
        if elastic is None:
            session.open(beginning)
        else:
            elastic.attempt(lambda: session.open(beginning))
            loops.guard_training(lambda start: elastic.run(start, loops.run_again))
            if not cuts_at_first_batch(self._trainer):
                loops.watch_long_ends(self._after_batch)
        self._data = DataSeam(self._trainer, session.record_batch, session.skipped)
        self._run_state = LightningRunState(self._trainer, self._module, loops, self._data, session.engine.say_once)
        loops.checkpoints.inject(self._choose)
        loops.files.guard(lambda: session.replaying)
        loops.termination.agree_before_batches(session.drain)
        if session.point is not None:
            loops.files.continue_from(self._run_state.build(session.point)["files"])
        elif session.restarted:
            loops.files.start_again()

    @property
    def engine(self) -> Engine:
        """The engine, once the windows were looked for."""
        return self._session.engine

    # --- restoring -----------------------------------------------------------------------------------------------

    def _choose(self, checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
        """Lightning restores: a window of this fit, or the checkpoint that was asked for, or nothing.

        Args:
            checkpoint: What Lightning would restore; empty for nothing.

        Returns:
            What it shall restore instead; None to leave it as it is.
        """
        point = self._session.point
        joins = self._ranks.replaced and point is not None  # the job that this process joins is past any checkpoint
        if checkpoint and not joins:
            step = int(checkpoint.get("global_step", 0))
            if point is None or not self._wins_over(point, step):
                self._session.prefer(self._call.shown, step)
                return None
        if point is None:
            return None
        parameters = dict(self._module.named_parameters())
        if isinstance(point, RestorePoint) and parameters and not gathers_state(self._trainer):
            point.check_model(parameters, dtypes=False)
        self._loops.epoch_start.make_up()
        return self._position(point)

    def _wins_over(self, point: RestorePoint | LivePoint, step: int) -> bool:
        """Whether the state that was found is taken in place of the checkpoint, which is at ``step``.

        A checkpoint that this very run has written holds no random numbers: with a window that is hardly older,
        training ends as it would have without the failure.
        """
        own = point.run_state()["adapter"]["checkpoint"]["own"]
        last, shown = self._session.last_step(int(own["global_step"])), self._call.shown
        if step <= last:
            said = f"{shown} is at step {step}: {point.name} is newer, and is of the run that began there"
        elif isinstance(point, RestorePoint) and step - last < 2 * point.num_slots and self._is_of_the_run(point):
            said = (
                f"{shown} is at step {step}: {point.name} is of the same run and {step - last} steps older, but exact, "
                "with random numbers and the place in the data: it is taken. For the checkpoint name its path"
            )
        else:
            return False
        self._session.engine.say_once(said)
        return True

    def _is_of_the_run(self, point: RestorePoint) -> bool:
        began = float(point.extra.get("lineage", {}).get("began", float("inf")))
        return bool(self._ranks.agree("checkpoint", self._call.is_of_the_run(began))[0])

    def _position(self, point: RestorePoint | LivePoint) -> dict[str, Any]:
        """Lightning's part of a restored state; data and counters follow when the loops begin."""
        state = self._run_state.build(point)
        self._need_data().restore(state["data"])
        own = state["checkpoint"]["own"]
        resume = functools.partial(self._end_batch, validates=state["validates"]) if state["after_batch"] else None
        self._loops.pin_when_loop_starts(own["loops"]["fit_loop"], state["extras"], own["callbacks"], resume)
        self._loops.files.overwrite_undone(point.captured_at)
        self._loops.checkpoints.load_weights = None  # of a point before this one
        if isinstance(point, RestorePoint) and not gathers_state(self._trainer):
            self._loops.checkpoints.load_weights = functools.partial(write_model, self._module, point)
        if state["pipeline"]:
            self._trainer.strategy.given_bounds = tuple(state["pipeline"]["bounds"])  # type: ignore[attr-defined]
        checkpoint: dict[str, Any] = state["checkpoint"]
        return checkpoint

    def _find_again(self) -> bool:
        """Ranks were replaced: with all others, agree where to continue. Returns whether that is another place."""
        was_placed = self._session.point is not None
        point = self._session.find_again()
        if point is None and (self._session.trained or was_placed):
            raise RankLostError(
                "ranks were lost before all ranks had a common window, and their state has no copy: the job starts "
                "from its beginning."
            )
        return point is not None

    def _go_to_found(self) -> None:
        """In this process, to the state that was found."""
        point = self._session.point
        self._need_data().restart()
        if point is not None:
            self._loops.restore_in_place(self._position(point))

    def _after_batch(self) -> None:
        """A batch is done, and what follows it takes long: the state is noted, so that nobody goes back behind it."""
        if self._session.begun:
            with self._state_after_batch():
                self._session.engine.after_batch(self._run_state)

    def _end_batch(self, fetcher: Any, *, validates: bool) -> None:
        """The state after a batch was found: put it in place now, and do what follows the batch."""
        self._loops.validates = validates  # the state is noted again, for a loss in what follows
        with self._state_after_batch():
            self._begin()
        self._session.engine.restored_after_batch = True
        self._loops.end_batch_again(fetcher)

    @contextlib.contextmanager
    def _state_after_batch(self) -> Iterator[None]:
        self._run_state.after_batch = True
        try:
            yield
        finally:
            self._run_state.after_batch = False

    # --- hooks ---------------------------------------------------------------------------------------------------

    def on_setup(self) -> None:
        """Loggers have begun."""
        self._loops.files.follow()

    def on_fit_start(self) -> None:
        """Module and optimizers exist, no forward has run."""
        session, trainer = self._session, self._trainer
        if session.point is None:
            self._loops.files.begin_anew()
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        # By name: older versions of Lightning do not have it.
        averaging = any(kind.__name__ == "WeightAveraging" for c in callbacks for kind in type(c).__mro__)
        # Without autocast nothing is cast.
        sharded = any(hasattr(parameter, "to_local") for parameter in self._module.parameters())
        autocast = isinstance(trainer.precision_plugin, MixedPrecision)
        session.set_precision(autocast=autocast, averaging=averaging, sharded=sharded)
        session.engine.living.allowed = not averaging
        if averaging and gathers_state(trainer):
            raise ConfigurationError(
                f"a weight-averaging callback with {type(trainer.strategy).__name__}: the averaged weights are "
                "kept whole, the strategy spreads them over the ranks. Remove the callback, or use strategy='ddp'."
            )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            session.needs_all_gradients()
        session.learn({"settings": of_schedulers([config.scheduler for config in trainer.lr_scheduler_configs])})
        if not cuts_at_first_batch(trainer):
            session.attach(self._module, trainer.optimizers)

    def on_train_start(self) -> None:
        """The loops are set up."""
        reloaded = bool(self._trainer.reload_dataloaders_every_n_epochs)  # type: ignore[attr-defined]
        self._session.learn(of_loaders(self._need_data().loaders().values(), reloaded=reloaded))
        self._run_state.begin()
        if not cuts_at_first_batch(self._trainer):
            self._session.check(self._run_state)
            if self._trainer.world_size > 1 and self._module.automatic_optimization:
                self._unused = UnusedExperts(self._trainer, self._module, self._session.engine.layers)

    def on_train_batch_start(self, batch: Any) -> None:
        """The state is whole: everything of the last batch is done, nothing of the next one has begun."""
        self._between_batches()
        self._loss_known = False
        self._session.engine.pace.waited_for_data(self._need_data().take_waited())
        for digest in self._need_data().begun(batch):
            self._session.record_batch(digest)

    def _between_batches(self) -> None:
        session = self._session
        if session.begun:
            session.boundary()
            if not session.replaying:
                self._loops.files.write_postponed()
        else:
            self._begin()

    def _begin(self) -> None:
        """Join the others, and put the state in place that was found."""
        session = self._session
        if cuts_at_first_batch(self._trainer) and not session.attached:
            session.attach(self._module, self._trainer.optimizers)
            session.check(self._run_state)
        if self._elastic is not None:
            self._elastic.meet()
        if session.point is None:
            self._run_state.start()
        schedulers = [config.scheduler for config in self._trainer.lr_scheduler_configs]
        session.begin(self._run_state, self._run_state.before_restore, schedulers, step=self._trainer.global_step)

    def on_before_backward(self, loss: Tensor) -> None:
        """A backward pass begins, also one that a module makes itself."""
        self._loss_known = True
        self._session.record_loss(loss)

    def on_train_batch_end(self, outputs: Any) -> None:
        """A micro-batch is done."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not self._loss_known and isinstance(loss, Tensor):
            self._session.record_loss(loss)
        reporter = self._session.reporter
        if self._log_metrics and reporter.is_due(getattr(self._trainer, "log_every_n_steps", 50)):
            metrics = dict(reporter.metrics)  # the capture thread writes to it
            committed = int(metrics["moetion/committed_step"])
            self._loops.results.show(metrics, {"ckpt": str(committed)} if committed >= 0 else {})

    def on_before_optimizer_step(self) -> None:
        """Gradients are complete. The user's own hooks come after this one and may change weights."""
        if self._unused is not None:
            self._unused.check()
        self._session.attempt_step()
        self._session.hold()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is made, and no hook of a user has seen it."""
        self._loops.checkpoints.note_before_hooks(checkpoint)

    def hold(self) -> None:
        """Something other than the optimizer may change weights now (validation with averaged weights)."""
        self._session.hold()

    def on_validation_start(self) -> None:
        """A validation begins, in the course of training."""
        self.hold()
        self._validating_since = time.perf_counter()

    def on_validation_end(self) -> None:
        """It is done."""
        self._session.validated(time.perf_counter() - self._validating_since)

    def on_train_end(self) -> None:
        """The fit loop has ended."""
        self.hold()
        self._session.end()
        self._loops.files.warn_of_postponed()

    def close(self, *, completed: bool) -> None:
        """The run is over."""
        try:
            self._session.close(completed=completed)
        finally:
            self._loops.remove()
            if self._data is not None:
                self._data.remove()

    def _need_data(self) -> DataSeam:
        assert self._data is not None  # since the session is open
        return self._data
