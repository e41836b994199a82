"""Process groups of a launched process: alone first, then with the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moetion_lightning.distributed.groups import Groups
from moetion_lightning.errors import LaunchError


@pytest.fixture
def groups() -> Any:
    made = Groups(SimpleNamespace(rank=1, world_size=3, is_replacement=True, generation=1))  # type: ignore[arg-type]
    original = dist.init_process_group
    yield made
    if dist.is_initialized():
        dist.destroy_process_group()
    made._talk_to_others()
    dist.init_process_group = dist.distributed_c10d.init_process_group = original


def test_a_replacement_that_nobody_joins_is_refused(groups: Groups) -> None:
    groups.install()
    with pytest.raises(LaunchError, match="SparseExpertCheckpoint"):
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
    assert tensor.item() == 2.0


def test_the_object_collectives_come_back(groups: Groups) -> None:
    before = dist.broadcast_object_list
    groups.install()
    groups.joins = True
    dist.init_process_group("gloo")
    assert dist.broadcast_object_list is not before
    groups._talk_to_others()
    assert dist.broadcast_object_list is before
    assert not groups.alone
