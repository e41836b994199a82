"""The layout of gradient buckets, where a run is continued with another kind of DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moetion_lightning.distributed.ddp import bucket_order, set_bucket_order


@pytest.fixture
def job(tmp_path: Path) -> Iterator[None]:
    """Of one rank: buckets are laid out as in any other."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _train(ddp: DistributedDataParallel) -> None:
    ddp(torch.ones(2, 4)).sum().backward()


def test_order_is_taken_over_by_a_new_wrapper(job: None) -> None:
    first = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    _train(first)
    order = bucket_order(first)
    assert sorted(order) == [0, 1, 2, 3]
    second = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    set_bucket_order(second, order)
    assert bucket_order(second) == order
    _train(second)


def test_wrapper_that_looks_for_unused_parameters_keeps_its_own(job: None) -> None:
    """It marks what is unused itself, and has one layout only."""
    ddp = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), find_unused_parameters=True)
    set_bucket_order(ddp, [3, 2, 1, 0])
    _train(ddp)
    assert bucket_order(ddp) == []
