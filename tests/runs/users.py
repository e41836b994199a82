"""Trainings as users write them, in a default ``Trainer``: attributes, hooks, loggers and checkpoints of their own.

Every state that a module or callback keeps goes into the next losses, so that a lost one shows.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import datetime
import enum
import io
import json
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from moetion_lightning.testing.compare import flatten_state, write_state
from tests.runs.data import Samples
from tests.runs.models import Automatic
from tests.runs.scenario import DEFAULTS, Recorder

# --- attributes ------------------------------------------------------------------------------------------------------


class EpochList(Automatic):
    """The pattern of Lightning 2: outputs of an epoch in a list, which its end uses."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.training_step_outputs: list[Tensor] = []
        self.mean = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx) * self.mean
        self.training_step_outputs.append(loss)
        return loss

    def on_train_epoch_end(self) -> None:
        self.mean = float(torch.stack(self.training_step_outputs).mean()) / 3
        self.training_step_outputs.clear()


class Phase(enum.Enum):
    WARM = "warm"
    FULL = "full"


Pair = collections.namedtuple("Pair", "low high")


@dataclasses.dataclass
class Totals:
    count: int = 0
    seen: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Range:
    high: float


class Tracker:
    """An object of the user's own."""

    def __init__(self) -> None:
        self.history: dict[str, list[float]] = collections.defaultdict(list)
        self.lock = threading.Lock()  # cannot be stored, and does not change


class ManyKinds(Automatic):
    """Every plain type, nested, shared and made late."""

    calls = 0

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.numbers = [1, 2.5]
        self.same_numbers = self.numbers
        self.totals = Totals()
        self.phase = Phase.WARM
        self.pair = Pair(0.0, 0.0)
        self.words = collections.Counter()
        self.recent: collections.deque[float] = collections.deque(maxlen=3)
        self.ids: set[int] = set()
        self.array = np.zeros(4)
        self.average = torch.zeros(3)
        self.tree = collections.defaultdict(lambda: collections.defaultdict(list))
        self.namespace = argparse.Namespace(rate=0.5, inner=argparse.Namespace(steps=0))
        self.parts = [self.body.head, self.body.norms]
        self.weights = [self.body.head.weight, self.body.norms[0].weight.detach()]
        self.save_hyperparameters({"scale": 1.0})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        assert self.same_numbers is self.numbers
        assert self.weights[0] is self.body.head.weight
        assert self.weights[1].data_ptr() == self.body.norms[0].weight.data_ptr()
        return loss * (1 + 1e-2 * self._digest())

    def _digest(self) -> float:
        late = getattr(self, "late", None)
        found = [
            *(sum(self.numbers), self.totals.count, len(self.totals.seen), self.pair.high, sum(self.words.values())),
            *(self.phase is Phase.FULL, sum(self.recent), len(self.ids), float(self.array.sum()), self.calls % 7),
            *(float(self.average.sum()), self.namespace.inner.steps, self.hparams["scale"]),
            *(len(self.tree["a"]["b"]), 0.0 if late is None else late["range"].high + sum(late["losses"])),
            float(self.weights[1].sum()),
        ]
        return float(np.tanh(sum(found) / 50))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = float(outputs["loss"])
        self.calls += 1
        self.numbers.append(loss)
        del self.numbers[:-4]
        self.totals.count += 1
        self.totals.seen.append(int(batch["sample_id"][0]))
        self.phase = Phase.FULL if self.calls > 6 else Phase.WARM
        self.pair = self.pair._replace(high=loss)
        self.words[f"w{self.calls % 3}"] += 1
        self.recent.append(loss)
        self.ids.add(int(batch["sample_id"][1]))
        self.array[batch_idx % 4] += loss
        self.average.mul_(0.9).add_(loss)
        self.tree["a"]["b"].append(batch_idx)
        self.namespace.inner.steps += 1
        self.hparams["scale"] = loss
        if self.calls == 5:
            self.late = {"range": Range(loss), "losses": [loss], "when": datetime.datetime(2024, 1, 1), "p": Path("x")}
        if self.calls > 5:
            self.late["losses"].append(loss)


class Users(pl.Callback):
    """A callback that keeps an object, and what it cannot keep."""

    def __init__(self) -> None:
        self.tracker = Tracker()
        self.handle: Any = None
        self.late: Any = None
        self.factor = 1.0

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.start = random.random()  # only made here; the generator moves

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        batch["factor"] = torch.tensor(self.factor + self.start - self.start)
        self.handle = io.StringIO()
        self.late = self.late or np.random.default_rng(3)  # captured with the other generators
        batch["factor"] += 0.01 * float(self.late.random())

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.tracker.history["loss"].append(float(outputs["loss"]))
        self.factor = 1 + 0.01 * sum(self.tracker.history["loss"][-5:])


class Factored(Automatic):
    """Its loss has the factor that a callback puts into the batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * batch["factor"]


class Data(pl.LightningDataModule):
    """Counts batches."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0

    def train_dataloader(self) -> Any:
        return DataLoader(Samples(28, augment=False), batch_size=4, shuffle=True)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer.training:
            self.batches += 1
            batch["factor"] = torch.tensor(1 + self.batches / 50)
        return batch


