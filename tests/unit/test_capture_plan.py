"""The compiled plan of a slot: what it stores, and when it must be compiled again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moetion_lightning.capture import copies
from moetion_lightning.capture.fence import DeviceFence
from moetion_lightning.capture.plan import CompiledSlot
from moetion_lightning.core.operators import Operator, OperatorKind, Piece
from moetion_lightning.core.slot_contents import StoredTensors
from moetion_lightning.core.state import LiveState
from tests.captured import file_of

ROWS = 40


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(ROWS, 3, 5))
        self.wide = nn.Parameter(torch.randn(4, 40_000))  # a row is copied by itself
        self.many = nn.ParameterList(nn.Parameter(torch.randn(2)) for _ in range(1_500))
        self.turned = nn.Parameter(torch.randn(6, 7).t())


def trained() -> tuple[LiveState, torch.optim.Optimizer]:
    torch.manual_seed(3)
    module = Experts()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return LiveState(module, [optimizer]), optimizer


def op(name: str, *pieces: Piece) -> Operator:
    return Operator(name=name, kind=OperatorKind.EXPERT, pieces=pieces)


def rows(name: str, *starts: int) -> list[Operator]:
    return [op(f"{name}/{i}", Piece(parameter=name, start=i, stop=i + 1)) for i in starts]


def whole(live: LiveState) -> list[Operator]:
    return [op(name, Piece(parameter=name)) for name in live.parameters]


def test_every_byte_of_whole_parameters_and_their_state_arrives() -> None:
    live, optimizer = trained()
    stored = StoredTensors(file_of(CompiledSlot(live, whole(live), [], {}, DeviceFence())))
    for name, parameter in live.parameters.items():
        assert torch.equal(stored.load(f"w:{name}"), parameter)
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(stored.load(f"s:{name}:0.{key}"), value)


@pytest.mark.parametrize("system_call", [True, False])
def test_neighbouring_rows_are_one_tensor_and_each_is_found_in_it(
    monkeypatch: pytest.MonkeyPatch, system_call: bool
) -> None:
    if not system_call:
        monkeypatch.setattr(copies, "_pwritev", None)
    live, optimizer = trained()
    active, frozen = [*rows("up", 7, 5, 6, 30), *rows("wide", 1, 3)], rows("up", 0, 1, 39)
    tensors = file_of(CompiledSlot(live, active, frozen, {"up": torch.bfloat16}, DeviceFence()))
    up = live.parameters["up"]
    assert {name for name in tensors if "up" in name} == {
        *(f"{kind}:up[{span}]{path}" for span in ("5:8", "30:31")
          for kind, path in (("w", ""), ("s", ":0.exp_avg"), ("s", ":0.exp_avg_sq"))),
        "s:up:0.step", "c:up[0:2]", "c:up[39:40]",
    }  # fmt: skip
    stored = StoredTensors(tensors)
    state = optimizer.state[up]
    for row in (5, 6, 7, 30):
        assert torch.equal(stored.load(f"w:up[{row}:{row + 1}]"), up[row : row + 1])
        assert torch.equal(stored.load(f"s:up[{row}:{row + 1}]:0.exp_avg"), state["exp_avg"][row : row + 1])
        assert torch.equal(stored.load(f"s:up[{row}:{row + 1}]:0.step"), state["step"])
    for row in (0, 1, 39):
        assert torch.equal(stored.load(f"c:up[{row}:{row + 1}]"), up[row : row + 1].bfloat16())
    for row in (1, 3):
        assert torch.equal(stored.load(f"w:wide[{row}:{row + 1}]"), live.parameters["wide"][row : row + 1])
    for missing in ("w:up[4:6]", "w:up[31:32]", "w:other", "s:up[5:6]:0.unknown"):
        with pytest.raises(KeyError):
            stored.load(missing)


def test_parts_of_a_write_that_was_cut_short_are_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = copies._pwritev, []

    def short(fd: int, parts: int, count: int, offset: int) -> int:
        calls.append(count)
        if len(calls) % 2:  # as after a signal: only a piece of the first part
            one = (copies.ctypes.c_uint64 * 2).from_address(parts)
            return int(real(fd, copies.ctypes.addressof((copies.ctypes.c_uint64 * 2)(one[0], 3)), 1, offset))
        return int(real(fd, parts, count, offset))

    monkeypatch.setattr(copies, "_pwritev", short)
    live, _ = trained()
    stored = file_of(CompiledSlot(live, whole(live), [], {}, DeviceFence()))
    assert all(torch.equal(stored[f"w:{name}"], parameter) for name, parameter in live.parameters.items())
    assert len(calls) > 2


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, parts: int, count: int, offset: int) -> int:
        copies.ctypes.set_errno(28)
        return -1

    monkeypatch.setattr(copies, "_pwritev", full)
    live, _ = trained()
    with pytest.raises(OSError, match="No space left"):
        file_of(CompiledSlot(live, whole(live), [], {}, DeviceFence()))


def test_new_values_and_new_tensors_of_the_same_form_are_followed() -> None:
    live, optimizer = trained()
    compiled = CompiledSlot(live, whole(live), [], {}, DeviceFence())
    up = live.parameters["up"]
    with torch.no_grad():
        up.add_(1)
    up.data = up.data.clone()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.state[up]["exp_avg"] = torch.full_like(up, 5)
    sources = compiled.resolve({})
    assert sources is not None
    stored = file_of(compiled, sources)
    assert torch.equal(stored["w:up"], up)
    assert torch.equal(stored["s:up:0.exp_avg"], torch.full_like(up, 5))


def _grow(live: LiveState, optimizer: Any, up: Tensor) -> None:
    optimizer.state[up]["more"] = torch.zeros(2)


def _drop(live: LiveState, optimizer: Any, up: Tensor) -> None:
    del optimizer.state[up]


def _number(live: LiveState, optimizer: Any, up: Tensor) -> None:
    optimizer.state[up]["step"] = 3


def _other_dtype(live: LiveState, optimizer: Any, up: Tensor) -> None:
    optimizer.state[up]["exp_avg"] = optimizer.state[up]["exp_avg"].double()


def _other_layout(live: LiveState, optimizer: Any, up: Tensor) -> None:
    optimizer.state[up]["exp_avg"] = optimizer.state[up]["exp_avg"].transpose(1, 2).contiguous().transpose(1, 2)


def _looked_again(live: LiveState, optimizer: Any, up: Tensor) -> None:
    live.refresh()


@pytest.mark.parametrize("change", [_grow, _drop, _number, _other_dtype, _other_layout, _looked_again])
def test_another_form_is_compiled_again(change: Any) -> None:
    live, optimizer = trained()
    compiled = CompiledSlot(live, whole(live), [], {}, DeviceFence())
    assert compiled.resolve({}) is not None
    change(live, optimizer, live.parameters["up"])
    assert compiled.resolve({}) is None
    again = CompiledSlot(live, whole(live), [], {}, DeviceFence())
    assert torch.equal(file_of(again)["w:up"], live.parameters["up"])


def test_another_compute_dtype_is_compiled_again() -> None:
    live, _ = trained()
    compiled = CompiledSlot(live, [], whole(live), {"up": torch.bfloat16}, DeviceFence())
    assert compiled.resolve({"up": torch.bfloat16}) is not None
    assert compiled.resolve({"up": torch.float16}) is None


def test_state_that_is_more_than_tensors_is_described_each_time() -> None:
    live, optimizer = trained()
    up = live.parameters["up"]
    optimizer.state[up]["count"] = 1
    compiled = CompiledSlot(live, rows("up", 0), [], {}, DeviceFence())
    first = compiled.sources().scalars
    optimizer.state[up]["count"] = 2
    sources = compiled.resolve({})
    assert sources is not None
    assert sources.scalars != first
    assert sources.scalars["up"]["0"]["state"]["d"]["count"] == {"v": 2}
