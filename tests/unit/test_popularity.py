"""Token counts are exact whatever training does around them, and the reorder rule is the 10 % / 25 % rule."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from moetion_lightning.core.discovery import discover_layers
from moetion_lightning.core.layouts import MoELayer, MoESpec, Tap
from moetion_lightning.errors import ConfigurationError, OperatorError
from moetion_lightning.moe.routing.calibration import possible_forms
from moetion_lightning.moe.routing.counter import TokenCounter
from moetion_lightning.moe.routing.popularity import Popularity

HIDDEN, EXPERTS, TOP_K = 8, 4, 2


class Experts(nn.Module):
    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(num_experts, HIDDEN, HIDDEN))

    def forward(self, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        mask = F.one_hot(top_k_index, self.up.shape[0]).to(x.dtype) * top_k_weights[..., None]
        return torch.einsum("td,tke,edf->tf", x, mask, self.up)


class Block(nn.Module):
    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, num_experts, bias=False)
        self.experts = Experts(num_experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(TOP_K, dim=-1)
        return x + self.experts(x, ids, weights)


class Model(nn.Module):
    """Two MoE layers of different size; ``recompute`` is None, "reentrant" or "plain"."""

    def __init__(self, recompute: str | None = None) -> None:
        super().__init__()
        self.inp = nn.Linear(HIDDEN, HIDDEN)
        self.layers = nn.ModuleList([Block(EXPERTS), Block(EXPERTS + 2)])
        self.recompute = recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x)
        for layer in self.layers:
            if self.recompute is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.recompute == "reentrant")
        return x


def counted(model: nn.Module, specs: tuple[MoESpec, ...] = ()) -> TokenCounter:
    return TokenCounter(model, discover_layers(model, specs))


def test_counts_are_those_of_the_router() -> None:
    torch.manual_seed(0)
    model = Model()
    counter, x = counted(model), torch.randn(7, HIDDEN)
    model(x)
    hidden = model.inp(x)
    ids = model.layers[0].gate(hidden).topk(TOP_K, dim=-1).indices
    counts = counter.drain()
    assert counts.dtype == torch.int64
    assert counts.shape == (2, EXPERTS + 2)
    assert counts[0, :EXPERTS].tolist() == torch.bincount(ids.flatten(), minlength=EXPERTS).tolist()
    assert counts[0, EXPERTS:].tolist() == [0, 0]


def test_drain_starts_the_next_iteration_at_zero_and_counts_does_not() -> None:
    model = Model()
    counter = counted(model)
    model(torch.randn(3, HIDDEN))
    assert int(counter.counts.sum()) == int(counter.counts.sum()) == 12
    before = counter.drain()
    assert int(before.sum()) == 12
    assert int(counter.drain().sum()) == 0


@pytest.mark.parametrize("recompute", [None, "reentrant", "plain"])
def test_accumulation_adds_up_and_recomputation_does_not(recompute: str | None) -> None:
    model = Model(recompute)
    counter = counted(model)
    for tokens in (3, 5, 2):
        model(torch.randn(tokens, HIDDEN)).sum().backward()
    assert counter.drain().sum(dim=1).tolist() == [20, 20]


def test_evaluation_in_between_is_not_counted() -> None:
    model = Model()
    counter = counted(model)
    model(torch.randn(3, HIDDEN))
    model.eval()
    with torch.no_grad():
        model(torch.randn(50, HIDDEN))
    model.train()
    model(torch.randn(3, HIDDEN))
    assert counter.drain().sum(dim=1).tolist() == [12, 12]


@pytest.mark.parametrize("recompute", [None, "plain"])
def test_a_compiled_model_is_counted_without_graph_breaks(recompute: str | None) -> None:
    model = Model(recompute)
    counter = counted(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=recompute is None)
    for _ in range(3):
        compiled(torch.randn(5, HIDDEN)).sum().backward()
    assert counter.drain().sum(dim=1).tolist() == [30, 30]
    model.eval()
    compiled(torch.randn(5, HIDDEN))
    assert int(counter.drain().sum()) == 0
    torch._dynamo.reset()


class ListBlock(nn.Module):
    """No tap is known: calibrated by the calls of the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(HIDDEN, 40), nn.Linear(40, HIDDEN)) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(TOP_K, dim=-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(ids == i)
            out = out.index_add(0, token, expert(x[token]) * weights[token, slot, None])
        return out


def test_the_first_iteration_is_counted_exactly_also_with_calibration() -> None:
    model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), ListBlock())
    counter = counted(model)
    for tokens in (3, 4):
        checkpoint(model, torch.randn(tokens, HIDDEN), use_reentrant=False).sum().backward()
    assert counter.drain().sum().item() == 14
    assert [layer.tap.form for layer in counter.layers if layer.tap] == ["rows"]
    assert not counter.layers[0].candidate
    model(torch.randn(5, HIDDEN))
    assert counter.drain().sum().item() == 10


