"""Loop counters of a Lightning trainer, and the way into and out of its fit loop.

Private names of Lightning are used only in the files ``_*_seam``, ``_logged_results``, ``_epoch_start`` and
``_run_files``; `tests/lightning` holds them against the installed version.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.progress import _BaseProgress
from lightning.pytorch.trainer import call

from moetion_lightning.callbacks._checkpoint_seam import CheckpointSeam
from moetion_lightning.callbacks._epoch_start import EpochStart
from moetion_lightning.callbacks._logged_results import LoggedResults
from moetion_lightning.callbacks._run_files import RunFiles
from moetion_lightning.callbacks._termination_seam import TerminationSeam
from moetion_lightning.core.instance_patches import InstancePatches
from moetion_lightning.core.kept_values import Fresh
from moetion_lightning.errors import ForeignWindowError, UnsupportedStateError
from moetion_lightning.storage.tree import dump_tree

__all__ = ["LoopSeam"]

_RESUME_WARNING = "You're resuming from a checkpoint that ended before the epoch ended"


class LoopSeam:
    """What must be read from, and put back into, the private parts of a trainer.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.patches = InstancePatches()
        self._counters: _Counters | None = None
        #: Whether a validation follows the batch that has ended.
        self.validates = False
        self.checkpoints = CheckpointSeam(trainer, self.patches)
        self.results = LoggedResults(trainer)
        self.epoch_start = EpochStart(trainer, self.patches)
        self.files = RunFiles(trainer, self.patches)
        self.termination = TerminationSeam(trainer, self.patches)

    def remove(self) -> None:
        """Leave the trainer as it was."""
        self.checkpoints.remove()
        self.patches.undo()

    def restore_in_place(self, checkpoint: Mapping[str, Any]) -> None:
        """Put a checkpoint's state into a trainer that is training: what a restart does before its first batch.

        Args:
            checkpoint: What :meth:`CheckpointSeam.dump` gave.
        """
        trainer = self._trainer
        trainer.training = True
        epoch_loop = trainer.fit_loop.epoch_loop
        epoch_loop._results.clear()
        epoch_loop.val_loop._results.clear()  # of a validation that was not finished: its batches would count twice
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            scaler._per_optimizer_states.clear()  # of the step that was not finished
        self.checkpoints.restore_in_place(checkpoint)

    def run_again(self) -> None:
        """Go on in the fit loop at the position that was restored, without its start."""
        fit_loop = self._trainer.fit_loop
        fetcher = fit_loop._data_fetcher
        assert fetcher is not None
        iter(fetcher)
        undo = self.patches.put(fit_loop, "on_run_start", lambda: None)  # training has started long ago
        try:
            type(fit_loop).run(fit_loop)
        finally:
            undo()

    def guard_training(self, run: Callable[[Callable[[], None]], None]) -> None:
        """Let ``run(original)`` take the place of the fit loop's ``run()``."""
        fit_loop = self._trainer.fit_loop
        original = fit_loop.run
        self.patches.put(fit_loop, "run", lambda: run(original))

    def watch_long_ends(self, note: Callable[[], None]) -> None:
        """Call ``note`` when a batch is done and something long follows: a validation, or the end of an epoch."""
        epoch_loop = self._trainer.fit_loop.epoch_loop
        original = epoch_loop.on_advance_end

        def on_advance_end(data_fetcher: Any) -> None:
            self.validates = epoch_loop._should_check_val_fx(data_fetcher)
            if self.validates or epoch_loop._num_ready_batches_reached():
                note()
            original(data_fetcher)

        self.patches.put(epoch_loop, "on_advance_end", on_advance_end)

    def end_batch_again(self, data_fetcher: Any) -> None:
        """What follows a batch, for one whose end was restored; with a validation if there was one.

        Args:
            data_fetcher: Of the epoch loop.
        """
        epoch_loop = self._trainer.fit_loop.epoch_loop
        undo = self.patches.put(epoch_loop, "_should_check_val_fx", lambda *args: self.validates)
        try:
            type(epoch_loop).on_advance_end(epoch_loop, data_fetcher)
        finally:
            undo()

    def counters(self, *, after_batch: bool = False) -> dict[str, Any]:
        """Progress of the fit loop as of the end of the last batch.

        Called in ``on_train_batch_start``, when the next batch is fetched and counted as ready: that is taken back.

        Args:
            after_batch: No next batch is fetched: the last one has just ended.
        """
        if self._counters is None:
            self._counters = _Counters(self._trainer.fit_loop)
        state = self._counters.read()
        state["state_dict"] = {k: v for k, v in state["state_dict"].items() if k != "combined_loader"}
        progress = state["epoch_loop.batch_progress"]
        for counter in ("total", "current"):
            progress[counter]["ready"] = progress[counter]["completed"]
        progress["is_last_batch"] = after_batch and progress["is_last_batch"]
        return state

    def extras(self) -> dict[str, Any]:
        """State of the loops that Lightning does not save."""
        trainer = self._trainer
        loop = trainer.fit_loop
        return {
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "should_stop": trainer.should_stop,
            "train_reload_epoch": loop._last_train_dl_reload_epoch,
            "val_reload_epoch": loop.epoch_loop.val_loop._last_val_dl_reload_epoch,
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "logged": self.results.snapshot(),
        }

    def pin_when_loop_starts(
        self,
        counters: Mapping[str, Any],
        extras: Mapping[str, Any],
        callbacks: Mapping[str, Any],
        pinned: Callable[[Any], None] | None = None,
    ) -> None:
        """Put counters, extras and callbacks' states back once more, right before the first batch is fetched.

        Restoring a checkpoint in mid-epoch makes the loops take branches (validation that is skipped or caught up,
        schedulers that step or do not) that belong to checkpoints written elsewhere in the loop. Here the state is
        known to be that between two batches, so the loops are told that they are not restarting, and every counter
        is exact.

        Args:
            counters: What :meth:`counters` gave.
            extras: What :meth:`extras` gave.
            callbacks: States of the trainer's callbacks, by their keys.
            pinned: Called with the data fetcher when all is in place; None for nothing.
        """
        warnings.filterwarnings("ignore", message=_RESUME_WARNING)
        epoch_loop = self._trainer.fit_loop.epoch_loop
        original = epoch_loop.on_run_start

        def on_run_start(*args: Any, **kwargs: Any) -> None:
            undo()
            original(*args, **kwargs)
            self._pin(counters, extras)
            self._load_again(callbacks)
            if pinned is not None:
                pinned(epoch_loop.trainer.fit_loop._data_fetcher)

        undo = self.patches.put(epoch_loop, "on_run_start", on_run_start)

    def _pin(self, counters: Mapping[str, Any], extras: Mapping[str, Any]) -> None:
        trainer = self._trainer
        loop = trainer.fit_loop
        loop.load_state_dict(dict(counters))
        _settle(loop)
        trainer.accumulate_grad_batches = extras["accumulate_grad_batches"]
        trainer.should_stop = extras["should_stop"]
        loop._last_train_dl_reload_epoch = extras["train_reload_epoch"]
        loop.epoch_loop.val_loop._last_val_dl_reload_epoch = extras["val_reload_epoch"]
        if len(trainer.lr_scheduler_configs) != len(extras["schedulers"]):
            raise ForeignWindowError(
                f"the window was captured with {len(extras['schedulers'])} learning-rate schedulers, this run has "
                f"{len(trainer.lr_scheduler_configs)}. Undo the change, or start afresh with resume='never' or another "
                "job_id. (Schedulers that a callback makes while training cannot be restored.)"
            )
        for config, state in zip(trainer.lr_scheduler_configs, extras["schedulers"]):
            config.scheduler.load_state_dict(state)
        self.results.restore(extras["logged"])

    def _load_again(self, callbacks: Mapping[str, Any]) -> None:
        """States that hooks have changed since they were restored: those of the beginning of training and epoch."""
        changed = {}
        for callback in self._trainer.callbacks:  # type: ignore[attr-defined]
            key = callback.state_key
            if key in callbacks and not _equal(callback.state_dict(), callbacks[key]):
                changed[key] = callbacks[key]
        call._call_callbacks_load_state_dict(self._trainer, {"callbacks": changed})


