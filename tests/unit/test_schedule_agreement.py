"""All ranks plan windows of the same length at the same iterations, in the same order, whatever each of them saw."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch.distributed import HashStore

from moetion_lightning.core.discovery import discover_layers
from moetion_lightning.core.pace import Pace
from moetion_lightning.core.policy import PartialExpertsPolicy, Policy, SparsePolicy, WindowPlan
from moetion_lightning.core.state import LiveState
from moetion_lightning.distributed.control import StoreControl
from moetion_lightning.engine.planner import WindowPlanner
from moetion_lightning.engine.ranks import RankLayout, Ranks
from moetion_lightning.engine.shares import Shares
from moetion_lightning.events import EventBus
from moetion_lightning.moe.routing.counts import TokenCounts
from tests.runs.models import Body

WORLD, EXPERTS = 3, 6
Sharding = Literal["auto", "none"]


class RoomyTiers:
    """Memory enough, and no window yet."""

    capacity = SimpleNamespace(window_bytes=lambda shared_bytes: 1 << 30)

    def wants_to_persist(self) -> bool | None:
        return None

    def committed(self, newest: object) -> list[int]:
        return [1]

    def held(self, newest: object) -> list[int]:
        return []

    def uncopied(self) -> list[tuple[int, int]]:
        return []


class OneRank:
    """A model that trains on this rank's tokens, and what plans its windows."""

    def __init__(self, control: StoreControl, sharding: Sharding, *, counted: bool, policy: Policy) -> None:
        torch.manual_seed(0)
        self.rank = control.rank
        self.module = Body("list", width=8, num_experts=EXPERTS)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.01)
        self.live = LiveState(self.module, [self.optimizer])
        everyone = tuple(range(WORLD))
        holders = dict.fromkeys(self.live.parameters, everyone)
        ranks, bus = Ranks(control), EventBus()
        self.counts = TokenCounts(self.module, discover_layers(self.module, ()), bus, counted=counted)
        self.pace = Pace()
        self.planner = WindowPlanner(
            self.live, self.counts, RoomyTiers(), self.pace, {}, bus, lambda message: None, ranks,  # type: ignore[arg-type]
            Shares(ranks, holders, sharding, bus), RankLayout(holders=holders, counted=counted),
        )  # fmt: skip
        self.policy = policy
        self.iteration = 0

    def train(self, tokens: torch.Tensor, seconds: float = 1.0) -> None:
        self.optimizer.zero_grad()
        self.module(tokens).sum().backward()
        self.optimizer.step()
        self.counts.end_iteration()
        self.pace.iteration(seconds)
        self.iteration += 1

    def plan(self) -> WindowPlan:
        agreed = self.planner.agree(self.iteration, None, self.live.signature(), "", behind=False)
        return self.planner.plan(self.policy, self.iteration, None, agreed)


def job(
    sharding: Sharding = "auto",
    *,
    counted: Callable[[int], bool] = lambda rank: True,
    policy: Callable[[], Policy] = lambda: SparsePolicy(4, 32, 0.8),
) -> list[OneRank]:
    store = HashStore()
    return [
        OneRank(
            StoreControl(store, rank, WORLD, scope="job", timeout_seconds=20.0),
            sharding, counted=counted(rank), policy=policy(),
        )
        for rank in range(WORLD)
    ]  # fmt: skip


def plan_together(ranks: list[OneRank]) -> list[WindowPlan]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(OneRank.plan, ranks))


def train_skewed(ranks: list[OneRank], iterations: int = 3) -> None:
    """Each rank sees a few tokens only, others than the other ranks do."""
    for iteration in range(iterations):
        for rank in ranks:
            generator = torch.Generator().manual_seed(100 * rank.rank + iteration)
            tokens = torch.randint(10 * rank.rank, 10 * rank.rank + 4, (6 + 6 * rank.rank, 5), generator=generator)
            rank.train(tokens, seconds=1.0 + rank.rank)


def names(plan: WindowPlan) -> list[list[str]]:
    return [[op.name for op in slot.active] for slot in plan.slots]


@pytest.fixture
def closing() -> Any:
    opened: list[OneRank] = []
    yield opened
    for rank in opened:
        rank.counts.close()


def test_without_sharding_all_ranks_plan_the_same_slots(closing: list[OneRank]) -> None:
    ranks = job("none")
    closing += ranks
    train_skewed(ranks)
    own = [str(rank.counts._counter.drain()) for rank in ranks]  # nothing is left: all was handed over
    plans = plan_together(ranks)
    assert len(set(own)) == 1
    assert names(plans[0]) == names(plans[1]) == names(plans[2])
    assert len(plans[0].slots) == 4


def test_counts_are_the_sum_over_ranks_and_equal_everywhere(closing: list[OneRank]) -> None:
    ranks = job()
    closing += ranks
    train_skewed(ranks, iterations=2)
    plan_together(ranks)
    tokens = [rank.counts.lost.tokens for rank in ranks]
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])
    # Two experts for each of 6, 12 and 18 samples, twice.
    assert tokens[0].sum(dim=1).tolist() == [2 * 2 * (6 + 12 + 18)] * 2
    popularity = [str(rank.counts.popularity.tokens()) for rank in ranks]
    assert popularity[0] == popularity[1] == popularity[2]


