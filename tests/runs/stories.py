"""Scripts as people write them: sweeps, phases, folds, notebooks, arrays of jobs. Each runs in a process of its own.

A story is a function of a :class:`Script`. With ``capture`` off it is the twin that our callback never touched. What a
script has learned lies in the files that it writes: every step's loss and sample ids, and final states.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.utils.tensorboard  # what the default Trainer imports, once for all stories
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from moetion_lightning import SparseExpertCheckpoint
from moetion_lightning.testing.compare import flatten_state, write_state
from tests.runs.models import ListMoE


class Points(Dataset[dict[str, Tensor]]):
    def __init__(self, count: int = 28) -> None:
        self.x = torch.randn(count, 8, generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"id": torch.tensor(index), "x": self.x[index]}


class Net(pl.LightningModule):
    """The default Trainer's user: a learning rate, dropout, a logged loss."""

    def __init__(
        self, script: Script, lr: float = 0.01, tag: str = "", width: int = 8, optimizer: str = "AdamW"
    ) -> None:
        super().__init__()
        self.lr, self.tag, self.kind = lr, tag, optimizer
        self.__dict__["script"] = script
        self.first = nn.Linear(8, width)
        self.moe = ListMoE(width, 4)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(width, 8)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = (self.head(self.drop(self.moe(self.first(batch["x"])))) - batch["x"].flip(-1)).pow(2).mean()
        self.log("train_loss", loss, prog_bar=True)
        self.script.note(f"{self.tag}{self.trainer.global_step}", loss, batch["id"])
        return loss

    def on_after_backward(self) -> None:
        self.script.die(f"{self.tag}{self.trainer.global_step}")

    def configure_optimizers(self) -> Any:
        optimizer = getattr(torch.optim, self.kind)(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)]


