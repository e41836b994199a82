"""What this package costs the training thread when a model has thousands of experts.

Each row trains one model of tiny experts in the default Trainer, by turns without and with
``SparseExpertCheckpoint(window=8)`` (or ``GradientLogCheckpoint``), and prints CPU milliseconds of the training thread
per iteration above none, those of the capture thread, and CPU seconds from ``fit`` to the first batch above none.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import statistics
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from _report import RESULTS, machine, machine_line, markdown_table, write_results
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from moetion_lightning.callbacks import GradientLogCheckpoint, SparseExpertCheckpoint

SHAPES = {64: (4, 16), 512: (8, 64), 3072: (12, 256), 12032: (47, 256)}  # experts: (layers, experts of a layer)
WIDTH, HIDDEN, WINDOW = 4, 16, 8
POLICIES = {"sparse": SparseExpertCheckpoint, "gradient_log": GradientLogCheckpoint}


class FusedExperts(nn.Module):
    """3-D parameters ``(experts, ...)``, as most of today's models have them."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, WIDTH, HIDDEN) * 0.1)
        self.down_proj = nn.Parameter(torch.randn(experts, HIDDEN, WIDTH) * 0.1)

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        chosen = int(top_k_index[0, 0])
        return torch.relu(x @ self.gate_up_proj[chosen]) @ self.down_proj[chosen] * top_k_weights


class ListedExperts(nn.ModuleList):
    """One module per expert."""

    def __init__(self, experts: int) -> None:
        super().__init__(
            nn.Sequential(nn.Linear(WIDTH, HIDDEN, bias=False), nn.ReLU(), nn.Linear(HIDDEN, WIDTH, bias=False))
            for _ in range(experts)
        )

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out: Tensor = self[int(top_k_index[0, 0])](x) * top_k_weights
        return out


class MoE(nn.Module):
    """All tokens go to one expert: the arithmetic is small beside what is measured."""

    def __init__(self, experts: int, form: str) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, experts, bias=False)
        self.experts = FusedExperts(experts) if form == "fused" else ListedExperts(experts)

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.gate(x).softmax(-1).topk(1)
        return x + self.experts(x, index[:1].expand_as(index), weights)


class Model(LightningModule):
    """Layers of experts, AdamW."""

    def __init__(self, experts: int, form: str) -> None:
        super().__init__()
        layers, each = SHAPES[experts]
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(MoE(each, form) for _ in range(layers)))

    def training_step(self, batch: Tensor) -> Tensor:
        return self.layers(batch).square().mean()

    def on_after_backward(self) -> None:
        for parameter in self.parameters():  # as if every expert had tokens
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Clock(Callback):
    """CPU time of the training thread at the end of each iteration."""

    def __init__(self) -> None:
        self.begun = time.thread_time()
        self.started_up = 0.0
        self.times: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        if not self.started_up:
            self.started_up = time.thread_time() - self.begun

    def on_train_batch_end(self, *args: Any) -> None:
        self.times.append(time.thread_time())

    def per_iteration(self) -> float:
        """Seconds; whole windows only, without the first two."""
        kept = self.times[2 * WINDOW :]
        kept = kept[: 1 + (len(kept) - 1) // WINDOW * WINDOW]
        return (kept[-1] - kept[0]) / (len(kept) - 1)


class CaptureThreadClock:
    """CPU time of the capture thread, as far as one can ask for it from outside."""

    def __init__(self) -> None:
        self._clock: int | None = None

    def read(self) -> float:
        for thread in threading.enumerate():
            if thread.name == "moetion-capture" and thread.ident is not None:
                self._clock = time.pthread_getcpuclockid(thread.ident)
        return 0.0 if self._clock is None else time.clock_gettime(self._clock)


class CaptureClock(Callback):
    """CPU seconds of the capture thread per window, without the first two."""

    def __init__(self) -> None:
        self._clock, self._first, self._count = CaptureThreadClock(), 0.0, 0
        self.per_window = 0.0

    def on_train_batch_end(self, *args: Any) -> None:
        self._count += 1
        if self._count == 2 * WINDOW:
            self._first = self._clock.read()
        elif self._count > 2 * WINDOW and self._count % WINDOW == 0:
            self.per_window = (self._clock.read() - self._first) / (self._count / WINDOW - 2)


def run(experts: int, form: str, iterations: int, policy: str | None) -> tuple[Clock, float]:
    """Train once. Returns the training thread's clock, and the capture thread's CPU seconds per window."""
    folder = Path(tempfile.mkdtemp(prefix="moetion-bench-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        model, clock, capture = Model(experts, form), Clock(), CaptureClock()
        ours = [POLICIES[policy](window=WINDOW, memory_dir=str(folder))] if policy is not None else []
        trainer = Trainer(
            max_steps=iterations, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accelerator="cpu", callbacks=[*ours, clock, capture],
            default_root_dir=str(folder),
        )  # fmt: skip
        clock.begun = time.thread_time()
        trainer.fit(model, DataLoader(torch.randn(iterations * 2, WIDTH), batch_size=2))
        return clock, capture.per_window
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(experts: int, form: str, rounds: int, iterations: int, policy: str) -> dict[str, Any]:
    """One row of the table: medians of paired differences."""
    hooks, starts, captures, steps = [], [], [], []
    for _ in range(rounds):
        none, _ = run(experts, form, iterations, None)
        ours, capture = run(experts, form, iterations, policy)
        hooks.append((ours.per_iteration() - none.per_iteration()) * 1e3)
        starts.append(ours.started_up - none.started_up)
        captures.append(capture * 1e3)
        steps.append(none.per_iteration() * 1e3)
    return {
        "experts": experts,
        "form": form,
        "policy": policy,
        "step, CPU ms": round(statistics.median(steps), 2),
        "hooks, CPU ms per iteration": round(statistics.median(hooks), 2),
        "capture thread, CPU ms per window": round(statistics.median(captures), 1),
        "start, CPU s above none": round(statistics.median(starts), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--forms", nargs="+", choices=("fused", "list"), default=["fused", "list"])
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=1 + 10 * WINDOW)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": machine(), "rows": []}
    for form in args.forms:
        for experts in sorted(args.experts):
            for policy in args.policies:
                results["rows"].append(measure(experts, form, args.rounds, args.iterations, policy))
                print(results["rows"][-1], flush=True)
                write(results, args.out)  # the last row takes long


def write(results: dict[str, Any], folder: Path) -> None:
    """The table of the rows so far."""
    columns = list(results["rows"][0])
    table = markdown_table(columns, [[str(row[name]) for name in columns] for row in results["rows"]])
    text = f"# Many experts\n\n{(__doc__ or '').strip()}\n\n{table}\n\n{machine_line(results)}\n"
    write_results("many_experts", results, text, folder)


if __name__ == "__main__":
    main()
