"""What captures cost on a GPU, after the tests of ``tests/gpu`` have passed there: under eight minutes for both.

A mixture of experts trains in a plain loop, by turns without and with captures. Each row says how long an iteration
takes on the device (events around it), how long the copies took there, and how long training waited for them.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _report import RESULTS, child_environment, machine, machine_line, markdown_table, number, write_results
from torch import Tensor, nn

from moetion_lightning.events import CaptureFinished, Event, IterationFinished
from moetion_lightning.integrations import SparseCheckpointing

WINDOWS = (None, 8, 4, 1)
ROOM_BYTES = 8 << 30  # two windows of the largest model, with room to spare
TEST_SECONDS, ROUNDS, ITERATIONS, WARM_UP = 330, 3, 24, 16


class Block(nn.Module):
    """One layer of experts, in 3-D parameters; every expert gets the same number of tokens."""

    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = Experts(experts, width)

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.gate(x).softmax(-1).topk(1, -1)
        return x + self.experts(x, index, weights)


class Experts(nn.Module):
    """As today's models store them."""

    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, width, 2 * width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(experts, 2 * width, width) * width**-0.5)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        rows = hidden_states.view(self.up.shape[0], -1, hidden_states.shape[-1])
        return (torch.relu(rows @ self.up) @ self.down).view_as(hidden_states) * top_k_weights


class Clock:
    """When iterations end: on a GPU by events, which nothing waits for until all have run."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """An iteration has ended."""
        if not self._on_gpu:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> float:
        """Of an iteration, on average, without the first ones."""
        marks = self._marks[WARM_UP:]
        if self._on_gpu:
            torch.cuda.synchronize()
            return float(marks[0].elapsed_time(marks[-1])) / 1e3 / (len(marks) - 1)
        return float(marks[-1] - marks[0]) / (len(marks) - 1)


def train(
    device: torch.device, window: int | None, *, layers: int, experts: int, width: int, tokens: int, iterations: int
) -> tuple[float, list[Event]]:
    """Train once: seconds of an iteration, and the events of the captures."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(experts, width) for _ in range(layers))).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batches = torch.randn(WARM_UP + iterations, experts * tokens, width, device=device)
    clock, events = Clock(device), []

    def step(batch: Tensor) -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.mark()

    if window is None:
        for batch in batches:
            step(batch)
        return clock.seconds(), []
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and shutil.disk_usage(shared).free > ROOM_BYTES
    folder = Path(tempfile.mkdtemp(prefix="moetion-bench-", dir=shared if roomy else None))
    try:
        settings: dict[str, Any] = {"window": window, "memory_dir": str(folder), "job_id": f"gpu-{window}"}
        with SparseCheckpointing(model, optimizer, sinks=[events.append], **settings) as run:
            for _, batch in run.steps(list(batches)):
                step(batch)
            seconds = clock.seconds()
        return seconds, events
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(device: torch.device, rounds: int = ROUNDS, iterations: int = ITERATIONS, **shape: int) -> list[Any]:
    """One row for each window; ratios are of the same round."""
    found: dict[int | None, list[tuple[float, list[Event]]]] = {window: [] for window in WINDOWS}
    for _ in range(rounds):
        for window in WINDOWS:
            found[window].append(train(device, window, iterations=iterations, **shape))
    return [_row(window, runs, [seconds for seconds, _ in found[None]]) for window, runs in found.items()]


def _row(window: int | None, runs: Sequence[tuple[float, list[Event]]], none: Sequence[float]) -> dict[str, Any]:
    events = [event for _, some in runs for event in some]
    captures = [event for event in events if isinstance(event, CaptureFinished)]
    stalls = [event.stall_seconds for event in events if isinstance(event, IterationFinished)]
    copying = sum(event.seconds for event in captures)
    return {
        "window": window,
        "iteration_ms": statistics.median(seconds for seconds, _ in runs) * 1e3,
        "ratio": statistics.median(seconds / without for (seconds, _), without in zip(runs, none)),
        "copy_ms": copying / len(captures) * 1e3 if captures else None,
        "copy_gb_per_second": sum(e.nbytes for e in captures) / max(copying, 1e-9) / 1e9 if captures else None,
        "stall_ms": statistics.median(stalls) * 1e3 if stalls else None,
    }


def run_tests() -> dict[str, int]:
    """Run ``tests/gpu``; counts of what became of them."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        try:
            code = subprocess.run(
                [*command, f"--junitxml={report}"], cwd=RESULTS.parents[1], env=child_environment(1),
                timeout=TEST_SECONDS,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            sys.exit(f"tests/gpu took more than {TEST_SECONDS} s: no result was written")
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {name: sum(int(s.get(name, 0)) for s in suites) for name in ("tests", "skipped", "failures", "errors")}
    return {**counts, "exit_code": code}


def markdown(results: dict[str, Any]) -> str:
    """The result file."""
    tests, rows = results["tests"], results["rows"]
    failed = tests["failures"] + tests["errors"]
    table = markdown_table(
        ["window", "iteration, ms", "/ none", "copies of a slot, ms", "GB/s", "waited per iteration, ms"],
        [
            [
                "none" if row["window"] is None else str(row["window"]),
                number(row["iteration_ms"]), number(row["ratio"], "{:.3f}"), number(row["copy_ms"]),
                number(row["copy_gb_per_second"], "{:.1f}"), number(row["stall_ms"]),
            ]
            for row in rows
        ],
    )  # fmt: skip
    passed = tests["tests"] - tests["skipped"] - failed
    return (
        f"# On a GPU\n\n{(__doc__ or '').strip()}\n\n`tests/gpu` on the GPU: {passed} passed, {failed} failed, "
        f"{tests['skipped']} skipped.\n\n{table}\n\n{results['gpu']}; CUDA {torch.version.cuda}; "
        f"{machine_line(results)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device is available to torch: nothing was run, and no result was written")
    logging.disable(logging.INFO)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    device = torch.device("cuda", torch.cuda.current_device())
    results: dict[str, Any] = {"machine": machine(), "gpu": torch.cuda.get_device_name(device), "tests": run_tests()}
    results["rows"] = measure(device, layers=6, experts=16, width=512, tokens=512)
    text = markdown(results)
    write_results("gpu", results, text, args.results)
    print(text)
    sys.exit(results["tests"]["exit_code"])


if __name__ == "__main__":
    main()
