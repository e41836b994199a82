"""One training run, described by plain data. Runs in a child process."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from moetion_lightning.events import Event
from moetion_lightning.testing.compare import flatten_state, write_state
from moetion_lightning.testing.faults import KillAt
from tests.runs import agreeing, changing, compiled, network, optimizers, variants
from tests.runs.commits import kill_when_committed
from tests.runs.data import LeavingOut, Samples, make_loader
from tests.runs.decoder import Decoder
from tests.runs.models import Automatic, Manual, Sharded
from tests.runs.ranks import suffix
from tests.runs.sources import fit_arguments

DEFAULTS: dict[str, Any] = {
    "block": "list",
    "module": "",
    "compile": "",
    "manual": False,
    "inner_steps": 1,
    "optimizer": "adamw",
    "lr": 0.02,
    "scheduler": "cosine",
    "estimate_steps": False,
    "overflow_at": 0,
    "precision": "32-true",
    "accelerator": "cpu",
    "accumulate": 1,
    "clip": 1.0,
    "clip_algorithm": "norm",
    "loader": "shuffle",
    "source": "",  # of the loaders: "hooks" that move them, or a DataModule of tests.runs.sources
    "validation": "",  # "persistent" workers, or such that draw random numbers
    "reload": 0,  # loaders every so many epochs
    "augment": False,
    "samples": 28,
    "batch_size": 4,
    "epochs": 3,
    "fits": 1,
    "val_check_interval": 1.0,
    "callbacks": [],
    "default_logger": False,
    "policy": "sparse",
    "policy_args": {"window": 4},
    "skip_batches": [],  # left out; without captures by the loader
    "engine_args": {},  # settings that the callbacks do not have
    "capture": True,
    "persist": False,
    "slow_sink": "",
    "busy": {},  # processor seconds that a rank, by its number as text, takes in each batch
    "slow_holders": {},  # seconds that a rank, by its number as text, takes for each file that it receives
    "count_windows": False,
    "wipe_memory": False,
    "break": "",
    "keep_at": -1,  # batches after which the whole state, and Lightning's own checkpoint, are written
    "kill": None,
    "kills": [],  # of an elastic job: each in the process of its rank that was started in its generation
    "once": [],  # kills, each in the first process of its rank that comes to its hook at its step or later
    "seed": 1,
    "job_id": "job",
    "ranks": 1,
    "strategy": "",
    "strategy_args": {},
    "expert_parallel_size": 1,
    "pipeline": {},  # settings of a pipeline, for the strategy "moetion"
    "boundary_log": None,  # settings of StageBoundaryLogging
    "num_layers": 6,
    "dropout": 0.1,
    "tied": False,
    "frozen_front": False,
    "width": 16,
    "num_experts": 4,
}


class Keeper(pl.Callback):
    """Writes the state between two batches, and the checkpoint that Lightning itself makes of it."""

    def __init__(self, spec: dict[str, Any], out: Path) -> None:
        self._batches, self._state = spec["keep_at"], out / f"kept{spec['suffix']}.safetensors"
        self._checkpoint = out / "kept.ckpt" if spec["strategy"] != "fsdp2" else None

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self._batches:
            write_state(self._state, *flatten_state(module, trainer.optimizers))
            if self._checkpoint is not None:
                trainer.save_checkpoint(self._checkpoint)


class Recorder(pl.Callback):
    """Writes every micro-batch's step, epoch, loss and sample ids; may draw from generators; may kill the process."""

    def __init__(self, path: Path, kill: dict[str, Any] | None, seed: int | None, busy: float = 0.0) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._events = path.with_name(path.name.replace("steps", "events"))
        self._kill = dict(kill) if kill and "hook" in kill else None
        self._seed = seed
        self._busy = busy

    def on_train_batch_start(self, *args: Any) -> None:
        until = time.thread_time() + self._busy
        while time.thread_time() < until:
            pass

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """Lightning seeds all ranks alike; then a rank restored with another one's generators would go unnoticed."""
        if self._seed is not None:
            random.seed(self._seed)
            np.random.seed(self._seed)
            torch.manual_seed(self._seed)

    def _maybe_kill(self, hook: str, step: int) -> None:
        if not self._kill or self._kill["hook"] != hook:
            return
        if "mark" in self._kill and step >= self._kill["step"]:
            Path(self._kill["mark"]).touch()
            kill_when_committed(self._kill, self._events)
        elif step == self._kill["step"]:
            kill_when_committed(self._kill, self._events)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        parts = batch if isinstance(batch, list) else [batch]
        record = {
            "epoch": trainer.current_epoch,
            "batch": batch_idx,
            "step": trainer.global_step,
            "loss": float(outputs["loss"] if outputs else module.unreturned).hex(),
            "ids": [part["sample_id"].tolist() for part in parts],
            "lr": [float(g["lr"]).hex() for o in trainer.optimizers for g in o.param_groups],
            "python": random.random(),
            "numpy": float(np.random.rand()),
            "torch": float(torch.rand(())),
        }
        os.write(self._file, (json.dumps(record) + "\n").encode())
        self._maybe_kill("batch_end", trainer.global_step)

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        self._maybe_kill("backward", trainer.global_step)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self._maybe_kill("before_step", trainer.global_step)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self._maybe_kill("epoch_end", trainer.global_step)

    def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
        if not trainer.sanity_checking:
            self._maybe_kill("validation", trainer.global_step)


