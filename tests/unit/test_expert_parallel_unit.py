"""Layouts, refusals, and the two passes of a block, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn.utils import clip_grad

from moetion_lightning.core.grad_norm import GradNormSeam
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.recipes.models import MoELayer as ByteMoELayer
from moetion_lightning.strategies import ExpertLayout, MoEtionStrategy
from moetion_lightning.strategies.expert_dispatch import ListDispatch
from moetion_lightning.strategies.expert_gradients import ExpertGradients
from moetion_lightning.strategies.expert_layout import ExpertGroups
from moetion_lightning.strategies.expert_parallel import plan_layers
from moetion_lightning.strategies.optimizer_order import OptimizerOrder


class Block(nn.Module):
    """Noisy routing, a buffer that every training forward changes."""

    def __init__(self, num_experts: int = 4, width: int = 6) -> None:
        super().__init__()
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width)) for _ in range(num_experts)
        )
        self.register_buffer("load", torch.zeros(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x) + torch.randn(x.shape[0], len(self.experts)) - 0.1 * self.load
        ids = scores.argmax(-1)
        self.load += torch.bincount(ids, minlength=len(self.experts))
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (ids == index).nonzero().squeeze(-1)
            if rows.numel():
                out[rows] = expert(x[rows]) * scores[rows, index, None]
        return out


class Outer(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)


@pytest.fixture
def groups() -> Iterator[ExpertGroups]:
    """The groups of a job of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        groups = ExpertGroups(ExpertLayout(world_size=1, expert_parallel_size=1), 0, None)
        groups.build()
        yield groups
    finally:
        dist.destroy_process_group()


def test_layout_gives_every_expert_to_one_rank_of_each_group() -> None:
    for world, ep, num_experts in [(1, 1, 4), (4, 2, 8), (8, 4, 6), (6, 3, 3)]:
        layout = ExpertLayout(world_size=world, expert_parallel_size=ep)
        blocks = [layout.experts_at(position, num_experts) for position in range(ep)]
        assert [e for block in blocks for e in block] == list(range(num_experts))
        assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
        for rank in range(world):
            assert rank in layout.expert_ranks(rank)
            assert rank in layout.replica_ranks(rank)
            assert {layout.position(r) for r in layout.replica_ranks(rank)} == {layout.position(rank)}
            assert sorted(map(layout.position, layout.expert_ranks(rank))) == list(range(ep))


def test_expert_parallel_must_divide_the_ranks() -> None:
    with pytest.raises(ConfigurationError, match=r"expert_parallel_size=3.*divide the number of ranks, which is 4"):
        ExpertLayout(world_size=4, expert_parallel_size=3)


@pytest.mark.parametrize("value", [0, -1, True, "2"])
def test_expert_parallel_must_be_a_count(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="expert_parallel_size="):
        MoEtionStrategy(expert_parallel_size=value)


def test_importing_registers_the_strategy() -> None:
    from lightning.pytorch.strategies import StrategyRegistry

    assert StrategyRegistry["moetion"]["strategy"] is MoEtionStrategy
    assert isinstance(StrategyRegistry.get("moetion"), MoEtionStrategy)


def test_two_passes_equal_one(groups: ExpertGroups) -> None:
    torch.manual_seed(0)
    plain, spread = Block(), Block()
    spread.load_state_dict(plain.state_dict())
    ListDispatch("block", spread, list(spread.experts), [range(4)], groups)
    grads, outputs, draws = [], [], []
    for block in (plain, spread):
        torch.manual_seed(1)
        x = torch.randn(10, 6, generator=torch.Generator().manual_seed(2), requires_grad=True)
        out = block(block(x))
        out.square().sum().backward()
        outputs.append(out.detach())
        draws.append(torch.rand(3))
        grads.append([x.grad, *(p.grad for p in block.parameters())])
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(plain.load, spread.load)
    for expected, actual in zip(*grads):
        # The gradient of the input is summed over two passes in another order.
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_random_numbers_of_experts_are_drawn_once(groups: ExpertGroups) -> None:
    class Drawing(nn.Linear):
        drawn = torch.zeros(0)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0]:
                self.drawn = torch.rand(4)
            return super().forward(x)

    block = Block()
    block.experts = nn.ModuleList([Drawing(6, 6)])
    block.gate = nn.Linear(6, 1, bias=False)
    block.load = torch.zeros(1)
    ListDispatch("block", block, list(block.experts), [range(1)], groups)
    block(torch.randn(3, 6))
    assert block.experts[0].drawn.numel() == 4
    assert not torch.equal(block.experts[0].drawn, torch.rand(4))


