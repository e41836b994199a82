"""Every operator is captured by exactly one of the ranks that hold it, and the ranks' shares are of equal size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pytest
from torch.distributed import HashStore

from moetion_lightning.core.operators import Operator, OperatorKind, Piece
from moetion_lightning.core.policy import Sizes
from moetion_lightning.distributed.control import StoreControl
from moetion_lightning.engine.ranks import Ranks
from moetion_lightning.engine.shares import Shares
from moetion_lightning.events import CaptureShared, Event, EventBus

Holders = Mapping[str, tuple[int, ...]]


def make_sizes(nbytes: Mapping[str, int]) -> Sizes:
    return Sizes(
        full=nbytes,
        compute={name: size // 3 for name, size in nbytes.items()},
        rows=dict.fromkeys(nbytes, 1),
        sliceable=dict.fromkeys(nbytes, True),
    )


def operators_of(names: Mapping[str, int]) -> tuple[Operator, ...]:
    return tuple(Operator(name=n, kind=OperatorKind.SHARED, pieces=(Piece(parameter=n),)) for n in names)


@dataclasses.dataclass
class Rank:
    """One rank's state, and what it was dealt."""

    nbytes: dict[str, int]
    holders: Holders
    method: Literal["auto", "equal", "adaptive", "none"] = "auto"
    operators: tuple[Operator, ...] | None = None
    events: list[Event] = dataclasses.field(default_factory=list)
    shares: Shares | None = None

    def open(self, control: StoreControl) -> None:
        self.ranks = Ranks(control)
        self.shares = Shares(self.ranks, self.holders, self.method, EventBus((self.events.append,)))

    def settle(self) -> None:
        """As the planner does at the beginning of a window."""
        assert self.shares is not None
        operators = operators_of(self.nbytes) if self.operators is None else self.operators
        sizes = make_sizes(self.nbytes)
        facts = {**FACTS, "digest": self.shares.digest(operators, sizes)}
        agreed = self.ranks.agree_on_window(facts)
        self.shares.settle(operators, sizes, agreed.digest, uniform=agreed.uniform)

    @property
    def mine(self) -> list[str]:
        assert self.shares is not None
        return [op.name for op in self.shares.mine]

    @property
    def needs(self) -> tuple[int, ...]:
        assert self.shares is not None
        return self.shares.ranks


FACTS: dict[str, Any] = {
    "iteration": 1, "iteration_seconds": 1.0, "bytes_per_second": 1.0, "capacity_bytes": 1, "committed": [], "held": [],
    "uncopied": [], "behind": False, "persist": None, "dense": "",
}  # fmt: skip


def deal(ranks: list[Rank]) -> None:
    store = HashStore()
    for rank, each in enumerate(ranks):
        each.open(StoreControl(store, rank, len(ranks), scope="job", timeout_seconds=20.0))
    settle(ranks)


def settle(ranks: list[Rank]) -> None:
    on_all(ranks, Rank.settle)


def on_all(ranks: list[Rank], work: Callable[[Rank], Any]) -> None:
    with ThreadPoolExecutor(len(ranks)) as pool:
        list(pool.map(work, ranks))


MODEL = {f"layers.{i}.{part}": size for i in range(6) for part, size in (("a", 700), ("b", 300), ("gate", 40))}


def replicated(world: int, **more: Any) -> list[Rank]:
    everyone = tuple(range(world))
    return [Rank(dict(MODEL), dict.fromkeys(MODEL, everyone), **more) for _ in range(world)]


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("method", ["auto", "equal", "adaptive"])
def test_replicated_state_is_captured_once(world: int, method: Literal["auto", "equal", "adaptive"]) -> None:
    ranks = replicated(world, method=method)
    deal(ranks)
    assert sorted(name for rank in ranks for name in rank.mine) == sorted(MODEL)
    assert all(rank.needs == tuple(range(world)) for rank in ranks)
    shared = [event for rank in ranks for event in rank.events]
    assert len(shared) == world
    assert len(set(map(str, shared))) == 1
    assert isinstance(shared[0], CaptureShared)
    assert shared[0].bottleneck_before == sum(MODEL.values())
    assert shared[0].bottleneck_after == max(sum(MODEL[name] for name in rank.mine) for rank in ranks)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_replicated_state_is_dealt_out_evenly(world: int) -> None:
    ranks = replicated(world)
    deal(ranks)
    loads = [sum(MODEL[name] for name in rank.mine) for rank in ranks]
    assert max(loads) <= 1.15 * sum(loads) / world


def test_a_rank_keeps_the_order_of_its_operators() -> None:
    ranks = replicated(3, method="adaptive")
    deal(ranks)
    order = list(MODEL)
    assert all(rank.mine == sorted(rank.mine, key=order.index) for rank in ranks)


def test_without_sharding_everybody_captures_everything() -> None:
    ranks = replicated(3, method="none")
    deal(ranks)
    assert all(rank.mine == list(MODEL) for rank in ranks)
    assert [rank.needs for rank in ranks] == [(0,), (1,), (2,)]
    assert not any(rank.events for rank in ranks)


