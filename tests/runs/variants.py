"""Trainings that do something unusual to weights, gradients, generators or metrics; most were once captured wrongly."""

from __future__ import annotations

import copy
import os
import random
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torchmetrics
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn

from moetion_lightning.testing.compare import flatten_state, write_state
from tests.runs.models import Automatic


class History(pl.Callback):
    """Writes the state after each step, and the one that the first forward of a process finds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._process = 0  # a restart puts attributes back: they cannot tell a new process

    def _write(self, name: str, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        tensors, scalars = flatten_state(module, trainer.optimizers)
        write_state(self._path / f"{name}.safetensors", tensors, scalars)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        def write(*args: Any) -> None:  # other callbacks' hooks of the same name have run, too
            handle.remove()
            self._write("found", trainer, module)

        if self._process != os.getpid():
            handle = module.body.register_forward_pre_hook(write)
        self._process = os.getpid()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        self._write(f"{trainer.global_step:04d}", trainer, module)


class Teacher(Automatic):
    """A moving average of the weights, frozen and written to behind autograd's back."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.teacher = copy.deepcopy(self.body).requires_grad_(False)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(batch["tokens"]).float()
        return super().loss(batch) + 0.1 * (self.body(batch["tokens"]).float() - wanted).pow(2).mean()

    def on_train_batch_end(self, *args: Any) -> None:
        for student, teacher in zip(self.body.parameters(), self.teacher.parameters()):
            teacher.data.mul_(0.9).add_(student.data, alpha=0.1)


class WeightNorm(Automatic):
    """Reads the weights in full when a batch ends; the next loss depends on them."""

    norm = 0.0

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return super().loss(batch) * (1 + 1e-3 * self.norm)

    def on_train_batch_end(self, *args: Any) -> None:
        self.norm = float(sum(p.detach().pow(2).sum() for p in self.parameters()))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["norm"] = self.norm

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.norm = checkpoint["norm"]


class LatePenalty(Automatic):
    """A penalty on the full-precision weights that begins after windows were captured without it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.global_step >= 6:
            loss = loss + 0.05 * sum(p.float().pow(2).sum() for p in self.body.blocks.parameters())
        return loss


class Unfreezing(Automatic):
    """Experts begin to train in epoch 1."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.body.blocks.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.body.blocks.requires_grad_(True)


class FreezingForAnEpoch(Automatic):
    """Experts do not train in epoch 1; the optimizer keeps their state until they train again."""

    def on_train_epoch_start(self) -> None:
        self.body.blocks.requires_grad_(self.current_epoch != 1)


class OnlyTrainable(Automatic):
    """The optimizer begins with the parameters that train; the callback ``finetuning`` adds the others."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.spec["lr"])


class UnfreezeBlocks(BaseFinetuning):
    """Epoch 1: the experts get a parameter group of their own."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.body.blocks)

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.make_trainable(pl_module.body.blocks)
            optimizer.add_param_group(
                {"params": list(pl_module.body.blocks.parameters()), "lr": 0.01}
            )  # raises if again


class FixedStatistics(Automatic):
    """Batch norm stops learning its statistics in epoch 1."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.body.batch_norm.eval()


class ZeroedGradients(Automatic):
    """Gradients are set to zero, not None: an expert without tokens is still stepped, but only if it had one before."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.rare = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        chosen = self.rare[int(batch["tokens"].sum()) % 4]
        x = self.body.head(chosen(self.body.embed(batch["tokens"]).mean(1)))
        return nn.functional.cross_entropy(self.body(batch["tokens"]).float() + x.float(), batch["target"])

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=False)


class OwnAccumulation(Automatic):
    """Gradients go on from step to step."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        if batch_idx % 3 == 0:
            optimizer.zero_grad()


class OwnGenerator(Automatic):
    """A generator inside a dict."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.tools = {"noise": random.Random(7)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 + self.tools["noise"].random())


class Annealed(nn.Module):
    """Counts its calls in a plain attribute that it puts into its state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, loss: Tensor) -> Tensor:
        self.calls += 1
        return loss * (1 + 1 / self.calls)

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


class ExtraState(Automatic):
    """A submodule with state of its own kind."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.annealed = Annealed()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.annealed(super().training_step(batch, batch_idx))
        return loss


