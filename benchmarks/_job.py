"""The training script of failover.py and ettr.py: an ordinary Lightning script for ``torchrun`` or ``moetion launch``.

Each rank appends one JSON line to a file when it starts and after every batch.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
import warnings
from pathlib import Path
from typing import Any

from _sizes import add_model_arguments

CHECKPOINTS = ("none", "model-checkpoint", "ours")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", choices=CHECKPOINTS, required=True)
    parser.add_argument("--every", type=int, default=1, help="steps between the saves of model-checkpoint")
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--work", type=Path, required=True, help="folder for progress.jsonl and checkpoints")
    parser.add_argument("--memory", type=Path, required=True, help="folder in host memory")
    add_model_arguments(parser)
    return parser.parse_args()


class Progress:
    """One JSON line for each thing that happened, written with one system call."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._who = {"rank": int(os.environ["RANK"]), "pid": os.getpid()}

    def __call__(self, what: str, **fields: Any) -> None:
        record = {"what": what, **self._who, "time": time.time(), **fields}
        os.write(self._descriptor, (json.dumps(record) + "\n").encode())


def checkpoint_callbacks(args: argparse.Namespace) -> tuple[list[Any], Path | None]:
    """The callbacks, and what to resume from where the user must say it."""
    if args.checkpoint == "none":
        return [], None
    if args.checkpoint == "ours":
        from moetion_lightning import SparseExpertCheckpoint

        return [SparseExpertCheckpoint(window=args.window, memory_dir=str(args.memory), log_metrics=False)], None
    from lightning.pytorch.callbacks import ModelCheckpoint

    folder = args.work / "checkpoints"
    # monitor="step" keeps the newest one only; save_last would write each file twice.
    saver = ModelCheckpoint(
        dirpath=folder, every_n_train_steps=args.every, save_top_k=1, monitor="step", mode="max", filename="{step}"
    )
    steps = {int(path.stem.removeprefix("step=").split("-")[0]): path for path in folder.glob("step=*.ckpt")}
    return [saver], steps[max(steps)] if steps else None


class Updating:
    """Seconds between the vote for an optimizer step and the note of what follows it.

    A rank that is lost there has left no run state of the iteration, so that all go back to a window; anywhere else
    the others keep their live state.
    """

    def __init__(self) -> None:
        from moetion_lightning.engine.living import Living

        self._since = self._seconds = 0.0
        vote, note = Living.about_to_update, Living.note

        def about_to_update(living: Living) -> None:
            vote(living)
            self._since = time.perf_counter()

        def noted(living: Living, *args: Any, **kwargs: Any) -> None:
            note(living, *args, **kwargs)
            if self._since:
                self._seconds += time.perf_counter() - self._since
                self._since = 0.0

        patched: Any = Living
        patched.about_to_update, patched.note = about_to_update, noted

    def take(self) -> float:
        """Since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def main() -> None:
    args = parse()
    progress = Progress(args.work / "progress.jsonl")
    progress("start")
    import inspect

    import torch
    from _model import make_loader, make_model
    from lightning.pytorch import Trainer

    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    torch.set_num_threads(args.threads)
    callbacks, resume_from = checkpoint_callbacks(args)
    module = make_model(args)
    trainer = Trainer(
        accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), max_steps=1_000_000, logger=False,
        strategy="ddp_find_unused_parameters_true",  # in some steps an expert gets no tokens
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks, default_root_dir=args.work,
        enable_checkpointing=args.checkpoint == "model-checkpoint",
    )  # fmt: skip
    updating = Updating() if args.checkpoint == "ours" else None
    module.clock = lambda: progress(
        "step", step=trainer.global_step, updating=updating.take() if updating is not None else 0.0
    )
    options: dict[str, Any] = {"ckpt_path": resume_from}
    if resume_from is not None and "weights_only" in inspect.signature(Trainer.fit).parameters:
        options["weights_only"] = False
    trainer.fit(module, make_loader(args), **options)


if __name__ == "__main__":
    main()