def test_loss_scaling_is_refused() -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    strategy = MoEtionStrategy(expert_parallel_size=2, precision_plugin=plugin)
    with pytest.raises(ConfigurationError, match=r'precision="16-mixed".*Use precision="bf16-mixed"'):
        strategy._spread(LightningModule())


def test_second_pass_that_routes_otherwise_is_refused(groups: ExpertGroups) -> None:
    class Alternating(Block):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.experts[self.calls % 2](x)

    block = Alternating()
    ListDispatch("alternating", block, list(block.experts), [range(4)], groups)
    with pytest.raises(ConfigurationError, match=r"'alternating': its second pass called expert"):
        block(torch.randn(3, 6))


def test_expert_called_from_outside_its_block_is_refused(groups: ExpertGroups) -> None:
    block = Block()
    ListDispatch("block", block, list(block.experts), [range(4)], groups)
    with pytest.raises(ConfigurationError, match=r"expert 2 .* from outside its block"):
        block.experts[2](torch.randn(3, 6))


def test_block_that_changes_its_input_is_refused(groups: ExpertGroups) -> None:
    class InPlace(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(super().forward(x))

    block = InPlace()
    ListDispatch("block", block, list(block.experts), [range(4)], groups)
    with pytest.raises(ConfigurationError, match="changes its input in place"), torch.no_grad():
        block(torch.randn(3, 6))


def refusal(module: nn.Module, expert_parallel_size: int = 2) -> str:
    layout = ExpertLayout(world_size=expert_parallel_size, expert_parallel_size=expert_parallel_size)
    with pytest.raises(ConfigurationError) as caught:
        plan_layers(module, layout, 0)
    return str(caught.value)


def test_module_without_experts_is_refused_with_what_was_seen() -> None:
    message = refusal(Outer(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert "no MoE layer" in message
    assert "blocks (ModuleList)" in message
    assert "specs=" in message


def test_more_ranks_than_experts_are_refused() -> None:
    assert "has only 4 experts" in refusal(Outer(Block()), expert_parallel_size=5)


def test_tied_experts_are_refused() -> None:
    first, second = Block(), Block()
    second.experts[1][0].weight = first.experts[0][0].weight
    message = refusal(Outer(first, second))
    assert "are one parameter" in message
    assert "blocks.0.experts.0.0.weight" in message


def test_nested_layers_are_refused() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(6, 2, bias=False)
            self.experts = nn.ModuleList(Block() for _ in range(2))

    assert "nested" in refusal(Outer(Nested()))


def test_router_beside_the_experts_of_the_root_is_refused() -> None:
    assert "put them in a module of their own" in refusal(Block())


def test_fused_experts_of_another_signature_are_refused() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, 6, 12))
            self.down = nn.Parameter(torch.randn(4, 12, 6))

        def forward(self, x: Tensor, top_k_index: Tensor) -> Tensor:
            return x

    block = nn.Module()
    block.gate, block.experts = nn.Linear(6, 4, bias=False), Experts()
    message = refusal(Outer(block))
    assert "Experts.forward(x, top_k_index)" in message
    assert "ModelParallelStrategy" in message


def test_batch_normalization_in_experts_is_refused() -> None:
    block = Block()
    for expert in block.experts:
        expert.append(nn.BatchNorm1d(6))
    assert "batch normalization" in refusal(Outer(block))


def test_without_expert_parallelism_experts_that_are_modules_are_planned_and_others_left() -> None:
    layout = ExpertLayout(world_size=2, expert_parallel_size=1)
    (layer,) = plan_layers(Outer(ByteMoELayer(8, 16, 4, 2)), layout, 1)
    assert (layer.kind, layer.owned) == ("list", range(4))
    assert plan_layers(Outer(nn.Linear(4, 4)), layout, 0) == ()


def _order(optimizer: torch.optim.Optimizer, module: nn.Linear, placeholder: nn.Parameter) -> OptimizerOrder:
    """Knows two parameters, and one of another rank."""
    names = {id(module.weight): "weight", id(module.bias): "bias", id(placeholder): "elsewhere"}
    return OptimizerOrder(optimizer, names, lambda parameter: parameter is placeholder)


def test_optimizer_state_is_numbered_as_for_the_whole_module() -> None:
    module, placeholder = nn.Linear(2, 2), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([{"params": [placeholder, module.weight]}, {"params": [module.bias], "lr": 1.0}])
    order = _order(optimizer, module, placeholder)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
    module(torch.ones(2)).sum().backward()
    optimizer.step()
    entries = order.entries(optimizer.state_dict())
    assert set(entries) == {"weight", "bias"}
    entries["elsewhere"] = {"exp_avg": torch.ones(2)}
    whole = order.whole(optimizer.state_dict(), entries)
    assert [group["params"] for group in whole["param_groups"]] == [[0, 1], [2]]
    assert torch.equal(whole["state"][0]["exp_avg"], torch.ones(2))
    cut = order.cut(whole)
    assert cut["param_groups"] == optimizer.state_dict()["param_groups"]
    assert torch.equal(cut["state"][0]["exp_avg"], optimizer.state[module.weight]["exp_avg"])
    assert 2 not in cut["state"]


def test_optimizer_groups_that_changed_are_refused() -> None:
    module, placeholder = nn.Linear(2, 2), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([placeholder, module.weight])
    order = _order(optimizer, module, placeholder)
    optimizer.add_param_group({"params": [module.bias]})
    with pytest.raises(ConfigurationError, match=r"\[1, 1\] parameters, and had \[1\]"):
        order.entries(optimizer.state_dict())


def test_recorder_of_norms_is_told_the_norm_that_clips(groups: ExpertGroups, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, expert = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4))
    gradients = ExpertGradients({"expert": expert}, groups)
    # One rank that counts as two: what it gathers is its own part twice.
    layout = ExpertLayout(world_size=2, expert_parallel_size=2)
    monkeypatch.setattr(groups, "layout", layout)
    monkeypatch.setattr(dist, "all_gather", lambda parts, part, group: [p.copy_(part) for p in parts])
    shared.grad, expert.grad = torch.full((3,), 2.0), torch.full((4,), 1.0)
    original, seam = clip_grad._get_total_norm, GradNormSeam()
    seam.install()
    try:
        with gradients.global_norm():
            norm = nn.utils.clip_grad_norm_([shared, expert], 1.0)
    finally:
        seam.remove()
    assert clip_grad._get_total_norm is original
    expected = (3 * 4.0 + 2 * 4 * 1.0) ** 0.5
    assert float(norm) == pytest.approx(expected)
    assert [float(n) for n in seam.take()] == [float(norm)]
    assert shared.grad.tolist() == pytest.approx([2.0 / expected] * 3, rel=1e-5)


def test_state_that_is_no_plain_value_is_refused() -> None:
    from moetion_lightning.errors import UnsupportedStateError
    from moetion_lightning.strategies.optimizer_order import send_entries

    with pytest.raises(UnsupportedStateError, match="optimizer state 'history' of 'w' is a list"):
        send_entries({"w": {"history": [1, 2]}}, 0, torch.device("cpu"))
