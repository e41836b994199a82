"""``moetion demo``: train, kill with SIGKILL, start the same command again, compare with a run that never failed.

The failed run and its twin are ordinary ``moetion fit`` commands in child processes. The kill comes from outside: this
process reads the child's event file and kills it in the middle of a window.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moetion_lightning.demo.stage import (
    RECORDING,
    SPARSE,
    Checks,
    KillMidWindow,
    Progress,
    add_common_arguments,
    check_windows,
    finish,
    folders,
    last_step,
    total,
)
from moetion_lightning.recipes import recipe_path
from moetion_lightning.testing.processes import RunError, Tail, last_output, read_lines, run_child

__all__ = ["DemoOptions", "main", "run"]

_MORE = """\
moetion demo ranks     several ranks train, one is killed, and it alone is replaced; see moetion demo ranks --help
moetion demo pipeline  a pipeline of three stages, one is killed, and it alone is replayed from its neighbours' logs
"""


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
        check_windows(self.steps, self.window, self.kill_after_windows)


def main(args: Sequence[str]) -> int:
    """Run ``moetion demo`` for one process.

    Args:
        args: Arguments after ``moetion demo``.

    Returns:
        0 if the recovered run equals its twin bit for bit, 1 if anything differs, 2 if a run could not be carried out.
    """
    parser = argparse.ArgumentParser(
        prog="moetion demo",
        description="Train, kill with SIGKILL, restart, compare.",
        epilog=_MORE,
        usage="moetion demo [OPTIONS]\n       moetion demo ranks [OPTIONS]\n       moetion demo pipeline [OPTIONS]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common_arguments(parser, steps=60, kill_after_windows=5)
    parser.add_argument("--small", action="store_true", help="the recipe's own small model, for a quick run")
    options = parser.parse_args(args)
    larger = {"d_model": 128, "num_layers": 3, "d_expert": 256, "total_steps": options.steps}
    try:
        with folders(options.dir) as (folder, memory):
            demo = DemoOptions(
                folder=folder,
                memory_dir=memory,
                steps=options.steps,
                window=options.window,
                kill_after_windows=options.kill_after_windows,
                model={"total_steps": options.steps} if options.small else larger,
            )
            return run(demo)
    except RunError as error:
        print(f"moetion demo: error: {error}", file=sys.stderr)
        return 2


def run(options: DemoOptions) -> int:
    """Carry out the demonstration and print its table.

    Args:
        options: Settings.

    Returns:
        0 if everything is equal, 1 otherwise.
    """
    failing, twin = _Run(options, "failing"), _Run(options, "twin")
    progress = Progress(options.steps)
    print(f"a byte-level Mixture-of-Experts model, {options.steps} steps, windows of {options.window} steps")

    begin = time.monotonic()
    killed = KillMidWindow(options.kill_after_windows)
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
    return finish(rows, checks)


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
            callbacks.append({"class_path": SPARSE, "init_args": ours})
        callbacks.append({"class_path": f"{RECORDING}.LossRecorder", "init_args": {"path": str(self.losses)}})
        callbacks.append({"class_path": f"{RECORDING}.FinalState", "init_args": {"path": str(self.final)}})
        config["trainer"]["callbacks"] = callbacks
        self._config = self.folder / "config.yaml"
        self._config.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")

    def events(self) -> list[dict[str, Any]]:
        """Everything that the run announced so far."""
        return read_lines(self._events)

    def execute(self, show: Callable[[int], None], stop: KillMidWindow | None = None) -> None:
        """Run the command to its end, or until ``stop`` says to kill it.

        Raises:
            RunError: The child failed, hung, or ended before it could be killed.
        """
        tail = Tail(self._events)
        tail.skip()

        def look() -> bool:
            show(last_step(self.losses))
            return stop is not None and stop.watch(tail.new())

        status = run_child(["moetion_lightning", "fit", "--config", str(self._config)], self.log, look)
        if stop is not None:
            if not stop.due:
                raise RunError(f"the run ended before it could be killed (status {status}); {last_output(self.log)}")
            stop.watch(tail.new())  # what it still announced until the signal arrived
        elif status != 0:
            raise RunError(f"the run failed with status {status}; {last_output(self.log)}")


def _compare(failing: _Run, twin: _Run) -> Checks:
    from moetion_lightning.testing.compare import compare_losses, compare_states  # torch: not for --help

    return total(
        {
            "parameters and buffers": [compare_states(failing.final, twin.final, ("parameter:", "buffer:"))],
            "optimizer state": [compare_states(failing.final, twin.final, ("optimizer:",))],
            "losses": [compare_losses(failing.losses, twin.losses)],
        }
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
        raise RunError("the restarted run found no window to continue from: its events name no restore and no replay")
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