def _equal(first: object, second: object) -> bool:
    try:
        return dump_tree(first) == dump_tree(second)
    except UnsupportedStateError:
        return False


def _settle(loop: _Loop) -> None:
    """This loop and those in it are neither restarting nor resuming."""
    loop._restarting = False
    loop._loaded_from_state_dict = False
    loop._resuming_from_checkpoint = False
    loop.reset_restart_stage()
    for child in vars(loop).values():
        if isinstance(child, _Loop):
            _settle(child)


class _Counters:
    """Reads what ``loop.state_dict()`` gives, which takes most of a millisecond in copies of copies.

    Args:
        loop: The loop.
    """

    def __init__(self, loop: _Loop) -> None:
        self._loops: list[tuple[str, _Loop]] = []
        self._progress: list[tuple[str, _Loop, str]] = []
        self._find(loop, "")

    def _find(self, loop: _Loop, prefix: str) -> None:
        self._loops.append((f"{prefix}state_dict", loop))
        for name, value in vars(loop).items():
            if isinstance(value, _BaseProgress):
                self._progress.append((prefix + name, loop, name))
            elif isinstance(value, _Loop):
                self._find(value, f"{prefix}{name}.")

    def read(self) -> dict[str, Any]:
        """The loops' states by name, and the counters of each."""
        state = {name: loop.on_save_checkpoint() for name, loop in self._loops}
        return Fresh(state, **{key: _read(getattr(loop, name)) for key, loop, name in self._progress})


def _read(progress: _BaseProgress) -> dict[str, Any]:
    values = vars(progress)
    names: dict[str, Any] = type(progress).__dataclass_fields__
    return {k: _read(v) if isinstance(v := values[k], _BaseProgress) else v for k in names}
