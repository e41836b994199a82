"""StageBoundaryLogging in one process: what it refuses, what it says, and that it leaves nothing behind."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch.utils.data import DataLoader

from moetion_lightning.callbacks import (
    DenseReconstruction,
    SparseExpertCheckpoint,
    StageBoundaryLogging,
    stage_boundary_logging,
)
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.pipeline.stage import NetworkTraffic
from moetion_lightning.session import fits
from moetion_lightning.strategies import MoEtionStrategy
from moetion_lightning.strategies.pipeline_link import PipelineLink
from moetion_lightning.strategies.pipeline_strategy import PipelineStrategy
from tests.runs.data import Samples
from tests.runs.decoder import Decoder
from tests.runs.scenario import DEFAULTS


class Started(LightningEnvironment):
    """All processes are there: Lightning starts none, and no thread that watches them."""

    @property
    def creates_processes_externally(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As far as identities, process groups and what Lightning leaves in the environment go."""
    monkeypatch.setattr(fits, "_fits", {})
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def capture(memory_dir: Path) -> SparseExpertCheckpoint:
    return SparseExpertCheckpoint(window=2, memory_dir=str(memory_dir), job_id="job")


def module() -> Decoder:
    pl.seed_everything(1, verbose=False)
    return Decoder({**DEFAULTS, "num_layers": 3})


def loader() -> DataLoader[Any]:
    return DataLoader(Samples(28, augment=False), batch_size=4)


def trainer(tmp_path: Path, *callbacks: pl.Callback, strategy: Any = None, **options: Any) -> pl.Trainer:
    pipeline = MoEtionStrategy(
        num_microbatches=2, schedule="interleaved_1f1b", chunks_per_rank=2, process_group_backend="gloo",
        cluster_environment=Started(),
    )  # fmt: skip
    return pl.Trainer(
        accelerator="cpu", devices=1, strategy=strategy or pipeline, callbacks=list(callbacks),
        default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        limit_val_batches=0, log_every_n_steps=1, use_distributed_sampler=False,
        **{"max_steps": 4, "logger": False, **options},
    )  # fmt: skip


class OneRank(StageBoundaryLogging):
    """For a pipeline of one rank, whose stages stand for those of several: its log holds the batches only."""

    def make_link(self, trainer: pl.Trainer) -> None:
        if self._link is None:
            strategy = pipeline_of(trainer)
            warn = logging.getLogger("moetion_lightning").warning
            self._link = strategy.link = PipelineLink(strategy, self.max_bytes or 10**7, warn)
            self._link.iteration_begins(1)  # as the engine of a job with several ranks says


class At(pl.Callback):
    """Looks at the job after a step, or ends it with an exception."""

    def __init__(self, step: int, look: Any) -> None:
        self.step, self.look, self.looked = step, look, 0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.looked += 1
            self.look(trainer)


def pipeline_of(trainer: pl.Trainer) -> PipelineStrategy:
    assert isinstance(trainer.strategy, PipelineStrategy)
    return trainer.strategy


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [0, -1, True, False, -0.5, "1GB", float("nan")])
def test_bounds_are_bytes(wrong: Any) -> None:
    with pytest.raises(ConfigurationError) as raised:
        StageBoundaryLogging(max_bytes=wrong)
    assert str(raised.value) == f"StageBoundaryLogging(max_bytes={wrong!r}): expected a number of bytes > 0"


@pytest.mark.parametrize(
    ("strategy", "name"),
    [("auto", "SingleDeviceStrategy"), (MoEtionStrategy, "MoEtionStrategy"), (None, "PipelineStrategy")],
)
@pytest.mark.parametrize("ours_first", [True, False])
def test_jobs_without_boundaries_are_refused(
    strategy: Any, name: str, ours_first: bool, tmp_path: Path, capture: SparseExpertCheckpoint
) -> None:
    made = strategy(process_group_backend="gloo", cluster_environment=Started()) if callable(strategy) else strategy
    callbacks = [StageBoundaryLogging(), capture][:: 1 if ours_first else -1]
    run = trainer(tmp_path, *callbacks, strategy=made)
    with pytest.raises(ConfigurationError) as raised:
        run.fit(module(), loader())
    for part in (f"Trainer(strategy={name})", "pipeline_parallel_size=...", "2 ranks or more", "Remove the callback"):
        assert part in str(raised.value)
    assert run.global_step == 0


