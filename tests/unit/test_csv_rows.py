"""A CSV file of metrics survives a kill at any moment of a write."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

from moetion_lightning.callbacks._loggers import RunLoggers
from moetion_lightning.core.instance_patches import InstancePatches


class Killed(Exception):
    """In place of a signal."""


def _started(folder: Path) -> tuple[CSVLogger, RunLoggers]:
    logger = CSVLogger(folder, name="", version="run")
    loggers = RunLoggers([logger], InstancePatches())
    return logger, loggers


def _rows(logger: CSVLogger) -> list[dict[str, str]]:
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_outlive_a_kill_while_a_column_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger, loggers = _started(tmp_path)
    experiment: Any = logger.experiment
    loggers.follow()
    logger.log_metrics({"a": 1.0}, step=0)
    logger.save()
    saved = loggers.snapshot()

    def die(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(csv.DictWriter, "writeheader", die)
        logger.log_metrics({"b": 2.0}, step=1)
        with pytest.raises(Killed):
            experiment.save()
    assert _rows(logger) == [{"a": "1.0", "step": "0"}]

    again, loggers = _started(tmp_path)
    loggers.continue_from(saved, 1)
    loggers.follow()
    loggers.restore(saved)
    again.log_metrics({"b": 2.0}, step=1)
    again.save()
    assert _rows(again) == [{"a": "1.0", "b": "", "step": "0"}, {"a": "", "b": "2.0", "step": "1"}]


def test_a_file_whose_header_was_not_written_is_begun_again(tmp_path: Path) -> None:
    logger, loggers = _started(tmp_path)
    _ = logger.experiment
    loggers.follow()
    logger.log_metrics({"a": 0.0}, step=0)
    logger.save()
    saved = loggers.snapshot()
    (Path(logger.log_dir) / "metrics.csv").write_text("")

    again, loggers = _started(tmp_path)
    loggers.continue_from(saved, 0)
    loggers.follow()
    loggers.restore(saved)
    for step in (1, 2):
        again.log_metrics({"a": 1.0}, step=step)
        again.save()
    assert _rows(again) == [{"a": "1.0", "step": "1"}, {"a": "1.0", "step": "2"}]
