"""A rank that holds a part of the module: what others hold is neither captured, nor static, nor counted here."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import HashStore

from moetion_lightning.core.discovery import discover_layers
from moetion_lightning.core.generators import Generators
from moetion_lightning.core.operators import OperatorKind
from moetion_lightning.core.partition import build_operators
from moetion_lightning.core.state import LiveState
from moetion_lightning.distributed.control import StoreControl
from moetion_lightning.engine.ranks import Ranks
from moetion_lightning.engine.restore import parameter_table
from moetion_lightning.engine.run_state import capture_run_state
from moetion_lightning.errors import OperatorError
from moetion_lightning.events import EventBus
from moetion_lightning.moe.routing.counts import TokenCounts

EXPERTS, WIDTH = 4, 6


class Block(nn.Module):
    """One expert for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH)) for _ in range(EXPERTS)
        )

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).softmax(-1)
        chosen = scores.argmax(-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero().squeeze(-1)
            if rows.numel():
                out[rows] = expert(x[rows]) * scores[rows, index, None]
        return out


class Net(nn.Module):
    """Embedding, two MoE blocks, head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 10, bias=False)
        self.head.weight = self.embed.weight


def part(stage: int) -> tuple[Net, frozenset[str]]:
    """The module of one of two stages, and what it holds: a block, and a copy of the tied parameter."""
    torch.manual_seed(0)
    net = Net()
    held = {name for name, _ in net.named_parameters() if name.startswith((f"blocks.{stage}.", "embed."))}
    for name, parameter in net.named_parameters():
        if name not in held:
            owner = net.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], nn.Parameter(parameter.data.new_zeros(()).expand_as(parameter)))
    return net, frozenset(held)


def optimizer_of(net: Net, held: frozenset[str]) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for n, p in net.named_parameters() if n in held])


@pytest.mark.parametrize("stage", [0, 1])
def test_only_what_a_rank_holds_is_state(stage: int) -> None:
    net, held = part(stage)
    live = LiveState(net, [optimizer_of(net, held)], held=held)
    assert set(live.parameters) == set(live.trainable()) == held
    assert set(parameter_table(live.parameters)) == held
    tree, _ = capture_run_state(live, None, Generators(dict))
    assert tree["requires_grad"] == {"most": True, "others": []}
    assert [set(json.loads(group["parameters"])) for group in tree["groups"][0]] == [held]


def test_an_optimizer_with_a_placeholder_is_refused() -> None:
    net, held = part(0)
    with pytest.raises(OperatorError, match=r"updates the parameter 'blocks\.1\..*', which this rank does not hold"):
        LiveState(net, [torch.optim.AdamW(net.parameters())], held=held)


@pytest.mark.parametrize("stage", [0, 1])
def test_operators_and_static_parameters_are_those_of_this_rank(stage: int) -> None:
    net, held = part(stage)
    frozen = f"blocks.{stage}.gate.weight"
    net.get_parameter(frozen).requires_grad_(False)
    live = LiveState(net, [optimizer_of(net, held)], held=held)
    found = build_operators(
        net, discover_layers(net), trainable=live.trainable(), sliceable=live.is_elementwise, held=held
    )
    pieces = [piece.parameter for op in found.operators for piece in op.pieces]
    assert sorted(pieces) == sorted(held - {frozen})
    assert found.static == (frozen,)
    assert {op.layer for op in found.operators if op.kind is OperatorKind.EXPERT} == {f"blocks.{stage}"}


def test_operators_of_all_stages_together_are_those_of_the_whole_module() -> None:
    whole = Net()
    live = LiveState(whole, [torch.optim.AdamW(whole.parameters())])
    expected = build_operators(whole, discover_layers(whole), trainable=live.trainable(), sliceable=live.is_elementwise)
    names: list[str] = []
    for stage in (0, 1):
        net, held = part(stage)
        live = LiveState(net, [optimizer_of(net, held)], held=held)
        found = build_operators(
            net, discover_layers(net), trainable=live.trainable(), sliceable=live.is_elementwise, held=held
        )
        names += [op.name for op in found.operators]
    assert set(names) == {op.name for op in expected.operators}
    assert [name for name in set(names) if names.count(name) > 1] == ["embed/shared"]


def count_together(stand_in: bool) -> list[TokenCounts]:
    """Two stages train one iteration; each is the only one that runs its block."""
    store = HashStore()
    tokens = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(1))
    parts = [part(0), part(1)]  # not in the threads: they seed the global generator

    def run(stage: int) -> TokenCounts:
        ranks = Ranks(StoreControl(store, stage, 2, scope="job", timeout_seconds=20.0))
        net, held = parts[stage]
        counts = TokenCounts(net, discover_layers(net), EventBus(), held=held)
        for _ in range(2):
            net.blocks[stage](tokens * (1 + stage))
            if stand_in:
                net.blocks[1 - stage].gate(tokens)
            counts.end_iteration()
        counts.settle(ranks.agree)
        counts.add(ranks.sum("tokens", counts.counts()), 2)
        counts.close()
        return counts

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, (0, 1)))


@pytest.mark.parametrize("stand_in", [False, True])
def test_tokens_are_counted_where_the_layer_is_and_known_everywhere(stand_in: bool) -> None:
    counted = count_together(stand_in)
    for counts in counted:
        assert [layer.name for layer in counts.layers] == ["blocks.0", "blocks.1"]
        tokens = counts.popularity.tokens()
        assert tokens.sum(1).tolist() == [64, 64]
        for row, scale in ((0, 1), (1, 2)):
            net, _ = part(row)
            x = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(1)) * scale
            chosen = net.blocks[row].gate(x).argmax(-1)
            assert torch.equal(tokens[row], 2 * torch.bincount(chosen, minlength=EXPERTS))
    assert counted[0].state() == counted[1].state()


def test_a_layer_that_its_holders_reject_is_none_anywhere() -> None:
    """The structure of the second block looks like a mixture of experts, but all its modules see all tokens."""
    store = HashStore()
    parts = [part(0), part(1)]

    def run(stage: int) -> list[str]:
        ranks = Ranks(StoreControl(store, stage, 2, scope="job", timeout_seconds=20.0))
        net, held = parts[stage]
        counts = TokenCounts(net, discover_layers(net), EventBus(), held=held)
        x = torch.randn(8, WIDTH)
        if stage == 0:
            net.blocks[0](x)
        else:
            for expert in net.blocks[1].experts:
                x = expert(x)
        counts.end_iteration()
        changed = counts.settle(ranks.agree)
        counts.add(ranks.sum("tokens", counts.counts()), 2)
        counts.close()
        assert changed
        return [layer.name for layer in counts.layers]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, (0, 1))) == [["blocks.0"], ["blocks.0"]]


def test_what_a_replay_counted_is_forgotten() -> None:
    net, held = part(0)
    counts = TokenCounts(net, discover_layers(net), EventBus(), held=held)
    net.blocks[0](torch.randn(8, WIDTH))
    counts.forget()
    net.blocks[0](torch.randn(5, WIDTH))
    counts.end_iteration()

    def alone(topic: str, value: Any) -> list[Any]:
        return [value, [["blocks.1"], ["blocks.1"]]]

    counts.settle(alone)
    counts.add(counts.counts(), 1)
    counts.close()
    assert counts.popularity.tokens()[0].sum() == 5


@pytest.mark.parametrize("state", ["own", "none", "other"])
def test_counts_continue_those_of_a_window_with_the_same_layers(state: str) -> None:
    asked: list[str] = []

    def alone(topic: str, value: Any) -> list[Any]:
        asked.append(topic)
        return [value]

    def train(counts: TokenCounts, net: nn.Module) -> None:
        for block in net.blocks:
            block(torch.randn(8, WIDTH))
        counts.end_iteration()
        counts.settle(alone)
        counts.add(counts.counts(), 1)
        counts.close()

    net, _ = part(0)
    earlier = TokenCounts(net, discover_layers(net), EventBus())
    train(earlier, net)
    asked.clear()
    own = earlier.state()["routing"]
    later = TokenCounts(net, discover_layers(net), EventBus())
    later.load_state({"own": own, "none": {}, "other": {**own, "layers": ["elsewhere"]}}[state])
    train(later, net)
    # All ranks restore the same window: they ask each other together, or not at all.
    assert asked == (
        [] if state == "own" else ["layers"]
    )  # all ranks restore the same: they ask together, or not at all
    assert later.lost.total.tolist() == [16 if state == "own" else 8] * 2
    assert later.popularity.tokens().sum(1).tolist() == [8, 8]
