from __future__ import annotations

import itertools
import random
from typing import Literal

from hypothesis import given, settings
from hypothesis import strategies as st

from moetion_lightning.distributed.sharding import Assignment, Item, assign
from tests.growth import assert_grows_like_its_input

WORLD = 6

items_of_many_sets = st.dictionaries(
    st.tuples(
        st.sampled_from([f"layers.{i}" for i in range(12)]), st.frozensets(st.integers(0, WORLD - 1), min_size=1)
    ),
    st.integers(0, 100),
    max_size=25,
).map(lambda sizes: [Item(name=n, nbytes=b, holders=tuple(sorted(h))) for (n, h), b in sizes.items()])

sizes_of_one_set = st.lists(st.integers(0, 1000), min_size=1, max_size=30)


def one_set(sizes: list[int], holders: tuple[int, ...]) -> list[Item]:
    return [Item(name=f"layers.{i}", nbytes=nbytes, holders=holders) for i, nbytes in enumerate(sizes)]


def owner_by_item(items: list[Item], assignment: Assignment) -> dict[Item, int]:
    return dict(zip(items, assignment.owners))


@given(items_of_many_sets, st.sampled_from(["equal", "adaptive", "auto"]))
@settings(max_examples=300, deadline=None)
def test_each_item_has_one_owner_that_holds_it(items: list[Item], method: Literal["equal", "adaptive", "auto"]) -> None:
    result = assign(items, WORLD, method=method)
    assert len(result.owners) == len(items)
    assert all(owner in item.holders for item, owner in zip(items, result.owners))
    expected = [sum(i.nbytes for i, o in zip(items, result.owners) if o == rank) for rank in range(WORLD)]
    assert result.bottleneck_after == max(expected) <= result.bottleneck_before


@given(items_of_many_sets, st.randoms(use_true_random=False), st.sampled_from(["equal", "adaptive", "auto"]))
@settings(max_examples=300, deadline=None)
def test_choice_does_not_depend_on_the_order_of_items(
    items: list[Item], shuffler: random.Random, method: Literal["equal", "adaptive", "auto"]
) -> None:
    shuffled = items[:]
    shuffler.shuffle(shuffled)
    first, second = assign(items, WORLD, method=method), assign(shuffled, WORLD, method=method)
    assert owner_by_item(items, first) == owner_by_item(shuffled, second)
    assert first.bottleneck_after == second.bottleneck_after


@given(items_of_many_sets)
@settings(max_examples=200, deadline=None)
def test_adaptive_is_the_plain_greedy_choice(items: list[Item]) -> None:
    """Against a direct transcription, without heaps."""

    def key(item: Item) -> tuple[bool, int, tuple[int, ...], int]:
        return len(item.holders) > 1, -item.nbytes, item.holders, int(item.name.removeprefix("layers."))

    load = [0] * WORLD
    expected: dict[Item, int] = {}
    for item in sorted(items, key=key):
        rank = min(item.holders, key=lambda r: (load[r], r))
        expected[item] = rank
        load[rank] += item.nbytes
    assert owner_by_item(items, assign(items, WORLD, method="adaptive")) == expected


@given(sizes_of_one_set, st.integers(1, 8))
@settings(max_examples=300, deadline=None)
def test_adaptive_bottleneck_is_at_most_the_mean_and_one_item(sizes: list[int], ranks: int) -> None:
    result = assign(one_set(sizes, tuple(range(ranks))), ranks, method="adaptive")
    assert result.bottleneck_after <= sum(sizes) / ranks + max(sizes)
    assert result.bottleneck_before == sum(sizes)


@given(sizes_of_one_set, st.integers(1, 8))
@settings(max_examples=300, deadline=None)
def test_equal_deals_runs_of_equal_count(sizes: list[int], ranks: int) -> None:
    owners = assign(one_set(sizes, tuple(range(ranks))), ranks, method="equal").owners
    assert list(owners) == sorted(owners), "runs are contiguous, also past layer 9"
    counts = [owners.count(rank) for rank in range(ranks)]
    assert max(counts) - min(counts) <= 1


@given(items_of_many_sets)
@settings(max_examples=200, deadline=None)
def test_auto_is_the_lighter_one_and_equal_on_a_tie(items: list[Item]) -> None:
    equal, adaptive = assign(items, WORLD, method="equal"), assign(items, WORLD, method="adaptive")
    lighter = adaptive if adaptive.bottleneck_after < equal.bottleneck_after else equal
    assert assign(items, WORLD) == lighter


def test_shards_of_one_name_are_different_state() -> None:
    items = [Item(name="x", nbytes=4, holders=(0, 2)), Item(name="x", nbytes=4, holders=(1, 3))]
    assert assign(items, 4).owners == (0, 1)


def test_partial_experts_of_a_mixture_model_adaptive_beats_equal_beats_every_holder() -> None:
    """GPT-MoE under PEC: 8 data-parallel ranks, expert-parallel size 4, one expert of each of 6 MoE layers saved."""
    world = 8
    items = []
    for layer, size in itertools.product(range(12), [("attention", 24), ("norms", 1)]):
        items.append(Item(name=f"layers.{layer}.{size[0]}", nbytes=size[1] * 2**20, holders=tuple(range(world))))
    items.append(Item(name="embedding", nbytes=400 * 2**20, holders=tuple(range(world))))
    for layer in range(0, 12, 2):
        expert_rank = layer // 2 % 4
        items.append(Item(name=f"layers.{layer}.expert", nbytes=48 * 2**20, holders=(expert_rank, expert_rank + 4)))
    equal, adaptive = (assign(items, world, method=m) for m in ("equal", "adaptive"))
    assert adaptive.bottleneck_after < equal.bottleneck_after < equal.bottleneck_before
    assert equal.bottleneck_before == adaptive.bottleneck_before
    assert adaptive.bottleneck_after == 400 * 2**20, "the embedding alone is the heaviest"
    assert assign(items, world).method == "adaptive"


def test_auto_keeps_whole_layers_together_where_that_costs_nothing() -> None:
    items = [Item(name=f"layers.{i}", nbytes=10, holders=(0, 1, 2, 3)) for i in range(12)]
    result = assign(items, 4)
    assert result.method == "equal"
    assert result.owners == (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3)


def test_nothing_to_capture() -> None:
    assert assign([], 2) == Assignment(owners=(), method="equal", bottleneck_before=0, bottleneck_after=0)


def _job(world: int) -> list[Item]:
    everybody = tuple(range(world))
    pairs = [tuple(sorted((rank, (rank + world // 2) % world))) for rank in range(world // 2)]
    items = [Item(name=f"layers.{i}", nbytes=1000 + i % 7, holders=everybody) for i in range(world)]
    return items + [Item(name=f"expert.{e}", nbytes=500, holders=pair) for pair in pairs for e in range(2)]


def test_thousands_of_ranks_are_quick() -> None:
    few, many = _job(512), _job(4096)
    assert_grows_like_its_input(lambda: assign(few, 512), lambda: assign(many, 4096), times=8)
    result = assign(many, 4096)
    assert result.bottleneck_before == 2 * 500 + sum(1000 + i % 7 for i in range(4096))
    assert result.bottleneck_after < 2000
