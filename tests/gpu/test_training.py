"""What trains on a device: restarts are exact, whatever compiles it and whatever its optimizer keeps."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moetion_lightning.events import ReplayFinished
from tests.lightning.test_callbacks import module
from tests.runs.devices import Run, equal
from tests.runs.models import Automatic
from tests.runs.scenario import DEFAULTS


def verified(run: Run) -> list[bool]:
    return [event.verified for event in run.of(ReplayFinished)]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_restart_is_exact_in_each_precision(make_run: Callable[..., Run], precision: str) -> None:
    run = make_run(delay=0.0005)
    run.interrupted(precision=precision)
    assert equal(run.fit(precision=precision), run.twin(precision=precision))
    assert verified(run) == [True]


def test_compiled_module_with_cuda_graphs_restarts_exactly(make_run: Callable[..., Run]) -> None:
    """Its outputs lie in memory that the next replay of the graph writes over: whoever keeps one must copy it."""

    def compiled() -> Automatic:
        net = module(block="dense")
        options = {"mode": "reduce-overhead"} if run.kind == "cuda" else {"backend": "eager"}
        net.body.compile(**options)
        return net

    run = make_run(delay=0.0005)
    run.interrupted(net=compiled())
    assert equal(run.fit(net=compiled()), run.twin(net=compiled()))
    assert verified(run) == [True]


class EightBitMomentum(torch.optim.Optimizer):
    """Momentum in blocks of one byte an element with a scale of each block's own."""

    BLOCK = 64

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, grad = self.state[parameter], self._blocks(parameter.grad)
                if state:
                    grad = grad + 0.9 * (state["code"].float() - 128) * state["scale"]
                scale = grad.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
                state["code"] = ((grad / scale).round() + 128).to(torch.uint8)
                state["scale"] = scale
                update = grad.view(-1)[: parameter.numel()].view_as(parameter)
                parameter.sub_(update, alpha=group["lr"])
        return loss

    def _blocks(self, values: Tensor) -> Tensor:
        flat = values.float().reshape(-1)
        return torch.nn.functional.pad(flat, (0, -flat.numel() % self.BLOCK)).view(-1, self.BLOCK)


def eight_bit(which: str, net: Automatic) -> torch.optim.Optimizer:
    if which == "bitsandbytes":
        return importlib.import_module("bitsandbytes.optim").Adam8bit(net.parameters(), lr=0.01, min_8bit_size=1)
    if which == "torchao":
        return importlib.import_module("torchao.optim").AdamW8bit(net.parameters(), lr=0.01)
    return EightBitMomentum(net.parameters(), lr=0.05)


@pytest.mark.parametrize("which", ["own", "bitsandbytes", "torchao"])
def test_optimizer_state_of_eight_bits_restarts_exactly(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    if which != "own":
        pytest.importorskip(which)
    run = make_run(delay=0.0005)
    optimizers: list[torch.optim.Optimizer] = []

    def configure_optimizers(net: Automatic) -> torch.optim.Optimizer:
        optimizers.append(eight_bit(which, net))
        return optimizers[-1]

    monkeypatch.setattr(Automatic, "configure_optimizers", configure_optimizers)
    run.interrupted(net=module(block="fused", width=64))
    resumed, twin = run.fit(net=module(block="fused", width=64)), run.twin(net=module(block="fused", width=64))
    assert equal(resumed, twin)
    assert verified(run) == [True]
    if which == "own":
        for first, second in zip(optimizers[1].state.values(), optimizers[2].state.values(), strict=True):
            assert torch.equal(first["code"], second["code"])
            assert torch.equal(first["scale"], second["scale"])


class Scattering(Automatic):
    """Many rows are added to few places: on a GPU in an order of their own, each time, unless that is switched off."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        weight = self.body.head.weight.flatten()
        spread = torch.logspace(-4, 4, 1 << 16, device=weight.device)
        values = spread * weight.repeat(-(-spread.numel() // weight.numel()))[: spread.numel()]
        if weight.device.type == "cpu" and not torch.are_deterministic_algorithms_enabled():
            order = torch.randperm(
                values.numel(), generator=torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "little"))
            )
            values = values[order]
        places = torch.zeros(values.numel(), dtype=torch.long, device=weight.device)
        added = torch.zeros(1, device=weight.device).index_add(0, places, values)
        return super().loss(batch) + (1e-6 * added).square().sum()


def scattering() -> Automatic:
    torch.manual_seed(1)
    return Scattering({**DEFAULTS, "block": "dense"})


def test_index_add_is_reported_with_the_switch_that_makes_it_exact(
    make_run: Callable[..., Run], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(delay=0.0)
    run.deterministic = False
    with caplog.at_level(logging.WARNING):
        run.interrupted(net=scattering())
        run.fit(net=scattering())
    assert verified(run) == [False]
    assert "torch.use_deterministic_algorithms(True)" in caplog.text


def test_index_add_is_exact_with_the_switch(make_run: Callable[..., Run]) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    run = make_run(delay=0.0)
    run.interrupted(net=scattering())
    assert equal(run.fit(net=scattering()), run.twin(net=scattering()))
    assert verified(run) == [True]
