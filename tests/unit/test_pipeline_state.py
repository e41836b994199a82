"""State and gradients of spread stages, put together on one rank as one process has them."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetion_lightning.errors import ConfigurationError, UnsupportedStateError
from moetion_lightning.pipeline.hollow import hollow, is_hollow
from moetion_lightning.pipeline.layout import PipelineGroups, PipelineLayout
from moetion_lightning.strategies import averaging, optimizer_order
from moetion_lightning.strategies.averaging import average_gradients
from moetion_lightning.strategies.optimizer_order import OptimizerOrder
from moetion_lightning.strategies.pipeline_gradients import PipelineGradients
from moetion_lightning.strategies.pipeline_state import PipelineState
from tests.runs.pipeline_models import Decoder, VirtualPipeline, ids_of, plain_step

CPU = torch.device("cpu")
ADAMW: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}


class Normed(Decoder):
    """Buffers in the layers, around them, and none that another stage changes."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__(3, tied=tied)
        for index, block in enumerate(self.blocks):
            block.moe.register_buffer("load", torch.full((2,), float(index)))
        self.embed.register_buffer("seen", torch.tensor(7))
        self.norm.register_buffer("scale", torch.tensor(3.0))
        self.register_buffer("steps", torch.tensor(11))


class Rank:
    """One place of a pipeline: its module, of which only its stages are left, and an optimizer."""

    def __init__(self, whole: nn.Module, pipeline: VirtualPipeline, layout: PipelineLayout, rank: int) -> None:
        places: dict[str, list[int]] = {}
        for held_names in (pipeline.plan.owned, pipeline.plan.true_buffers):
            for stage, names in enumerate(held_names):
                for name in names:
                    held = places.setdefault(name, [])
                    held += [] if layout.owner(stage) in held else [layout.owner(stage)]
        self.module = copy.deepcopy(whole)
        self.groups = PipelineGroups(layout, rank, None)
        parameters = dict(whole.named_parameters())
        self.owned = [n for n, held in places.items() if n in parameters and layout.pp_rank(rank) in held]
        hollow(self.module, self.owned)
        self.state = PipelineState(self.module, places, self.groups, CPU)
        decay = [[p for p in self.module.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False)]
        self.optimizer = torch.optim.AdamW([{"params": decay[0]}, {"params": decay[1], "weight_decay": 0.0}], **ADAMW)
        self.order = self.state.order_of(self.optimizer)


LAYOUTS = [
    PipelineLayout(world_size=3, pipeline_parallel_size=3),
    PipelineLayout(world_size=6, pipeline_parallel_size=3),
    PipelineLayout(world_size=1, pipeline_parallel_size=1, chunks_per_rank=3),
]
CASES = [(layout, tied) for layout in LAYOUTS for tied in (False, True)]


def make_ranks(layout: PipelineLayout, *, tied: bool) -> tuple[nn.Module, list[Rank]]:
    torch.manual_seed(3)
    whole = Normed(tied=tied)
    pipeline = VirtualPipeline(whole, plain_step, ids_of(6)[0], layout.num_stages, layers="blocks")
    return whole, [Rank(whole, pipeline, layout, rank) for rank in range(layout.world_size)]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], deque[Any]]:
    """Messages by sender and receiver; whoever sends says so in ``lines.sender``."""
    waiting: Any = Lines()
    monkeypatch.setattr(
        optimizer_order, "send_message", lambda header, tensors, to, device: waiting.put(to, header, tensors)
    )
    monkeypatch.setattr(optimizer_order, "receive_message", lambda source, device, keep=None: waiting.get(source))
    found: dict[tuple[int, int], deque[Any]] = waiting
    return found


class Lines(dict[tuple[int, int], deque[Any]]):
    sender = 0

    def put(self, to: int, header: Any, tensors: Sequence[Tensor]) -> None:
        self.setdefault((self.sender, to), deque()).append((header, [tensor.clone() for tensor in tensors]))

    def get(self, source: int) -> Any:
        return self[source, 0].popleft()


