"""Exact sparse checkpointing of the Hugging Face ``Trainer``, as a callback."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.integrations._older_trainer_loop import OlderTrainerLoop
from moetion_lightning.integrations._parts import Parts
from moetion_lightning.integrations._run import Run
from moetion_lightning.integrations._trainer_loop import TrainerLoop, step_of
from moetion_lightning.integrations._trainer_weights import restore_left_out
from moetion_lightning.session import SessionSettings
from moetion_lightning.session.beginning import Beginning, of_checkpoint, of_datasets, plain
from moetion_lightning.session.skipped_batches import refuse_skipping

__all__ = ["MoEtionTrainerCallback"]

_log = logging.getLogger(__name__)
_WHERE = "MoEtionTrainerCallback"
#: Arguments that say how a training begins. Those of optimizers and schedulers are compared there.
_SETTINGS = (
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("max_grad_norm", "learning_rate", "weight_decay", "seed"),
)


class MoEtionTrainerCallback(TrainerCallback):
    """Snapshots a part of the experts after every optimizer step of a ``Trainer``, and recovers bit for bit.

    ::

        Trainer(..., callbacks=[MoEtionTrainerCallback(window=8)]).train()

    When the same command is started again after a failure, ``train()`` goes on from the newest committed window: at any
    step, not only where a ``checkpoint-N`` was saved. At most two windows of updates are done again, in the Trainer's
    own loop, with exactly the weights, optimizer state, schedule, losses, samples, log history and callbacks' states
    (``ExportableState``) of the run that never failed. No ``checkpoint-N`` is written while the state is not whole yet;
    it was written before.

    ``train(resume_from_checkpoint=...)`` wins over a window. Weights that the Trainer itself leaves out when it resumes
    (the fused experts of most families, in transformers 5.23) are then read from the checkpoint and put in place; so
    are those of ``load_best_model_at_end``.

    The Trainer hands itself to no callback: making the first one lets ``Trainer`` look for it when training begins.
    Needs transformers 4.57 or later.

    Ranks: under ``torchrun`` or ``accelerate launch`` every rank makes it. One process each; no ``DataParallel``,
    DeepSpeed or FSDP1.

    Args:
        **settings: As of ``SparseExpertCheckpoint``, see :meth:`~moetion_lightning.session.SessionSettings.read`.

    Raises:
        ConfigurationError: A setting is unknown or out of range.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = SessionSettings.read(settings, _WHERE)
        refuse_skipping(self._settings.config, _WHERE)
        self._session: _Session | None = None
        _let_trainers_look()

    # --- events of the Trainer -----------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Everything is prepared."""
        if self._session is None:
            raise ConfigurationError(
                f"{_WHERE} was not told that training begins: expected Trainer._inner_training_loop to run. A subclass "
                "of Trainer that replaces it must call super()._inner_training_loop(...)."
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last update is done with all that belongs to it; the batches of the next one are drawn."""
        if self._session is not None:
            self._session.update_begins()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are complete."""
        if self._session is not None:
            self._session.run.engine.attempt_step()

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """The Trainer has loaded the best model by now, if it was asked to."""
        if args.load_best_model_at_end and state.best_model_checkpoint and model is not None:
            restore_left_out(model, Path(state.best_model_checkpoint))

    # --- inside --------------------------------------------------------------------------------------------------

    def _train(
        self, trainer: Any, loop: Callable[[str | None], Any], resume_from_checkpoint: str | None, trial: Any
    ) -> Any:
        _refuse(trainer, trial)
        callbacks = trainer.callback_handler.callbacks
        # What other callbacks do when a step begins comes after its capture, and after a restore.
        callbacks.insert(0, callbacks.pop(callbacks.index(self)))
        settings = dataclasses.replace(self._settings, policy=copy.deepcopy(self._settings.policy))
        self._session = session = _Session(trainer, settings, resume_from_checkpoint)
        completed = False
        try:
            output = loop(session.checkpoint)
            completed = session.completed
            return output
        finally:
            self._session = None
            session.close(completed=completed)


class _Session:
    """One call of ``train()``."""

    def __init__(self, trainer: Any, settings: SessionSettings, resume_from_checkpoint: str | None) -> None:
        self._trainer = trainer
        self._loop = (TrainerLoop if hasattr(trainer, "_run_epoch") else OlderTrainerLoop)(trainer)
        module = Parts.of(trainer.model, _WHERE).module
        beginning = _beginning(trainer, resume_from_checkpoint)
        self.run = Run(settings, _WHERE, self._parts, trainer.args.output_dir, module, beginning)
        #: The checkpoint that the Trainer shall restore.
        self.checkpoint = resume_from_checkpoint
        try:
            if resume_from_checkpoint is not None:
                self._compare(Path(resume_from_checkpoint))
            saved = self.run.saved
            if saved is not None:
                self.checkpoint = self._loop.continue_at(saved["position"], "a window in memory")
            self._loop.follow(self.run.record_loss, lambda: self.run.replaying)
        except BaseException:
            self.close(completed=False)
            raise

    def _compare(self, checkpoint: Path) -> None:
        """The newer of a checkpoint and a window of the same run counts; a checkpoint of another run always does."""
        saved = self.run.saved
        step = step_of(checkpoint)
        shown = f"train(resume_from_checkpoint={str(checkpoint)!r})"
        if saved is not None and self.run.last_step(self._loop.step_of(saved["position"])) >= step:
            self.run.engine.say_once(f"{shown} is at step {step}: the window that was found is newer, and of this run")
            self.checkpoint = None
            return
        self.run.prefer(shown, step)
        restore_left_out(self._trainer.model, checkpoint)

    @property
    def completed(self) -> bool:
        """Whether training has come to its end, and was not cut short by a signal or in the middle of a replay."""
        state = self._trainer.state
        stopped = getattr(self._trainer.args, "enable_jit_checkpoint", False) and state.global_step < state.max_steps
        if self.run.replaying:
            _log.warning(
                "training ended while its last steps were done again: its state is not whole, windows are kept"
            )
        return not stopped and not self.run.replaying

    def update_begins(self) -> None:
        """Between two updates."""
        if self.run.begun:
            self.run.boundary()
        else:
            self.run.begin_loop(self._loop, autocast=self._trainer.accelerator.mixed_precision != "no")
        for digest in self._loop.drawn:
            self.run.record_batch(digest)

    def close(self, *, completed: bool) -> None:
        """The call is over."""
        try:
            self.run.close(completed=completed)
        finally:
            self._loop.remove()

    def _parts(self) -> Parts:
        trainer = self._trainer
        scaler = trainer.accelerator.scaler
        return Parts.of(trainer.model_wrapped, _WHERE, trainer.optimizer, trainer.lr_scheduler, scaler)


def _beginning(trainer: Any, checkpoint: str | None) -> Beginning:
    """How a training begins, beside its weights."""
    args = trainer.args
    return {
        **of_datasets([trainer.train_dataset]),
        "checkpoint": of_checkpoint(checkpoint, None if checkpoint is None else Path(checkpoint, "trainer_state.json")),
        "settings": {name: plain(getattr(args, name, None)) for name in _SETTINGS},
    }


def _refuse(trainer: Any, trial: Any) -> None:
    """What a restart could not continue exactly."""
    args = trainer.args
    fsdp = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    wrong = {
        "a trial of hyperparameter_search": (trial is not None, "remove the callback before it"),
        "auto_find_batch_size=True": (args.auto_find_batch_size, "give the batch size that fits"),
        "DeepSpeed": (trainer.is_deepspeed_enabled, "use DDP or FSDP2"),
        "FSDP1": (fsdp is not None and fsdp.fsdp_version == 1, "set fsdp_version to 2"),
        f"DataParallel over {args.n_gpu} devices": (args.n_gpu > 1, "start one process for each with torchrun"),
    }
    for given, (found, remedy) in wrong.items():
        if found:
            raise ConfigurationError(f"{_WHERE} with {given}: the run could not be continued exactly; {remedy}")


def _let_trainers_look() -> None:
    """``Trainer`` looks for the callback when its loop begins: the events come too late, and without the trainer."""
    original = Trainer._inner_training_loop
    if hasattr(original, "_moetion"):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def inner_training_loop(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        callbacks = [c for c in self.callback_handler.callbacks if isinstance(c, MoEtionTrainerCallback)]
        if not callbacks:
            return original(self, *args, **kwargs)
        if len(callbacks) > 1:
            raise ConfigurationError(f"Trainer(callbacks=...) has {len(callbacks)} of {_WHERE}: expected one")
        given = signature.bind(self, *args, **kwargs)

        def loop(checkpoint: str | None) -> Any:
            given.arguments["resume_from_checkpoint"] = checkpoint
            return original(*given.args, **given.kwargs)

        return callbacks[0]._train(
            self, loop, given.arguments.get("resume_from_checkpoint"), given.arguments.get("trial")
        )

    inner_training_loop._moetion = True  # type: ignore[attr-defined]
    Trainer._inner_training_loop = inner_training_loop  # type: ignore[method-assign]
