"""FSDP2 modules are taken back from a backward pass that failed half-way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetion_lightning.distributed.meshes import can_outlive_groups, drop_groups


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("a rank was lost")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(_Fails.apply(x) if self.fails else x)


@pytest.fixture
def one_rank(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    module.zero_grad()
    module(x).sum().backward()
    return [parameter.grad.full_tensor().clone() for parameter in module.parameters()]  # type: ignore[union-attr]


@pytest.mark.skipif(not can_outlive_groups(), reason="needs a torch that can take FSDP2 modules back")
def test_gradients_of_a_broken_backward_pass_are_not_added_to_the_next(one_rank: None) -> None:
    from torch.distributed.fsdp import fully_shard

    x = torch.randn(3, 4)
    expected = _gradients(fully_shard(Net()), x)
    module = fully_shard(Net())
    module.fails = True
    with pytest.raises(RuntimeError, match="a rank was lost"):
        module(x * 7).sum().backward()
    module.fails = False
    drop_groups(module)
    for group in module._get_fsdp_state()._fsdp_param_groups:  # as rebind does, with new groups
        type(group.mesh_info).__post_init__(group.mesh_info)
    assert all(map(torch.equal, _gradients(module, x), expected))
