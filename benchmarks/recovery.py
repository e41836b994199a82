"""From restart to the step of the failure: seconds and iterations, after a real SIGKILL.

For each checkpointer a child process trains and is killed in the middle of a checkpoint interval (the expected
place); the same command is started again, and is timed until it has finished the step that the first one had reached.
Peers save at the interval that is best for them by Young and Daly, sqrt(2 * C * MTBF), with C (the time that a save
blocks training) measured here; ours save every iteration.
"""

from __future__ import annotations

import time

_STARTED = time.time()

import argparse  # noqa: E402 (the first line's time is the end of the interpreter's start)
import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from _names import LABELS  # noqa: E402
from _report import (  # noqa: E402
    RESULTS,
    child_environment,
    load_results,
    machine,
    machine_line,
    markdown_table,
    number,
    write_results,
)
from _sizes import add_model_arguments, model_argv  # noqa: E402

NAMES = ("lightning", "lightning-async", "dcp", "dense", "sparse-w4", "sparse-w8")
EVERY_STEP = {"dense": 1, "sparse-w4": 4, "sparse-w8": 8}
_PROBE_STEPS = 8
_PROBE_EVERY = 2


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--variants", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help=", ".join(NAMES)
    )
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    parser.add_argument("--mtbf", type=float, default=120.0, help="mean time between failures, seconds")
    parser.add_argument(
        "--max-interval", type=int, default=60, help="bounds a peer's interval, iterations (and the run time)"
    )
    parser.add_argument("--repeats", type=int, default=1, help="failures per checkpointer; medians are reported")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds that one process may take")
    parser.add_argument("--work-dir", type=Path, help="where peers write their files; default: the temporary directory")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for recovery.json and recovery.md")
    parser.add_argument("--table", action="store_true", help="only print the markdown of the last results")
    parser.add_argument("--child", nargs=3, metavar=("NAME", "EVERY", "STEPS"), help=argparse.SUPPRESS)
    parser.add_argument("--folders", nargs=2, type=Path, help=argparse.SUPPRESS)
    add_model_arguments(parser)
    return parser.parse_args(argv)


# --- the process that is killed --------------------------------------------------------------------------------------


def child(args: argparse.Namespace) -> None:
    name, every, steps = args.child[0], int(args.child[1]), int(args.child[2])
    work, memory = args.folders
    progress = _Progress(work / "progress.jsonl")
    progress("start", time=_STARTED)

    import inspect
    import logging
    import warnings

    import torch
    from _checkpointers import Places, make
    from _model import make_loader, make_model
    from _timing import HookClock
    from lightning.pytorch import Trainer

    progress("imported")
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "lightning", "moetion_lightning"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    torch.set_num_threads(args.threads)
    stall = HookClock()

    def listen(event: Any) -> None:
        if event.kind in ("RestoreApplied", "ReplayFinished"):
            progress(event.kind, step=event.iteration)

    checkpointer = make(name, Places(work / "disk", memory, "recovery"), every=every, clock=stall, sinks=[listen])
    for callback in checkpointer.callbacks:
        stall.watch(callback)
    module = make_model(args)
    trainer = Trainer(
        accelerator="cpu", devices=1, precision=args.precision, max_steps=steps, logger=False,
        enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=name.startswith("lightning"), callbacks=checkpointer.callbacks,
        plugins=checkpointer.plugins, default_root_dir=work,
    )  # fmt: skip
    before = [0.0]

    def tick() -> None:
        progress("step", step=trainer.global_step + checkpointer.restored_step(), stall=stall.seconds - before[0])
        before[0] = stall.seconds

    module.clock = tick
    module.on_train_start = lambda: progress("begin")  # type: ignore[method-assign]
    options: dict[str, Any] = {"ckpt_path": checkpointer.ckpt_path()}
    if options["ckpt_path"] is not None and "weights_only" in inspect.signature(Trainer.fit).parameters:
        options["weights_only"] = False
    trainer.fit(module, make_loader(args), **options)


