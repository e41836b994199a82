"""An optimizer that draws in its step is seen at that step, whatever it draws from."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from moetion_lightning.core.state import LiveState
from moetion_lightning.gradient_log.watch import DrawWatch

OF_THE_FILE = np.random.default_rng(0)


class Noisy(torch.optim.Optimizer):
    """Draws in its second step."""

    def __init__(self, parameters: Any, draw: Callable[[Any], Any]) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.torch, self.numpy, self.held = torch.Generator(), np.random.default_rng(1), {"here": random.Random(1)}
        self.draw, self.count = draw, 0

    def step(self, closure: Any = None) -> None:
        self.count += 1
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["step"] = self.count
        if self.count == 2:
            self.draw(self)


@pytest.mark.parametrize(
    ("draw", "seen"),
    [
        (lambda it: torch.randn(1, generator=it.torch), True),
        (lambda it: it.numpy.random(), True),
        (lambda it: it.held["here"].random(), True),
        (lambda it: OF_THE_FILE.random(), True),
        (lambda it: torch.randn(1), True),
        (lambda it: None, False),
    ],
    ids=["torch", "numpy", "in a container", "of the file", "the global one", "none"],
)
def test_a_draw_in_any_step_is_seen(draw: Any, seen: bool) -> None:
    module = nn.Linear(2, 2)
    optimizer = Noisy(module.parameters(), draw)
    watch = DrawWatch(LiveState(module, [optimizer]))
    found = []
    for _ in range(3):
        watch.begin(0)
        optimizer.step()
        watch.end(0)
        found.append(watch.names)
    assert found == [[], ["Noisy"] * seen, ["Noisy"] * seen]


def test_what_is_drawn_between_steps_is_no_matter() -> None:
    module = nn.Linear(2, 2)
    watch = DrawWatch(LiveState(module, [torch.optim.SGD(module.parameters())]))
    for _ in range(2):
        torch.rand(1)
        watch.begin(0)
        watch.end(0)
    assert watch.names == []