def _callbacks(spec: dict[str, Any], out: Path) -> list[Any]:
    made: list[Any] = [Keeper(spec, out)] if spec["keep_at"] >= 0 else []
    for name in spec["callbacks"]:
        if name == "early_stopping":
            made.append(EarlyStopping("train_loss_epoch", patience=1, min_delta=0.5, check_on_train_epoch_end=True))
        elif name == "checkpoint":
            made.append(
                ModelCheckpoint(out / "ckpt", monitor="train_loss_step", every_n_train_steps=2, save_top_k=2)
            )  # fmt: skip
        elif name == "best":  # in the folder of the logger's version
            made.append(ModelCheckpoint(monitor="val_loss", save_top_k=2))
        elif name == "ema":
            made.append(pl.callbacks.EMAWeightAveraging(decay=0.9))
        elif name == "history":
            made.append(variants.History(out / f"history{spec['suffix']}"))
        elif name == "finetuning":
            made.append(variants.UnfreezeBlocks())
        elif name == "monitor":
            from tests.runs.monitored import RecordingMonitor

            made.append(RecordingMonitor(out / f"monitor{spec['suffix']}.jsonl"))
    return made


def _module(spec: dict[str, Any]) -> pl.LightningModule:
    if spec["module"]:
        kinds = {**variants.MODULES, **compiled.MODULES, **optimizers.MODULES, **changing.MODULES}
        kind = {**kinds, "decoder": Decoder, "agreeing": agreeing.Agreeing}[spec["module"]]
    else:
        kind = Manual if spec["manual"] else Automatic
    if spec["strategy"] == "fsdp2":
        kind = type(f"Sharded{kind.__name__}", (Sharded, kind), {})
    return kind(spec)


def _strategy(spec: dict[str, Any]) -> Any:
    given = spec["strategy_args"]
    common: dict[str, Any] = {"process_group_backend": "gloo", "timeout": timedelta(seconds=30)}
    if not spec["strategy"]:
        return "auto"
    if spec["strategy"] == "ddp":
        # An expert without tokens has no gradient; two optimizers run one backward pass for each.
        unused = spec["block"] == "list" or spec["manual"]
        return DDPStrategy(**{"find_unused_parameters": unused, **common, **given})
    if spec["strategy"] == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=spec["ranks"], tensor_parallel_size=1, **common, **given)
    if spec["strategy"] == "moetion":
        from moetion_lightning.strategies import MoEtionStrategy

        return MoEtionStrategy(expert_parallel_size=spec["expert_parallel_size"], **spec["pipeline"], **common, **given)
    raise ValueError(f"strategy {spec['strategy']!r}: expected 'ddp', 'fsdp2' or 'moetion'")


