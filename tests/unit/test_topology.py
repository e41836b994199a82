from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetion_lightning.distributed.topology import holders_of, replica_targets
from moetion_lightning.errors import ConfigurationError
from tests.growth import assert_grows_like_its_input

domain_labels = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=40)


def fewest_copies_on_the_heaviest_rank(domains: list[str], replicas: int) -> int:
    """The optimum, by the min-cut condition of the flow domain -> domain (at most one copy of a rank in each)."""
    sizes = Counter(domains)
    for limit in itertools.count():
        for count in range(len(sizes) + 1):
            if any(
                sum(min(limit * sizes[to], sum(sizes[d] for d in chosen if d != to)) for to in sizes)
                < replicas * sum(sizes[d] for d in chosen)
                for chosen in itertools.combinations(sizes, count)
            ):
                break
        else:
            return limit
    raise AssertionError("unreachable")


@given(domain_labels, st.integers(0, 4))
@settings(max_examples=400, deadline=None)
def test_copies_are_on_other_and_different_domains_and_balanced(domains: list[str], replicas: int) -> None:
    if 0 < replicas >= len(set(domains)):
        with pytest.raises(ConfigurationError, match=f"replicas={replicas}"):
            replica_targets(domains, replicas)
        return
    targets = replica_targets(domains, replicas)
    assert len(targets) == len(domains)
    for rank, holders in enumerate(targets):
        assert len(holders) == replicas
        assert len({domains[rank], *(domains[holder] for holder in holders)}) == replicas + 1
    heaviest = max(len(held) for held in holders_of(targets))
    assert heaviest <= fewest_copies_on_the_heaviest_rank(domains, replicas) + 1
    if (replicas + 1) * max(Counter(domains).values()) <= len(domains):
        assert {len(held) for held in holders_of(targets)} == {replicas}


def test_equal_domains_send_to_the_same_local_index_of_the_next_domains() -> None:
    nodes = [f"node{rank // 4}" for rank in range(12)]
    assert replica_targets(nodes, 1) == tuple(((rank + 4) % 12,) for rank in range(12))
    assert replica_targets(nodes, 2) == tuple(((rank + 4) % 12, (rank + 8) % 12) for rank in range(12))


def test_ranks_of_a_domain_need_not_be_neighbours() -> None:
    assert replica_targets(["a", "b", "c", "a", "b", "c"], 1) == ((1,), (2,), (0,), (4,), (5,), (3,))


def test_a_domain_larger_than_all_others_together_is_spread_evenly_over_them() -> None:
    targets = replica_targets(["big"] * 8 + ["b", "c"], 1)
    assert [len(held) for held in holders_of(targets)[8:]] == [4, 4]
    targets = replica_targets(["b", "c", "big", "big", "big"], 1)
    assert sorted(len(held) for held in holders_of(targets)) == [0, 1, 1, 1, 2]
    assert replica_targets(["big"] * 3 + ["b", "c"], 2)[:3] == ((3, 4),) * 3


def test_no_replicas_needs_no_domains() -> None:
    assert replica_targets(["only"] * 3, 0) == ((), (), ())
    assert replica_targets([], 0) == ()


def test_impossible_replication_says_what_there_is_and_what_to_do() -> None:
    with pytest.raises(ConfigurationError) as caught:
        replica_targets(["node0"] * 8 + ["node1"] * 4 + ["node2"], 3)
    for part in (
        "replicas=3 with 3 failure domains",
        "'node0' with 8 ranks, 'node1' with 4 ranks, 'node2' with 1 rank)",
        "expected at least 4 domains",
        "replicas=2 or replicas=0",
        "failure_domain= or MOETION_FAILURE_DOMAIN",
    ):
        assert part in str(caught.value)
    with pytest.raises(ConfigurationError, match="with 1 failure domain .'a' with 1 rank.*Use replicas=0"):
        replica_targets(["a"], 1)
    with pytest.raises(ConfigurationError, match="and 12 more"):
        replica_targets([str(rank) for rank in range(20)], 20)
    with pytest.raises(ConfigurationError, match="replicas=-1"):
        replica_targets(["a", "b"], -1)


def test_holders_invert_targets() -> None:
    targets = replica_targets(["a", "a", "b", "c", "c"], 2)
    held = holders_of(targets)
    assert {(rank, holder) for rank, to in enumerate(targets) for holder in to} == {
        (rank, holder) for holder, ranks in enumerate(held) for rank in ranks
    }


@pytest.mark.parametrize(
    "domains",
    [
        [f"node{rank // 8}" for rank in range(4096)],
        [f"process{rank}" for rank in range(4096)],
        ["big"] * 2100 + [f"process{rank}" for rank in range(1996)],
    ],
    ids=["nodes", "processes", "uneven"],
)
def test_thousands_of_ranks_are_quick(domains: list[str]) -> None:
    targets = replica_targets(domains, 2)
    few = [domain for rank, domain in enumerate(domains) if rank % 8 == 0]
    assert_grows_like_its_input(
        lambda: holders_of(replica_targets(few, 2)), lambda: holders_of(replica_targets(domains, 2)), times=8
    )
    assert all(len({domains[rank], *(domains[h] for h in to)}) == 3 for rank, to in enumerate(targets))
