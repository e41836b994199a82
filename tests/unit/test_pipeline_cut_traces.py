"""Making a plan and running stages leave no trace in the module."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import CatMetric, MeanMetric

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.pipeline.intercept import Interceptor
from moetion_lightning.pipeline.layer_list import find_layers
from moetion_lightning.pipeline.probe import make_plan, measure_layers
from tests.runs.pipeline_models import (
    WIDTH,
    Body,
    Decoder,
    ReadsLayer,
    VirtualPipeline,
    check_pipeline,
    ids_of,
    plain_step,
)

IDS = ids_of(6, 6, 6)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Traces(Decoder):
    """Changes everything that a step may change in a module."""

    def __init__(self) -> None:
        super().__init__(dropout=0.1)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.batch_norm = nn.BatchNorm1d(WIDTH)
        self.history: list[Tensor] = []
        self.counts = {"calls": 0, "nested": [1]}
        self.last: Tensor | None = None
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, ids: Tensor) -> Tensor:
        self.steps += 1
        self.scratch = self.scratch + 1
        self.counts["calls"] += 1  # type: ignore[operator]
        self.counts["nested"].append(2)  # type: ignore[union-attr]
        self.history.append(torch.rand(1, generator=self.generator))
        random.random(), np.random.rand(), torch.rand(1)
        loss = super().forward(ids)
        self.last = loss
        return loss + self.batch_norm(self.embed(ids).flatten(0, 1)).mean()


def test_making_a_plan_leaves_no_trace() -> None:
    module = Traces()
    module.blocks[0].requires_grad_(False)
    module.head.weight.grad = torch.ones_like(module.head.weight)
    gradient = module.head.weight.grad
    stepped: list[Tensor] = []
    module.norm.weight.register_post_accumulate_grad_hook(stepped.append)
    before = copy.deepcopy(module.state_dict())
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    interceptor = Interceptor(find_layers(module))
    interceptor.install()
    addresses = {name: p.data_ptr() for name, p in module.named_parameters()}
    make_plan(module, interceptor, None, 3, lambda: module(IDS[0]), seed=1)
    measure_layers(module, interceptor, lambda: module(IDS[0]), seed=1)
    interceptor.remove()
    after = module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not module.scratch.any()
    assert addresses == {name: p.data_ptr() for name, p in module.named_parameters()}
    assert flags == {name: p.requires_grad for name, p in module.named_parameters()}
    assert module.head.weight.grad is gradient
    assert [name for name, p in module.named_parameters() if p.grad is not None] == ["head.weight"]
    assert (module.history, module.counts, module.last) == ([], {"calls": 0, "nested": [1]}, None)
    assert not stepped
    module(IDS[0]).backward()
    assert len(stepped) == 1


def test_random_number_generators_are_not_moved() -> None:
    module = Traces()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False), module.generator.get_state()
    pipeline = VirtualPipeline(module, plain_step, IDS[0], 2)
    now = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False), module.generator.get_state()
    assert torch.equal(before[0], now[0])
    assert before[1] == now[1]
    assert np.array_equal(before[2]["state"]["key"], now[2]["state"]["key"])
    assert before[2]["state"]["pos"] == now[2]["state"]["pos"]
    assert torch.equal(before[3], now[3])
    pipeline.train(IDS)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_metrics_inside_of_the_module_keep_their_states() -> None:
    class Measured(Body):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.every = MeanMetric(), CatMetric()

        def forward(self, ids: Tensor) -> Tensor:
            loss = super().forward(ids)
            self.mean.update(loss.detach())
            self.every(loss.detach())
            return loss

    module = Measured()
    first = module(IDS[0])
    VirtualPipeline(module, plain_step, IDS[1], 2, layers="layers")
    assert torch.equal(module.mean.compute(), first)
    assert torch.equal(module.every.compute().reshape(()), first)


def test_junk_never_reaches_buffers() -> None:
    class Normed(Body):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(5))

        def middle(self, hidden: Tensor) -> Tensor:
            hidden = self.norms[4](hidden.transpose(1, 2)).transpose(1, 2)
            for layer, norm in zip(self.layers, self.norms):
                hidden = norm(layer(hidden).transpose(1, 2)).transpose(1, 2)
            return hidden

    module = Normed()
    pipeline = check_pipeline(module, 3, layers="layers")
    reference = copy.deepcopy(module)
    for ids in IDS:
        reference(ids)
    expected = dict(reference.named_buffers())
    untouched = dict(module.named_buffers())
    for stage, names in zip(pipeline.stages, pipeline.plan.true_buffers):
        for name, buffer in stage.module.named_buffers():
            assert torch.equal(buffer, expected[name] if name in names else untouched[name]), name
    assert set().union(*pipeline.plan.true_buffers) == expected.keys()


def test_parameters_changed_in_the_forward_are_refused() -> None:
    class Changing(Body):
        def forward(self, ids: Tensor) -> Tensor:
            with torch.no_grad():
                self.head.bias.add_(1)
            return super().forward(ids)

    with pytest.raises(ConfigurationError, match=r"changed parameter 'head\.bias' in place"):
        VirtualPipeline(Changing(), plain_step, IDS[0], 2)


def test_step_that_never_repeats_is_cut_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    class Clock(Body):
        calls = 0

        def middle(self, hidden: Tensor) -> Tensor:
            Clock.calls += 1
            return super().middle(hidden * (1 + 1e-6 * Clock.calls))

    plan = VirtualPipeline(Clock(), plain_step, IDS[0], 2).plan
    assert not plan.deterministic
    assert "cannot be verified bitwise" in caplog.text
    Clock.calls = 0
    with pytest.raises(ConfigurationError, match="intermediate hidden states"):
        VirtualPipeline(type("ClockedReader", (Clock, ReadsLayer), {})(), plain_step, IDS[0], 2)