def _capturing(spec: dict[str, Any], out: Path) -> list[Any]:
    from moetion_lightning import callbacks

    if not spec["capture"]:
        return []
    common: dict[str, Any] = {
        "memory_dir": spec["memory_dir"],
        "job_id": spec["job_id"],
        "events_path": str(out / f"events{spec['suffix']}.jsonl"),
    }
    if spec["persist"]:
        common["persist_dir"] = str(out / "persist")
    kill = spec["kill"]
    if kill and "event" in kill:
        sink = KillAt(kill["event"], kill.get("count", 1), kill.get("copies", 0), **kill.get("fields", {}))
        common["sinks"] = [_armed_by(kill["after"], sink) if "after" in kill else sink]
    if spec["slow_sink"]:
        common.setdefault("sinks", []).append(_slow(spec["slow_sink"]))
    if spec["count_windows"]:
        counts = out / f"windows{spec['suffix']}.jsonl"
        common.setdefault("sinks", []).append(_count_windows(Path(spec["memory_dir"]), spec["rank"], counts))
    kinds = {
        "sparse": callbacks.SparseExpertCheckpoint,
        "dense": callbacks.DenseInMemoryCheckpoint,
        "partial": callbacks.PartialExpertsCheckpoint,
        "two_phase": callbacks.TwoPhaseCheckpoint,
        "gradient_log": callbacks.GradientLogCheckpoint,
    }
    callback = kinds[spec["policy"]](**spec["policy_args"], **common)
    callback.config = dataclasses.replace(callback.config, skip_batches=spec["skip_batches"])
    more = {k: v.format(**spec) if isinstance(v, str) else v for k, v in spec["engine_args"].items()}
    callback.config = dataclasses.replace(callback.config, **more)
    if spec["boundary_log"] is None:
        return [callback]
    return [callbacks.StageBoundaryLogging(**spec["boundary_log"]), callback]


def _slow(kind: str) -> Callable[[Event], None]:
    def sink(event: Event) -> None:
        if event.kind == kind:
            time.sleep(0.03)

    return sink


def _armed_by(first: str, kill: KillAt) -> Callable[[Event], None]:
    """The sink, from the first event of that kind on."""
    armed: list[Event] = []

    def sink(event: Event) -> None:
        if armed:
            kill(event)
        elif event.kind == first:
            armed.append(event)

    return sink


def _count_windows(memory: Path, rank: int, path: Path) -> Callable[[Event], None]:
    """Writes after each iteration how many windows the rank has, and how many it holds of each other rank."""

    def sink(event: Event) -> None:
        if event.kind != "IterationFinished":
            return
        found = {
            "own": len(list(memory.glob(f"*/rank-{rank:05d}/windows/*.json"))),
            "held": [len(list(held.glob("windows/*.json"))) for held in memory.glob(f"*/replica-*-at-{rank:05d}")],
        }
        with path.open("a") as file:
            file.write(json.dumps(found) + "\n")

    return sink


