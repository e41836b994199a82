"""Captures from a device on which copies run later: their order against training, their time, their failures."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from moetion_lightning.events import CaptureFinished, IterationFinished, ReplayFinished, WindowCommitted
from tests.runs.devices import Run, equal


def committed(run: Run) -> list[int]:
    return [event.last_iteration for event in run.of(WindowCommitted)]


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("pins", [True, False])
def test_restart_is_exact_though_copies_run_late(make_run: Callable[..., Run], window: int, pins: bool) -> None:
    run = make_run(window, delay=0.0005, pins=pins)
    run.interrupted()
    assert equal(run.fit(), run.twin())
    assert all(event.verified for event in run.of(ReplayFinished))
    assert len(run.fences) == 2
    assert [fence.pinned for fence in run.fences] == [0, 0], "what was registered is given back"


def test_replay_notices_a_device_that_does_not_order_training_behind_the_copies(make_run: Callable[..., Run]) -> None:
    run = make_run(delay=0.002, orders_training=False)
    run.interrupted()
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


class At(pl.Callback):
    """A user's hook that does something after an iteration has ended."""

    def __init__(self, step: int, what: Callable[[pl.LightningModule], None]) -> None:
        self.step, self.what = step, what

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.what(pl_module)


@torch.no_grad()
def clamp(net: pl.LightningModule) -> None:
    for parameter in net.parameters():
        parameter.clamp_(-0.05, 0.05)


def test_weights_that_change_while_their_copies_are_queued_give_the_window_up(make_run: Callable[..., Run]) -> None:
    run = make_run(window=1, delay=0.002)
    run.fit(At(5, clamp))
    assert 5 not in committed(run)
    assert {4, 6} <= set(committed(run))


def test_frozen_weight_that_changes_through_data_while_its_copy_is_queued_gives_the_window_up(
    make_run: Callable[..., Run],
) -> None:
    """No version counter tells of it, and its copy has not run yet: a restart would go on with the changed one."""
    gate = threading.Event()

    def change(net: pl.LightningModule) -> None:
        assert run.fences[-1].queued.wait(60)
        net.body.frozen.weight.data.mul_(1.5)
        gate.set()

    run = make_run(gates={0: gate})
    run.interrupted(At(1, change))
    assert 3 not in committed(run)
    assert committed(run), "the window after it is whole"
    assert equal(run.fit(), run.twin(At(1, lambda net: net.body.frozen.weight.data.mul_(1.5))))
    assert all(event.verified for event in run.of(ReplayFinished))


class Teacher(pl.Callback):
    """Moves a frozen weight after each step, as an averaged teacher is."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        frozen, weight = pl_module.body.frozen.weight, pl_module.body.embed.weight
        frozen.data.lerp_(weight.detach()[: frozen.shape[0]], 0.1)


def test_frozen_weight_that_moves_after_each_step_is_captured_in_each_window(make_run: Callable[..., Run]) -> None:
    run = make_run(window=1, delay=0.0005)
    run.interrupted(Teacher())
    assert committed(run) == list(range(1, 9))
    assert equal(run.fit(Teacher()), run.twin(Teacher()))
    assert all(event.verified for event in run.of(ReplayFinished))


def test_capture_without_memory_gives_the_window_up_and_training_goes_on(make_run: Callable[..., Run]) -> None:
    run = make_run(window=1, out_of_memory=[3])
    net = run.fit()
    assert 4 not in committed(run)
    assert {3, 5} <= set(committed(run))
    assert equal(net, run.twin())