def gathered(ranks: list[Rank], lines: Any, call: Any) -> list[Any]:
    """What each rank has after a collective call; rank 0 waits for the others, so it comes last."""
    found = {}
    for rank in reversed(range(len(ranks))):
        lines.sender = rank
        found[rank] = call(ranks[rank])
    assert not any(lines.values())
    return [found[rank] for rank in range(len(ranks))]


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "tied"), CASES)
def test_checkpoint_on_rank_zero_is_that_of_one_process(layout: PipelineLayout, tied: bool, lines: Any) -> None:
    whole, ranks = make_ranks(layout, tied=tied)
    states = gathered(ranks, lines, lambda rank: rank.state.gather(rank.module.state_dict()))
    expected = whole.state_dict()
    assert list(states[0]) == list(expected)
    assert all(torch.equal(states[0][name], value) for name, value in expected.items())
    for rank, state in zip(ranks[1:], states[1:]):
        assert all(is_hollow(p) == (n not in rank.owned) for n, p in rank.module.named_parameters())
        assert state.keys() == expected.keys()


@pytest.mark.parametrize(("layout", "tied"), CASES)
def test_one_place_that_has_it_speaks_for_each_entry(layout: PipelineLayout, tied: bool) -> None:
    whole, ranks = make_ranks(layout, tied=tied)
    pipeline = [ranks[rank] for rank in layout.pipeline_ranks(0)]
    for name in whole.state_dict():
        (speaker,) = [rank for rank in pipeline if rank.state._speaks_for(name)]
        assert speaker.state.local(name)
        assert any(rank.state.local(name) for rank in pipeline)
    for rank in pipeline:
        assert all(rank.state.local(name) for name in rank.owned)


def test_buffers_belong_to_the_stage_of_the_parameters_around_them() -> None:
    _, ranks = make_ranks(LAYOUTS[0], tied=False)
    local = [[n for n, _ in rank.module.named_buffers() if rank.state.local(n)] for rank in ranks]
    assert local == [
        ["steps", "embed.seen", "blocks.0.moe.load"],
        ["blocks.1.moe.load"],
        ["blocks.2.moe.load", "norm.scale"],
    ]


def test_buffers_that_the_step_changes_are_those_of_the_stage_where_it_does() -> None:
    class Counting(Normed):
        def forward(self, ids: Tensor) -> Tensor:
            loss = super().forward(ids)
            self.steps += loss.detach().isfinite()  # after the last layer
            return loss

    torch.manual_seed(3)
    whole = Counting()
    pipeline = VirtualPipeline(whole, plain_step, ids_of(6)[0], 3, layers="blocks")
    ranks = [Rank(whole, pipeline, LAYOUTS[0], rank) for rank in range(3)]
    assert [rank.state.local("steps") for rank in ranks] == [False, False, True]
    assert [rank.state._speaks_for("steps") for rank in ranks] == [False, False, True]


def test_every_rank_loads_all_buffers() -> None:
    """Any stage may read one that no stage changes."""
    whole, ranks = make_ranks(LAYOUTS[0], tied=False)
    state = {name: value + 1 for name, value in whole.state_dict().items()}
    for rank in ranks:
        rank.state.load(state, strict=True)
        assert all(torch.equal(buffer, state[name]) for name, buffer in rank.module.named_buffers())


def test_other_replicas_send_nothing(lines: Any) -> None:
    _, ranks = make_ranks(LAYOUTS[1], tied=False)
    for rank in ranks:
        if rank.groups.layout.dp_rank(rank.groups.global_rank):
            state = rank.module.state_dict()
            assert rank.state.gather(state) is state
    assert not lines


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_checkpoint_gives_each_rank_its_part(tied: bool) -> None:
    _, ranks = make_ranks(LAYOUTS[0], tied=tied)
    other = Normed(tied=tied)
    state = {name: value + 1 for name, value in other.state_dict().items()}
    for rank in ranks:
        rank.state.load(state, strict=True)
        for name, parameter in rank.module.named_parameters():
            assert is_hollow(parameter) == (name not in rank.owned)
            if name in rank.owned:
                assert torch.equal(parameter, state[name])
            else:
                assert parameter.isnan().all()
        assert all(torch.equal(b, state[n]) for n, b in rank.module.named_buffers() if rank.state.local(n))


def test_names_that_do_not_match_are_listed_unless_that_is_allowed() -> None:
    whole, ranks = make_ranks(LAYOUTS[0], tied=False)
    state = {**whole.state_dict(), "new": torch.ones(1)}
    del state["head.weight"]
    with pytest.raises(ConfigurationError) as raised:
        ranks[2].state.load(state, strict=True)
    for part in ("does not fit Normed", "missing ['head.weight']", "unexpected ['new']", "strict_loading = False"):
        assert part in str(raised.value)
    before = ranks[2].module.get_parameter("head.weight").clone()
    ranks[2].state.load({**state, "norm.weight": torch.full((8,), 5.0)}, strict=False)
    assert torch.equal(ranks[2].module.get_parameter("head.weight"), before)
    assert torch.equal(ranks[2].module.get_parameter("norm.weight"), torch.full((8,), 5.0))