def two_ranks(*callbacks: pl.Callback) -> Any:
    """As much of the trainer of a job of two ranks as setup looks at; there are no process groups."""
    environment = Started()
    environment.set_world_size(2)
    devices = [torch.device("cpu")] * 2
    strategy = MoEtionStrategy(pipeline_parallel_size=2, parallel_devices=devices, cluster_environment=environment)
    return SimpleNamespace(strategy=strategy, callbacks=list(callbacks), world_size=2, num_nodes=1, is_global_zero=True)


@pytest.mark.parametrize("others", [[], [DenseReconstruction]])
def test_without_windows_it_is_refused(others: list[Any]) -> None:
    ours = StageBoundaryLogging()
    run = two_ranks(ours, *(make() for make in others))
    with pytest.raises(ConfigurationError, match="without a callback that captures windows.*SparseExpertCheckpoint"):
        ours.setup(run, module(), "fit")
    ours.on_exception(run, module(), ZeroDivisionError())  # Lightning calls it after errors of setup too
    assert ours.link is None
    assert run.strategy.link is None


def test_without_launch_it_says_that_it_has_no_effect(
    capture: SparseExpertCheckpoint, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.WARNING, "moetion_lightning"):
        StageBoundaryLogging().setup(two_ranks(capture), module(), "fit")
        (said,) = [record.getMessage() for record in caplog.records]
        assert said.startswith("StageBoundaryLogging has no effect here but its cost")
        assert "Start the script with it, or remove the callback" in said
        other = two_ranks(capture)
        other.is_global_zero = False
        StageBoundaryLogging().setup(other, module(), "fit")
        monkeypatch.setattr(stage_boundary_logging, "launched_process", lambda: object())
        StageBoundaryLogging().setup(two_ranks(capture), module(), "fit")
    assert len(caplog.records) == 1


