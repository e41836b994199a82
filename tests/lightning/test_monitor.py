"""The monitor inside one process: what it logs, when, and from what. Kills are in ``tests/faults``."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from moetion_lightning.badput import CAUSES, Use
from moetion_lightning.callbacks import FaultToleranceMonitor, PartialExpertsCheckpoint, SparseExpertCheckpoint
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.events import Event, PartialExpertsRestored, TokensCounted
from tests.lightning.test_callbacks import loader, module, trainer

NAMES = (
    *("committed_step", "protected"),
    *("ettr", "lost_seconds", "stall_seconds_per_iteration", "stall_share", "expert_imbalance", "plt"),
    *("ettr_last_hour", "productive_seconds", "wall_seconds"),
    *(f"{when}/{cause.value}_seconds" for when in ("badput", "badput_last_hour") for cause in CAUSES),
)


def test_tokens_and_what_was_lost_of_them() -> None:
    monitor = FaultToleranceMonitor()
    monitor.on_moetion_event(TokensCounted(iteration=1, tokens={"a": [1, 2, 3], "b": [4, 4]}))
    monitor.on_moetion_event(TokensCounted(iteration=5, tokens={"a": [1, 0, 1], "b": [0, 8]}))
    monitor.on_moetion_event(
        PartialExpertsRestored(iteration=5, stale={}, lost_tokens=4, lost_by_layer={"b": 4, "a": 0}, plt=0.125)
    )
    assert monitor.tokens == {"a": [2, 2, 4], "b": [4, 12]}
    assert monitor.layers == ("a", "b")
    assert monitor.lost_tokens is not None
    assert float(monitor.lost_tokens.compute()) == 0.125
    again = FaultToleranceMonitor()
    again.load_state_dict(monitor.state_dict())
    mine, theirs = again.state_dict(), monitor.state_dict()
    assert len(mine.pop("ledger")) == len(theirs.pop("ledger"))
    assert mine == theirs
    again.on_moetion_event(TokensCounted(iteration=6, tokens={"a": [1, 1]}))
    assert again.tokens == {"a": [1, 1]}  # other layers: what was counted of the earlier ones says nothing of them


@pytest.mark.parametrize("last", [False, True])
def test_values_reach_the_loggers(tmp_path: Path, memory_dir: Path, last: bool) -> None:
    capture = SparseExpertCheckpoint(window=2, memory_dir=str(memory_dir), job_id="job", log_metrics=False)
    monitor = FaultToleranceMonitor()
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    order: list[pl.Callback] = [capture, monitor] if last else [monitor, capture]
    run = trainer(tmp_path, *order, logger=logger, log_every_n_steps=3)
    run.fit(module(block="fused"), loader())
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        every = [row for row in csv.DictReader(file) if row["moetion/protected"]]
    rows = [row for row in every if row["moetion/ettr"]]
    # Of the first step is known that nothing is protected yet.
    assert [every[0][name] for name in ("step", "moetion/committed_step", "moetion/protected")] == ["0", "-1.0", "0.0"]
    # 14 steps: at each third one, and at the end. Loggers count from zero, as for everything that Lightning logs.
    assert [int(row["step"]) for row in rows] == [2, 5, 8, 11, 13]
    assert set(monitor.values) == {f"moetion/{name}" for name in NAMES}
    assert {name: float(rows[-1][name]) for name in monitor.values} == pytest.approx(monitor.values)
    assert 0 < monitor.values["moetion/ettr"] < 1
    badput = [monitor.values[f"moetion/badput/{cause.value}_seconds"] for cause in CAUSES]
    assert min(badput) >= 0
    productive, wall = (monitor.values[f"moetion/{name}_seconds"] for name in ("productive", "wall"))
    assert productive + sum(badput) == pytest.approx(wall, rel=1e-12)
    assert monitor.account.ledger.totals[Use.IDLE] < 1e9  # one fit, from the start of this process on
    assert monitor.values["moetion/plt"] == 0
    assert monitor.state_dict()["num_iterations"] == 13


def test_ratio_in_the_progress_bar(tmp_path: Path, memory_dir: Path) -> None:
    """Lightning keeps what it shows in single precision."""
    capture = SparseExpertCheckpoint(window=2, memory_dir=str(memory_dir), job_id="job")
    monitor = FaultToleranceMonitor(every_n_steps=5, progress_bar=True)
    run = trainer(tmp_path, monitor, capture, max_steps=10)
    run.fit(module(), loader())
    assert run.progress_bar_metrics["moetion/ettr"] == float(torch.tensor(monitor.values["moetion/ettr"]))


class CountRouted(pl.Callback):
    """Counts what the experts are given, by its own hooks."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.per_step = [torch.zeros(2, 4, dtype=torch.int64)]
        for layer, block in enumerate(pl_module.body.blocks):
            block.experts.register_forward_pre_hook(lambda _, args, layer=layer: self._count(layer, args[1]))

    def _count(self, layer: int, ids: torch.Tensor) -> None:
        self.per_step[-1][layer] += torch.bincount(ids.flatten(), minlength=4)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.per_step.append(torch.zeros(2, 4, dtype=torch.int64))


def test_load_is_what_was_routed(tmp_path: Path, memory_dir: Path) -> None:
    capture = PartialExpertsCheckpoint(1, memory_dir=str(memory_dir), job_id="job")  # a checkpoint after each step
    monitor, routed = FaultToleranceMonitor(every_n_steps=1), CountRouted()
    trainer(tmp_path, monitor, routed, capture).fit(module(block="fused"), loader())
    assert monitor.expert_load is not None
    expected = torch.stack(routed.per_step[:13]).sum(dim=0)  # the last step of 14 has no next one
    assert torch.equal(monitor.expert_load.tokens, expected)
    assert monitor.values["moetion/expert_imbalance"] == max(4 * max(row) / sum(row) for row in expected.tolist())


class Listener(pl.Callback):
    counts_tokens = True

    def __init__(self) -> None:
        self.kinds: set[str] = set()

    def on_moetion_event(self, event: Event) -> None:
        self.kinds.add(event.kind)


def test_any_callback_may_listen(tmp_path: Path, memory_dir: Path) -> None:
    listener = Listener()
    capture = SparseExpertCheckpoint(window=2, memory_dir=str(memory_dir), job_id="job")
    trainer(tmp_path, listener, capture, max_steps=6).fit(module(), loader())
    assert {"OperatorsFound", "IterationFinished", "TokensCounted", "WindowCommitted"} <= listener.kinds


def test_a_second_fit_begins_anew(tmp_path: Path, memory_dir: Path) -> None:
    monitor = FaultToleranceMonitor()
    for name in ("first", "second"):
        capture = SparseExpertCheckpoint(window=2, memory_dir=str(memory_dir), job_id=name)
        trainer(tmp_path, monitor, capture, max_steps=5).fit(module(), loader())
        assert monitor.state_dict()["num_iterations"] == 4


def test_without_anything_to_listen_to_it_says_what_to_add(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="without a callback whose events it could count: add SparseExpert"):
        trainer(tmp_path, FaultToleranceMonitor()).fit(module(), loader())


def test_wrong_interval_raises_at_construction() -> None:
    with pytest.raises(ConfigurationError, match="every_n_steps=0"):
        FaultToleranceMonitor(every_n_steps=0)
