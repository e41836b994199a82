"""Which layers there are, where to cut them, and parameters that are not there."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.pipeline import trace
from moetion_lightning.pipeline.balance import balance, check_bounds, layer_weights
from moetion_lightning.pipeline.hollow import hollow, is_hollow
from moetion_lightning.pipeline.intercept import Interceptor
from moetion_lightning.pipeline.layer_list import find_layers
from moetion_lightning.pipeline.probe import make_plan, measure_layers
from tests.runs.pipeline_models import WIDTH, Body, Decoder, Mixer, ids_of


def _heaviest(weights: list[int], bounds: tuple[int, ...]) -> int:
    return max(sum(weights[a:b]) for a, b in itertools.pairwise([*bounds, len(weights)]))


@settings(deadline=None, max_examples=60)
@given(weights=st.lists(st.integers(0, 20), min_size=1, max_size=8), data=st.data())
def test_heaviest_stage_is_as_light_as_possible(weights: list[int], data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, len(weights)))
    bounds = balance(weights, num_stages)
    assert check_bounds(bounds, len(weights), num_stages) == bounds
    every = ((0, *cut) for cut in itertools.combinations(range(1, len(weights)), num_stages - 1))
    assert _heaviest(weights, bounds) == min(_heaviest(weights, cut) for cut in every)


def test_ties_are_cut_evenly_and_early() -> None:
    assert balance([1] * 7, 3) == (0, 2, 4)
    assert balance([1] * 8, 3) == (0, 2, 5)
    assert balance([0, 0, 5, 0], 2) == (0, 1)
    assert balance([0.1] * 10, 5) == (0, 2, 4, 6, 8)


def test_many_layers_are_cut_quickly() -> None:
    assert len(balance([1 + index % 7 for index in range(160)], 16)) == 16


@pytest.mark.parametrize(("weights", "num_stages"), [([1, 1], 3), ([1], 0), ([1, -1], 1), ([1, float("nan")], 2)])
def test_impossible_balances_are_refused(weights: list[float], num_stages: int) -> None:
    with pytest.raises(ConfigurationError, match="balance"):
        balance(weights, num_stages)


@pytest.mark.parametrize("bounds", [(0,), (1, 2), (0, 0), (0, 4), (0, 2, 1)])
def test_wrong_bounds_are_refused(bounds: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match="ascending from 0 and below 4"):
        check_bounds(bounds, 4, 2)


def test_layer_weights_count_every_parameter_once() -> None:
    module = Decoder(tied=True)
    weights = layer_weights(module, find_layers(module))
    block = sum(p.numel() for p in module.blocks[0].parameters())
    assert weights == [block + module.embed.weight.numel() + module.position.numel(), block, block, block + 2 * WIDTH]
    assert sum(weights) == sum(p.numel() for p in module.parameters())


def test_seconds_are_measured_for_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count()

    class Slow(Mixer):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            for _ in range(10):
                next(now)
            return super().forward(hidden)

    monkeypatch.setattr(trace, "time", SimpleNamespace(perf_counter=lambda: float(next(now))))
    module = Body()
    module.layers[2] = Slow()
    interceptor = Interceptor(find_layers(module, "layers"))
    interceptor.install()
    ids = ids_of(6)[0]
    seconds = measure_layers(module, interceptor, lambda: module(ids), seed=0)
    assert seconds[:3] == [1.0, 1.0, 11.0]
    assert len(seconds) == 4
    assert seconds[3] < 11.0
    assert make_plan(module, interceptor, None, 3, lambda: module(ids), seed=0, timed=True).bounds == (0, 2, 3)
    assert make_plan(module, interceptor, (0, 1), 2, lambda: module(ids), seed=0).bounds == (0, 1)


# --- layers ----------------------------------------------------------------------------------------------------------


def _list(count: int, width: int = WIDTH) -> nn.ModuleList:
    return nn.ModuleList(Mixer(width) for _ in range(count))


class Tree(nn.Module):
    def __init__(self, **children: Any) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def _names(module: nn.Module, layers: Any = None) -> list[str]:
    found = find_layers(module, layers)
    assert all(module.get_submodule(name) is layer for name, layer in zip(found.names, found.modules))
    return list(found.names)


def test_largest_lists_are_found_in_order() -> None:
    encoder_decoder = Tree(shared=nn.Embedding(99, WIDTH), encoder=Tree(block=_list(2)), decoder=Tree(block=_list(3)))
    blocks = [f"encoder.block.{index}" for index in range(2)] + [f"decoder.block.{index}" for index in range(3)]
    assert _names(encoder_decoder) == blocks
    assert _names(Tree(body=_list(4, 32), heads=_list(3, 2))) == [f"body.{index}" for index in range(4)]
    assert _names(Tree(layers=nn.ModuleDict({"0": Mixer(), "1": Mixer()}))) == ["layers.0", "layers.1"]
    assert _names(Decoder(2)) == ["blocks.0", "blocks.1"]  # not the experts inside


def test_lists_of_two_kinds_are_layers_too() -> None:
    assert len(_names(Tree(layers=nn.ModuleList([Mixer(), nn.Linear(2, 2), Mixer(), nn.Linear(2, 2)])))) == 4


def test_plain_sequential_is_the_last_resort() -> None:
    assert _names(nn.Sequential(nn.Embedding(9, 4), nn.ReLU(), nn.Linear(4, 9))) == ["0", "1", "2"]
    blocks = nn.Sequential(*(Mixer(16) for _ in range(3)))
    net = nn.Sequential(nn.Linear(4, 16), blocks, nn.Linear(16, 2))
    assert _names(Tree(net=net)) == ["net.1.0", "net.1.1", "net.1.2"]


def test_named_lists_are_taken_as_they_are() -> None:
    tree = Tree(a=_list(2), b=_list(2), c=Mixer())
    assert _names(tree, "b") == ["b.0", "b.1"]
    assert _names(tree, ["b", "a", "c"]) == ["b.0", "b.1", "a.0", "a.1", "c"]


def test_declared_stages_are_submodules() -> None:
    class Declared(Tree):
        def configure_pipeline(self) -> Any:
            return self.stages()

        stages: Any

    tree = Declared(a=Mixer(), b=Tree(c=Mixer()))
    tree.stages = lambda: [tree.a, tree.b.c]
    assert _names(tree) == ["a", "b.c"]
    assert _names(tree, ["b.c", "a"]) == ["b.c", "a"]
    for wrong, match in (
        ([tree.a, Mixer()], "position 1.*no submodule"),
        (7, "expected a sequence"),
        ([tree.a, tree.a], "same module"),
        ([tree.b, tree.b.c], "lies inside"),
        ([], "no layer"),
    ):
        tree.stages = lambda wrong=wrong: wrong
        with pytest.raises(ConfigurationError, match=match):
            find_layers(tree)


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ("model.layers", "no submodule of that name.*'body'"),
        ("head", "is a Linear; expected a ModuleList.*'body'"),
        (["body", "body.1"], "same module"),
        (["body", "owner"], "lies inside"),
        ("empty", "no layer"),
    ],
)
def test_wrong_names_are_refused(layers: Any, match: str) -> None:
    tree = Tree(body=_list(3), head=nn.Linear(2, 2), empty=nn.ModuleList())
    tree.owner = Tree(inner=tree.body[0])
    with pytest.raises(ConfigurationError, match=match):
        find_layers(tree, layers)


def test_module_without_layers_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="configure_pipeline"):
        find_layers(nn.Linear(2, 2))


# --- hollow parameters -----------------------------------------------------------------------------------------------


def test_hollow_parameters_keep_their_form_and_take_no_memory() -> None:
    module = Body()
    kept = {name: p.clone() for name, p in module.named_parameters() if name.startswith("layers.")}
    forms = {name: (p.shape, p.dtype, p.requires_grad) for name, p in module.named_parameters()}
    module.head.requires_grad_(False)
    hollow(module, kept)
    for name, parameter in module.named_parameters():
        assert is_hollow(parameter) == (name not in kept)
        assert (parameter.shape, parameter.dtype) == forms[name][:2]
        if name in kept:
            assert torch.equal(parameter, kept[name])
        else:
            assert parameter.isnan().all()
            assert parameter.untyped_storage().nbytes() == parameter.element_size()
    assert not module.head.weight.requires_grad
    hollow(module, kept)


def test_gradient_of_a_hollow_parameter_is_an_error_even_after_a_move_or_thaw() -> None:
    module = Body()
    module.head.requires_grad_(False)
    hollow(module, [name for name, _ in module.named_parameters() if name != "head.weight"])
    module.to(torch.float64).to(torch.float32)
    module.head.requires_grad_(True)
    with pytest.raises(ConfigurationError, match=r"'head\.weight' received a gradient on a pipeline stage"):
        module(ids_of(6)[0]).backward()
    assert module.head.weight.grad is None


def test_hollow_refuses_unknown_names() -> None:
    with pytest.raises(ConfigurationError, match="'hed.weight'"):
        hollow(Body(), ["hed.weight"])
