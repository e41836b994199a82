"""Accelerators that nobody has run this on are refused by name, before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from moetion_lightning.callbacks import SparseExpertCheckpoint
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.integrations import SparseCheckpointing
from tests.lightning.test_callbacks import trainer

KINDS = ["mps", "xpu", "hpu"]


def elsewhere(kind: str, base: type) -> type:
    """A tensor that says that it lies on another device: this machine has none."""
    return type("Elsewhere", (base,), {"device": property(lambda self: torch.device(kind, 0))})


class Net(pl.LightningModule):
    def __init__(self, kind: str, *, buffer: bool = False) -> None:
        super().__init__()
        self.steps = 0
        self.layer = nn.Linear(2, 2)
        if buffer:
            self.register_buffer("table", torch.zeros(2).as_subclass(elsewhere(kind, torch.Tensor)))
        else:
            self.layer.bias = elsewhere(kind, nn.Parameter)(torch.zeros(2))

    def training_step(self, batch: Any) -> Any:
        self.steps += 1
        return self.layer(batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_parameter(tmp_path: Path, memory_dir: Path, kind: str) -> None:
    net = Net(kind)
    with pytest.raises(ConfigurationError, match=rf"'layer.bias' is on the device '{kind}:0'.*CPU and from CUDA only"):
        trainer(tmp_path, SparseExpertCheckpoint(memory_dir=str(memory_dir))).fit(net, DataLoader(torch.zeros(4, 2)))
    assert net.steps == 0


def test_buffer(tmp_path: Path, memory_dir: Path) -> None:
    net = Net("mps", buffer=True)
    with pytest.raises(ConfigurationError, match="'table' is on the device 'mps:0'"):
        trainer(tmp_path, SparseExpertCheckpoint(memory_dir=str(memory_dir))).fit(net, DataLoader(torch.zeros(4, 2)))
    assert net.steps == 0


@pytest.mark.parametrize("kind", KINDS)
def test_hand_written_loop(tmp_path: Path, memory_dir: Path, kind: str) -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].bias = elsewhere(kind, nn.Parameter)(torch.zeros(2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with SparseCheckpointing(net, optimizer, memory_dir=str(memory_dir)) as run:
        steps = run.steps(DataLoader(torch.zeros(4, 2)), epochs=1)
        with pytest.raises(ConfigurationError, match=f"'0.bias' is on the device '{kind}:0'"):
            next(iter(steps))
