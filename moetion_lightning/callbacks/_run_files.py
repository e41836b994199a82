"""Files and remote runs that a training run writes to: where they are, and what a replay does not write again."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import yaml
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from moetion_lightning.callbacks._loggers import RunLoggers
from moetion_lightning.core.instance_patches import InstancePatches

__all__ = ["RunFiles"]

_log = logging.getLogger(__name__)

#: Of ModelCheckpoint: the whole run's best and newest files, and by what each rank decides whether to save.
_OF_CHECKPOINT = (
    *("best_model_path", "best_model_score", "best_k_models", "kth_best_model_path", "kth_value", "last_model_path"),
    *("current_score", "_last_global_step_saved", "_last_checkpoint_saved", "_defer_save_until_validation"),
)


class RunFiles:
    """Side effects of one trainer's fit.

    Args:
        trainer: The trainer.
        patches: What is replaced on the trainer's objects until the run ends.
    """

    def __init__(self, trainer: Trainer, patches: InstancePatches) -> None:
        self._trainer = trainer
        self._patches = patches
        self._loggers = RunLoggers(trainer.loggers, patches)
        self._moved: list[ModelCheckpoint] = []
        self._postponed: dict[str, Callable[[], None]] = {}
        self._requeue: Callable[[], None] | None = None
        self._since = 0.0
        #: When the run began, whichever process that was, and what it has written up to here.
        self._began = time.time()
        self._written: set[str] = set()

    def _checkpoints(self) -> list[ModelCheckpoint]:
        return [c for c in self._trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]

    def follow(self) -> None:
        """Experiments exist: note from now on what is written."""
        self._loggers.follow()

    def snapshot(self) -> dict[str, Any]:
        """Where the run writes, and how far it is."""
        return {
            "root_dir": str(self._trainer.default_root_dir),
            "step": self._trainer.fit_loop.epoch_loop._batches_that_stepped,
            "loggers": self._loggers.snapshot(),
            "began": self._began,
            "written": sorted(self._written),
            "checkpoints": [
                {
                    "key": callback.state_key,
                    "dirpath": None if callback.dirpath is None else str(callback.dirpath),
                    "state": {name: getattr(callback, name) for name in _OF_CHECKPOINT if hasattr(callback, name)},
                }
                for callback in self._checkpoints()
            ],
        }

    # --- continuing ----------------------------------------------------------------------------------------------

    def continue_from(self, saved: Mapping[str, Any]) -> None:
        """Before experiments are made and ``setup`` hooks run: let the run write where it began.

        Args:
            saved: What :meth:`snapshot` gave.
        """
        made_here: set[str | None] = {None}
        if any(callback.dirpath is not None for callback in self._checkpoints()):  # to ask a logger chooses its version
            made_here.add(self._automatic_folder())
        self._loggers.continue_from(saved["loggers"], saved["step"])
        if saved["root_dir"] == str(self._trainer.default_root_dir):
            for callback, before in self._matching(saved):
                folder = None if callback.dirpath is None else os.path.realpath(callback.dirpath)
                if folder in made_here and before["dirpath"] is not None:
                    callback.dirpath = before["dirpath"]
                    self._moved.append(callback)
        for callback in self._config_savers():
            if not self._has_same_config(callback):
                self._keep_config(callback)
            self._patches.put(callback, "overwrite", True)

    def _automatic_folder(self) -> str:
        """Where ModelCheckpoint writes without ``dirpath``; a validation before this fit has set it already."""
        root, parts = self._trainer.default_root_dir, ["checkpoints"]
        for logger in self._trainer.loggers[:1]:
            root = root if logger.save_dir is None else logger.save_dir
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            parts = [str(logger.name), version, "checkpoints"]
        return os.path.realpath(os.path.join(root, *parts))

    def start_again(self) -> None:
        """An earlier process of this job left no window: the same command line is no error."""
        for callback in self._config_savers():
            if self._has_same_config(callback):
                self._patches.put(callback, "overwrite", True)

    def begin_anew(self) -> None:
        """The run is not continued after all."""
        self._loggers.begin_anew()
        for callback in self._moved:
            callback.dirpath = None
            callback.setup(self._trainer, self._trainer.lightning_module, "fit")
        self._moved = []

    def restore(self, saved: Mapping[str, Any]) -> None:
        """The run continues now, at the window's first iteration.

        Args:
            saved: What :meth:`snapshot` gave.
        """
        self._loggers.restore(saved["loggers"])
        self._moved = []
        self._began, self._written = saved["began"], set(saved["written"])
        for callback, before in self._matching(saved):
            here = _Moved(before["dirpath"], callback.dirpath)
            for name, value in before["state"].items():
                setattr(callback, name, here.path(value) if name.endswith(("_path", "_saved")) else value)
            callback.best_k_models = {here.path(path): score for path, score in callback.best_k_models.items()}
            self._written = {here.path(path) for path in self._written}

    def _matching(self, saved: Mapping[str, Any]) -> list[tuple[ModelCheckpoint, Mapping[str, Any]]]:
        left = list(saved["checkpoints"])
        found = []
        for callback in self._checkpoints():
            of_kind = [before for before in left if before["key"] == callback.state_key]
            if of_kind:
                left.remove(of_kind[0])
                found.append((callback, of_kind[0]))
        return found

    def _config_savers(self) -> list[Any]:
        """LightningCLI's callbacks that refuse to write where a configuration is."""
        return [
            callback
            for callback in self._trainer.callbacks  # type: ignore[attr-defined]
            if any(kind.__name__ == "SaveConfigCallback" for kind in type(callback).__mro__)
            and not (callback.already_saved or callback.overwrite)
            and callback.save_to_log_dir
            and self._trainer.log_dir is not None
        ]

    def _config(self, callback: Any) -> tuple[str, str | None]:
        """Where it is written, and what is there."""
        path = os.path.join(self._trainer.log_dir or "", callback.config_filename)
        filesystem = get_filesystem(path)
        if not (self._trainer.is_global_zero and filesystem.isfile(path)):
            return path, None
        with filesystem.open(path, "r") as file:
            return path, file.read()

    def _has_same_config(self, callback: Any) -> bool:
        _, there = self._config(callback)
        here = callback.parser.dump(callback.config, skip_none=False)
        same = there is None or yaml.safe_load(there) == yaml.safe_load(here)
        return bool(self._trainer.strategy.reduce_boolean_decision(same))

    def _keep_config(self, callback: Any) -> None:
        path, there = self._config(callback)
        if there is not None:
            stem, extension = os.path.splitext(path)
            kept = f"{stem}-before{extension}"
            with get_filesystem(path).open(kept, "w") as file:
                file.write(there)
            _log.info("the configuration has changed since the run began: %s keeps the older one", kept)

    # --- ordinary checkpoints ------------------------------------------------------------------------------------

    def guard(self, converting: Callable[[], bool]) -> None:
        """Write no ordinary checkpoint while the state is not dense.

        The original run has written it already; a file that is not there is written as soon as the state is dense.

        Args:
            converting: Whether it is not.
        """
        trainer = self._trainer
        save, remove = trainer.save_checkpoint, trainer.strategy.remove_checkpoint

        def save_checkpoint(filepath: Any, *args: Any, **kwargs: Any) -> None:
            is_there = converting() and self._is_there(filepath)
            self._written.add(str(filepath))
            if not converting():
                save(filepath, *args, **kwargs)
            elif is_there:
                _log.info("%s is not written: this step is being replayed, and was saved before", filepath)
            else:
                _log.info("%s is written when the replay that is under way has made the state whole", filepath)
                self._postponed[str(filepath)] = lambda: save(filepath, *args, **kwargs)

        def remove_checkpoint(filepath: Any) -> None:
            self._postponed.pop(str(filepath), None)
            self._written.discard(str(filepath))
            remove(filepath)

        self._patches.put(trainer, "save_checkpoint", save_checkpoint)
        self._patches.put(trainer.strategy, "remove_checkpoint", remove_checkpoint)
        for callback in self._checkpoints():
            self._patches.put(callback, "file_exists", self._exists_here(callback.file_exists))
        self._guard_requeue(converting)

    def _guard_requeue(self, converting: Callable[[], bool]) -> None:
        """A job that SLURM takes away saves a checkpoint, which must be of a whole state, and is requeued then."""
        connector = self._trainer._signal_connector
        original = getattr(connector, "_slurm_sigusr_handler_fn", None)
        if original is None:
            return

        def handle(signum: Any, frame: Any) -> None:
            if converting():
                _log.info("signal %s is handled when the replay that is under way has made the state whole", signum)
                self._requeue = lambda: original(signum, None)
            else:
                original(signum, frame)

        self._patches.put(connector, "_slurm_sigusr_handler_fn", handle)

    def write_postponed(self) -> None:
        """The state is dense, and between two batches, the next one of which is fetched."""
        postponed, self._postponed = self._postponed, {}
        requeue, self._requeue = self._requeue, None
        if not postponed and requeue is None:
            return
        progress = self._trainer.fit_loop.epoch_loop.batch_progress
        progress.total.ready -= 1  # the batch that is about to begin
        progress.current.ready -= 1
        try:
            for write in postponed.values():
                write()
            if requeue is not None:
                requeue()
        finally:
            progress.total.ready += 1
            progress.current.ready += 1

    def warn_of_postponed(self) -> None:
        """Training has ended before the state was dense."""
        if self._postponed:
            _log.warning("not written, because training ended within a replay: %s", ", ".join(self._postponed))

    def overwrite_undone(self, since: float) -> None:
        """Files that the failed process wrote after the restored iteration belong to steps that are done again now.

        ModelCheckpoint gives a second file of the same name a version suffix; these it shall overwrite.

        Args:
            since: Time of the restored state, seconds since the epoch.
        """
        self._since = since

    def _exists_here(self, original: Callable[..., bool]) -> Callable[..., bool]:
        def file_exists(filepath: Any, trainer: Trainer) -> bool:
            return original(filepath, trainer) and not (self._since and self._is_undone(filepath))

        return file_exists

    def _is_undone(self, filepath: Any) -> bool:
        """Whether the run has written it in steps that are done again, though not up to here.

        Times alone do not tell: a state may have been captured when steps before it were done for the second time.
        """
        return str(filepath) not in self._written and not _older(filepath, self._began, unknown=True)

    def _is_there(self, filepath: Any) -> bool:
        """Whether the original run has written it, at the step that is done again now or later. All ranks ask."""
        there = False
        if self._trainer.is_global_zero:
            filesystem = get_filesystem(filepath)
            is_new = self._is_undone(filepath) or not _older(filepath, self._since, unknown=False)
            there = filesystem.exists(str(filepath)) and is_new
        return bool(self._trainer.strategy.reduce_boolean_decision(there, all=False))


class _Moved:
    """Paths below a directory of the original process, where the run writes to another one and has them there."""

    def __init__(self, before: str | None, here: Any) -> None:
        self._before, self._here = before, None if here is None else str(here)

    def path(self, value: Any) -> Any:
        """The path here, if there is such a file."""
        if not isinstance(value, str) or not self._before or not self._here or self._before == self._here:
            return value
        if os.path.dirname(value) != self._before:
            return value
        path = os.path.join(self._here, os.path.basename(value))
        return path if get_filesystem(path).exists(path) and not get_filesystem(value).exists(value) else value


def _older(filepath: Any, since: float, *, unknown: bool) -> bool:
    """Whether it was written before; ``unknown`` where the file system does not tell."""
    try:
        return bool(get_filesystem(filepath).modified(str(filepath)).timestamp() < since)
    except (NotImplementedError, OSError, AttributeError):
        return unknown
