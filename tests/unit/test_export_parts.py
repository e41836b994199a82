"""What an exported checkpoint is made of: bare modules, optimizers by name, files that appear when they are whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from moetion_lightning.core.state import LiveState
from moetion_lightning.engine.state_layout import StateLayout
from moetion_lightning.errors import ConfigurationError, UnsupportedStateError
from moetion_lightning.export.bare import bare_module, find_optimizer, make_optimizers
from moetion_lightning.export.targets import check_target, write_file, write_safetensors


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.norms = nn.ModuleList([nn.BatchNorm1d(3), nn.BatchNorm1d(3)])
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.ones(2), persistent=False)
        self.norms[0].register_buffer("mask", self.mask, persistent=False)


def _bare(module: nn.Module) -> nn.Module:
    layout = StateLayout(LiveState(module, [torch.optim.SGD(module.parameters(), 0.1)])).json()
    forms = {name: (p.dtype, tuple(p.shape)) for name, p in module.named_parameters()}
    buffers = dict(module.named_buffers())
    return bare_module(forms, buffers, layout["tied"], layout["transient"], torch.device("cpu"))


def test_bare_module_has_the_same_state_dict() -> None:
    module = Tied()
    bare = _bare(module)
    assert {k: v.shape for k, v in bare.state_dict().items()} == {k: v.shape for k, v in module.state_dict().items()}
    assert [name for name, _ in bare.named_parameters()] == [name for name, _ in module.named_parameters()]
    assert torch.equal(bare.get_buffer("mask"), module.mask)
    assert bare.get_parameter("head.weight") is bare.get_parameter("embed.weight")
    bare.load_state_dict(module.state_dict())


def test_layout_is_looked_at_again_when_modules_come() -> None:
    module = Tied()
    live = LiveState(module, [torch.optim.Adam(module.parameters())])
    layout = StateLayout(live)
    before = layout.json()
    assert layout.json() is before
    assert before["optimizers"] == ["torch.optim.adam:Adam"]
    assert before["tied"] == {"head.weight": "embed.weight", "norms.0.mask": "mask"}
    module.more = nn.Linear(2, 2)
    module.more.weight = module.embed.weight
    live.refresh()
    assert layout.json()["tied"]["more.weight"] == "embed.weight"


@pytest.mark.parametrize(
    "name",
    ["torch.optim.lr_scheduler:StepLR", "torch.optim.adam:Tensor", "torch.optim.adam:torch", "torch.optim.adam:None"],
)
def test_what_is_no_optimizer_of_torch_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedStateError):
        find_optimizer(name, ())


@pytest.mark.parametrize("name", ["os:system", "torch.optimal:Adam", "torch:nn.Linear", "subprocess:Popen"])
def test_nothing_else_is_imported(name: str) -> None:
    with pytest.raises(ConfigurationError, match="--allow"):
        find_optimizer(name, ("some.Other",))


def test_what_is_allowed_but_not_there_is_told() -> None:
    with pytest.raises(UnsupportedStateError, match=r"nowhere\.Lion cannot be imported"):
        find_optimizer("nowhere:Lion", ("nowhere.Lion",))


def test_a_class_of_the_script_itself_is_told_so() -> None:
    with pytest.raises(UnsupportedStateError, match="Lion is defined in the training script itself"):
        find_optimizer("__main__:Lion", ("__main__.Lion",))


class NeedsMore(torch.optim.SGD):
    def __init__(self, params: Any, strength: float, module: nn.Module) -> None:
        super().__init__(params, lr=strength)


class NeedsSettings(torch.optim.Optimizer):
    def __init__(self, params: Any, strength: float) -> None:
        super().__init__(params, {"strength": strength})


def _made(kind: type, **settings: Any) -> torch.optim.Optimizer:
    weights = {"w": nn.Parameter(torch.ones(2))}
    groups = [{"parameters": json.dumps(["w"]), "settings": settings}]
    allowed = [f"{kind.__module__}.{kind.__qualname__}"]
    return make_optimizers([f"{kind.__module__}:{kind.__qualname__}"], [groups], weights, allowed)[0]


def test_optimizers_are_made_from_their_groups() -> None:
    assert _made(NeedsSettings, strength=0.5).param_groups[0]["strength"] == 0.5
    assert _made(torch.optim.RMSprop, lr=0.25, momentum=0.5).param_groups[0]["momentum"] == 0.5
    with pytest.raises(UnsupportedStateError, match="cannot be made from its parameter groups alone"):
        _made(NeedsMore, strength=0.5)


def test_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "x.ckpt"
    write_file(target, {"a": torch.ones(2)}, force=False)
    with pytest.raises(Exception, match="pickle"):
        write_file(target, {"a": lambda: None}, force=True)
    assert torch.equal(torch.load(target)["a"], torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


def test_tensors_that_share_values_are_written_once(tmp_path: Path) -> None:
    shared = torch.arange(6.0).view(2, 3)
    model = {"a": shared, "b": shared, "turned": torch.arange(6.0).view(2, 3).t(), "empty": torch.empty(0), "x": 3}
    left_out = write_safetensors(tmp_path / "folder", model, {}, force=False)
    assert left_out == ["b (the same values as a)", "x"]
    loaded = load_file(tmp_path / "folder" / "model.safetensors")
    assert set(loaded) == {"a", "turned", "empty"}
    assert torch.equal(loaded["turned"], model["turned"])


def test_only_exported_folders_are_replaced(tmp_path: Path) -> None:
    check_target(tmp_path / "new", folder=True, force=False)
    for force in (False, True):
        with pytest.raises(ConfigurationError):
            check_target(tmp_path, folder=True, force=force)
        with pytest.raises(ConfigurationError):
            check_target(tmp_path, folder=False, force=force)
