"""Intercepted layers, runs of single stages, and steps that were not learnt."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import time
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.pipeline.intercept import Interceptor
from moetion_lightning.pipeline.layer_list import find_layers
from moetion_lightning.pipeline.probe import make_plan
from tests.runs.pipeline_models import (
    Body,
    Decoder,
    Mixer,
    Stages,
    VirtualPipeline,
    ids_of,
    plain_step,
)

IDS = ids_of(6, 6, 6)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _installed(module: nn.Module) -> Interceptor:
    interceptor = Interceptor(find_layers(module))
    interceptor.install()
    return interceptor


def test_installed_layers_look_copy_and_pickle_as_their_own_class() -> None:
    module = Body()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    interceptor = _installed(module)
    layer = module.layers[0]
    assert type(layer) is not Mixer
    assert isinstance(layer, Mixer)
    assert (type(layer).__name__, type(layer).__module__) == (Mixer.__name__, Mixer.__module__)
    copied = copy.deepcopy(module)
    assert type(copied.layers[0]) is Mixer
    buffer = io.BytesIO()
    pickle.dump(module, buffer)
    assert type(pickle.loads(buffer.getvalue()).layers[0]) is Mixer
    assert b"moetion_lightning.pipeline" not in buffer.getvalue()
    torch.save(module, saved := io.BytesIO())
    saved.seek(0)
    assert type(torch.load(saved, weights_only=False).layers[0]) is Mixer
    assert torch.equal(module(IDS[0]), copied(IDS[0]))
    interceptor.remove()
    assert {type(child) for child in module.layers} == {Mixer}
    assert vars(layer).keys() == vars(Mixer()).keys()
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_idle_interception_costs_little() -> None:
    """Loose, since other processes share the machine: the best of many repetitions is compared."""

    class Empty(nn.Module):
        def forward(self) -> None:
            return None

    plain, seen = nn.ModuleList([Empty()]), nn.ModuleList([Empty()])
    interceptor = Interceptor(find_layers(seen, [""]))
    interceptor.install()

    def best(layer: nn.Module) -> float:
        times = []
        for _ in range(50):
            start = time.perf_counter()
            for _ in range(100):
                layer()
            times.append((time.perf_counter() - start) / 100)
        return min(times)

    assert best(seen[0]) - best(plain[0]) < 5e-6


def test_a_second_interceptor_is_refused() -> None:
    module = Body()
    interceptor = _installed(module)
    with pytest.raises(ConfigurationError, match="intercepted already"):
        Interceptor(find_layers(module)).install()
    interceptor.remove()
    interceptor.remove()
    _installed(module).remove()


def test_run_needs_an_installed_interceptor_and_the_plan_s_payload() -> None:
    module = Body()
    interceptor = _installed(module)
    plan = make_plan(module, interceptor, None, 2, lambda: module(IDS[0]), seed=1)
    with pytest.raises(ConfigurationError, match="stage 1 was given 0 tensors; the plan expects 1"):
        interceptor.run(plan, 1, lambda: module(IDS[0]), seed=1)
    with pytest.raises(ConfigurationError, match="specs of 0 layers; expected those of all 2"):
        interceptor.run(plan, 1, lambda: module(IDS[0]), received=[torch.zeros(1)], seed=1)
    with pytest.raises(ConfigurationError, match="stage 2 of a plan of 2"):
        interceptor.run(plan, 2, lambda: module(IDS[0]), seed=1)
    interceptor.remove()
    with pytest.raises(ConfigurationError, match="before install"):
        interceptor.run(plan, 0, lambda: module(IDS[0]), seed=1)


def test_classes_that_register_their_subclasses_see_none() -> None:
    class Registered(Mixer):
        seen: list[type] = []  # noqa: RUF012

        def __init_subclass__(cls) -> None:
            Registered.seen.append(cls)

    class Layer(Registered):
        pass

    module = Body()
    module.layers = nn.ModuleList(Layer() for _ in range(3))
    _installed(module).remove()
    assert Registered.seen == [Layer]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_runs_without_gradient_give_the_same_loss(mode: Any) -> None:
    module = Decoder()
    pipeline = VirtualPipeline(module, plain_step, IDS[0], 2)
    with mode():
        expected = module(IDS[1])
        first, second = pipeline.stages
        sent = first.interceptor.run(pipeline.plan, 0, lambda: first.module(IDS[1]), seed=1)
        done = second.interceptor.run(
            pipeline.plan, 1, lambda: second.module(IDS[1]), received=sent.payload, stubs=sent.layer_specs, seed=1
        )
        assert torch.equal(done.result, expected)
        assert not any(spec.requires_grad for spec in sent.payload_specs)


def test_payload_survives_what_a_schedule_does_to_it() -> None:
    """Schedules detach outputs in place; a view or a leaf would fail there."""

    class Views(Body):
        def middle(self, hidden: Tensor) -> Tensor:
            for layer in self.layers:
                hidden = layer(hidden.transpose(0, 1)).transpose(0, 1)
            return hidden

    pipeline = VirtualPipeline(Views(), plain_step, IDS[0], 2)
    stage = pipeline.stages[0]
    run = stage.interceptor.run(pipeline.plan, 0, lambda: stage.module(IDS[0]), seed=1)
    assert all(tensor.requires_grad and not tensor.is_leaf for tensor in run.payload)
    for tensor in run.payload:
        tensor.detach_()


def test_cut_runs_keep_nothing_alive() -> None:
    module = Body()
    pipeline = VirtualPipeline(module, plain_step, IDS[0], 2)
    stage = pipeline.stages[0]
    kept: list[Any] = []

    def call() -> Any:
        hidden = stage.module.embed(IDS[0])
        kept.append(weakref.ref(hidden))
        return stage.module.head(stage.module.middle(hidden))

    gc.collect()
    gc.disable()
    try:
        run = stage.interceptor.run(pipeline.plan, 0, call, seed=1)
        del run
        assert kept[0]() is None
    finally:
        gc.enable()


def test_other_steps_run_forward_only_without_having_been_learnt() -> None:
    def predict(module: Any, ids: Tensor) -> Any:
        hidden = module.embed(ids) + module.position[: ids.shape[1]]
        balances = []
        for block in module.blocks:
            hidden, balance = block(hidden, (ids != 0).float())
            balances.append(balance)
        return {"logits": module.head(module.norm(hidden)), "balances": torch.stack(balances)}

    module = Decoder().eval()
    pipeline = VirtualPipeline(module, plain_step, IDS[0], 3)
    expected, found = predict(module, IDS[1]), pipeline.evaluate(predict, IDS[1])
    assert torch.equal(expected["logits"], found["logits"])
    assert torch.equal(expected["balances"], found["balances"])
    assert not found["logits"].requires_grad


def test_evaluation_that_reads_hidden_states_of_earlier_stages_is_loud() -> None:
    def features(module: Any, ids: Tensor) -> Tensor:
        hidden, seen = module.embed(ids), []
        for layer in module.layers:
            hidden = layer(hidden)
            seen.append(hidden)
        return seen[0]

    pipeline = VirtualPipeline(Body(), plain_step, IDS[0], 2)
    assert pipeline.evaluate(features, IDS[0]).isnan().all()


def test_evaluation_message_is_checked() -> None:
    pipeline = VirtualPipeline(Stages(), plain_step, IDS[0], 3)
    first, second = pipeline.stages[:2]
    message = first.interceptor.run_eval(pipeline.plan, 0, lambda: first.module(IDS[0]))
    header = {**message.header, "num_leaves": 5}
    with pytest.raises(ConfigurationError, match="called with 3 arguments.*called with 5"):
        second.interceptor.run_eval(
            pipeline.plan, 1, lambda: second.module(IDS[0]), type(message)(header, message.tensors)
        )
    with pytest.raises(ConfigurationError, match="given no message"):
        second.interceptor.run_eval(pipeline.plan, 1, lambda: second.module(IDS[0]))
    assert torch.equal(pipeline.evaluate(plain_step, IDS[1]), second.module.__class__.forward(_whole(pipeline), IDS[1]))


def _whole(pipeline: VirtualPipeline) -> nn.Module:
    """The whole module again, from its stages."""
    whole = copy.deepcopy(pipeline.stages[0].module)
    state: dict[str, Tensor] = {}
    for stage, names in zip(pipeline.stages, pipeline.plan.owned):
        parameters = dict(stage.module.named_parameters())
        state.update({name: parameters[name].detach() for name in names})
    for name, parameter in whole.named_parameters():
        parameter.data = state[name]
    return whole
