"""An Accelerate script that saves and loads its own checkpoints, with or without this package attached."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.utils import ProjectConfiguration

from moetion_lightning.integrations import attach
from moetion_lightning.testing.compare import flatten_state, write_state
from tests.runs.data import Samples, make_loader
from tests.runs.models import Body

DEFAULTS: dict[str, Any] = {
    "attach": True,
    "steps": False,  # whether the loop is over run.steps()
    "window_first": False,  # whether the script loads only what no window is newer than
    "start_at": False,  # whether the loop is told where the checkpoint stands, instead of skipping batches itself
    "epochs": 1,
    "automatic": False,
    "every": 4,
    "kill": None,
}


def _newest(folder: Path) -> tuple[int, Path] | None:
    found = [
        (int(path.name.rpartition("_")[2]), path) for path in folder.glob("*_*") if (path / "scheduler.bin").exists()
    ]
    return max(found, default=None)


def run(given: dict[str, Any]) -> None:
    spec = {**DEFAULTS, **given}
    out = Path(spec["out"])
    accelerator = Accelerator(
        cpu=True,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        project_config=ProjectConfiguration(project_dir=str(out), automatic_checkpoint_naming=spec["automatic"]),
    )
    torch.manual_seed(1)
    module = Body("list")
    optimizer: Any = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.02)
    scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 6))
    loader: Any = make_loader("shuffle", Samples(80, augment=False), 4)
    model, optimizer, scheduler, loader = accelerator.prepare(module, optimizer, scheduler, loader)
    moetion = None
    if spec["attach"]:
        events, memory = str(out / "events.jsonl"), spec.get("memory_dir")
        moetion = attach(accelerator, memory_dir=memory, job_id="own", events_path=events, window=4)
    done = 0
    newest = _newest(out / "checkpoints")
    if newest is not None and not (spec["window_first"] and moetion is not None and moetion.resuming):
        accelerator.load_state(str(newest[1]))
        done = newest[0] if not spec["automatic"] else (newest[0] + 1) * spec["every"]
    if spec["start_at"] and moetion is not None:
        if done:
            moetion.start_at(done, loader)
        pairs, done = moetion.steps(loader, epochs=spec["epochs"]), 0
    elif spec["epochs"] > 1:
        pairs = enumerate(batch for _ in range(spec["epochs"]) for batch in loader)
    else:
        batches = skip_first_batches(loader, done) if done else loader
        pairs = moetion.steps(batches) if spec["steps"] and moetion is not None else enumerate(batches)
    for step, batch in pairs:
        loss = torch.nn.functional.cross_entropy(model(batch["tokens"]), batch["target"])
        accelerator.backward(loss)
        _maybe_kill(spec, done + step)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        record = {"epoch": 0, "batch": done + step, "loss": float(loss).hex(), "ids": batch["sample_id"].tolist()}
        with (out / "steps.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        if (done + step + 1) % spec["every"] == 0:
            name = None if spec["automatic"] else str(out / "checkpoints" / f"step_{done + step + 1}")
            accelerator.save_state(name)
    accelerator.end_training()
    write_state(out / "final.safetensors", *flatten_state(module, [optimizer.optimizer]))


def _maybe_kill(spec: dict[str, Any], step: int) -> None:
    if spec["kill"] and spec["kill"]["step"] == step:
        os.kill(os.getpid(), signal.SIGKILL)