def test_tokens_that_several_ranks_see_count_once(closing: list[OneRank]) -> None:
    """Tensor parallel ranks route the same tokens; the first one of them counts."""
    ranks = job(counted=lambda rank: rank == 0)
    closing += ranks
    for rank in ranks:
        rank.train(torch.arange(20).reshape(4, 5))
    plan_together(ranks)
    assert all(rank.counts.lost.tokens.sum(dim=1).tolist() == [2 * 4] * 2 for rank in ranks)


def test_sharded_plans_have_one_length_and_capture_everything_once(closing: list[OneRank]) -> None:
    ranks = job()
    closing += ranks
    train_skewed(ranks)
    plans = plan_together(ranks)
    assert {len(plan.slots) for plan in plans} == {4}
    pieces = [
        (piece.parameter, piece.start, piece.stop)
        for plan in plans
        for slot in plan.slots
        for op in slot.active
        for piece in op.pieces
    ]
    assert len(pieces) == len(set(pieces))
    assert {name for name, _, _ in pieces} == set(ranks[0].live.trainable())
    loads = [plan.schedule.dense_bytes for plan in plans if plan.schedule is not None]
    assert max(loads) <= 1.15 * sum(loads) / WORLD


def test_experts_come_in_the_order_of_all_ranks_tokens(closing: list[OneRank]) -> None:
    ranks = job("none")
    closing += ranks
    train_skewed(ranks)
    plan = plan_together(ranks)[1]
    counts = ranks[0].counts.lost.tokens
    layers = {layer.name: row for row, layer in enumerate(ranks[0].counts.layers)}
    order = [
        int(counts[layers[op.layer], op.expert])
        for slot in plan.slots
        for op in slot.active
        if op.layer is not None and op.expert is not None
    ]
    assert order == sorted(order)
    assert order[0] < order[-1]


def test_the_window_is_that_of_the_rank_that_needs_the_longest(closing: list[OneRank]) -> None:
    """With "auto": the ranks' iteration times and bandwidths differ, the length does not."""
    ranks = job(policy=lambda: SparsePolicy("auto", 16, 0.8))
    closing += ranks
    train_skewed(ranks)
    for rank in ranks:
        rank.planner._bandwidth = 1e3 * (1 + 100 * rank.rank)  # bytes a second
    plans = plan_together(ranks)
    lengths = {len(plan.slots) for plan in plans}
    assert len(lengths) == 1
    assert lengths.pop() > 1


def test_capturing_a_share_is_no_change_of_sizes(closing: list[OneRank]) -> None:
    """Other ranks capture the rest."""
    ranks = job()
    closing += ranks
    train_skewed(ranks)
    assert {bool(plan.changed) for plan in plan_together(ranks)} == {True}
    train_skewed(ranks, iterations=1)
    assert not any("size" in plan.changed for plan in plan_together(ranks))


def test_ranks_that_measure_other_costs_pause_together_and_take_one_window(closing: list[OneRank]) -> None:
    """One rank loses a tenth of each iteration to its captures, the others nothing."""
    ranks = job(policy=lambda: SparsePolicy("auto", 16, 0.8))
    closing += ranks
    for rank in ranks:
        rank.planner._bandwidth = 1e12
    train_skewed(ranks, iterations=2)
    lengths: list[int] = []
    left, slot = 0, None
    for _ in range(220):
        for rank in ranks:
            cost = 0.1 / (lengths[-1] if lengths else 1) if rank.rank == 1 and slot is not None else 0.0
            rank.iteration += 1
            rank.pace.iteration(1.0)
            assert isinstance(rank.policy, SparsePolicy)
            rank.policy.iteration(rank.iteration, 1.0 + cost, slot)
        begins = {rank.policy.begins(rank.iteration) for rank in ranks}
        assert len(begins) == 1, "all ranks pause, or none"
        if not left and begins == {True}:
            (length,) = {len(plan.slots) for plan in plan_together(ranks)}
            lengths.append(length)
            left = length
        slot = None if not left else lengths[-1] - left
        left = max(0, left - 1)
    assert lengths[0] <= 2
    assert lengths[-1] > 3, "what one rank has measured counts for all"


def test_a_change_of_popularity_is_seen_by_all_ranks_at_once(closing: list[OneRank]) -> None:
    ranks = job("none")
    closing += ranks
    train_skewed(ranks)
    plan_together(ranks)
    for _ in range(12):  # one rank's tokens change, and those alone
        for rank in ranks:
            rank.train(torch.full((30, 5), 31) if rank.rank == 2 else torch.zeros(2, 5, dtype=torch.int64))
    plans = plan_together(ranks)
    assert {plan.changed for plan in plans} == {"the experts' popularity changed"}
    assert names(plans[0]) == names(plans[1]) == names(plans[2])


@pytest.mark.parametrize("selection", ["sequential", "load_aware"])
def test_partial_experts_choose_the_same_experts(
    closing: list[OneRank], selection: Literal["sequential", "load_aware"]
) -> None:
    ranks = job(policy=lambda: PartialExpertsPolicy(2, selection))
    closing += ranks
    for _ in range(3):
        train_skewed(ranks, iterations=1)
        plans = plan_together(ranks)
        assert plans[0].experts == plans[1].experts == plans[2].experts
        states = [str(rank.counts.state()) for rank in ranks]
        assert states[0] == states[1] == states[2]
