"""``moetion demo``: train, kill with SIGKILL, start the same command again, compare with a run that never failed.

The failed run and its twin are ordinary ``moetion fit`` commands in child processes. The kill comes from outside: this
process reads the child's event file and kills it in the middle of a window.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moetion_lightning.errors import ConfigurationError, MoEtionError
from moetion_lightning.recipes import recipe_path

__all__ = ["DemoError", "DemoOptions", "main"]

_POLL_SECONDS = 0.005
_PHASE_TIMEOUT_SECONDS = 240.0
_SPARSE = "moetion_lightning.callbacks.SparseExpertCheckpoint"
_RECORDING = "moetion_lightning.testing.recording"


class DemoError(MoEtionError, RuntimeError):
    """The demonstration could not be carried out (a child failed or hung); the message ends with its last output."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Settings of the demonstration.

    Args:
        folder: Where configurations, logs and results go.
        memory_dir: Base directory of the host-memory tier.
        recipe: The packaged recipe to train; it must use ``SparseExpertCheckpoint`` and ``ByteMoE``.
        steps: Optimizer steps of the whole run.
        window: Iterations of a window.
        kill_after_windows: Kill when this many windows are committed and the next one is half captured.
        model: Overrides of the model's arguments.
    """

    folder: Path
    memory_dir: Path
    recipe: str = "tiny_moe_cpu"
    steps: int = 60
    window: int = 4
    kill_after_windows: int = 5
    model: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        needed = self.window * (self.kill_after_windows + 2) + 2
        if self.window < 2 or self.kill_after_windows < 1 or self.steps < needed:
            raise ConfigurationError(
                f"{self.steps} steps with windows of {self.window}, killed after {self.kill_after_windows} "
                f"windows; expected a window of at least 2, a kill after at least 1 window, and at least {needed} steps"
            )


def main(args: Sequence[str]) -> int:
    """Run ``moetion demo``.

    Args:
        args: Arguments after ``moetion demo``.

    Returns:
        0 if the recovered run equals its twin bit for bit, 1 if anything differs, 2 if a run could not be carried out.
    """
    parser = argparse.ArgumentParser(prog="moetion demo", description="Train, kill with SIGKILL, restart, compare.")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of the whole run (60)")
    parser.add_argument("--window", type=int, default=4, help="iterations of a window (4)")
    parser.add_argument("--kill-after-windows", type=int, default=5, help="committed windows before the kill (5)")
    parser.add_argument("--small", action="store_true", help="the recipe's own small model, for a quick run")
    parser.add_argument("--dir", type=Path, help="keep configurations, logs and results in this folder")
    options = parser.parse_args(args)

    folder = Path(options.dir or tempfile.mkdtemp(prefix="moetion-demo-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ConfigurationError(f"--dir {folder} is not empty; give a new folder")
    shared = Path("/dev/shm")
    memory = Path(
        tempfile.mkdtemp(prefix="moetion-demo-", dir=shared if os.access(shared, os.W_OK | os.X_OK) else None)
    )
    larger = {"d_model": 128, "num_layers": 3, "d_expert": 256, "total_steps": options.steps}
    try:
        demo = DemoOptions(
            folder=folder,
            memory_dir=memory,
            steps=options.steps,
            window=options.window,
            kill_after_windows=options.kill_after_windows,
            model={"total_steps": options.steps} if options.small else larger,
        )
        return run(demo)
    except DemoError as error:
        print(f"moetion demo: error: {error}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(memory, ignore_errors=True)
        if options.dir is None:
            shutil.rmtree(folder, ignore_errors=True)


def run(options: DemoOptions) -> int:
    """Carry out the demonstration and print its table.

    Args:
        options: Settings.

    Returns:
        0 if everything is equal, 1 otherwise.
    """
    failing, twin = _Run(options, "failing"), _Run(options, "twin")
    progress = _Progress(options.steps)
    print(f"a byte-level Mixture-of-Experts model, {options.steps} steps, windows of {options.window} steps")

    begin = time.monotonic()
    killed = _KillMidWindow(options.kill_after_windows)
    failing.execute(progress.phase("1/4 train, and kill with SIGKILL"), stop=killed)
    first = failing.events()
    progress.done(f"killed after step {killed.last_step}, {time.monotonic() - begin:.1f} s")

    begin = time.monotonic()
    failing.execute(progress.phase("2/4 the same command again"))
    second = failing.events()[len(first) :]
    restart_seconds = time.monotonic() - begin
    progress.done(f"finished, {restart_seconds:.1f} s")

    begin = time.monotonic()
    twin.execute(progress.phase("3/4 twin without any callback of ours"))
    twin_seconds = time.monotonic() - begin
    progress.done(f"finished, {twin_seconds:.1f} s")

    progress.phase("4/4 compare")
    checks = _compare(failing, twin)
    progress.done("")
    rows = _table(options, killed.last_step, first, second)
    rows.append(("seconds, restart / uninterrupted twin", f"{restart_seconds:.1f} / {twin_seconds:.1f}"))
    rows.extend(checks.rows)
    width = max(len(label) for label, _ in rows)
    print()
    for label, value in rows:
        print(f"  {label:<{width}}  {value}")
    print()
    if checks.equal:
        print("bitwise equal: parameters, optimizer state, losses")
        return 0
    print("NOT EQUAL:")
    for difference in checks.differences[:10]:
        print(f"  {difference}")
    return 1


class _Run:
    """One run: its configuration, its files, and the child process that executes it."""

    def __init__(self, options: DemoOptions, name: str) -> None:
        self.folder = options.folder / name
        self.folder.mkdir()
        self.losses = self.folder / "losses.jsonl"
        self.final = self.folder / "final.safetensors"
        self.log = self.folder / "output.log"
        self._events = self.folder / "events.jsonl"
        config = yaml.safe_load(recipe_path(options.recipe).read_text(encoding="utf-8"))
        config["model"]["init_args"].update(options.model or {})
        config["trainer"].update(max_steps=options.steps, logger=False, default_root_dir=str(self.folder))
        config["trainer"].update(enable_progress_bar=False)
        callbacks: list[dict[str, Any]] = []
        if name != "twin":
            ours = {
                "window": options.window,
                "memory_dir": str(options.memory_dir),
                "job_id": "demo",
                "events_path": str(self._events),
            }
            callbacks.append({"class_path": _SPARSE, "init_args": ours})
        callbacks.append({"class_path": f"{_RECORDING}.LossRecorder", "init_args": {"path": str(self.losses)}})
        callbacks.append({"class_path": f"{_RECORDING}.FinalState", "init_args": {"path": str(self.final)}})
        config["trainer"]["callbacks"] = callbacks
        self._config = self.folder / "config.yaml"
        self._config.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")

    def events(self) -> list[dict[str, Any]]:
        """Everything that the run announced so far."""
        return _lines(self._events)

    def execute(self, show: Callable[[int], None], stop: _KillMidWindow | None = None) -> None:
        """Run the command to its end, or until ``stop`` says to kill it.

        Raises:
            DemoError: The child failed, hung, or ended before it could be killed.
        """
        command = [sys.executable, "-m", "moetion_lightning", "fit", "--config", str(self._config)]
        package_root = str(Path(__file__).resolve().parent.parent)
        paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        # One thread, unless the user says otherwise: for so small a model more are slower, far more on a busy machine.
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        deadline = time.monotonic() + _PHASE_TIMEOUT_SECONDS
        tail = _Tail(self._events)
        tail.skip()
        with self.log.open("ab") as log:
            child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=self.folder)
            try:
                while child.poll() is None:
                    if stop is not None and stop.watch(tail.new()):
                        child.kill()
                        break
                    if time.monotonic() > deadline:
                        raise DemoError(f"no end within {_PHASE_TIMEOUT_SECONDS:.0f} s; {self._last_output()}")
                    show(_last_step(self.losses))
                    time.sleep(_POLL_SECONDS)
                status = child.wait(timeout=30)
            finally:
                if child.poll() is None:
                    child.kill()
                    child.wait()
        if stop is not None:
            if not stop.due:
                raise DemoError(f"the run ended before it could be killed (status {status}); {self._last_output()}")
            stop.watch(tail.new())  # what it still announced until the signal arrived
        elif status != 0:
            raise DemoError(f"the run failed with status {status}; {self._last_output()}")

    def _last_output(self) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return "its last output:\n" + "\n".join(text.splitlines()[-25:])


class _KillMidWindow:
    """Decides from the events when to kill: some windows are committed and half of the next one is captured."""

    def __init__(self, windows: int) -> None:
        self._windows = windows
        self._committed = 0
        self.last_step = 0
        self.due = False

    def watch(self, events: Sequence[Mapping[str, Any]]) -> bool:
        """Take new events; whether it is time to kill."""
        for event in events:
            if event["event"] == "WindowCommitted":
                self._committed += 1
            elif event["event"] == "IterationFinished":
                self.last_step = max(self.last_step, int(event["iteration"]))
            elif event["event"] == "CaptureFinished" and self._committed >= self._windows:
                half = math.ceil(int(event["num_slots"]) / 2)
                self.due = self.due or int(event["slot"]) + 1 == half
        return self.due


class _Tail:
    """Reads the whole lines that were appended to a JSONL file since the last time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def skip(self) -> None:
        """Ignore what is there already."""
        if self._path.exists():
            self._offset = self._path.stat().st_size

    def new(self) -> list[dict[str, Any]]:
        """The new lines."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


class _Progress:
    """One line a phase, with a live step counter."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._live = sys.stdout.isatty()
        self._label = ""
        self._shown = 0

    def phase(self, label: str) -> Callable[[int], None]:
        """Begin a phase; the result shows a step."""
        self._label, self._shown = label, 0
        print(f"[{label}]", end="" if self._live else "\n", flush=True)
        return self._show

    def _show(self, step: int) -> None:
        every = 1 if self._live else 20
        if step >= self._shown + every:
            self._shown = step
            if self._live:
                print(f"\r[{self._label}] step {step}/{self._steps} ", end="", flush=True)
            else:
                print(f"    step {step}/{self._steps}", flush=True)

    def done(self, outcome: str) -> None:
        """End the phase."""
        print(f"\r[{self._label}] {outcome:<30}" if self._live else f"    {outcome}", flush=True)


