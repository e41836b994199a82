"""One hand-written loop, described by plain data: plain PyTorch, Fabric or Accelerate. Runs in a child process.

Without ``capture`` the loop is the ordinary one of its framework, with nothing of this package in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401 (once, in the process that forks)
import lightning.fabric  # noqa: F401
import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from moetion_lightning.core.log_policy import GradientLogPolicy
from moetion_lightning.core.policy import DensePolicy, PartialExpertsPolicy
from moetion_lightning.testing.compare import flatten_state, write_state
from moetion_lightning.testing.faults import KillAt
from tests.runs.commits import kill_when_committed
from tests.runs.data import Samples, make_loader
from tests.runs.models import Body, make_optimizer
from tests.runs.optimizers import MADE
from tests.runs.ranks import suffix

DEFAULTS: dict[str, Any] = {
    "framework": "plain",
    "form": "flat",  # or "epochs": a loop over epochs, with validation and a scheduler at each one's end
    "block": "list",
    "optimizer": "adamw",
    "second_optimizer": False,
    "lr": 0.02,
    "precision": "32",
    "overflow_at": 0,
    "accumulate": 1,
    "clip": 1.0,
    "zero_grad": "after",  # the step; or "before" the backward, "in_place", or "never": gradients add up
    "average": False,
    "counting": False,  # the module keeps what its forward does in plain attributes
    "loader": "shuffle",
    "skip_batches": [],
    "augment": False,
    "samples": 28,
    "batch_size": 4,
    "epochs": 3,
    "policy": "sparse",
    "policy_args": {"window": 4},
    "persist": False,
    "capture": True,
    "strategy": "",
    "accelerate_args": {},
    "evaluate": "",  # kind of a second loader, gone through at each epoch's end
    "evaluate_augment": False,
    "break": "",
    "kill": None,
    "seed": 1,
    "job_id": "job",
    "ranks": 1,
}
POLICIES: dict[str, Callable[..., Any]] = {
    "dense": DensePolicy,
    "partial": PartialExpertsPolicy,
    "gradient_log": GradientLogPolicy,
}


class Counter:
    """What a user might keep beside the model."""

    def __init__(self) -> None:
        self.tokens = 0

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens = state["tokens"]


class Counting(Body):
    """Its outputs depend on how often it was called, and on a list of what it gave."""

    def __init__(self, block: str) -> None:
        super().__init__(block)
        self.calls = 0
        self.norms_seen: list[torch.Tensor] = []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = super().forward(tokens)
        if self.training:
            self.calls += 1
            self.norms_seen.append(result.detach().float().norm())
            del self.norms_seen[:-40]
        return result * (1 + 0.01 * (self.calls % 9) + 0.001 * float(sum(self.norms_seen)))


@dataclass
class Bench:
    """What the loop works with."""

    spec: dict[str, Any]
    out: Path
    module: nn.Module
    model: Any
    optimizers: list[Any]
    scheduler: Any
    loader: Any
    raw_optimizers: list[torch.optim.Optimizer]
    scaler: Any = None
    framework: Any = None
    counter: Counter = field(default_factory=Counter)
    noise: random.Random = field(default_factory=lambda: random.Random(11))
    average: Any = None
    evaluation: Any = ()
    run: Any = None

    def kill(self, hook: str, step: int) -> None:
        kill = self.spec["kill"]
        if kill and kill.get("hook") == hook and kill["step"] == step:
            kill_when_committed(kill, self.out / f"events{self.spec['suffix']}.jsonl")

    def write(self, epoch: int, batch: int, **values: Any) -> None:
        drawn = {"python": random.random(), "numpy": float(np.random.rand()), "torch": float(torch.rand(()))}
        record = {"epoch": epoch, "batch": batch, **values, **drawn, "noise": self.noise.random()}
        path = self.out / f"steps{self.spec['suffix']}.jsonl"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(descriptor, (json.dumps(record) + "\n").encode())
        os.close(descriptor)

    @property
    def batches(self) -> int:
        per_rank = self.spec["batch_size"] * self.spec["ranks"]
        return -(-self.spec["samples"] // per_rank)


def settings(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    given: dict[str, Any] = {
        "memory_dir": spec["memory_dir"],
        "job_id": spec["job_id"],
        "events_path": str(out / "events.jsonl"),
        "skip_batches": spec["skip_batches"],
    }
    if spec["persist"]:
        given["persist_dir"] = str(out / "persist")
    if spec["policy"] in ("sparse", "gradient_log"):
        given |= {**spec["policy_args"], "policy": spec["policy"]}
    else:
        given["policy"] = POLICIES[spec["policy"]](**spec["policy_args"])
    kill = spec["kill"]
    if kill and "event" in kill:
        given["sinks"] = [KillAt(kill["event"], kill.get("count", 1), kill.get("copies", 0), **kill.get("fields", {}))]
    return given


def loss_of(bench: Bench, batch: Any, step: int) -> Any:
    logits = bench.model(batch["tokens"])
    loss = torch.nn.functional.cross_entropy(logits.float(), batch["target"])
    if bench.spec["overflow_at"] and step == bench.spec["overflow_at"]:
        loss = loss * float("inf")
    return loss


def record(bench: Bench, step: int, batch: Any, loss: Any) -> None:
    bench.counter.tokens += batch["tokens"].numel()
    bench.write(
        step // bench.batches,
        step % bench.batches,
        step=step,
        loss=float(loss.detach()).hex(),
        ids=batch["sample_id"].tolist(),
        lr=[float(g["lr"]).hex() for o in bench.raw_optimizers for g in o.param_groups],
        tokens=bench.counter.tokens,
    )


def ordinary_epochs(count: int) -> Iterator[int]:
    yield from range(count)


def ordinary_steps(bench: Bench) -> Callable[..., Iterator[tuple[int, Any]]]:
    taken = iter(range(10**9))

    def steps(loader: Any, epochs: int = 1) -> Iterator[tuple[int, Any]]:
        for epoch in range(epochs):
            sampler = getattr(loader, "sampler", None)
            if epochs > 1 and bench.spec["framework"] == "plain" and hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            for batch in loader:
                step = next(taken)
                if step not in bench.spec["skip_batches"]:
                    yield step, batch

    return steps


def train(bench: Bench, one_batch: Callable[[int, Any], None]) -> None:
    spec = bench.spec
    steps = bench.run.steps if bench.run is not None else ordinary_steps(bench)
    epochs = bench.run.epochs if bench.run is not None else ordinary_epochs
    if spec["form"] == "flat":
        for step, batch in steps(bench.loader, epochs=spec["epochs"]):
            one_batch(step, batch)
            bench.kill("batch_end", step)
    else:
        for epoch in epochs(spec["epochs"]):
            bench.module.train()
            for step, batch in steps(bench.loader):
                one_batch(step, batch)
                bench.kill("batch_end", step)
            bench.kill("epoch_end", epoch)
            validate(bench, epoch)
            bench.scheduler.step()
    bench.kill("end", 0)


def validate(bench: Bench, epoch: int) -> None:
    bench.module.eval()
    with torch.no_grad():
        tokens = torch.randint(0, 32, (4, 5))
        value = bench.module(tokens).float().sum()
    seen = [[batch["sample_id"].tolist(), int(batch["tokens"].sum())] for batch in bench.evaluation]
    bench.write(epoch, 1000, value=float(value).hex(), seen=seen)


# --- frameworks ------------------------------------------------------------------------------------------------------


def plain_batch(bench: Bench) -> Callable[[int, Any], None]:
    spec = bench.spec
    cast = spec["precision"] in ("bf16", "fp16")
    dtype = torch.bfloat16 if spec["precision"] == "bf16" else torch.float16

    def one_batch(step: int, batch: Any) -> None:
        last = (step + 1) % spec["accumulate"] == 0
        local = isinstance(bench.model, DistributedDataParallel) and not last
        with bench.model.no_sync() if local else contextlib.nullcontext():
            with torch.autocast("cpu", dtype, enabled=cast):
                loss = loss_of(bench, batch, step)
            if spec["zero_grad"] == "before" and step % spec["accumulate"] == 0:
                for optimizer in bench.optimizers:
                    optimizer.zero_grad()
            scaled = loss / spec["accumulate"]
            (bench.scaler.scale(scaled) if bench.scaler is not None else scaled).backward()
        bench.kill("backward", step)
        if last:
            plain_update(bench, step)
        if bench.run is not None:
            bench.run.record_loss(loss)
        record(bench, step, batch, loss)

    return one_batch


def plain_update(bench: Bench, step: int) -> None:
    spec = bench.spec
    chosen = bench.optimizers if step % 2 or len(bench.optimizers) == 1 else bench.optimizers[:1]
    for optimizer in chosen:
        if bench.scaler is not None:
            bench.scaler.unscale_(optimizer)
        if spec["clip"]:
            own = [p for g in optimizer.param_groups for p in g["params"]]
            torch.nn.utils.clip_grad_norm_(own, spec["clip"])
        bench.kill("before_step", step)
        if bench.scaler is not None:
            bench.scaler.step(optimizer)
        else:
            optimizer.step()
    if bench.scaler is not None:
        bench.scaler.update()
    if spec["form"] == "flat":
        bench.scheduler.step()
    if bench.average is not None:
        bench.average.update_parameters(bench.module)
    if spec["zero_grad"] in ("after", "in_place"):
        for optimizer in chosen:
            optimizer.zero_grad(set_to_none=spec["zero_grad"] == "after")


def fabric_batch(bench: Bench) -> Callable[[int, Any], None]:
    spec, fabric = bench.spec, bench.framework

    def one_batch(step: int, batch: Any) -> None:
        last = (step + 1) % spec["accumulate"] == 0
        with fabric.no_backward_sync(bench.model, enabled=not last and spec["ranks"] > 1):
            loss = loss_of(bench, batch, step)
            fabric.backward(loss / spec["accumulate"])
        bench.kill("backward", step)
        if last:
            if spec["clip"]:
                fabric.clip_gradients(bench.model, bench.optimizers[0], max_norm=spec["clip"], error_if_nonfinite=False)
            bench.kill("before_step", step)
            bench.optimizers[0].step()
            bench.optimizers[0].zero_grad()
            if spec["form"] == "flat":
                bench.scheduler.step()
        record(bench, step, batch, loss)

    return one_batch


def accelerate_batch(bench: Bench) -> Callable[[int, Any], None]:
    spec, accelerator = bench.spec, bench.framework

    def one_batch(step: int, batch: Any) -> None:
        with accelerator.accumulate(bench.model):
            loss = loss_of(bench, batch, step)
            accelerator.backward(loss)
            bench.kill("backward", step)
            if accelerator.sync_gradients and spec["clip"]:
                accelerator.clip_grad_norm_(bench.model.parameters(), spec["clip"])
            bench.kill("before_step", step)
            bench.optimizers[0].step()
            if spec["form"] == "flat":
                bench.scheduler.step()
            bench.optimizers[0].zero_grad()
        record(bench, step, batch, loss)

    return one_batch


def _pieces(spec: dict[str, Any]) -> tuple[nn.Module, list[torch.optim.Optimizer], Any, Any]:
    module = Counting(spec["block"]) if spec["counting"] else Body(spec["block"])
    parameters = [p for p in module.parameters() if p.requires_grad]
    if spec["second_optimizer"]:
        head = [p for name, p in module.named_parameters() if name.startswith("norms")]
        rest = [p for p in parameters if not any(p is q for q in head)]
        optimizers = [make_optimizer(spec["optimizer"], rest, spec["lr"]), torch.optim.SGD(head, 0.01, momentum=0.9)]
    elif spec["optimizer"] in MADE:
        optimizers = [MADE[spec["optimizer"]](parameters)]
    else:
        optimizers = [make_optimizer(spec["optimizer"], parameters, spec["lr"])]
    if spec["form"] == "flat":
        scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizers[0], lambda s: min(1.0, (s + 1) / 6))
    else:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizers[0], 1, gamma=0.7)
    loader = make_loader(spec["loader"], Samples(spec["samples"], augment=spec["augment"]), spec["batch_size"])
    return module, optimizers, scheduler, loader


def _evaluation(spec: dict[str, Any]) -> Any:
    return make_loader(spec["evaluate"], Samples(spec["samples"], augment=spec["evaluate_augment"]), spec["batch_size"])


def _plain(spec: dict[str, Any], out: Path) -> tuple[Bench, Callable[[int, Any], None]]:
    if spec["ranks"] > 1:
        torch.distributed.init_process_group("gloo")
        torch.manual_seed(spec["seed"])
    module, optimizers, scheduler, loader = _pieces(spec)
    model: Any = module
    if spec["strategy"] == "ddp":
        model = DistributedDataParallel(module, find_unused_parameters=spec["block"] == "list")
    elif spec["strategy"] == "fsdp2":
        optimizers = _sharded(spec, module)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizers[0], lambda s: min(1.0, (s + 1) / 6))
    if spec["ranks"] > 1:
        sampler = torch.utils.data.DistributedSampler(loader.dataset, shuffle=True, seed=5)
        loader = torch.utils.data.DataLoader(loader.dataset, batch_size=spec["batch_size"], sampler=sampler)
        _seed(spec["seed"] + 1000 * spec["rank"])
    bench = Bench(spec, out, module, model, optimizers, scheduler, loader, optimizers)
    if spec["evaluate"]:
        bench.evaluation = _evaluation(spec)
    if spec["precision"] == "fp16":
        bench.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    if spec["average"]:
        bench.average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    if spec["capture"]:
        from moetion_lightning.integrations import SparseCheckpointing

        bench.run = SparseCheckpointing(
            model, optimizers, scheduler=scheduler, scaler=bench.scaler, **settings(spec, out)
        )
    return bench, plain_batch(bench)


def _sharded(spec: dict[str, Any], module: Any) -> list[torch.optim.Optimizer]:
    from torch.distributed.fsdp import fully_shard

    for block in module.blocks:
        fully_shard(block)
    fully_shard(module)
    module.set_reduce_scatter_unused_params(True)
    return [make_optimizer(spec["optimizer"], [p for p in module.parameters() if p.requires_grad], spec["lr"])]


def _fabric(spec: dict[str, Any], out: Path) -> tuple[Bench, Callable[[int, Any], None]]:
    from lightning.fabric import Fabric
    from lightning.fabric.plugins import MixedPrecision
    from lightning.fabric.strategies import DDPStrategy

    from moetion_lightning.integrations import FabricCheckpointing

    callback = FabricCheckpointing(**settings(spec, out)) if spec["capture"] else None
    options: dict[str, Any] = {"precision": {"32": "32-true", "bf16": "bf16-mixed"}.get(spec["precision"])}
    if spec["precision"] == "fp16":
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    if spec["ranks"] > 1:
        options["strategy"] = DDPStrategy(find_unused_parameters=spec["block"] == "list", process_group_backend="gloo")
    fabric = Fabric(accelerator="cpu", devices=spec["ranks"], callbacks=callback, **options)
    fabric.launch()
    torch.manual_seed(spec["seed"])
    module, optimizers, scheduler, loader = _pieces(spec)
    model, optimizer = fabric.setup(module, optimizers[0])
    loader = fabric.setup_dataloaders(loader)
    if spec["ranks"] > 1:
        _seed(spec["seed"] + 1000 * spec["rank"])
    bench = Bench(spec, out, module, model, [optimizer], scheduler, loader, optimizers, framework=fabric)
    if spec["evaluate"]:
        bench.evaluation = fabric.setup_dataloaders(_evaluation(spec))
    if callback is not None:
        callback.track(optimizer, scheduler=scheduler)
        bench.run = callback
    return bench, fabric_batch(bench)


def _accelerate(spec: dict[str, Any], out: Path) -> tuple[Bench, Callable[[int, Any], None]]:
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.utils import DistributedDataParallelKwargs

    from moetion_lightning.integrations import attach

    handlers = [DistributedDataParallelKwargs(find_unused_parameters=spec["block"] == "list")]
    accelerator = Accelerator(
        cpu=True,
        mixed_precision="bf16" if spec["precision"] == "bf16" else "no",
        gradient_accumulation_steps=spec["accumulate"],
        kwargs_handlers=handlers if spec["ranks"] > 1 else None,
        dataloader_config=DataLoaderConfiguration(**spec["accelerate_args"]),
        step_scheduler_with_optimizer=spec["form"] == "flat",
    )
    torch.manual_seed(spec["seed"])
    module, optimizers, scheduler, loader = _pieces(spec)
    model, optimizer, scheduler, loader = accelerator.prepare(module, optimizers[0], scheduler, loader)
    if spec["ranks"] > 1:
        _seed(spec["seed"] + 1000 * spec["rank"])
    bench = Bench(spec, out, module, model, [optimizer], scheduler, loader, optimizers, framework=accelerator)
    if spec["evaluate"]:
        bench.evaluation = accelerator.prepare(_evaluation(spec))
    if spec["capture"]:
        bench.run = attach(accelerator, **settings(spec, out))
    return bench, accelerate_batch(bench)


MAKERS = {"plain": _plain, "fabric": _fabric, "accelerate": _accelerate}


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def run(given: dict[str, Any]) -> None:
    spec = {**DEFAULTS, **given}
    out = Path(spec["out"])
    rank = int(os.environ.get("RANK", "0"))
    spec |= {"rank": rank, "suffix": suffix(rank, spec["ranks"])}
    if spec["kill"] and spec["kill"].get("rank", 0) != rank:
        spec["kill"] = None
    if spec["break"]:
        from tests.runs import loop_sabotage

        loop_sabotage.apply(spec["break"])
    _seed(spec["seed"])
    bench, one_batch = MAKERS[spec["framework"]](spec, out)
    if bench.run is not None:
        bench.run.register(counter=bench.counter, noise=bench.noise)
        if bench.average is not None:
            bench.run.register(average=bench.average)
    train(bench, one_batch)
    tensors, scalars = flatten_state(bench.module, bench.raw_optimizers)
    if bench.average is not None:
        tensors |= {f"average:{name}": value for name, value in bench.average.state_dict().items()}
    scalars["scheduler"] = repr(bench.scheduler.state_dict())
    scalars["scaler"] = repr(bench.scaler.state_dict()) if bench.scaler is not None else ""
    scalars["tokens"] = bench.counter.tokens
    write_state(out / f"final{spec['suffix']}.safetensors", tensors, scalars)
    if bench.run is not None:
        bench.kill("before_close", 0)
        bench.run.close()
    if spec["ranks"] > 1:
        torch.distributed.barrier()  # rank 0 serves the store: it is the last one to need it
        torch.distributed.destroy_process_group()