class Script:
    """What a story may use.

    Args:
        spec: ``story``, ``out``, ``capture``, ``window``, ``kill`` (a step's name), ``start`` (how often it was started
            before), ``memory_dir``, and what the story asks for.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.out = Path(spec["out"])
        self.start = int(spec.get("start", 0))

    def note(self, step: str, loss: Tensor, ids: Tensor) -> None:
        record = {"step": step, "loss": float(loss).hex(), "ids": ids.tolist(), "start": self.start}
        with (self.out / "steps.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def die(self, step: str) -> None:
        if self.spec.get("kill") == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def callback(self, **settings: Any) -> list[Any]:
        if not self.spec.get("capture", True):
            return []
        given = {"window": self.spec.get("window", 4), "memory_dir": self.spec["memory_dir"]}
        return [SparseExpertCheckpoint(**{**given, **self.spec.get("settings", {}), **settings})]

    def trainer(self, callbacks: tuple[Any, ...] = (), **options: Any) -> pl.Trainer:
        settings = options.pop("settings", {})
        given = {"max_epochs": 3, "accelerator": "cpu", "devices": 1, "default_root_dir": self.out}
        given |= {"callbacks": [*self.callback(**settings), *callbacks], "log_every_n_steps": 1}
        return pl.Trainer(**{**given, **options})

    def finish(self, module: nn.Module, trainer: pl.Trainer, name: str = "final") -> None:
        write_state(self.out / f"{name}.safetensors", *flatten_state(module, trainer.optimizers))


def loader(data: Dataset[Any] | None = None, batch_size: int = 4) -> Any:
    return DataLoader(data if data is not None else Points(), batch_size=batch_size, shuffle=True)


def plain(script: Script) -> None:
    """One fit; what differs from start to start is in ``changes``, by start."""
    changes = {**script.spec, **script.spec.get("changes", {}).get(str(script.start), {})}
    if "seed" in changes:
        if changes["seed"] is not None:
            pl.seed_everything(changes["seed"], verbose=False)
    else:
        pl.seed_everything(1, verbose=False)
    if "argv" in changes:
        sys.argv = [word.format(time=time.time_ns()) for word in changes["argv"]]
    options: dict[str, Any] = changes.get("trainer", {})
    if "cwd" in changes:
        folder = script.out / changes["cwd"].format(time=time.time_ns())
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
    if "root" in changes:
        options = {**options, "default_root_dir": script.out / changes["root"].format(time=time.time_ns())}
    module = Net(script, **changes.get("net", {}))
    trainer = script.trainer(**options)
    trainer.fit(module, loader(batch_size=changes.get("batch_size", 4)))
    print("END lr", trainer.optimizers[0].param_groups[0]["lr"], "step", trainer.global_step)
    if changes.get("then") == "raise":
        raise OSError("the export failed")
    if changes.get("then") == "exit":
        sys.exit(3)
    if changes.get("then") == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    script.finish(module, trainer)


def sweep(script: Script) -> None:
    """Trials with other learning rates and seeds; the first one fails. Tried ones may be skipped."""
    kinds = script.spec.get("optimizers", ("AdamW",) * 3)
    for number, lr in enumerate(script.spec.get("lrs", (10.0, 0.01, 0.003)), 1):
        if script.spec.get("skip") and (script.out / f"tried{number}").exists():
            continue
        pl.seed_everything(script.spec.get("seeds", (1, 2, 3))[number - 1], verbose=False)
        width = script.spec.get("widths", (8, 8, 8))[number - 1]
        module = Net(script, lr, f"t{number}-", width, kinds[number - 1])
        trainer = script.trainer(callbacks=(_Fails(9),) if number == 1 and script.spec.get("fails") else ())
        try:
            trainer.fit(module, loader())
        except (RuntimeError, KeyboardInterrupt, SystemExit) as error:
            print("TRIAL ENDED BY", repr(error))
        else:
            script.finish(module, trainer, f"final{number}")
        (script.out / f"tried{number}").touch()


class _Fails(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("the trial was pruned")


def study(script: Script) -> None:
    """An Optuna study with a storage: what a killed trial has begun is not tried again."""
    sys.modules["optuna"] = types.ModuleType("optuna")
    tried = script.out / "tried"
    done = len(tried.read_text().split()) if tried.exists() else 0
    for number, lr in list(enumerate((0.1, 0.01), 1))[done:]:
        with tried.open("a") as file:
            file.write(f"{number}\n")
        pl.seed_everything(1, verbose=False)
        module = Net(script, lr, f"t{number}-")
        trainer = script.trainer()
        trainer.fit(module, loader())
        script.finish(module, trainer, f"final{number}")


def phases(script: Script) -> None:
    """Three phases, each from the weights of the one before; finished ones are skipped."""
    for number in (1, 2, 3):
        saved = script.out / f"phase{number}.ckpt"
        if saved.exists():
            continue
        pl.seed_everything(1, verbose=False)
        module = Net(script, tag=f"p{number}-")
        if number > 1:
            module.load_state_dict(torch.load(script.out / f"phase{number - 1}.ckpt", weights_only=True)["state_dict"])
        trainer = script.trainer(enable_checkpointing=False)
        trainer.fit(module, loader())
        trainer.save_checkpoint(saved, weights_only=True)
        script.finish(module, trainer, f"final{number}")
        script.die(f"after-{number}")


def folds(script: Script) -> None:
    """Cross validation: every fold begins with the same weights, on other data; finished ones may be skipped."""
    data = Points(56)
    for number in (1, 2):
        if script.spec.get("skip") and (script.out / f"final{number}.safetensors").exists():
            continue
        pl.seed_everything(1, verbose=False)
        module = Net(script, tag=f"f{number}-")
        trainer = script.trainer()
        start = 28 * (number - 1)
        trainer.fit(module, loader(Subset(data, range(start, start + 28))))
        script.finish(module, trainer, f"final{number}")


def notebook(script: Script) -> None:
    """A cell is interrupted, changed, and run again in the same kernel."""
    sys.argv = ["ipykernel_launcher.py", "-f", f"/run/kernel-{time.time_ns()}.json"]

    def cell(lr: float, tag: str, callbacks: tuple[Any, ...] = ()) -> None:
        module = Net(script, lr, tag)
        trainer = script.trainer(callbacks=callbacks)
        trainer.fit(module, loader())
        script.finish(module, trainer, f"final-{tag}")

    pl.seed_everything(1, verbose=False)
    if script.spec.get("interrupted"):
        try:
            cell(0.5, "first-", (_Fails(9),))
        except RuntimeError as error:
            print("CELL ENDED BY", error)
    pl.seed_everything(2, verbose=False)
    cell(0.01, "second-")


def array(script: Script) -> None:
    """A task of an array of jobs: the same command in the same folder, told apart by the scheduler alone."""
    os.environ["SLURM_ARRAY_TASK_ID"] = str(script.spec["task"])
    os.environ["SLURM_NTASKS"] = "1"
    pl.seed_everything(int(script.spec["task"]), verbose=False)
    module = Net(script, tag=f"a{script.spec['task']}-")
    trainer = script.trainer()
    trainer.fit(module, loader())
    script.finish(module, trainer)


def checkpoints(script: Script) -> None:
    """A script that always passes a checkpoint path."""
    kind = script.spec["given"]
    pl.seed_everything(1, verbose=False)
    base = script.out / "base.ckpt"
    if kind == "base" and not base.exists():
        trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
        trainer.fit(Net(script, tag="base-"), loader())
        trainer.save_checkpoint(base)
    pl.seed_everything(1, verbose=False)
    module = Net(script)
    saving = ModelCheckpoint(script.out / "ck", every_n_train_steps=5, save_last=True, save_top_k=-1)
    trainer = script.trainer(callbacks=(saving,), max_epochs=5 if kind == "base" else 3)
    path: Any = {"base": str(base), "last": "last"}.get(kind)
    if kind == "old" and script.start:
        path = str(next((script.out / "ck").glob("*step=5.ckpt")))
    if kind == "hpc":
        os.environ |= {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "7"}
        script_step = _SavesAt(5, script.out / "hpc_ckpt_1.ckpt")
        trainer.callbacks.append(script_step)
    trainer.fit(module, loader(), ckpt_path=path)
    script.finish(module, trainer)


class _SavesAt(pl.Callback):
    """As a preemption long ago did."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def loops(script: Script) -> None:
    """A sweep in a loop of one's own, or in a Trainer of Hugging Face; what comes after training may fail."""
    for number, lr in enumerate(script.spec.get("lrs", (0.01,)), 1):
        torch.manual_seed(script.spec.get("seeds", (1, 2, 3))[number - 1])
        try:
            _LOOPS[script.spec["kind"]](script, number, lr)
        except RuntimeError as error:
            print("TRIAL ENDED BY", error)
    if script.spec.get("changes", {}).get(str(script.start), {}).get("then") == "raise":
        raise OSError("the export failed")