def test_state_that_one_rank_holds_stays_with_it() -> None:
    names = {"a": 5, "b": 7}
    ranks = [Rank(dict(names), {n: (rank,) for n in names}) for rank in range(3)]
    deal(ranks)
    assert all(rank.mine == ["a", "b"] for rank in ranks)
    assert [rank.needs for rank in ranks] == [(0,), (1,), (2,)]
    assert not any(rank.events for rank in ranks)


def test_experts_are_dealt_to_their_holders_and_the_rest_evens_out() -> None:
    """Four ranks, two ways of expert parallelism: ranks 0 and 2 hold the same experts, ranks 1 and 3 the others."""
    ranks = []
    for rank in range(4):
        experts = {f"expert.{rank % 2 + 2 * i}": 900 + 10 * i for i in range(4)}
        dense = {f"dense.{i}": 200 for i in range(6)}
        holders = dict.fromkeys(experts, (rank % 2, rank % 2 + 2)) | dict.fromkeys(dense, (0, 1, 2, 3))
        ranks.append(Rank({**experts, **dense}, holders))
    deal(ranks)
    captured = [name for rank in ranks for name in rank.mine]
    assert sorted(captured) == sorted({name for rank in ranks for name in rank.nbytes})
    assert all(set(rank.mine) <= set(rank.nbytes) for rank in ranks)
    loads = [sum(rank.nbytes[name] for name in rank.mine) for rank in ranks]
    assert max(loads) <= 1.15 * sum(loads) / 4
    for index, rank in enumerate(ranks):
        owners = {other for name in rank.nbytes for other, o in enumerate(ranks) if name in o.mine}
        assert set(rank.needs) == owners | {index}


def test_shards_of_one_name_are_different_state() -> None:
    """Two shards, each on two ranks: the same operator is captured twice, once of each shard."""
    ranks = [Rank({"a": 100, "b": 100}, dict.fromkeys("ab", (rank % 2, rank % 2 + 2))) for rank in range(4)]
    deal(ranks)
    for shard in (0, 1):
        assert sorted(ranks[shard].mine + ranks[shard + 2].mine) == ["a", "b"]
        assert ranks[shard].needs == ranks[shard + 2].needs == (shard, shard + 2)


def test_an_operator_is_cut_where_its_pieces_have_different_holders() -> None:
    operator = Operator(name="mixed", kind=OperatorKind.SHARED, pieces=tuple(Piece(parameter=n) for n in "xyz"))
    ranks = [
        Rank({"x": 10, "y": 20, "z": 30}, {"x": (0, 1), "y": (rank,), "z": (0, 1)}, operators=(operator,))
        for rank in range(2)
    ]
    deal(ranks)
    assert ranks[0].shares is not None
    assert ranks[1].shares is not None
    pieces = [[p.parameter for op in rank.shares.mine for p in op.pieces] for rank in ranks if rank.shares is not None]
    assert sorted(pieces[0] + pieces[1]) == ["x", "y", "y", "z"]
    assert all("y" in found for found in pieces)


def test_a_rank_may_capture_nothing() -> None:
    ranks = [Rank({"a": 100}, {"a": (0, 1)}) for _ in range(2)]
    deal(ranks)
    assert sorted(len(rank.mine) for rank in ranks) == [0, 1]
    assert all(rank.needs == tuple(sorted({index, *(i for i, r in enumerate(ranks) if r.mine)}))
               for index, rank in enumerate(ranks))  # fmt: skip


def test_the_deal_is_kept_until_sizes_change_on_any_rank() -> None:
    ranks = replicated(2)
    deal(ranks)
    before = [rank.mine for rank in ranks]
    settle(ranks)
    assert [rank.mine for rank in ranks] == before
    assert [len(rank.events) for rank in ranks] == [1, 1]
    for rank in ranks:  # an expert got its first tokens, and with them optimizer state
        rank.nbytes["layers.0.gate"] = 100_000
    settle(ranks)
    assert [len(rank.events) for rank in ranks] == [2, 2]
    assert sorted(name for rank in ranks for name in rank.mine) == sorted(MODEL)
    assert ["layers.0.gate"] in [rank.mine for rank in ranks]  # it outweighs all others


def test_a_rank_that_was_replaced_makes_all_deal_anew() -> None:
    ranks = replicated(3)
    deal(ranks)
    before = [rank.mine for rank in ranks]
    fresh = Rank(dict(MODEL), ranks[1].holders)
    fresh.open(ranks[1].ranks.control)  # type: ignore[arg-type]
    ranks[1] = fresh
    for rank in (ranks[0], ranks[2]):
        assert rank.shares is not None
        rank.shares.reset()
    settle(ranks)
    assert [rank.mine for rank in ranks] == before


def test_copies_are_the_ranks_that_hold_all_that_this_one_holds() -> None:
    def copies(holders: Holders, rank: int = 0, world: int = 4) -> tuple[int, ...]:
        each = Rank({}, holders)
        each.open(StoreControl(HashStore(), rank, world, scope="job"))
        assert each.shares is not None
        return each.shares.copies()

    assert copies({"a": (0, 1, 2, 3), "b": (0, 1, 2, 3)}) == (1, 2, 3)
    assert copies({"dense": (0, 1, 2, 3), "expert": (0, 2)}) == (2,)
    assert copies({"a": (0, 1), "b": (0, 2)}) == ()
    assert copies({}) == ()