def test_calibration_works_inside_a_compiled_model() -> None:
    model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), ListBlock())
    counter = counted(model)
    compiled = torch.compile(model, backend="eager")
    totals = []
    for _ in range(3):
        compiled(torch.randn(6, HIDDEN)).sum().backward()
        totals.append(counter.drain().sum().item())
    assert totals == [12, 12, 12]
    torch._dynamo.reset()


def test_nothing_is_decided_before_training_ran() -> None:
    model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), ListBlock())
    counter = counted(model)
    model.eval()(torch.randn(3, HIDDEN))
    model.train()
    assert counter.drain().shape == (0, 0)
    assert len(counter.pending) == 1
    model(torch.randn(3, HIDDEN))
    assert counter.drain().shape == (1, EXPERTS)
    assert not counter.pending


def test_a_described_layer_without_a_countable_decision_stays(caplog: pytest.LogCaptureFixture) -> None:
    class Opaque(ListBlock):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum((F.linear(x, e[1].weight @ e[0].weight) for e in self.experts), x) * self.gate.weight.sum()

    model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), Opaque())
    counter = counted(model, (MoESpec(block=r".*\.Opaque"),))
    model(torch.randn(3, HIDDEN))
    with caplog.at_level(logging.WARNING):
        counter.settle()
    assert len(counter.layers) == 1
    assert int(counter.drain().sum()) == 0
    assert "give its MoESpec a tap" in caplog.text