class EpochStart(Automatic):
    """Makes its list when an epoch starts, and draws from the generators there."""

    def on_train_epoch_start(self) -> None:
        self.seen: list[int] = []
        self.noise = float(torch.rand(()))
        self.log("noise", self.noise)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch_idx)
        assert self.seen == list(range(batch_idx + 1))
        return super().training_step(batch, batch_idx) * (1 + self.noise)


# --- checkpoint hooks ------------------------------------------------------------------------------------------------


class Filtered(Automatic):
    """Saves only what trains, with a note; fills up what is missing when it loads."""

    note = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 + self.note)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if "experts" in k}
        checkpoint["phase"] = Phase.FULL
        checkpoint["pair"] = Pair(1, [2])
        checkpoint["totals"] = Totals(3, [4])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert all("experts" in key for key in checkpoint["state_dict"])
        assert checkpoint["phase"] is Phase.FULL
        assert checkpoint["pair"] == Pair(1, [2])
        assert checkpoint["totals"] == Totals(3, [4])
        assert "lr_schedulers" in checkpoint
        own = self.state_dict()
        checkpoint["state_dict"] = {**own, **checkpoint["state_dict"]}


class Stripped(Automatic):
    """Takes everything out of a checkpoint, and has a ``state_dict`` of its own."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {f"net.{k}": v for k, v in super().state_dict(*args, **kwargs).items() if "head" in k}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for key in list(checkpoint):
            value = checkpoint[key]
            if isinstance(value, (dict, list)):
                value.clear()
            del checkpoint[key]


class Quantised(nn.Module):
    """Puts something into the state dict that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}scale"] = torch.tensor(self.scale)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if f"{prefix}scale" in state_dict:
            object.__setattr__(self, "loaded", float(state_dict[f"{prefix}scale"]))


class OwnEntries(Automatic):
    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.quantised = Quantised()
        self.loaded_at: list[float] = []

    def on_train_start(self) -> None:
        self.loaded_at.append(getattr(self.quantised, "loaded", 1.0))

    def on_train_batch_end(self, *args: Any) -> None:
        self.quantised.scale += 0.5


MODULES: dict[str, type[Automatic]] = {
    "epoch_list": EpochList,
    "many_kinds": ManyKinds,
    "factored": Factored,
    "epoch_start": EpochStart,
    "filtered": Filtered,
    "stripped": Stripped,
    "own_entries": OwnEntries,
}

# --- loggers and bars ------------------------------------------------------------------------------------------------


class RemoteLogger(Logger):
    """A service that gives each run a name of its own, as soon as it is made, unless it is told one."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._run_id: str | None = None
        self._experiment: Any = None

    @property
    def experiment(self) -> Path:
        if self._experiment is None:
            if self._run_id is None:
                self._run_id = f"run{len(list(self._folder.glob('run*')))}"
            self._experiment = self._folder / self._run_id
            self._experiment.touch()
        return self._experiment

    name = "remote"

    @property
    def version(self) -> str | None:
        return self._run_id

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with self.experiment.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


class BarNotes(pl.Callback):
    """What the progress bar shows at each batch: last of all callbacks."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        bar = trainer.progress_bar_callback
        if isinstance(bar, RichProgressBar):
            task = bar.train_progress_bar
            shown = [task.description.strip(), int(task.completed), int(task.total)]
        else:
            shown = [bar.train_progress_bar.desc, bar.train_progress_bar.n, bar.train_progress_bar.total]
        with self._path.open("a") as file:
            file.write(json.dumps([trainer.global_step, shown]) + "\n")


def _checkpoint(spec: dict[str, Any], out: Path) -> list[Any]:
    made = []
    for name in spec.get("savers", []):
        if name == "best":
            made.append(ModelCheckpoint(monitor="train_loss_step", every_n_train_steps=2, save_top_k=2, save_last=True))
        elif name == "fixed":
            made.append(ModelCheckpoint(out / "fixed", every_n_train_steps=3, save_top_k=-1))
        elif name == "every":
            made.append(ModelCheckpoint(every_n_train_steps=3))
    return made


