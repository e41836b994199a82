"""What a survivor does when an attempt fails: begin anew after a loss, and end where no loss can be heard of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from moetion_lightning.callbacks._elastic import Elastic
from moetion_lightning.callbacks._loop_seam import LoopSeam
from moetion_lightning.errors import RankLostError


class Member:
    """Hears of these losses, one after the other."""

    def __init__(self, *heard: tuple[int, ...] | Exception) -> None:
        self.heard = list(heard)
        self.generation = 0

    def lost(self, seconds: float = 0.0) -> tuple[int, ...]:
        next_ = self.heard.pop(0)
        if isinstance(next_, Exception):
            raise next_
        return next_

    def advance(self) -> int:
        self.generation += 1
        return self.generation


def attempt(member: Member, *errors: Exception) -> int:
    """How often the work is tried that fails with these errors first."""
    control = SimpleNamespace(rank=0)
    groups: Any = SimpleNamespace(membership=member, control=lambda: control)
    left, tries = list(errors), 0

    def work() -> None:
        nonlocal tries
        tries += 1
        if left:
            raise left.pop(0)

    ranks: Any = SimpleNamespace(control=control)
    nobody: Any = SimpleNamespace()
    Elastic(SimpleNamespace(), groups, ranks, lambda: False, lambda: None, nobody).attempt(work)
    return tries


def test_losses_begin_the_attempt_anew() -> None:
    member = Member((2,), (1,))
    assert attempt(member, RankLostError("rank 2"), RuntimeError("Connection closed by peer")) == 3
    assert member.generation == 2


def test_an_error_without_a_loss_is_raised() -> None:
    with pytest.raises(ValueError, match="mine"):
        attempt(Member(()), ValueError("mine"))


def test_a_store_that_is_gone_ends_the_process_instead_of_a_livelock() -> None:
    member = Member(RankLostError("the store does not answer"))
    with pytest.raises(RankLostError, match="the store does not answer"):
        attempt(member, *[RankLostError("the store does not answer")] * 100)
    assert member.generation == 0


def test_validation_that_a_loss_broke_off_leaves_nothing_in_the_means_of_the_next_one() -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    results = trainer.fit_loop.epoch_loop.val_loop._results
    loops = LoopSeam(trainer)
    loops.checkpoints = SimpleNamespace(restore_in_place=lambda checkpoint: None)  # type: ignore[assignment]
    for value in (8.0, 2.0):
        results.log("validation_step", "loss", torch.tensor(value), on_step=False, on_epoch=True, batch_size=1)
        if value == 8.0:
            loops.restore_in_place({})
    assert results.metrics(on_step=False)["callback"]["loss"] == 2.0