# --- optimizers ------------------------------------------------------------------------------------------------------


def step(module: nn.Module, optimizer: torch.optim.Optimizer, names: Sequence[str] | None = None) -> None:
    for index, (name, parameter) in enumerate(module.named_parameters()):
        if names is None or name in names:
            parameter.grad = torch.full_like(parameter, 0.1 * (index + 1))
    optimizer.step()


@pytest.mark.parametrize(("layout", "tied"), CASES)
def test_optimizer_checkpoint_is_that_of_one_process_and_can_be_cut_again(
    layout: PipelineLayout, tied: bool, lines: Any
) -> None:
    whole, ranks = make_ranks(layout, tied=tied)
    decay = [[p for p in whole.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False)]
    optimizer = torch.optim.AdamW([{"params": decay[0]}, {"params": decay[1], "weight_decay": 0.0}], **ADAMW)
    step(whole, optimizer)
    for rank in ranks:
        step(rank.module, rank.optimizer, rank.owned)
    states = gathered(
        ranks, lines, lambda rank: rank.state.gather_optimizer(rank.optimizer, rank.optimizer.state_dict())
    )
    check_same(states[0], optimizer.state_dict())
    for rank in ranks:
        check_same(rank.order.cut(states[0]), rank.optimizer.state_dict())


def check_same(found: Any, expected: Any) -> None:
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for index, fields in expected["state"].items():
        assert found["state"][index].keys() == fields.keys()
        assert all(torch.equal(found["state"][index][key], value) for key, value in fields.items())


