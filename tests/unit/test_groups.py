"""Process groups of a launched process: alone first, then with the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moetion_lightning.distributed import communicators
from moetion_lightning.distributed.groups import Groups
from moetion_lightning.distributed.rank_groups import RankGroups
from moetion_lightning.errors import ConfigurationError, RankLostError, StrandedRankError


@pytest.fixture
def groups() -> Any:
    store = dist.HashStore()
    store.set("moetion/start/over", "1")
    member: Any = SimpleNamespace(
        rank=1,
        world_size=3,
        is_replacement=True,
        generation=1,
        watch=lambda act: None,
        store=lambda: store,
        check=lambda: None,
    )
    made = Groups(member)
    yield made
    if dist.is_initialized():
        dist.destroy_process_group()
    made.remove()


def test_a_replacement_that_nobody_joins_is_refused(groups: Groups) -> None:
    groups.install()
    with pytest.raises(StrandedRankError, match="SparseExpertCheckpoint"):
        dist.init_process_group("gloo")
    assert not dist.is_initialized()


def test_alone_every_collective_returns_at_once(groups: Groups) -> None:
    groups.install()
    groups.joins = True
    dist.init_process_group("gloo")
    assert groups.alone
    assert (dist.get_rank(), dist.get_world_size()) == (1, 3)
    dist.barrier()
    value = ["mine"]
    dist.broadcast_object_list(value, src=0)
    assert value == ["mine"]
    gathered: list[Any] = [None] * 3
    dist.all_gather_object(gathered, "mine")
    assert gathered == ["mine"] * 3
    tensor = torch.tensor([2.0])
    dist.all_reduce(tensor)
    assert tensor.item() == 6.0, "as if all had given the same"


def test_torchs_own_collectives_come_back(groups: Groups) -> None:
    before = dist.broadcast_object_list
    groups.install()
    groups.joins = True
    dist.init_process_group("gloo")
    assert dist.broadcast_object_list is not before
    groups.start_values.be_alone(False)
    groups.start_values.end()
    assert dist.broadcast_object_list is before
    assert not groups.alone


def test_a_function_that_was_imported_by_its_name_is_ours(groups: Groups) -> None:
    """As torch's device meshes import it."""
    from torch.distributed import device_mesh

    original = device_mesh.init_process_group
    groups.install()
    assert device_mesh.init_process_group == groups.init
    groups.remove()
    assert device_mesh.init_process_group is original


@pytest.mark.parametrize("make", [lambda: dist.new_group([0, 1]), lambda: dist.init_device_mesh("cpu", (3,))])
def test_a_group_of_the_script_is_refused_with_its_line(groups: Groups, make: Any) -> None:
    groups.install()
    groups.joins = True
    dist.init_process_group("gloo")
    with pytest.raises(
        ConfigurationError, match=r"test_groups\.py:\d+ makes a process group or device mesh of its own"
    ):
        make()


def test_groups_of_the_strategies_are_made(groups: Groups) -> None:
    groups.install()
    groups.joins = True
    dist.init_process_group("gloo")
    own = RankGroups(1, None, {"pipeline": [[0, 1, 2]]})
    own.build()
    assert own.group("pipeline").size() == 3


def test_an_error_while_giving_up_does_not_end_a_survivor(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("NCCL error: unhandled system error")

    groups.install()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(communicators, "_groups_to_abort", fail)
    groups.leave()
    assert groups.alone
    assert dist.get_world_size() == 3


def test_a_device_in_an_error_state_makes_a_survivor_a_loss(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    groups.install()
    with pytest.raises(RankLostError, match="illegal memory access"):
        groups.leave()


@pytest.mark.parametrize(("generation", "ended"), [(1, True), (2, False)])
def test_wait_in_the_generation_that_begins_is_not_ended(groups: Groups, generation: int, ended: bool) -> None:
    """The watching thread tells of generation 2, and the rank may have gone on to it already."""
    interrupted: list[int] = []
    groups.membership.newest = 2  # type: ignore[misc]
    groups._control = SimpleNamespace(  # type: ignore[assignment]
        generation=generation, interrupt=lambda: interrupted.append(generation), close=lambda: None
    )
    groups._free(2)
    assert interrupted == ([generation] if ended else [])