@dataclass(frozen=True, kw_only=True)
class _Checks:
    rows: list[tuple[str, str]]
    differences: list[str]
    equal: bool


def _compare(failing: _Run, twin: _Run) -> _Checks:
    from moetion_lightning.testing.compare import compare_losses, compare_states  # torch: not for --help

    results = {
        "parameters and buffers": compare_states(failing.final, twin.final, ("parameter:", "buffer:")),
        "optimizer state": compare_states(failing.final, twin.final, ("optimizer:",)),
        "losses": compare_losses(failing.losses, twin.losses),
    }
    rows = []
    for name, result in results.items():
        verdict = "bitwise equal" if result.equal else f"{len(result.differences)} differ"
        rows.append((name, f"{verdict} ({result.compared} compared)"))
    return _Checks(
        rows=rows,
        differences=[difference for result in results.values() for difference in result.differences],
        equal=all(result.equal for result in results.values()),
    )


def _table(
    options: DemoOptions, killed_after: int, first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    def of(events: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
        return [event for event in events if event["event"] == kind]

    rows = [("killed after step", f"{killed_after} of {options.steps}")]
    started, applied, replayed = (
        of(second, "RestoreStarted"),
        of(second, "RestoreApplied"),
        of(second, "ReplayFinished"),
    )
    if not (started and applied and replayed):
        raise DemoError("the restarted run found no window to continue from: its events name no restore and no replay")
    found, restored, end = started[0], int(applied[0]["iteration"]), replayed[0]
    verified = "verified" if end["verified"] else "NOT verified"
    rows += [
        ("window found", f"steps {found['first_iteration']} to {found['last_iteration']}, {found['tier']}"),
        ("steps lost and done again", f"{killed_after - restored} (at most 2 x {options.window})"),
        ("  of these replayed from snapshots", f"{end['replayed']}, {verified}"),
        ("seconds to restore / to replay", f"{applied[0]['seconds']:.3f} / {end['seconds']:.3f}"),
    ]
    captures, schedules = of(first, "CaptureFinished"), of(first, "ScheduleMade")
    if captures and schedules:
        dense = int(schedules[-1]["dense_bytes"])
        mean = sum(int(c["nbytes"]) for c in captures) / len(captures)
        rows.append(
            ("bytes captured a step / dense", f"{mean / 1e6:.2f} MB / {dense / 1e6:.2f} MB ({mean / dense:.0%})")
        )
    return rows


def _lines(path: Path) -> list[dict[str, Any]]:
    return _Tail(path).new()


def _last_step(losses: Path) -> int:
    """Last step that was recorded, from the end of the file."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        with losses.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 1000))
            return int(json.loads(file.read().splitlines()[-1])["global_step"])
    return 0
