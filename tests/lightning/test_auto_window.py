"""window="auto" in a Trainer: captures that cost something get a longer window, and the log says why."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from moetion_lightning.callbacks import SparseExpertCheckpoint
from moetion_lightning.events import CaptureStarted, Event, ScheduleMade, WindowCommitted
from moetion_lightning.session import fits
from tests.runs.data import Samples
from tests.runs.models import Automatic
from tests.runs.scenario import DEFAULTS

_DENSE_SECONDS = 0.04


@pytest.fixture(autouse=True)
def _fresh_identities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits, "_fits", {})


def fit(tmp_path: Path, *callbacks: pl.Callback, max_steps: int = 140) -> Automatic:
    """Some iterations of a small model in a default Trainer."""
    pl.seed_everything(1, verbose=False)
    net = Automatic(dict(DEFAULTS))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        max_steps=max_steps,
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(net, DataLoader(Samples(28, augment=False), batch_size=4, shuffle=True))
    return net


class Enough(pl.Callback):
    """Ends a fit soon after captures were measured, however long that takes on a busy machine."""

    def __init__(self, events: list[Event]) -> None:
        self.events = events
        self.steps = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps = trainer.global_step
        last = [event for event in self.events if isinstance(event, ScheduleMade)][-1:]
        trainer.should_stop = bool(last and last[0].measured and isinstance(self.events[-1], WindowCommitted))


def test_copies_that_training_waits_for_get_a_longer_window_and_the_log_says_why(
    tmp_path: Path, memory_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[Event] = []

    def slow_copy(event: Event) -> None:
        """On the capture thread: the optimizer waits for it. A dense copy takes as long as several iterations."""
        events.append(event)
        if isinstance(event, CaptureStarted):
            time.sleep(_DENSE_SECONDS / event.num_slots)

    capture = SparseExpertCheckpoint(memory_dir=str(memory_dir), sinks=(slow_copy,))
    with caplog.at_level(logging.INFO, logger="moetion_lightning"):
        enough = Enough(events)
        watched = fit(tmp_path, capture, enough, max_steps=1500)
    schedules = [event for event in events if isinstance(event, ScheduleMade)]
    assert schedules[0].reason.startswith("first schedule; auto: captures cost ")
    assert not schedules[0].measured
    assert schedules[-1].measured
    assert schedules[-1].window > 1
    lines = [record.message for record in caplog.records if record.message.startswith("window of ")]
    measured = re.compile(
        rf"window of {schedules[-1].window} iterations \(.*auto: captures cost \d+\.\d+% of an iteration of "
        r"\d+\.\d m?s, \d+\.\d+% with W = 1 \(measured\), a failure every 2\.8 h \d+\.\d+%\)"
    )
    assert any(measured.match(line) for line in lines), lines

    windows = [(e.first_iteration, e.last_iteration) for e in events if isinstance(e, WindowCommitted)]
    gaps = [begins - ended for (_, ended), (begins, _) in zip(windows, windows[1:])]
    assert 7 in gaps, "captures pause for six iterations"
    assert gaps[0] == 1, "not before a window is committed"

    plain = fit(tmp_path, max_steps=enough.steps)
    assert all(torch.equal(value, watched.state_dict()[name]) for name, value in plain.state_dict().items())


def test_a_window_that_is_given_is_kept_and_nothing_pauses(tmp_path: Path, memory_dir: Path) -> None:
    windows: list[int] = []

    def note(event: Any) -> None:
        if isinstance(event, WindowCommitted):
            windows.append(event.first_iteration)

    fit(tmp_path, SparseExpertCheckpoint(window=3, memory_dir=str(memory_dir), sinks=(note,)))
    assert windows == list(range(1, 140 - 1, 3))