class RemoveFiles(pl.Callback):
    """Somebody takes away the files of a step before it is done again."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def on_train_start(self, *args: Any) -> None:
        for path in self._out.rglob("*.ckpt"):
            path.unlink()


class Signals(pl.Callback):
    """The scheduler of a cluster announces the end of the job, once."""

    def __init__(self, step: int, path: Path) -> None:
        self._step = step
        self._path = path

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self._step and not self._path.exists():
            self._path.touch()
            os.kill(os.getpid(), signal.SIGUSR1)


def _in_slurm(out: Path) -> None:
    """A job of SLURM, whose ``scontrol`` notes what it is called with."""
    stub = out / "bin"
    stub.mkdir(exist_ok=True)
    (stub / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {out}/scontrol.txt\n')
    (stub / "scontrol").chmod(0o755)
    job = {"NTASKS": "1", "JOB_NAME": "train", "JOB_ID": "7", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    os.environ.update({f"SLURM_{key}": value for key, value in job.items()}, PATH=f"{stub}:{os.environ['PATH']}")


def _logger(spec: dict[str, Any], out: Path) -> Any:
    kind = spec.get("logger", True)
    if kind == "csv":
        return CSVLogger(out)
    if kind == "csv_fixed":
        return CSVLogger(out, name="", version="", flush_logs_every_n_steps=100)
    if kind == "remote":
        return RemoteLogger(out)
    return kind


class Module(Automatic):
    """A module for the command line."""

    def __init__(self, lr: float = 0.02) -> None:
        super().__init__({**DEFAULTS, "lr": lr})


def _run_cli(spec: dict[str, Any], out: Path) -> None:
    """The user's own command line, as Lightning's manual has it."""
    from lightning.pytorch.cli import LightningCLI

    arguments = ["fit", f"--trainer.default_root_dir={out}", "--trainer.max_epochs=3", "--trainer.accelerator=cpu"]
    arguments += ["--trainer.enable_progress_bar=false", f"--model.lr={spec.get('rate', 0.02)}"]
    if spec["cli"] == "fixed":
        logger = "--trainer.logger=lightning.pytorch.loggers.CSVLogger"
        arguments += [
            logger,
            f"--trainer.logger.save_dir={out}",
            "--trainer.logger.name=x",
            "--trainer.logger.version=0",
        ]
    else:
        arguments.append("--trainer.logger=false")
    if spec["capture"]:
        ours = "moetion_lightning.callbacks.SparseExpertCheckpoint"
        given = {"window": 4, "memory_dir": spec["memory_dir"], "job_id": "job", "events_path": f"{out}/events.jsonl"}
        arguments += [f"--trainer.callbacks={ours}", *(f"--trainer.callbacks.{k}={v}" for k, v in given.items())]
    recorder = Recorder(out / "steps.jsonl", spec["kill"], None)
    cli = LightningCLI(Module, Data, args=arguments, trainer_defaults={"callbacks": [recorder]})
    tensors, scalars = flatten_state(cli.model, cli.trainer.optimizers)
    write_state(out / "final.safetensors", tensors, scalars)


def run(given: dict[str, Any]) -> None:
    from moetion_lightning import SparseExpertCheckpoint

    spec = {**DEFAULTS, **given}
    out = Path(spec["out"])
    if spec["break"]:
        from tests.runs import sabotage

        sabotage.apply(spec["break"])
    pl.seed_everything(spec["seed"], verbose=False)
    if spec.get("cli"):
        _run_cli(spec, out)
        return
    module = MODULES.get(spec["module"], Automatic)(spec)
    callbacks: list[Any] = [Recorder(out / "steps.jsonl", spec["kill"], None), *_checkpoint(spec, out)]
    named = {"users": Users, "rates": LearningRateMonitor, "rich": RichProgressBar, "tqdm": TQDMProgressBar}
    callbacks += [named[name]() for name in spec["callbacks"] if name in named]
    if "remove" in spec["callbacks"] and spec["kill"] is None:
        callbacks.append(RemoveFiles(out))
    if spec.get("signal_at"):
        _in_slurm(out)
        if spec["kill"] is None:
            callbacks.append(Signals(spec["signal_at"], out / "signalled"))
    if "bar_notes" in spec["callbacks"]:
        callbacks.append(BarNotes(out / "bar.jsonl"))
    if spec["capture"]:
        ours = SparseExpertCheckpoint(
            **spec["policy_args"],
            memory_dir=spec["memory_dir"],
            job_id=spec["job_id"],
            events_path=str(out / "events.jsonl"),
            log_metrics=False,
        )
        callbacks.append(ours)
    bars = {"rich", "tqdm"} & set(spec["callbacks"])
    trainer = pl.Trainer(
        max_epochs=spec["epochs"],
        max_steps=spec.get("max_steps", -1),
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        logger=_logger(spec, out),
        default_root_dir=out,
        log_every_n_steps=1,
        enable_model_summary=False,
        enable_progress_bar=bool(bars),
    )
    with contextlib.redirect_stdout(io.StringIO()) if bars else contextlib.nullcontext():
        if spec.get("validated_first"):
            trainer.validate(module, DataLoader(Samples(8, augment=False), batch_size=4), verbose=False)
        if spec.get("datamodule"):
            trainer.fit(module, datamodule=Data())
        else:
            trainer.fit(module, DataLoader(Samples(28, augment=False), batch_size=4, shuffle=True))
    tensors, scalars = flatten_state(module, trainer.optimizers)
    for saver in trainer.checkpoint_callbacks:
        assert isinstance(saver, ModelCheckpoint)
        state = {k: v for k, v in saver.state_dict().items() if k != "dirpath"}
        scalars[f"saver:{saver.state_key}"] = repr(state).replace(str(out), "")
        for path in [saver.best_model_path, saver.last_model_path, *saver.best_k_models]:
            if path:
                found = torch.load(path, weights_only=False)
                tensors |= {f"file:{path.replace(str(out), '')}:{k}": v for k, v in found.get("state_dict", {}).items()}
    write_state(out / "final.safetensors", tensors, scalars)