def test_ids_beyond_the_experts_are_ignored() -> None:
    model = Model()
    counter = counted(model)
    experts = model.layers[1].experts
    ids = torch.tensor([[0, 6], [7, -1], [5, 2]])
    for hook in experts._forward_pre_hooks.values():
        hook(experts, (torch.zeros(3, HIDDEN), ids, torch.ones(3, 2)), {})
    assert counter.drain()[1].tolist() == [1, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("by_name", [False, True])
def test_ids_with_weight_zero_are_ignored_where_the_tap_says_so(by_name: bool) -> None:
    model = Model()
    spec = MoESpec(block=r".*\.Block", tap=Tap(site="experts", io="in", key=1, form="index", weights=2))
    counter = counted(model, (spec,))
    x, ids, weights = torch.zeros(2, HIDDEN), torch.tensor([[0, 1], [0, 2]]), torch.tensor([[0.0, 0.5], [0.5, 0.5]])
    if by_name:
        model.layers[0].experts(x, top_k_index=ids, top_k_weights=weights)
    else:
        model.layers[0].experts(x, ids, weights)
    assert counter.drain()[0].tolist() == [1, 1, 1, 0, 0, 0]


def test_a_value_that_does_not_fit_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    counter = counted(model, (MoESpec(block=r".*\.Block", tap=Tap(site="router", io="out", key=3, form="load")),))
    with caplog.at_level(logging.WARNING):
        model(torch.randn(3, HIDDEN))
        model(torch.randn(3, HIDDEN))
    assert int(counter.drain().sum()) == 0
    assert caplog.text.count("are not counted") == 2  # once a layer


def test_an_attribute_is_read_after_the_forward() -> None:
    class Tutel(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ids = self.gate(x).topk(TOP_K).indices
            self.dispatch_count = torch.bincount(ids.flatten(), minlength=EXPERTS)
            return super().forward(x)

    model = nn.Sequential(Tutel(EXPERTS))
    tap = Tap(site="block", io="attr", key="dispatch_count", form="load")
    counter = counted(model, (MoESpec(block=r".*\.Tutel", tap=tap),))
    model(torch.randn(3, HIDDEN))
    assert int(counter.drain().sum()) == 3 * TOP_K


def test_logits_are_counted_by_their_highest() -> None:
    model = Model()
    tap = Tap(site="router", io="out", form="logits", top_k=TOP_K)
    by_logits = counted(model, (MoESpec(block=r".*\.Block", tap=tap),))
    by_ids = counted(model)
    model(torch.randn(9, HIDDEN))
    assert torch.equal(by_logits.drain(), by_ids.drain())


def test_removed_hooks_count_nothing() -> None:
    model = Model()
    counter = counted(model)
    counter.remove()
    counter.remove()
    model(torch.randn(3, HIDDEN))
    assert int(counter.drain().sum()) == 0
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_dense_model_counts_nothing() -> None:
    assert TokenCounter(nn.Linear(2, 2), ()).drain().shape == (0, 0)


def test_a_tap_without_its_module_is_an_error() -> None:
    tap = Tap(site="router", io="out", form="mask")
    layer = MoELayer(name="x", num_experts=2, experts=((), ()), tap=tap)
    with pytest.raises(OperatorError, match="'x'.*router"):
        TokenCounter(Model(), [layer])


@pytest.mark.parametrize(
    ("value", "forms"),
    [
        (torch.tensor([[0, 1], [3, 2], [1, 0]]), ["index"]),
        (torch.tensor([[0, 0], [3, 2], [1, 0]]), []),  # a token goes to distinct experts
        (torch.tensor([[0, 1], [4, 2], [1, 0]]), []),
        (torch.tensor([0, 1, 3]), ["index"]),
        (torch.tensor([[True, False, True, False]] * 3), ["mask"]),
        (torch.tensor([[0, 1, 0, 0]] * 3), ["mask"]),
        (torch.tensor([[0.3, 0.0, 0.7, 0.0]] * 3), ["mask"]),
        (torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 3), ["logits"]),
        (torch.tensor([2, 0, 3, 1]), ["load"]),
        ([2, 0, 3, 1], ["load"]),
        (torch.tensor([2.0, 0.0, 3.0, 1.0]), ["load"]),
        (torch.tensor([0.2, 0.1, 0.3, 0.4]), []),
        (torch.eye(3)[:, None, :].expand(3, 4, 3) * torch.tensor([1.0, 0, 0, 0])[None, :, None], ["dispatch"]),
        (torch.randn(3, 8), []),
        (torch.arange(3), ["index"]),
        ("text", []),
        (None, []),
    ],
)  # fmt: skip
def test_the_form_of_a_value(value: object, forms: list[str]) -> None:
    assert possible_forms(value, num_experts=4, rows=3) == forms


def test_the_window_rolls() -> None:
    popularity = Popularity(num_iterations=2)
    for tokens in (100, 1, 2):
        popularity.update(torch.tensor([[tokens, 1]]))
    assert len(popularity) == 2
    assert popularity.tokens().tolist() == [[3, 2]]
    assert popularity.frequencies().tolist() == [[0.6, 0.4]]


@settings(max_examples=50, deadline=None)
@given(
    length=st.integers(1, 5),
    rows=st.lists(st.lists(st.integers(0, 2**40), min_size=3, max_size=3), min_size=0, max_size=12),
)
def test_the_window_is_the_sum_of_its_last_iterations(length: int, rows: list[list[int]]) -> None:
    popularity = Popularity(length)
    for row in rows:
        popularity.update(torch.tensor([row]))
    last = rows[-length:]
    assert popularity.tokens().flatten().tolist() == [sum(row[e] for row in last) for e in range(3) if rows]


def popularity_of(*rows: list[int], num_experts: list[int] | None = None) -> Popularity:
    popularity = Popularity(num_experts=num_experts)
    popularity.update(torch.tensor(rows))
    return popularity


def test_a_quarter_of_the_experts_must_change_by_more_than_a_tenth() -> None:
    reference = torch.full((1, 8), 0.125, dtype=torch.float64)
    assert not popularity_of([100] * 8).changed(reference)
    assert not popularity_of([109, 91, *[100] * 6]).changed(reference)  # two of eight, but 9 %
    assert popularity_of([111, 89, *[100] * 6]).changed(reference)
    assert not popularity_of([105, 105, 105, 105, 80, 100, 100, 100]).changed(reference)  # one of eight


def test_the_columns_beyond_a_smaller_layer_are_no_experts() -> None:
    rows = [[30, 10, 0, 0, 0, 0], [10] * 6]
    reference = torch.tensor([[0.5, 0.5, 0, 0, 0, 0], [1 / 6] * 6], dtype=torch.float64)
    assert popularity_of(*rows, num_experts=[2, 6]).changed(reference)  # 2 of 8
    assert not popularity_of(*rows).changed(reference)  # 2 of 12


def test_an_expert_that_was_never_used_changed_when_it_is() -> None:
    assert popularity_of([99, 1]).changed(torch.tensor([[1.0, 0.0]], dtype=torch.float64))


def test_no_order_yet_counts_as_changed() -> None:
    assert popularity_of([1, 2]).changed(torch.zeros(0, 0, dtype=torch.float64))


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least 1"):
        Popularity(0)
    popularity = popularity_of([1, 2])
    with pytest.raises(ConfigurationError, match=r"shape \(1, 3\)"):
        popularity.update(torch.zeros(1, 3))
    assert Popularity().frequencies().shape == (0, 0)
    assert Popularity().tokens().shape == (0, 0)
