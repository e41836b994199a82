"""Backward passes without chosen weight gradients: the other gradients keep their bits, and so does every output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moetion_lightning.core.skipped_gradients import SkippedGradients

CHECKPOINTING = [None, "plain", "reentrant"]


class Net(nn.Module):
    """Its second product is folded into one matrix product only where the weight wants a gradient."""

    def __init__(self, recompute: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 300)
        self.weight = nn.Parameter(torch.randn(300, 300) / 17)
        self.norm = nn.LayerNorm(300)
        self.out = nn.Linear(300, 2)
        self.recompute = recompute

    def body(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x.transpose(0, 1) @ self.weight))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.recompute is None:
            return self.body(x)
        out: Tensor = checkpoint(self.body, x, use_reentrant=self.recompute == "reentrant")
        return out


def gradients(net: nn.Module, *skipped: str) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Output and gradients of one pass."""
    skip, parameters = SkippedGradients(), dict(net.named_parameters())
    original = torch.autograd.backward
    skip.choose(parameters[name] for name in skipped)
    try:
        out = net(torch.arange(64).remainder(10).reshape(2, 32))
        out.square().sum().backward()
    finally:
        skip.choose(())
    assert torch.autograd.backward is original
    return out.detach(), {name: parameter.grad for name, parameter in parameters.items()}


@pytest.mark.parametrize("recompute", CHECKPOINTING)
def test_what_is_not_skipped_keeps_its_bits(recompute: str | None) -> None:
    wanted_out, wanted = gradients(Net(recompute))
    out, found = gradients(Net(recompute), "embed.weight", "weight")
    assert torch.equal(out, wanted_out)
    kept = {name for name, gradient in found.items() if gradient is not None}
    # Reentrant checkpointing refuses to leave anything out: then all is computed.
    assert kept == set(wanted) - (set() if recompute == "reentrant" else {"embed.weight", "weight"})
    for name in kept:
        gradient, other = found[name], wanted[name]
        assert gradient is not None
        assert other is not None
        assert torch.equal(gradient, other), name


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", [None, "reentrant"])
def test_why_requires_grad_is_left_alone(recompute: str | None) -> None:
    """Other kernels run without it, which round in another way; and reentrant checkpointing gives no gradient."""
    net, ids = Net(recompute), torch.arange(64).remainder(10).reshape(2, 32)
    with Operations() as trained:
        net(ids)
    net.embed.weight.requires_grad_(False)
    net.weight.requires_grad_(False)
    with Operations() as frozen:
        out = net(ids)
    assert ("aten::bmm" in frozen.names) != ("aten::bmm" in trained.names) or recompute == "reentrant"
    assert out.requires_grad == (recompute is None)


class Hidden(torch.autograd.Function):
    """Runs a module that the graph does not show, as reversible networks do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            out: Tensor = module(x)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ctx.module(x).backward(grads[0])
        return x.grad, None


class Reversible(nn.Module):
    def __init__(self, *, scaled: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 4)
        self.scale = nn.Parameter(torch.ones(4)) if scaled else None
        self.inner = nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        out: Tensor = Hidden.apply(x if self.scale is None else x * self.scale, self.inner)
        return out


@pytest.mark.parametrize("scaled", [False, True])
def test_a_custom_function_runs_even_if_all_before_it_is_skipped(scaled: bool) -> None:
    _, wanted = gradients(Reversible(scaled=scaled))
    _, found = gradients(Reversible(scaled=scaled), "embed.weight")
    for name in ("inner.weight", "inner.bias"):
        gradient, other = found[name], wanted[name]
        assert gradient is not None
        assert other is not None
        assert torch.equal(gradient, other)
    assert (found["embed.weight"] is None) == scaled


def test_a_pass_of_which_all_would_be_skipped_is_whole() -> None:
    net = nn.Embedding(10, 4)
    _, found = gradients(net, "weight")
    assert found["weight"] is not None


def test_a_leaf_that_is_a_root_gets_its_gradient() -> None:
    net, skip, leaf = nn.Linear(4, 4), SkippedGradients(), torch.ones(4, requires_grad=True)
    skip.choose([net.weight])
    try:
        torch.autograd.backward([leaf, net(torch.ones(4))], [torch.ones(4), torch.ones(4)])
    finally:
        skip.choose(())
    assert leaf.grad is not None
    assert net.weight.grad is None
    assert net.bias.grad is not None


def test_calls_that_say_what_they_want_get_it() -> None:
    net, skip = nn.Linear(4, 4), SkippedGradients()
    skip.choose([net.weight])
    try:
        net(torch.ones(2, 4)).sum().backward(inputs=[net.weight])
        assert net.weight.grad is not None
        (gradient,) = torch.autograd.grad(net(torch.ones(2, 4)).sum(), [net.weight])
        assert torch.equal(gradient, net.weight.grad)
    finally:
        skip.choose(())