class _Progress:
    """One JSON line for each thing that happened, written with one system call."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def __call__(self, what: str, **fields: Any) -> None:
        record = {"what": what, "pid": os.getpid(), "time": time.time(), **fields}
        os.write(self._descriptor, (json.dumps(record) + "\n").encode())


# --- the drill -------------------------------------------------------------------------------------------------------


class _Run:
    """One process: started, watched through its progress file, killed.

    Args:
        command: Its command line.
        work: Its folder.
        threads: Intra-op threads.
        timeout: Seconds that it may take.
    """

    def __init__(self, command: Sequence[str], work: Path, threads: int, timeout: float) -> None:
        self._path = work / "progress.jsonl"
        self._deadline = time.time() + timeout
        self._log = work / "output.txt"
        self.spawned = time.time()
        with open(self._log, "ab") as output:
            self._process = subprocess.Popen(
                command, env=child_environment(threads), stdout=output, stderr=subprocess.STDOUT
            )

    def records(self) -> list[dict[str, Any]]:
        """What this process wrote down so far."""
        if not self._path.exists():
            return []
        lines = self._path.read_text(encoding="utf-8").splitlines()
        return [r for r in map(json.loads, lines) if r["pid"] == self._process.pid]

    def steps(self) -> dict[int, float]:
        """When each step was finished."""
        return {r["step"]: r["time"] for r in self.records() if r["what"] == "step"}

    def until(self, step: int) -> None:
        """Wait for a step (or for the end of the process)."""
        while max(self.steps(), default=-1) < step:
            if self._process.poll() is not None:
                if max(self.steps(), default=-1) >= step:
                    return
                raise RuntimeError(f"it ended at {max(self.steps(), default=None)}: {self._tail()}")
            if time.time() > self._deadline:
                raise RuntimeError(f"it ran past its time, at step {max(self.steps(), default=None)}")
            time.sleep(0.02)

    def _tail(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:160] if lines else "no output"

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()


def drill(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Probe (peers), train, kill, restart, measure."""
    row: dict[str, Any] = {"name": name}
    every = 1
    if name not in EVERY_STEP:
        row |= _best_interval(name, args)
        every = row["interval"]
        print(f"    C = {row['C_seconds']:.2f} s, best interval {every} iterations", flush=True)
    # In the middle of an interval, and not in the first one, where restarts would begin from nothing.
    length = EVERY_STEP.get(name, every)
    fail_at = (2 * length + length // 2 + 4) if name in EVERY_STEP else max(every + every // 2, every + 1)
    measured = [_failure(name, every, fail_at, args) for _ in range(args.repeats)]
    keys = [key for key in measured[0] if all(m[key] is not None for m in measured)]
    row |= {key: statistics.median(m[key] for m in measured) for key in keys}
    return row


def _best_interval(name: str, args: argparse.Namespace) -> dict[str, Any]:
    with _folders(args) as (work, memory):
        run = _start(name, _PROBE_EVERY, _PROBE_STEPS, work, memory, args)
        try:
            run.until(_PROBE_STEPS)
        finally:
            run.kill()
        records = [r for r in run.records() if r["what"] == "step"]
    times = [r["time"] for r in records]
    durations = {b["step"]: y - x for b, x, y in zip(records[1:], times, times[1:])}
    plain = statistics.median(s for step, s in durations.items() if step > 2 and step % _PROBE_EVERY)
    saving = [r["stall"] for r in records[2:] if r["step"] % _PROBE_EVERY == 0]
    cost = statistics.median(saving)
    seconds = math.sqrt(2 * cost * args.mtbf)
    interval = max(1, min(args.max_interval, round(seconds / plain)))
    return {"C_seconds": cost, "iteration_seconds": plain, "interval_seconds": seconds, "interval": interval}


def _failure(name: str, every: int, fail_at: int, args: argparse.Namespace) -> dict[str, Any]:
    with _folders(args) as (work, memory):
        first = _start(name, every, 10 * fail_at, work, memory, args)
        try:
            first.until(fail_at)
        finally:
            first.kill()
        reached = max(first.steps())
        second = _start(name, every, 10 * fail_at, work, memory, args)
        try:
            second.until(reached)
        finally:
            second.kill()
        return _phases(second, reached)


def _phases(run: _Run, reached: int) -> dict[str, Any]:
    records = run.records()
    when = {r["what"]: r for r in reversed(records) if r["what"] != "step"}
    steps = run.steps()
    began, done = when["begin"]["time"], steps[reached]
    first_step = min(steps)
    replayed = when.get("ReplayFinished")
    loaded = max(began, when["RestoreApplied"]["time"]) if "RestoreApplied" in when else began
    replay_end = max(loaded, replayed["time"]) if replayed else loaded
    replayed_iterations = replayed["step"] - first_step + 1 if replayed else 0
    return {
        "failed_at": reached,
        "process_seconds": when["start"]["time"] - run.spawned,
        "import_seconds": when["imported"]["time"] - when["start"]["time"],
        "load_seconds": loaded - when["imported"]["time"],
        "replay_seconds": replay_end - loaded,
        "redo_seconds": done - replay_end,
        "total_seconds": done - run.spawned,
        "replay_iterations": replayed_iterations,
        "redo_iterations": reached - first_step + 1 - replayed_iterations,
    }


class _folders:
    """A folder on disk and one in host memory, both removed at the end."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._work_dir = args.work_dir

    def __enter__(self) -> tuple[Path, Path]:
        self._work = Path(tempfile.mkdtemp(prefix="moetion-bench-", dir=self._work_dir))
        shared = Path("/dev/shm")
        self._memory = (shared if os.access(shared, os.W_OK) else self._work) / f"{self._work.name}-memory"
        return self._work, self._memory

    def __exit__(self, *exc_info: object) -> None:
        shutil.rmtree(self._work, ignore_errors=True)
        shutil.rmtree(self._memory, ignore_errors=True)


def _start(name: str, every: int, steps: int, work: Path, memory: Path, args: argparse.Namespace) -> _Run:
    command = [sys.executable, __file__, "--child", name, str(every), str(steps), "--folders", str(work), str(memory)]
    command += ["--precision", args.precision, *model_argv(args)]
    return _Run(command, work, args.threads, args.timeout)


# --- all of them -----------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {
        "benchmark": "recovery", "machine": machine(), "mtbf_seconds": args.mtbf, "precision": args.precision,
        "rows": [],
    }  # fmt: skip
    started = time.perf_counter()
    for count, name in enumerate(args.variants, 1):
        print(f"[{count}/{len(args.variants)}, {time.perf_counter() - started:.0f} s] {name}", flush=True)
        try:
            row = drill(name, args)
            print(
                f"    {row['total_seconds']:.1f} s: process {row['process_seconds']:.1f}, "
                f"import {row['import_seconds']:.1f}, load {row['load_seconds']:.1f}, "
                f"replay {row['replay_seconds']:.1f} ({row['replay_iterations']}), "
                f"redo {row['redo_seconds']:.1f} ({row['redo_iterations']})",
                flush=True,
            )
        except (RuntimeError, statistics.StatisticsError, KeyError) as error:
            row = {"name": name, "note": f"failed: {error}"}
            print(f"    {row['note']}", flush=True)
        results["rows"].append(row)
    results["seconds"] = time.perf_counter() - started
    results["load_average_end"] = machine()["load_average"]
    return results


def markdown(results: dict[str, Any]) -> str:
    header = [
        "checkpointer", "saves every", "C, s", "process", "import", "load", "replay, s (iterations)",
        "redo, s (iterations)",
        "total, s", "after import, s",
    ]  # fmt: skip
    rows = []
    for row in results["rows"]:
        label = LABELS[row["name"]]
        if "note" in row:
            rows.append([label, row["note"], *["-"] * 8])
            continue
        after = row["load_seconds"] + row["replay_seconds"] + row["redo_seconds"]
        rows.append([
            label, str(row.get("interval", 1)), number(row.get("C_seconds")),
            *[number(row[f"{phase}_seconds"], "{:.1f}") for phase in ("process", "import", "load")],
            f"{row['replay_seconds']:.1f} ({row['replay_iterations']:.0f})",
            f"{row['redo_seconds']:.1f} ({row['redo_iterations']:.0f})",
            f"{row['total_seconds']:.1f}", f"{after:.1f}",
        ])  # fmt: skip
    about = (
        f"{machine_line(results)} {results['precision']}; MTBF {results['mtbf_seconds']:.0f} s; killed with SIGKILL in "
        "the middle of an interval (a window)."
    )
    return f"{about}\n\n{markdown_table(header, rows)}"


def main() -> None:
    args = parse()
    if args.child:
        child(args)
        return
    if args.table:
        print(markdown(load_results("recovery", args.results)))
        return
    results = measure(args)
    text = markdown(results)
    write_results("recovery", results, text, args.results)
    print(f"\n{text}\n\nwritten to {args.results}/recovery.json and recovery.md in {results['seconds']:.0f} s")


if __name__ == "__main__":
    main()
