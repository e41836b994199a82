"""Which rank runs which stages, for many sizes, and the groups that every rank makes alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

from moetion_lightning.errors import ConfigurationError, RankLostError
from moetion_lightning.pipeline.layout import PipelineGroups, PipelineLayout

layouts = st.builds(
    lambda places, replicas, chunks, v_shaped: PipelineLayout(
        world_size=places * replicas, pipeline_parallel_size=places, chunks_per_rank=chunks, v_shaped=v_shaped
    ),
    st.integers(1, 7),
    st.integers(1, 5),
    st.integers(1, 4),
    st.booleans(),
)


@given(layouts)
def test_place_and_replica_name_every_rank_once(layout: PipelineLayout) -> None:
    seen = {
        layout.global_rank(place, replica): (place, replica)
        for place in range(layout.pipeline_parallel_size)
        for replica in range(layout.data_parallel_size)
    }
    assert sorted(seen) == list(range(layout.world_size))
    for rank, (place, replica) in seen.items():
        assert (layout.pp_rank(rank), layout.dp_rank(rank)) == (place, replica)


@given(layouts)
def test_pipelines_and_replicas_partition_the_ranks_and_meet_in_one(layout: PipelineLayout) -> None:
    ranks = range(layout.world_size)
    for of in (layout.pipeline_ranks, layout.replica_ranks):
        parts = {of(rank) for rank in ranks}
        assert sorted(rank for part in parts for rank in part) == list(ranks)
        assert all(rank in of(rank) for rank in ranks)
    for rank in ranks:
        # A place in the pipeline is a place in the group: collectives name their source by it.
        assert layout.pipeline_ranks(rank).index(rank) == layout.pp_rank(rank)
        assert layout.replica_ranks(rank).index(rank) == layout.dp_rank(rank)
        assert set(layout.pipeline_ranks(rank)) & set(layout.replica_ranks(rank)) == {rank}


@given(layouts)
def test_every_stage_has_one_owner_in_each_pipeline(layout: PipelineLayout) -> None:
    for replica in range(layout.data_parallel_size):
        dealt = [(stage, rank) for rank in layout.pipeline_ranks(replica) for stage in layout.stages(rank)]
        assert sorted(stage for stage, _ in dealt) == list(range(layout.num_stages))
        assert all(layout.owner(stage) == layout.pp_rank(rank) for stage, rank in dealt)
    for rank in range(layout.world_size):
        stages = layout.stages(rank)
        assert list(stages) == sorted(stages)
        assert len(stages) == layout.chunks_per_rank
        assert all(layout.stages(peer) == stages for peer in layout.replica_ranks(rank))


@given(layouts)
def test_owners_are_those_of_torch(layout: PipelineLayout) -> None:
    style = "v" if layout.v_shaped else "loop"
    mapping = generate_stage_to_rank_mapping(layout.pipeline_parallel_size, layout.num_stages, style)
    assert [layout.owner(stage) for stage in range(layout.num_stages)] == [mapping[s] for s in sorted(mapping)]


def test_v_gives_the_first_rank_the_first_and_the_last_stage() -> None:
    layout = PipelineLayout(world_size=3, pipeline_parallel_size=3, chunks_per_rank=2, v_shaped=True)
    assert [layout.stages(rank) for rank in range(3)] == [(0, 5), (1, 4), (2, 3)]


@pytest.mark.parametrize(("world_size", "places"), [(3, 2), (2, 4), (5, 3), (4, 0), (4, -2)])
def test_pipeline_must_divide_the_ranks(world_size: int, places: int) -> None:
    with pytest.raises(ConfigurationError) as raised:
        PipelineLayout(world_size=world_size, pipeline_parallel_size=places)
    message = str(raised.value)
    assert f"pipeline_parallel_size={places}" in message
    assert f"the number of ranks, which is {world_size}" in message
    assert "Change one of them" in message


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Ranks of the groups that were asked for; a group is a text that names them."""
    asked: list[list[int]] = []

    def new_group(ranks: list[int], timeout: Any = None) -> Any:
        asked.append(ranks)
        return f"{ranks} {timeout}"

    monkeypatch.setattr(dist, "new_group", new_group)
    return asked


@pytest.mark.parametrize(("world_size", "places"), [(1, 1), (4, 2), (6, 3), (6, 2), (4, 4)])
def test_all_ranks_ask_for_the_same_groups_in_the_same_order(
    world_size: int, places: int, asked: list[list[int]]
) -> None:
    layout = PipelineLayout(world_size=world_size, pipeline_parallel_size=places)
    orders = []
    for rank in range(world_size):
        groups = PipelineGroups(layout, rank, None)
        groups.build()
        assert groups.pipeline == f"{list(layout.pipeline_ranks(rank))} None"
        assert groups.replica == f"{list(layout.replica_ranks(rank))} None"
        assert groups.pp_rank == layout.pp_rank(rank)
        orders.append(list(asked))
        asked.clear()
    assert all(order == orders[0] for order in orders)
    assert len(orders[0]) == places + world_size // places


@pytest.mark.parametrize("get", [lambda groups: groups.pipeline, lambda groups: groups.replica])
def test_groups_exist_only_between_build_and_drop(get: Callable[[PipelineGroups], Any], asked: list[list[int]]) -> None:
    groups = PipelineGroups(PipelineLayout(world_size=4, pipeline_parallel_size=2), 3, None)
    groups.drop()
    with pytest.raises(RankLostError, match=r"rank 3: the (pipeline|replica) groups do not exist.*rebuild_groups"):
        get(groups)
    groups.build()
    assert get(groups)
    groups.drop()
    with pytest.raises(RankLostError, match="rank 3"):
        get(groups)
