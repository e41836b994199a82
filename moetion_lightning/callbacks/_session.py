"""One training run of one trainer: connects Lightning's hooks to the engine."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from moetion_lightning.callbacks._data_seam import DataSeam
from moetion_lightning.callbacks._elastic import Elastic
from moetion_lightning.callbacks._loop_seam import LoopSeam
from moetion_lightning.callbacks._ranks import cuts_at_first_batch, gathers_state, make_ranks
from moetion_lightning.callbacks._run_state import LightningRunState, write_model
from moetion_lightning.config import EngineConfig
from moetion_lightning.core.layouts import MoESpec
from moetion_lightning.core.policy import Policy
from moetion_lightning.distributed.groups import current_groups
from moetion_lightning.engine import Engine, LivePoint, RestorePoint, derive_job_id
from moetion_lightning.engine.reporting import Reporter, show_log_lines
from moetion_lightning.errors import ConfigurationError, RankLostError
from moetion_lightning.events import EventBus, JsonlSink, Sink

__all__ = ["Session"]

_log = logging.getLogger(__name__)

#: Callbacks of Lightning with which a restart in mid-epoch cannot be exact, and what to do.
_UNSUPPORTED: dict[type, str] = {
    StochasticWeightAveraging: (
        "it replaces the schedulers when an epoch starts, which a restart in mid-epoch cannot repeat. "
        "Use WeightAveraging or EMAWeightAveraging, where there is no pipeline."
    ),
    LearningRateFinder: "it trains and rolls back before every start. Find the learning rate in a run of its own.",
    BatchSizeFinder: "it trains and rolls back before every start. Find the batch size in a run of its own.",
}


class Session:
    """From ``setup`` to ``teardown`` of a ``fit``.

    Args:
        trainer: The trainer.
        module: Its module.
        config: Engine settings.
        policy: What to capture when.
        specs: The user's descriptions of MoE blocks.
        sinks: The user's event sinks.
        events_path: JSONL file of events, or None.
        log_metrics: Whether numbers go to the progress bar and the loggers.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        *,
        config: EngineConfig,
        policy: Policy,
        specs: Sequence[MoESpec],
        sinks: Sequence[Sink],
        events_path: str | None,
        log_metrics: bool,
    ) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            for kind, remedy in _UNSUPPORTED.items():
                if isinstance(callback, kind):
                    raise ConfigurationError(f"{type(callback).__name__} in Trainer(callbacks=...): {remedy}")
        show_log_lines(trainer.global_rank)
        self._trainer = trainer
        self._module = module
        self._specs = tuple(specs)
        self._log_metrics = log_metrics
        self.reporter = Reporter()
        rank = trainer.global_rank if trainer.world_size > 1 else None
        self._jsonl = JsonlSink(events_path, rank=rank) if events_path is not None else None
        bus = EventBus((self.reporter, *([self._jsonl] if self._jsonl else []), *sinks))
        self.ranks = make_ranks(trainer, module)
        job = derive_job_id(config.job_id, trainer.default_root_dir)
        self.engine = Engine(config, policy, bus=bus, job=job, ranks=self.ranks)
        self._point: RestorePoint | LivePoint | None = None
        self._begun = self._trained = self._attached = False
        self._loss_known = False  # of the present batch
        self._loops = LoopSeam(trainer)
        self._data = DataSeam(trainer, self.engine.record_batch)
        self.run_state = LightningRunState(trainer, module, self._loops, self._data, self.engine.say_once)
        groups = current_groups()
        self._elastic: Elastic | None = None
        if groups is not None and self.ranks.elastic:
            self._elastic = Elastic(trainer, groups, self.ranks, self._go_back)
            if groups.alone:
                trainer.num_sanity_val_steps = 0  # the others have checked; here the sharded weights are not whole yet
        try:
            self._open()
        except BaseException:
            self.close(completed=False)
            raise

    def _find(self) -> None:
        self._point = self.engine.open()

    def _open(self) -> None:
        if self._elastic is None:
            self._find()
        else:
            elastic = self._elastic
            elastic.attempt(self._find)
            self._loops.guard_training(lambda start: elastic.run(start, self._loops.run_again))
        ours_first = self.ranks.replaced and self._point is not None
        self._loops.checkpoints.inject(self._checkpoint, self._user_checkpoint, ours_first=ours_first)
        self._loops.files.guard(lambda: self.engine.converting)
        if self._point is not None:
            self._loops.files.continue_from(self.run_state.build(self._point)["files"])

    # --- restoring -----------------------------------------------------------------------------------------------

    def _checkpoint(self) -> dict[str, Any] | None:
        """Lightning asks for a checkpoint to restore: ours, if there is one."""
        if self._point is None:
            return None
        parameters = dict(self._module.named_parameters())
        if isinstance(self._point, RestorePoint) and parameters and not gathers_state(self._trainer):
            self._point.check_model(parameters, dtypes=False)
        self._loops.epoch_start.make_up()
        return self._position(self._point)

    def _position(self, point: RestorePoint | LivePoint) -> dict[str, Any]:
        """Lightning's part of a restored state; data and counters follow when the loops begin."""
        state = self.run_state.build(point)
        self._data.restore(state["data"])
        own = state["checkpoint"]["own"]
        self._loops.pin_when_loop_starts(own["loops"]["fit_loop"], state["extras"], own["callbacks"])
        self._loops.files.overwrite_undone(point.captured_at)
        if isinstance(point, RestorePoint) and not gathers_state(self._trainer):
            self._loops.checkpoints.load_weights = lambda: write_model(self._module, point)
        if state["pipeline"]:
            self._trainer.strategy.given_bounds = tuple(state["pipeline"]["bounds"])  # type: ignore[attr-defined]
        checkpoint: dict[str, Any] = state["checkpoint"]
        return checkpoint

    def _go_back(self) -> None:
        """A rank was replaced: with all others, back to a common state, in this process."""
        self._point = self.engine.find_again()
        self._begun = False
        self._data.restart()
        if self._point is not None:
            self._loops.restore_in_place(self._position(self._point))
        elif self._trained:
            raise RankLostError(
                "ranks were lost before all ranks had a common window, and their state has no copy: the job starts "
                "from its beginning."
            )

    def _user_checkpoint(self, path: object) -> None:
        if self._point is not None:
            self.engine.say_once(f"trainer.fit(ckpt_path={str(path)!r}) was given: it wins over {self._point.name}")
        self._point = None

    # --- hooks ---------------------------------------------------------------------------------------------------

    def on_setup(self) -> None:
        """Loggers have begun."""
        self._loops.files.follow()

    def on_fit_start(self) -> None:
        """Module and optimizers exist, no forward has run."""
        if self._point is None:
            self._loops.files.begin_anew()
            self.engine.tiers.release_point()
        callbacks = self._trainer.callbacks  # type: ignore[attr-defined]
        # By name: older versions of Lightning do not have it.
        averaging = any(kind.__name__ == "WeightAveraging" for c in callbacks for kind in type(c).__mro__)
        # Without autocast nothing is cast; an average reads the weights in full, perhaps only later.
        # Shards are gathered before they are used: what happens to them there is not seen.
        sharded = any(hasattr(parameter, "to_local") for parameter in self._module.parameters())
        autocast = isinstance(self._trainer.precision_plugin, MixedPrecision)
        self.engine.precision.enabled = autocast and not averaging and not sharded
        self.engine.living.allowed = not averaging
        if averaging and gathers_state(self._trainer):
            raise ConfigurationError(
                f"a weight-averaging callback with {type(self._trainer.strategy).__name__}: the averaged weights are "
                "kept whole, the strategy spreads them over the ranks. Remove the callback, or use strategy='ddp'."
            )
        if getattr(self._trainer.precision_plugin, "scaler", None) is not None:
            self.engine.may_skip_gradients = False
            if self.engine.config.skip_frozen_gradients:
                self.engine.say_once(
                    "skip_frozen_gradients=True has no effect with a gradient scaler: whether a step is skipped "
                    "depends on all gradients. Replays compute them all."
                )
        if not cuts_at_first_batch(self._trainer):
            self.engine.attach(self._module, self._trainer.optimizers, self._specs)

    def on_train_start(self) -> None:
        """The loops are set up."""
        if not cuts_at_first_batch(self._trainer):
            self.engine.check_run_state(self.run_state)

    def on_train_batch_start(self, batch: Any) -> None:
        """The state is whole: everything of the last batch is done, nothing of the next one has begun."""
        self._between_batches()
        self._loss_known = False
        for digest in self._data.begun(batch):
            self.engine.record_batch(digest)

    def _between_batches(self) -> None:
        if self._begun:
            self.engine.boundary(self.run_state)
            if not self.engine.converting:
                self._loops.files.write_postponed()
            return
        if cuts_at_first_batch(self._trainer) and not self._attached:
            self._attached = True
            self.engine.attach(self._module, self._trainer.optimizers, self._specs)
            self.engine.check_run_state(self.run_state)
        if self._elastic is not None:
            self._elastic.meet()
        self._begun = self._trained = True
        if self._point is None:
            self.run_state.begin()
            self.engine.start(self.run_state)
        else:
            self.run_state.before_restore(self._point.run_state()["adapter"])
            self._point = None
            self.engine.restore(self.run_state)

    def before_backward(self, loss: Tensor) -> None:
        """A backward pass begins, also one that a module makes itself."""
        self._loss_known = True
        self.engine.record_loss(loss)

    def on_train_batch_end(self, outputs: Any) -> None:
        """A micro-batch is done."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not self._loss_known and isinstance(loss, Tensor) and loss.numel() == 1:
            self.engine.record_loss(loss)
        if self._log_metrics and self.reporter.is_due(getattr(self._trainer, "log_every_n_steps", 50)):
            # The capture thread writes to it.
            self._loops.results.show(dict(self.reporter.metrics), ("moetion/committed_step", "moetion/stall_ms"))

    def before_optimizer_step(self) -> None:
        """Gradients are complete. The user's own hooks come after this one and may change weights."""
        self.engine.attempt_step()
        self.engine.hold()

    def before_checkpoint_hooks(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is made, and no hook of a user has seen it."""
        self._loops.checkpoints.note_before_hooks(checkpoint)

    def hold(self) -> None:
        """Something other than the optimizer may change weights now (validation with averaged weights)."""
        self.engine.hold()

    def on_train_end(self) -> None:
        """The fit loop has ended."""
        self.hold()
        self._loops.files.warn_of_postponed()

    def close(self, *, completed: bool) -> None:
        """The run is over."""
        try:
            self.engine.close(completed=completed)
        finally:
            self._loops.remove()
            self._data.remove()
            if self._jsonl is not None:
                self._jsonl.close()
