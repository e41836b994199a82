"""Random generators of accelerators that are not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moetion_lightning.core.device_random import device_states, set_device_states
from moetion_lightning.core.digests import rng_digests
from moetion_lightning.core.generators import Generators
from moetion_lightning.core.run_state import get_rng, set_rng


class Module:
    """What ``torch.cuda`` and ``torch.xpu`` have; a generator's state is one number."""

    def __init__(self, *numbers: int, current: int = 0, initialized: bool = True) -> None:
        self.states = [torch.tensor([number], dtype=torch.uint8) for number in numbers]
        self.current, self.initialized = current, initialized

    def is_initialized(self) -> bool:
        return self.initialized

    def current_device(self) -> int:
        return self.current

    def device_count(self) -> int:
        return len(self.states)

    def get_rng_state_all(self) -> list[Tensor]:
        return [state.clone() for state in self.states]

    def set_rng_state(self, state: Tensor, device: int) -> None:
        self.states[device] = state.clone()

    @property
    def numbers(self) -> list[int]:
        return [int(state) for state in self.states]


class OneDevice:
    """What ``torch.mps`` has."""

    def __init__(self, number: int) -> None:
        self.state = torch.tensor([number], dtype=torch.uint8)

    def get_rng_state(self) -> Tensor:
        return self.state.clone()

    def set_rng_state(self, state: Tensor) -> None:
        self.state = state.clone()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts an accelerator into this machine."""

    def install(kind: str, module: Any) -> Any:
        device = torch.device(kind)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args: device)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch, "get_device_module", lambda of: module)
        return module

    return install


@pytest.mark.parametrize("kind", ["cuda", "xpu", "hpu"])
def test_numbers_are_those_of_the_device_that_is_used(machine: Any, kind: str) -> None:
    machine(kind, Module(10, 11, 12, current=1))
    state = get_rng()
    assert list(rng_digests())[-3:] == [f"{kind}:0", f"{kind}:1", f"{kind}:2"]
    before = rng_digests()
    restarted = machine(kind, Module(0, 0, 0, current=2))  # the rank has another device now
    assert rng_digests() != before
    set_rng(state)
    assert restarted.numbers == [10, 12, 11]
    assert rng_digests() == before


def test_machine_with_fewer_devices_takes_the_one_that_was_used(machine: Any) -> None:
    machine("cuda", Module(10, 11, current=1))
    kind, states = device_states()
    smaller = machine("cuda", Module(0))
    set_device_states(kind, states)
    assert smaller.numbers == [11]


def test_accelerator_of_one_device(machine: Any) -> None:
    module = machine("mps", OneDevice(7))
    state = get_rng()
    module.state = torch.tensor([0], dtype=torch.uint8)
    set_rng(state)
    assert int(module.state) == 7


def test_device_that_nobody_has_used_is_left_alone(machine: Any) -> None:
    """Asking for its state would begin to use it, and no process could be forked any more."""
    machine("cuda", Module(1, initialized=False))
    assert "devices" not in get_rng()
    assert set(rng_digests()) == {"python", "numpy", "torch"}


def test_state_of_another_kind_of_device_is_passed_over(machine: Any) -> None:
    machine("cuda", Module(5))
    state = get_rng()
    other = machine("xpu", Module(1))
    set_rng(state)
    assert other.numbers == [1]


def test_generator_of_a_device_that_is_not_there_is_made_on_none() -> None:
    """A window of a machine with a GPU, on one without: the state does not fit, and that is said, not raised."""

    class Holder:
        pass

    holder = Holder()
    generators = Generators(lambda: {"holder": holder})
    generators.find()
    assert generators.take({"holder.noise": torch.zeros(16, dtype=torch.uint8)}) == ["holder.noise"]
