"""``self.log`` in a step that runs as a pipeline: one value a batch, on every rank, with the options of the user."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import CatMetric, MeanMetric, Metric, SumMetric

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.strategies.step_logs import StepLogs


class Net(LightningModule):
    """Keeps what is logged for real."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()
        self.inner = nn.ModuleDict({"total": SumMetric()})
        self.every = CatMetric()
        self.logged: list[tuple[str, Any, dict[str, Any]]] = []

    def log(self, name: str, value: Any, **options: Any) -> None:  # type: ignore[override]
        self.logged.append((name, value, options))


@pytest.fixture
def net() -> Net:
    return Net()


def pass_on(logs: StepLogs, to: StepLogs | None = None, batch_size: int | None = 8) -> None:
    (to or logs).log(json.loads(json.dumps(logs.to_json())), batch_size)


def logged(net: Net, *values: Any, **options: Any) -> tuple[Tensor, dict[str, Any]]:
    """What is logged of a value that a step logs once for each micro-batch."""
    logs = StepLogs(net)
    with logs.standing_in(), logs.noting():
        for value in values:
            net.log("x", value, **options)
    pass_on(logs)
    ((name, value, given),) = net.logged
    assert name == "x"
    return value, given


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reduce_fx", "expected"),
    [
        ("mean", 2.5), ("sum", 10.0), ("min", 1.0), ("max", 4.0),
        (torch.mean, 2.5), (torch.sum, 10.0), (min, 1.0), (max, 4.0), (torch.max, 4.0),
    ],
)  # fmt: skip
def test_micro_batches_are_reduced_as_the_user_says(net: Net, reduce_fx: Any, expected: float) -> None:
    value, options = logged(net, *(torch.tensor(v) for v in (1.0, 4.0, 3.0, 2.0)), reduce_fx=reduce_fx)
    assert torch.equal(value, torch.tensor(expected))
    assert options["reduce_fx"] == (reduce_fx if isinstance(reduce_fx, str) else reduce_fx.__name__)


def test_the_mean_is_the_default(net: Net) -> None:
    value, options = logged(net, 1, 2.0)
    assert torch.equal(value, torch.tensor(1.5))
    assert options == {"batch_size": 8, "reduce_fx": "mean"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_keep_dtype_and_bits(net: Net, dtype: torch.dtype) -> None:
    parts = [torch.tensor(value, dtype=dtype) for value in (0.1, 1e-30, 7.3)]
    value, _ = logged(net, *parts)
    assert value.dtype == dtype
    assert torch.equal(value, torch.stack(parts).mean())


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float16, torch.bfloat16])
def test_counts_and_halves_are_reduced_in_the_default_dtype(net: Net, dtype: torch.dtype) -> None:
    """As Lightning does with what one process logs."""
    value, _ = logged(net, torch.tensor(0, dtype=dtype), torch.tensor(1, dtype=dtype), torch.tensor(0, dtype=dtype))
    assert value.dtype == torch.float32
    assert torch.equal(value, torch.tensor([0.0, 1.0, 0.0]).mean())


