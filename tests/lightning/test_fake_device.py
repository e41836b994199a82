"""Captures from a device on which copies run later: their order against training, their time, their failures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from moetion_lightning.callbacks import SparseExpertCheckpoint
from moetion_lightning.engine import facade
from moetion_lightning.events import CaptureFinished, Event, IterationFinished, ReplayFinished, WindowCommitted
from moetion_lightning.testing.fake_device import FakeDeviceFence
from tests.lightning.test_callbacks import StopAt, loader, module, trainer

pytestmark = pytest.mark.usefixtures("fresh_identities")


@pytest.fixture
def fresh_identities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETION_JOB_ID", "fake-device")


class Run:
    """One run with a fake device.

    Args:
        folder: For everything that it writes.
        memory_dir: Host memory.
        monkeypatch: Installs the device.
        window: Iterations of a window.
        **device: Of the device.
    """

    def __init__(
        self, folder: Path, memory_dir: Path, monkeypatch: pytest.MonkeyPatch, window: int = 3, **device: Any
    ) -> None:
        self.folder, self.memory_dir, self.window = folder, memory_dir, window
        self.events: list[Event] = []
        self.fences: list[FakeDeviceFence] = []

        def make(devices: Any) -> FakeDeviceFence:
            self.fences.append(FakeDeviceFence(**device))
            return self.fences[-1]

        monkeypatch.setattr(facade, "make_fence", make)

    def fit(self, *callbacks: pl.Callback, **settings: Any) -> pl.LightningModule:
        capture = SparseExpertCheckpoint(
            window=self.window, memory_dir=str(self.memory_dir), sinks=(self.events.append,), **settings
        )
        net = module(block="fused")
        trainer(self.folder, capture, *callbacks, max_epochs=2, gradient_clip_val=1.0).fit(net, loader())
        return net

    def close(self) -> None:
        for fence in self.fences:
            fence.close()

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if type(event) is kind]


@pytest.fixture
def make_run(tmp_path: Path, memory_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def make(window: int = 3, **device: Any) -> Run:
        runs.append(Run(tmp_path, memory_dir, monkeypatch, window, **device))
        return runs[-1]

    yield make
    for run in runs:
        run.close()


def twin(folder: Path) -> pl.LightningModule:
    net = module(block="fused")
    trainer(folder, max_epochs=2, gradient_clip_val=1.0).fit(net, loader())
    return net


def equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("pins", [True, False])
def test_restart_is_exact_though_copies_run_late(
    make_run: Callable[..., Run], tmp_path: Path, window: int, pins: bool
) -> None:
    run = make_run(window, delay=0.0005, pins=pins)
    with pytest.raises(ZeroDivisionError):
        run.fit(StopAt(9, ZeroDivisionError()))
    assert equal(run.fit(), twin(tmp_path))
    assert all(event.verified for event in run.of(ReplayFinished))
    assert len(run.fences) == 2
    assert [fence.pinned for fence in run.fences] == [0, 0], "what was registered is given back"


def test_replay_notices_a_device_that_does_not_order_training_behind_the_copies(make_run: Callable[..., Run]) -> None:
    run = make_run(delay=0.002, orders_training=False)
    with pytest.raises(ZeroDivisionError):
        run.fit(StopAt(9, ZeroDivisionError()))
    run.fit()
    # The copies have read what the next update left.
    assert [event.verified for event in run.of(ReplayFinished)] == [False]


def test_time_is_that_of_the_copies_and_the_wait_is_counted(make_run: Callable[..., Run]) -> None:
    run = make_run(delay=0.003)
    run.fit()
    captures = run.of(CaptureFinished)
    assert captures
    assert min(event.seconds for event in captures) >= 0.003 * 4, "of at least four tensors, one after the other"
    stalls = [event.stall_seconds for event in run.of(IterationFinished)][1:]
    assert sorted(stalls)[len(stalls) // 2] > 0.006, "the step waits for most of it"


class Clamp(pl.Callback):
    """A user's hook that changes weights after an iteration has ended."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.clamp_(-0.05, 0.05)


def test_weights_that_change_while_their_copies_are_queued_give_the_window_up(make_run: Callable[..., Run]) -> None:
    run = make_run(window=1, delay=0.002)
    run.fit(Clamp(5))
    committed = [event.last_iteration for event in run.of(WindowCommitted)]
    assert 5 not in committed
    assert {4, 6} <= set(committed)


def test_device_without_memory_for_a_copy_gives_the_window_up_and_training_goes_on(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = make_run(window=1, delay=0.0, out_of_memory=[3])
    net = run.fit()
    committed = [event.last_iteration for event in run.of(WindowCommitted)]
    assert 4 not in committed
    assert {3, 5} <= set(committed)
    assert equal(net, twin(tmp_path))