def _trainer(spec: dict[str, Any], out: Path, record: str) -> pl.Trainer:
    manual = spec["manual"] or spec["module"] == "toggling"
    seed = spec["seed"] + 1000 * spec["rank"] if spec["ranks"] > 1 else None
    busy = spec["busy"].get(str(spec["rank"]), 0.0)
    options: dict[str, Any] = {}
    if not manual and spec["clip"]:
        options = {"gradient_clip_val": spec["clip"], "gradient_clip_algorithm": spec["clip_algorithm"]}
    if spec["accelerator"] != "cpu":
        options["deterministic"] = "warn"
    if spec["precision"] == "16-mixed":  # by name, Lightning would take bfloat16 on the CPU
        device = {"gpu": "cuda"}.get(spec["accelerator"], "cpu")
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=4)
        options["plugins"] = [MixedPrecision("16-mixed", device, scaler)]
    else:
        options["precision"] = spec["precision"]
    return pl.Trainer(
        max_epochs=spec["epochs"],
        accelerator=spec["accelerator"],
        devices=spec["ranks"],
        num_nodes=1,
        strategy=_strategy(spec),
        accumulate_grad_batches=spec["accumulate"],
        val_check_interval=spec["val_check_interval"],
        num_sanity_val_steps=1,
        reload_dataloaders_every_n_epochs=spec["reload"],
        callbacks=[*_callbacks(spec, out), Recorder(out / record, spec["kill"], seed, busy), *_capturing(spec, out)],
        default_root_dir=out,
        logger=spec["default_logger"],
        enable_checkpointing=not {"checkpoint", "best"}.isdisjoint(spec["callbacks"]),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def run(given: dict[str, Any]) -> None:
    spec = {**DEFAULTS, **given}
    out = Path(spec["out"])
    rank = int(os.environ.get("RANK", "0"))
    end = suffix(rank, spec["ranks"])
    spec |= {"rank": rank, "suffix": end, "strategy": spec["strategy"] or ("ddp" if spec["ranks"] > 1 else "")}
    generation = int(os.environ.get("MOETION_GENERATION", "0"))
    marks = [out / f"killed-{number}" for number in range(len(spec["once"]))]
    once = [{**kill, "mark": str(mark)} for kill, mark in zip(spec["once"], marks) if not mark.exists()]
    for kill in [spec["kill"], *spec["kills"], *once]:
        if kill and kill.get("rank", 0) == rank and kill.get("generation", generation) == generation:
            spec["kill"] = kill
            break
    else:
        spec["kill"] = None
    if spec["kill"] and "transfer" in spec["kill"]:
        kill = spec["kill"]
        network.kill_in_transfer(kill["transfer"], kill.get("count", 1), kill.get("owner"))
    if str(rank) in spec["slow_holders"]:
        network.slow_down(spec["slow_holders"][str(rank)])
    if spec["break"]:
        from tests.runs import sabotage

        sabotage.apply(spec["break"])
    pl.seed_everything(spec["seed"], verbose=False)
    samples = Samples(spec["samples"], augment=spec["augment"])
    loader = make_loader(spec["loader"], samples, spec["batch_size"])
    if not spec["capture"] and spec["skip_batches"]:
        loader = LeavingOut(loader, spec["skip_batches"])
    for _ in range(spec["fits"] - 1):  # whole fits before the one that is drilled, on the same loader
        earlier = _module(spec)
        trainer = _trainer({**spec, "kill": None}, out, f"earlier{end}.jsonl")
        trainer.fit(earlier, **fit_arguments(spec, earlier, loader))
    module = _module(spec)
    trainer = _trainer(spec, out, f"steps{end}.jsonl")
    trainer.fit(module, **fit_arguments(spec, module, loader))
    tensors, scalars = flatten_state(module, trainer.optimizers)
    for callback in trainer.callbacks:
        if isinstance(callback, (EarlyStopping, ModelCheckpoint)):
            state = {k: v for k, v in callback.state_dict().items() if k not in ("dirpath", "last_model_path")}
            scalars[f"callback:{type(callback).__name__}"] = repr(state).replace(str(out), "")
    scalars["requires_grad"] = repr([name for name, p in module.named_parameters() if p.requires_grad])
    scalars["training"] = repr([name for name, m in module.named_modules() if m.training])
    scalars["progress"] = f"{trainer.global_step} {trainer.current_epoch} {trainer.fit_loop.epoch_loop.total_batch_idx}"
    scalars["metrics"] = repr(
        {k: float(v).hex() for k, v in sorted(trainer.callback_metrics.items()) if "moetion" not in k}
    )
    write_state(out / f"final{end}.safetensors", tensors, scalars)
    if spec["ranks"] > 1:
        torch.distributed.barrier()  # rank 0 serves the store: it is the last one to need it
        torch.distributed.destroy_process_group()
