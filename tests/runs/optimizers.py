"""Optimizers as people write them: inside each other, without torch's hooks, with state of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.runs.models import Automatic

LR = 0.02


class SharpnessAware(Optimizer):
    """Its own state holds no moments: those are its base optimizer's, whose groups it shares."""

    def __init__(self, parameters: Any, rho: float = 0.05) -> None:
        super().__init__(parameters, {"rho": rho})
        self.base_optimizer = torch.optim.AdamW(self.param_groups, lr=LR)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            self.state[p]["old_p"] = p.detach().clone()
            p.add_(p.grad, alpha=float(0.05 / (norm + 1e-12)))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p, state in self.state.items():
            if p.grad is not None:
                p.copy_(state["old_p"])
        self.base_optimizer.step()
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()
        return loss


class Lookahead:
    """No optimizer of torch: shows the inner one's groups and state, keeps slow weights and a counter."""

    def __init__(self, inner: Optimizer, *, by_parameter: bool) -> None:
        self.inner, self.count = inner, 0
        self.param_groups, self.defaults, self.state = inner.param_groups, inner.defaults, inner.state
        parameters = [p for group in inner.param_groups for p in group["params"]]
        copies = [p.detach().clone() for p in parameters]
        self.slow: Any = dict(zip(parameters, copies)) if by_parameter else [copies]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.inner.step(closure)
        self.count += 1
        if self.count % 3 == 0:
            parameters = [p for group in self.param_groups for p in group["params"]]
            slow = self.slow.values() if isinstance(self.slow, dict) else self.slow[0]
            for p, q in zip(parameters, slow):
                q.add_(p - q, alpha=0.5)
                p.copy_(q)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


class LookaheadWithoutInit(Lookahead, Optimizer):
    """An optimizer of torch by its class only: its base's ``__init__`` never ran."""


class TwoInOne(Optimizer):
    """Its inner optimizers are in containers."""

    def __init__(self, first: Optimizer, second: Optimizer) -> None:
        super().__init__([*first.param_groups, *second.param_groups], {})
        self.parts = {"matrices": first, "others": [second]}

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        self.parts["matrices"].step()  # type: ignore[attr-defined]
        self.parts["others"][0].step()  # type: ignore[index]
        return loss


class Handmade:
    """Nothing of torch: momentum in a table made in the first step, a rate that falls with a counter."""

    def __init__(self, parameters: Any) -> None:
        self.param_groups = [{"params": list(parameters), "lr": 0.05}]
        self.defaults: dict[str, Any] = {}
        self.state: dict[Any, Any] = {}
        self.momentum: dict[Tensor, Tensor] = {}
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure()
        self.count += 1
        for p in self.param_groups[0]["params"]:  # type: ignore[attr-defined]
            if p.grad is not None:
                kept = self.momentum.setdefault(p, torch.zeros_like(p))
                kept.mul_(0.9).add_(p.grad)
                p.sub_(kept, alpha=0.05 / (1 + 0.1 * self.count))
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.param_groups[0]["params"]:  # type: ignore[attr-defined]
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class PerParameter(Optimizer):
    """Calls ``update`` for each parameter that has a gradient."""

    def __init__(self, parameters: Any, **settings: Any) -> None:
        super().__init__(parameters, {"lr": LR, **settings})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            self.begin(group)
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, self.state[p], group)
        return loss

    def begin(self, group: dict[str, Any]) -> None:
        pass

    def update(self, p: Tensor, gradient: Tensor, state: Any, group: dict[str, Any]) -> None:
        raise NotImplementedError


class ScheduleFree(PerParameter):
    """Counts in its groups; a sum of weights there, too."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, k=0, weight_sum=0.0)

    def begin(self, group: dict[str, Any]) -> None:
        group["k"] += 1
        group["weight_sum"] += group["k"] * group["lr"] ** 2

    def update(self, p: Tensor, gradient: Tensor, state: Any, group: dict[str, Any]) -> None:
        if not state:
            state["z"] = p.clone()
        state["z"].sub_(gradient, alpha=group["lr"])
        p.lerp_(state["z"], group["k"] * group["lr"] ** 2 / group["weight_sum"])


class Counting(torch.optim.AdamW):
    """A step count in its groups, as fused implementations keep it."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        return super().step(closure)


class Preconditioned(PerParameter):
    """Lists with holes, matrices that lie transposed in memory."""

    def update(self, p: Tensor, gradient: Tensor, state: Any, group: dict[str, Any]) -> None:
        if not state:
            state.update(step=0, factors=[torch.eye(d) if d < 20 else None for d in p.shape], mean=torch.zeros_like(p))
        state["step"] += 1
        for index, factor in enumerate(state["factors"]):
            if factor is not None:
                others = [i for i in range(p.dim()) if i != index]
                factor.lerp_(torch.tensordot(gradient, gradient, dims=(others, others)), 0.1)
        state["bases"] = [None if f is None else torch.linalg.qr(f)[0].t() for f in state["factors"]]
        state["mean"].lerp_(gradient, 0.3)
        update = state["mean"]
        for basis in state["bases"]:
            turned = torch.eye(update.shape[0]) if basis is None else basis @ basis.t()
            update = torch.tensordot(update, turned, dims=([0], [0]))
        p.sub_(update, alpha=group["lr"])


class Projection:
    """An ordinary object in an optimizer's state."""

    def __init__(self) -> None:
        self.basis: Tensor | None = None
        self.uses = 0

    def __repr__(self) -> str:
        return f"{self.uses} {None if self.basis is None else self.basis.tolist()}"


