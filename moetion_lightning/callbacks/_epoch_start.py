"""``on_train_epoch_start`` in a process that continues in the middle of an epoch.

Lightning leaves the hook out there. Attributes that it makes (a list for the epoch, a start time, a progress bar) would
not exist, so it is made up for, once. Everything that it changes and that a window holds is put back afterwards.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BaseFinetuning, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loops.progress import _BaseProgress
from lightning.pytorch.trainer import call

from moetion_lightning.core.instance_patches import InstancePatches

__all__ = ["EpochStart"]


class EpochStart:
    """Calls the hook where Lightning leaves it out.

    Args:
        trainer: The trainer.
        patches: What is replaced on the trainer's objects until the run ends.
    """

    def __init__(self, trainer: Trainer, patches: InstancePatches) -> None:
        self._trainer = trainer
        self._patches = patches

    def make_up(self) -> None:
        """When the fit loop begins its next epoch, call the hook if the loop does not; only then."""
        fit_loop = self._trainer.fit_loop
        original = fit_loop.on_advance_start

        def on_advance_start() -> None:
            undo()
            total: Any = fit_loop.epoch_progress.total
            started = total.started
            original()
            if total.started == started:
                self._call()

        undo = self._patches.put(fit_loop, "on_advance_start", on_advance_start)

    def _call(self) -> None:
        trainer = self._trainer
        muted = InstancePatches()
        for logger in trainer.loggers:  # what is logged there was logged when the epoch began
            muted.put(logger, "log_metrics", lambda *args, **kwargs: None)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, BaseFinetuning):  # it has put its groups back when the fit began
                muted.put(callback, "finetune_function", lambda *args, **kwargs: None)
        try:
            with self._at_begin_of_epoch():
                call._call_callback_hooks(trainer, "on_train_epoch_start")
                call._call_lightning_module_hook(trainer, "on_train_epoch_start")
        finally:
            muted.undo()
        self._advance_bar()

    @contextlib.contextmanager
    def _at_begin_of_epoch(self) -> Iterator[None]:
        """The counters that hooks see are those of the epoch's begin; totals of progress bars follow from them."""
        epoch_loop: Any = self._trainer.fit_loop.epoch_loop
        saved = [
            (loop, name, copy.deepcopy(value))
            for loop in (epoch_loop, epoch_loop.automatic_optimization)
            for name, value in vars(loop).items()
            if isinstance(value, _BaseProgress)
        ]
        stepped = epoch_loop._batches_that_stepped
        epoch_loop._batches_that_stepped -= (
            epoch_loop.automatic_optimization.optim_progress.optimizer.step.current.ready
        )
        for loop, name, _ in saved:
            _rewind(getattr(loop, name))
        try:
            yield
        finally:
            for loop, name, value in saved:
                setattr(loop, name, value)
            epoch_loop._batches_that_stepped = stepped

    def _advance_bar(self) -> None:
        """The bar stands where the epoch stands, also before its first batch."""
        done = self._trainer.fit_loop.epoch_loop.batch_progress.current.completed
        bar: Any = self._trainer.progress_bar_callback
        if isinstance(bar, TQDMProgressBar) and not bar.train_progress_bar.disable:
            bar.train_progress_bar.n = bar.train_progress_bar.initial = done
            bar.train_progress_bar.refresh()
        elif isinstance(bar, RichProgressBar) and bar.progress is not None and bar.train_progress_bar_id is not None:
            bar.progress.update(bar.train_progress_bar_id, completed=done)


def _rewind(progress: _BaseProgress) -> None:
    """Take back what belongs to the present epoch."""
    total, current = getattr(progress, "total", None), getattr(progress, "current", None)
    if total is None or current is None:
        for inner in vars(progress).values():
            if isinstance(inner, _BaseProgress):
                _rewind(inner)
        return
    for name, count in vars(current).items():
        setattr(total, name, getattr(total, name) - count)
        setattr(current, name, 0)