class Lbfgs(Automatic):
    """State that belongs to no single parameter, and a closure that is called several times."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class CountingSGD(torch.optim.SGD):
    """Keeps a count under a name, not under a parameter."""

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        kept = self.state.setdefault("all", {"count": 0})
        count = kept["count"] = kept["count"] + 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-group["lr"] / (1 + 0.1 * count))
        return loss


class CountingOptimizer(Automatic):
    def configure_optimizers(self) -> Any:
        return CountingSGD(self.parameters(), lr=0.2)


class KeyedSGD(torch.optim.SGD):
    """Keeps a count in an attribute, and that under a key of its own in ``state_dict``."""

    count = 0

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        for group in self.param_groups:
            group["lr"] = 0.2 / (1 + 0.1 * self.count)
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        super().load_state_dict({key: value for key, value in state.items() if key != "count"})


class KeyedOptimizer(Automatic):
    def configure_optimizers(self) -> Any:
        return KeyedSGD(self.parameters(), lr=0.2)


class TensorRate(Automatic):
    """The learning rate is a tensor that its scheduler changes in place."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=torch.tensor(0.02), foreach=False)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ShrinkAtStart(Automatic):
    """Changes weights after an iteration's end, while they are being captured."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for parameter in self.parameters():
            parameter.data.mul_(0.99)


class ShrinkInStep(Automatic):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(0.99)
        return super().training_step(batch, batch_idx)


class Toggling(Automatic):
    """Two optimizers in turn, each with the other one's parameters frozen."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.automatic_optimization = False
        self.critic = nn.Linear(32, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        logits = self.body(batch["tokens"]).float()
        loss = nn.functional.cross_entropy(logits, batch["target"]) - 0.1 * self.critic(logits).mean()
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        second_loss = self.critic(self.body(batch["tokens"]).detach().float()).pow(2).mean()
        second.zero_grad()
        self.manual_backward(second_loss)
        second.step()
        self.untoggle_optimizer(second)
        return loss

    def configure_optimizers(self) -> Any:
        critic = torch.optim.SGD(self.critic.parameters(), lr=0.01, momentum=0.9)
        return [torch.optim.AdamW(self.body.parameters(), lr=self.spec["lr"]), critic]


class SilentManual(Automatic):
    """Manual optimization that returns no loss, and calls ``backward`` itself."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.unreturned = self.loss(batch)
        self.backpropagate(self.unreturned)
        optimizer.step()
        self.unreturned = self.unreturned.detach()

    def backpropagate(self, loss: Tensor) -> None:
        loss.backward()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.spec["lr"])


class SilentManualBackward(SilentManual):
    """The same by ``manual_backward``; the loss is changed in place behind it."""

    def backpropagate(self, loss: Tensor) -> None:
        self.manual_backward(loss)
        with torch.no_grad():
            loss.div_(3)


_moments: dict[int, Tensor] = {}  # where nobody looks for state


class HiddenMomentum(torch.optim.SGD):
    """Keeps its momentum in a variable of its module."""

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        with torch.no_grad():
            for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
                moment = _moments.setdefault(id(parameter), torch.zeros_like(parameter))
                parameter.sub_(moment.mul_(0.9).add_(parameter.grad), alpha=0.05)
        return loss


class NormedMomentum(torch.optim.SGD):
    """Divides its momentum by the norm of the whole parameter's: rows depend on each other."""

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        with torch.no_grad():
            for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
                moment = self.state[parameter].setdefault("moment", torch.zeros_like(parameter))
                parameter.sub_(moment.mul_(0.9).add_(parameter.grad) / (moment.norm() + 1), alpha=0.1)
        return loss


class CoupledOptimizer(Automatic):
    def configure_optimizers(self) -> Any:
        return NormedMomentum(self.parameters(), lr=0.1)


class HiddenOptimizer(Automatic):
    def configure_optimizers(self) -> Any:
        return HiddenMomentum(self.parameters(), lr=0.05)


class Metrics(Automatic):
    """Metric objects; some are updated and logged on a few batches only."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=32)
        self.all_losses = torchmetrics.CatMetric()
        self.rare = torchmetrics.MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.accuracy(self.body(batch["tokens"]).float(), batch["target"])
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True, batch_size=4)
        self.all_losses(loss.detach())
        if batch_idx == 1:
            self.rare(loss.detach())
            self.log("rare", self.rare, on_step=False, on_epoch=True)
            self.log("rare_value", loss, on_step=False, on_epoch=True, batch_size=4)
        self.log("largest", loss, on_epoch=True, reduce_fx="max", batch_size=4)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("all_losses", self.all_losses.compute().mean())
        self.all_losses.reset()


class NoisyBackward(Automatic):
    """Kernels that are not deterministic: no two backward passes give the same."""

    def on_after_backward(self) -> None:
        noise = torch.Generator().manual_seed(time.time_ns() % (1 << 60))
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad += 1e-3 * torch.randn(parameter.grad.shape, generator=noise)


class Clamped(Automatic):
    """Weights that are also changed between two steps."""

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            self.body.head.weight.clamp_(-0.2, 0.2)


class ClampedThroughData(Automatic):
    """A few elements of one weight are clamped where no version counter counts."""

    def on_train_batch_end(self, *args: Any) -> None:
        self.body.blocks[0].gate.weight.data.clamp_(-0.3, 0.3)


class MomentsReset(Automatic):
    """What the optimizer keeps is changed by hand, once."""

    def on_train_batch_end(self, *args: Any) -> None:
        if self.global_step == 10:
            for state in self.optimizers().optimizer.state.values():
                state["exp_avg"].zero_()


class OldStyleSGD(torch.optim.Optimizer):
    """Weight decay is added to the gradients themselves, where no version counter counts."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            gradient = parameter.grad.data
            gradient.add_(parameter.data, alpha=0.1)
            parameter.data.add_(gradient, alpha=-0.05)
        return loss


class OldStyle(Automatic):
    def configure_optimizers(self) -> Any:
        return OldStyleSGD(self.parameters())


class Corrupted(Automatic):
    """A fault of the hardware: one element of each part of the optimizer's state changes by itself."""

    def on_train_batch_end(self, *args: Any) -> None:
        if self.global_step == 9:
            for state in self.optimizers().optimizer.state.values():
                state["exp_avg"].data.view(-1)[3] += 2.0**-12


class ZeroedInPlace(Automatic):
    """Gradients are zeroed, never dropped."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)


class OneWithoutTokens(Automatic):
    """Every expert has a gradient, but for one of the last rank in the third step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        spared = self.global_step == 2 and self.global_rank == self.trainer.world_size - 1
        rest = torch.zeros(())
        for block in self.body.blocks:
            block.bias_correction.zero_()
            if spared:
                block.bias_correction[1] = -100.0
            used = [expert for index, expert in enumerate(block.experts) if index != 1 or not spared]
            rest = rest + sum(p.sum() for expert in used for p in expert.parameters())
        return super().training_step(batch, batch_idx) + 0 * rest


MODULES: dict[str, type[Automatic]] = {
    "one-without-tokens": OneWithoutTokens,
    "noisy_backward": NoisyBackward,
    "clamped": Clamped,
    "zeroed_in_place": ZeroedInPlace,
    "corrupted": Corrupted,
    "clamped_through_data": ClampedThroughData,
    "moments_reset": MomentsReset,
    "old_style": OldStyle,
    "teacher": Teacher,
    "weight_norm": WeightNorm,
    "late_penalty": LatePenalty,
    "unfreezing": Unfreezing,
    "freezing": FreezingForAnEpoch,
    "only_trainable": OnlyTrainable,
    "fixed_statistics": FixedStatistics,
    "zeroed_gradients": ZeroedGradients,
    "own_accumulation": OwnAccumulation,
    "own_generator": OwnGenerator,
    "extra_state": ExtraState,
    "lbfgs": Lbfgs,
    "counting_optimizer": CountingOptimizer,
    "keyed_optimizer": KeyedOptimizer,
    "tensor_rate": TensorRate,
    "shrink_at_start": ShrinkAtStart,
    "shrink_in_step": ShrinkInStep,
    "toggling": Toggling,
    "metrics": Metrics,
    "silent_manual": SilentManual,
    "silent_manual_backward": SilentManualBackward,
    "hidden_optimizer": HiddenOptimizer,
    "coupled_optimizer": CoupledOptimizer,
}
