"""Loop counters, logged results and checkpoint injection of a Lightning trainer.

Private names of Lightning are used only here and in ``_data_seam``; `tests/lightning` holds them against the installed
version.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from torch import Tensor

from moetion_lightning.callbacks._ranks import gathers_state
from moetion_lightning.errors import ForeignWindowError

__all__ = ["LoopSeam"]

#: Of ModelCheckpoint: what it does not restore itself.
_LAST_SAVED = ("_last_global_step_saved", "_last_checkpoint_saved", "current_score")
_RESUME_WARNING = "You're resuming from a checkpoint that ended before the epoch ended"


class LoopSeam:
    """What must be read from, and put back into, the private parts of a trainer.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._undo: list[Callable[[], None]] = []
        #: Whether a checkpoint that is restored has no weights, because the engine alone brings them.
        self.skip_weights = False

    def remove(self) -> None:
        """Leave the trainer as it was."""
        for undo in reversed(self._undo):
            undo()
        self._undo = []

    def _patch(self, owner: Any, name: str, replacement: Any) -> None:
        setattr(owner, name, replacement)
        self._undo.append(lambda: owner.__dict__.pop(name, None))

    # --- checkpoint injection ------------------------------------------------------------------------------------

    def inject_checkpoint(
        self,
        checkpoint: Callable[[], dict[str, Any] | None],
        on_user_checkpoint: Callable[[object], None],
        *,
        ours_first: bool,
    ) -> None:
        """Let the trainer restore ``checkpoint()`` in its own order, unless the user gave a ``ckpt_path``.

        Args:
            checkpoint: Called where the trainer would read a checkpoint file; None restores nothing.
            on_user_checkpoint: Called with the user's path instead.
            ours_first: Whether the user's path counts for nothing: the job that this process joins is past it.
        """
        connector = self._trainer._checkpoint_connector
        original = connector.resume_start

        def resume_start(checkpoint_path: Any = None, *args: Any, **kwargs: Any) -> None:
            connector.__dict__.pop("resume_start", None)  # the trainer's own call is the first one
            checkpoint_path = None if ours_first else checkpoint_path
            original(checkpoint_path, *args, **kwargs)
            if checkpoint_path:
                on_user_checkpoint(checkpoint_path)
                return
            injected = checkpoint()
            if injected is not None:
                connector._loaded_checkpoint = injected
                if self.skip_weights:
                    self._patch(self._trainer.strategy, "load_model_state_dict", lambda *args, **kwargs: None)
                # The engine puts optimizers back itself: `load_state_dict` would change dtypes, and refuse groups that
                # were added while training.
                self._patch(connector, "restore_optimizers", lambda: None)

        self._patch(connector, "resume_start", resume_start)

    def dump(self, *, weights: bool) -> dict[str, Any]:
        """What an ordinary checkpoint of this moment would hold, without what others keep.

        Args:
            weights: Whether weights are in it (as live tensors), where the strategy has them at hand. The optimizers'
                states and the loaders' states are not.
        """
        with contextlib.nullcontext() if weights and not gathers_state(self._trainer) else self._without_weights():
            checkpoint = self._trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        ours = ("hparams_", "datamodule_hparams")
        for key in [k for k in checkpoint if "hyper_parameters" in k or k.startswith(ours)]:
            del checkpoint[key]
        checkpoint["optimizer_states"] = [
            {**state, "state": {}} if "state" in state else state for state in checkpoint["optimizer_states"]
        ]
        checkpoint["loops"] = {"fit_loop": self.counters()}
        return checkpoint

    @contextlib.contextmanager
    def _without_weights(self) -> Iterator[None]:
        """The strategy gives no weights and no optimizer state, which it may have to gather from all ranks."""
        strategy: Any = self._trainer.strategy
        strategy.lightning_module_state_dict = dict
        strategy.optimizer_state = lambda optimizer: {"state": {}, "param_groups": []}
        try:
            yield
        finally:
            del strategy.lightning_module_state_dict, strategy.optimizer_state

    def restore_in_place(self, checkpoint: Mapping[str, Any]) -> None:
        """Put a checkpoint's state into a trainer that is training: what a restart does before its first batch.

        Args:
            checkpoint: As for :meth:`inject_checkpoint`.
        """
        trainer = self._trainer
        connector = trainer._checkpoint_connector
        strategy: Any = trainer.strategy
        trainer.training = True
        trainer.fit_loop.epoch_loop._results.clear()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            scaler._per_optimizer_states.clear()  # of the step that was not finished
        connector._loaded_checkpoint = dict(checkpoint)
        strategy.load_model_state_dict = lambda *args, **kwargs: None
        connector.restore_optimizers = lambda: None  # type: ignore[method-assign]
        try:
            connector.restore_datamodule()
            connector.restore_model()
            connector.restore_callbacks()
            connector.restore_training_state()
        finally:
            del strategy.load_model_state_dict
            connector.__dict__.pop("restore_optimizers", None)
            connector._loaded_checkpoint = {}

    def run_again(self) -> None:
        """Go on in the fit loop at the position that was restored, without its start."""
        fit_loop = self._trainer.fit_loop
        fetcher = fit_loop._data_fetcher
        assert fetcher is not None
        iter(fetcher)
        self._patch(fit_loop, "on_run_start", lambda: None)  # training has started long ago
        try:
            type(fit_loop).run(fit_loop)
        finally:
            fit_loop.__dict__.pop("on_run_start", None)

    def guard_training(self, run: Callable[[Callable[[], None]], None]) -> None:
        """Let ``run(original)`` take the place of the fit loop's ``run()``."""
        fit_loop = self._trainer.fit_loop
        original = fit_loop.run
        self._patch(fit_loop, "run", lambda: run(original))

    # --- counters ------------------------------------------------------------------------------------------------

    def counters(self) -> dict[str, Any]:
        """Progress of the fit loop as of the end of the last batch.

        Called in ``on_train_batch_start``, when the next batch is fetched and counted as ready: that is taken back.
        """
        state = self._trainer.fit_loop.state_dict()
        state["state_dict"] = {k: v for k, v in state["state_dict"].items() if k != "combined_loader"}
        progress = state["epoch_loop.batch_progress"]
        for counter in ("total", "current"):
            progress[counter]["ready"] = progress[counter]["completed"]
        progress["is_last_batch"] = False
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
            "results": self._results(),
            "first_loop_iter": bool(trainer._logger_connector._first_loop_iter),
            "current_fx": trainer._logger_connector._current_fx,
            "metrics": self._metrics(),
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            # By it each rank decides whether to save, which all ranks do together.
            "last_saved": [{name: getattr(c, name, None) for name in _LAST_SAVED} for c in self._checkpoints()],
        }

    def _checkpoints(self) -> list[ModelCheckpoint]:
        return [c for c in self._trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]

    def pin_when_loop_starts(self, counters: Mapping[str, Any], extras: Mapping[str, Any]) -> None:
        """Put counters and extras back once more, right before the first batch is fetched.

        Restoring a checkpoint in mid-epoch makes the loops take branches (validation that is skipped or caught up,
        schedulers that step or do not) that belong to checkpoints written elsewhere in the loop. Here the state is
        known to be that between two batches, so the loops are told that they are not restarting, and every counter
        is exact.
        """
        warnings.filterwarnings("ignore", message=_RESUME_WARNING)
        epoch_loop = self._trainer.fit_loop.epoch_loop
        original = epoch_loop.on_run_start

        def on_run_start(*args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            epoch_loop.__dict__.pop("on_run_start", None)
            self._pin(counters, extras)

        self._patch(epoch_loop, "on_run_start", on_run_start)

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
        for callback, saved in zip(self._checkpoints(), extras["last_saved"]):
            vars(callback).update(saved)
        self._restore_results(extras["results"])
        connector = trainer._logger_connector
        # Saved after the next batch's `on_batch_start`, put back before it: None becomes True there, False stays.
        connector._first_loop_iter = None if extras["first_loop_iter"] else False
        connector._current_fx = extras["current_fx"]
        connector._progress_bar_metrics = dict(extras["metrics"]["progress_bar"])
        connector._logged_metrics = dict(extras["metrics"]["logged"])
        connector._callback_metrics = dict(extras["metrics"]["callback"])

    # --- logged values -------------------------------------------------------------------------------------------

    def _metrics(self) -> dict[str, Any]:
        connector = self._trainer._logger_connector
        return {
            "progress_bar": dict(connector._progress_bar_metrics),
            "logged": dict(connector._logged_metrics),
            "callback": dict(connector._callback_metrics),
        }

    def _results(self) -> list[dict[str, Any]]:
        """Partial sums of values logged with ``on_epoch=True``: an epoch's mean must survive in its middle."""
        saved = []
        for key, metric in self._trainer.fit_loop.epoch_loop._results.items():
            meta = metric.meta
            if not meta.on_epoch or meta.sync._group is not None:
                continue  # without on_epoch there is nothing to carry on
            if not metric.is_tensor and not meta.metric_attribute:
                continue
            saved.append(
                {
                    "key": key,
                    "meta": {
                        "fx": meta.fx,
                        "name": meta.name,
                        "prog_bar": meta.prog_bar,
                        "logger": meta.logger,
                        "on_step": meta.on_step,
                        "on_epoch": meta.on_epoch,
                        "reduce_fx": getattr(meta.reduce_fx, "__name__", "mean"),
                        "enable_graph": meta.enable_graph,
                        "add_dataloader_idx": meta.add_dataloader_idx,
                        "dataloader_idx": meta.dataloader_idx,
                        "metric_attribute": meta.metric_attribute,
                    },
                    "sync": [meta.sync._should, meta.sync.rank_zero_only],
                    "is_tensor": metric.is_tensor,  # else a torchmetrics object, whose state is kept with the module
                    "states": {name: getattr(metric, name) for name in metric._defaults},
                    "has_reset": metric.has_reset,
                    "updates": metric._update_count,
                    "cache": metric._forward_cache,
                }
            )
        return saved

    def _restore_results(self, saved: list[dict[str, Any]]) -> None:
        results = self._trainer.fit_loop.epoch_loop._results
        device = self._trainer.strategy.root_device
        for entry in saved:
            reduce_fx = getattr(torch, entry["meta"]["reduce_fx"])
            meta = _Metadata(**{**entry["meta"], "reduce_fx": reduce_fx})
            should, rank_zero_only = entry["sync"]
            meta.sync = _Sync(
                _should=should, fn=self._trainer.strategy.reduce, _group=None, rank_zero_only=rank_zero_only
            )
            metric = _ResultMetric(meta, entry["is_tensor"])
            for name, value in entry["states"].items():
                setattr(metric, name, value.to(device))
                metric._defaults[name] = value.new_tensor(metric._defaults[name])
            if not entry["is_tensor"]:
                metric.value = attrgetter(entry["meta"]["metric_attribute"])(self._trainer.lightning_module)
            metric.has_reset = entry["has_reset"]
            metric._update_count = entry["updates"]
            cache = entry["cache"]
            metric._forward_cache = cache.to(device) if isinstance(cache, Tensor) else cache
            results[entry["key"]] = metric

    # --- ordinary checkpoints ------------------------------------------------------------------------------------

    def guard_checkpoints(self, converting: Callable[[], bool], on_skip: Callable[[str], None]) -> None:
        """No ordinary checkpoint is written while the state is not dense: the original run has written it already."""
        original = self._trainer.save_checkpoint

        def save_checkpoint(filepath: Any, *args: Any, **kwargs: Any) -> None:
            if converting():
                on_skip(str(filepath))
                return
            original(filepath, *args, **kwargs)

        self._patch(self._trainer, "save_checkpoint", save_checkpoint)

    def overwrite_undone_checkpoints(self, since: float) -> None:
        """Files that the failed process wrote after the restored iteration belong to steps that are done again now.

        ModelCheckpoint gives a second file of the same name a version suffix; these it shall overwrite.

        Args:
            since: Time of the restored state, seconds since the epoch.
        """
        for callback in self._checkpoints():
            self._patch(callback, "file_exists", _exists_before(callback.file_exists, since))


def _exists_before(original: Callable[..., bool], since: float) -> Callable[..., bool]:
    def file_exists(filepath: Any, trainer: Trainer) -> bool:
        if not original(filepath, trainer):
            return False
        try:
            from lightning.fabric.utilities.cloud_io import get_filesystem

            modified = get_filesystem(filepath).modified(str(filepath)).timestamp()
        except (NotImplementedError, OSError, AttributeError):
            return True
        return bool(modified < since)

    return file_exists


def _settle(loop: _Loop) -> None:
    """This loop and those in it are neither restarting nor resuming."""
    loop._restarting = False
    loop._loaded_from_state_dict = False
    loop._resuming_from_checkpoint = False
    loop.reset_restart_stage()
    for child in vars(loop).values():
        if isinstance(child, _Loop):
            _settle(child)