def test_numbers_have_the_default_dtype(net: Net) -> None:
    torch.set_default_dtype(torch.float64)  # as precision="64-true" does around a step
    try:
        value, _ = logged(net, 0.1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(value, torch.tensor(0.1, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(2,), (0,), (1, 3)])
def test_values_of_several_elements_are_refused(net: Net, shape: tuple[int, ...]) -> None:
    logs = StepLogs(net)
    with logs.standing_in(), logs.noting():
        with pytest.raises(ConfigurationError, match=r"self.log\('x', <tensor of shape .*>\).*one element"):
            net.log("x", torch.zeros(shape))


def test_one_element_of_any_shape_is_a_value(net: Net) -> None:
    value, _ = logged(net, torch.ones(1), torch.ones(1, 1), 1)
    assert torch.equal(value, torch.tensor(1.0))


@pytest.mark.parametrize("odd", [float("inf"), float("-inf"), float("nan")])
def test_values_that_are_not_finite_survive(net: Net, odd: float) -> None:
    value, _ = logged(net, torch.tensor(odd))
    assert torch.equal(value, torch.tensor(odd)) or (odd != odd and bool(value.isnan()))


def test_values_are_taken_when_they_are_logged(net: Net) -> None:
    running = torch.zeros(())
    logs = StepLogs(net)
    with logs.standing_in(), logs.noting():
        for _ in range(3):
            running += 1
            net.log("x", running)
    pass_on(logs)
    assert torch.equal(net.logged[0][1], torch.tensor(2.0))


def test_values_hold_no_graph(net: Net) -> None:
    weight = torch.ones((), requires_grad=True)
    value, _ = logged(net, weight * 2)
    assert not value.requires_grad


@pytest.mark.parametrize("wrong", [lambda values: values[0], torch.median, "last"])
def test_unknown_reductions_are_refused(net: Net, wrong: Any) -> None:
    logs = StepLogs(net)
    with logs.standing_in(), logs.noting():
        with pytest.raises(ConfigurationError, match=r"self.log\('loss', reduce_fx=...\).*'mean', 'sum', 'min', 'max'"):
            net.log("loss", 1.0, reduce_fx=wrong)


# --- options ---------------------------------------------------------------------------------------------------------


def test_options_of_the_user_are_kept(net: Net) -> None:
    options = {
        "prog_bar": True, "logger": False, "on_step": False, "on_epoch": True, "enable_graph": True, "sync_dist": True,
        "add_dataloader_idx": False, "rank_zero_only": True,
    }  # fmt: skip
    _, given = logged(net, 1.0, **options)
    assert given == {"batch_size": 8, "reduce_fx": "mean", **options}


def test_options_without_a_value_leave_the_defaults(net: Net) -> None:
    _, given = logged(net, 1.0, logger=None, on_step=None, batch_size=None, sync_dist_group=None)
    assert given == {"batch_size": 8, "reduce_fx": "mean"}


def test_batch_sizes_that_the_user_gives_for_micro_batches_add_up(net: Net) -> None:
    """They weigh batches against each other in the mean over an epoch."""
    logs = StepLogs(net)
    with logs.standing_in(), logs.noting():
        for size in (3, 3, 2):
            net.log("x", 1.0, batch_size=size)
    pass_on(logs)
    assert net.logged[0][2]["batch_size"] == 8


def test_positional_options_are_understood(net: Net) -> None:
    logs = StepLogs(net)
    with logs.standing_in(), logs.noting():
        for value in (1.0, 2.0):
            net.log("x", value, True, False, None, True, "sum", False, True)  # type: ignore[misc]
    pass_on(logs)
    ((_, found, options),) = net.logged
    assert torch.equal(found, torch.tensor(3.0))
    assert options == {
        "batch_size": 8, "reduce_fx": "sum", "prog_bar": True, "logger": False, "on_epoch": True, "enable_graph": False,
        "sync_dist": True,
    }  # fmt: skip


def test_dicts_of_values_and_metrics_are_logged_one_by_one(net: Net) -> None:
    logs = StepLogs(net)
    net.mean.update(3.0)
    with logs.standing_in(), logs.noting():
        for value in (1.0, 2.0):
            net.log_dict({"a": torch.tensor(value), "b": value, "m": net.mean}, on_epoch=True, reduce_fx="sum")
    pass_on(logs)
    assert [name for name, _, _ in net.logged] == ["a", "b", "m"]
    assert [float(value) for _, value, _ in net.logged[:2]] == [3.0, 3.0]
    assert all(options["on_epoch"] for _, _, options in net.logged)


def test_names_come_in_the_order_in_which_they_were_first_logged(net: Net) -> None:
    logs = StepLogs(net)
    with logs.standing_in(), logs.noting():
        for name in ("b", "a", "b", "c"):
            net.log(name, 1.0)
    pass_on(logs)
    assert [name for name, _, _ in net.logged] == ["b", "a", "c"]


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_are_logged_as_the_objects_of_each_rank(net: Net) -> None:
    """Another rank logs its own, empty one, with the value of the step."""
    other, logs = Net(), StepLogs(net)
    with logs.standing_in(), logs.noting():
        for value in (1.0, 3.0):
            net.mean(value)
            net.inner["total"].update(value)
            net.log("mean", net.mean, on_step=True)
            net.log("total", net.inner["total"])
    pass_on(logs, StepLogs(other))
    (_, mean, options), (_, total, more) = other.logged
    assert mean is other.mean
    assert torch.equal(mean._forward_cache, torch.tensor(3.0))
    assert mean.update_count == 0
    assert options["metric_attribute"] == "mean"
    assert options["on_step"]
    assert total is other.inner["total"]
    assert total._forward_cache is None
    assert more["metric_attribute"] == "inner.total"


def test_metrics_with_lists_are_refused(net: Net) -> None:
    logs = StepLogs(net)
    with logs.standing_in(), logs.noting(), pytest.raises(ConfigurationError) as raised:
        net.log("every", net.every)
    for part in ("self.log('every', CatMetric)", "gathers lists", "fixed-size state"):
        assert part in str(raised.value)


def test_metrics_that_other_ranks_do_not_have_are_refused(net: Net) -> None:
    logs, metric = StepLogs(net), MeanMetric()
    with logs.standing_in(), logs.noting():
        net.log("loss", metric)
    with pytest.raises(ConfigurationError, match=r"self.log\('loss', MeanMetric\(...\)\): assign the metric"):
        logs.to_json()


class Vector(Metric):
    """Computes more than a number."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("seen", torch.zeros(2), dist_reduce_fx="sum")

    def update(self, value: Tensor) -> None:
        self.seen += value

    def compute(self) -> Tensor:
        return self.seen


def test_values_of_a_step_are_passed_on_only_if_they_are_numbers(net: Net) -> None:
    net.vector = Vector()
    logs = StepLogs(net)
    net.vector(torch.ones(2))
    with logs.standing_in(), logs.noting():
        net.log("vector", net.vector)
    assert logs.to_json()[0][4] == ["vector", None]


# --- when it listens -------------------------------------------------------------------------------------------------


def test_nothing_is_logged_while_it_stands_in(net: Net) -> None:
    logs = StepLogs(net)
    with logs.standing_in():
        net.log("earlier stage", 1.0)
        with logs.noting():
            net.log("last stage", 1.0)
        net.log("earlier stage", 2.0)
        net.log("wrong, where nobody listens", object(), reduce_fx="median")
    assert net.logged == []
    assert [entry[0] for entry in logs.to_json()] == ["last stage"]


def test_the_module_logs_itself_again_afterwards_even_after_an_error(net: Net) -> None:
    logs = StepLogs(net)
    with pytest.raises(ZeroDivisionError), logs.standing_in(), logs.noting():
        raise ZeroDivisionError
    assert "log" not in vars(net)
    net.log("x", 1.0)
    assert net.logged == [("x", 1.0, {})]
    with logs.standing_in():
        net.log("x", 2.0)
    assert logs.to_json() == []


def test_each_step_begins_with_nothing(net: Net) -> None:
    logs = StepLogs(net)
    for name in ("a", "b"):
        with logs.standing_in(), logs.noting():
            net.log(name, 1.0)
        assert [entry[0] for entry in logs.to_json()] == [name]
    with logs.standing_in():
        pass
    pass_on(logs)
    assert net.logged == []