def test_names_that_the_user_gave_travel_with_the_groups() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.AdamW([{"params": list(module.named_parameters())}], **ADAMW)
    names = {id(p): n for n, p in module.named_parameters()}
    order = OptimizerOrder(optimizer, names, lambda p: names[id(p)].startswith("0."))
    assert optimizer.param_groups[0]["param_names"] == ["1.weight", "1.bias"]
    whole = order.whole(optimizer.state_dict(), {})
    assert whole["param_groups"][0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert whole["param_groups"][0]["params"] == [0, 1, 2, 3]
    assert order.cut(whole)["param_groups"][0]["param_names"] == ["1.weight", "1.bias"]


def test_groups_that_changed_and_other_modules_are_refused() -> None:
    _, ranks = make_ranks(LAYOUTS[0], tied=False)
    rank = ranks[1]
    rank.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(ConfigurationError, match="Give the optimizer all its groups in configure_optimizers"):
        rank.order.entries(rank.optimizer.state_dict())
    with pytest.raises(ConfigurationError, match="another module or another configure_optimizers"):
        rank.order.cut(rank.optimizer.state_dict())


def test_state_that_cannot_travel_is_named(lines: Any) -> None:
    with pytest.raises(UnsupportedStateError, match=r"optimizer state 'history' of 'a.weight' is a list"):
        optimizer_order.send_entries({"a.weight": {"history": [torch.ones(1)]}}, 0, CPU)
    lines.sender = 2
    given = {"a": {"t": torch.ones(2, dtype=torch.bfloat16), "none": None, "n": 3, "x": 0.1, "s": "é", "b": False}}
    optimizer_order.send_entries(given, 0, CPU)
    found = optimizer_order.receive_entries(2, CPU)
    assert torch.equal(found["a"].pop("t"), given["a"].pop("t"))  # type: ignore[arg-type]
    assert found == given


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.fixture
def groups() -> Iterator[PipelineGroups]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        groups = PipelineGroups(PipelineLayout(world_size=1, pipeline_parallel_size=1), 0, None)
        groups.build()
        yield groups
    finally:
        dist.destroy_process_group()


def with_gradients(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    torch.manual_seed(2)
    module = Decoder(2).to(dtype)
    for name, parameter in module.named_parameters():
        if "experts.3" not in name:
            parameter.grad = torch.randn_like(parameter)
    return module, dict(module.named_parameters())


def gradients_of(named: Mapping[str, nn.Parameter], groups: PipelineGroups) -> PipelineGradients:
    gradients = PipelineGradients(dict(reversed(named.items())), {}, groups)
    gradients.set_order(list(named))
    return gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_clipping_has_the_bits_of_one_process(dtype: torch.dtype, norm_type: float, groups: PipelineGroups) -> None:
    module, named = with_gradients(dtype)
    whole = copy.deepcopy(module)
    for parameter, original in zip(whole.parameters(), module.parameters()):
        parameter.grad = None if original.grad is None else original.grad.clone()
    gradients = gradients_of(named, groups)
    with gradients.global_norm():
        found = nn.utils.clip_grad_norm_(module.parameters(), 0.5, norm_type)
    expected = nn.utils.clip_grad_norm_(whole.parameters(), 0.5, norm_type)
    assert torch.equal(found, expected)
    assert torch.equal(gradients.norms[0], expected)
    for parameter, original in zip(module.parameters(), whole.parameters()):
        assert parameter.grad is original.grad is None or torch.equal(parameter.grad, original.grad)  # type: ignore[arg-type]


def test_norms_of_the_log_answer_first_and_the_seam_is_closed_after_an_error(groups: PipelineGroups) -> None:
    outer = nn.utils.clip_grad._get_total_norm
    module, named = with_gradients()
    gradients = gradients_of(named, groups)
    gradients.given = [8.0]
    with gradients.global_norm():
        assert torch.equal(nn.utils.clip_grad_norm_(module.parameters(), 1e9), torch.tensor(8.0))
        assert not torch.equal(nn.utils.clip_grad_norm_(module.parameters(), 1e9), torch.tensor(8.0))
    assert len(gradients.norms) == 2
    with pytest.raises(ZeroDivisionError), gradients.global_norm():
        raise ZeroDivisionError
    assert nn.utils.clip_grad._get_total_norm is outer
    assert gradients.norms == []


def test_shares_of_tied_parameters_are_added_in_the_order_of_places(groups: PipelineGroups) -> None:
    shares = [torch.tensor([value]) for value in (1e8, 1.0, -1e8)]  # another order gives another sum
    parameter, lone = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    gradients = PipelineGradients({"a": parameter, "b": lone}, {"a": (0, 1, 2), "elsewhere": (1, 2)}, groups)
    asked = []

    def exchange(name: str, own: Tensor) -> list[Tensor]:
        asked.append((name, own.clone()))
        return shares

    gradients.exchange = exchange
    gradients.reduce()
    assert [name for name, _ in asked] == ["a"]
    assert torch.equal(asked[0][1], torch.zeros(1))  # it was not used here
    assert torch.equal(parameter.grad, (shares[0] + shares[1]) + shares[2])  # type: ignore[arg-type]
    assert lone.grad is None
    assert torch.equal(shares[0], torch.tensor([1e8]))


def test_frozen_tied_parameters_get_no_gradient(groups: PipelineGroups) -> None:
    """With one, even of zeros, the optimizer would decay their weights."""
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    gradients = PipelineGradients({"a": frozen}, {"a": (0, 1)}, groups)
    gradients.exchange = lambda name, own: [own, own]
    gradients.reduce()
    assert frozen.grad is None


def test_stage_norm_counts_what_has_a_gradient(groups: PipelineGroups) -> None:
    named = {"a": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(1))}
    assert PipelineGradients(named, {}, groups).stage_norm() == 0.0
    named["a"].grad = torch.tensor([3.0, 4.0])
    assert PipelineGradients(named, {}, groups).stage_norm() == 5.0


def test_replicas_are_averaged_and_what_none_has_used_stays_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other replica is played by a sum: its gradients are twos, and it used the first parameter alone."""
    parameters = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad = torch.ones(2, 2).t()
    parameters[1].grad = torch.full((3,), 4.0)
    sent = []

    def all_reduce(flat: Tensor, group: Any) -> None:
        sent.append(flat.clone())
        flat += torch.tensor([2.0] * 4 + [0.0] * 4 + [1.0, 0.0, 0.0])

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    average_gradients(parameters, "group", 2)  # type: ignore[arg-type]
    assert torch.equal(sent[0], torch.tensor([1.0] * 4 + [4.0] * 3 + [0.0] + [1.0, 1.0, 0.0]))
    assert torch.equal(parameters[0].grad, torch.full((2, 2), 1.5))
    assert torch.equal(parameters[1].grad, torch.full((3,), 2.0))
    assert parameters[2].grad is None


def test_buckets_follow_from_the_parameters_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averaging, "_BUCKET_BYTES", 32)
    parameters = [
        nn.Parameter(torch.zeros(n, dtype=d))
        for n, d in [(4, torch.float32), (2, torch.float64), (5, torch.float32), (1, torch.float32)]
    ]
    buckets = list(averaging._buckets(parameters))
    assert [[p.numel() for p in bucket] for bucket in buckets] == [[4, 5], [1], [2]]
