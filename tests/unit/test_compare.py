"""The bitwise comparison itself: it must notice what differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from moetion_lightning.testing.compare import (
    compare_losses,
    compare_states,
    flatten_state,
    read_state,
    write_state,
)


def _trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    return module, optimizer


def _written(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    write_state(path, *flatten_state(module, [optimizer]))
    return path


def test_equal_states_are_equal(tmp_path: Path) -> None:
    a, b = (_written(tmp_path / name, *_trained()) for name in "ab")
    result = compare_states(a, b)
    assert result.equal
    assert result.compared > 4 * 4  # parameters, two moments, steps, buffers and groups


@pytest.mark.parametrize("what", ["weight", "step", "moment", "buffer", "lr", "missing"])
def test_any_difference_is_found(tmp_path: Path, what: str) -> None:
    a = _written(tmp_path / "a", *_trained())
    module, optimizer = _trained()
    weight = module[0].weight
    with torch.no_grad():
        if what == "weight":
            weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
        elif what == "step":
            optimizer.state[weight]["step"] += 1
        elif what == "moment":
            optimizer.state[weight]["exp_avg_sq"][0, 0] *= 1.5
        elif what == "buffer":
            module[1].running_mean[0] += 1
        elif what == "lr":
            optimizer.param_groups[0]["lr"] = 0.1 + 1e-17 * 10
        else:
            del optimizer.state[weight]["exp_avg"]
    result = compare_states(a, _written(tmp_path / "b", module, optimizer))
    assert len(result.differences) == 1
    assert not result.equal


def test_same_nan_is_equal(tmp_path: Path) -> None:
    for name in "ab":
        write_state(tmp_path / name, {"x": torch.tensor([1.0, float("nan")])}, {})
    assert compare_states(tmp_path / "a", tmp_path / "b").equal
    write_state(tmp_path / "c", {"x": torch.tensor([1.0, 2.0])}, {})
    assert not compare_states(tmp_path / "a", tmp_path / "c").equal


def test_only_names_with_the_prefix_are_compared(tmp_path: Path) -> None:
    write_state(tmp_path / "a", {"parameter:x": torch.ones(1), "optimizer:x": torch.ones(1)}, {})
    write_state(tmp_path / "b", {"parameter:x": torch.ones(1), "optimizer:x": torch.zeros(1)}, {})
    assert compare_states(tmp_path / "a", tmp_path / "b", ("parameter:",)).equal
    assert not compare_states(tmp_path / "a", tmp_path / "b", ("optimizer:",)).equal
    assert not compare_states(tmp_path / "a", tmp_path / "b", ("nothing:",)).equal  # nothing compared is not equal


def test_state_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_state(tmp_path / "deep" / "a", {"x": torch.ones(2, 3).T, "y": torch.tensor(1)}, {"s": 1})
    tensors, scalars = read_state(tmp_path / "deep" / "a")
    assert torch.equal(tensors["x"], torch.ones(3, 2))
    assert scalars == {"s": 1}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a"]


def test_repeated_loss_must_agree(tmp_path: Path) -> None:
    def write(name: str, losses: list[tuple[int, float]]) -> Path:
        lines = [json.dumps({"epoch": 0, "batch_idx": i, "loss": v.hex()}) for i, v in losses]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return tmp_path / name

    twin = write("twin", [(0, 1.0), (1, 0.5)])
    assert compare_losses(twin, write("again", [(0, 1.0), (0, 1.0), (1, 0.5)])).equal
    assert not compare_losses(twin, write("other", [(0, 1.0), (0, 1.1), (1, 0.5)])).equal
    assert not compare_losses(twin, write("short", [(0, 1.0)])).equal