class _Loss(nn.Module):
    def __init__(self, script: Script) -> None:
        super().__init__()
        self.net = Net(script)

    def forward(self, x: Tensor, id: Tensor | None = None) -> dict[str, Tensor]:
        net = self.net
        return {"loss": (net.head(net.drop(net.moe(net.first(x)))) - x.flip(-1)).pow(2).mean()}


def _step(script: Script, number: int, step: int, loss: Tensor, batch: dict[str, Tensor]) -> None:
    script.die(f"{number}-{step}")
    if script.spec.get("fails") == f"{number}-{step}":
        raise RuntimeError("the trial was pruned")
    script.note(f"{number}-{step}", loss, batch["id"])


def _loop_settings(script: Script) -> dict[str, Any]:
    given = {"window": script.spec.get("window", 4), "memory_dir": script.spec.get("memory_dir")}
    return {**given, **script.spec.get("settings", {})}


def _plain_loop(script: Script, number: int, lr: float) -> None:
    from moetion_lightning.integrations import SparseCheckpointing

    model = _Loss(script)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    batches: Any = enumerate(batch for source in [loader()] for _ in range(3) for batch in source)
    run = None
    if script.spec.get("capture", True):
        run = SparseCheckpointing(model, optimizer, **_loop_settings(script))
        batches = run.steps(loader(), epochs=3)
    for step, batch in batches:
        loss = model(batch["x"])["loss"]
        optimizer.zero_grad()
        loss.backward()
        _step(script, number, step, loss, batch)
        optimizer.step()
    if run is not None:
        run.close()
    write_state(script.out / f"final{number}.safetensors", *flatten_state(model, [optimizer]))


def _accelerate_loop(script: Script, number: int, lr: float) -> None:
    from accelerate import Accelerator

    from moetion_lightning.integrations import attach

    accelerator = Accelerator(cpu=True)
    module = _Loss(script)
    model, optimizer, source = accelerator.prepare(module, torch.optim.AdamW(module.parameters(), lr=lr), loader())
    batches: Any = enumerate(batch for _ in range(3) for batch in source)
    if script.spec.get("capture", True):
        batches = attach(accelerator, **_loop_settings(script)).steps(source, epochs=3)
    for step, batch in batches:
        loss = model(batch["x"])["loss"]
        optimizer.zero_grad()
        accelerator.backward(loss)
        _step(script, number, step, loss, batch)
        optimizer.step()
    accelerator.end_training()
    write_state(script.out / f"final{number}.safetensors", *flatten_state(module, [optimizer.optimizer]))


def _hf_loop(script: Script, number: int, lr: float) -> None:
    from transformers import Trainer, TrainingArguments

    from moetion_lightning.integrations.hf_trainer import MoEtionTrainerCallback

    class Noting(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            batch = dict(inputs)
            loss = super().training_step(model, inputs, *args, **kwargs)
            _step(script, number, self.state.global_step, loss, batch)
            return loss

    module = _Loss(script)
    arguments = TrainingArguments(
        str(script.out / "hf"), num_train_epochs=3, per_device_train_batch_size=4, use_cpu=True, report_to=[],
        remove_unused_columns=False, disable_tqdm=True, save_strategy="no", learning_rate=lr,
        seed=script.spec.get("seeds", (1, 2, 3))[number - 1],
    )  # fmt: skip
    callbacks = [MoEtionTrainerCallback(**_loop_settings(script))] if script.spec.get("capture", True) else []
    trainer = Noting(module, arguments, train_dataset=Points(), callbacks=callbacks)
    trainer.train()
    write_state(script.out / f"final{number}.safetensors", *flatten_state(module, [trainer.optimizer.optimizer]))


_LOOPS = {"plain": _plain_loop, "accelerate": _accelerate_loop, "hf": _hf_loop}

STORIES: dict[str, Callable[[Script], None]] = {
    story.__name__: story for story in (plain, sweep, study, phases, folds, notebook, array, checkpoints, loops)
}


def run(spec: dict[str, Any]) -> None:
    script = Script(spec)
    os.chdir(script.out)
    sys.argv = ["train.py"]
    STORIES[spec["story"]](script)
