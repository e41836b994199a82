"""What a kill costs with a gradient log, with sparse windows and with dense copies: iterations done again, and seconds.

A process trains and is killed (SIGKILL) at random times, again and again; another one continues. Iterations that had
been finished before and are finished once more count as done again. Rebuilding is timed against the training of as many
iterations: the events of the callback say how long it took and how many iterations it rebuilt.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _model import make_loader, make_model
from _names import LABELS
from _report import RESULTS, machine, machine_line, markdown_table, write_results
from _sizes import add_model_arguments
from lightning.pytorch import Callback, LightningModule, Trainer

from moetion_lightning import DenseInMemoryCheckpoint, GradientLogCheckpoint, SparseExpertCheckpoint

NAMES = ("dense", "sparse-w8", "log-w8", "log-w16")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills: the same for all variants")
    parser.add_argument("--results", type=Path, default=RESULTS)
    add_model_arguments(parser)
    return parser.parse_args(argv)


class Progress(Callback):
    """Writes a line for each finished iteration."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        os.write(self._file, f'{{"step": {trainer.global_step}, "time": {time.monotonic()}}}\n'.encode())


def train(name: str, args: argparse.Namespace, folder: Path) -> None:
    """A process that is killed."""
    warnings.filterwarnings("ignore")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    torch.set_num_threads(args.threads)
    common: dict[str, Any] = {
        "memory_dir": str(folder / "memory"), "job_id": "bench", "events_path": str(folder / "events.jsonl")
    }  # fmt: skip
    if name == "dense":
        ours: Callback = DenseInMemoryCheckpoint(**common)
    else:
        kind = SparseExpertCheckpoint if name.startswith("sparse") else GradientLogCheckpoint
        ours = kind(window=int(name.partition("-w")[2]), **common)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=-1, max_steps=10**6, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[ours, Progress(folder / "steps.jsonl")],
        default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(make_model(args), make_loader(args))


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Kill one variant again and again."""
    rng = random.Random(args.seed)
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="moetion-bench-", dir=shared if shared.is_dir() else None))
    again: list[int] = []
    context = multiprocessing.get_context("fork")
    try:
        for _ in range(args.kills):
            before = read(folder / "steps.jsonl")
            process = context.Process(target=train, args=(name, args, folder))
            process.start()
            reached = max((record["step"] for record in before), default=0)
            wait_for_step(folder, len(before), process)
            time.sleep(rng.uniform(0.0, 12 * step_seconds(folder, len(before))))
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            if before:
                new = read(folder / "steps.jsonl")[len(before) :]
                first = new[0]["step"]
                again.append(reached - first + 1)
        events = read(folder / "events.jsonl")
        steps = read(folder / "steps.jsonl")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = [
        b["time"] - a["time"] for a, b in zip(steps, steps[1:]) if b["step"] == a["step"] + 1 and b["time"] > a["time"]
    ]
    rebuilt = [e for e in events if e["event"] == "StateRebuilt" and e["rebuilt"]]
    step = statistics.median(seconds)
    each = statistics.median(e["seconds"] / e["rebuilt"] for e in rebuilt) if rebuilt else None
    return {
        "kills": len(again),
        "again_mean": statistics.fmean(again),
        "again_most": max(again),
        "step_ms": 1e3 * step,
        "rebuild_ms": None if each is None else 1e3 * each,
        "rebuild_ratio": None if each is None else each / step,
    }


def read(path: Path) -> list[dict[str, Any]]:
    """The lines so far; the last one may be cut short."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def wait_for_step(folder: Path, known: int, process: Any) -> None:
    deadline = time.monotonic() + 120
    while len(read(folder / "steps.jsonl")) < known + 2:
        if time.monotonic() > deadline or not process.is_alive():
            raise RuntimeError("a process came to no new step within two minutes")
        time.sleep(0.01)


def step_seconds(folder: Path, known: int) -> float:
    times = [record["time"] for record in read(folder / "steps.jsonl")[known:]]
    return times[1] - times[0]


def main() -> None:
    args = parse()
    results: dict[str, Any] = {"machine": machine(), "seed": args.seed, "rows": {}}
    for name in args.variants:
        results["rows"][name] = measure(name, args)
        print(name, results["rows"][name], flush=True)
    columns = [
        "policy", "kills", "iterations done again, mean", "most", "iteration, ms", "rebuilding one, ms",
        "rebuilding / training",
    ]  # fmt: skip
    rows = [
        [
            LABELS[name], str(r["kills"]), f"{r['again_mean']:.2f}", str(r["again_most"]), f"{r['step_ms']:.0f}",
            "-" if r["rebuild_ms"] is None else f"{r['rebuild_ms']:.1f}",
            "-" if r["rebuild_ratio"] is None else f"{r['rebuild_ratio']:.3f}",
        ]
        for name, r in results["rows"].items()
    ]  # fmt: skip
    text = (
        f"# Gradient log\n\n{(__doc__ or '').strip()}\n\n{markdown_table(columns, rows)}\n\n{machine_line(results)}\n"
    )
    write_results("gradient_log", results, text, args.results)


if __name__ == "__main__":
    main()
