"""Which checkpoint files a continued run writes over, and which it leaves."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from moetion_lightning.callbacks._run_files import RunFiles
from moetion_lightning.core.instance_patches import InstancePatches


def a_process(folder: Path) -> tuple[Any, ModelCheckpoint, RunFiles]:
    checkpoint = ModelCheckpoint(folder)
    trainer: Any = pl.Trainer(accelerator="cpu", logger=False, callbacks=[checkpoint], enable_progress_bar=False)

    def save(path: Path) -> None:
        path.touch()
        os.utime(path, (time.time() + 1.0,) * 2)  # files' times advance in jumps

    trainer.save_checkpoint = save
    files = RunFiles(trainer, InstancePatches())
    files.guard(lambda: False)
    return trainer, checkpoint, files


def test_file_of_steps_that_are_done_for_the_third_time_gets_no_second_name(tmp_path: Path) -> None:
    foreign, early, undone = (tmp_path / f"{name}.ckpt" for name in ("foreign", "early", "undone"))
    foreign.touch()
    os.utime(foreign, (1, 1))
    trainer, checkpoint, files = a_process(tmp_path)
    trainer.save_checkpoint(early)
    saved = files.snapshot()
    trainer.save_checkpoint(undone)
    exists = [checkpoint.file_exists(str(path), trainer) for path in (foreign, early, undone)]
    assert exists == [True, True, True], "nothing was done again"

    trainer, checkpoint, files = a_process(tmp_path)
    files.restore(saved)
    files.overwrite_undone(time.time() + 60.0)  # the state was captured when its steps were done for the second time
    exists = [checkpoint.file_exists(str(path), trainer) for path in (foreign, early, undone)]
    assert exists == [True, True, False]
