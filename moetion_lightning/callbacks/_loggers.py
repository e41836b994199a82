"""Loggers of a run that continues: the same version or remote run, and a CSV file that keeps its rows.

Nothing here depends on a logger's library: what names a run is an attribute of the logger.
"""

from __future__ import annotations

import csv
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from moetion_lightning.core.instance_patches import InstancePatches

__all__ = ["RunLoggers"]

_log = logging.getLogger(__name__)

#: Attributes by which loggers know their run (TensorBoard and CSV; W&B; MLflow; Comet); None until one is chosen.
_NAMES_OF_RUN = ("_version", "_id", "_run_id", "_experiment_key")


class RunLoggers:
    """The loggers of one trainer.

    Args:
        loggers: They, in the trainer's order.
        patches: What is replaced on the trainer's objects until the run ends.
    """

    def __init__(self, loggers: Sequence[Any], patches: InstancePatches) -> None:
        self._loggers = loggers
        self._patches = patches
        self._chosen = [_is_chosen(logger) for logger in loggers]
        self._csv: dict[int, _CsvRows] = {}
        self._undo: list[Callable[[], None]] = []

    def follow(self) -> None:
        """Experiments exist: note from now on what is written."""
        for index, logger in enumerate(self._loggers):
            experiment = getattr(logger, "_experiment", None)
            if isinstance(experiment, _ExperimentWriter) and index not in self._csv:
                self._csv[index] = _CsvRows(experiment, self._patches)

    def snapshot(self) -> list[dict[str, Any]]:
        """What names each logger's run, and how far its file is written."""
        return [
            {
                "kind": type(logger).__name__,
                "run": _name_of_run(logger),
                "csv": self._csv[index].snapshot() if index in self._csv else None,
            }
            for index, logger in enumerate(self._loggers)
        ]

    # --- continuing ----------------------------------------------------------------------------------------------

    def continue_from(self, saved: Sequence[Mapping[str, Any]], step: int) -> None:
        """Before experiments are made: let each be the one of the run that is continued.

        Args:
            saved: What :meth:`snapshot` gave.
            step: The step from which the run is done again.
        """
        for logger, chosen, before in zip(self._loggers, self._chosen, saved):
            if type(logger).__name__ != before["kind"]:
                continue
            if not chosen:
                self._take_name(logger, before["run"])
            if _name_of_run(logger) != before["run"]:
                continue
            if type(logger).__name__ == "TensorBoardLogger" and getattr(logger, "_experiment", None) is None:
                logger._kwargs["purge_step"] = step  # steps that are done again replace those of the failed process
                self._undo.append(functools.partial(logger._kwargs.pop, "purge_step", None))
            if before["csv"] is not None:
                _make_csv_experiment(logger)

    def _take_name(self, logger: Any, run: Mapping[str, Any]) -> None:
        own = vars(logger)
        changed = {name: value for name, value in run.items() if name in own and own[name] != value}
        old = {name: own[name] for name in changed}
        if not changed:
            return
        _close(logger)
        own.update(changed)
        given = own.get("_wandb_init")
        if isinstance(given, dict) and "_id" in changed:
            old_id, given["id"] = given.get("id"), changed["_id"]
            self._undo.append(lambda: given.update(id=old_id))
        name, value = next(iter(changed.items()))
        where = f"{name.strip('_').replace('_', ' ')} {value}"
        _log.info("%s goes on in %s, where the run began", type(logger).__name__, where)

        def undo() -> None:
            _close(logger)
            own.update(old)

        self._undo.append(undo)

    def begin_anew(self) -> None:
        """The run is not continued after all: runs of their own, as in a first start."""
        for undo in reversed(self._undo):
            undo()
        if self._undo:
            self._csv.clear()
            for logger in self._loggers:
                _ = getattr(logger, "experiment", None)
        self._undo = []
        self.follow()

    def restore(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """The run continues now, at the window's first iteration: what was written after it is written again.

        Args:
            saved: What :meth:`snapshot` gave.
        """
        self._undo = []
        for index, before in enumerate(saved):
            if index in self._csv and before["csv"] is not None and self._goes_on(index, before):
                self._csv[index].restore(before["csv"])

    def _goes_on(self, index: int, before: Mapping[str, Any]) -> bool:
        return bool(_name_of_run(self._loggers[index]) == before["run"])


def _name_of_run(logger: Any) -> dict[str, Any]:
    own = vars(logger)
    found = {name: own[name] for name in _NAMES_OF_RUN if isinstance(own.get(name), (str, int))}
    if "_id" in own and "_id" not in found and isinstance(logger.version, str):
        found["_id"] = logger.version  # of the experiment, where the logger itself was given none
    return found


def _is_chosen(logger: Any) -> bool:
    """Whether the user has said which run it is. Lightning's next free number, and a job's number, are no choice."""
    own = vars(logger)
    named = [own[name] for name in _NAMES_OF_RUN if own.get(name) is not None]
    if not named:
        return False
    if own.get("_version") is None:
        return True
    version = own["_version"]
    if version == SLURMEnvironment.job_id():
        return False
    next_version = getattr(logger, "_get_next_version", None)
    return not isinstance(version, int) or next_version is None or version not in (next_version(), next_version() - 1)


def _close(logger: Any) -> None:
    """Give up an experiment that was made already."""
    experiment = getattr(logger, "_experiment", None)
    if experiment is not None:
        close = getattr(experiment, "close", None)
        if callable(close):
            close()
        logger._experiment = None


def _make_csv_experiment(logger: Any) -> None:
    """As the logger does, but without removing the file that is there."""
    if getattr(logger, "_experiment", None) is not None:
        return
    original = _ExperimentWriter._check_log_dir_exists
    _ExperimentWriter._check_log_dir_exists = lambda self: None  # type: ignore[method-assign]
    try:
        _ = logger.experiment
    finally:
        _ExperimentWriter._check_log_dir_exists = original  # type: ignore[method-assign]


class _CsvRows:
    """How many rows a CSV experiment has in its file.

    Args:
        experiment: The experiment.
        patches: What is replaced until the run ends.
    """

    def __init__(self, experiment: Any, patches: InstancePatches) -> None:
        self._experiment = experiment
        self._written = len(self._read()[1])
        original = experiment.save

        def save() -> None:
            pending = len(experiment.metrics)
            original()
            self._written += pending - len(experiment.metrics)

        def rewrite(keys: list[str]) -> None:
            self._write(keys, self._read()[1])

        patches.put(experiment, "save", save)
        patches.put(experiment, "_rewrite_with_new_header", rewrite)

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        experiment = self._experiment
        if not experiment._fs.isfile(experiment.metrics_file_path):
            return [], []
        with experiment._fs.open(experiment.metrics_file_path, "r", newline="") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or []), list(reader)

    def _write(self, keys: list[str], rows: list[dict[str, str]]) -> None:
        """A kill meanwhile must not cost the rows."""
        experiment = self._experiment
        part = f"{experiment.metrics_file_path}.part"
        with experiment._fs.open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=keys, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        experiment._fs.mv(part, experiment.metrics_file_path)

    def snapshot(self) -> dict[str, Any]:
        """Rows in the file, and rows that are still to be written."""
        experiment = self._experiment
        return {
            "written": self._written,
            "pending": [dict(row) for row in experiment.metrics],
            "keys": list(experiment.metrics_keys),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take back rows that were written later, and columns that only they had."""
        experiment, keys = self._experiment, list(saved["keys"])
        _, rows = self._read()
        kept = rows[: saved["written"]]
        if kept:
            self._write(keys, kept)
        elif experiment._fs.isfile(experiment.metrics_file_path):  # also one whose header was not written any more
            experiment._fs.rm_file(experiment.metrics_file_path)
        experiment.metrics = [dict(row) for row in saved["pending"]]
        experiment.metrics_keys = keys
        self._written = len(kept)
