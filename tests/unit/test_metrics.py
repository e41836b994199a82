"""The metrics against their definitions, and by the conventions of torchmetrics."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.metrics import (
    CheckpointStall,
    EffectiveTrainingTimeRatio,
    ExpertLoad,
    ExpertLoadImbalance,
    ProportionOfLostTokens,
    functional,
)
from moetion_lightning.moe.routing.lost_tokens import LostTokens

COUNTS = torch.tensor([[3, 1, 0, 4], [5, 5, 0, 0]])

MAKE: dict[str, Callable[..., Metric]] = {
    "ettr": EffectiveTrainingTimeRatio,
    "stall": CheckpointStall,
    "load": lambda **kwargs: ExpertLoad([4, 2], **kwargs),
    "imbalance": lambda **kwargs: ExpertLoadImbalance([4, 2], **kwargs),
    "plt": lambda **kwargs: ProportionOfLostTokens(2, **kwargs),
}
FEED: dict[str, tuple[tuple[Any, ...], ...]] = {
    "ettr": ((3.0, 4.0), (1.5, 4.0)),
    "stall": ((0.25, 1.0), (0.5, 2.0, 3)),
    "load": ((COUNTS,), (COUNTS * 2**40,)),
    "imbalance": ((COUNTS,), (COUNTS * 2**40,)),
    "plt": ((torch.tensor([1, 2]), torch.tensor([10, 10])), (None, torch.tensor([2**40, 2**40]))),
}


def fed(name: str, **kwargs: Any) -> Metric:
    metric = MAKE[name](**kwargs)
    for arguments in FEED[name]:
        metric.update(*arguments)
    return metric


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    return torch.equal(first, second)


@pytest.mark.parametrize("module", ["functional", "effective_time", "checkpoint_stall", "expert_load", "lost_tokens"])
def test_examples_in_docstrings_are_true(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"moetion_lightning.metrics.{module}"))
    assert result.attempted > 0
    assert result.failed == 0


def test_ratio_is_useful_time_over_wall_time() -> None:
    assert float(fed("ettr").compute()) == 4.5 / 8.0
    assert float(EffectiveTrainingTimeRatio()(0.0, 0.0)) == 0.0


def test_stall_is_a_mean_over_iterations_and_a_share_of_their_time() -> None:
    value = fed("stall").compute()
    assert float(value["seconds_per_iteration"]) == 0.75 / 4
    assert float(value["share"]) == 0.75 / 3.0


def test_load_is_a_share_of_the_layer_and_imbalance_max_over_mean() -> None:
    metric = ExpertLoad([4, 2])
    metric.update(COUNTS)
    assert torch.equal(
        metric.compute(), torch.tensor([[3 / 8, 1 / 8, 0, 4 / 8], [0.5, 0.5, 0, 0]], dtype=torch.float64)
    )
    imbalance = ExpertLoadImbalance([4, 2])
    imbalance.update(COUNTS)
    assert imbalance.compute().tolist() == [4 / 2, 1.0]
    assert functional.expert_load_imbalance(COUNTS[0]).item() == 2.0


def test_proportion_of_lost_tokens_is_that_of_the_engine() -> None:
    engine, metric = LostTokens(2, 4), ProportionOfLostTokens(2)
    for step in range(6):
        tokens = torch.randint(0, 50, (2, 4), generator=torch.Generator().manual_seed(step))
        engine.count(tokens)
        metric.update(total=tokens.sum(1))
        engine.saved(step % 2, step % 4)
        if step % 3 == 2:
            before = engine.lost.clone()
            engine.restored()
            metric.update(lost=engine.lost - before)
        assert float(metric.compute()) == engine.plt
    assert engine.plt > 0


def test_layers_without_tokens_do_not_count() -> None:
    assert float(functional.proportion_of_lost_tokens(torch.tensor([1, 0]), torch.tensor([4, 0]))) == 0.25
    assert float(functional.proportion_of_lost_tokens(torch.tensor([0]), torch.tensor([0]))) == 0.0


@pytest.mark.parametrize("name", MAKE)
def test_ranks_add_up(name: str) -> None:
    """Each state of two ranks with the same sums is gathered as two equal tensors."""
    together = fed(name, dist_sync_fn=lambda value, group: [value, value], distributed_available_fn=lambda: True)
    twice = fed(name)
    for arguments in FEED[name]:
        twice.update(*arguments)
    assert equal(together.compute(), twice.compute())
    assert equal(together.state_dict(), fed(name).state_dict())  # of this rank alone again


@pytest.mark.parametrize("name", MAKE)
def test_states_survive_a_restart_exactly(name: str) -> None:
    before, after = fed(name), MAKE[name]()
    assert before.state_dict()
    after.load_state_dict(before.state_dict())
    assert equal(after.state_dict(), before.state_dict())
    before.update(*FEED[name][0])
    after.update(*FEED[name][0])
    assert equal(after.compute(), before.compute())


@pytest.mark.parametrize("name", MAKE)
def test_conventions(name: str) -> None:
    metric = fed(name)
    assert metric.is_differentiable is False
    assert metric.full_state_update is False
    assert all(isinstance(default, Tensor) for default in metric._defaults.values())
    batch = MAKE[name]()
    values = [batch(*arguments) for arguments in FEED[name]]  # forward: the value of the batch, added to the sums
    assert len(values) == 2
    assert equal(batch.compute(), metric.compute())
    batch.reset()
    assert all(not state.any() for state in batch.state_dict().values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EffectiveTrainingTimeRatio().update(-1.0, 2.0), r"useful_seconds=-1.0\): expected >= 0"),
        (lambda: CheckpointStall().update(0.1, -2.0), "iteration_seconds=-2.0"),
        (lambda: ExpertLoad(0), r"ExpertLoad\(num_experts=0\): expected a number >= 1"),
        (lambda: ExpertLoad([]), r"num_experts=\[\]"),
        (lambda: ExpertLoad(4).update(torch.zeros(4)), r"torch.float32 \(4,\)\): expected integers \(4,\)"),
        (lambda: ExpertLoadImbalance([4, 2]).update(COUNTS[0]), r"expected integers \(2, 4\)"),
        (lambda: ProportionOfLostTokens(0), "num_layers=0"),
        (lambda: ProportionOfLostTokens(2).update(lost=torch.tensor([1])), r"lost of torch.int64 \(1,\)"),
    ],
)
def test_wrong_values_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        call()


@pytest.mark.parametrize("name", MAKE)
def test_plots(name: str) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(ModuleNotFoundError, match="matplotlib"):
            fed(name).plot()
        return
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("agg")
    figure, axis = fed(name).plot()
    assert axis.has_data()
    figure.clear()
    if name != "load":  # a map has no course
        metric = MAKE[name]()
        _, axis = metric.plot([metric(*arguments) for arguments in FEED[name]])
        assert axis.has_data()