class Projecting(PerParameter):
    def update(self, p: Tensor, gradient: Tensor, state: Any, group: dict[str, Any]) -> None:
        if p.dim() != 2:
            p.sub_(gradient, alpha=group["lr"])
            return
        projection = state.setdefault("projection", Projection())
        if projection.uses % 2 == 0:
            projection.basis = torch.linalg.qr(gradient)[0]
        projection.uses += 1
        p.sub_(projection.basis @ (projection.basis.t() @ gradient), alpha=group["lr"])


class Quantised(Tensor):
    """8-bit codes and a scale: a subclass without memory of its own."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Quantised:
        make: Any = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        return make(cls, codes.shape, dtype=torch.float32, device=codes.device)  # type: ignore[no-any-return]

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def of(cls, value: Tensor) -> Quantised:
        return cls(torch.zeros(value.shape, dtype=torch.int8), torch.ones(())).put(value)

    def put(self, value: Tensor) -> Quantised:
        self.scale.copy_(value.abs().max().clamp_min(1e-9) / 127)
        self.codes.copy_((value / self.scale).round())
        return self

    def value(self) -> Tensor:
        return self.codes.float() * self.scale

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale"], [torch.int8, self.shape]

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, context: Any, size: Any, stride: Any) -> Quantised:
        assert context == [torch.int8, size]
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        if function is torch.ops.aten.copy_.default:
            args[0].codes.copy_(args[1].codes)
            args[0].scale.copy_(args[1].scale)
            return args[0]
        raise NotImplementedError(str(function))


class Rounding(PerParameter):
    """Draws from a generator of its own."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        self.noise = torch.Generator().manual_seed(9)

    def update(self, p: Tensor, gradient: Tensor, state: Any, group: dict[str, Any]) -> None:
        p.sub_(gradient + 0.01 * torch.randn(p.shape, generator=self.noise), alpha=group["lr"])


class EightBit(PerParameter):
    def update(self, p: Tensor, gradient: Tensor, state: Any, group: dict[str, Any]) -> None:
        if not state:
            state["mean"] = Quantised.of(torch.zeros_like(p))
        mean = state["mean"].value().lerp(gradient, 0.2)
        state["mean"].put(mean)
        p.sub_(mean.sign(), alpha=1e-3)


class WithOptimizer(Automatic):
    """Any of these optimizers."""

    def configure_optimizers(self) -> Any:
        return MADE[self.spec["optimizer"]](list(self.parameters()))


class TwoStep(WithOptimizer):
    """Never calls the optimizer's own ``step``."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__({**spec, "optimizer": "sharpness_aware"})
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        optimizer = self.optimizers().optimizer
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.first_step()
        self.manual_backward(self.loss(batch))
        progress.increment_ready()
        optimizer.second_step()
        progress.increment_completed()
        return loss


class InTurn(Automatic):
    """Two optimizers over all parameters, of which one steps at a time."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first, second = self.optimizers()
        optimizer = first if self.global_step % 3 else second
        loss = self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), LR), torch.optim.SGD(self.parameters(), LR, momentum=0.9)


class OneAfterTheOther(InTurn):
    """Two optimizers over all parameters, with a forward in between."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for optimizer in self.optimizers():
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss


class QuantisedFrozen(Automatic):
    """Two frozen weights of one shape, of a tensor subclass; one of them changes."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        noise = torch.Generator().manual_seed(5)
        for name in ("first", "second"):
            weight = Quantised.of(torch.randn(32, 32, generator=noise))
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.body(batch["tokens"]).float()
        logits = logits + 0.1 * (logits @ self.first.value()) @ self.second.value()
        return nn.functional.cross_entropy(logits, batch["target"])

    def on_train_batch_end(self, *args: Any) -> None:
        self.first.scale.mul_(0.95)  # frozen, but no constant


class SparseGradients(Automatic):
    """An embedding with sparse gradients and an optimizer for it."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.automatic_optimization = False
        self.extra = nn.Embedding(32, 32, sparse=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.body(batch["tokens"]).float() + self.extra(batch["tokens"]).mean(1)
        loss = nn.functional.cross_entropy(logits, batch["target"])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SparseAdam(self.extra.parameters(), LR), torch.optim.AdamW(self.body.parameters(), LR)


MADE: dict[str, Callable[[list[Any]], Any]] = {
    "sharpness_aware": SharpnessAware,
    "lookahead": lambda p: Lookahead(torch.optim.AdamW(p, LR), by_parameter=True),
    "lookahead_lists": lambda p: Lookahead(torch.optim.AdamW(p, LR), by_parameter=False),
    "lookahead_without_init": lambda p: LookaheadWithoutInit(torch.optim.AdamW(p, LR), by_parameter=True),
    "two_in_one": lambda p: TwoInOne(
        torch.optim.AdamW([x for x in p if x.dim() > 1], LR),
        torch.optim.SGD([x for x in p if x.dim() <= 1], LR, momentum=0.9),
    ),
    "handmade": Handmade,
    "schedule_free": ScheduleFree,
    "counting": lambda p: Counting(p, LR),
    "preconditioned": Preconditioned,
    "projecting": Projecting,
    "eight_bit": EightBit,
    "rounding": Rounding,
}
MODULES: dict[str, type[pl.LightningModule]] = {
    "with_optimizer": WithOptimizer,
    "two_step": TwoStep,
    "in_turn": InTurn,
    "one_after_the_other": OneAfterTheOther,
    "quantised_frozen": QuantisedFrozen,
    "sparse_gradients": SparseGradients,
}