def test_the_log_is_made_once_with_its_bound(capture: SparseExpertCheckpoint) -> None:
    """Whichever callback is set up first asks for it."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for given, bound in ((12345, 12345), (None, int(0.1 * memory / 2))):
        run, ours = two_ranks(capture), StageBoundaryLogging(max_bytes=given)
        ours.make_link(run)
        link = ours.link
        assert link is not None
        ours.setup(run, module(), "fit")
        assert ours.link is run.strategy.link is link
        assert link.log.max_bytes == bound


def test_other_stages_than_fit_need_nothing(tmp_path: Path) -> None:
    ours = StageBoundaryLogging()
    ours.setup(trainer(tmp_path, ours), module(), "test")
    assert ours.link is None


# --- what it does ----------------------------------------------------------------------------------------------------


def test_training_is_logged_iteration_by_iteration(tmp_path: Path, capture: SparseExpertCheckpoint) -> None:
    ours, found = OneRank(max_bytes=10**6), []

    def look(run: pl.Trainer) -> None:
        assert ours.link is pipeline_of(run).link is not None
        log = ours.link.log
        found.append((log.complete(), log.max_bytes, log.rounds(1), log.control(3)))

    trainer(tmp_path, ours, capture, At(3, look)).fit(module(), loader())
    ((complete, bound, rounds, control),) = found
    assert (complete, bound) == ((1, 3), 10**6)
    (done,) = rounds
    first = next(iter(loader()))
    assert any(torch.equal(tensor, first["tokens"]) for tensor in done.batch)
    assert done.index == 0
    assert len(done.losses) == 2  # micro-batches
    assert control.divisor == 1
    assert len(control.stage_norms) == 1
    assert float.fromhex(control.stage_norms[0]) > 0
    assert set(control.groups[0]) >= {"lr", "betas", "weight_decay"}


def test_training_is_the_same_with_and_without_it(tmp_path: Path, memory_dir: Path) -> None:
    weights = []
    for index, ours in enumerate(([], [OneRank()])):
        net = module()
        capture = SparseExpertCheckpoint(window=2, memory_dir=str(memory_dir), job_id=f"job{index}")
        trainer(tmp_path, *ours, capture).fit(net, loader())
        weights.append(net.state_dict())
        dist.destroy_process_group()
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


@pytest.mark.parametrize("log_metrics", [True, False])
def test_bytes_of_an_iteration_go_to_the_loggers(
    log_metrics: bool, tmp_path: Path, capture: SparseExpertCheckpoint
) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    ours = OneRank(log_metrics=log_metrics)
    run = trainer(tmp_path, ours, capture, logger=logger)
    run.fit(module(), loader())
    found = "moetion/boundary_log_bytes" in run.callback_metrics
    assert found == log_metrics
    assert not found or float(run.callback_metrics["moetion/boundary_log_bytes"]) > 0


def test_a_bound_that_is_reached_is_said_once(
    tmp_path: Path, capture: SparseExpertCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "moetion_lightning"):
        trainer(tmp_path, OneRank(max_bytes=8), capture).fit(module(), loader())
    said = [record.getMessage() for record in caplog.records if "reached its bound" in record.getMessage()]
    assert len(said) == 1


def test_skipped_steps_are_not_logged(tmp_path: Path, capture: SparseExpertCheckpoint) -> None:
    """With accumulated batches only every second one ends an iteration, which holds two runs."""
    ours, found = OneRank(), []

    def look(run: pl.Trainer) -> None:
        assert ours.link is not None
        found.append((ours.link.log.complete(), [r.index for r in ours.link.log.rounds(2)]))

    run = trainer(tmp_path, ours, capture, At(2, look), accumulate_grad_batches=2, max_steps=3)
    run.fit(module(), loader())
    assert found[0] == ((1, 2), [2, 3])


# --- what it leaves --------------------------------------------------------------------------------------------------


def test_a_second_fit_is_logged_too(tmp_path: Path, capture: SparseExpertCheckpoint) -> None:
    ours, found = OneRank(), []

    def look(run: pl.Trainer) -> None:
        assert ours.link is not None
        found.append(ours.link.log.nbytes)

    run, net = trainer(tmp_path, ours, capture, At(2, look), At(5, look)), module()
    run.fit(net, loader())
    run.fit_loop.epoch_loop.max_steps = 6
    run.fit(net, loader())
    assert len(found) == 2
    assert all(found)


def fail(run: pl.Trainer) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_nothing_is_left_after_the_fit(ends: str, tmp_path: Path, capture: SparseExpertCheckpoint) -> None:
    ours, links = OneRank(), []

    def keep(run: pl.Trainer) -> None:
        assert ours.link is not None
        assert ours.link.log.nbytes > 0
        links.append((weakref.ref(ours.link.log), run.optimizers[0]))

    callbacks: list[pl.Callback] = [ours, capture, At(2, keep)]
    run = trainer(tmp_path, *callbacks, *([At(3, fail)] if ends == "badly" else []))
    if ends == "badly":
        with pytest.raises(ZeroDivisionError):
            run.fit(module(), loader())
    else:
        run.fit(module(), loader())
    ((log, optimizer),) = links
    assert ours.link is None
    strategy = pipeline_of(run)
    assert strategy.link is None
    assert strategy.cut is not None
    assert type(strategy.cut.runner._traffic) is NetworkTraffic
    assert strategy.cut.gradients.exchange == strategy.cut.gradients._exchange
    assert len(optimizer._optimizer_step_pre_hooks) == 0
    left = log()
    assert left is None or left.nbytes == 0


def test_teardown_twice_and_without_setup_is_harmless(tmp_path: Path) -> None:
    ours = OneRank()
    run, net = trainer(tmp_path, ours), module()
    for _ in range(2):
        ours.teardown(run, net, "fit")
        ours.on_exception(run, net, ZeroDivisionError())
    assert ours.link is None
