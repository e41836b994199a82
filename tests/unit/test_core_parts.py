"""Small parts of the core: compute dtype, gradient norm, capture thread, random generators, pace, lost tokens."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from torch import nn

from moetion_lightning.capture.copies import copy_tensors
from moetion_lightning.capture.fence import DeviceFence
from moetion_lightning.capture.thread import CaptureThread, measure_bandwidth
from moetion_lightning.core.compute_dtype import ComputeDtypeObserver
from moetion_lightning.core.digests import rng_digests
from moetion_lightning.core.generators import find_generators
from moetion_lightning.core.grad_norm import GradNormSeam
from moetion_lightning.core.pace import Pace
from moetion_lightning.core.run_state import get_rng, set_rng
from moetion_lightning.errors import ForeignWindowError, UnsupportedStateError
from moetion_lightning.moe.routing.lost_tokens import LostTokens

# --- compute dtype ---------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.both = nn.Linear(4, 4)
        self.idle = nn.Linear(4, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.both(self.norm(self.linear(self.embed(ids))))
        return x.float().sum() + self.both.weight.pow(2).sum()  # the penalty reads float32


def observe(net: nn.Module, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    observer = ComputeDtypeObserver(dict(net.named_parameters()))
    optimizer = torch.optim.AdamW(net.parameters())
    observer.start()
    try:
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False):
            loss = net(torch.arange(8))
        loss.backward()
        observer.pause()
        optimizer.step()
        observer.resume()
    finally:
        observer.stop()
    return observer.result()


def test_only_parameters_that_are_always_cast_have_a_reduced_compute_dtype() -> None:
    result = observe(Mixed(), torch.bfloat16)
    assert {n: d for n, d in result.items() if n.startswith("linear")} == {
        "linear.weight": torch.bfloat16,
        "linear.bias": torch.bfloat16,
    }
    assert "both.weight" not in result  # read in float32 too
    assert not any(n.startswith(("embed", "norm", "idle")) for n in result)


def test_without_autocast_nothing_is_reduced() -> None:
    assert observe(Mixed(), None) == {}


def test_parameters_that_share_a_buffer_are_captured_in_full() -> None:
    flat = torch.randn(32)
    a, b = nn.Parameter(flat[:16]), nn.Parameter(flat[16:])
    b.data = flat.as_strided((16,), (1,), 0)  # the same storage at the same place
    observer = ComputeDtypeObserver({"a": a, "b": b})
    observer.start()
    try:
        a.to(torch.bfloat16)
    finally:
        observer.stop()
    assert observer.result() == {}


def test_observation_leaves_numbers_alone() -> None:
    torch.manual_seed(0)
    net = Mixed()
    plain = net(torch.arange(8))
    observer = ComputeDtypeObserver(dict(net.named_parameters()))
    observer.start()
    try:
        watched = net(torch.arange(8))
    finally:
        observer.stop()
    assert torch.equal(plain, watched)


# --- gradient norm ---------------------------------------------------------------------------------------------------


def test_norm_is_recorded_for_any_caller_and_given_back() -> None:
    from torch.nn.utils import clip_grad_norm_ as imported_by_name

    seam = GradNormSeam()
    seam.install()
    try:
        parameter = nn.Parameter(torch.ones(4))
        parameter.grad = torch.full((4,), 3.0)
        imported_by_name([parameter], 1.0).zero_()  # in place: what was recorded is a copy
        assert [float(n) for n in seam.take()] == [6.0]
        seam.give([12.0])
        parameter.grad = torch.full((4,), 3.0)
        torch.nn.utils.clip_grad_norm_([parameter], 6.0)
        assert torch.equal(parameter.grad, torch.full((4,), 3.0) * (6.0 / (torch.tensor(12.0) + 1e-6)))
    finally:
        seam.remove()
    parameter.grad = torch.full((4,), 3.0)
    assert float(torch.nn.utils.clip_grad_norm_([parameter], 1.0)) == 6.0
    assert len(seam.norms) == 1  # nothing is recorded after removal


class Hollow(torch.Tensor):
    """A tensor subclass without memory."""

    @staticmethod
    def __new__(cls, *shape: int) -> torch.Tensor:
        return torch.Tensor._make_wrapper_subclass(cls, shape)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError


# --- capture ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (70_001,), (300, 333)])
def test_copies_are_exact(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    source = (torch.randn(shape) * 100).to(dtype)
    target = torch.empty(shape, dtype=dtype)
    copy_tensors([target], [source], DeviceFence())
    assert torch.equal(source, target)


def test_casting_copies_round_as_torch_does_and_strided_sources_work() -> None:
    source = torch.randn(200, 400).t()
    target = torch.empty(400, 200, dtype=torch.bfloat16)
    copy_tensors([target], [source], DeviceFence())
    assert torch.equal(source.to(torch.bfloat16), target)
    flat = torch.randn(100_000)
    target = torch.empty(100_000, dtype=torch.bfloat16)
    copy_tensors([target], [flat], DeviceFence())
    assert torch.equal(flat.to(torch.bfloat16), target)


def test_training_waits_for_copies_but_not_for_sealing() -> None:
    thread = CaptureThread(DeviceFence())
    copying, sealing, order = threading.Event(), threading.Event(), []

    def copy() -> None:
        copying.wait(10)
        order.append("copied")

    def finish() -> None:
        sealing.wait(10)
        order.append("sealed")

    thread.submit(copy, finish, lambda error: None)
    copying.set()
    assert thread.wait_copied() >= 0
    assert order == ["copied"]
    sealing.set()
    thread.drain()
    assert order == ["copied", "sealed"]
    thread.close()


@pytest.mark.parametrize("where", ["copy", "finish"])
def test_background_errors_are_the_jobs_affair(where: str) -> None:
    thread = CaptureThread(DeviceFence())
    seen: list[str] = []

    def fail() -> None:
        raise ZeroDivisionError(where)

    def fine() -> None:
        pass

    def failed(error: Exception) -> None:
        seen.append(str(error))

    thread.submit(fail if where == "copy" else fine, fail if where == "finish" else fine, failed)
    thread.wait_copied()
    thread.submit(fine, lambda: seen.append("the next one"), failed)
    thread.drain()
    assert seen == [where, "the next one"]
    thread.close()


@pytest.mark.parametrize("source", [torch.zeros(3, device="meta"), Hollow(3)], ids=["meta", "subclass"])
def test_nothing_is_copied_from_where_no_memory_is(source: torch.Tensor) -> None:
    with pytest.raises(UnsupportedStateError, match="no memory of its own"):
        copy_tensors([torch.zeros(3)], [source], DeviceFence())


def test_bandwidth_is_measured() -> None:
    assert measure_bandwidth(torch.device("cpu")) > 1e6


# --- random generators -----------------------------------------------------------------------------------------------


class Holder:
    def __init__(self) -> None:
        self.torch = torch.Generator().manual_seed(1)
        self.numpy = np.random.default_rng(2)
        self.legacy = np.random.RandomState(3)
        self.python = random.Random(4)

    def draw(self) -> list[float]:
        return [
            float(torch.rand((), generator=self.torch)),
            float(self.numpy.random()),
            float(self.legacy.rand()),
            self.python.random(),
            float(torch.rand(())),
            float(np.random.rand()),
            random.random(),
        ]


def test_all_generators_come_back() -> None:
    holder = Holder()
    state = get_rng(find_generators({"h": holder}))
    digest = rng_digests()
    first = holder.draw()
    assert rng_digests() != digest
    set_rng(state, find_generators({"h": holder}))
    assert rng_digests() == digest
    assert holder.draw() == first


def test_another_kind_of_global_generator_comes_back() -> None:
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        state = get_rng()
        drawn = np.random.rand(3)
        np.random.set_bit_generator(np.random.MT19937(4))
        set_rng(state)
        assert np.array_equal(np.random.rand(3), drawn)
    finally:
        np.random.set_bit_generator(np.random.MT19937(5))
    with pytest.raises(ForeignWindowError, match="numpy.random.shuffle"):
        set_rng({**state, "numpy": {**state["numpy"], "bit_generator": "shuffle"}})


def test_numpys_state_is_told_from_one_that_looks_the_same() -> None:
    """A second normal number is kept: it is given without another number being drawn."""
    np.random.seed(6)
    np.random.normal()
    before = get_rng()
    kept = np.random.normal()
    assert get_rng()["numpy"]["has_gauss"] != before["numpy"]["has_gauss"]
    set_rng(before)
    assert get_rng()["numpy"]["has_gauss"] == before["numpy"]["has_gauss"]
    assert np.random.normal() == kept


def test_generators_of_submodules_are_found() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].noise = torch.Generator()
    assert list(find_generators({"module": net})) == ["module.0.noise"]


# --- pace and lost tokens --------------------------------------------------------------------------------------------


def test_pace_is_a_median_that_outliers_do_not_move() -> None:
    pace = Pace()
    for seconds in [1.0] * 10 + [60.0]:
        pace.iteration(seconds)
    assert pace.iteration_seconds == 1.0
    assert pace.bytes_per_second(5.0) == 5.0
    pace.copied(100, 1.0)  # too small to say anything
    assert pace.bytes_per_second(5.0) == 5.0
    pace.copied(1 << 24, 2.0)
    assert pace.bytes_per_second(5.0) == 2**23


def test_lost_tokens_are_counted_by_hand() -> None:
    lost = LostTokens(2, 3)
    lost.count(torch.tensor([[4, 1, 1], [2, 2, 2]]))
    lost.saved(0, 0)
    lost.count(torch.tensor([[1, 3, 2], [0, 6, 0]]))
    assert lost.unsaved.tolist() == [[1, 4, 3], [2, 8, 2]]
    assert lost.restored() == 20
    assert lost.plt == (8 / 12 + 12 / 12) / 2
    again = LostTokens(2, 3)
    again.load_state_dict(lost.state_dict())
    assert again.plt == lost.plt
    assert again.state_dict() == lost.state_dict()


def test_nothing_is_lost_before_the_first_token() -> None:
    assert LostTokens(1, 2).plt == 0.0
    assert LostTokens(0, 0).restored() == 0
