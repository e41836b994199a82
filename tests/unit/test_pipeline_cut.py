"""An unchanged module cut into stages: bitwise the same losses and gradients as the whole module."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moetion_lightning.pipeline.intercept import Interceptor
from moetion_lightning.pipeline.layer_list import find_layers
from moetion_lightning.pipeline.probe import make_plan
from tests.runs.pipeline_models import (
    WIDTH,
    Block,
    Body,
    Decoder,
    Mixer,
    Stages,
    VirtualPipeline,
    check_equal,
    check_pipeline,
    ids_of,
    next_token_loss,
    plain_gradients,
    plain_step,
)

IDS = ids_of(6, 6, 6)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_decoder_with_auxiliary_loss_is_bitwise_equal(num_stages: int) -> None:
    plan = check_pipeline(Decoder(), num_stages).plan
    assert not plan.tied()
    if num_stages > 1:
        assert {side.leaf for side in plan.sides} == {1}
        assert all(len(boundary.crossings) == 1 for boundary in plan.boundaries)  # the mask is computed again
        assert "position" in plan.owned[0]
        assert "head.weight" in plan.owned[-1]
    assert plan.deterministic


def test_plan_made_inside_of_autocast_sees_what_each_stage_reads() -> None:
    class Reading(Body):
        def forward(self, ids: Tensor) -> Tensor:
            with torch.no_grad():
                weight = self.head(self.embed(ids)).float().mean()
            return super().forward(ids) * (2 + weight.tanh())

    module = Reading()
    interceptor = Interceptor(find_layers(module))
    interceptor.install()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = make_plan(module, interceptor, (0, 2), 2, lambda: module(IDS[0]), seed=1)
    assert plan.tied() == {"embed.weight": (0, 1)}


def test_every_rank_makes_the_same_plan() -> None:
    first = VirtualPipeline(Decoder(), plain_step, IDS[0], 2).plan
    torch.manual_seed(1)
    assert VirtualPipeline(Decoder(), plain_step, IDS[1], 2).plan.digest() == first.digest()
    assert VirtualPipeline(Decoder(), plain_step, IDS[0], 3).plan.digest() != first.digest()
    assert VirtualPipeline(Decoder(tied=True), plain_step, IDS[0], 2).plan.digest() != first.digest()


def test_sequences_of_other_lengths_need_no_new_plan() -> None:
    check_pipeline(Decoder(), batches=ids_of(6, 9, 4))


def test_tied_embedding_is_in_both_stages() -> None:
    plan = check_pipeline(Decoder(tied=True)).plan
    assert plan.tied() == {"embed.weight": (0, 2)}


def test_frozen_front_is_cut_like_a_trainable_one() -> None:
    module = Decoder()
    for part in (module.embed, module.blocks[0], module.blocks[1]):
        part.requires_grad_(False)
    module.position.requires_grad_(False)
    frozen = check_pipeline(module, 4).plan
    assert frozen.digest() == check_pipeline(Decoder(), 4).plan.digest()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_dropout_does_not_depend_on_the_number_of_stages(checkpointed: bool, reentrant: bool) -> None:
    class Checkpointed(Block):
        def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Any:
            if not checkpointed:
                return super().forward(hidden, mask)
            return checkpoint(super().forward, hidden, mask, use_reentrant=reentrant)

    module = Decoder(dropout=0.1)
    for block in module.blocks:
        block.__class__ = Checkpointed
    one, two, three = (VirtualPipeline(module, plain_step, IDS[0], n).train(IDS) for n in (1, 2, 3))
    check_equal(one, two)
    check_equal(one, three)
    other = VirtualPipeline(module, plain_step, IDS[0], 1, seed=12).train(IDS)
    assert not torch.equal(one[0][0], other[0][0])


def test_random_code_outside_of_layers_is_the_same_on_all_stages() -> None:
    class Noisy(Body):
        def middle(self, hidden: Tensor) -> Tensor:
            keep = torch.rand(WIDTH) + torch.from_numpy(np.random.rand(WIDTH)).float() + random.random()
            for layer in self.layers:
                hidden = layer(hidden) * keep + torch.rand(WIDTH)
            return F.dropout(hidden, 0.3)

    module = Noisy()
    one, three = (VirtualPipeline(module, plain_step, IDS[0], n).train(IDS) for n in (1, 3))
    check_equal(one, three)


def test_autocast_to_bfloat16_is_bitwise_equal() -> None:
    def step(module: nn.Module, batch: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(batch)

    module = Decoder()
    pipeline = VirtualPipeline(module, step, IDS[0], 3)
    check_equal(plain_gradients(module, step, IDS), pipeline.train(IDS))


def test_plain_sequential_is_cut_between_its_children() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Embedding(19, WIDTH), nn.Linear(WIDTH, 12), nn.ReLU(), nn.LayerNorm(12), nn.Linear(12, 19)
            )

        def forward(self, ids: Tensor) -> Tensor:
            return next_token_loss(self.net(ids), ids)

    plan = check_pipeline(Net(), 3).plan
    assert plan.layer_names == tuple(f"net.{index}" for index in range(5))


def test_residual_from_the_first_layer_crosses_every_boundary() -> None:
    class Layer(Mixer):
        def forward(self, hidden: Tensor, first: Tensor) -> Tensor:
            return super().forward(hidden) + 0.3 * first

    class Residual(Body):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(4))

        def middle(self, hidden: Tensor) -> Tensor:
            first = hidden
            for layer in self.layers:
                hidden = layer(hidden, first)
            return hidden

    plan = check_pipeline(Residual()).plan
    assert [len(boundary.crossings) for boundary in plan.boundaries] == [2, 2]
    assert not plan.tied()


def test_layers_may_change_their_input_in_place() -> None:
    class Layer(Mixer):
        def forward(self, hidden: Tensor) -> Tensor:
            hidden += torch.tanh(self.linear(hidden.clone()))
            return hidden

    class InPlace(Body):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(4))

    check_pipeline(InPlace())


def test_parameter_used_on_every_stage_is_tied() -> None:
    class Scaled(Body):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(WIDTH))

        def middle(self, hidden: Tensor) -> Tensor:
            for layer in self.layers:
                hidden = layer(hidden * self.scale)
            return hidden

    assert check_pipeline(Scaled(), 2).plan.tied() == {"scale": (0, 1)}


def test_glue_with_norms_outside_of_the_layers_is_exact_up_to_rounding(caplog: pytest.LogCaptureFixture) -> None:
    """The residual stream is no layer's output, so that the layers' outputs must cross instead.

    Its gradient is the sum over all layers that read it, in another order if it is put together on two stages: the
    gradients are compared up to rounding.
    """

    class Glued(Body):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))

        def middle(self, hidden: Tensor) -> Tensor:
            for norm, layer in zip(self.norms, self.layers):
                hidden = hidden + layer(norm(hidden))
            return hidden

    module = Glued()
    pipeline = VirtualPipeline(module, plain_step, IDS[0], 2, layers="layers", bounds=(0, 2))
    names = [name for name, _ in module.named_parameters()]
    check_equal(plain_gradients(module, plain_step, IDS), pipeline.train(IDS), names)
    assert [side.layer for side in pipeline.plan.sides] == [0, 1]
    assert pipeline.plan.tied() == {"embed.weight": (0, 1)}
    assert "every boundary carries it" in caplog.text


def test_declared_stages_pass_tuples_with_integers() -> None:
    plan = check_pipeline(Stages()).plan
    assert plan.layer_names == ("a", "b", "c")
    assert [[c.differentiable for c in b.crossings] for b in plan.boundaries] == [[True, False, False], [True, False]]


class AttributeLoss(Body):
    """Layers leave their auxiliary loss in an attribute of a submodule."""

    class Layer(Mixer):
        aux: Any = None

        def forward(self, hidden: Tensor) -> Tensor:
            self.aux = self.linear(hidden).pow(2).mean()
            return super().forward(hidden)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + 0.1 * sum(layer.aux for layer in self.layers)  # type: ignore[operator]


def test_auxiliary_losses_in_attributes_cross() -> None:
    pipeline = check_pipeline(AttributeLoss())
    assert [form.taps[0].name for form in pipeline.plan.forms] == [":aux"] * 4
    assert all("aux" not in layer.__dict__ for layer in pipeline.stages[2].module.layers[:3])


def test_parameter_read_without_gradient_is_kept_where_it_is_read() -> None:
    class Teacher(Body):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Sequential(nn.Embedding(19, WIDTH), nn.Linear(WIDTH, 19))

        def forward(self, ids: Tensor) -> Tensor:
            with torch.no_grad():
                target = self.teacher(ids).softmax(-1)
            logits = self.head(self.middle(self.embed(ids)))
            return F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1))

    plan = check_pipeline(Teacher(), 2, layers="layers").plan
    assert [name for name in plan.owned[1] if "teacher" in name] == [
        "teacher.0.weight",
        "teacher.1.weight",
        "teacher.1.bias",
    ]
    assert not [name for name in plan.owned[0] if "teacher" in name]


def test_parameter_trained_on_one_stage_and_read_on_another_is_held_by_both() -> None:
    class Reading(Body):
        def forward(self, ids: Tensor) -> Tensor:
            loss = super().forward(ids)
            return loss * (1 + self.embed.weight.detach().abs().mean())

    assert check_pipeline(Reading(), 2).plan.tied() == {"embed.weight": (0, 1)}


def test_unused_parameters_have_exactly_one_place() -> None:
    class Unused(Body):
        def __init__(self) -> None:
            super().__init__()
            self.nowhere = nn.Linear(2, 2)
            self.tail = nn.ModuleList([nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 1)])

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + self.tail[0].weight.mean() + self.tail[0].bias.mean()

    plan = VirtualPipeline(Unused(), plain_step, IDS[0], 2, layers="layers").plan
    assert "tail.1.weight" in plan.owned[1]  # beside its neighbour
    assert {"nowhere.weight", "nowhere.bias"} <= set(plan.owned[0])
    assert set().union(*plan.owned) == {name for name, _ in Unused().named_parameters()}


def test_result_may_hold_more_than_the_loss() -> None:
    class Logging(Decoder):
        def forward(self, ids: Tensor) -> Any:
            seen = []
            handles = [
                block.moe.gate.register_forward_hook(lambda m, a, out: seen.append(out)) for block in self.blocks
            ]
            try:
                return {"loss": super().forward(ids), "gate": torch.stack([s.detach().mean() for s in seen])}
            finally:
                for handle in handles:
                    handle.remove()

    plan = VirtualPipeline(Logging(), plain_step, IDS[0], 2).plan
    assert {side.tap for side in plan.sides} == {"", "moe.gate"}
